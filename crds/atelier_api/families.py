"""The table of model families: what validation and the planner must know without torch. One row per family."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Flavour:
    """A published checkpoint and its sizes.

    `parameters` counts the denoiser only (one expert), `width` is the hidden size of a block, `mlp_width` of its feed-forward.
    `text_tokens` are the tokens that take part in attention beside the picture's. `encoder_parameters` counts the text encoders,
    `vae_parameters` the autoencoder. `activation_bytes_per_token` is what one block keeps for the backward pass, in bf16 and
    without recompute, per token of a sample.
    """

    name: str
    source: str
    parameters: int
    layers: int
    width: int
    mlp_width: int
    text_tokens: int
    encoder_parameters: int
    vae_parameters: int
    activation_bytes_per_token: int
    experts: int = 1


@dataclass(frozen=True)
class FamilyFacts:
    """One row. `frame_rule` (m, r): a clip has n = r modulo m frames. `shift` is the fallback where a checkpoint names none.

    `latent_factor` and `temporal_factor` are the autoencoder's, `patch` is the side of a token in latent pixels.
    """

    name: str
    title: str
    modality: Literal["image", "video"]
    objective: Literal["flow", "diffusion"]
    pixel_multiple: int
    latent_channels: int
    latent_factor: int
    patch: int
    shift: float | Literal["dynamic", "none"]
    licence: str
    flavours: tuple[Flavour, ...]
    frame_rule: tuple[int, int] | None = None
    temporal_factor: int = 1
    frame_rate: float | None = None

    def latent_tokens(self, width: int, height: int, frames: int = 1) -> int:
        """Tokens of one sample of `width` x `height` pixels and `frames` frames."""
        edge = self.latent_factor * self.patch
        latent_frames = (frames - 1) // self.temporal_factor + 1
        return (width // edge) * (height // edge) * latent_frames
