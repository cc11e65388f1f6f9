"""Cosmos-Predict2, text to image."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    Cosmos2TextToImagePipeline,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import T5Config, T5EncoderModel

from atelier_runtime.families.cosmos2 import FAMILY
from family_models.kinds import Published, Tiny, from_the_positive
from family_models.parts import seeded, t5_encoder, t5_tokenizer


class CosmosSafetyChecker:
    """Stands in for the package of that name, whose networks have 8 billion parameters: everything is safe, no face is blurred."""

    def to(self, device: Any) -> None:
        pass

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: np.ndarray) -> np.ndarray:
        return frames


def tiny() -> Cosmos2TextToImagePipeline:
    text_width = 24
    package = ModuleType("cosmos_guardrail")
    package.CosmosSafetyChecker = CosmosSafetyChecker  # type: ignore[attr-defined]
    sys.modules.setdefault("cosmos_guardrail", package)
    autoencoder = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return Cosmos2TextToImagePipeline(
        text_encoder=t5_encoder(text_width),
        tokenizer=t5_tokenizer(),
        transformer=seeded(
            lambda: CosmosTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=16,
                num_layers=2,
                mlp_ratio=1.5,
                text_embed_dim=text_width,
                adaln_lora_dim=8,
                max_size=(4, 16, 16),
                rope_scale=(1.0, 4.0, 4.0),
                extra_pos_embed_type=None,
            )
        ),
        vae=seeded(lambda: AutoencoderKLWan(z_dim=16, temperal_downsample=[False, True, True], **autoencoder)),
        scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        **FAMILY.provided_components(Path()),
    )


TINY = {
    "cosmos2": Tiny(
        tiny,
        to_grid=lambda _, latents: latents.squeeze(2),
        from_grid=lambda _, grid: grid.unsqueeze(2),
        guided={"guidance_scale": 3.0, "negative_prompt": ""},
        combine=from_the_positive,
        noise="edm",
        clips=True,
        picture_step=1 / 255,
    )
}

T5_11B = T5Config(vocab_size=32128, d_model=1024, d_kv=128, d_ff=65536, num_layers=24, num_heads=128)
_COMMON = {"rope_scale": (1.0, 4.0, 4.0), "extra_pos_embed_type": None}
PUBLISHED = Published(
    denoisers={
        "2b": (CosmosTransformer3DModel, _COMMON | {"num_attention_heads": 16}),
        "14b": (CosmosTransformer3DModel, _COMMON | {"num_attention_heads": 40, "num_layers": 36}),
    },
    encoders=lambda: [T5EncoderModel(T5_11B)],
    autoencoder=AutoencoderKLWan,
    features=lambda: {"embeds": torch.empty(1, 512, 1024, dtype=torch.bfloat16)},
)
