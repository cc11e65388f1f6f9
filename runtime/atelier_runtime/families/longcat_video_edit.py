"""LongCat-Video, image to video and the continuation of clips: the weights of `longcat_video`, shown the beginning of the clip.

The first frame, or as many first frames as `data.clip.shownFrames` says, are the first k latents, encoded alone and clean, at time 0.
The network lets their tokens see only each other and no text, and all others see them. The loss is on the rest. Without frames the
prediction is that from text alone. Source: `atelier_runtime/networks/longcat_video_pipeline.py`.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from atelier_runtime.family import Conditions, Features, Frame, SampleRequest
from atelier_runtime.family_parts.longcat_video import LongCatVideoNetwork
from atelier_runtime.family_parts.shown_frames import mask_of_the_rest, with_shown


class LongCatVideoEdit(LongCatVideoNetwork):
    """LongCat-Video, trained to draw on from what it is shown."""

    name = "longcat_video_edit"

    def given_frames(self, pipeline_config: Mapping[str, Any], denoiser_config: Mapping[str, Any]) -> tuple[Frame, ...]:
        return ("first",)

    def encode_frames(self, pipe: Any, pixels: Tensor, given: tuple[Frame, ...]) -> Features:
        """`first` [B, 16, k, H, W]: latents of the first frames alone, 4 (k - 1) + 1 of them."""
        return {"first": self.encode_pixels(pipe, pixels[:, :, : len(given)]).mean}

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean, [B, 16, F, H, W], of no meaning in the latents that are shown; `time` is [B]."""
        if conditions.frames is None:
            return super().predict(denoiser, noisy, time, conditions)
        text, clean = conditions.text, conditions.frames["first"].shape[2]
        times = functional.pad(time[:, None].expand(-1, noisy.shape[2] - clean), (clean, 0))
        return -denoiser(
            with_shown(noisy, conditions),
            times * 1000,
            text["embeds"],
            text["mask"],
            num_cond_latents=clean,
            return_dict=False,
        )[0]

    def loss_mask(self, latents: Tensor, conditions: Conditions) -> Tensor | None:
        return mask_of_the_rest(latents, conditions)

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        arguments, pictures = super().sampling_arguments(pipe, request), request.pictures
        if len(pictures) == 1:
            return arguments | {"image": pictures[0]}
        continued = {"video": list(pictures), "num_cond_frames": len(pictures)}
        return arguments | continued | ({"uniform_tail": False} if request.even_steps else {})


FAMILY = LongCatVideoEdit()
