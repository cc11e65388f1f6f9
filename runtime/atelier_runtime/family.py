"""The family protocol: what differs between model families, and nothing else.

A family is an object without state. Its facts are class attributes; its behaviour is `encode_text` and `predict`, and where the
defaults do not fit `encode_pixels`, `collate_text`, `stages`, `sampling_arguments`; where a checkpoint is shown frames of the clip
`given_frames`, `encode_frames`, `loss_mask`. A family of sounds has `encode_songs`, and `encode_shared` where all samples are told
the same beside their own. A family that trains on pairs also has `reference_size`, and where the defaults do not
fit `encode_reference` and `encode_instructions`. Noise, timesteps, loss, adapters, sharding, caches, saving and sampling loops are
not its business.

Public convention, whatever the network wants inside:

* flow: `time` is sigma in (0, 1], 1 is noise; `noisy = (1 - sigma) * clean + sigma * noise`; `predict` returns `noise - clean`.
* diffusion: `time` is the integer DDPM step (long), or of a cosine schedule its time in (0, 1], 1 is noise; `predict` returns the
  network's own epsilon or v.

`time` is [B]; a family whose network takes a time per token also accepts [B, tokens].
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from atelier_api.families import FamilyFacts
from atelier_runtime.control import Control
from atelier_runtime.lora_layout import LoraLayout

Features = dict[str, Tensor]
"""Text features of one sample, without batch dimension, at true length: what the cache stores."""

Frame = Literal["first", "last"]
"""A frame of the clip that a checkpoint is shown, beside the text. `first` several times are as many frames from the start."""


Streams = Literal[
    "tokens", "text", "text,tokens", "tokens,text", "text|tokens", "tokens|text", "text|tokens|padding", "maps"
]


@dataclass(frozen=True)
class Blocks:
    """A list of repeated blocks of a denoiser: what is recomputed, sharded and hooked.

    `attribute` is the dotted path of the `nn.ModuleList` (or of a list of lists); `streams` says what a block returns:
    `tokens` one tensor of picture tokens, `text` one of the caption's, `text,tokens` or `tokens,text` a pair, `text|tokens` or
    `tokens|text` one concatenated tensor, `text|tokens|padding` one in which each sample's picture begins where its own text ends,
    `maps` a picture-shaped [B, C, H, W], first of a tuple where a UNet returns its skips as well. Tokens of reference pictures
    follow those of the target: the loss is on the latter alone. `inner` is the class of the modules that techniques look at, where
    those are inside the blocks or only some of them: they return [B, N, D] or, again, maps.
    """

    attribute: str
    streams: Streams = "tokens"
    inner: str = ""


@dataclass(frozen=True)
class TimeEmbedder:
    """Where a denoiser makes vectors of its time, in one call for each pass or sample.

    `module` is the dotted path of what makes it. What goes in is sigma (`reversed`: 1 - sigma) times `scale` and times the number in
    the config's `scale_field`, by way of the waves that the module at the path `waves` makes of it; empty: as it is.

    `rows` says of what it makes one each: of every `sample`, and then all tokens are told alike; of the `parts` of every sample,
    frames or tokens, those of a sample together; or of all samples and then of their `references`, where they have a time. The latter
    two are asked for all samples of a pass at once. A part or a reference that is told sigma 0 is shown as it is.
    """

    module: str
    waves: str = ""
    scale: float = 1.0
    scale_field: str = ""
    reversed: bool = False
    rows: Literal["sample", "parts", "references"] = "sample"


@dataclass(frozen=True)
class Stage:
    """A range of sigma that one denoiser is responsible for. Most families have one over (0, 1]."""

    denoiser: str
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class Latents:
    """Clean latents in the denoiser's normalisation, [B, C, H, W], [B, C, F, H, W] or, of sounds, [B, C, T], and the posterior's
    standard deviation.

    `std` is None where the pipeline takes the posterior's mode; otherwise training draws `mean + std * noise`.
    """

    mean: Tensor
    std: Tensor | None = None


@dataclass(frozen=True)
class Song:
    """What the text encoder of sounds is told of one: `lyrics` are empty where nothing is sung, `seconds` its length."""

    caption: str
    lyrics: str
    seconds: float


@dataclass(frozen=True)
class Conditions:
    """What the denoiser is given beside the noisy latents, for a micro-batch of B.

    `text`: the collated features. `sizes`: [B, 6] original height and width, crop top and left, target height and width, in
    pixels. `guidance`: value of a guidance embedding; None takes the family's training value. `frame_rate`: frames per second.
    `frames`: what `encode_frames` made of the frames that are shown, [B, ...]; None where the checkpoint is shown none.
    `references`: clean latents of the reference pictures, [B, C, H, W] each with an H and W of its own, in the order of the run's
    `references`; they share the target's time, and `predict` gives nothing for them.
    `lengths`: [B] how many latents of a sound are its own, on the CPU; the others fill its bucket. None: all are.
    `shared`: what `encode_shared` made, without batch dimension.
    `control`: what a control network is given of the conditioning pictures, as its kind `takes` it; None where there is no network.
    """

    text: Features
    sizes: Tensor
    guidance: float | None = None
    frame_rate: float | None = None
    frames: Features | None = None
    references: tuple[Tensor, ...] = ()
    lengths: Tensor | None = None
    shared: Features = field(default_factory=dict)
    control: Tensor | None = None

    @property
    def controlled(self) -> dict[str, Tensor]:
        """The argument that a denoiser with a control network takes beside those of one without."""
        return {} if self.control is None else {"control": self.control}


@dataclass(frozen=True)
class SampleRequest:
    """One picture, clip or sound to draw with the stock pipeline.

    `pictures` are the frames that it is shown, in the order of `given_frames`. `references` are the pictures that are edited, upright
    RGB of any size. `resolution` is that of the training, for `reference_size`. `lyrics` and `seconds` are a sound's.
    `condition` is the conditioning picture in the size of the sample, and `condition_scale` how much the control network counts; None
    where there is none. `even_steps`: they are to be as many as asked for, whatever the pipeline would rather do.
    """

    prompt: str
    negative: str | None
    width: int
    height: int
    frames: int
    steps: int | None
    guidance: float | None
    generator: torch.Generator = field(repr=False)
    pictures: tuple[Image.Image, ...] = ()
    references: tuple[Image.Image, ...] = ()
    resolution: int = 1024
    lyrics: str = ""
    seconds: float = 0.0
    condition: Image.Image | None = None
    condition_scale: float = 1.0
    even_steps: bool = False


class Family(ABC):
    """One model family. See the module docstring for the convention of `time` and of the prediction."""

    name: ClassVar[str]
    pipeline: ClassVar[str]
    """Class in diffusers that samples the result; where a family has several, the first: a checkpoint names its own."""
    denoisers: ClassVar[tuple[str, ...]] = ("transformer",)
    """Pipeline components that are trained; a checkpoint may lack all but the first."""
    left_out: ClassVar[tuple[str, ...]] = ()
    """Pipeline components that neither training nor sampling uses: they are not loaded."""
    lora_targets: ClassVar[Mapping[str, tuple[str, ...]]]
    """Preset (`attention`, `mlp`, `all`) to suffixes of module names. A suffix follows a dot, so it never names a top-level layer."""
    lora_layout: ClassVar[LoraLayout | None] = None
    """Names of the layers in LoRA files of ComfyUI and kohya's scripts; None where they have none."""
    blocks: ClassVar[tuple[Blocks, ...]]
    time_embedder: ClassVar[TimeEmbedder | None] = None
    """How its denoiser learns of the time, of a flow family: there it can be told the end of a step as well. None: of diffusion."""
    frozen_parameters: ClassVar[tuple[str, ...]] = ()
    """Regular expressions over parameter names that no gradient reaches: frozen in full-rank training."""
    unquantized: ClassVar[tuple[str, ...]] = ()
    """Regular expressions over names of linear layers in the blocks that a quantised base keeps in full precision."""
    text_sees_references: ClassVar[bool] = False
    """Whether the text encoder looks at the reference pictures: text features then belong to a caption and its references together."""
    shares: ClassVar[bool] = False
    """Whether all samples are told the same beside their own text: `encode_shared`."""
    control: ClassVar[Control | None] = None
    """The kind of its control networks; None where none can be trained, for the reason in the facts."""

    @property
    def facts(self) -> FamilyFacts:
        """The family's row in the API table."""
        from atelier_api.families import FAMILIES

        return FAMILIES[self.name]

    def dead_modules(self, denoiser: nn.Module) -> tuple[str, ...]:
        """Full names of linear layers whose output is thrown away: never targets, and frozen in full-rank training.

        Asked before adapters are on.
        """
        return ()

    def architecture(self, denoiser_config: Mapping[str, Any]) -> str:
        """Id of the denoiser's architecture in the `modelspec` header of a result. `denoiser_config` is its `config.json`."""
        return self.name if self.lora_layout is None else self.lora_layout.architecture

    def provided_components(self, folder: Path) -> dict[str, Any]:
        """Components that the stock pipeline is given beside those of the checkpoint, or instead of them. Asked each time before it is
        built from the checkpoint in `folder`.
        """
        return {}

    def check_sampling(self, pipeline_config: Mapping[str, Any]) -> None:  # noqa: B027
        """Raises ConfigError for a checkpoint that no sample can be drawn with. `pipeline_config` is `model_index.json`.

        Asked where a run has prompts, before anything is encoded.
        """

    @abstractmethod
    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """Features of each prompt exactly as the stock pipeline makes them, on the encoders' device, at true length."""

    def encode_instructions(
        self, pipe: Any, prompts: Sequence[str], references: Sequence[Sequence[Image.Image]]
    ) -> list[Features]:
        """Features of each prompt beside its reference pictures, upright RGB of any size. Asked only where `text_sees_references`."""
        raise NotImplementedError(f"{self.name} encodes text without pictures")

    def encode_songs(self, pipe: Any, songs: Sequence[Song | None]) -> list[Features]:
        """Features of each song as `encode_text` gives them, of None those of nothing: what guidance contrasts with.

        Asked only of families of sounds.
        """
        raise NotImplementedError(f"{self.name} makes no sounds")

    def encode_shared(self, pipe: Any) -> Features:
        """What the denoiser is told beside every sample's own text, once for all. Asked only where `shares`."""
        raise NotImplementedError(f"{self.name} tells nothing to all")

    @abstractmethod
    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """The prediction for `noisy`, of the same shape, in the convention of the module docstring."""

    def collate_text(self, samples: Sequence[Features]) -> Features:
        """Features of a batch, [B, ...]: stacked, and padded with zeros along the first dimension where lengths differ."""
        return {key: _stack([sample[key] for sample in samples]) for key in samples[0]}

    def encode_pixels(self, pipe: Any, pixels: Tensor) -> Latents:
        """Latents of [B, 3, H, W] (or [B, 3, F, H, W]) pixels in [-1, 1], for a scalar-normalised `AutoencoderKL`.

        In families of sounds of waveforms [B, 2, N], as many samples as make whole latents.
        """
        posterior = pipe.vae.encode(pixels.to(pipe.vae.dtype)).latent_dist
        scale = pipe.vae.config.scaling_factor
        shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
        return Latents(mean=(posterior.mean - shift) * scale, std=posterior.std * scale)

    def pipeline_of(self, pipeline_config: Mapping[str, Any]) -> str:
        """Class that samples the checkpoint with this `model_index.json`: by default the one that it names."""
        return str(pipeline_config["_class_name"])

    def given_frames(self, pipeline_config: Mapping[str, Any], denoiser_config: Mapping[str, Any]) -> tuple[Frame, ...]:
        """The frames of a clip that this checkpoint is shown. `denoiser_config` is the `config.json` of its first denoiser."""
        return ()

    def encode_frames(self, pipe: Any, pixels: Tensor, given: tuple[Frame, ...]) -> Features:
        """What the denoiser is told of the `given` frames of clips [B, 3, F, H, W] in [-1, 1]; tensors [B, ...], kept by the cache."""
        raise NotImplementedError(f"{self.name} is shown no frames")

    def loss_mask(self, latents: Tensor, conditions: Conditions) -> Tensor | None:
        """1 where the loss counts and 0 where not, in a shape that broadcasts to `latents`; None: it counts everywhere.

        Of sounds it counts on the latents that are their own.
        """
        if conditions.lengths is None:
            return None
        places = torch.arange(latents.shape[-1], device=latents.device)
        own = places < conditions.lengths.to(latents.device).unsqueeze(1)
        return own.unsqueeze(1).to(latents.dtype)

    def reference_size(self, width: int, height: int, resolution: int) -> tuple[int, int]:
        """Width and height to which a reference picture of `width` x `height` is resized, as a whole, in a run of `resolution`.

        What the stock pipeline would make of it, where that follows from the aspect; scaled with the run's resolution, so that target
        and reference are to each other as they are when the pipeline samples.
        """
        raise NotImplementedError(f"{self.name} takes no reference pictures")

    def encode_reference(self, pipe: Any, pixels: Tensor) -> Tensor:
        """Clean latents of [B, 3, H, W] reference pixels in [-1, 1]: by default the mean of `encode_pixels`."""
        return self.encode_pixels(pipe, pixels).mean

    def encode_condition(self, pipe: Any, pixels: Tensor) -> Latents:
        """Of [B, 3, H, W] conditioning pixels in [-1, 1], what a control network that takes latents is given.

        Where its pipeline draws from the posterior, so does training.
        """
        latents = self.encode_pixels(pipe, pixels)
        return latents if self.control is not None and self.control.drawn else Latents(latents.mean)

    def stages(self, pipeline_config: Mapping[str, Any], denoisers: Sequence[str]) -> tuple[Stage, ...]:
        """Which of the checkpoint's `denoisers` trains which range of sigma. `pipeline_config` is `model_index.json`."""
        return (Stage(denoisers[0]),)

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        """Arguments for the stock pipeline's call; absent ones stay at the pipeline's default."""
        arguments: dict[str, Any] = {
            "prompt": request.prompt,
            "negative_prompt": request.negative,
            "width": request.width,
            "height": request.height,
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance,
            "generator": request.generator,
        }
        if self.facts.modality == "video":
            arguments["num_frames"] = request.frames
        if self.control is not None and request.condition is not None:
            arguments[self.control.picture] = request.condition
            arguments["controlnet_conditioning_scale"] = request.condition_scale
        return {key: value for key, value in arguments.items() if value is not None}


def named_blocks(denoiser: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of one list with their full names, in order, whatever lists they lie in. A path that the denoiser lacks has none."""
    try:
        part = denoiser.get_submodule(path)
    except AttributeError:  # a control network has no blocks that lead up, and lists of its own that its base lacks
        return
    yield from _leaves(path, part)


def _leaves(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.ModuleList):
        for key, child in module.named_children():
            yield from _leaves(f"{name}.{key}", child)
    else:
        yield name, module


def latent_tokens(family: Family, latents: Tensor) -> int:
    """Tokens of one sample of latents [B, C, H, W], [B, C, F, H, W] or, of sounds, [B, C, T]."""
    patch = family.facts.patch
    if latents.ndim == 3:
        return -(-latents.shape[-1] // patch)
    frames = latents.shape[2] if latents.ndim == 5 else 1
    return frames * (latents.shape[-2] // patch) * (latents.shape[-1] // patch)


def configuration(denoiser: nn.Module) -> Any:
    """The diffusers config of a denoiser, also of one inside DistributedDataParallel, which hides it."""
    return getattr(denoiser, "module", denoiser).config


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    longest = max(tensor.shape[0] if tensor.ndim else 0 for tensor in tensors)
    if all(tensor.shape == tensors[0].shape for tensor in tensors):
        return torch.stack(list(tensors))
    padded = [torch.cat([t, t.new_zeros((longest - t.shape[0], *t.shape[1:]))]) for t in tensors]
    return torch.stack(padded)
