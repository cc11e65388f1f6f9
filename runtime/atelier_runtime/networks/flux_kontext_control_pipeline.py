"""Flux.1 Kontext steered by a control network: diffusers has Kontext's pipeline and Flux's network, and nothing that joins them.

All is the stock pipeline's but what its transformer is given beside. The network sees the picture that is drawn and adds to its tokens
alone; those of the reference stay as they are.
"""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
    T5TokenizerFast,
)

from atelier_runtime.family_parts.packing import packed
from atelier_runtime.family_parts.two_stream import control_outputs


class FluxKontextControlNetPipeline(FluxKontextPipeline):
    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: T5TokenizerFast,
        transformer: FluxTransformer2DModel,
        controlnet: FluxControlNetModel,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
    ) -> None:
        super().__init__(
            scheduler,
            vae,
            text_encoder,
            tokenizer,
            text_encoder_2,
            tokenizer_2,
            transformer,
            image_encoder,
            feature_extractor,
        )
        self.register_modules(controlnet=controlnet)

    @torch.no_grad()
    def __call__(
        self, *given: Any, control_image: Image.Image, controlnet_conditioning_scale: float = 1.0, **named: Any
    ) -> Any:
        """The stock pipeline's call, along `control_image`, which is resized to what is drawn."""
        conditions: list[Tensor] = []

        def steered(
            _: nn.Module, inputs: tuple[Any, ...], call: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if not conditions:
                conditions.append(self._condition(control_image, call["img_ids"]))
            condition = conditions[0].expand(len(call["hidden_states"]), -1, -1)
            return inputs, {**call, **control_outputs(self.controlnet, condition, controlnet_conditioning_scale, call)}

        handle = self.transformer.register_forward_pre_hook(steered, with_kwargs=True)
        try:
            return super().__call__(*given, **named)
        finally:
            handle.remove()

    def _condition(self, picture: Image.Image, positions: Tensor) -> Tensor:
        """[1, tokens, 64] of the picture. Of `positions` [N, 3] those in plane 0 are of what is drawn: (0, row, column) each."""
        rows, columns = (int(positions[positions[:, 0] == 0, axis].max()) + 1 for axis in (1, 2))
        side = 2 * self.vae_scale_factor
        pixels = self.image_processor.preprocess(picture, height=rows * side, width=columns * side)
        mean = self.vae.encode(pixels.to(self._execution_device, self.vae.dtype)).latent_dist.mode()
        return packed((mean - self.vae.config.shift_factor) * self.vae.config.scaling_factor)
