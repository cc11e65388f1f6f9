"""Z-Image against the stock pipeline: same text, same prediction, and batches that do not mix."""

from typing import Any

import pytest
import torch

from atelier_runtime.families import get_family
from atelier_runtime.family import Conditions
from family_models import tiny_pipeline

FAMILY = get_family("z_image")
SIZES = torch.tensor([[32, 32, 0, 0, 32, 32]])


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline("z_image")


def conditions(pipe: Any, *prompts: str) -> Conditions:
    return Conditions(FAMILY.collate_text(FAMILY.encode_text(pipe, prompts)), SIZES.repeat(len(prompts), 1))


@torch.no_grad()
def test_a_prediction_is_what_the_stock_pipeline_gives_its_scheduler(
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
        "a red fox",
        height=32,
        width=48,
        num_inference_steps=3,
        guidance_scale=0,
        generator=generator,
        output_type="latent",
    )

    assert len(steps) == 3
    for output, t, sample in steps:
        prediction = FAMILY.predict(pipe.transformer, sample, t.expand(1) / 1000, conditions(pipe, "a red fox"))
        assert prediction.shape == sample.shape
        torch.testing.assert_close(prediction, output, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_batch_of_different_prompt_lengths_is_the_two_samples_alone(pipe: Any) -> None:
    prompts = ("a", "a much longer prompt about a lighthouse in the fog")
    noisy, time = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8])
    together = FAMILY.predict(pipe.transformer, noisy, time, conditions(pipe, *prompts))
    for i, prompt in enumerate(prompts):
        alone = FAMILY.predict(pipe.transformer, noisy[i : i + 1], time[i : i + 1], conditions(pipe, prompt))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_text_is_stored_at_its_true_length_and_as_the_pipeline_encodes_it(pipe: Any) -> None:
    prompts = ["a", "two words"]
    expected, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    features = FAMILY.encode_text(pipe, prompts)
    assert prompts == ["a", "two words"]  # the pipeline writes into the list it is given
    assert [len(item["embeds"]) for item in features] == [len(item) for item in expected]
    for item, embeds in zip(features, expected, strict=True):
        assert torch.equal(item["embeds"], embeds)


def test_every_parameter_gets_a_gradient(pipe: Any) -> None:
    transformer = tiny_pipeline("z_image").transformer
    noisy = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    FAMILY.predict(
        transformer, noisy, torch.tensor([0.2, 0.9]), conditions(pipe, "a", "longer text")
    ).square().sum().backward()
    assert [name for name, p in transformer.named_parameters() if p.grad is None] == []


def test_a_bf16_base_predicts_under_autocast_from_fp32_latents(pipe: Any) -> None:
    transformer = tiny_pipeline("z_image").transformer
    noisy, time, text = torch.randn(1, 16, 4, 4), torch.tensor([0.5]), conditions(pipe, "a fox")
    expected = FAMILY.predict(transformer, noisy, time, text)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = FAMILY.predict(transformer.to(torch.bfloat16), noisy, time, text)
    assert (prediction - expected).abs().max() < 0.05 * expected.abs().max()
