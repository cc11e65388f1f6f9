"""Micro-batches for one rank, read ahead by a thread.

The slots of a global batch are dealt out in turns: of W ranks, rank r gets slots r, r + W, r + 2W … Its micro-batch j of size m
thus lies in the stretch [j * m * W, (j + 1) * m * W) of the global batch, together with micro-batch j of all others. Fillings are
at the end, so they are spread over the ranks, and a micro-batch that is all filling on all ranks is left out by all.
"""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from atelier_api.errors import ConfigError
from atelier_runtime.data.dataset import Dataset, MicroBatch
from atelier_runtime.data.order import Slot, StepBatch

READ_AHEAD = 2


@dataclass(frozen=True)
class _Error:
    error: BaseException


def rank_slots(batch: StepBatch, rank: int, world_size: int, micro_batch_size: int) -> list[tuple[Slot, ...]]:
    """The slots of each micro-batch of a rank. Their number is the same on every rank, and at least one."""
    stretch = micro_batch_size * world_size
    starts = range(0, len(batch.slots), stretch)
    stretches = [batch.slots[start : start + stretch] for start in starts]
    return [slots[rank::world_size] for slots in stretches if any(slot.weight for slot in slots)]


class Loader(Iterator[tuple[int, list[MicroBatch]]]):
    """Gives (step, micro-batches) from `start_step` on, without end. Errors of the reading thread are raised by `next`.

    The thread reads on when `read_on` is called, at the latest at the next `next`: both threads need the lock of the interpreter,
    so it had better work while the trainer does not.
    """

    def __init__(self, dataset: Dataset, *, rank: int, world_size: int, micro_batch_size: int, start_step: int) -> None:
        global_batch_size = len(dataset.order.batch(start_step).slots)
        if global_batch_size % world_size:
            raise ConfigError(
                f"spec.hyperparameters.globalBatchSize is {global_batch_size}; it must be a multiple of the "
                f"{world_size} processes of the run; change it or spec.parallelism"
            )
        self.wait_seconds = 0.0
        """Time that `next` has waited for data, in all."""
        self._dataset = dataset
        self._rank = rank
        self._world_size = world_size
        self._micro_batch_size = micro_batch_size
        # Two queues of C instead of a bounded one of Python: nothing polls, and a step takes a few calls.
        self._steps: queue.SimpleQueue[tuple[int, list[MicroBatch]] | _Error] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[bool] = queue.SimpleQueue()
        for _ in range(READ_AHEAD):
            self._room.put(True)
        self._owes_room = False
        self._closed = False
        self._thread = threading.Thread(target=self._read, args=(start_step,), name="data-loader", daemon=True)
        self._thread.start()

    def __next__(self) -> tuple[int, list[MicroBatch]]:
        if self._closed:
            raise StopIteration
        self.read_on()
        started = time.perf_counter()
        item = self._steps.get()
        self.wait_seconds += time.perf_counter() - started
        self._owes_room = True
        if isinstance(item, _Error):
            self.close()
            raise item.error
        return item

    def read_on(self) -> None:
        """Have the step read that fills the place of the one taken last."""
        if self._owes_room:
            self._owes_room = False
            self._room.put(True)

    def close(self) -> None:
        """Stop reading. Safe to call twice."""
        self._closed = True
        self._room.put(False)
        self._thread.join()

    def _read(self, step: int) -> None:
        try:
            if self._dataset.device.index is not None and self._dataset.device.type == "cuda":
                torch.cuda.set_device(
                    self._dataset.device
                )  # per thread; else pinning may open a context on the first GPU
            while not self._closed and self._put((step, self._step(step))):
                step += 1
        except BaseException as error:
            self._put(_Error(error))

    def _step(self, step: int) -> list[MicroBatch]:
        batch = self._dataset.order.batch(step)
        slots = rank_slots(batch, self._rank, self._world_size, self._micro_batch_size)
        loaded = [self._dataset.load(part, step=step, epoch=batch.epoch) for part in slots]
        return [part.pinned() for part in loaded] if self._dataset.device.type == "cuda" else loaded

    def _put(self, item: tuple[int, list[MicroBatch]] | _Error) -> bool:
        """Wait for room and hand the item over; False where the loader has been closed instead."""
        if not self._room.get():
            return False
        self._steps.put(item)
        return True
