"""AuraFlow: zeros that count as text, positions that end, and the direction of the flow."""

import pytest
import torch

from atelier_api.errors import ConfigError
from atelier_runtime.families import get_family
from atelier_runtime.family import Conditions
from family_cases import PROMPTS, Case, make_case

FAMILY = get_family("auraflow")


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("auraflow")


@pytest.mark.parametrize(("allowed", "tokens"), [(10**30, 256), (512, 256), (16, 16)])
@torch.no_grad()
def test_text_has_256_tokens_as_when_sampling_and_not_120(allowed: int, tokens: int) -> None:
    case = make_case("auraflow")
    case.pipe.tokenizer.model_max_length = allowed
    assert FAMILY.encode_text(case.pipe, ["a"])[0]["embeds"].shape[0] == tokens
    assert FAMILY.sampling_arguments(case.pipe, case.request(None))["max_sequence_length"] == tokens


@torch.no_grad()
def test_padding_is_zero_and_its_length_counts(case: Case) -> None:
    """Attention sees the zeros: text at its true length would be another prompt than the pipeline's."""
    conditions = case.conditions(PROMPTS[:1])
    length = len(case.pipe.tokenizer(PROMPTS[0]).input_ids)
    embeds = conditions.text["embeds"]
    assert not embeds[:, length:].any()
    assert embeds[:, :length].any(dim=-1).all()
    noisy, time, _ = case.noised(case.latents(1), (0.5,))
    short = Conditions(text={"embeds": embeds[:, :length]}, sizes=conditions.sizes)
    difference = FAMILY.predict(case.pipe.transformer, noisy, time, conditions) - FAMILY.predict(
        case.pipe.transformer, noisy, time, short
    )
    assert difference.abs().max() > 1e-5


@pytest.mark.parametrize(("height", "width"), [(144, 64), (64, 144)])
@torch.no_grad()
def test_a_picture_beyond_the_learnt_positions_is_refused(case: Case, height: int, width: int) -> None:
    conditions = case.conditions(PROMPTS[:1])
    time = torch.tensor([0.5])
    FAMILY.predict(case.pipe.transformer, torch.zeros(1, 4, 128 // 8, 128 // 8), time, conditions)
    with pytest.raises(
        ConfigError, match=f"{width} x {height} pixels; .* at most 128 a side: lower spec.data.resolution"
    ):
        FAMILY.predict(case.pipe.transformer, torch.zeros(1, 4, height // 8, width // 8), time, conditions)


@torch.no_grad()
def test_a_network_that_points_to_the_noise_has_no_loss_and_draws_the_picture(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = case.latents(1)
    noisy, time, target = case.noised(clean, (1.0,))
    monkeypatch.setattr(case.pipe.transformer, "forward", lambda *_, **__: (target,))
    assert torch.equal(FAMILY.predict(case.pipe.transformer, noisy, time, case.conditions(PROMPTS[:1])), target)
    arguments = FAMILY.sampling_arguments(case.pipe, case.request(1.0))
    drawn = case.pipe(**arguments, latents=noisy, output_type="latent").images
    torch.testing.assert_close(drawn, clean, atol=1e-5, rtol=1e-5)
