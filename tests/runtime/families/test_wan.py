"""Wan against the stock pipeline, its two experts, the frames that it is shown, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from atelier_api.errors import ConfigError
from atelier_api.run_file import RunFile
from atelier_api.v1alpha1.validation import Validation, ValidationPrompt
from atelier_runtime.data import MicroBatch, build_dataset
from atelier_runtime.families import get_family
from atelier_runtime.family import Conditions, Stage
from atelier_runtime.parallel import Distributed
from atelier_runtime.prompt_pictures import prompt_pictures
from atelier_runtime.sampling import draw_samples
from family_cases import make_case
from family_models import save_tiny, tiny_pipeline
from tiny_data import OneRank, all_samples, grey_frames, no_report, picture, training_run_file, write_clip

FAMILY = get_family("wan")
SIZES = torch.tensor([[32, 32, 0, 0, 32, 32]])


@pytest.fixture(scope="module", params=["wan", "wan22"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return tiny_pipeline(request.param)


def conditions(pipe: Any, *prompts: str) -> Conditions:
    return Conditions(FAMILY.collate_text(FAMILY.encode_text(pipe, prompts)), SIZES.repeat(len(prompts), 1))


@torch.no_grad()
def test_a_prediction_of_the_stage_is_what_the_stock_pipeline_gives_its_scheduler(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    original = pipe.scheduler.step

    def record(output: torch.Tensor, t: torch.Tensor, sample: torch.Tensor, **kwargs: Any) -> Any:
        steps.append((output, t, sample))
        return original(output, t, sample, **kwargs)

    monkeypatch.setattr(pipe.scheduler, "step", record)
    generator = torch.Generator().manual_seed(3)
    pipe(
        "a fox",
        height=32,
        width=48,
        num_frames=5,
        num_inference_steps=5,
        guidance_scale=1,
        generator=generator,
        output_type="latent",
    )

    present = [name for name in FAMILY.denoisers if getattr(pipe, name) is not None]
    stages = FAMILY.stages(dict(pipe.config), present)
    used = set()
    for output, t, sample in steps:
        sigma = t.item() / 1000
        # The pipeline gives the boundary itself to the first expert; above it stages are disjoint.
        stage = next(stage for stage in stages if stage.low <= sigma <= stage.high)
        used.add(stage.denoiser)
        prediction = FAMILY.predict(
            getattr(pipe, stage.denoiser), sample, t.expand(1) / 1000, conditions(pipe, "a fox")
        )
        torch.testing.assert_close(prediction, output, atol=1e-5, rtol=1e-5)
    assert len(steps) == 5
    assert used == set(present)


@torch.no_grad()
def test_text_is_stored_short_and_collated_to_the_512_tokens_of_the_pipeline(pipe: Any) -> None:
    prompts = ["a", "a fox in fog", ""]
    expected, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)
    features = FAMILY.encode_text(pipe, prompts)
    assert len({len(item["embeds"]) for item in features}) == 3
    assert all(len(item["embeds"]) < 512 for item in features)
    assert torch.equal(FAMILY.collate_text(features)["embeds"], expected)


@torch.no_grad()
def test_latents_of_a_clip_decode_as_the_pipeline_decodes(pipe: Any) -> None:
    pixels = torch.rand(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = FAMILY.encode_pixels(pipe, pixels)
    assert latents.mean.shape == (1, 16, 2, 2, 2)
    assert latents.std is None
    mean = torch.tensor(pipe.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(pipe.vae.config.latents_std).view(1, -1, 1, 1, 1)
    torch.testing.assert_close(latents.mean * std + mean, pipe.vae.encode(pixels).latent_dist.mean)


def test_every_parameter_gets_a_gradient(pipe: Any) -> None:
    transformer = tiny_pipeline("wan").transformer
    noisy = torch.randn(2, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    FAMILY.predict(
        transformer, noisy, torch.tensor([0.2, 0.9]), conditions(pipe, "a", "longer")
    ).square().sum().backward()
    assert [name for name, p in transformer.named_parameters() if p.grad is None] == []


def test_the_first_expert_trains_high_noise_and_the_second_low_noise() -> None:
    stages = FAMILY.stages({"boundary_ratio": 0.875}, ("transformer", "transformer_2"))
    assert stages == (Stage("transformer", 0.875, 1.0), Stage("transformer_2", 0.0, 0.875))


def test_one_expert_trains_the_whole_range() -> None:
    assert FAMILY.stages({"boundary_ratio": None}, ("transformer",)) == (Stage("transformer", 0.0, 1.0),)


@pytest.mark.parametrize(
    ("config", "denoisers", "expected"),
    [
        ({"expand_timesteps": True}, ("transformer",), "expand_timesteps"),
        ({"boundary_ratio": None}, ("transformer", "transformer_2"), "boundary_ratio"),
    ],
    ids=["time per token", "experts without boundary"],
)
def test_what_cannot_be_trained_is_refused(config: dict[str, Any], denoisers: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        FAMILY.stages(config, denoisers)


def test_a_denoiser_with_conditioning_channels_is_refused_before_it_runs(pipe: Any) -> None:
    with pytest.raises(ConfigError, match="16 input channels and a pipeline of 36"):
        FAMILY.predict(pipe.transformer, torch.zeros(1, 36, 1, 4, 4), torch.ones(1), conditions(pipe, "a"))


@pytest.mark.parametrize(
    ("config", "denoiser", "expected"),
    [
        ({"_class_name": "WanPipeline"}, {"in_channels": 16}, ()),
        ({"_class_name": "WanImageToVideoPipeline"}, {"image_dim": 1280, "pos_embed_seq_len": None}, ("first",)),
        ({"_class_name": "WanImageToVideoPipeline"}, {"pos_embed_seq_len": 514}, ("first", "last")),
        ({"_class_name": "WanImageToVideoPipeline", "boundary_ratio": 0.9}, {"image_dim": None}, ("first",)),
    ],
    ids=["T2V", "I2V 2.1", "FLF2V", "I2V 2.2"],
)
def test_the_configs_tell_which_frames_are_shown(
    config: dict[str, Any], denoiser: dict[str, Any], expected: tuple[str, ...]
) -> None:
    assert FAMILY.given_frames(config, denoiser) == expected
    assert FAMILY.pipeline_of(config) == config["_class_name"]


@pytest.mark.parametrize("name", ["wan_i2v", "wan_flf2v", "wan22_i2v"])
@torch.no_grad()
def test_the_channels_beside_the_noise_are_those_of_the_stock_pipeline(name: str) -> None:
    case = make_case(name)
    pipe, pixels = case.pipe, case.pixels(1)
    height, width = pixels.shape[-2:]
    last = pixels[:, :, -1] if "last" in case.given else None
    size = {"height": height, "width": width, "num_frames": pixels.shape[2]}
    noisy, expected = pipe.prepare_latents(
        pixels[:, :, 0], 1, **size, dtype=torch.float32, device="cpu", last_image=last, generator=torch.Generator()
    )
    seen: list[torch.Tensor] = []
    pipe.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    FAMILY.predict(pipe.transformer, noisy, torch.ones(1), case.conditions(["a fox"]))
    torch.testing.assert_close(seen[0], torch.cat([noisy, expected], dim=1), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_frames_between_those_that_are_shown_tell_nothing() -> None:
    case = make_case("wan_flf2v")
    pixels = case.pixels(1)
    inside = pixels.clone()
    inside[:, :, 1:-1] *= -1
    one, other = (FAMILY.encode_frames(case.pipe, clip, case.given) for clip in (pixels, inside))
    assert one.keys() == other.keys() == {"latents", "image"}
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_clip_of_which_every_frame_is_shown_is_refused() -> None:
    case = make_case("wan22_i2v")
    with pytest.raises(ConfigError, match=r"spec.data.clip.frames is 1, .* must be 5 or more"):
        FAMILY.encode_frames(case.pipe, case.pixels(1)[:, :, :1], case.given)


def test_a_checkpoint_without_its_image_encoder_is_refused() -> None:
    case = make_case("wan_i2v")
    told = case.conditions(["a fox"])
    assert told.frames is not None
    alone = replace(told, frames={"latents": told.frames["latents"]})
    with pytest.raises(ConfigError, match="shown pictures through CLIP, and no image_encoder"):
        FAMILY.predict(case.pipe.transformer, case.latents(1), torch.ones(1), alone)


def prompted(folder: Path, checkpoint: str, **prompt: Any) -> RunFile:
    """A run over this tiny checkpoint with one validation prompt, samples of 48 x 32 pixels."""
    file = training_run_file(folder, [folder], save_tiny(checkpoint, folder / "base"), "wan")
    validation = Validation(prompts=[ValidationPrompt(text="a fox", **prompt)], width=48, height=32, frames=5, steps=1)
    return file.model_copy(update={"spec": file.spec.model_copy(update={"validation": validation})})


def test_a_sample_begins_with_its_picture_fitted_to_its_size(tmp_path: Path) -> None:
    picture(96, 96).save(tmp_path / "start.png")
    file = prompted(tmp_path, "wan_i2v", image=str(tmp_path / "start.png"))
    [given] = prompt_pictures(file, FAMILY)
    [start] = given.frames
    assert start.size == (48, 32)
    assert np.array_equal(np.array(start), np.array(picture(96, 96).resize((48, 48), Image.Resampling.LANCZOS))[8:40])
    case, here = make_case("wan_i2v"), Distributed(0, 0, 1, torch.device("cpu"))
    drawn = draw_samples(file, FAMILY, case.denoisers, here)
    picture(96, 96, seed=5).save(tmp_path / "start.png")
    assert draw_samples(file, FAMILY, case.denoisers, here) != drawn


@pytest.mark.parametrize(
    ("checkpoint", "prompt", "expected"),
    [
        ("wan_i2v", {}, r"prompts\[0\]\.image is empty; .* draws from its first frame: name a picture"),
        ("wan_flf2v", {"image": "start.png"}, r"prompts\[0\]\.lastImage is empty; .* its last frame"),
        ("wan_i2v", {"image": "start.png", "last_image": "start.png"}, r"lastImage is .*start\.png'; .* remove it"),
        ("wan", {"image": "start.png"}, r"image is .*start\.png'; .* is not shown the first frame"),
        ("wan_i2v", {"image": "other.png"}, r"image is .*other\.png', which is not there"),
        ("wan_i2v", {"image": "text.png"}, r"image is .*text\.png', which cannot be read"),
    ],
    ids=["none", "no last one", "a last one too many", "one for text to video", "no file", "no picture"],
)
def test_prompts_that_cannot_be_drawn_are_refused(
    checkpoint: str, prompt: dict[str, str], expected: str, tmp_path: Path
) -> None:
    picture(48, 32).save(tmp_path / "start.png")
    (tmp_path / "text.png").write_text("no picture")
    file = prompted(tmp_path, checkpoint, **{name: str(tmp_path / file) for name, file in prompt.items()})
    with pytest.raises(ConfigError, match=expected):
        prompt_pictures(file, FAMILY)


def shown_to(folder: Path, checkpoint: str, clips: Path) -> MicroBatch:
    """The first sample of a training set that is made for this tiny checkpoint. All share a cache."""
    base = save_tiny(checkpoint, folder / checkpoint)
    run = training_run_file(folder, [clips], base, "wan", data={"clip": {"frames": 5}, "maxUpscale": 4})
    [sample] = all_samples(build_dataset(run, FAMILY, OneRank(), no_report)).values()
    return sample


def test_the_cache_keeps_what_each_checkpoint_is_shown(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips/a.mp4", grey_frames([10, 60, 120, 180, 240]), 16)
    (tmp_path / "clips/a.txt").write_text("a fox")
    text, first, both = (shown_to(tmp_path, name, tmp_path / "clips") for name in ("wan", "wan_i2v", "wan_flf2v"))
    assert text.frames is None
    assert first.frames is not None
    assert both.frames is not None
    for batch in (first, both):
        assert torch.equal(batch.latents, text.latents)
    assert first.frames["latents"].shape == text.latents.shape
    assert first.frames["image"].shape[:2] == (1, 1)
    assert both.frames["image"].shape[:2] == (1, 2)
    assert not torch.equal(first.frames["latents"], both.frames["latents"])
    assert torch.equal(first.frames["image"], both.frames["image"][:, :1])


@pytest.mark.parametrize("frames", [5, 13])
@torch.no_grad()
def test_clips_have_4n_plus_1_frames_at_16_a_second_and_need_not_have_8n_plus_1_at_15(pipe: Any, frames: int) -> None:
    """None is lost on the way through the autoencoder."""
    assert (FAMILY.facts.frame_rule, FAMILY.facts.frame_rate) == ((4, 1), 16.0)
    latents = FAMILY.encode_pixels(pipe, torch.zeros(1, 3, frames, 16, 16)).mean
    assert latents.shape[2] == (frames - 1) // 4 + 1
    assert pipe.vae.decode(latents).sample.shape[2] == frames
