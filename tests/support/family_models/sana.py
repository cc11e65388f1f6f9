"""Sana and Sana 1.5."""

from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from family_models.kinds import Published, Tiny
from family_models.parts import LETTERS, seeded


def autoencoder() -> AutoencoderDC:
    widths = (8,) * 5 + (32,)
    scales = ((),) * 6
    return AutoencoderDC(
        latent_channels=32,
        attention_head_dim=8,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        scaling_factor=0.41407,
    )


def tiny() -> SanaPipeline:
    width = 24
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    config = Gemma2Config(
        vocab_size=len(pieces),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return SanaPipeline(
        # The published one begins every text, an empty one too, with a token.
        tokenizer=GemmaTokenizer(
            vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], add_bos_token=True
        ),
        text_encoder=seeded(lambda: Gemma2Model(config)),
        vae=seeded(autoencoder),
        transformer=seeded(
            lambda: SanaTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=16,
                num_layers=2,
                num_cross_attention_heads=2,
                cross_attention_head_dim=16,
                cross_attention_dim=32,
                caption_channels=width,
                qk_norm="rms_norm_across_heads",
            )
        ),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


TINY = {"sana": Tiny(tiny)}

SANA_1_5 = {"qk_norm": "rms_norm_across_heads"}
PUBLISHED = Published(
    denoisers={
        "1.5-4.8b": (SanaTransformer2DModel, SANA_1_5 | {"num_layers": 60}),
        "1.5-1.6b": (SanaTransformer2DModel, SANA_1_5),
        "1.6b": (SanaTransformer2DModel, {}),
        "0.6b": (
            SanaTransformer2DModel,
            {
                "num_layers": 28,
                "num_attention_heads": 36,
                "num_cross_attention_heads": 16,
                "cross_attention_head_dim": 72,
                "cross_attention_dim": 1152,
            },
        ),
    },
    encoders=lambda: [Gemma2Model(Gemma2Config())],
    autoencoder=lambda: AutoencoderDC(
        encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        scaling_factor=0.41407,
    ),
)
