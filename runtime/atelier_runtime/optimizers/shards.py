"""Parameters that are spread over ranks (DTensor) and parameters that are not, behind one view: this rank's part."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only a part of the tensor."""
    return isinstance(tensor, DTensor)


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of them is sharded: one question per type, not per tensor."""
    return any(issubclass(kind, DTensor) for kind in set(map(type, tensors)))


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing storage: what is written to it is written to the tensor. May be empty."""
    # In this order: detaching a DTensor goes through its dispatcher, which costs more than what is done with the result.
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def shard_index(tensor: Tensor) -> tuple[int, ...]:
    """Which part this rank holds; () for a tensor that every rank holds whole."""
    coordinate = tensor.device_mesh.get_coordinate() if isinstance(tensor, DTensor) else None
    return tuple(coordinate or ())


def sum_over_shards(value: Tensor, like: Tensor) -> Tensor:
    """`value` summed in place over the ranks that share `like`. Collective."""
    assert isinstance(like, DTensor)
    torch.distributed.all_reduce(value, group=like.device_mesh.get_group())
    return value
