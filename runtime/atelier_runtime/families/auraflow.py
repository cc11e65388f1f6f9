"""AuraFlow: a flow transformer of four blocks with a text and a picture stream and 32 with one, without biases.

Latents [B, 4, H/8, W/8] of SDXL's autoencoder, patches of 2; time is sigma itself. Text: Pile-T5 (UMT5), padded to 256 tokens with
zeros that attention sees, so the length is part of the model. Positions are learnt, a square grid of which a picture takes the
middle. Source: diffusers' `pipeline_aura_flow.py` and `auraflow_transformer_2d.py`.

There is no layout of its own for ComfyUI: it reads the layer names of diffusers for this family.
"""

from collections.abc import Sequence
from math import isqrt
from typing import Any

from torch import Tensor, nn

from atelier_api.errors import ConfigError
from atelier_runtime.family import Blocks, Conditions, Family, Features, SampleRequest, TimeEmbedder, configuration
from atelier_runtime.family_parts.steered import BlockControl

T5_TOKENS = 256  # default of the pipeline's `max_sequence_length`
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MLP = tuple(f"{part}.{layer}" for part in ("ff", "ff_context") for layer in ("linear_1", "linear_2", "out_projection"))


class AuraFlowControl(BlockControl):
    pipeline = "AuraFlowControlNetPipeline"
    network = "AuraFlowControlNetModel"


class AuraFlow(Family):
    name = "auraflow"
    pipeline = "AuraFlowPipeline"
    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}  # noqa: RUF012
    blocks = (Blocks("joint_transformer_blocks", "text,tokens"), Blocks("single_transformer_blocks", "text|tokens"))
    time_embedder = TimeEmbedder("time_step_proj", "time_step_embed")
    control = AuraFlowControl()

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`embeds` [256, 2048], zero behind the caption."""
        embeds, *_ = pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=_t5_tokens(pipe)
        )
        return [{"embeds": one} for one in embeds]

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean, [B, C, H, W]. Raises ConfigError for a picture that the learnt positions do not cover."""
        # The network would wrap around to positions of the opposite side.
        side = self.facts.pixel_multiple * isqrt(configuration(denoiser).pos_embed_max_size)
        height, width = (size * self.facts.latent_factor for size in noisy.shape[-2:])
        if max(height, width) > side:
            raise ConfigError(
                f"a picture of {width} x {height} pixels; the checkpoint has learnt positions for at most {side} a side: "
                "lower spec.data.resolution"
            )
        return denoiser(
            noisy,
            encoder_hidden_states=conditions.text["embeds"],
            timestep=time,
            return_dict=False,
            **conditions.controlled,
        )[0]

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        return super().sampling_arguments(pipe, request) | {"max_sequence_length": _t5_tokens(pipe)}


def _t5_tokens(pipe: Any) -> int:
    """Length that captions are padded to: the pipeline's default, or less where the tokenizer allows no more."""
    return min(T5_TOKENS, pipe.tokenizer.model_max_length)


FAMILY = AuraFlow()
