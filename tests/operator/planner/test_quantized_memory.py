"""Predicted memory of a quantised base: against the bytes of the published networks' layers, and as advice."""

from typing import Any

import pytest

from atelier_api.errors import ConfigError
from atelier_api.families import FAMILIES, FamilyFacts, Flavour
from atelier_api.quantizations import QUANTIZATIONS, Quantization, packed_bytes
from atelier_operator.planner import plan, table_facts
from atelier_operator.planner.advice import advice
from atelier_operator.planner.memory import Choice, Parts, predict
from atelier_runtime.families import FAMILIES as RUNTIME
from atelier_runtime.quantization import quantized_layers
from family_models import published_denoiser
from planned_runs import gpu, run

FLAVOURS = [
    pytest.param(facts, flavour, id=f"{facts.name} {flavour.name}")
    for facts in FAMILIES.values()
    for flavour in facts.flavours
]
Model = tuple[FamilyFacts, Flavour, list[tuple[int, int]], int]


def parts(family: str = "flux", strategy: str = "single", processes: int = 1, **changes: Any) -> Parts:
    """The parts of training a LoRA."""
    spec = run(family, **changes).spec
    choice = Choice(strategy, processes, micro_batch_size=1, gradient_checkpointing=True)  # type: ignore[arg-type]
    return predict(spec, table_facts(spec.model), choice, "cuda").train


@pytest.fixture(scope="module", params=FLAVOURS)
def published(request: pytest.FixtureRequest) -> Model:
    """(facts, flavour, sizes of the layers that are quantised, all parameters) of a published network."""
    facts, flavour = request.param
    model = published_denoiser(facts.name, flavour.name)
    layers = [tuple(model.get_submodule(name).weight.shape) for name in quantized_layers(model, RUNTIME[facts.name])]
    return facts, flavour, layers, sum(parameter.numel() for parameter in model.parameters())


def test_the_share_of_the_parameters_that_are_quantised_is_that_of_the_published_network(published: Model) -> None:
    _, flavour, layers, parameters = published
    share = sum(outputs * inputs for outputs, inputs in layers) / parameters
    assert flavour.quantized_share <= share < flavour.quantized_share + 0.05, f"{share:.4f}"


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_the_base_takes_the_bytes_of_its_layers(published: Model, kind: Quantization) -> None:
    facts, flavour, layers, parameters = published
    packed = sum(packed_bytes(kind, *layer) for layer in layers)
    whole = 2 * (parameters - sum(outputs * inputs for outputs, inputs in layers))
    predicted = parts(facts.name, model__flavour=flavour.name, model__quantization=kind).base_weights
    assert flavour.experts * (packed + whole) <= predicted * 1.01
    assert predicted <= 1.1 * flavour.experts * (packed + whole)


def test_the_largest_layer_is_not_larger_than_what_is_set_aside_to_unpack_it(published: Model) -> None:
    facts, flavour, layers, _ = published
    aside = parts(facts.name, model__flavour=flavour.name, model__quantization="int8").copies
    assert 2 * max(outputs * inputs for outputs, inputs in layers) <= aside


def test_kinds_are_smaller_in_the_order_of_their_bits() -> None:
    whole, int8, fp8, nf4 = (parts(model__quantization=kind).base_weights for kind in (None, *QUANTIZATIONS))
    assert int8 == fp8
    assert 0.5 * whole < int8 < 0.54 * whole
    assert 0.25 * whole < nf4 < 0.31 * whole
    assert parts().copies == 0


def test_nothing_but_the_base_and_the_unpacked_layer_depends_on_it() -> None:
    whole, packed = parts(), parts(model__quantization="nf4")
    for name in ("trained_weights", "gradients", "optimizer", "activations", "overhead"):
        assert getattr(whole, name) == getattr(packed, name)


def test_fsdp2_shards_and_gathers_packed_weights() -> None:
    alone = parts(model__quantization="nf4")
    spread = parts("flux", "fsdp2", 4, model__quantization="nf4")
    assert spread.base_weights == -(-alone.base_weights // 4)
    assert alone.copies < spread.copies < parts("flux", "fsdp2", 4).copies


def test_a_quantised_base_is_advised_where_a_run_does_not_fit_and_then_fits() -> None:
    big = run("flux", data__resolution=512)
    found = advice(big, table_facts(big.spec.model), gpu(20))
    int8 = next(each for each in found if each.changes == {"spec.model.quantization": "int8"})
    assert int8.peak <= 0.94 * (20 << 30)
    with pytest.raises(ConfigError, match=r"spec\.model\.quantization int8 \([\d.]+ GiB\)"):
        plan(big, table_facts(big.spec.model), gpu(20))
    with pytest.raises(ConfigError, match=r"spec\.model\.quantization nf4 \([\d.]+ GiB\)"):
        plan(big, table_facts(big.spec.model), gpu(12))
    smaller = run("flux", data__resolution=512, model__quantization="int8")
    assert plan(smaller, table_facts(smaller.spec.model), gpu(20)).predicted_peak_memory_bytes == int8.peak


def test_it_is_not_advised_for_a_family_that_it_is_not_recommended_for() -> None:
    big = run("sdxl")
    found = advice(big, table_facts(big.spec.model), gpu(6))
    assert not any("spec.model.quantization" in each.changes for each in found)
