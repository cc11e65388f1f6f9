"""Lumina-Image 2.0."""

from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from family_models.kinds import Published, Tiny
from family_models.parts import LETTERS, kl_autoencoder, seeded
from family_models.published_parts import kl_16


def tiny() -> Lumina2Pipeline:
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
    return Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=kl_autoencoder(16, 0.3611, 0.1159),
        text_encoder=seeded(lambda: Gemma2Model(config)),
        tokenizer=GemmaTokenizer(
            vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], add_bos_token=True
        ),
        transformer=seeded(
            lambda: Lumina2Transformer2DModel(
                hidden_size=32,
                num_layers=2,
                num_refiner_layers=1,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=16,
                axes_dim_rope=(4, 6, 6),
                axes_lens=(300, 32, 32),
                cap_feat_dim=width,
            )
        ),
    )


# The pipeline scales what it guides to the norm of the unguided prediction: its sampler's affair, and off here.
TINY = {"lumina2": Tiny(tiny, guided={"guidance_scale": 3.0, "cfg_normalization": False})}

PUBLISHED = Published(
    denoisers={
        "2.0": (Lumina2Transformer2DModel, {"cap_feat_dim": 2304}),
        "neta-v1": (Lumina2Transformer2DModel, {"cap_feat_dim": 2304}),
    },
    encoders=lambda: [Gemma2Model(Gemma2Config())],
    autoencoder=kl_16,
)
