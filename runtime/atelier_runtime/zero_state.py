"""The state of a run under DeepSpeed, as checkpoints of every strategy hold it.

DeepSpeed keeps flat vectors that are cut by the number of ranks. A checkpoint has tensors by parameter, each cut along its first
dimension, so that any strategy and any number of ranks can go on from it. They are gathered on the device one after another, and
kept on the CPU.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn import Parameter

from atelier_api.errors import ConfigError
from atelier_runtime.optimizers import Ema
from atelier_runtime.optimizers.moments import initial_state
from atelier_runtime.parallel import Distributed
from atelier_runtime.parallel.zero import MOMENTS, Partitioned


class ZeroState:
    """Trained parameters, optimizer state and moving average of denoisers that are `Partitioned`, and the steps done.

    The average is whole on every rank where the weights are (stage 2), and sharded as they are at stage 3.
    """

    def __init__(
        self,
        denoisers: Mapping[str, Partitioned],
        parameters: Mapping[str, Parameter],
        distributed: Distributed,
        *,
        ema_decay: float | None,
    ) -> None:
        """`parameters` by full name, `<denoiser>.<parameter>`. The optimizer's state is there from the start."""
        self.step = 0
        self.parameters = parameters
        self._denoisers = denoisers
        self._device = distributed.device
        self._kept = init_device_mesh("cpu", (distributed.world_size,))
        self._gathered = init_device_mesh(distributed.device.type, (distributed.world_size,))
        for denoiser in denoisers.values():
            for part, state in denoiser.state():
                state.update(initial_state(part, part.device))
            denoiser.link_state()
        parts = {name: owner.part(parameter) for name, parameter, owner in self._owned()}
        self._ema = None if ema_decay is None else Ema(parts, ema_decay)

    def update(self, denoiser: str, learning_rate: float) -> Tensor:
        """One optimizer step of one denoiser. Gives the norm of its gradient before clipping. Collective."""
        norm = self._denoisers[denoiser].step(learning_rate)
        if self._ema is not None:
            self._ema.update()
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the weights are their moving average where there is one."""
        if self._ema is None:
            yield
            return
        self._release()
        with self._ema.swapped():
            try:
                yield
            finally:
                self._release()

    def tensors(self) -> dict[str, Any]:
        """The state as `TrainState.tensors` gives it, but its tensors are copies on the CPU. Collective."""
        state: dict[str, Any] = {
            "step": self.step,
            "weights": {name: self._cut(owner.weight(parameter)) for name, parameter, owner in self._owned()},
            "optimizer": {name: self._optimizer_state(parameter, owner) for name, parameter, owner in self._owned()},
        }
        if self._ema is not None:
            ema = self._ema.state_dict()
            averages = ema["averages"]
            cut = {name: self._cut(owner.whole(parameter, averages[name])) for name, parameter, owner in self._owned()}
            state["ema"] = {"updates": ema["updates"], "averages": cut}
        return state

    def restored(self, state: Mapping[str, Any]) -> None:
        """A resume has written into the tensors of `state`, which `tensors()` gave; take them over. Collective.

        Raises ConfigError where parameters of one denoiser have been trained for different numbers of steps.
        """
        self.step = int(state["step"])
        self._release()
        for name, parameter, owner in self._owned():
            owner.set_weight(parameter, self._whole(state["weights"][name]))
            for moment in MOMENTS:
                owner.set_moment(parameter, moment, self._whole(state["optimizer"][name][moment]))
        for denoiser, owner in self._denoisers.items():
            own = [name for name in self.parameters if name.startswith(f"{denoiser}.")]
            steps = _one(denoiser, {float(state["optimizer"][name]["step"]) for name in own})
            for _, part_state in owner.state():
                part_state["step"].fill_(steps)
        if self._ema is not None:
            ema = state["ema"]
            averages = {
                name: owner.part_of(parameter, self._whole(ema["averages"][name]))
                for name, parameter, owner in self._owned()
            }
            self._ema.load_state_dict({"updates": ema["updates"], "averages": averages})

    def _owned(self) -> Iterator[tuple[str, Parameter, Partitioned]]:
        """Name, parameter, and the denoiser that it is of."""
        for name, parameter in self.parameters.items():
            yield name, parameter, self._denoisers[name.partition(".")[0]]

    def _optimizer_state(self, parameter: Parameter, owner: Partitioned) -> dict[str, Tensor]:
        (_, state), *_ = owner.state()
        moments = {moment: self._cut(owner.moment(parameter, moment)) for moment in MOMENTS}
        return {"step": state["step"].to("cpu", copy=True), **moments}

    def _release(self) -> None:
        for denoiser in self._denoisers.values():
            denoiser.release()

    def _cut(self, whole: Tensor) -> Tensor:
        """This rank's share of a tensor, copied to the CPU; all of a single number."""
        if whole.ndim == 0:
            return whole.to("cpu", copy=True)
        sizes, offsets = compute_local_shape_and_global_offset(whole.shape, self._kept, [Shard(0)])
        local = whole.narrow(0, offsets[0], sizes[0]).to("cpu", copy=True)
        return DTensor.from_local(
            local, self._kept, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def _whole(self, cut: Tensor) -> Tensor:
        """What `_cut` was given, on the device. Collective."""
        if not isinstance(cut, DTensor):
            return cut.to(self._device)
        local = cut.to_local().to(self._device)
        moved = DTensor.from_local(
            local, self._gathered, [Shard(0)], run_check=False, shape=cut.shape, stride=cut.stride()
        )
        return moved.full_tensor()


def _one(denoiser: str, steps: set[float]) -> float:
    """The one number of steps."""
    if len(steps) > 1:
        raise ConfigError(
            f"the newest checkpoint has trained the parameters of {denoiser} for {min(steps):g} to {max(steps):g} steps, and "
            "DeepSpeed keeps one number for all; set spec.parallelism.strategy to fsdp2 or ddp"
        )
    return steps.pop()
