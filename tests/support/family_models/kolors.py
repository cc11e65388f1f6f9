"""Kolors."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import sentencepiece
from diffusers import KolorsPipeline, UNet2DConditionModel
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel, RMSNorm
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer
from torch import nn

from family_models.kinds import Published, Tiny
from family_models.parts import LETTERS, euler_scheduler, kl_autoencoder, seeded, text_time_unet
from family_models.published_parts import SDXL_UNET, published_kl


def tiny() -> KolorsPipeline:
    width, text_width = 32, 24
    tokenizer = ChatGLMTokenizer(str(Path(tokenizer_folder().name, "tokenizer.model")))
    return KolorsPipeline(
        vae=kl_autoencoder(4, 0.13025, None),
        text_encoder=seeded(
            lambda: chatglm(
                layers=2, vocabulary=tokenizer.vocab_size, hidden_size=width, ffn_hidden_size=48, kv_channels=8, heads=4
            )
        ),
        tokenizer=tokenizer,
        unet=text_time_unet(text_width, width, depths=(1, 1), encoder_hid_dim=width, encoder_hid_dim_type="text_proj"),
        scheduler=euler_scheduler(beta_end=0.014, num_train_timesteps=1100),
    )


@cache
def tokenizer_folder() -> TemporaryDirectory[str]:
    """Holds a SentencePiece model of letters: the tokenizer copies the file where it is saved, so it stays as long as the process."""
    folder = TemporaryDirectory(prefix="tiny-kolors-")
    with Path(folder.name, "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([LETTERS, 'a sign that says "keep off"']),
            model_writer=file,
            model_type="char",
            vocab_size=40,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            minloglevel=2,
        )
    return folder


def chatglm(*, layers: int, vocabulary: int, heads: int, **config: int) -> ChatGLMModel:
    """ChatGLM3, whose norms come without values."""
    model = ChatGLMModel(
        ChatGLMConfig(
            num_layers=layers,
            padded_vocab_size=vocabulary,
            num_attention_heads=heads,
            seq_length=8192,
            multi_query_attention=True,
            multi_query_group_num=2,
            add_qkv_bias=True,
            original_rope=True,
            **config,
        ),
        empty_init=False,  # or its weights would come without values, and not on the meta device
    )
    for module in model.modules():
        if isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
    return model


TINY = {"kolors": Tiny(tiny)}

PUBLISHED = Published(
    denoisers={
        "1.0": (
            UNet2DConditionModel,
            SDXL_UNET
            | {
                "encoder_hid_dim": 4096,
                "encoder_hid_dim_type": "text_proj",
                "projection_class_embeddings_input_dim": 5632,
            },
        ),
    },
    encoders=lambda: [
        chatglm(layers=28, vocabulary=65024, hidden_size=4096, ffn_hidden_size=13696, kv_channels=128, heads=32)
    ],
    autoencoder=lambda: published_kl(4),
)
