"""Samples: pictures, clips and sounds drawn by the stock diffusers pipeline, so that others who load the result see the same."""

import io
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import nn

from atelier_api.run_file import RunFile
from atelier_api.sampler import ZERO_TERMINAL_SAMPLER, sampler_settings
from atelier_api.v1alpha1.adapter import TextualInversionAdapter
from atelier_api.v1alpha1.objective import Objective
from atelier_runtime import components
from atelier_runtime.adapters import at_strength, show_tokens
from atelier_runtime.data.sound import write_sound
from atelier_runtime.family import Family, SampleRequest
from atelier_runtime.few_steps import few_step_sampling
from atelier_runtime.parallel import Distributed, shards_weights
from atelier_runtime.prompt_pictures import PromptPictures, prompt_pictures
from atelier_runtime.store import Store
from atelier_runtime.tiles import work_on_tiles

log = logging.getLogger(__name__)


ENDINGS = {"image": "png", "video": "webp", "audio": "flac"}
"""Of the files that samples are kept in, by the family's modality."""


@dataclass(frozen=True)
class Sample:
    """One sample in the store. `key` is relative to the run's root."""

    step: int
    prompt: int
    key: str


def draw_samples(
    run_file: RunFile, family: Family, denoisers: dict[str, nn.Module], distributed: Distributed
) -> dict[int, bytes]:
    """Samples of this rank's share of the prompts, by prompt index: PNG, animated WebP for clips, FLAC for sounds.

    Collective where weights are sharded and every rank has to take part in every forward pass: there all ranks draw all prompts and
    rank 0 gives them. Otherwise prompts are dealt out over the ranks.
    """
    prompts = run_file.spec.validation.prompts
    if not prompts:
        return {}
    sharded = shards_weights(run_file.plan)
    mine = range(len(prompts)) if sharded else range(distributed.rank, len(prompts), distributed.world_size)
    if not mine:
        return {}
    dtype = torch.bfloat16 if run_file.spec.hyperparameters.precision == "bf16" else torch.float32
    pipe = components.load_pipeline(family, run_file.model_folder, dtype, distributed.device, denoisers=denoisers)
    if run_file.plan.tiled_samples:
        work_on_tiles(pipe, family)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = _sampler(pipe.scheduler, run_file.spec.objective)
    if isinstance(run_file.spec.adapter, TextualInversionAdapter):
        show_tokens(pipe, run_file.spec.adapter, family, denoisers)
    given = prompt_pictures(run_file, family)
    modes = {name: module.training for name, module in denoisers.items()}
    pictures = {}
    try:
        for module in denoisers.values():
            module.eval()
        for index in mine:
            strength = prompts[index].adapter_strength
            with (
                at_strength(denoisers.values(), 1.0 if strength is None else strength),
                torch.no_grad(),
                torch.autocast(distributed.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16),
            ):
                pictures[index] = _draw(pipe, family, run_file, index, given[index])
    finally:
        for name, module in denoisers.items():
            module.train(modes[name])
    return pictures if not sharded or distributed.rank == 0 else {}


def store_samples(store: Store, step: int, pictures: dict[int, bytes], modality: str) -> list[Sample]:
    """Write samples below `samples/<step>/`."""
    samples = []
    for index, data in sorted(pictures.items()):
        key = sample_key(step, index, modality)
        store.put_bytes(key, data)
        samples.append(Sample(step, index, key))
    return samples


def sample_key(step: int, prompt: int, modality: str) -> str:
    """Where the sample of a prompt lies, relative to the run's root."""
    return f"samples/{step:08d}/{prompt}.{ENDINGS[modality]}"


def _sampler(checkpoints: Any, objective: Objective) -> Any:
    """The checkpoint's sampler, or the one for what the run trains instead."""
    settings = sampler_settings(objective)
    if not settings:
        return checkpoints
    kind = components.class_named(ZERO_TERMINAL_SAMPLER) if objective.noise.zero_terminal_snr else type(checkpoints)
    return kind.from_config(checkpoints.config, **settings)


def _draw(pipe: Any, family: Family, run_file: RunFile, index: int, given: PromptPictures) -> bytes:
    validation, data, twin = run_file.spec.validation, run_file.spec.data, run_file.spec.objective.twin_flow
    prompt = validation.prompts[index]
    request = SampleRequest(
        prompt=prompt.text,
        negative=prompt.negative,
        width=validation.width or data.resolution,
        height=validation.height or data.resolution,
        frames=validation.frames or data.clip.frames,
        steps=validation.steps if twin is None else twin.sample_steps,
        guidance=validation.guidance if twin is None else family.facts.guidance_above,
        generator=torch.Generator("cpu").manual_seed(
            prompt.seed
        ),  # a CPU generator gives the same picture on any device
        pictures=given.frames,
        references=given.references,
        resolution=family.facts.reference_resolution(data.resolution),
        lyrics=prompt.lyrics or "",
        seconds=validation.seconds or data.audio.max_seconds,
        condition=given.condition,
        even_steps=twin is not None,
        condition_scale=1.0 if prompt.conditioning_scale is None else prompt.conditioning_scale,
    )
    denoiser = getattr(pipe, family.denoisers[0])
    sampling = nullcontext if twin is None else partial(few_step_sampling, pipe, denoiser)
    arguments = family.sampling_arguments(pipe, request)  # some ask what the checkpoint's own scheduler is
    if family.facts.modality == "audio":
        with sampling():
            [waveform] = pipe(**arguments, output_type="pt")[0]
        return write_sound(waveform, components.sample_rate(family, run_file.model_folder))
    with sampling():
        output = pipe(**arguments, output_type="pil")
    if family.facts.modality == "video":
        return _animated(output.frames[0], family.facts.frame_rate or 16.0)
    return _still(output[0][0])  # the first field: most pipelines call it `images`, some `image`


def _still(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _animated(frames: Sequence[Image.Image], frame_rate: float) -> bytes:
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        format="WEBP",
        save_all=True,
        append_images=list(frames[1:]),
        duration=round(1000 / frame_rate),
        loop=0,
        lossless=True,
    )
    return buffer.getvalue()
