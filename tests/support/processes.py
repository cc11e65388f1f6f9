"""Several ranks of one function in processes of their own, as torchrun would start them.

The ranks meet at a store that the calling process holds, so there is no port to guess and no race for it.
"""

import importlib
import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SUPPORT = Path(__file__).parent
LINES_SHOWN = 40
GRACE_SECONDS = 5
"""How long the other ranks may go on after one has failed: often they have more to say."""


def run_ranks(world: int, target: str, *arguments: Any, timeout: float = 300) -> list[Any]:
    """Results of `module:function` called with `arguments` in `world` processes, by rank.

    The module must be importable from `tests/support` or installed; arguments and results are pickled. Raises AssertionError with
    the end of every rank's output when one fails or the time is over; no process is left behind.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "arguments.pickle").write_bytes(pickle.dumps(arguments))
        ranks = [_start(rank, world, target, folder, store.port) for rank in range(world)]
        try:
            problem = _wait(ranks, time.monotonic() + timeout, timeout)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if problem:
            raise AssertionError(f"{target} in {world} processes: {problem}\n{_outputs(ranks, folder)}")
        return [pickle.loads((folder / f"result-{rank}.pickle").read_bytes()) for rank in range(world)]


def _start(rank: int, world: int, target: str, folder: Path, port: int) -> "subprocess.Popen[bytes]":
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is the caller's: no rank opens one
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")]),
    }
    with (folder / f"output-{rank}.txt").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, __file__, target, str(folder)],
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _wait(ranks: Sequence["subprocess.Popen[bytes]"], deadline: float, timeout: float) -> str | None:
    """None when all ranks have ended well, else what went wrong."""
    while any(process.poll() is None for process in ranks):
        if any(process.poll() for process in ranks):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    codes = [process.poll() for process in ranks]
    failed = [f"rank {rank} exit code {code}" for rank, code in enumerate(codes) if code]
    if failed:
        return ", ".join(failed)
    running = [str(rank) for rank, code in enumerate(codes) if code is None]
    return f"rank {', '.join(running)} still running after {timeout:g} s" if running else None


def _outputs(ranks: Sequence["subprocess.Popen[bytes]"], folder: Path) -> str:
    parts = []
    for rank in range(len(ranks)):
        lines = (folder / f"output-{rank}.txt").read_text(errors="replace").splitlines()
        parts.append("\n".join([f"--- rank {rank}", *lines[-LINES_SHOWN:]]))
    return "\n".join(parts)


def _main() -> int:
    target, folder = sys.argv[1], Path(sys.argv[2])
    module, _, function = target.partition(":")
    arguments = pickle.loads((folder / "arguments.pickle").read_bytes())
    result = getattr(importlib.import_module(module), function)(*arguments)
    (folder / f"result-{os.environ['RANK']}.pickle").write_bytes(pickle.dumps(result))
    return 0


if __name__ == "__main__":
    try:
        code = _main()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a rank that failed must not wait at exit for its peers
