"""Wan against the stock pipeline, its two experts, and what is refused."""

from typing import Any

import pytest
import torch

from atelier_api.errors import ConfigError
from atelier_runtime.families import get_family
from atelier_runtime.family import Conditions, Stage
from family_models import tiny_pipeline

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
    with pytest.raises(ConfigError, match="16 input channels where the latents have 36"):
        FAMILY.predict(pipe.transformer, torch.zeros(1, 36, 1, 4, 4), torch.ones(1), conditions(pipe, "a"))
