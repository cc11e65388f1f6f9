"""Predicted memory of a quantised base: against the bytes of the published networks' layers, and as advice."""

from dataclasses import dataclass
from typing import Any

import pytest

from atelier_api.errors import ConfigError
from atelier_api.families import FAMILIES, Flavour
from atelier_api.quantizations import QUANTIZATIONS, Quantization, packed_bytes
from atelier_operator.planner import plan, table_facts
from atelier_operator.planner.advice import advice
from atelier_operator.planner.memory import Choice, Parts, predict
from atelier_runtime.families import FAMILIES as RUNTIME
from atelier_runtime.quantization import quantized_layers
from family_models import published_denoiser
from planned_runs import gpu, run

SIZES = {
    (facts.name, flavour.parameters): flavour
    for facts in FAMILIES.values()
    if facts.quantizations
    for flavour in facts.flavours
}
"""One flavour of each size: those of one size have the same layers."""


def parts(family: str = "flux", strategy: str = "single", processes: int = 1, **changes: Any) -> Parts:
    """The parts of training a LoRA in bf16."""
    spec = run(family, **changes).spec
    choice = Choice(strategy, processes, micro_batch_size=1, gradient_checkpointing=True)  # type: ignore[arg-type]
    return predict(spec, table_facts(spec.model), choice, "cuda").train


@dataclass(frozen=True)
class Published:
    """A published network: the layers that are quantised, as [outputs, inputs], and its parameters, of which some stay in fp32."""

    family: str
    flavour: Flavour
    layers: list[tuple[int, int]]
    parameters: int
    in_fp32: int

    @property
    def quantized(self) -> int:
        return sum(outputs * inputs for outputs, inputs in self.layers)

    def parts(self, kind: Quantization | None) -> Parts:
        return parts(self.family, model__flavour=self.flavour.name, model__quantization=kind)


@pytest.fixture(scope="module", params=SIZES.items(), ids=lambda item: f"{item[0][0]} {item[1].name}")
def published(request: pytest.FixtureRequest) -> Published:
    (family, _), flavour = request.param
    model = published_denoiser(family, flavour.name)
    layers = [tuple(model.get_submodule(name).weight.shape) for name in quantized_layers(model, RUNTIME[family])]
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    in_fp32 = sum(size for name, size in sizes.items() if kept & set(name.split(".")))
    return Published(family, flavour, layers, sum(sizes.values()), in_fp32)


def test_shares_of_the_parameters_are_those_of_the_published_network(published: Published) -> None:
    quantized, in_fp32 = published.quantized / published.parameters, published.in_fp32 / published.parameters
    assert published.flavour.quantized_share <= quantized <= published.flavour.quantized_share + 0.02
    assert abs(published.flavour.fp32_share - in_fp32) <= (0.001 if published.flavour.fp32_share else 0.01)


@pytest.mark.parametrize("kind", [None, *QUANTIZATIONS])
def test_the_base_takes_the_bytes_of_its_layers(published: Published, kind: Quantization | None) -> None:
    packed = published.quantized * 2 if kind is None else sum(packed_bytes(kind, *layer) for layer in published.layers)
    others = 2 * (published.parameters - published.quantized + published.in_fp32)
    found = published.flavour.experts * (packed + others)
    assert 0.99 * found <= published.parts(kind).base_weights <= 1.1 * found


@pytest.mark.parametrize(("kind", "weight_bytes"), [("int8", 2), ("nf4", 4)])
def test_the_largest_layer_is_not_larger_than_what_is_set_aside_to_unpack_it(
    published: Published, kind: Quantization, weight_bytes: int
) -> None:
    largest = max(outputs * inputs for outputs, inputs in published.layers)
    assert weight_bytes * largest <= published.parts(kind).copies


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
