"""HiDream-I1: a flow transformer, first of two streams and then of one, with mixtures of experts (arXiv:2505.22705).

Latents [B, 16, H/8, W/8] of Flux's autoencoder. Time is 0..1000 at the network's door, and the network predicts clean - noise. A
picture that is not square is padded to the tokens of the canvas, 4096, which take part in attention. Text: two pooled CLIP vectors,
T5, and the hidden states of all layers of Llama 3.1, of which every block gets one; 128 tokens each, padded and without mask.
Source: diffusers' `pipeline_hidream_image.py` and `transformer_hidream_image.py`.

The network's experts are differentiable in training mode alone, where its output is laid out otherwise. The published repositories
come without Llama: `spec.model.source` must be a folder that a whole pipeline was saved to.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atelier_api.errors import ConfigError
from atelier_runtime.family import Blocks, Conditions, Family, Features, SampleRequest, TimeEmbedder, configuration
from atelier_runtime.family_parts.steered import BlockControl
from atelier_runtime.lora_layout import LoraLayout, Rule

ATTENTION = ("to_q", "to_k", "to_v", "to_out", "to_q_t", "to_k_t", "to_v_t", "to_out_t")
MLP = ("w1", "w2", "w3")  # of every expert

LAYOUT = LoraLayout(
    architecture="hidream-i1",
    flat=False,
    rules=(
        Rule(
            r"(?:double|single)_stream_blocks\.\d+\.block\."
            r"(?:attn1\.to_(?:[qkv]|out)(?:_t)?|ff_[it]\.(?:shared_experts\.|experts\.\d+\.)?w[123]|adaLN_modulation\.1)",
            r"\g<0>",
        ),
    ),
)
"""The names are diffusers' own. The stock pipeline cannot read the file: it knows no `alpha` of HiDream, and says so."""


class HiDreamControl(BlockControl):
    pipeline = "HiDreamImageControlNetPipeline"
    network = "HiDreamImageControlNetModel"


class HiDream(Family):
    """HiDream-I1, text to image. Checkpoints whose experts are never differentiable are refused."""

    name = "hidream"
    pipeline = "HiDreamImagePipeline"
    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}  # noqa: RUF012
    lora_layout = LAYOUT
    blocks = (Blocks("double_stream_blocks", "tokens,text"), Blocks("single_stream_blocks", "tokens|text"))
    time_embedder = TimeEmbedder("t_embedder.timestep_embedder", "t_embedder.time_proj", scale=1000)
    control = HiDreamControl()

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`t5` [128, 4096], `llama` [layers, 128, 4096] without the layer of embeddings, and `pooled` [2048]."""
        t5, _, llama, _, pooled, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        return [
            {"t5": one, "llama": layers, "pooled": vector}
            for one, layers, vector in zip(t5, llama.transpose(0, 1), pooled, strict=True)
        ]

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean, [B, 16, H, W]. Raises ConfigError for a denoiser that trains no experts."""
        config, text = configuration(denoiser), conditions.text
        if config.force_inference_output:
            raise ConfigError(
                "spec.model.source has a denoiser whose experts get no gradient (force_inference_output); the family hidream trains "
                "them: set force_inference_output to false in its transformer/config.json"
            )
        patch = config.patch_size
        rows, columns = noisy.shape[-2] // patch, noisy.shape[-1] // patch
        picture = {"hidden_states": noisy}
        if rows != columns and rows * columns > _canvas(config):
            picture = _unpadded(noisy, rows, columns)
        output = denoiser(
            **picture,
            timesteps=time * 1000,
            encoder_hidden_states_t5=text["t5"],
            encoder_hidden_states_llama3=text["llama"].transpose(0, 1),
            pooled_embeds=text["pooled"],
            return_dict=False,
            **conditions.controlled,
        )[0]
        if denoiser.training:  # [B, 16, tokens, patch * patch], the tokens of the picture first
            tokens = output[:, :, : rows * columns].unflatten(3, (patch, patch)).unflatten(2, (rows, columns))
            output = tokens.transpose(3, 4).reshape(noisy.shape)
        return -output

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        """Makes the area of the canvas that `pipe` scales every size to that of the picture, so that it draws the size asked for.

        Raises ConfigError for a size that does not fit on the network's canvas.
        """
        config = pipe.transformer.config
        side = pipe.vae_scale_factor * config.patch_size
        most = _canvas(config) * side**2
        if request.width != request.height and request.width * request.height > most:
            raise ConfigError(
                f"spec.validation has samples of {request.width} x {request.height} pixels; those of hidream that are not square have "
                f"at most {most} pixels, {math.isqrt(most)} squared: set spec.validation.width and spec.validation.height"
            )
        # A little more, since the pipeline rounds down.
        pipe.default_sample_size = math.sqrt(request.width * request.height * (1 + 1e-9)) / pipe.vae_scale_factor
        return super().sampling_arguments(pipe, request)


def _canvas(config: Any) -> int:
    """Tokens that a picture is padded to."""
    height, width = config.max_resolution
    return int(height * width // config.patch_size**2)


def _unpadded(noisy: Tensor, rows: int, columns: int) -> dict[str, Any]:
    """The network's arguments for a picture of more tokens than its canvas, which buckets about as large as that may have."""
    batch, channels, height, width = noisy.shape
    patches = noisy.reshape(batch, channels, rows, height // rows, columns, width // columns)
    tokens = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    axes = [torch.arange(length, device=noisy.device) for length in (1, rows, columns)]
    return {
        "hidden_states": tokens,
        "hidden_states_masks": tokens.new_ones(tokens.shape[:2]),
        "img_ids": torch.cartesian_prod(*axes).float().expand(batch, -1, -1),
        "img_sizes": [(rows, columns)] * batch,
    }


FAMILY = HiDream()
