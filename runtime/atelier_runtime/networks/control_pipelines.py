"""Pipelines that sample with the control networks that diffusers lacks: its own pipelines, whose transformer is steered."""

from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5EncoderModel,
    T5Tokenizer,
    UMT5EncoderModel,
)

from atelier_runtime.networks.auraflow_control import AuraFlowControlNetModel
from atelier_runtime.networks.hidream_control import HiDreamImageControlNetModel
from atelier_runtime.networks.pixart_control import PixArtControlNetAdapterModel
from atelier_runtime.networks.steering import steering


class SteeredPipeline:
    """The part that they have beside the stock pipeline that each of them is."""

    @torch.no_grad()
    def __call__(
        self, *given: Any, control_image: Image.Image, controlnet_conditioning_scale: float = 1.0, **named: Any
    ) -> Any:
        """The stock pipeline's call, along `control_image`, which is resized to what is drawn."""
        stock: Any = super()
        pipe: Any = self
        conditions: list[Tensor] = []

        def condition(latents: Tensor) -> Tensor:
            if not conditions:
                conditions.append(_latents_of(pipe, control_image, latents))
            return conditions[0].expand(len(latents), -1, -1, -1)

        with steering(pipe.transformer, pipe.controlnet, condition, controlnet_conditioning_scale):
            return stock.__call__(*given, **named)


class PixArtSigmaControlNetPipeline(SteeredPipeline, PixArtSigmaPipeline):
    def __init__(
        self,
        tokenizer: T5Tokenizer,
        text_encoder: T5EncoderModel,
        vae: AutoencoderKL,
        transformer: PixArtTransformer2DModel,
        scheduler: KarrasDiffusionSchedulers,
        controlnet: PixArtControlNetAdapterModel,
    ) -> None:
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        self.register_modules(controlnet=controlnet)


class AuraFlowControlNetPipeline(SteeredPipeline, AuraFlowPipeline):
    def __init__(
        self,
        tokenizer: T5Tokenizer,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKL,
        transformer: AuraFlowTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        controlnet: AuraFlowControlNetModel,
    ) -> None:
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        self.register_modules(controlnet=controlnet)


class HiDreamImageControlNetPipeline(SteeredPipeline, HiDreamImagePipeline):
    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer_2: CLIPTokenizer,
        text_encoder_3: T5EncoderModel,
        tokenizer_3: T5Tokenizer,
        text_encoder_4: LlamaForCausalLM,
        tokenizer_4: PreTrainedTokenizerFast,
        transformer: HiDreamImageTransformer2DModel,
        controlnet: HiDreamImageControlNetModel,
    ) -> None:
        super().__init__(
            scheduler,
            vae,
            text_encoder,
            tokenizer,
            text_encoder_2,
            tokenizer_2,
            text_encoder_3,
            tokenizer_3,
            text_encoder_4,
            tokenizer_4,
            transformer,
        )
        self.register_modules(controlnet=controlnet)


def _latents_of(pipe: Any, picture: Image.Image, like: Tensor) -> Tensor:
    """[1, C, H, W] of the picture, as large and in the precision of the noisy latents `like`: the mean of the posterior."""
    height, width = (side * pipe.vae_scale_factor for side in like.shape[-2:])
    pixels = pipe.image_processor.preprocess(picture, height=height, width=width)
    mean = pipe.vae.encode(pixels.to(pipe._execution_device, pipe.vae.dtype)).latent_dist.mode()
    return ((mean - (pipe.vae.config.shift_factor or 0.0)) * pipe.vae.config.scaling_factor).to(like.dtype)
