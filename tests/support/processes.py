"""Several ranks of one function in processes of their own, as torchrun would start them.

The ranks meet at a store that the calling process holds, so there is no port to guess and no race for it. They are forked from a
process that has imported the runtime and their module already: imports are six seconds of each rank, more than most of what is tried
takes.
"""

import contextlib
import gc
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

LINES_SHOWN = 40
GRACE_SECONDS = 5
"""How long the other ranks may go on after one has failed: often they have more to say."""

PRELOADED = ("atelier_runtime.launch", "diffusers.models.transformers", "diffusers.models.autoencoders")


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
        if problem:
            raise AssertionError(f"{target} in {world} processes: {problem}\n{_outputs(ranks, folder)}")
        return [pickle.loads((folder / f"result-{rank}.pickle").read_bytes()) for rank in range(world)]


@dataclass(frozen=True)
class Rank:
    """A process that the nursery has forked. It leaves its exit code in a file, since it is nobody's child here."""

    pid: int
    ending: Path

    def poll(self) -> int | None:
        """The exit code; None while it runs, and the negative signal of one that was killed."""
        running = Path(f"/proc/{self.pid}").exists()
        if self.ending.exists():
            return int(self.ending.read_text())
        return None if running else -signal.SIGKILL

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        while Path(f"/proc/{self.pid}").exists():
            time.sleep(0.005)


@cache
def _nursery() -> "subprocess.Popen[str]":
    """The process that ranks are forked from. It ends with this one, whose end closes its input."""
    return subprocess.Popen(
        [sys.executable, __file__],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _start(rank: int, world: int, target: str, folder: Path, port: int) -> Rank:
    environment = dict(os.environ) | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is the caller's: no rank opens one
    }
    nursery = _nursery()
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    print(json.dumps([target, str(folder), environment]), file=nursery.stdin, flush=True)
    return Rank(int(nursery.stdout.readline()), folder / f"ending-{rank}.txt")


def _wait(ranks: Sequence[Rank], deadline: float, timeout: float) -> str | None:
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


def _outputs(ranks: Sequence[Rank], folder: Path) -> str:
    parts = []
    for rank in range(len(ranks)):
        lines = (folder / f"output-{rank}.txt").read_text(errors="replace").splitlines()
        parts.append("\n".join([f"--- rank {rank}", *lines[-LINES_SHOWN:]]))
    return "\n".join(parts)


def _fork_for_each(requests: IO[str], pids: IO[str]) -> None:
    """The nursery: a rank for each line of `requests`, whose pid it answers. Returns when the lines end."""
    for module in PRELOADED:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in requests:
        target, folder, environment = json.loads(line)
        with contextlib.suppress(Exception):  # which the rank will show
            importlib.import_module(target.partition(":")[0])
        gc.freeze()  # else a rank's collections walk through all that was ever imported, and copy it by that
        pid = os.fork()
        if pid == 0:
            _live(target, folder, environment)
        print(pid, file=pids, flush=True)


def _live(target: str, folder: str, environment: dict[str, str]) -> None:
    """A rank, from its birth to its end, in the environment that the caller has by now."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    rank = environment["RANK"]
    with Path(folder, f"output-{rank}.txt").open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    code = 0
    try:
        module, _, function = target.partition(":")
        arguments = pickle.loads(Path(folder, "arguments.pickle").read_bytes())
        result = getattr(importlib.import_module(module), function)(*arguments)
        Path(folder, f"result-{rank}.pickle").write_bytes(pickle.dumps(result))
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    unfinished = Path(folder, f"ending-{rank}.unfinished")
    unfinished.write_text(str(code))
    unfinished.rename(Path(folder, f"ending-{rank}.txt"))  # else it could be read before it is written
    os._exit(code)  # a rank that failed must not wait at exit for its peers


if __name__ == "__main__":
    _fork_for_each(sys.stdin, sys.stdout)
