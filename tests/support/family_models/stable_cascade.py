"""Stable Cascade: the encoder and the pipeline that holds all stages are ours."""

from typing import Any

import torch
from diffusers import DDPMWuerstchenScheduler
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from torch import nn
from transformers import CLIPTextModelWithProjection

from atelier_runtime.networks import EfficientNetEncoder, StableCascadePipeline, StableCascadeUNet
from family_models.kinds import Published, Tiny
from family_models.parts import clip_config, clip_tokenizer, seeded
from family_models.published_parts import CLIP_G

TEXT_WIDTH, POOLED_WIDTH, CONDITIONS = 24, 20, 2
CONVOLUTION, TIME, ATTENTION = "SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"


def efficientnet() -> EfficientNetEncoder:
    """The encoder, its batch norms fitted to noise as training leaves them: unfitted ones would make one latent of all pictures."""
    made = seeded(
        lambda: EfficientNetEncoder(
            stem_width=8, widths=(8, 8, 8, 16, 16, 24), depths=(2, 2, 1, 2, 1, 2), feature_width=32
        )
    )
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # what it sees last
    with torch.no_grad():
        made.train()(torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(0)))
    return made.eval()


def stage_c(dropout: float = 0.0) -> StableCascadeUNet:
    return seeded(
        lambda: StableCascadeUNet(
            timestep_ratio_embedding_dim=16,
            conditioning_dim=32,
            block_out_channels=(32, 32),
            num_attention_heads=(2, 2),
            down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1),
            clip_text_in_channels=TEXT_WIDTH,
            clip_text_pooled_in_channels=POOLED_WIDTH,
            clip_image_in_channels=12,
            clip_seq=CONDITIONS,
            dropout=(dropout, dropout),
            switch_level=(False,),
        )
    )


def stage_b() -> StableCascadeUNet:
    return seeded(
        lambda: StableCascadeUNet(
            **STAGE_B,
            timestep_ratio_embedding_dim=16,
            conditioning_dim=16,
            block_out_channels=(8, 16),
            num_attention_heads=(0, 2),
            down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1),
            up_blocks_repeat_mappers=(2, 1),
            block_types_per_layer=((CONVOLUTION, TIME), (CONVOLUTION, TIME, ATTENTION)),
            clip_text_pooled_in_channels=POOLED_WIDTH,
            clip_seq=CONDITIONS,
        )
    )


def stage_a() -> PaellaVQModel:
    return seeded(lambda: PaellaVQModel(bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=8))


def tiny() -> StableCascadePipeline:
    return StableCascadePipeline(
        tokenizer=clip_tokenizer(),
        text_encoder=seeded(lambda: CLIPTextModelWithProjection(clip_config(TEXT_WIDTH, POOLED_WIDTH))),
        prior=stage_c(),
        scheduler=DDPMWuerstchenScheduler(),
        effnet=efficientnet(),
        decoder=stage_b(),
        vqgan=stage_a(),
    )


STAGE_B: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "effnet_in_channels": 16,
    "pixel_mapper_in_channels": 3,
    "timestep_conditioning_type": ("sca",),
}
TINY = {"stable_cascade": Tiny(tiny, width=256, height=128)}  # 6 x 3 latents

STAGE_C = {
    "clip_text_in_channels": 1280,
    "clip_image_in_channels": 768,
    "switch_level": (False,),
}
LITE = STAGE_C | {
    "conditioning_dim": 1536,
    "block_out_channels": (1536, 1536),
    "num_attention_heads": (24, 24),
    "down_num_layers_per_block": (4, 12),
    "up_num_layers_per_block": (12, 4),
}
PUBLISHED_STAGE_B = STAGE_B | {
    "conditioning_dim": 1280,
    "block_out_channels": (320, 640, 1280, 1280),
    "num_attention_heads": (0, 0, 20, 20),
    "down_num_layers_per_block": (2, 6, 28, 6),
    "up_num_layers_per_block": (6, 28, 6, 2),
    "down_blocks_repeat_mappers": (1, 1, 1, 1),
    "up_blocks_repeat_mappers": (3, 3, 2, 2),
    "block_types_per_layer": ((CONVOLUTION, TIME),) * 2 + ((CONVOLUTION, TIME, ATTENTION),) * 2,
    "dropout": (0.0, 0.0, 0.1, 0.1),
}
PUBLISHED = Published(
    denoisers={"3.6b": (StableCascadeUNet, STAGE_C), "1b": (StableCascadeUNet, LITE)},
    encoders=lambda: [CLIPTextModelWithProjection(CLIP_G)],
    autoencoder=lambda: nn.ModuleList([EfficientNetEncoder(), StableCascadeUNet(**PUBLISHED_STAGE_B), PaellaVQModel()]),
    features=lambda: {"embeds": torch.empty(1, 77, 1280), "pooled": torch.empty(1, 1, 1280)},
)
