"""Flux.1 with and without the guidance embedding."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from atelier_api.errors import ConfigError
from atelier_runtime.adapters import resolve_targets
from atelier_runtime.families import get_family
from family_cases import PROMPTS, Case, record, walk
from family_models import PUBLISHED, tiny_pipeline
from family_models.parts import seeded

FAMILY = get_family("flux")


def dev() -> Case:
    return Case("flux", tiny_pipeline("flux"), FAMILY)


def schnell() -> Case:
    """As the timestep-distilled checkpoint is: no guidance embedding, no dynamic shift."""
    pipe = tiny_pipeline("flux")
    config = dict(pipe.transformer.config) | {"guidance_embeds": False}
    pipe.register_modules(
        transformer=seeded(lambda: FluxTransformer2DModel.from_config(config)).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
    )
    return Case("flux", pipe, FAMILY)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@torch.no_grad()
def test_a_checkpoint_without_guidance_embedding_follows_the_pipeline(guided: bool) -> None:
    case = schnell()
    request = replace(case.request(3.0 if guided else None), negative="")
    recording = record(case.pipe, FAMILY.sampling_arguments(case.pipe, request))
    for ours, theirs in walk(case, recording, guided=guided):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_training_asks_a_distilled_checkpoint_for_guidance_one() -> None:
    case = dev()
    noisy, time, _ = case.noised(case.latents(1), [0.5])
    by_default, at_one, at_sampling = (
        FAMILY.predict(case.pipe.transformer, noisy, time, case.conditions(PROMPTS[:1], guidance))
        for guidance in (None, 1.0, 3.5)
    )
    assert torch.equal(by_default, at_one)
    assert not torch.equal(by_default, at_sampling)


def test_a_distilled_checkpoint_embeds_guidance() -> None:
    case = dev()
    arguments = FAMILY.sampling_arguments(case.pipe, replace(case.request(2.5), negative=None))
    assert arguments["guidance_scale"] == 2.5
    assert arguments.keys().isdisjoint({"negative_prompt", "true_cfg_scale"})


@pytest.mark.parametrize(
    ("make", "guidance", "way"),
    [(dev, 2.5, "is distilled on guidance: remove it"), (schnell, None, "is not distilled on guidance: set spec")],
    ids=["distilled", "without guidance"],
)
def test_a_negative_prompt_that_would_do_nothing_is_refused(
    make: Callable[[], Case], guidance: float | None, way: str
) -> None:
    case = make()
    with pytest.raises(ConfigError, match=f"the negative prompt 'blurry'; the checkpoint {way}"):
        FAMILY.sampling_arguments(case.pipe, replace(case.request(guidance), negative="blurry"))


def test_the_table_knows_which_flavours_are_distilled_on_guidance() -> None:
    published = PUBLISHED["flux"].denoisers
    embedded = {name: config.get("guidance_embeds", False) for name, (_, config) in published.items()}
    assert embedded == {flavour.name: flavour.guidance == "distilled" for flavour in FAMILY.facts.flavours}


@pytest.mark.parametrize(("make", "tokens"), [(dev, 512), (schnell, 256)], ids=["dev", "schnell"])
def test_text_has_the_length_the_checkpoint_was_trained_with(make: Callable[[], Case], tokens: int) -> None:
    case = make()
    case.pipe.tokenizer_2.model_max_length = 512
    assert FAMILY.encode_text(case.pipe, ["a"])[0]["embeds"].shape[0] == tokens
    assert FAMILY.sampling_arguments(case.pipe, case.request(None))["max_sequence_length"] == tokens


def test_presets_leave_out_the_output_layer_that_shares_its_name_with_those_of_the_blocks() -> None:
    found = resolve_targets(tiny_pipeline("flux").transformer, ["mlp"], FAMILY)
    assert "single_transformer_blocks.0.proj_out" in found
    assert "proj_out" not in found
