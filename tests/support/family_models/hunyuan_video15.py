"""HunyuanVideo 1.5."""

import re

from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from torch import nn
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from family_models.kinds import Published, Tiny
from family_models.parts import chat_tokenizer, seeded, vision_language_encoder
from family_models.published_parts import qwen25_vl_7b

CHANNELS = 32


def glyph_encoder(width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=384, d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return seeded(lambda: T5EncoderModel(config))


def tiny() -> HunyuanVideo15Pipeline:
    text_width, glyph_width = 32, 16
    pipe = HunyuanVideo15Pipeline(
        # Three layers, since the pipeline takes the third-last hidden state: with two it would be the embeddings.
        text_encoder=vision_language_encoder(text_width, vocabulary=512, layers=3).model.language_model,
        tokenizer=chat_tokenizer(),
        transformer=seeded(
            lambda: HunyuanVideo15Transformer3DModel(
                in_channels=2 * CHANNELS + 1,
                out_channels=CHANNELS,
                num_attention_heads=2,
                attention_head_dim=16,
                num_layers=2,
                num_refiner_layers=1,
                mlp_ratio=2.0,
                text_embed_dim=text_width,
                text_embed_2_dim=glyph_width,
                image_embed_dim=16,
                rope_axes_dim=(4, 6, 6),
                target_size=32,
                task_type="t2v",
            )
        ),
        vae=seeded(
            lambda: AutoencoderKLHunyuanVideo15(
                latent_channels=CHANNELS, block_out_channels=(8, 16, 16, 32, 64), layers_per_block=1
            )
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=glyph_encoder(glyph_width),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )
    # Tokens of the system message's words and of its runs of blanks: little of it is left behind the 108 that are cut off.
    pipe.tokenizer.add_tokens(sorted({*re.findall(r" ?[A-Za-z]{3,}", pipe.system_message), " " * 8}))
    # Attention over the 1985 tokens beside the picture's would take longer than all else.
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length, pipe.vision_num_semantic_tokens = 128, 32, 9
    return pipe


TINY = {"hunyuan_video15": Tiny(tiny)}


def published_encoders() -> list[nn.Module]:
    """The language model of Qwen2.5-VL, and the encoder of byt5-small with Glyph-SDXL's tokens for fonts and colours."""
    glyphs = T5Config(
        vocab_size=1510, d_model=1472, d_kv=64, d_ff=3584, num_layers=12, num_heads=6, feed_forward_proj="gated-gelu"
    )
    return [qwen25_vl_7b().model.language_model, T5EncoderModel(glyphs)]


PUBLISHED = Published(
    denoisers={
        flavour: (HunyuanVideo15Transformer3DModel, {"task_type": "t2v"} | size)
        for flavour, size in {
            "480p-t2v": {"target_size": 640},
            "720p-t2v": {"target_size": 960},
            "480p-t2v-distilled": {"target_size": 640},
        }.items()
    },
    encoders=published_encoders,
    autoencoder=AutoencoderKLHunyuanVideo15,
)
