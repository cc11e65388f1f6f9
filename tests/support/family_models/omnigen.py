"""OmniGen."""

import inspect
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, OmniGenPipeline, OmniGenTransformer2DModel
from diffusers.pipelines.omnigen.processor_omnigen import OmniGenMultiModalProcessor
from transformers import LlamaTokenizer

from atelier_runtime.families.omnigen import FAMILY
from family_models.kinds import Published, Tiny
from family_models.parts import LETTERS, kl_autoencoder, seeded
from family_models.published_parts import published_kl

NEGATIVE: str = inspect.signature(OmniGenMultiModalProcessor.__call__).parameters["negative_prompt"].default
INSTRUCTION = "Generate an image according to the following instructions"


def tokenizer() -> LlamaTokenizer:
    """Letters as tokens; the template's and the negative prompt as one each.

    In a batch the network takes the positions of the first sample for all, so the pipeline puts a negative prompt wrong that is
    longer than the prompt. Here it never is: what is compared is what the pipeline means.
    """
    vocab = {piece: number for number, piece in enumerate(["<unk>", "<s>", "</s>", "▁", "\n", *LETTERS])}
    made = LlamaTokenizer(vocab=vocab, merges=[], model_max_length=4096)
    made.add_tokens(["<|user|>", "<|end|>", "<|assistant|>", "<|diffusion|>", INSTRUCTION, NEGATIVE])
    return made


def tiny() -> OmniGenPipeline:
    FAMILY.provided_components(Path())
    reader = tokenizer()
    factors = [1.0] * 8
    return OmniGenPipeline(
        transformer=seeded(
            lambda: OmniGenTransformer2DModel(
                hidden_size=32,
                num_attention_heads=2,
                num_key_value_heads=2,
                intermediate_size=48,
                num_layers=2,
                pad_token_id=2,
                vocab_size=len(reader),
                rope_scaling={"long_factor": factors, "short_factor": factors},
                pos_embed_max_size=16,
                time_step_dim=32,
            )
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
        vae=kl_autoencoder(4, 0.13025, None),
        tokenizer=reader,
    )


TINY = {"omnigen": Tiny(tiny, noise="inverted", negative=NEGATIVE)}

# The factors are numbers by which positions are divided, not weights.
_FACTORS = {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48}
PUBLISHED = Published(
    denoisers={"v1": (OmniGenTransformer2DModel, {"rope_scaling": _FACTORS})},
    encoders=lambda: [],
    autoencoder=lambda: published_kl(4),
    features=lambda: {
        "ids": torch.empty(1, 256, dtype=torch.long),
        "mask": torch.ones(1, 256, dtype=torch.bool),
    },
)
