"""What the conformance suite asks of every tiny pipeline: family, denoisers, real samples, and the stock pipeline's own steps."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from atelier_runtime.data.buckets import place_whole
from atelier_runtime.data.image import fit
from atelier_runtime.families import FAMILIES
from atelier_runtime.family import Conditions, Family, Features, Frame, SampleRequest, Song
from family_models import FAMILY_OF, TINY, tiny_pipeline
from family_models.kinds import Tiny
from family_models.scene import WIDTH

GUIDANCE = 3.0
RESOLUTION = 64
"""Edge of the square whose area references have, in pixels."""
REFERENCE_SIZES = ((70, 48), (80, 40))
"""Sizes of the files of a sample's references."""
PROMPTS = ("a fox", 'a lighthouse in the fog at dawn with the sign "keep off"')
"""Of unequal length, and one with words to be drawn, for which some families have an encoder of their own."""
LYRICS = "[verse]\nround and round it goes"
"""What is sung to each of them, where sounds are made."""


@dataclass(frozen=True)
class Case:
    """One tiny pipeline and the family that trains it."""

    name: str
    pipe: Any
    family: Family

    @property
    def tiny(self) -> Tiny:
        return TINY[self.name]

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        present = {name: getattr(self.pipe, name, None) for name in self.family.denoisers}
        return {name: module for name, module in present.items() if module is not None}

    @property
    def pipeline_config(self) -> dict[str, Any]:
        """`model_index.json` as it would be saved."""
        return {**self.pipe.config, "_class_name": type(self.pipe).__name__}

    @property
    def given(self) -> tuple[Frame, ...]:
        """The frames that the denoisers are shown."""
        first: Any = next(iter(self.denoisers.values()))
        given = self.family.given_frames(self.pipeline_config, dict(first.config))
        again: Frame = "first"
        return (*[again] * (self.tiny.shown - 1), *given)

    @property
    def places(self) -> list[int]:
        """Where in a clip these frames are."""
        return [number if frame == "first" else -1 for number, frame in enumerate(self.given)]

    def denoiser_at(self, sigma: float) -> nn.Module:
        """The denoiser that trains this noise level; at a boundary the one of higher noise, as the pipelines have it."""
        stages = self.family.stages(self.pipeline_config, tuple(self.denoisers))
        stage = max((stage for stage in stages if stage.low <= sigma <= stage.high), key=lambda stage: stage.high)
        return self.denoisers[stage.denoiser]

    def conditions(
        self, prompts: Sequence[str | None], guidance: float | None = None, samples: Sequence[int] | None = None
    ) -> Conditions:
        """What the denoiser is told of these prompts, and shown of the clips and references of these numbers (0, 1, … unless told).

        A prompt of None is nothing, where sounds are made.
        """
        numbers = list(range(len(prompts)) if samples is None else samples)
        references = [self.references(number) for number in numbers]
        frames = None
        with torch.no_grad():
            features = self.features(prompts, references)
            if self.given:
                shown = self.pixels(max(numbers) + 1)[numbers]
                frames = self.family.encode_frames(self.pipe, shown, self.given)
            latents = tuple(self.reference_latents(column) for column in zip(*references, strict=True))
        height, width = self.tiny.height, self.tiny.width
        return Conditions(
            text=self.family.collate_text(features),
            sizes=torch.tensor([[height, width, 0, 0, height, width]] * len(prompts)),
            guidance=guidance,
            frames=frames,
            references=latents,
            shared=self.family.encode_shared(self.pipe) if self.family.shares else {},
        )

    def features(self, prompts: Sequence[str | None], references: Sequence[tuple[Image.Image, ...]]) -> list[Features]:
        """Of each prompt as the family's kind of text encoder makes them."""
        with torch.no_grad():
            if self.family.facts.modality == "audio":
                songs = [None if prompt is None else Song(prompt, LYRICS, self.tiny.seconds) for prompt in prompts]
                return self.family.encode_songs(self.pipe, songs)
            texts = [prompt for prompt in prompts if prompt is not None]
            if self.family.text_sees_references:
                return self.family.encode_instructions(self.pipe, texts, references)
            return self.family.encode_text(self.pipe, texts)

    def references(self, number: int) -> tuple[Image.Image, ...]:
        """Reference pictures of a sample for families that take them, of other sizes and aspects than the target and each other."""
        if not self.family.facts.references:
            return ()
        sizes = REFERENCE_SIZES[: self.tiny.references]
        corners = [(7 * number + 3 * place, 5 * number) for place in range(len(sizes))]
        pairs = zip(corners, sizes, strict=True)
        return tuple(
            photographs()[(number + place) % 2].crop((left, top, left + width, top + height))
            for place, ((left, top), (width, height)) in enumerate(pairs)
        )

    def reference_latents(self, pictures: Sequence[Image.Image]) -> Tensor:
        """[B, C, H, W] of pictures of one size, resized as in training."""
        pixels = [fit(each, place_whole(*self.family.reference_size(*each.size, RESOLUTION))) for each in pictures]
        return self.family.encode_reference(self.pipe, torch.stack(pixels)).float()

    def pixels(self, count: int) -> Tensor:
        """Pixels of as many pictures or clips, or waveforms of sounds."""
        if self.family.facts.sample_rate is not None:
            return torch.stack(
                [chord(number, self.tiny.seconds, self.family.facts.sample_rate) for number in range(count)]
            )
        clips = real_clips(count, self.tiny)
        return clips if self.family.facts.modality == "video" else clips[:, :, 0]

    def latents(self, count: int) -> Tensor:
        with torch.no_grad():
            return self.family.encode_pixels(self.pipe, self.pixels(count)).mean.float()

    def noised(self, clean: Tensor, levels: Sequence[float], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """(noisy, time, target) for noise levels in (0, 1), in the convention of the family module."""
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
        level = torch.tensor(levels).view(-1, *[1] * (clean.ndim - 1))
        if self.family.facts.objective == "flow":
            return (1 - level) * clean + level * noise, torch.tensor(levels), noise - clean
        if self.family.facts.noise_schedule == "cosine":
            return self.pipe.scheduler.add_noise(clean, noise, torch.tensor(levels)), torch.tensor(levels), noise
        schedule = self.pipe.scheduler.alphas_cumprod
        step = (torch.tensor(levels) * len(schedule)).long()
        kept = schedule[step].view_as(level)
        return kept.sqrt() * clean + (1 - kept).sqrt() * noise, step, noise

    def request(self, guidance: float | None, steps: int = 4) -> SampleRequest:
        return SampleRequest(
            prompt=PROMPTS[0],
            negative=None,
            width=self.tiny.width,
            height=self.tiny.height,
            frames=self.tiny.frames,
            steps=steps,
            guidance=guidance,
            generator=torch.Generator().manual_seed(3),
            pictures=self.pictures(),
            references=self.references(0),
            resolution=RESOLUTION,
            lyrics=LYRICS,
            seconds=self.tiny.seconds,
        )

    def pictures(self) -> tuple[Image.Image, ...]:
        """The frames of the first clip that the denoisers are shown, as a user would hand them in."""
        shown = [(self.pixels(1)[0, :, place] + 1) * 127.5 for place in self.places]
        return tuple(Image.fromarray(frame.round().byte().permute(1, 2, 0).numpy()) for frame in shown)

    def loss(self, prediction: Tensor, target: Tensor, conditions: Conditions) -> Tensor:
        """Squared error where the family counts it."""
        mask = self.family.loss_mask(target, conditions)
        error = (prediction - target).square()
        return error.mean() if mask is None else error[mask.expand_as(error).bool()].mean()


def make_case(name: str) -> Case:
    return Case(name, tiny_pipeline(name), FAMILIES[FAMILY_OF[name]])


CASES = tuple(TINY)


@cache
def photographs(scale: int = 1) -> tuple[Image.Image, ...]:
    """The two of scikit-learn, 160 x 106 times `scale`."""
    return tuple(Image.fromarray(image).resize((160 * scale, 106 * scale)) for image in load_sample_images().images)


def real_clips(count: int, tiny: Tiny) -> Tensor:
    """[count, 3, frames, height, width] in [-1, 1]: a camera that pans over the two photographs of scikit-learn."""
    pictures = [np.asarray(photograph) for photograph in photographs(max(1, tiny.width // WIDTH))]
    clips = []
    for number in range(count):
        picture, left, top = pictures[number % 2], 11 * number, 7 * number
        frames = [
            picture[top : top + tiny.height, left + 2 * shift : left + 2 * shift + tiny.width]
            for shift in range(tiny.frames)
        ]
        clips.append(torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2) / 127.5 - 1)
    return torch.stack(clips)


def chord(number: int, seconds: float, rate: int) -> Tensor:
    """A waveform [2, N] in [-1, 1]: plucked strings, a chord and a pan of their own for each number."""
    time = np.arange(round(seconds * rate)) / rate
    strings = [pluck(time, 220 * 2 ** (step / 12) * (1 + number / 8)) for step in (0, 3 + number % 2, 7)]
    left = 0.3 + 0.1 * (number % 5)
    return torch.from_numpy(np.outer([left, 1 - left], np.mean(strings, axis=0))).float()


def pluck(time: NDArray[np.float64], frequency: float) -> NDArray[np.float64]:
    """A string that is plucked at 0 and again every 0.4 seconds, with its overtones."""
    since = time % 0.4
    overtones = [np.sin(2 * np.pi * frequency * k * since) / k for k in range(1, 6)]
    loudness: NDArray[np.float64] = np.exp(-4 * since) / 2
    return loudness * np.sum(overtones, axis=0)


@dataclass
class Recording:
    """The stock pipeline's run: the scheduler's setting, the latents it started from, and those after every step.

    `generators` are as they were before each step, for samplers that add noise of their own.
    """

    set_timesteps: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    start: Tensor | None = None
    after: list[Tensor] = field(default_factory=list)
    generators: list[torch.Generator | None] = field(default_factory=list)


def record(pipe: Any, arguments: dict[str, Any]) -> Recording:
    """Runs the pipeline and keeps what is needed to walk the same path."""
    recording = Recording()
    scheduler = pipe.scheduler

    def on_latents(latents: Tensor) -> None:
        recording.after.append(latents.clone())

    callback = step_callback(pipe, on_latents)
    set_timesteps, step = scheduler.set_timesteps, scheduler.step

    def spy_set(*args: Any, **kwargs: Any) -> Any:
        recording.set_timesteps = (args, kwargs)
        return set_timesteps(*args, **kwargs)

    def spy_step(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(step).bind(*args, **kwargs).arguments
        if recording.start is None:
            recording.start = given["sample"].clone()
        generator = given.get("generator")
        recording.generators.append(generator.clone_state() if isinstance(generator, torch.Generator) else None)
        result = step(*args, **kwargs)
        if not callback:
            on_latents(result[0])
        return result

    # The pipelines look at the signatures to decide what to pass.
    spy_set.__wrapped__, spy_step.__wrapped__ = set_timesteps, step  # type: ignore[attr-defined]

    scheduler.set_timesteps, scheduler.step = spy_set, spy_step
    try:
        pipe(**arguments, output_type="latent", **callback)
    finally:
        del scheduler.set_timesteps, scheduler.step
    return recording


def step_callback(pipe: Any, on_latents: Callable[[Tensor], None]) -> dict[str, Any]:
    """The argument that hands the latents over after every step: older pipelines know the deprecated one only, some know none."""

    def on_step_end(_: Any, number: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        on_latents(tensors["latents"])
        return {}

    known = inspect.signature(pipe.__call__).parameters
    if "callback_on_step_end" in known:
        return {"callback_on_step_end": on_step_end}
    return {"callback": lambda number, t, latents: on_latents(latents)} if "callback" in known else {}


def sampling_arguments(case: Case, *, guided: bool) -> dict[str, Any]:
    """The family's arguments for the stock pipeline, with classifier-free guidance of 3 or without."""
    off = case.tiny.guidance_off
    arguments = case.family.sampling_arguments(case.pipe, case.request(GUIDANCE if guided else off))
    if guided and case.tiny.guided:
        arguments |= {"guidance_scale": off} | case.tiny.guided
    return arguments


def combination(tiny: Tiny) -> Callable[[Tensor, Tensor], Tensor]:
    """The pipeline's classifier-free guidance of 3 for one run; where it has none, the guidance was embedded."""
    combine = tiny.combine_of_run() if tiny.combine_of_run else tiny.combine
    if combine is None:
        return lambda positive, _: positive
    return lambda positive, negative: combine(positive, negative, GUIDANCE)


def flow_input(tiny: Tiny, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents and sigma of flow matching, of the latents and the time of the pipeline's scheduler."""
    if tiny.noise == "inverted":
        return latents, (1 - t).float()
    if tiny.noise == "unit":
        return latents, t.float()
    sigma = (t / 1000).float()
    return (latents / (1 + sigma), sigma / (1 + sigma)) if tiny.noise == "edm" else (latents, sigma)


def walk(case: Case, recording: Recording, *, guided: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """(our latents, the pipeline's) after every step of its schedule, ours made with the family's text and prediction alone.

    Latents that are shown stay out, as they do in training: what stands in them while sampling is each pipeline's own affair.
    """
    pipe, family = case.pipe, case.family
    to_grid = case.tiny.to_grid
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    args, kwargs = recording.set_timesteps
    scheduler.set_timesteps(*args, **kwargs)
    if case.tiny.noise == "edm":
        scheduler.sigmas = pipe.scheduler.sigmas  # of which the pipeline has changed the last
    prompts = [PROMPTS[0], case.tiny.negative] if guided else [PROMPTS[0]]
    embedded = GUIDANCE if guided and case.tiny.combine is None else case.tiny.embedded
    conditions = case.conditions(prompts, guidance=embedded, samples=[0] * len(prompts))
    assert recording.start is not None
    latents, guide = to_grid(pipe, recording.start), combination(case.tiny)
    cosine = family.facts.noise_schedule == "cosine"
    # Of a cosine, the last time is the one that the last step leads to, and its scheduler takes times of a batch.
    times = [t.view(1) for t in scheduler.timesteps[:-1]] if cosine else scheduler.timesteps
    for t, theirs, generator in zip(times, recording.after, recording.generators, strict=True):
        if family.facts.objective == "flow":
            model_input, time = flow_input(case.tiny, latents, t)
            level = float(t) / 1000 if case.tiny.noise == "flow" else float(time)
        else:
            model_input, time = scheduler.scale_model_input(latents, t), t if cosine else t.long()
            level = float(t) if cosine else float(t) / len(scheduler.alphas_cumprod)
        denoiser = case.denoiser_at(level)
        prediction = family.predict(
            denoiser, model_input.expand(len(prompts), *latents.shape[1:]), time.expand(len(prompts)), conditions
        )
        output = guide(prediction[:1], prediction[1:]) if guided else prediction
        if case.tiny.noise == "inverted":
            output = -output
        elif case.tiny.noise == "edm":  # its scheduler steps along (latents - clean) / sigma
            output = (latents - (model_input - time * output)) / (t / 1000)
        chance = {} if generator is None else {"generator": generator}
        latents = scheduler.step(output, t, latents, **chance, return_dict=False)[0]
        mask = family.loss_mask(latents, conditions)
        drawn = torch.ones_like(latents) if mask is None else mask
        yield latents * drawn, to_grid(pipe, theirs) * drawn
