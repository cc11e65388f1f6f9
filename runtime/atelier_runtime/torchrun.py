"""torchrun, with two things added: it writes down how each rank ended, and it ends with the agent that started it.

torchrun's own exit status is 1 whatever happened to its ranks. Started by the agent as
`python -m atelier_runtime.torchrun --endings FOLDER --node-rank N -- <arguments of torchrun>`.
"""

import argparse
import logging
import signal
import sys
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from atelier_api.log import setup_logging
from atelier_runtime.observe.failure import Ending, record_failure, write_endings
from atelier_runtime.process_group import ask_for_signal_when_parent_dies

log = logging.getLogger(__name__)


def main() -> int:
    """0: all ranks were done. 1: see the files in the folder of endings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--endings", type=Path, required=True)
    parser.add_argument("--node-rank", type=int, required=True)
    parser.add_argument("--first-rank", type=int, required=True)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    ask_for_signal_when_parent_dies(signal.SIGTERM)
    setup_logging()
    try:
        run.main(options.arguments[1:])
    except ChildFailedError as error:
        endings = [
            Ending(rank=rank, status=failure.exitcode, time=failure.timestamp)
            for rank, failure in error.failures.items()
        ]
        write_endings(options.endings, options.node_rank, endings)
        return 1
    except SignalException:
        log.info("ranks stopped")
        return 1
    except Exception as error:  # rendezvous: the ranks were never started, or this node lost the others
        log.warning("torchrun failed", exc_info=True)
        record_failure(options.endings, options.first_rank, error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
