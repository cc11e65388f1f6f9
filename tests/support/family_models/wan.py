"""Wan 2.1 and 2.2."""

from typing import Any

from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

from family_models.kinds import Published, Tiny
from family_models.parts import seeded, t5_tokenizer
from family_models.published_parts import XXL

IMAGE_WIDTH, IMAGE_TOKENS = 16, 5

SHOWN = {"in_channels": 36}
SEEN_BY_CLIP: dict[str, Any] = SHOWN | {"image_dim": IMAGE_WIDTH, "added_kv_proj_dim": 32}


def wan_transformer(seed_offset: float = 0.0, **config: Any) -> WanTransformer3DModel:
    """`seed_offset` is added to every weight of the output layer, so that two experts differ."""
    tiny = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 24,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    model = seeded(lambda: WanTransformer3DModel(**tiny | config))
    model.proj_out.weight.data += seed_offset
    return model


def wan_parts() -> dict[str, Any]:
    encoder = UMT5Config(
        vocab_size=32, d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    autoencoder = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": seeded(lambda: UMT5EncoderModel(encoder)),
        "vae": seeded(lambda: AutoencoderKLWan(z_dim=16, temperal_downsample=[False, True, True], **autoencoder)),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }


def clip_vision() -> dict[str, Any]:
    """CLIP for pictures of 28 x 28 pixels: four patches and the class token."""
    config = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    return {
        "image_encoder": seeded(lambda: CLIPVisionModel(config)),
        "image_processor": CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
    }


def tiny_wan() -> WanPipeline:
    return WanPipeline(**wan_parts(), transformer=wan_transformer())


def tiny_wan22() -> WanPipeline:
    """Two experts, as in Wan 2.2 A14B."""
    experts = {"transformer": wan_transformer(), "transformer_2": wan_transformer(0.01)}
    return WanPipeline(**wan_parts(), **experts, boundary_ratio=0.875)


def tiny_wan_i2v() -> WanImageToVideoPipeline:
    """Shown the first frame, also through CLIP, as Wan 2.1 I2V is."""
    return WanImageToVideoPipeline(**wan_parts(), **clip_vision(), transformer=wan_transformer(**SEEN_BY_CLIP))


def tiny_wan_flf2v() -> WanImageToVideoPipeline:
    """Shown the first and the last frame."""
    transformer = wan_transformer(**SEEN_BY_CLIP, pos_embed_seq_len=2 * IMAGE_TOKENS)
    return WanImageToVideoPipeline(**wan_parts(), **clip_vision(), transformer=transformer)


def tiny_wan22_i2v() -> WanImageToVideoPipeline:
    """Two experts that are shown the first frame without CLIP, as in Wan 2.2 I2V-A14B."""
    experts = {"transformer": wan_transformer(**SHOWN), "transformer_2": wan_transformer(0.01, **SHOWN)}
    return WanImageToVideoPipeline(**wan_parts(), **experts, boundary_ratio=0.9)


TINY = {
    "wan": Tiny(tiny_wan),
    "wan22": Tiny(tiny_wan22),
    "wan_i2v": Tiny(tiny_wan_i2v),
    "wan_flf2v": Tiny(tiny_wan_flf2v),
    "wan22_i2v": Tiny(tiny_wan22_i2v),
}


def clip_vision_huge() -> CLIPVisionModel:
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14
        )
    )


WAN_14B: dict[str, Any] = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
I2V_14B = WAN_14B | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}


def umt5_xxl() -> list[nn.Module]:
    return [UMT5EncoderModel(UMT5Config(vocab_size=256384, **XXL))]


PUBLISHED = Published(
    denoisers={
        "2.1-t2v-1.3b": (WanTransformer3DModel, {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}),
        "2.1-t2v-14b": (WanTransformer3DModel, WAN_14B),
        "2.2-t2v-a14b": (WanTransformer3DModel, WAN_14B),
        "2.1-i2v-14b-480p": (WanTransformer3DModel, I2V_14B),
        "2.1-i2v-14b-720p": (WanTransformer3DModel, I2V_14B),
        "2.1-flf2v-14b-720p": (WanTransformer3DModel, I2V_14B | {"pos_embed_seq_len": 514}),
        "2.2-i2v-a14b": (WanTransformer3DModel, WAN_14B | {"in_channels": 36}),
    },
    encoders=umt5_xxl,
    autoencoder=AutoencoderKLWan,
    encoders_of=dict.fromkeys(
        ("2.1-i2v-14b-480p", "2.1-i2v-14b-720p", "2.1-flf2v-14b-720p"), lambda: [*umt5_xxl(), clip_vision_huge()]
    ),
)
