"""The writer process, as its trainer holds it.

It is forked from the trainer: the imports of a rank are most of what a process of its own would cost, in seconds and in memory.
A fork is safe only while the trainer has neither threads nor a GPU, so it is made first of all, long before there is
anything to save, and told later what it writes.
"""

import os
from pathlib import Path
from typing import NoReturn

import psutil  # type: ignore[import-untyped]
import torch

from atelier_runtime.checkpoint import writer
from atelier_runtime.checkpoint.messages import Pipe
from atelier_runtime.checkpoint.snapshot import SharedMemory
from atelier_runtime.process_group import name_this_process

SLOTS = 2
"""Snapshots that there can be at a time: one that is being written, and one that waits."""

_NAME = "atelier-writer"


class WriterProcess:
    """A process that waits for its settings. It ends when this object's process does, or closes `pipe`."""

    def __init__(self, folder: Path) -> None:
        """Fork it. `folder` holds the snapshots where the system has no memory that is shared without a name.

        Raises OSError where the system has no process or memory left, RuntimeError where there is a process group already: the
        fork would take its sockets along, and could not join the one of the writers.
        """
        if torch.distributed.is_initialized():
            raise RuntimeError("the checkpoint writer is forked before the process group is started")
        self.memories = tuple(SharedMemory.create(folder) for _ in range(SLOTS))
        self.pipe, theirs = Pipe.pair()
        trainer = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._serve(theirs, trainer)
        os.close(theirs)
        self.process = psutil.Process(pid)

    def _serve(self, descriptor: int, trainer: int) -> NoReturn:
        """The forked process, which must not return to what the trainer was doing."""
        try:
            os.setsid()  # torchrun signals whole groups
            name_this_process(_NAME)
            with open(os.devnull) as nothing:
                os.dup2(nothing.fileno(), 0)
            self.pipe.close()
            writer.serve(Pipe.inherited(descriptor), self.memories, trainer)
        finally:
            os._exit(1)
