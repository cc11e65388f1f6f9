"""What each strategy shares out over the processes of a run. Pure."""

from typing import Literal, NamedTuple

Strategy = Literal["single", "ddp", "fsdp2", "deepspeed-zero2", "deepspeed-zero3"]


class Shards(NamedTuple):
    """In how many parts the processes hold what a strategy may share out; 1: every process has all of it."""

    base: int
    weights: int
    gradients: int
    optimizer: int
    ema: int


def shards_of(strategy: Strategy, processes: int, *, whole: bool) -> Shards:
    """The shards of a run; `whole` is whether most weights of a network are trained, and no adapter."""
    if strategy == "fsdp2":  # the base of an adapter is sharded, and the adapter replicated
        trained = processes if whole else 1
        return Shards(processes, trained, trained, trained, trained)
    if strategy == "deepspeed-zero2":
        return Shards(1, 1, processes, processes, 1)
    if strategy == "deepspeed-zero3":
        return Shards(processes, processes, processes, processes, processes)
    return Shards(1, 1, 1, 1, 1)
