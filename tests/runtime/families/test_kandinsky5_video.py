"""Kandinsky 5.0 Video: captions of their own length without a mask, positions by resolution, and what is refused."""

from typing import Any

import pytest
import torch
from diffusers import Kandinsky5Transformer3DModel

from atelier_api.errors import ConfigError
from atelier_runtime.families import get_family
from family_cases import PROMPTS, Case, make_case
from family_models.parts import seeded

FAMILY = get_family("kandinsky5_video")


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("kandinsky5_video")


def calls(case: Case, noisy: torch.Tensor, prompts: list[str]) -> list[dict[str, Any]]:
    """Arguments of each call of the denoiser in one prediction."""
    seen: list[dict[str, Any]] = []
    handle = case.pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        FAMILY.predict(case.pipe.transformer, noisy, torch.full((len(noisy),), 0.5), case.conditions(prompts))
    handle.remove()
    return seen


@torch.no_grad()
def test_captions_are_what_the_pipeline_encodes_of_each_alone(case: Case) -> None:
    features = FAMILY.encode_text(case.pipe, PROMPTS)
    assert len({len(item["embeds"]) for item in features}) == 2
    for prompt, item in zip(PROMPTS, features, strict=True):
        embeds, pooled, lengths = case.pipe.encode_prompt([prompt])
        assert torch.equal(item["embeds"], embeds[0])
        assert torch.equal(item["pooled"], pooled[0])
        assert len(item["embeds"]) == lengths[-1]


@torch.no_grad()
def test_the_template_is_the_video_one_and_its_first_128_tokens_are_dropped(case: Case) -> None:
    assert "Describe the video in detail." in case.pipe.prompt_template
    whole = case.pipe.tokenizer(case.pipe.prompt_template.format(PROMPTS[0])).input_ids
    assert len(FAMILY.encode_text(case.pipe, PROMPTS[:1])[0]["embeds"]) == len(whole) - 128


@torch.no_grad()
def test_padding_would_reach_the_network(case: Case) -> None:
    """Why the samples of a batch run one by one: zeros behind a caption change what is predicted."""
    noisy, time, _ = case.noised(case.latents(1), (0.5,))
    short = case.conditions(PROMPTS[:1])
    both = case.conditions(PROMPTS).text
    padded = {"embeds": both["embeds"][:1], "pooled": both["pooled"][:1], "mask": torch.ones_like(both["mask"][:1])}
    exact = FAMILY.predict(case.pipe.transformer, noisy, time, short)
    wrong = FAMILY.predict(case.pipe.transformer, noisy, time, type(short)(text=padded, sizes=short.sizes))
    assert not torch.allclose(exact, wrong, atol=1e-4)


@pytest.mark.parametrize("prompts", [["a fox", "a fox"], list(PROMPTS)], ids=["equal", "unequal"])
def test_there_are_as_many_calls_as_samples_whatever_the_lengths(case: Case, prompts: list[str]) -> None:
    """Under sharding every call gathers weights from all ranks, and another rank may have captions of other lengths."""
    seen = calls(case, torch.randn(2, 16, 1, 4, 4), prompts)
    assert [len(arguments["hidden_states"]) for arguments in seen] == [1, 1]
    for arguments in seen:
        assert len(arguments["text_rope_pos"]) == arguments["encoder_hidden_states"].shape[1]


@pytest.mark.parametrize(
    ("height", "width"), [(480, 848), (848, 480), (480, 864), (464, 640), (768, 1280)], ids=lambda side: str(side)
)
def test_positions_are_scaled_as_the_pipeline_scales_them(case: Case, height: int, width: int) -> None:
    (arguments,) = calls(case, torch.randn(1, 16, 1, height // 8, width // 8), ["a fox"])
    assert arguments["scale_factor"] == case.pipe._get_scale_factor(height, width)


def test_the_condition_that_text_to_video_does_without_is_zero(case: Case) -> None:
    noisy = torch.randn(1, 16, 2, 4, 4)
    (arguments,) = calls(case, noisy, ["a fox"])
    hidden = arguments["hidden_states"]
    assert hidden.shape[-1] == 33
    assert torch.equal(hidden[..., :16].movedim(-1, 1), noisy)
    assert not hidden[..., 16:].any()


def test_sparse_attention_is_refused(case: Case) -> None:
    config = {key: value for key, value in case.pipe.transformer.config.items() if not key.startswith("_")}
    sparse = seeded(lambda: Kandinsky5Transformer3DModel(**config | {"attention_type": "nabla"}))
    with pytest.raises(ConfigError, match=r"has a denoiser with nabla attention.*a checkpoint of 5 seconds"):
        FAMILY.predict(sparse, torch.zeros(1, 16, 1, 4, 4), torch.ones(1), case.conditions(["a fox"]))
