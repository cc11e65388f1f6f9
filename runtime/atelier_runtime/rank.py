"""Entry point of one rank, which the agent has torchrun start: `python -m atelier_runtime.rank --run-file run.json`.

While it imports, Python goes through all that is there by then, again and again, in search of garbage. There is none, and it is an
eighth of what the start of a rank takes. So it is not looked for meanwhile, nor among what was imported ever after.
"""

import gc
import sys


def main() -> int:
    """Import what a run needs, and run it."""
    gc.disable()
    from atelier_runtime import launch

    gc.freeze()
    gc.enable()
    return launch.main()


if __name__ == "__main__":
    sys.exit(main())
