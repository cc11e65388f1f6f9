"""The most memory that a call without gradients holds at once, measured at full size: on the meta device nothing is allocated."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Held(TorchDispatchMode):
    """Counts the storages that operations make, from when they are made until nothing refers to them."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._total = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        # Who is gone is asked for only where it matters: it takes longer than the operation.
        if self._total > self.peak:
            self._held = {key: entry for key, entry in self._held.items() if not entry[0].expired()}
            self._total = sum(size for _, size in self._held.values())
            self.peak = max(self.peak, self._total)
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        _, before = self._held.get(storage._cdata, (None, 0))
        self._total += storage.nbytes() - before
        self._held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())


def fused_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Holds what the fused kernels hold: the output."""
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def peak_bytes(call: Callable[[], object]) -> int:
    """Bytes of what `call` makes on the meta device, at its highest; without what was there before."""
    with mock.patch.object(F, "scaled_dot_product_attention", fused_attention), torch.no_grad(), _Held() as held:
        call()
    return held.peak
