"""What families around diffusers' `FluxTransformer2DModel` share: two streams, then one; distilled on guidance in most checkpoints.

Latents [B, 16, H/8, W/8] enter as 2 x 2 patches, [B, HW/256, 64]; time is sigma itself. Text: T5 tokens, padded and without mask,
so the length is part of the model, and CLIP's pooled vector. A reference picture enters as clean tokens behind the noisy ones, of the
same time and in plane 1 of the positions. Source: diffusers' `pipeline_flux.py`, `pipeline_flux_kontext.py` and `transformer_flux.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier_api.errors import ConfigError
from atelier_runtime.control import Control, copied_blocks, with_plain_config
from atelier_runtime.family import Blocks, Conditions, Family, Features, SampleRequest, TimeEmbedder, configuration
from atelier_runtime.family_parts.packing import packed
from atelier_runtime.lora_layout import ADDED_QUERY_KEY_VALUE, QUERY_KEY_VALUE, THIRDS, LoraLayout, fused, plain

TRAINING_GUIDANCE = 1.0
"""A distilled checkpoint is trained as if it were asked for no guidance: the data holds none."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out")

_DOUBLE, _SINGLE = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
LAYOUT = LoraLayout(
    architecture="flux-1-dev",
    flat=True,
    rules=(
        *fused(_DOUBLE + r"attn\.", QUERY_KEY_VALUE, r"double_blocks.\1.img_attn.qkv", THIRDS),
        *fused(_DOUBLE + r"attn\.", ADDED_QUERY_KEY_VALUE, r"double_blocks.\1.txt_attn.qkv", THIRDS),
        *fused(
            _SINGLE,
            ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            r"single_blocks.\1.linear1",
            (1, 1, 1, 4),
        ),
        *plain(
            _DOUBLE,
            r"double_blocks.\1.",
            {
                "attn.to_out.0": "img_attn.proj",
                "attn.to_add_out": "txt_attn.proj",
                "ff.net.0.proj": "img_mlp.0",
                "ff.net.2": "img_mlp.2",
                "ff_context.net.0.proj": "txt_mlp.0",
                "ff_context.net.2": "txt_mlp.2",
                "norm1.linear": "img_mod.lin",
                "norm1_context.linear": "txt_mod.lin",
            },
        ),
        *plain(_SINGLE, r"single_blocks.\1.", {"proj_out": "linear2", "norm.linear": "modulation.lin"}),
    ),
)
"""Query, key and value are one layer in the original repository, in single blocks with the first layer of the feed-forward. The
stock pipeline's `load_lora_weights` reads it, `linear1` at the published width only."""


class TwoStream(Family):
    """Everything but the names of the family and of its pipeline."""

    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}  # noqa: RUF012
    lora_layout = LAYOUT
    blocks = (Blocks("transformer_blocks", "text,tokens"), Blocks("single_transformer_blocks", "text,tokens"))
    time_embedder = TimeEmbedder("time_text_embed.timestep_embedder", "time_text_embed.time_proj", scale=1000)

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`embeds` [T5 tokens, 4096] and `pooled` [768]."""
        embeds, pooled, _ = pipe.encode_prompt(list(prompts), None, max_sequence_length=_t5_tokens(pipe))
        return [{"embeds": one, "pooled": vector} for one, vector in zip(embeds, pooled, strict=True)]

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean of the noisy tokens, [B, 16, H, W]; what comes out behind them, in the references' place, is cut off."""
        embeds = conditions.text["embeds"]
        pictures = (noisy, *conditions.references)
        rows, columns = noisy.shape[-2] // 2, noisy.shape[-1] // 2
        guidance = None
        if configuration(denoiser).guidance_embeds:
            value = TRAINING_GUIDANCE if conditions.guidance is None else conditions.guidance
            guidance = torch.full_like(time, value)
        tokens = denoiser(
            hidden_states=torch.cat([packed(each) for each in pictures], dim=1),
            timestep=time,
            guidance=guidance,
            pooled_projections=conditions.text["pooled"],
            encoder_hidden_states=embeds,
            txt_ids=noisy.new_zeros(embeds.shape[1], 3),
            img_ids=torch.cat([_positions(plane, each) for plane, each in enumerate(pictures)]),
            return_dict=False,
            **conditions.controlled,
        )[0][:, : rows * columns]
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), 2)

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        """Guidance is the embedded one where the checkpoint is distilled on it, which knows no negative prompt; else it is real.

        Raises ConfigError for a negative prompt that would do nothing: a checkpoint need not be of the flavour that the run names.
        """
        arguments = super().sampling_arguments(pipe, request)
        negative = arguments.pop("negative_prompt", "")
        distilled = pipe.transformer.config.guidance_embeds
        if negative and (distilled or "guidance_scale" not in arguments):
            way = "remove it" if distilled else "set spec.validation.guidance above 1"
            kind = "is" if distilled else "is not"
            raise ConfigError(
                f"spec.validation.prompts has the negative prompt {negative!r}; the checkpoint {kind} distilled on guidance: {way}"
            )
        if not distilled and "guidance_scale" in arguments:
            arguments |= {"true_cfg_scale": arguments.pop("guidance_scale"), "negative_prompt": negative}
        return arguments | {"max_sequence_length": _t5_tokens(pipe)}


class TwoStreamControl(Control):
    """The first blocks of each of the two lists; what comes out of one is added behind several of the base's.

    Source: diffusers' `controlnet_flux.py`, `pipeline_flux_controlnet.py` and `transformer_flux.py`.
    """

    pipeline = "FluxControlNetPipeline"
    network = "FluxControlNetModel"
    picture = "control_image"
    takes = "latents"

    def copied(self, base: Any) -> nn.Module:
        from diffusers import FluxControlNetModel

        config = base.config
        return FluxControlNetModel.from_transformer(
            with_plain_config(base),
            num_layers=copied_blocks(config.num_layers, 4),
            num_single_layers=copied_blocks(config.num_single_layers, 10),
            attention_head_dim=config.attention_head_dim,
            num_attention_heads=config.num_attention_heads,
        )

    def predict(
        self, base: nn.Module, network: nn.Module, condition: Tensor, scale: float, *given: Any, **named: Any
    ) -> Any:
        return base(*given, **control_outputs(network, packed(condition), scale, named), **named)


def control_outputs(network: nn.Module, condition: Tensor, scale: float, call: Mapping[str, Any]) -> dict[str, Any]:
    """What a network adds to the transformer that is called with `call`: to the picture that is drawn, and nothing to its references.

    `condition` [B, tokens, 64] has as many tokens as that picture, which the others follow; the network sees no others.
    """
    drawn = condition.shape[1]
    behind = call["hidden_states"].shape[1] - drawn
    told = {**call, "hidden_states": call["hidden_states"][:, :drawn], "img_ids": call["img_ids"][:drawn]}
    double, single = network(controlnet_cond=condition, conditioning_scale=scale, **told)
    if behind:
        double, single = ([F.pad(each, (0, 0, 0, behind)) for each in outputs] for outputs in (double, single))
    return {"controlnet_block_samples": double, "controlnet_single_block_samples": single}


def _positions(plane: int, latents: Tensor) -> Tensor:
    """[tokens, 3]: (plane, row, column) of every token; plane 0 is the picture that is made."""
    rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
    axes = [torch.arange(*ends, device=latents.device) for ends in ((plane, plane + 1), (0, rows), (0, columns))]
    return torch.cartesian_prod(*axes).to(latents.dtype)


def _t5_tokens(pipe: Any) -> int:
    """512, or 256 for the timestep-distilled checkpoint, which alone has no dynamic shift; less where the tokenizer allows no more."""
    trained = 512 if pipe.scheduler.config.get("use_dynamic_shifting") else 256
    return min(trained, pipe.tokenizer_2.model_max_length)
