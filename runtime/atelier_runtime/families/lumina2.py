"""Lumina-Image 2.0: a flow transformer over one stream of text and picture tokens (arXiv:2503.21758).

Latents [B, 16, H/8, W/8] of Flux's autoencoder, patches of 2. The network counts time from noise to picture (1 - sigma, 0 is noise)
and predicts clean - noise; both are hidden here. Text: the second-last hidden state of Gemma 2, at most 256 tokens, of which the
mask hides the padding. A caption follows a sentence of instruction; a negative prompt, and the empty one, stands alone, as the
pipeline has it. Source: diffusers' `pipeline_lumina2.py` and `transformer_lumina2.py`.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from atelier_runtime.family import Blocks, Conditions, Family, Features, TimeEmbedder

ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
MLP = ("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3")


class Lumina2(Family):
    name = "lumina2"
    pipeline = "Lumina2Pipeline"
    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}  # noqa: RUF012
    # The refiners see one modality alone: `noise_refiner` the picture's tokens, `context_refiner` the text's. In `layers` a sample's
    # picture starts where its own text ends, and the shorter samples of a batch end in padding.
    blocks = (Blocks("noise_refiner"), Blocks("context_refiner", "text"), Blocks("layers", "text|tokens|padding"))
    time_embedder = TimeEmbedder("time_caption_embed.timestep_embedder", "time_caption_embed.time_proj", reversed=True)

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`embeds` [L, 2304] and `mask` [L], all true: after padding in a batch the mask tells the true length."""
        return [_features(pipe, prompt) for prompt in prompts]

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean, [B, 16, H/8, W/8]."""
        output: Tensor = denoiser(
            hidden_states=noisy,
            timestep=1 - time,
            encoder_hidden_states=conditions.text["embeds"].to(noisy.dtype),
            encoder_attention_mask=conditions.text["mask"],
            return_dict=False,
        )[0]
        return -output


def _features(pipe: Any, prompt: str) -> Features:
    device = pipe.text_encoder.device
    if prompt:
        embeds, mask, _, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, device=device)
    else:
        embeds, mask = pipe._get_gemma_prompt_embeds("", device=device)
    length = int(mask.sum())
    return {"embeds": embeds[0, :length].clone(), "mask": mask[0, :length].bool()}


FAMILY = Lumina2()
