"""Cosmos-Predict2: noise as EDM counts it, text to exactly 512 tokens, the guardrail, and the network without torchvision."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers.models.transformers import transformer_cosmos

from atelier_api.errors import ConfigError
from atelier_api.families import FAMILIES
from atelier_api.model_files import lora_loading
from atelier_api.v1alpha1.objective import Objective, Timesteps
from atelier_runtime import components
from atelier_runtime.checkpoint.export import export_lora
from atelier_runtime.families import get_family
from atelier_runtime.family import Stage
from atelier_runtime.objectives import build_objective
from atelier_runtime.objectives.timesteps import ConstantShift, resolve_shift
from export_runs import PROVENANCE, trained
from family_cases import PROMPTS, Case, make_case
from family_models import save_tiny, tiny_pipeline
from stock_loader import draw

FAMILY = get_family("cosmos2")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("cosmos2")


def door(case: Case, call: Any) -> list[dict[str, Any]]:
    """The arguments with which `call` calls the network."""
    seen: list[dict[str, Any]] = []
    handle = case.pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        call()
    handle.remove()
    return seen


def test_the_network_sees_the_times_of_flow_matching_up_to_the_noise_of_edm(case: Case) -> None:
    calls = door(
        case, lambda: case.pipe(**FAMILY.sampling_arguments(case.pipe, case.request(1.0)), output_type="latent")
    )
    times = [float(call["timestep"]) for call in calls]
    assert times[0] == pytest.approx(80 / 81)
    assert times[-1] == pytest.approx(0.002 / 1.002)
    for call in calls:
        assert not call["padding_mask"].any()


@pytest.mark.parametrize("level", [0.002 / 1.002, 0.3, 80 / 81])
def test_the_loss_of_edm_is_ours_times_a_weight_of_the_time(case: Case, level: float) -> None:
    """With its weight (sigma^2 + 1) / sigma^2 on the clean picture: what scales input and output cancels to noise - clean."""
    clean = case.latents(1)
    noisy, time, target = case.noised(clean, (level,))
    sigma = level / (1 - level)
    latents = clean + sigma * (target + clean)
    torch.testing.assert_close(noisy, latents / (1 + sigma))
    with torch.no_grad():
        output = FAMILY.predict(case.pipe.transformer, noisy, time, case.conditions(PROMPTS[:1]))
    denoised = (1 - level) * latents.double() - level * output.double()
    edm = (sigma**2 + 1) / sigma**2 * (denoised - clean).square().mean()
    ours = (level**2 + (1 - level) ** 2) * (output - target).double().square().mean()
    torch.testing.assert_close(edm, ours, atol=0, rtol=1e-3)


@torch.no_grad()
def test_the_autoencoder_is_given_back_what_it_made(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures are rounded to 8 bits on their way to the guardrail, so the latents are compared as well."""
    pixels = case.pixels(1)
    latents = FAMILY.encode_pixels(case.pipe, pixels)
    assert latents.std is None
    given: list[torch.Tensor] = []
    decode = case.pipe.vae.decode
    monkeypatch.setattr(case.pipe.vae, "decode", lambda z, **options: (given.append(z), decode(z, **options))[1])
    monkeypatch.setattr(case.pipe.scheduler, "step", lambda *_, **__: (latents.mean.unsqueeze(2),))
    case.pipe(**FAMILY.sampling_arguments(case.pipe, case.request(1.0, steps=2)), output_type="pt")
    expected = case.pipe.vae.encode(pixels.unsqueeze(2)).latent_dist.mode()
    torch.testing.assert_close(given[0], expected)


@torch.no_grad()
def test_text_is_what_the_pipeline_gives_the_network(case: Case) -> None:
    request = case.request(1.0, steps=2)
    calls = door(case, lambda: case.pipe(**FAMILY.sampling_arguments(case.pipe, request), output_type="latent"))
    (features,) = FAMILY.encode_text(case.pipe, [request.prompt])
    assert len(features["embeds"]) == len(case.pipe.tokenizer(request.prompt).input_ids)
    collated = FAMILY.collate_text([features])["embeds"]
    assert collated.shape[1] == 512
    assert torch.equal(collated, calls[0]["encoder_hidden_states"])


@torch.no_grad()
def test_padding_counts_so_captions_always_have_512_tokens(case: Case) -> None:
    (longest,) = FAMILY.encode_text(case.pipe, ["z" * 2000])
    assert len(longest["embeds"]) == 512
    noisy, time, _ = case.noised(case.latents(1), (0.5,))
    conditions = case.conditions(PROMPTS[:1])
    whole = FAMILY.predict(case.pipe.transformer, noisy, time, conditions)
    conditions.text["embeds"] = conditions.text["embeds"][:, :256]
    assert not torch.allclose(FAMILY.predict(case.pipe.transformer, noisy, time, conditions), whole, atol=1e-5)


def test_the_shift_is_that_of_the_checkpoint(case: Case) -> None:
    assert resolve_shift("auto", dict(case.pipe.scheduler.config), FAMILY.facts.shift) == ConstantShift(1.0)


def test_the_mask_is_brought_to_size_without_torchvision(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(transformer_cosmos, "transforms")
    noisy, time, _ = case.noised(case.latents(1), (0.5,))
    conditions = case.conditions(PROMPTS[:1])
    arguments = {"hidden_states": noisy.unsqueeze(2), "timestep": time, "padding_mask": torch.zeros(1, 1, 32, 64)}
    arguments["encoder_hidden_states"] = conditions.text["embeds"]
    with pytest.raises(NameError, match="transforms"):
        case.pipe.transformer(**arguments)
    ours = FAMILY.predict(case.pipe.transformer, noisy, time, conditions)
    torch.testing.assert_close(ours, case.pipe.transformer(**arguments).sample.squeeze(2))


def test_only_drawing_needs_the_guardrail_and_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("cosmos2", tmp_path)
    monkeypatch.setitem(sys.modules, "cosmos_guardrail", None)
    encoders = components.load_encoders(FAMILY, tmp_path, torch.float32, CPU)
    assert FAMILY.encode_text(encoders, ["a fox"])
    denoiser = components.load_denoiser(tmp_path, "transformer", torch.float32, CPU)
    pipe = components.load_pipeline(FAMILY, tmp_path, torch.float32, CPU, denoisers={"transformer": denoiser})
    arguments = FAMILY.sampling_arguments(pipe, make_case("cosmos2").request(1.0, steps=2))
    with pytest.raises(ConfigError, match="cosmos_guardrail is not installed; install it in the image of the runtime"):
        pipe(**arguments)


def test_the_guardrail_that_is_installed_is_asked(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    class Strict:
        def to(self, device: Any) -> None: ...

        def check_text_safety(self, prompt: str) -> bool:
            return "fox" not in prompt

    package = ModuleType("cosmos_guardrail")
    monkeypatch.setattr(package, "CosmosSafetyChecker", Strict, raising=False)
    monkeypatch.setitem(sys.modules, "cosmos_guardrail", package)
    pipe = tiny_pipeline("cosmos2")
    with pytest.raises(ValueError, match="Guardrail detected unsafe text in the prompt: a fox"):
        pipe(**FAMILY.sampling_arguments(pipe, case.request(1.0, steps=2)))


@torch.no_grad()
def test_an_exported_lora_draws_what_the_training_side_draws_loaded_as_the_report_says(tmp_path: Path) -> None:
    adapter = {"type": "lora", "rank": 4, "alpha": 9, "targets": ["all"]}
    result = trained("cosmos2", tmp_path, adapter, publish={"formats": ["diffusers"]})
    files = export_lora(result.weights, result.file, FAMILY, tmp_path, provenance=PROVENANCE)
    ours = result.picture()
    pipe = tiny_pipeline("cosmos2")
    base = draw(pipe, result.arguments)
    exec("\n".join(lora_loading(FAMILIES["cosmos2"], str(files[0].path.parent), files[0].path.name)), {"pipe": pipe})
    loaded = draw(pipe, result.arguments)
    assert abs(loaded - ours).max() <= 1e-5
    assert abs(loaded - base).max() > 1e-3


def test_noise_levels_are_not_clamped_to_those_of_edm() -> None:
    """The sampler goes from sigma 80 to 0.002; training draws beyond, and none twice."""
    objective = build_objective(Objective(timesteps=Timesteps(sampling="uniform")), FAMILY.facts, {})
    generators = [torch.Generator().manual_seed(seed) for seed in range(1000)]
    time = objective.prepare(torch.zeros(1000, 1, 1, 1), generators, stage=Stage("transformer"), tokens=1).time
    assert time.max() > 80 / 81
    assert time.min() < 0.002 / 1.002
    assert len(time.unique()) == 1000
