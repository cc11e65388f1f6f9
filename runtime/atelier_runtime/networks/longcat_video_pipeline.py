"""Clips with LongCat-Video, as the maker's pipeline samples: captions of 512 tokens, Euler steps, CFG-zero* guidance.

From text alone, from a picture, or as the continuation of a clip. What is shown stands at the start of the latents, clean, at time 0
and untouched by the steps. Left out: refinement to 720p, the distilled schedule, and the cache of keys and values, which makes
continuation faster and changes nothing. Facts: https://github.com/meituan-longcat/LongCat-Video,
`longcat_video/pipeline_longcat_video.py` (MIT).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, UMT5EncoderModel

from atelier_runtime.family_parts.channels import standardised, statistics
from atelier_runtime.networks.longcat_video import LongCatVideoTransformer3DModel

TEXT_TOKENS = 512
LAST_SIGMA = 0.001  # of the schedule before its shift
TAIL_SIGMA, TAIL_STEPS = 0.5, 10  # where a clip is continued: even steps from here to 0, after the shift
_LOADING = ("cache_dir", "dtype", "local_files_only", "revision", "token", "torch_dtype", "variant")
OnStepEnd = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]]


@dataclass
class LongCatVideoPipelineOutput(BaseOutput):
    """`frames`: clips as `output_type` asks; `latent` gives [B, 16, F, H/8, W/8], normalised as the denoiser has them."""

    frames: Any


class LongCatVideoPipeline(DiffusionPipeline):
    """A checkpoint with `tokenizer`, `text_encoder`, `vae`, `scheduler` and `dit`."""

    model_cpu_offload_seq = "text_encoder->dit->vae"

    def __init__(
        self,
        tokenizer: AutoTokenizer,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        scheduler: FlowMatchEulerDiscreteScheduler,
        dit: LongCatVideoTransformer3DModel,
    ) -> None:
        super().__init__()
        self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, scheduler=scheduler, dit=dit)
        self.vae_scale_factor_temporal = vae.config.scale_factor_temporal
        self.vae_scale_factor_spatial = vae.config.scale_factor_spatial
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> "LongCatVideoPipeline":
        """As in diffusers; the denoiser is always the class above, whatever library `model_index.json` names for it."""
        if "dit" in kwargs:
            dit = kwargs.pop("dit")
        else:
            loading = {name: kwargs[name] for name in _LOADING if name in kwargs}
            dit = LongCatVideoTransformer3DModel.from_pretrained(
                pretrained_model_name_or_path, subfolder="dit", **loading
            )
        pipe = super().from_pretrained(pretrained_model_name_or_path, dit=None, **kwargs)
        pipe.register_modules(dit=dit)
        return pipe

    def encode_prompt(self, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Features [B, 512, D] and mask [B, 512], which is 1 where there is text. Features of padding are not zero."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        tokens = self.tokenizer(
            [prompt_clean(prompt) for prompt in prompts],
            padding="max_length",
            max_length=TEXT_TOKENS,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(device)
        features = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return features, tokens.attention_mask

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        *,
        image: Image.Image | None = None,
        video: Sequence[Image.Image] | None = None,
        num_cond_frames: int = 13,
        height: int = 480,
        width: int = 832,
        num_frames: int = 93,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        uniform_tail: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
    ) -> LongCatVideoPipelineOutput | tuple[Any]:
        """Clips of `num_frames` (4n + 1) frames of `width` x `height` pixels (multiples of 16).

        They begin with `image`, or with the last `num_cond_frames` (4n + 1) pictures of `video`, brought to that size. Above a
        `guidance_scale` of 1 the prediction is contrasted with that for `negative_prompt`. `uniform_tail`: of a continued clip
        the lower half of the noise goes in 10 even steps, however many there are above. `callback_on_step_end` may give other
        `latents` to go on with.
        """
        self._check_size(height, width, num_frames)
        shown = self._shown(image, video, num_cond_frames, num_frames)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        guided = guidance_scale > 1
        device = self._execution_device
        text, mask = self.encode_prompt([*negatives, *prompts] if guided else prompts, device)
        sigmas = self._sigmas(num_inference_steps, tail=uniform_tail and video is not None)
        self.scheduler.set_timesteps(len(sigmas), sigmas=sigmas, device=device)
        latents, clean = self._start(len(prompts), (num_frames, height, width), shown, generator)
        # The maker's guidance measures a first frame with the rest; a clip that is continued lies in a cache beside it.
        measured = clean if video is not None else 0
        for number, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            inputs = torch.cat([latents, latents]) if guided else latents
            times = functional.pad(t.expand(len(inputs), latents.shape[2] - clean), (clean, 0))
            flow = self.dit(inputs, times, text, mask, num_cond_latents=clean, return_dict=False)[0]
            if guided:
                negative, positive = flow.chunk(2)
                flow = cfg_zero_star(positive, negative, guidance_scale, measured)
            # The network points to the clean clip, the scheduler wants the direction of the noise.
            drawn = self.scheduler.step(-flow, t, latents, return_dict=False)[0]
            latents = torch.cat([latents[:, :, :clean], drawn[:, :, clean:]], dim=2)
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, number, t, {"latents": latents}).get("latents", latents)
        frames = latents if output_type == "latent" else self._decoded(latents, output_type)
        self.maybe_free_model_hooks()
        return LongCatVideoPipelineOutput(frames=frames) if return_dict else (frames,)

    def _check_size(self, height: int, width: int, frames: int) -> None:
        multiple = self.vae_scale_factor_spatial * self.dit.config.patch_size[-1]
        if height % multiple or width % multiple:
            raise ValueError(f"height and width are {height} and {width}; they must be multiples of {multiple}")
        if frames % self.vae_scale_factor_temporal != 1:
            raise ValueError(
                f"num_frames is {frames}; it must be a multiple of {self.vae_scale_factor_temporal} plus 1"
            )

    def _shown(
        self, image: Image.Image | None, video: Sequence[Image.Image] | None, conditions: int, frames: int
    ) -> list[Image.Image]:
        """The pictures that the clip begins with."""
        if image is not None and video is not None:
            raise ValueError("both image and video are given; a clip begins with one or the other")
        if image is not None:
            conditions, video = 1, [image]
        if video is None:
            return []
        if conditions % self.vae_scale_factor_temporal != 1 or conditions >= frames:
            raise ValueError(
                f"num_cond_frames is {conditions}; it must be a multiple of {self.vae_scale_factor_temporal} plus 1, and less than "
                f"num_frames, which is {frames}"
            )
        if len(video) < conditions:
            raise ValueError(f"video has {len(video)} pictures; num_cond_frames asks for {conditions}")
        return list(video)[-conditions:]

    def _sigmas(self, steps: int, tail: bool) -> list[float]:
        """The schedule before its shift."""
        even = torch.linspace(1, LAST_SIGMA, steps)
        if not tail:
            return even.tolist()
        shift = self.scheduler.config.shift
        above = even[shift * even / (1 + (shift - 1) * even) > TAIL_SIGMA]
        below = torch.linspace(TAIL_SIGMA, 0, TAIL_STEPS + 1)[:-1]
        return [*above.tolist(), *(below / (shift - (shift - 1) * below)).tolist()]

    def _start(
        self,
        clips: int,
        size: tuple[int, int, int],
        shown: list[Image.Image],
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> tuple[Tensor, int]:
        """Noise [B, 16, F, H/8, W/8] for clips of `size` (frames, height, width), and how many latents of what is shown begin it."""
        frames, height, width = size
        across, along = self.vae_scale_factor_spatial, self.vae_scale_factor_temporal
        shape = (clips, self.dit.config.in_channels, (frames - 1) // along + 1, height // across, width // across)
        device = self._execution_device
        latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if not shown:
            return latents, 0
        start = self._encoded(self.video_processor.preprocess_video(shown, height=height, width=width).to(device))
        latents[:, :, : start.shape[2]] = start
        return latents, start.shape[2]

    def _encoded(self, pixels: Tensor) -> Tensor:
        """Latents of pixels [1, 3, F, H, W] in [-1, 1], normalised: the posterior's mode, as in training."""
        mode = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode().float()
        return standardised(self.vae, mode)

    def _decoded(self, latents: Tensor, output_type: str) -> Any:
        mean, std = statistics(self.vae, latents)
        video = self.vae.decode((latents * std + mean).to(self.vae.dtype), return_dict=False)[0]
        return self.video_processor.postprocess_video(video, output_type=output_type)


def cfg_zero_star(positive: Tensor, negative: Tensor, guidance: float, first: int = 0) -> Tensor:
    """Guidance that counts from the part of `positive` that lies along `negative` (arXiv 2503.18886), [B, C, F, H, W] each.

    That part is measured over the frames from the `first` on.
    """
    one, other = positive[:, :, first:], negative[:, :, first:]
    along = (one * other).flatten(1).sum(1) / (other.square().flatten(1).sum(1) + 1e-8)
    base = negative * along.view(-1, *[1] * (negative.ndim - 1))
    return base + guidance * (positive - base)
