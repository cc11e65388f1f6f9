"""HiDream-I1: gradients through its experts, pictures that are not square, and samples of the size that was asked for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from torch import Tensor

from atelier_api.errors import ConfigError
from atelier_api.v1alpha1.adapter import FullAdapter
from atelier_runtime import adapters
from atelier_runtime.checkpoint.export import export_lora
from atelier_runtime.families import get_family
from export_runs import PROVENANCE, trained
from family_cases import PROMPTS, Case, make_case, record, walk
from family_models import tiny_pipeline
from family_models.parts import seeded

FAMILY = get_family("hidream")


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("hidream")


def with_config(case: Case, **changes: Any) -> Any:
    """A denoiser of the same weights."""
    config = {key: value for key, value in case.pipe.transformer.config.items() if not key.startswith("_")}
    other = seeded(lambda: HiDreamImageTransformer2DModel(**config | changes)).eval()
    other.load_state_dict(case.pipe.transformer.state_dict())
    return other


def noisy(rows: int, columns: int) -> Tensor:
    return torch.randn(2, 16, 2 * rows, 2 * columns, generator=torch.Generator().manual_seed(0))


TIME = torch.tensor([0.3, 0.9])


def test_gates_and_all_routed_experts_train_and_pass_gradients_on(case: Case) -> None:
    """In evaluation the experts run without gradients, and so they would in a model made with `force_inference_output`."""
    transformer = tiny_pipeline("hidream").transformer
    adapters.install(transformer, FullAdapter(type="full"), FAMILY)
    experts = transformer.single_stream_blocks[0].block.ff_i
    torch.nn.init.zeros_(experts.shared_experts.w2.weight)
    seen: list[Tensor] = []
    handle = experts.register_full_backward_hook(lambda _, inward, outward: seen.extend(inward))
    FAMILY.predict(transformer, noisy(2, 4), TIME, case.conditions(PROMPTS)).square().sum().backward()
    handle.remove()
    parts = ("ff_i.gate.", "ff_i.experts.")
    silent = [name for name, p in transformer.named_parameters() if any(x in name for x in parts) and not p.grad.any()]
    assert silent == []
    assert seen[0].any()  # nothing but the routed experts and the gate leads there


def test_a_model_whose_experts_never_get_a_gradient_is_refused(case: Case) -> None:
    model = with_config(case, force_inference_output=True)
    with pytest.raises(ConfigError, match=r"experts get no gradient \(force_inference_output\)"):
        FAMILY.predict(model, noisy(2, 2), TIME, case.conditions(PROMPTS))


@pytest.mark.parametrize("size", [(2, 2), (2, 4), (3, 2), (3, 4)], ids=["square", "full", "padded", "larger"])
@torch.no_grad()
def test_training_mode_predicts_what_evaluation_predicts(size: tuple[int, int]) -> None:
    case = make_case("hidream")
    conditions = case.conditions(PROMPTS)
    evaluated = FAMILY.predict(case.pipe.transformer, noisy(*size), TIME, conditions)
    trained = FAMILY.predict(case.pipe.transformer.train(), noisy(*size), TIME, conditions)
    torch.testing.assert_close(trained, evaluated, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_picture_smaller_than_the_canvas_is_padded_as_in_the_pipeline() -> None:
    case = make_case("hidream")
    lengths: list[int] = []
    handle = case.pipe.transformer.x_embedder.register_forward_hook(lambda _, args, out: lengths.append(out.shape[1]))
    request = replace(case.request(None), width=48, height=32)
    recording = record(case.pipe, FAMILY.sampling_arguments(case.pipe, request) | {"guidance_scale": 1.0})
    for ours, theirs in walk(case, recording, guided=False):
        assert ours.shape[-2:] == (4, 6)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    handle.remove()
    assert set(lengths) == {8}


@torch.no_grad()
def test_a_bucket_larger_than_the_canvas_is_what_a_larger_canvas_would_make_of_it(case: Case) -> None:
    conditions = case.conditions(PROMPTS)
    ours = FAMILY.predict(case.pipe.transformer, noisy(3, 4), TIME, conditions)
    larger = FAMILY.predict(with_config(case, max_resolution=(6, 8)), noisy(3, 4), TIME, conditions)
    torch.testing.assert_close(ours, larger, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(48, 32), (64, 32), (64, 64)], ids=str)
def test_samples_have_the_size_that_was_asked_for_and_not_that_of_the_canvas(size: tuple[int, int]) -> None:
    case = make_case("hidream")
    request = replace(case.request(None, steps=1), width=size[0], height=size[1])
    picture = case.pipe(**FAMILY.sampling_arguments(case.pipe, request), output_type="pil").images[0]
    assert picture.size == size


def test_a_sample_that_is_not_square_and_larger_than_the_canvas_is_refused(case: Case) -> None:
    with pytest.raises(ConfigError, match=r"samples of 80 x 32 pixels; .* at most 2048 pixels"):
        FAMILY.sampling_arguments(case.pipe, replace(case.request(None), width=80, height=32))


@torch.no_grad()
def test_text_has_the_fixed_length_of_the_pipeline_and_all_layers_of_llama(case: Case) -> None:
    features = FAMILY.encode_text(case.pipe, PROMPTS)
    for prompt, item in zip(PROMPTS, features, strict=True):
        t5, _, llama, _, pooled, _ = case.pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
        torch.testing.assert_close(item["t5"], t5[0])
        torch.testing.assert_close(item["llama"], llama[:, 0])
        torch.testing.assert_close(item["pooled"], pooled[0])
    assert len({item["llama"].shape for item in features}) == 1
    assert len(features[0]["llama"]) == case.pipe.text_encoder_4.config.num_hidden_layers


@torch.no_grad()
def test_the_stock_pipeline_reads_an_exported_lora_and_says_that_it_cannot_read_the_kohya_layout(
    tmp_path: Path,
) -> None:
    result = trained("hidream", tmp_path, {"type": "lora", "rank": 4, "alpha": 9, "targets": ["all"]})
    export_lora(result.weights, result.file, FAMILY, tmp_path / "out", provenance=PROVENANCE)
    case = make_case("hidream")
    conditions, kohya = case.conditions(PROMPTS), tmp_path / "out" / "kohya"
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        case.pipe.load_lora_weights(str(kohya), weight_name="fox.safetensors")
    base = FAMILY.predict(case.pipe.transformer, noisy(2, 4), TIME, conditions)
    case.pipe.load_lora_weights(str(tmp_path / "out" / "diffusers"), weight_name="pytorch_lora_weights.safetensors")
    ours, theirs = (
        FAMILY.predict(model, noisy(2, 4), TIME, conditions)
        for model in (result.denoisers["transformer"], case.pipe.transformer)
    )
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert (base - ours).abs().max() > 1e-3
