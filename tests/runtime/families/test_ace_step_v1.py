"""ACE-Step v1: songs of their own length in music, caption and lyrics, what guidance contrasts with, and the published folders."""

import io
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from atelier_api.errors import ConfigError
from atelier_api.v1alpha1.objective import Objective
from atelier_runtime import adapters, components
from atelier_runtime.families import get_family
from atelier_runtime.family import Conditions, Song
from atelier_runtime.networks import ACEStepPipeline
from atelier_runtime.objectives import build_objective
from atelier_runtime.objectives.flow import FlowObjective
from atelier_runtime.objectives.timesteps import shift_sigma
from atelier_runtime.parallel import Distributed
from atelier_runtime.sampling import draw_samples
from export_runs import run_file
from family_cases import LYRICS, PROMPTS, Case, make_case
from family_models import PUBLISHED, save_tiny
from family_models.ace_step_v1 import SPECIAL, VOCODER
from family_models.published_parts import without_memory

FAMILY = get_family("ace_step_v1")
CPU = torch.device("cpu")
SECONDS = 10 * 4096 / 44_100


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("ace_step_v1")


def calls(case: Case, run: Any) -> list[dict[str, Tensor]]:
    """What the denoiser is told in each of its calls while `run` runs."""
    seen: list[dict[str, Tensor]] = []
    names = (
        "hidden_states",
        "timestep",
        "encoder_text_hidden_states",
        "speaker_embeds",
        "lyric_token_idx",
        "lyric_mask",
    )

    def hook(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append(dict(zip(names, args, strict=False)) | kwargs)

    handle = case.pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            run()
    finally:
        handle.remove()
    return seen


def predicted(case: Case, noisy: Tensor, conditions: Conditions) -> Tensor:
    return FAMILY.predict(case.pipe.transformer, noisy, torch.full((len(noisy),), 0.3), conditions)


@pytest.mark.parametrize("lyrics", [LYRICS, ""], ids=["sung", "instrumental"])
def test_each_song_is_told_as_the_pipeline_tells_it_and_a_dropped_one_as_what_it_contrasts_with(
    case: Case, lyrics: str
) -> None:
    arguments = {"prompt": PROMPTS[1], "lyrics": lyrics, "audio_duration": SECONDS, "num_inference_steps": 1}
    positive, negative = calls(case, lambda: case.pipe(**arguments, output_type="latent"))
    with torch.no_grad():
        features = FAMILY.encode_songs(case.pipe, [Song(PROMPTS[1], lyrics, SECONDS), None])
    conditions = replace(case.conditions(["a fox"] * 2), text=FAMILY.collate_text(features))
    ours = calls(case, lambda: predicted(case, torch.zeros(2, 32, 10), conditions))
    for mine, theirs in zip(ours, (positive, negative), strict=True):
        for name in ("encoder_text_hidden_states", "speaker_embeds", "lyric_token_idx", "lyric_mask"):
            assert torch.equal(mine[name], theirs[name]), name
    assert positive["lyric_mask"].all() == bool(lyrics)
    assert not negative["encoder_text_hidden_states"].any()
    assert (negative["encoder_text_hidden_states"].shape, negative["lyric_mask"].tolist()) == ((1, 1, 24), [[False]])


def test_a_prompt_alone_is_an_instrumental(case: Case) -> None:
    with torch.no_grad():
        [features] = FAMILY.encode_text(case.pipe, ["a fox"])
        [song] = FAMILY.encode_songs(case.pipe, [Song("a fox", "", 12.0)])
    assert features.keys() == song.keys()
    assert all(torch.equal(features[name], song[name]) for name in song)
    assert features["sung"].tolist() == [False]


def test_captions_are_cut_at_256_tokens_and_lyrics_at_4096(case: Case) -> None:
    with torch.no_grad():
        [features] = FAMILY.encode_songs(case.pipe, [Song("z" * 400, "z" * 5000, 1.0)])
    assert (len(features["embeds"]), len(features["lyrics"])) == (256, 4096)


@torch.no_grad()
def test_words_that_are_sung_change_the_prediction(case: Case) -> None:
    noisy = case.latents(1)
    songs = [Song("a fox", lyrics, SECONDS) for lyrics in ("la la", "la le", "")]
    flows = []
    for features in FAMILY.encode_songs(case.pipe, songs):
        told = replace(case.conditions(["a fox"]), text=FAMILY.collate_text([features]))
        flows.append(predicted(case, noisy, told))
    assert min(float((one - other).abs().max()) for one, other in itertools.pairwise(flows)) > 1e-5


def unequal(case: Case) -> tuple[Tensor, Tensor, Tensor, Conditions]:
    """(noisy, time, target, conditions) of two songs, of 10 and of 7 latents, in one bucket."""
    noisy, time, target = case.noised(case.latents(2), (0.3, 0.9))
    return noisy, time, target, replace(case.conditions(PROMPTS), lengths=torch.tensor([10, 7]))


@torch.no_grad()
def test_songs_of_unequal_length_are_what_they_are_alone_and_what_is_behind_them_does_not_count(case: Case) -> None:
    noisy, time, target, conditions = unequal(case)
    together = FAMILY.predict(case.pipe.transformer, noisy, time, conditions)
    losses = []
    for one, length in enumerate((10, 7)):
        sample = slice(one, one + 1)
        told = case.conditions([PROMPTS[one]])
        alone = FAMILY.predict(case.pipe.transformer, noisy[sample, :, :length], time[sample], told)
        torch.testing.assert_close(together[sample, :, :length], alone, atol=1e-5, rtol=1e-5)
        assert not together[one, :, length:].any()
        losses.append((alone - target[sample, :, :length]).square().mean())
    other = noisy.clone()
    other[1, :, 7:] = 7.0
    assert torch.equal(FAMILY.predict(case.pipe.transformer, other, time, conditions), together)
    mask = FAMILY.loss_mask(noisy, conditions)
    assert mask is not None
    objective = build_objective(Objective(), FAMILY.facts, case.pipe.scheduler.config)
    stage = FAMILY.stages({}, ["transformer"])[0]
    prepared = objective.prepare(case.latents(2), [torch.Generator(), torch.Generator()], stage=stage, tokens=10)
    loss = objective.loss(together, replace(prepared, target=target), mask)
    torch.testing.assert_close(loss, torch.stack(losses), atol=1e-5, rtol=1e-5)


def test_there_are_as_many_calls_as_samples_each_at_its_own_length_and_time_in_thousandths(case: Case) -> None:
    noisy, _, _, conditions = unequal(case)
    seen = calls(case, lambda: predicted(case, noisy, conditions))
    assert [call["hidden_states"].shape for call in seen] == [(1, 2, 16, 10), (1, 2, 16, 7)]
    assert torch.equal(seen[0]["timestep"], 1000 * torch.tensor([0.3]))
    equal = calls(case, lambda: predicted(case, noisy, replace(conditions, lengths=None)))
    assert [len(call["hidden_states"]) for call in equal] == [1, 1]


def test_noise_levels_are_shifted_as_at_the_maker_and_as_in_training(case: Case) -> None:
    scheduler = case.pipe.scheduler
    scheduler.set_timesteps(5)
    shifted = [3 * level / (1 + 2 * level) for level in (1.0, 0.001)]  # the ends of the training's levels
    even = [shifted[0] + (shifted[1] - shifted[0]) * step / 4 for step in range(5)]
    expected = [3 * level / (1 + 2 * level) for level in even]  # which the sampler shifts once more
    assert scheduler.sigmas.tolist() == pytest.approx([*expected, 0.0])
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * level for level in expected])
    objective = build_objective(Objective(), FAMILY.facts, scheduler.config)
    assert isinstance(objective, FlowObjective)
    assert shift_sigma(0.5, objective.shift.factor(10)) == pytest.approx(0.75)


def test_a_step_is_eulers_but_for_what_deviates_from_the_mean(case: Case) -> None:
    scheduler = case.pipe.scheduler
    scheduler.set_timesteps(5)
    generator = torch.Generator().manual_seed(0)
    flow, sample = (torch.randn(2, 2, 16, 3, generator=generator) + shift for shift in (2.0, 0.0))
    moved = scheduler.step(flow, scheduler.timesteps[0], sample, return_dict=False)[0]
    further = 0.9 + (1.1 - 0.9) / (1 + math.exp(-0.1 * 10.0))
    for one in range(2):
        change = (scheduler.sigmas[1] - scheduler.sigmas[0]) * flow[one]
        expected = sample[one] + (change - change.mean()) * further + change.mean()
        torch.testing.assert_close(moved[one], expected, atol=1e-5, rtol=1e-5)


def test_layers_that_are_never_called_are_no_targets(case: Case) -> None:
    denoiser = make_case("ace_step_v1").pipe.transformer
    dead = FAMILY.dead_modules(denoiser)
    assert len(dead) == 2 * 4 + 2 * 3
    assert not set(dead) & set(adapters.resolve_targets(denoiser, ["all"], FAMILY))


def test_lyrics_that_the_model_cannot_be_told_are_refused(case: Case) -> None:
    match = "the lyrics have the line 'さくら' in Japanese.*spec.validation.prompts"
    with pytest.raises(ConfigError, match=match):
        FAMILY.encode_songs(case.pipe, [Song("a fox", "la\nさくら", 1.0)])
    with pytest.raises(ConfigError, match=match):
        FAMILY.sampling_arguments(case.pipe, replace(case.request(None), lyrics="さくら"))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"audio_duration": 0.05}, "audio_duration is 0.05 seconds; it must be at least 0.093"),
        ({"output_type": "pil"}, "output_type is 'pil'; allowed are pt, np, latent"),
    ],
    ids=["too short", "unknown output"],
)
def test_what_the_pipeline_cannot_make_is_refused(case: Case, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        case.pipe("a fox", **arguments)


def test_the_pipeline_gives_arrays_and_named_fields(case: Case) -> None:
    arguments = {"audio_duration": 0.2, "num_inference_steps": 1, "guidance_scale": 1.0}
    waveforms = case.pipe("a fox", **arguments, generator=torch.Generator().manual_seed(0)).audios
    again = case.pipe("a fox", **arguments, generator=torch.Generator().manual_seed(0), output_type="np").audios
    assert waveforms.shape == (1, 2, 2 * 4096)
    assert (again == waveforms.numpy()).all()


def test_a_run_draws_its_prompts_as_sounds_of_whole_latents(tmp_path: Path) -> None:
    save_tiny("ace_step_v1", tmp_path)
    denoisers = make_case("ace_step_v1").denoisers
    drawn = []
    for lyrics in ("la la", None):
        validation = {"prompts": [{"text": "a fox", "lyrics": lyrics}], "steps": 1, "seconds": 1}
        data = {"sources": [{"uri": "sounds"}]}
        file = run_file("ace_step_v1", tmp_path, {"type": "lora"}, validation=validation, data=data)
        [sound] = draw_samples(file, FAMILY, denoisers, Distributed(0, 0, 1, CPU)).values()
        with av.open(io.BytesIO(sound)) as container:
            stream = container.streams.audio[0]
            assert (stream.rate, stream.channels, container.format.name) == (44_100, 2, "flac")
            assert sum(frame.samples for frame in container.decode(stream)) == 10 * 4096
        drawn.append(sound)
    assert drawn[0] != drawn[1]  # what is sung is heard


def test_the_published_folders_become_a_checkpoint(case: Case, tmp_path: Path) -> None:
    published, pipe = tmp_path / "published", case.pipe
    pipe.transformer.save_pretrained(published / "ace_step_transformer")
    pipe.vae.dcae.save_pretrained(published / "music_dcae_f8c8")
    pipe.vae.vocoder.save_pretrained(published / "music_vocoder")
    of_the_maker = {"n_mels": 128, "num_mels": 512, "win_length": 2048, "use_template": False, "drop_path_rate": 0.0}
    path = published / "music_vocoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | of_the_maker))
    pipe.text_encoder.save_pretrained(published / "umt5-base")
    pipe.tokenizer.save_pretrained(published / "umt5-base")
    pipe.lyric_tokenizer.backend_tokenizer.save(str(tmp_path / "vocab.json"))

    made = ACEStepPipeline.from_published(published, tmp_path / "vocab.json", dtype=torch.float32)
    made.save_pretrained(tmp_path / "checkpoint")
    loaded = ACEStepPipeline.from_pretrained(tmp_path / "checkpoint")
    arguments = {"prompt": "a fox", "lyrics": LYRICS, "audio_duration": SECONDS, "num_inference_steps": 2}
    sounds = []
    for each in (pipe, made, loaded):
        each.set_progress_bar_config(disable=True)
        sounds.append(each(**arguments, generator=torch.Generator().manual_seed(0)).audios)
    # Weights that are read from a file lie otherwise in memory, and products of the same numbers then differ in the last digit.
    for each in sounds[1:]:
        torch.testing.assert_close(each, sounds[0], rtol=0, atol=1e-5)
    assert sounds[0].std() > 1e-3
    assert components.sample_rate(FAMILY, tmp_path / "checkpoint") == FAMILY.facts.sample_rate == pipe.sample_rate


def test_a_checkpoint_loads_whatever_library_its_index_names(case: Case, tmp_path: Path) -> None:
    save_tiny("ace_step_v1", tmp_path)
    path = tmp_path / "model_index.json"
    index = json.loads(path.read_text())
    for name in ("transformer", "vae", "scheduler"):
        index[name][0] = "acestep"
    path.write_text(json.dumps(index))
    loaded = ACEStepPipeline.from_pretrained(tmp_path, transformer=case.pipe.transformer, dtype=torch.bfloat16)
    assert isinstance(loaded, DiffusionPipeline)
    assert loaded.transformer is case.pipe.transformer
    assert (loaded.text_encoder.dtype, loaded.vae.dtype) == (torch.bfloat16, torch.float32)
    assert loaded.scheduler.config.shift == 3.0
    tokens, _ = loaded.encode_lyrics(LYRICS)
    assert torch.equal(tokens, case.pipe.encode_lyrics(LYRICS)[0])


def test_the_published_autoencoder_is_what_the_facts_say() -> None:
    vae: Any = without_memory(PUBLISHED["ace_step_v1"].autoencoder)
    facts = FAMILY.facts
    assert (vae.config.sampling_rate, vae.samples_per_latent) == (facts.sample_rate, facts.latent_factor)
    rows = vae.vocoder.config.input_channels // vae.dcae.spatial_compression_ratio
    assert vae.dcae.config.latent_channels * rows == facts.latent_channels


def test_the_tiny_parts_have_the_published_spectrogram() -> None:
    """So that what the tests say of waveforms and latents holds for the published sizes, too."""
    assert not {"n_fft", "hop_length", "f_min", "f_max", "input_channels", "sampling_rate"} & set(VOCODER)
    assert {"[START]", "[SPACE]", "[en]", "[zh-cn]"} < set(SPECIAL)
