"""Tiny pipelines of more families, which `tiny_families` adds to its own and whose helpers are imported late for that reason."""

from collections.abc import Callable
from typing import Any

from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model, UMT5Config, UMT5EncoderModel

# The shape of the published template: a turn, and thinking that is left open where it is switched on.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins that byte-level tokenizers use for bytes, in the order of GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [256 + n for n in range(256 - len(printable))]
    return [chr(code) for code in printable + others]


def tiny_z_image() -> ZImagePipeline:
    from tiny_families import kl_autoencoder, seeded

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    vocab = {piece: number for number, piece in enumerate([*byte_alphabet(), *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=special[1:], model_max_length=512)
    tokenizer.chat_template = CHAT_TEMPLATE
    width = 32
    config = Qwen3Config(
        vocab_size=len(vocab),
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_autoencoder(16, 0.3611, 0.1159),
        text_encoder=seeded(lambda: Qwen3Model(config)),
        tokenizer=tokenizer,
        transformer=seeded(
            lambda: ZImageTransformer2DModel(
                in_channels=16,
                dim=32,
                n_layers=2,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=width,
                axes_dims=[4, 6, 6],
                axes_lens=[544, 32, 32],
            )
        ),
    )


def wan_transformer(seed_offset: float = 0.0) -> WanTransformer3DModel:
    """`seed_offset` is added to every weight of the output layer, so that two experts differ."""
    from tiny_families import seeded

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
    from tiny_families import seeded, t5_tokenizer

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


TINY_MORE: dict[str, Callable[[], Any]] = {"z_image": tiny_z_image, "wan": tiny_wan, "wan22": tiny_wan22}
