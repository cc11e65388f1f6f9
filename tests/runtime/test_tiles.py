"""Autoencoders that work on tiles: real ones at tiny width, on samples that are larger than their real tiles."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder
from PIL import Image
from torch import Tensor, nn

from atelier_api.families import FAMILIES
from atelier_api.families.facts import Passage, Passages
from atelier_api.v1alpha1.validation import Validation, ValidationPrompt
from atelier_runtime.families import get_family
from atelier_runtime.parallel import Distributed
from atelier_runtime.sampling import draw_samples
from atelier_runtime.tiles import work_on_tiles
from family_cases import make_case
from family_models import PUBLISHED, save_tiny, tiny_pipeline
from family_models.published_parts import without_memory
from tiny_data import training_run_file

FRAMES = {"sdxl": 0, "flux2": 0, "sana": 0, "qwen_image": 1, "wan": 5, "wan_ti2v": 5}
FRAMES |= {"kandinsky5_video": 1, "hunyuan_video15": 1, "ltx": 1}
"""Of the samples here, by family: one for each class of autoencoder, and both shapes of Wan's. 0: it takes pictures."""

HEIGHT = 64

UNSEAMED = 0.75
"""The part of the first tile that no other reaches into, or somewhat less."""


@cache
def tiny(family: str) -> Any:
    return tiny_pipeline(family)


@pytest.fixture
def pipe(family: str) -> Any:
    """The tiny pipeline, on whole samples again afterwards."""
    yield tiny(family)
    tiny(family).vae.disable_tiling()


def strip(family: str, width: int) -> Tensor:
    """A low picture or clip that is unlike everywhere, [1, 3, H, W] or [1, 3, F, H, W] in [-1, 1]: it is cut in one direction."""
    frames = (FRAMES[family],) if FRAMES[family] else ()
    coarse = torch.randn(1, 3, *frames, HEIGHT // 16, width // 16, generator=torch.Generator().manual_seed(0))
    return coarse.repeat_interleave(16, -1).repeat_interleave(16, -2).clamp(-1, 1)


def encoded(vae: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        made = vae.encode(pixels)
    return made.latent if hasattr(made, "latent") else made.latent_dist.mode()


def decoded(vae: Any, latents: Tensor) -> Tensor:
    with torch.no_grad():
        return vae.decode(latents).sample


def watched(module: nn.Module, call: Callable[[], Tensor]) -> tuple[Tensor, list[int]]:
    """What the call gives, and the widths of what `module` was given in it, in order."""
    seen: list[int] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    try:
        return call(), seen
    finally:
        handle.remove()


@pytest.mark.parametrize("family", FRAMES)
def test_a_sample_that_is_no_larger_than_a_tile_stays_as_it_was_to_the_bit(family: str, pipe: Any) -> None:
    edge = FAMILIES[family].passages.largest_whole
    pixels = strip(family, edge)
    latents = encoded(pipe.vae, pixels)
    picture = decoded(pipe.vae, latents)
    work_on_tiles(pipe, get_family(family))
    assert torch.equal(encoded(pipe.vae, pixels), latents)
    assert torch.equal(decoded(pipe.vae, latents), picture)


@pytest.mark.parametrize("family", FRAMES)
def test_a_larger_sample_is_encoded_tile_by_tile_and_is_inside_them_what_they_are_alone(family: str, pipe: Any) -> None:
    tile = FAMILIES[family].passages.encoding.tile
    pixels = strip(family, tile * 5 // 4)
    alone = encoded(pipe.vae, pixels[..., :tile])
    whole, full = watched(pipe.vae.encoder, lambda: encoded(pipe.vae, pixels))
    work_on_tiles(pipe, get_family(family))
    tiled, cut = watched(pipe.vae.encoder, lambda: encoded(pipe.vae, pixels))
    assert {width * 5 / 4 for width in cut if width == max(cut)} == set(full)
    assert len(cut) == 2 * len(full)
    assert tiled.shape == whole.shape
    assert not torch.allclose(tiled, whole, atol=1e-4)  # which is why they are cached apart
    inside = int(alone.shape[-1] * UNSEAMED)
    torch.testing.assert_close(tiled[..., :inside], alone[..., :inside], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FRAMES)
def test_a_larger_sample_is_decoded_tile_by_tile_and_is_inside_them_what_they_are_alone(family: str, pipe: Any) -> None:
    tile = FAMILIES[family].passages.decoding.tile
    latents = encoded(pipe.vae, strip(family, tile * 5 // 4))
    alone = decoded(pipe.vae, latents[..., : latents.shape[-1] * 4 // 5])
    whole, full = watched(pipe.vae.decoder, lambda: decoded(pipe.vae, latents))
    work_on_tiles(pipe, get_family(family))
    tiled, cut = watched(pipe.vae.decoder, lambda: decoded(pipe.vae, latents))
    assert (set(full), max(cut)) == ({latents.shape[-1]}, latents.shape[-1] * 4 // 5)
    assert len(cut) == 2 * len(full)
    assert tiled.shape == whole.shape
    inside = int(alone.shape[-1] * UNSEAMED)
    torch.testing.assert_close(tiled[..., :inside].clamp(-1, 1), alone[..., :inside].clamp(-1, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["sdxl", "wan"])
def test_between_two_tiles_there_is_no_seam_but_a_blend_of_both(family: str, pipe: Any) -> None:
    passage = FAMILIES[family].passages.encoding
    start, pixels = passage.tile * 3 // 4, strip(family, passage.tile * 5 // 4)
    left, right = encoded(pipe.vae, pixels[..., : passage.tile]), encoded(pipe.vae, pixels[..., start:])
    work_on_tiles(pipe, get_family(family))
    tiled = encoded(pipe.vae, pixels)
    first = left.shape[-1] * 3 // 4
    shared = left.shape[-1] - first
    part = torch.arange(shared) / shared
    blend = left[..., first:] * (1 - part) + right[..., :shared] * part
    torch.testing.assert_close(tiled[..., first : first + shared], blend, rtol=0, atol=1e-5)
    torch.testing.assert_close(tiled[..., first + shared :], right[..., shared:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("facts", FAMILIES.values(), ids=lambda facts: facts.name)
def test_tiles_of_the_published_autoencoder_are_those_of_the_facts(facts: Any) -> None:
    vae: Any = without_memory(PUBLISHED[facts.name].autoencoder)
    pipe = type("Pipe", (), {"vae": vae})()
    if facts.passages.untiled:
        assert (facts.passages.encoding.tile, facts.passages.decoding.tile) == (0, 0)
        assert not hasattr(vae, "use_tiling")
        with pytest.raises(ValueError, match="was not refused"):
            work_on_tiles(pipe, get_family(facts.name))
        return
    work_on_tiles(pipe, get_family(facts.name))
    assert vae.use_tiling
    if facts.modality == "audio":
        sizes = (vae.tile_sample_min_length, vae.tile_latent_min_length * facts.latent_factor)
    elif hasattr(vae, "tile_sample_min_size"):
        sizes = (vae.tile_sample_min_size, vae.tile_latent_min_size * 2 ** (len(vae.config.block_out_channels) - 1))
    else:
        # Wan 2.2's takes pixels apart by twos before it cuts, and puts them together behind the seams.
        folded = vae.config.get("patch_size") if "base_dim" in vae.config else None
        assert vae.tile_sample_min_width == vae.tile_sample_min_height
        sizes = (vae.tile_sample_min_width * (folded or 1), vae.tile_sample_min_width)
    assert sizes == (facts.passages.encoding.tile, facts.passages.decoding.tile)


def test_sounds_are_cut_in_time_and_each_tile_hears_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    facts, latent = FAMILIES["ace_step"], 1920
    short = Passages(Passage(643, tile=30 * latent), Passage(643, tile=32 * latent))
    monkeypatch.setitem(FAMILIES, "ace_step", replace(facts, passages=short))
    pipe: Any = tiny_pipeline("ace_step")
    vae = pipe.vae
    waveform = torch.randn(1, 2, 45 * latent, generator=torch.Generator().manual_seed(0)) * 0.1
    whole, once = encoded(vae, waveform), encoded(vae, waveform[..., : 30 * latent])
    alone = encoded(vae, waveform[..., : 28 * latent])
    work_on_tiles(pipe, get_family("ace_step"))
    assert torch.equal(encoded(vae, waveform[..., : 30 * latent]), once)
    tiled, cut = watched(vae.encoder, lambda: encoded(vae, waveform))
    assert cut == [28 * latent, 21 * latent]  # 26 latents each, and two more of either neighbour
    assert tiled.shape == whole.shape
    torch.testing.assert_close(tiled[..., :26], alone[..., :26], rtol=0, atol=1e-5)
    vae.tile_latent_min_length, vae.tile_latent_overlap = 32, 4
    assert watched(vae.decoder, lambda: decoded(vae, tiled))[1] == [28, 25]


def test_samples_are_drawn_in_tiles_where_the_plan_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    decode = Decoder.forward

    def watching(self: Decoder, latents: Tensor, *others: Any) -> Tensor:
        widths.append(latents.shape[-1])
        return decode(self, latents, *others)

    monkeypatch.setattr(Decoder, "forward", watching)
    file = training_run_file(tmp_path, [tmp_path], save_tiny("sdxl", tmp_path / "base"), "sdxl")
    validation = Validation(prompts=[ValidationPrompt(text="a fox")], width=576, height=32, steps=1)
    file = file.model_copy(update={"spec": file.spec.model_copy(update={"validation": validation})})
    case, here = make_case("sdxl"), Distributed(0, 0, 1, torch.device("cpu"))
    drawn = {}
    for tiled, expected in ((False, [72]), (True, [64, 24])):
        plan = file.plan.model_copy(update={"tiled_samples": tiled})
        data = draw_samples(file.model_copy(update={"plan": plan}), get_family("sdxl"), case.denoisers, here)
        drawn[tiled] = Image.open(BytesIO(data[0]))
        assert widths == expected
        widths.clear()
    assert drawn[True].size == drawn[False].size == (576, 32)
    assert drawn[True].tobytes() != drawn[False].tobytes()
