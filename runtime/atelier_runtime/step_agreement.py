"""One small collective per step, read one step later: the mean losses, and what all ranks must agree on.

Reading a result in the step that made it would make the CPU wait for the device. The numbers of step n are asked for after the
work of step n + 1 has been queued; before a checkpoint and at the end they are asked for at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from atelier_runtime.parallel import Distributed


@dataclass(frozen=True)
class StepFacts:
    """What all ranks know of a step. `loss` and `gradient_norm` are over the global batch; either may be non-finite.

    `techniques` are the losses beside the objective's, which `loss` does not hold.
    """

    step: int
    loss: float
    gradient_norm: float
    stop: bool
    checkpoint_due: bool
    techniques: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Pending:
    """`values`: loss, norm and so many losses of techniques, and with several ranks the sums of flags. `flags` are this rank's own."""

    step: int
    values: Tensor
    work: "torch.distributed.Work | None"
    techniques: int
    flags: tuple[bool, bool]


class StepAgreement:
    """Sums a few numbers over the ranks without stalling the step that made them."""

    def __init__(self, distributed: Distributed) -> None:
        self._distributed = distributed
        self._pending: _Pending | None = None

    def submit(
        self, step: int, losses: Sequence[Tensor], gradient_norm: Tensor, *, stop: bool, checkpoint_due: bool
    ) -> StepFacts | None:
        """Queue the numbers of `step` and give those of the step before.

        `losses`, the objective's and then each technique's, are this rank's shares of the means, so that the sums over ranks are
        the means. `stop` on any rank stops all; only rank 0's clock counts for `checkpoint_due`.
        """
        world_size = self._distributed.world_size
        loss, *techniques = losses
        values, work = torch.stack([each.detach().float() for each in (loss, gradient_norm, *techniques)]), None
        if world_size > 1:
            values[1] /= world_size
            flags = torch.tensor([float(stop), float(checkpoint_due)], device=values.device)
            values = torch.cat([values, flags])
            work = torch.distributed.all_reduce(values, async_op=True)
        earlier = self.collect()
        self._pending = _Pending(step, values, work, len(techniques), (stop, checkpoint_due))
        return earlier

    def collect(self) -> StepFacts | None:
        """The numbers of the newest submitted step, waiting for them; None when they have been given already."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        if pending.work is not None:
            pending.work.wait()
        loss, norm, *rest = pending.values.tolist()
        techniques, sums = rest[: pending.techniques], rest[pending.techniques :]
        stop, due = (total > 0 for total in sums) if sums else pending.flags
        return StepFacts(pending.step, loss, norm, stop, due, tuple(techniques))
