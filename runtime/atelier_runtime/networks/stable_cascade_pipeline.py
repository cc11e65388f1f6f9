"""A whole Stable Cascade in one folder: stage C with the encoder it is trained on, and the decoder that makes pictures of its latents.

diffusers has two pipelines of one half each, neither of which takes the encoder, and one of both that is saved under other names. This
one holds the parts and leaves drawing to those.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    DDPMWuerstchenScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    StableCascadeCombinedPipeline,
    StableCascadePriorPipeline,
    StableCascadeUNet,
)
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from atelier_runtime.networks.stable_cascade_encoder import EfficientNetEncoder

__all__ = ["StableCascadePipeline", "StableCascadeUNet"]

_LOADING = ("cache_dir", "dtype", "local_files_only", "revision", "token", "torch_dtype", "variant")
_OF_NO_LIBRARY: dict[str, Any] = {"effnet": EfficientNetEncoder, "vqgan": PaellaVQModel}
"""Components whose class diffusers 0.42.1 does not find by what `model_index.json` says of them, be it published or its own."""
OnStepEnd = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]]


class StableCascadePipeline(DiffusionPipeline):
    """A checkpoint with `tokenizer`, `text_encoder`, `prior` (stage C), `scheduler` and `effnet`.

    With `decoder` (stage B) and `vqgan` (stage A) it draws pictures, otherwise latents alone.
    """

    model_cpu_offload_seq = "text_encoder->prior->decoder->vqgan"
    _optional_components = ["decoder", "vqgan"]  # noqa: RUF012
    encode_prompt = StableCascadePriorPipeline.encode_prompt
    """The stock one, which asks its pipeline for tokenizer and text encoder alone."""

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModelWithProjection,
        prior: StableCascadeUNet,
        scheduler: DDPMWuerstchenScheduler,
        effnet: EfficientNetEncoder,
        decoder: StableCascadeUNet | None = None,
        vqgan: PaellaVQModel | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            prior=prior,
            scheduler=scheduler,
            effnet=effnet,
            decoder=decoder,
            vqgan=vqgan,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> "StableCascadePipeline":
        """As in diffusers; `effnet` and `vqgan` are always of the classes above, whatever library `model_index.json` names."""
        loading = {name: kwargs[name] for name in _LOADING if name in kwargs}
        index = cls.load_config(pretrained_model_name_or_path, **{k: v for k, v in loading.items() if "dtype" not in k})
        own: dict[str, Any] = {}
        for name, kind in _OF_NO_LIBRARY.items():
            if name in kwargs:
                own[name] = kwargs.pop(name)
            elif (index.get(name) or (None, None))[1] is not None:
                own[name] = kind.from_pretrained(pretrained_model_name_or_path, subfolder=name, **loading)
        pipe = super().from_pretrained(pretrained_model_name_or_path, **dict.fromkeys(own), **kwargs)
        pipe.register_modules(**own)
        return pipe

    def prior_pipeline(self) -> StableCascadePriorPipeline:
        """The stock pipeline of stage C around the same parts."""
        return self._as_shown(StableCascadePriorPipeline(self.tokenizer, self.text_encoder, self.prior, self.scheduler))

    def combined_pipeline(self) -> StableCascadeCombinedPipeline:
        """The stock pipeline of both halves around the same parts. Raises ValueError where the checkpoint has no decoder."""
        if self.decoder is None or self.vqgan is None:
            raise ValueError(
                "there is no decoder and vqgan, which make a picture of stage C's latents; pass output_type latent, or load both"
            )
        return self._as_shown(
            StableCascadeCombinedPipeline(
                tokenizer=self.tokenizer,
                text_encoder=self.text_encoder,
                decoder=self.decoder,
                # Its own: it is set to the decoder's steps. Both stages are published with the same settings.
                scheduler=type(self.scheduler).from_config(self.scheduler.config),
                vqgan=self.vqgan,
                prior_prior=self.prior,
                prior_text_encoder=self.text_encoder,
                prior_tokenizer=self.tokenizer,
                prior_scheduler=self.scheduler,
            )
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 20,
        guidance_scale: float = 4.0,
        decoder_num_inference_steps: int = 10,
        decoder_guidance_scale: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Pictures, as `output_type` asks; `latent` gives stage C's latents [B, 16, H/42.67, W/42.67].

        `num_inference_steps`, `guidance_scale` and `callback_on_step_end` are of stage C.
        """
        common = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "height": height,
            "width": width,
            "generator": generator,
        }
        if output_type == "latent":
            images = self.prior_pipeline()(
                **common,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                callback_on_step_end=callback_on_step_end,
            ).image_embeddings
        else:
            images = self.combined_pipeline()(
                **common,
                prior_num_inference_steps=num_inference_steps,
                prior_guidance_scale=guidance_scale,
                prior_callback_on_step_end=callback_on_step_end,
                num_inference_steps=decoder_num_inference_steps,
                decoder_guidance_scale=decoder_guidance_scale,
                output_type=output_type,
            ).images
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _as_shown(self, stock: Any) -> Any:
        """`stock` with this pipeline's settings of progress bars."""
        stock.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return stock
