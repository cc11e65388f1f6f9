"""What families share whose control network is ours, as diffusers has none, and is called inside of the base's pass."""

from typing import Any

from torch import Tensor, nn

from atelier_runtime.control import Control


class BlockControl(Control):
    """A network of ours, which is called in the middle of the base's pass: see `atelier_runtime.networks.steering`."""

    picture = "control_image"
    takes = "latents"
    drawn = False

    def copied(self, base: nn.Module) -> nn.Module:
        from atelier_runtime import networks

        network: nn.Module = getattr(networks, self.network).from_transformer(base)
        return network

    def unused(self, network: Any) -> tuple[str, ...]:
        names: tuple[str, ...] = network.unused
        return names

    def predict(
        self, base: nn.Module, network: nn.Module, condition: Tensor, scale: float, *given: Any, **named: Any
    ) -> Any:
        from atelier_runtime.networks.steering import steering

        with steering(base, network, lambda _: condition, scale):
            return base(*given, **named)
