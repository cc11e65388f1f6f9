"""PixArt Sigma: a transformer that predicts epsilon at DDPM steps, with cross-attention to the text (arXiv:2403.04692).

Latents [B, 4, H/8, W/8] of SDXL's autoencoder, patches of 2. The network gives [B, 8, H/8, W/8]: epsilon and, in the second half,
a variance that the pipeline drops and that is not trained. Text: T5, at most 300 tokens, of which the mask hides the padding.
Source: diffusers' `pipeline_pixart_sigma.py` and `pixart_transformer_2d.py`.

Neither the stock pipeline nor its transformer has a LoRA loader. An exported file is loaded by the loader that diffusers has for
other transformers, which the class is given first:

    pipe.transformer.__class__ = type("Denoiser", (type(pipe.transformer), PeftAdapterMixin), {})
    pipe.transformer.load_lora_adapter(folder, weight_name="pytorch_lora_weights.safetensors", prefix="transformer")
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from atelier_runtime.family import Blocks, Conditions, Family, Features, SampleRequest
from atelier_runtime.family_parts.steered import BlockControl

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # of self- and cross-attention
MLP = ("ff.net.0.proj", "ff.net.2")


class PixArtControl(BlockControl):
    pipeline = "PixArtSigmaControlNetPipeline"
    network = "PixArtControlNetAdapterModel"
    lists = ("controlnet_blocks",)


class PixArtSigma(Family):
    name = "pixart_sigma"
    pipeline = "PixArtSigmaPipeline"
    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}  # noqa: RUF012
    blocks = (Blocks("transformer_blocks"),)
    control = PixArtControl()

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`embeds` [L, 4096] and `mask` [L], all true: after padding in a batch the mask tells the true length."""
        # The pipeline's call cleans captions where `encode_prompt` alone would not.
        embeds, masks, _, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, clean_caption=True)
        return [
            {"embeds": row[:length].clone(), "mask": mask[:length].bool()}
            for row, mask, length in zip(embeds, masks, masks.sum(dim=1).tolist(), strict=True)
        ]

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Epsilon, [B, C, H, W]."""
        output = denoiser(
            noisy,
            encoder_hidden_states=conditions.text["embeds"],
            encoder_attention_mask=conditions.text["mask"],
            timestep=time,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
            **conditions.controlled,
        )[0]
        return output[:, : noisy.shape[1]]

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        """Without the pipeline's bins, which would draw another size than was asked for and scale the picture."""
        return super().sampling_arguments(pipe, request) | {"use_resolution_binning": False}


FAMILY = PixArtSigma()
