"""LongCat-Image: a flow transformer, first with two streams and then with one (arXiv:2512.07584).

Latents [B, 16, H/8, W/8] of Flux's autoencoder enter as 2 x 2 patches, [B, HW/256, 64]; time is sigma itself. Text: Qwen2.5-VL with an
instruction around exactly 512 tokens of caption and padding, which are kept without a mask, so the length is part of the model; what
stands in quotes is tokenised letter by letter. Source: diffusers' `pipeline_longcat_image.py` and `transformer_longcat_image.py`.

The stock pipeline has no LoRA loader. An exported file is loaded by its transformer:

    pipe.transformer.load_lora_adapter(folder, weight_name="pytorch_lora_weights.safetensors", prefix="transformer")
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier_runtime.family import Blocks, Conditions, Family, Features, SampleRequest

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out")
TEXT, PICTURE = 0, 1  # first coordinate of a token's position


class LongCatImage(Family):
    """LongCat-Image and its mid-training checkpoint, text to image."""

    name = "longcat_image"
    pipeline = "LongCatImagePipeline"
    # It rewrites prompts, which is off below. Its class is made with torchvision alone.
    left_out = ("text_processor",)
    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}  # noqa: RUF012
    blocks = (Blocks("transformer_blocks", "text,tokens"), Blocks("single_transformer_blocks", "text,tokens"))

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`embeds` [512, 3584], those of the padding included."""
        embeds, _ = pipe.encode_prompt(list(prompts))
        return [{"embeds": one} for one in embeds]

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean, [B, 16, H, W]. The picture's rows and columns count on from the text's last token."""
        embeds = conditions.text["embeds"]
        length = embeds.shape[1]
        rows, columns = noisy.shape[-2] // 2, noisy.shape[-1] // 2
        text, down, across = (
            torch.arange(start, start + count, device=noisy.device)
            for start, count in ((0, length), (length, rows), (length, columns))
        )
        tokens = denoiser(
            hidden_states=F.pixel_unshuffle(noisy, 2).flatten(2).transpose(1, 2),
            timestep=time,
            encoder_hidden_states=embeds,
            txt_ids=torch.stack([torch.full_like(text, TEXT), text, text], dim=1),
            img_ids=torch.cartesian_prod(down.new_tensor([PICTURE]), down, across),
            return_dict=False,
        )[0]
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), 2)

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        """The prompt as it is written: the pipeline would have its encoder write another one first."""
        return super().sampling_arguments(pipe, request) | {"enable_prompt_rewrite": False}


FAMILY = LongCatImage()
