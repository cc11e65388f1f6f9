"""Wan 2.1 and 2.2."""

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from family_models.kinds import Published, Tiny
from family_models.parts import seeded, t5_tokenizer
from family_models.published_parts import XXL


def wan_transformer(seed_offset: float = 0.0) -> WanTransformer3DModel:
    """`seed_offset` is added to every weight of the output layer, so that two experts differ."""
    model = seeded(
        lambda: WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=16,
            out_channels=16,
            text_dim=24,
            freq_dim=32,
            ffn_dim=48,
            num_layers=2,
            rope_max_seq_len=32,
        )
    )
    model.proj_out.weight.data += seed_offset
    return model


def wan_pipeline(transformer_2: WanTransformer3DModel | None, boundary_ratio: float | None) -> WanPipeline:
    encoder = UMT5Config(
        vocab_size=32, d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    autoencoder = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=seeded(lambda: UMT5EncoderModel(encoder)),
        vae=seeded(lambda: AutoencoderKLWan(z_dim=16, temperal_downsample=[False, True, True], **autoencoder)),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=wan_transformer(),
        transformer_2=transformer_2,
        boundary_ratio=boundary_ratio,
    )


def tiny_wan() -> WanPipeline:
    return wan_pipeline(None, None)


def tiny_wan22() -> WanPipeline:
    """Two experts, as in Wan 2.2 A14B."""
    return wan_pipeline(wan_transformer(0.01), 0.875)


TINY = {"wan": Tiny(tiny_wan), "wan22": Tiny(tiny_wan22)}

WAN_14B = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
PUBLISHED = Published(
    denoisers={
        "2.1-t2v-1.3b": (WanTransformer3DModel, {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}),
        "2.1-t2v-14b": (WanTransformer3DModel, WAN_14B),
        "2.2-t2v-a14b": (WanTransformer3DModel, WAN_14B),
    },
    encoders=lambda: [UMT5EncoderModel(UMT5Config(vocab_size=256384, **XXL))],
    autoencoder=AutoencoderKLWan,
)
