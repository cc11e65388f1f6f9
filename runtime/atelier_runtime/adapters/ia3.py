"""(IA)³ (arXiv:2205.05638): a trained factor for each output, or for each input, of a layer. A module of lycoris-lora."""

from lycoris.modules.ia3 import IA3Module
from torch import Tensor


class Ia3(IA3Module):
    """The library's module, whose update is added to the layer's output and leaves its bias alone.

    By itself it scales the output, bias and all, which the weights that it merges into cannot hold; or, on inputs, scales the input,
    which in bf16 swallows factors within 1/256 of 1. The factors are stored less 1, so that they start at zero.
    """

    def bypass_forward(self, x: Tensor, scale: float = 1) -> Tensor:
        """[..., inputs] to [..., outputs]; channels of a convolution are in dimension 1."""
        output: Tensor = self.org_forward(x)
        layer = self.org_module[0]
        if self.train_input:
            scaled = self._channel_scale(x, scale, diff=True).to(x.dtype)
            return output + self.op(scaled, layer.weight, None, **self.kw_dict).to(output.dtype)
        unbiased = output
        if layer.bias is not None:
            unbiased = output - layer.bias.view(-1, *[1] * (len(self.shape) - 2)).to(output.dtype)
        return output + self._channel_scale(unbiased, scale, diff=True).to(output.dtype)
