"""HiDream-I1."""

import copy
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HiDreamImagePipeline, HiDreamImageTransformer2DModel
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from family_models.kinds import Published, Tiny
from family_models.parts import (
    chat_tokenizer,
    clip_config,
    clip_tokenizer,
    kl_autoencoder,
    seeded,
    t5_encoder,
    t5_tokenizer,
)
from family_models.published_parts import CLIP_G, CLIP_L, kl_16, t5_xxl

CLIP_POSITIONS = 248


def long_clip(config: CLIPTextConfig) -> CLIPTextModelWithProjection:
    """CLIP for longer captions than the 77 tokens of the usual one."""
    config = copy.deepcopy(config)
    config.max_position_embeddings = CLIP_POSITIONS
    return CLIPTextModelWithProjection(config)


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens after a first one, without which the empty caption would be nothing but padding."""
    tokenizer, first = chat_tokenizer().backend_tokenizer, "<|im_start|>"
    number = tokenizer.token_to_id(first)
    tokenizer.post_processor = TemplateProcessing(single=f"{first} $A", special_tokens=[(first, number)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", model_max_length=24)


def tiny() -> HiDreamImagePipeline:
    clip_width, t5_width, llama_width = 16, 24, 32
    tokenizer = llama_tokenizer()
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=llama_width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    return HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_autoencoder(16, 0.3611, 0.1159),
        text_encoder=seeded(lambda: long_clip(clip_config(clip_width, clip_width))),
        tokenizer=clip_tokenizer(),
        text_encoder_2=seeded(lambda: long_clip(clip_config(clip_width, clip_width))),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(t5_width),
        tokenizer_3=t5_tokenizer(),
        text_encoder_4=seeded(lambda: LlamaForCausalLM(llama)),
        tokenizer_4=tokenizer,
        transformer=seeded(
            lambda: HiDreamImageTransformer2DModel(
                patch_size=2,
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                caption_channels=[t5_width, llama_width],
                text_emb_dim=2 * clip_width,
                axes_dims_rope=(8, 4, 4),
                max_resolution=(4, 8),
                llama_layers=[0, 1],
            )
        ),
    )


TINY = {"hidream": Tiny(tiny)}


class EvenlyRouted(MOEFeedForwardSwiGLU):
    """Every expert gets as many tokens as the others: whose they are is a matter of values, and without memory there are none."""

    def forward(self, x: Tensor) -> Tensor:
        _, weights, _ = self.gate(x)
        tokens = x.view(-1, x.shape[-1]).repeat_interleave(self.num_activated_experts, dim=0)
        outputs = torch.empty_like(tokens)
        for expert in self.experts:
            own = torch.zeros(len(tokens) // len(self.experts), dtype=torch.long, device=x.device)
            outputs[own] = expert(tokens[own]).to(x.dtype)
        mixed = (outputs.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)
        return mixed.view(x.shape).to(x.dtype) + self.shared_experts(x)


class Measurable(HiDreamImageTransformer2DModel):
    """The denoiser, to be built and run without memory."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        for module in self.modules():
            if isinstance(module, MOEFeedForwardSwiGLU):
                module.__class__ = EvenlyRouted


def features() -> dict[str, Tensor]:
    half = torch.bfloat16
    return {
        "t5": torch.empty(1, 128, 4096, dtype=half),
        "llama": torch.empty(1, 32, 128, 4096, dtype=half),
        "pooled": torch.empty(1, 2048, dtype=half),
    }


CONFIG = {
    "patch_size": 2,
    "in_channels": 16,
    "caption_channels": [4096, 4096],
    "axes_dims_rope": (64, 32, 32),
    "llama_layers": [*range(32), *[31] * 16],
}
LLAMA = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)
PUBLISHED = Published(
    denoisers=dict.fromkeys(("full", "dev", "fast"), (Measurable, CONFIG)),
    encoders=lambda: [long_clip(CLIP_L), long_clip(CLIP_G), t5_xxl(), LlamaForCausalLM(LLAMA)],
    autoencoder=kl_16,
    features=features,
)
