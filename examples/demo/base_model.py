"""The parts of the demo's base model, untrained: a Stable Diffusion 3 of 32 x 32 pictures, small enough for one CPU core.

The text encoders keep these random weights for good: all they have to do is to give every caption its own code.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from digits import INKS, PICTURE_SIZE, WORDS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

MAX_TOKENS = 16
CLIP_WIDTH = 48  # two CLIP states side by side are as wide as one T5 state
TEXT_WIDTH = 2 * CLIP_WIDTH


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words: those of the captions, a few more, and [UNK] for the rest."""
    special = ["[PAD]", "[UNK]", "[START]", "[END]"]
    words = [*special, "a", "handwritten", "digit", "number", "ink", "on", "white", *WORDS, *INKS]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[START] $A [END]",
        special_tokens=[("[START]", special.index("[START]")), ("[END]", special.index("[END]"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[START]",
        eos_token="[END]",
        model_max_length=MAX_TOKENS,
    )


def build_clip(tokenizer: PreTrainedTokenizerFast) -> CLIPTextModelWithProjection:
    """A CLIP text encoder with random weights. Its token embeddings are drawn wide, to tell the words apart."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = CLIPTextModelWithProjection(config)
    nn.init.normal_(model.get_input_embeddings().weight, std=1.0)
    return model


def build_t5(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    """A T5 encoder with random weights."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=24,
        d_ff=2 * TEXT_WIDTH,
        num_layers=1,
        num_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = T5EncoderModel(config)
    nn.init.normal_(model.get_input_embeddings().weight, std=1.0)
    return model


def build_pipeline() -> StableDiffusion3Pipeline:
    """The whole pipeline with random weights: 32 x 32 pictures, latents of 4 x 8 x 8."""
    tokenizer = build_tokenizer()
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=PICTURE_SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        caption_projection_dim=128,
        pos_embed_max_size=16,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=build_clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_clip(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=build_t5(tokenizer),
        tokenizer_3=tokenizer,
    )
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
        round_to_half(encoder)
    return pipeline


def round_to_half(model: nn.Module) -> None:
    """Rounds the weights to what float16 holds, so that the model in use is exactly the one that will be stored."""
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    model.requires_grad_(False).eval()


def store(pipeline: StableDiffusion3Pipeline, out: Path) -> None:
    """Writes the pipeline as float16, readable by everybody and by transformers 4 as well as 5."""
    pipeline.to(dtype=torch.float16).save_pretrained(out)
    for path in [out / "model_index.json", *out.glob("tokenizer*/tokenizer_config.json")]:
        # transformers 5 calls the class TokenizersBackend and still knows the old name; transformers 4 only knows that.
        text = path.read_text(encoding="utf-8").replace("TokenizersBackend", "PreTrainedTokenizerFast")
        path.write_text(text, encoding="utf-8")
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)
