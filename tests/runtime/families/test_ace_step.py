"""ACE-Step 1.5: songs of their own length in text and music without a mask, silence beside the noise, and what is refused."""

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from diffusers import AceStepPipeline
from torch import Tensor

from atelier_api.errors import ConfigError
from atelier_api.model_files import lora_loading
from atelier_api.v1alpha1.objective import Objective
from atelier_runtime import components
from atelier_runtime.checkpoint.export import export_lora
from atelier_runtime.families import get_family
from atelier_runtime.family import Conditions, Song
from atelier_runtime.objectives import build_objective
from atelier_runtime.objectives.flow import FlowObjective
from atelier_runtime.objectives.timesteps import shift_sigma
from atelier_runtime.parallel import Distributed
from atelier_runtime.sampling import draw_samples
from export_runs import PROVENANCE, run_file, trained
from family_cases import LYRICS, PROMPTS, Case, make_case
from family_models import PUBLISHED, save_tiny
from family_models.ace_step import tiny
from family_models.published_parts import without_memory

FAMILY = get_family("ace_step")


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("ace_step")


def told(case: Case, **arguments: Any) -> dict[str, Any]:
    """What the pipeline tells its network of a piece, in the last of its steps."""
    seen: dict[str, Any] = {}
    handle = case.pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    case.pipe(num_inference_steps=1, output_type="latent", **arguments)
    handle.remove()
    return seen


def calls(case: Case, noisy: Tensor, conditions: Conditions, denoiser: torch.nn.Module | None = None) -> list[Any]:
    """Arguments of each call of the denoiser in one prediction."""
    seen: list[dict[str, Any]] = []
    model = denoiser or case.pipe.transformer
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        FAMILY.predict(model, noisy, torch.full((len(noisy),), 0.3), conditions)
    handle.remove()
    return seen


@torch.no_grad()
def test_each_song_is_told_as_the_pipeline_tells_it_alone_whatever_side_it_pads(case: Case) -> None:
    """The published tokenizer pads on the left, and the text encoder sees no mask."""
    songs = [Song(PROMPTS[0], "", 1.0), Song(PROMPTS[1], LYRICS, 12.7)]
    features = FAMILY.encode_songs(case.pipe, songs)
    assert len({len(item["embeds"]) for item in features}) == 2
    for song, item in zip(songs, features, strict=True):
        arguments = {"prompt": song.caption, "lyrics": song.lyrics, "audio_duration": song.seconds}
        theirs = told(case, guidance_scale=1.0, **arguments)["encoder_hidden_states"]
        torch.testing.assert_close(item["embeds"], theirs[0], atol=1e-6, rtol=1e-6)
        assert item["mask"].all()


@torch.no_grad()
def test_a_prompt_alone_is_an_instrumental_of_a_minute_as_for_the_pipeline(case: Case) -> None:
    [features] = FAMILY.encode_text(case.pipe, ["a fox"])
    theirs = told(case, prompt="a fox", guidance_scale=1.0)["encoder_hidden_states"]
    torch.testing.assert_close(features["embeds"], theirs[0], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_the_text_tells_whole_seconds_and_the_words_that_are_sung(case: Case) -> None:
    song = Song("a fox", "", 60.0)
    songs = [song, replace(song, seconds=60.9), replace(song, seconds=61.0), replace(song, lyrics="la la la")]
    same, also, longer, sung = (item["embeds"] for item in FAMILY.encode_songs(case.pipe, songs))
    assert torch.equal(same, also)
    assert same.shape == longer.shape
    assert not torch.equal(same, longer)
    assert len(sung) > len(same)


@torch.no_grad()
def test_lyrics_are_cut_at_2048_tokens_and_captions_at_256(case: Case) -> None:
    [features] = FAMILY.encode_songs(case.pipe, [Song("z" * 400, "z" * 3000, 1.0)])
    assert len(features["embeds"]) == 2048 + 1 + 256


@torch.no_grad()
def test_a_dropped_caption_is_the_learnt_vector_and_not_an_empty_prompt(case: Case) -> None:
    dropped, empty = FAMILY.encode_songs(case.pipe, [None, Song("", "", 1.0)])
    assert torch.equal(dropped["embeds"], case.pipe.condition_encoder.null_condition_emb[0])
    assert len(empty["embeds"]) > 1
    guided = told(case, prompt="a fox", audio_duration=1.0, guidance_scale=3.0)["encoder_hidden_states"]
    assert torch.equal(guided[1], dropped["embeds"].expand_as(guided[1]))


def unequal(case: Case) -> tuple[Tensor, Tensor, Tensor, Conditions]:
    """(noisy, time, target, conditions) of two songs, of 25 and of 14 latents, in one bucket."""
    noisy, time, target = case.noised(case.latents(2), (0.3, 0.9))
    return noisy, time, target, replace(case.conditions(PROMPTS), lengths=torch.tensor([25, 14]))


@torch.no_grad()
def test_songs_of_unequal_length_are_what_they_are_alone_and_what_is_behind_them_does_not_count(case: Case) -> None:
    noisy, time, target, conditions = unequal(case)
    together = FAMILY.predict(case.pipe.transformer, noisy, time, conditions)
    assert together.shape == noisy.shape
    losses = []
    for one, length in enumerate((25, 14)):
        alone = FAMILY.predict(
            case.pipe.transformer,
            noisy[one : one + 1, :, :length],
            time[one : one + 1],
            case.conditions([PROMPTS[one]]),
        )
        torch.testing.assert_close(together[one : one + 1, :, :length], alone, atol=1e-5, rtol=1e-5)
        assert not together[one, :, length:].any()
        losses.append((alone - target[one : one + 1, :, :length]).square().mean())
    other = noisy.clone()
    other[1, :, 14:] = 7.0
    assert torch.equal(FAMILY.predict(case.pipe.transformer, other, time, conditions), together)

    # The loss of a song is the mean over its own latents, whatever its bucket.
    objective = build_objective(Objective(), FAMILY.facts, case.pipe.scheduler.config)
    prepared = objective.prepare(
        case.latents(2), [torch.Generator(), torch.Generator()], stage=FAMILY.stages({}, ["transformer"])[0], tokens=13
    )
    mask = FAMILY.loss_mask(noisy, conditions)
    assert mask is not None
    assert mask.shape == (2, 1, 25)
    loss = objective.loss(together, replace(prepared, target=target), mask)
    torch.testing.assert_close(loss, torch.stack(losses), atol=1e-5, rtol=1e-5)


def test_gradients_of_what_is_behind_a_song_are_zero(case: Case) -> None:
    noisy, time, _, conditions = unequal(case)
    noisy = noisy.requires_grad_()
    FAMILY.predict(case.pipe.transformer, noisy, time, conditions).square().sum().backward()  # type: ignore[no-untyped-call]
    assert noisy.grad is not None
    assert not noisy.grad[1, :, 14:].any()
    assert noisy.grad[1, :, :14].abs().amin() > 0


def test_there_are_as_many_calls_as_samples_whatever_the_lengths(case: Case) -> None:
    """Under sharding every call gathers weights from all ranks, and another rank may have songs of other lengths."""
    noisy, _, _, conditions = unequal(case)
    for given in (conditions, replace(conditions, lengths=torch.tensor([25, 25])), case.conditions(["a fox"] * 2)):
        assert [len(call["hidden_states"]) for call in calls(case, noisy, given)] == [1, 1]


@torch.no_grad()
def test_silence_and_ones_stand_beside_the_noise_and_silence_is_repeated_where_it_ends(case: Case) -> None:
    conditions = case.conditions(["a fox"])
    for stored in (15_000, 3):
        silence = case.pipe.condition_encoder.silence_latent[:, :stored]
        given = replace(conditions, shared={"silence": silence[0]})
        [call] = calls(case, case.latents(1), given)
        kept = case.pipe.condition_encoder.silence_latent
        try:
            case.pipe.condition_encoder.silence_latent = silence
            source, _ = case.pipe.prepare_src_latents(torch.device("cpu"), torch.float32, latent_length=25)
        finally:
            case.pipe.condition_encoder.silence_latent = kept
        assert torch.equal(call["context_latents"], torch.cat([source, torch.ones_like(source)], dim=-1))


def test_time_is_sigma_twice_in_the_precision_of_the_weights(case: Case) -> None:
    noisy, conditions = case.latents(1), case.conditions(["a fox"])
    [call] = calls(case, noisy, conditions)
    assert torch.equal(call["timestep"], torch.tensor([0.3]))
    half = make_case("ace_step").pipe.transformer.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        [call] = calls(case, noisy, conditions, half)
    assert torch.equal(call["timestep"], torch.tensor([0.3], dtype=torch.bfloat16))
    assert torch.equal(call["timestep"], call["timestep_r"])


def test_training_draws_with_the_shift_of_the_pipeline_and_not_with_that_of_its_scheduler(case: Case) -> None:
    assert case.pipe.scheduler.config.shift == 1.0
    objective = build_objective(Objective(), FAMILY.facts, case.pipe.scheduler.config)
    assert isinstance(objective, FlowObjective)
    k = objective.shift.factor(750)
    levels = case.pipe._get_timestep_schedule(num_inference_steps=4, device=torch.device("cpu"), dtype=torch.float32)
    assert levels.tolist() == pytest.approx([shift_sigma(level, k) for level in (1.0, 0.75, 0.5, 0.25)])


def test_a_checkpoint_that_is_distilled_on_guidance_takes_none(case: Case) -> None:
    turbo = tiny(is_turbo=True)
    request = case.request(7.0)
    assert FAMILY.sampling_arguments(case.pipe, request)["guidance_scale"] == 7.0
    with pytest.raises(
        ConfigError, match=r"spec\.validation\.guidance is 7, .* is distilled on guidance .*; remove it"
    ):
        FAMILY.sampling_arguments(turbo, request)
    assert "guidance_scale" not in FAMILY.sampling_arguments(turbo, replace(request, guidance=None))


def test_a_run_draws_its_prompts_as_sounds_of_their_length(tmp_path: Path) -> None:
    save_tiny("ace_step", tmp_path)
    denoisers = make_case("ace_step").denoisers
    rank = Distributed(0, 0, 1, torch.device("cpu"))
    drawn = []
    for lyrics in ("la la", None):
        validation = {"prompts": [{"text": "a fox", "lyrics": lyrics}], "steps": 1, "seconds": 1}
        file = run_file("ace_step", tmp_path, {"type": "lora"}, validation=validation, data=DATA)
        [data] = draw_samples(file, FAMILY, denoisers, rank).values()
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.audio[0]
            assert (stream.rate, stream.channels, container.format.name) == (48_000, 2, "flac")
            assert sum(frame.samples for frame in container.decode(stream)) == 48_000
        drawn.append(data)
    assert drawn[0] != drawn[1]  # what is sung is heard


DATA = {"sources": [{"uri": "sounds"}], "captions": {"trigger": "sks fox"}}


@torch.no_grad()
def test_a_lora_that_the_stock_pipeline_loads_sounds_as_in_training(case: Case, tmp_path: Path) -> None:
    result = trained("ace_step", tmp_path, {"type": "lora", "rank": 4, "alpha": 9, "targets": ["all"]})
    [file] = export_lora(result.weights, result.file, FAMILY, tmp_path / "exports", provenance=PROVENANCE)
    stock = AceStepPipeline.from_pretrained(result.base)

    def played(pipe: Any) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        latents: Tensor = pipe(**FAMILY.sampling_arguments(pipe, case.request(3.0)), output_type="latent").audios
        return latents

    ours = components.load_pipeline(FAMILY, result.base, torch.float32, torch.device("cpu"), denoisers=result.denoisers)
    before = played(stock)
    exec("\n".join(lora_loading(FAMILY.facts, str(file.path.parent), file.path.name)), {"pipe": stock})
    torch.testing.assert_close(played(stock), played(ours), atol=1e-5, rtol=1e-5)
    assert (played(stock) - before).abs().max() > 1e-3


def test_the_published_autoencoder_is_what_the_facts_say() -> None:
    config = without_memory(PUBLISHED["ace_step"].autoencoder).config
    facts = FAMILY.facts
    assert (config.sampling_rate, config.decoder_input_channels) == (facts.sample_rate, facts.latent_channels)
    assert math.prod(config.downsampling_ratios) == facts.latent_factor


def test_encoders_are_loaded_without_the_tokenizer_of_another_task(tmp_path: Path) -> None:
    save_tiny("ace_step", tmp_path)
    pipe = components.load_encoders(FAMILY, tmp_path, torch.float32, torch.device("cpu"))
    assert pipe.transformer is None
    assert pipe.audio_tokenizer is None
    assert pipe.condition_encoder.silence_latent.any()
