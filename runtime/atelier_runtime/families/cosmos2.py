"""Cosmos-Predict2, text to image: flow matching on pictures, drawn by a pipeline that counts noise as EDM does.

The pipeline's latents are clean + sigma * noise with sigma from 80 to 0.002. It gives the network them times 1 / (1 + sigma) and the
time sigma / (1 + sigma), and takes (1 - time) * latents - time * output for the clean picture. With that time as ours the input is
(1 - time) * clean + time * noise, and the output is noise - clean: plain flow matching, so nothing is scaled here.

Latents [B, 16, H/8, W/8] of Wan's autoencoder, the posterior's mode of a clip of one frame. Text: T5-11B, 512 tokens with zeros
after the true length, all of which take part in attention. Source: diffusers' `pipeline_cosmos2_text2image.py` and
`transformer_cosmos.py`.
"""

from collections.abc import Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from atelier_api.errors import ConfigError
from atelier_runtime.family import Blocks, Conditions, Family, Features, Latents, TimeEmbedder
from atelier_runtime.family_parts.channels import standardised

TEXT_TOKENS = 512
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # of self- and cross-attention
MLP = ("ff.net.0.proj", "ff.net.2")


class Guardrail:
    """NVIDIA's check of prompts and pictures, which the licence asks for. Loaded with the first picture: nothing else needs it.

    Raises ConfigError where a picture is to be drawn and it is not installed.
    """

    @cached_property
    def _checker(self) -> Any:
        try:
            package = import_module("cosmos_guardrail")
        except ImportError as error:
            raise ConfigError(
                "spec.validation.prompts asks for samples of the family cosmos2, whose licence wants them checked, but the package "
                "cosmos_guardrail is not installed; install it in the image of the runtime, or remove the prompts"
            ) from error
        return package.CosmosSafetyChecker()

    def to(self, device: torch.device | str) -> "Guardrail":
        self._checker.to(device)
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return bool(self._checker.check_text_safety(prompt))

    def check_video_safety(self, frames: np.ndarray) -> np.ndarray:
        """Frames [F, H, W, 3], 0 to 255, with faces blurred; raises or gives None as the package does."""
        return self._checker.check_video_safety(frames)


class Cosmos2(Family):
    """Cosmos-Predict2 Text2Image, 2B and 14B."""

    name = "cosmos2"
    pipeline = "Cosmos2TextToImagePipeline"
    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}  # noqa: RUF012
    blocks = (Blocks("transformer_blocks"),)
    # The waves go into every norm by themselves as well, which are told where a step starts and no more.
    time_embedder = TimeEmbedder("time_embed.t_embedder", "time_embed.time_proj")

    def provided_components(self, folder: Path) -> dict[str, Any]:
        """The safety checker, which no checkpoint holds: without one the pipeline would load it whole, to encode text as well."""
        _resize_without_torchvision()
        return {"safety_checker": Guardrail()}

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`embeds` [L, 1024] without the zeros after the true length; `collate_text` puts them back."""
        embeds, _ = pipe.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=TEXT_TOKENS,
            device=pipe.text_encoder.device,
        )
        lengths = [int(row.any(dim=-1).nonzero().max()) + 1 for row in embeds]
        return [{"embeds": row[:length].clone()} for row, length in zip(embeds, lengths, strict=True)]

    def collate_text(self, samples: Sequence[Features]) -> Features:
        """`embeds` [B, 512, 1024], zeros after each sample's length: the network attends to them when sampling, too."""
        rows = [sample["embeds"] for sample in samples]
        return {"embeds": torch.stack([functional.pad(row, (0, 0, 0, TEXT_TOKENS - len(row))) for row in rows])}

    def encode_pixels(self, pipe: Any, pixels: Tensor) -> Latents:
        """Latents of [B, 3, H, W] pixels in [-1, 1]."""
        mode = pipe.vae.encode(pixels.unsqueeze(2).to(pipe.vae.dtype)).latent_dist.mode().squeeze(2)
        return Latents(mean=standardised(pipe.vae, mode) * pipe.sigma_data)

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean, [B, 16, H, W]."""
        _resize_without_torchvision()
        return denoiser(
            hidden_states=noisy.unsqueeze(2),
            timestep=time,
            encoder_hidden_states=conditions.text["embeds"].to(noisy.dtype),
            # 1 would mark pixels outside of the picture; of any size, since the network brings it to that of the latents.
            padding_mask=noisy.new_zeros(1, 1, *noisy.shape[-2:]),
            return_dict=False,
        )[0].squeeze(2)


def _resize_without_torchvision() -> None:
    """Gives the network the one function of torchvision that it calls, where that is not installed: for the mask of padding."""
    from diffusers.models.transformers import transformer_cosmos

    if not hasattr(transformer_cosmos, "transforms"):
        nearest = SimpleNamespace(NEAREST="nearest")
        transformer_cosmos.transforms = SimpleNamespace(
            functional=SimpleNamespace(resize=_resize), InterpolationMode=nearest
        )


def _resize(mask: Tensor, size: list[int], interpolation: str) -> Tensor:
    return functional.interpolate(mask, size=size, mode=interpolation)


FAMILY = Cosmos2()
