"""Music with ACE-Step v1: Euler steps under adaptive projected guidance, from a caption and lyrics.

It samples as the maker's training code does for its own samples. Guidance contrasts with nothing at all: no lyrics, no voice, and a
caption of one token of zeros. Of the maker's sampler this leaves out weakened attention and intervals of guidance, guidance of caption
and lyrics apart, other schedulers, editing, and the continuation of sounds. Facts: https://github.com/ace-step/ACE-Step (Apache-2.0),
`trainer.py` and `pipeline_ace_step.py`; arXiv:2410.02416 (guidance).
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AudioPipelineOutput, AutoencoderDC, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast, UMT5EncoderModel

from atelier_runtime.networks.ace_step_v1 import ACEStepTransformer2DModel
from atelier_runtime.networks.ace_step_v1_sound import ADaMoSHiFiGANV1, MusicDCAE
from atelier_runtime.networks.ace_step_v1_words import UNSUNG, lyric_tokens

TEXT_TOKENS = 256
LYRIC_TOKENS = 4096
LATENT_SHIFT, LATENT_SCALE = -1.9091, 0.1786
SHIFT = 3.0
MOMENTUM, NORM_THRESHOLD = -0.75, 2.5
GRANULARITY = 0.9 + 0.2 / (1 + 2.718281828459045**-1.0)
"""How much further than Euler's a step goes, but for its mean: 1.046, the maker's default of a slider."""
_LOADING = ("cache_dir", "dtype", "local_files_only", "revision", "token", "torch_dtype", "variant")


class GranularEulerScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler steps of which what deviates from their mean over a sample is `GRANULARITY` times as large."""

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **options: Any) -> Any:
        """As in diffusers."""
        mean = model_output.mean(dim=tuple(range(1, model_output.ndim)), keepdim=True)
        return super().step(mean + GRANULARITY * (model_output - mean), timestep, sample, **options)


_OWN: dict[str, Any] = {
    "transformer": ACEStepTransformer2DModel,
    "vae": MusicDCAE,
    "scheduler": GranularEulerScheduler,
}
"""Components of these classes, whatever library `model_index.json` names for them."""


class ACEStepPipeline(DiffusionPipeline):
    """A checkpoint with `tokenizer` and `text_encoder` of captions, `lyric_tokenizer`, `transformer`, `vae` and `scheduler`."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        tokenizer: AutoTokenizer,
        text_encoder: UMT5EncoderModel,
        lyric_tokenizer: PreTrainedTokenizerFast,
        transformer: ACEStepTransformer2DModel,
        vae: MusicDCAE,
        scheduler: GranularEulerScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            lyric_tokenizer=lyric_tokenizer,
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
        )

    @property
    def sample_rate(self) -> int:
        """Samples per second of the sounds it makes."""
        rate: int = self.vae.config.sampling_rate
        return rate

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> "ACEStepPipeline":
        """As in diffusers, of a folder that `save_pretrained` has made."""
        loading = {name: kwargs[name] for name in _LOADING if name in kwargs}
        without_weights = {name: value for name, value in loading.items() if "dtype" not in name}
        own = {
            name: kwargs.pop(name)
            if name in kwargs
            else kind.from_pretrained(
                pretrained_model_name_or_path,
                subfolder=name,
                **(loading if issubclass(kind, nn.Module) else without_weights),
            )
            for name, kind in _OWN.items()
        }
        pipe = super().from_pretrained(pretrained_model_name_or_path, **dict.fromkeys(own), **kwargs)
        pipe.register_modules(**own)
        return pipe

    @classmethod
    def from_published(
        cls, folder: str | Path, lyric_vocabulary: str | Path, dtype: torch.dtype = torch.bfloat16
    ) -> "ACEStepPipeline":
        """The pipeline of the four folders of a copy of the published repository, which has no index.

        `lyric_vocabulary` is `acestep/models/lyrics_utils/vocab.json` of the maker's code. `dtype` is that of the network and the text
        encoder.
        """
        folder = Path(folder)
        dcae = AutoencoderDC.from_pretrained(str(folder / "music_dcae_f8c8"))
        vocoder = ADaMoSHiFiGANV1.from_pretrained(str(folder / "music_vocoder"))
        known, _, _ = ADaMoSHiFiGANV1.extract_init_dict(dict(vocoder.config))  # the maker's config says more
        vae = MusicDCAE(dict(dcae.config), known, vocoder.config.sampling_rate)
        vae.dcae, vae.vocoder = dcae, vocoder
        vae.eval()
        return cls(
            tokenizer=AutoTokenizer.from_pretrained(folder / "umt5-base"),
            text_encoder=UMT5EncoderModel.from_pretrained(folder / "umt5-base", dtype=dtype),
            lyric_tokenizer=PreTrainedTokenizerFast(tokenizer_file=str(lyric_vocabulary)),
            transformer=ACEStepTransformer2DModel.from_pretrained(str(folder / "ace_step_transformer"), dtype=dtype),
            vae=vae,
            scheduler=GranularEulerScheduler(shift=SHIFT),
        )

    def encode_prompt(self, caption: str) -> Tensor:
        """Features of a caption [1, L, D], L at most 256."""
        tokens = self.tokenizer([caption], truncation=True, max_length=TEXT_TOKENS, return_tensors="pt")
        tokens = tokens.to(self.text_encoder.device)
        features: Tensor = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return features

    def encode_lyrics(self, lyrics: str) -> tuple[Tensor, Tensor]:
        """Tokens [1, N], N at most 4096, and whether they are sung [1, N]: without lyrics one that is not."""
        sung = bool(lyrics.strip())
        tokens = torch.tensor([lyric_tokens(self.lyric_tokenizer, lyrics)[:LYRIC_TOKENS] if sung else UNSUNG])
        return tokens, torch.full_like(tokens, sung, dtype=torch.bool)

    def without_caption(self) -> Tensor:
        """Features [1, 1, D] of the caption that guidance contrasts with."""
        return torch.zeros(1, 1, self.text_encoder.config.d_model)

    def latents_of(self, waveforms: Tensor) -> Tensor:
        """Latents [B, 8, 16, N / 4096] of waveforms [B, 2, N], as the denoiser has them."""
        latents: Tensor = (self.vae.encode(waveforms).latent - LATENT_SHIFT) * LATENT_SCALE
        return latents

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        lyrics: str = "",
        *,
        audio_duration: float = 60.0,
        num_inference_steps: int = 60,
        guidance_scale: float = 15.0,
        generator: torch.Generator | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
    ) -> AudioPipelineOutput | tuple[Any]:
        """A waveform [1, 2, N] in [-1, 1] of `audio_duration` seconds, cut to whole latents.

        Above a `guidance_scale` of 1 the prediction is contrasted with that for nothing. `output_type` is `pt`, `np`, or `latent` for
        latents [1, 8, 16, T].
        """
        columns = int(audio_duration * self.sample_rate / self.vae.samples_per_latent)
        if columns < 1:
            least = self.vae.samples_per_latent / self.sample_rate
            raise ValueError(f"audio_duration is {audio_duration:g} seconds; it must be at least {least:.3f}")
        if output_type not in ("pt", "np", "latent"):
            raise ValueError(f"output_type is {output_type!r}; allowed are pt, np, latent")
        told = (self.encode_prompt(prompt), *self.encode_lyrics(lyrics))
        nothing = (self.without_caption(), *self.encode_lyrics(""))
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        rows = self.transformer.config.patch_size[0]
        shape = (1, self.transformer.config.in_channels, rows, columns)
        latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        momentum = MomentumBuffer(MOMENTUM)
        for t in self.progress_bar(self.scheduler.timesteps):
            flow = self._flow(latents, t, *told)
            if guidance_scale > 1:
                flow = guided(flow, self._flow(latents, t, *nothing), guidance_scale, momentum)
            latents = self.scheduler.step(flow, t, latents, return_dict=False)[0]
        audio = latents if output_type == "latent" else self._decoded(latents)
        self.maybe_free_model_hooks()
        result: Any = audio.cpu().numpy() if output_type == "np" else audio
        return AudioPipelineOutput(audios=result) if return_dict else (result,)

    def _flow(self, latents: Tensor, t: Tensor, text: Tensor, lyrics: Tensor, sung: Tensor) -> Tensor:
        device = latents.device
        voice = torch.zeros(1, self.transformer.config.speaker_embedding_dim, device=device)
        inputs = (latents, t.expand(1), text.to(device), voice, lyrics.to(device), sung.to(device))
        flow: Tensor = self.transformer(*inputs, return_dict=False)[0]
        return flow.float()

    def _decoded(self, latents: Tensor) -> Tensor:
        waveforms: Tensor = self.vae.decode(latents / LATENT_SCALE + LATENT_SHIFT).sample
        return waveforms


def guided(positive: Tensor, negative: Tensor, guidance: float, momentum: MomentumBuffer) -> Tensor:
    """Adaptive projected guidance (arXiv:2410.02416) within each channel of [B, 8, 16, T].

    The difference of the two, less three quarters of the sum of earlier steps' and at most 2.5 long, is added without what is along
    the positive prediction.
    """
    result: Tensor = normalized_guidance(
        pred_cond=positive,
        pred_uncond=negative,
        guidance_scale=guidance - 1,
        momentum_buffer=momentum,
        eta=0.0,
        norm_threshold=NORM_THRESHOLD,
        use_original_formulation=True,
        norm_dim=(-2, -1),
    )
    return result
