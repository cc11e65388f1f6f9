"""The picture encoder of Stable Cascade's stage C, with the module names of its published checkpoint.

EfficientNetV2-S (arXiv:2104.00298) up to its last features, and a layer that makes 16 normalised channels of them. diffusers lacks it:
its pipelines draw latents and decode them. Only for use: there is no stochastic depth, and batch norms are meant to stay as trained.
docs/models/stable-cascade.md has the table of names and shapes. Facts: https://github.com/Stability-AI/StableCascade (MIT),
`modules/effnet.py`, and torchvision's `models/efficientnet.py` (BSD), from which the names come.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

EPSILON = 1e-3  # of the batch norms of EfficientNetV2; that of the mapper has torch's default
SQUEEZED = 4  # a block's inputs are this many times the width inside its squeeze


@dataclass(frozen=True)
class Stage:
    """A row of table 4 of the paper. `stride` is that of its first block, `expansion` how much wider blocks are inside."""

    fused: bool
    expansion: int
    stride: int


STAGES = (
    Stage(fused=True, expansion=1, stride=1),
    Stage(fused=True, expansion=4, stride=2),
    Stage(fused=True, expansion=4, stride=2),
    Stage(fused=False, expansion=4, stride=2),
    Stage(fused=False, expansion=6, stride=1),
    Stage(fused=False, expansion=6, stride=2),
)


class EfficientNetEncoder(ModelMixin, ConfigMixin):
    """The published network; the arguments are its sizes. `widths` and `depths` are of the six stages."""

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        stem_width: int = 24,
        widths: Sequence[int] = (24, 48, 64, 128, 160, 256),
        depths: Sequence[int] = (2, 4, 4, 6, 9, 15),
        feature_width: int = 1280,
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = [convolution(3, stem_width, 3, stride=2)]
        width = stem_width
        for stage, outputs, depth in zip(STAGES, widths, depths, strict=True):
            blocks = []
            for number in range(depth):
                blocks.append(Block(stage, width, outputs, stride=1 if number else stage.stride))
                width = outputs
            parts.append(nn.Sequential(*blocks))
        parts.append(convolution(width, feature_width, 1))
        self.backbone = nn.Sequential(*parts)
        self.mapper = nn.Sequential(
            nn.Conv2d(feature_width, latent_channels, 1, bias=False), nn.BatchNorm2d(latent_channels, affine=False)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W], normalised by the mean and deviation of ImageNet, to latents [B, 16, H/32, W/32]."""
        return self.mapper(self.backbone(pixels))


class Block(nn.Module):
    """A residual block that is wider inside: of whole convolutions, or of convolutions in each channel and a squeeze."""

    def __init__(self, stage: Stage, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        inner = inputs * stage.expansion
        if stage.fused and stage.expansion == 1:
            layers = [convolution(inputs, outputs, 3, stride=stride)]
        elif stage.fused:
            layers = [convolution(inputs, inner, 3, stride=stride), convolution(inner, outputs, 1, active=False)]
        else:
            layers = [
                convolution(inputs, inner, 1),
                convolution(inner, inner, 3, stride=stride, groups=inner),
                SqueezeExcitation(inner, inputs // SQUEEZED),
                convolution(inner, outputs, 1, active=False),
            ]
        self.block = nn.Sequential(*layers)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, maps: Tensor) -> Tensor:
        changed = self.block(maps)
        return maps + changed if self.is_residual else changed


class SqueezeExcitation(nn.Module):
    """Weighs channels by what the whole picture has in them (arXiv:1709.01507)."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)

    def forward(self, maps: Tensor) -> Tensor:
        whole = maps.mean(dim=(2, 3), keepdim=True)
        return maps * torch.sigmoid(self.fc2(nn.functional.silu(self.fc1(whole))))


def convolution(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, active: bool = True
) -> nn.Module:
    """Convolution without bias, batch norm, and SiLU where `active`."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=EPSILON),
    ]
    return nn.Sequential(*layers, nn.SiLU()) if active else nn.Sequential(*layers)
