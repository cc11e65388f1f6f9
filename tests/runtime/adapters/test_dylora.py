"""DyLoRA on real denoisers: every prefix of its ranks is an adapter, a step trains one block, and the block is the step's own."""

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapter_runs import FamilyCase, family_case
from atelier_runtime.adapters import AdapterReport, install, trainable
from atelier_runtime.lycoris_layout import file_tensors
from atelier_runtime.trainer import ADAPTER_SLOT, sample_generator
from lycoris_adapters import lycoris_adapter, stock_modules

RANK, BLOCK = 6, 2
ADAPTER = lycoris_adapter("dylora", rank=RANK, rankBlock=BLOCK, alpha="5")


@pytest.fixture(scope="module", params=["sdxl", "sana"])
def case(request: pytest.FixtureRequest) -> FamilyCase:
    """A UNet, and a transformer whose feed-forward layers are convolutions."""
    return family_case(request.param)


def installed(case: FamilyCase) -> tuple[Any, AdapterReport]:
    model = case.denoiser()
    report = install(model, ADAPTER, case.family)
    case.disturb(model)
    return model, report


def use_block(report: AdapterReport, index: int) -> None:
    """Draw with generators until the block comes up, as a step would."""
    assert report.draw is not None
    drawn: Any = report.draw.__self__  # type: ignore[attr-defined]
    for step in range(100):
        report.draw(sample_generator(0, step, ADAPTER_SLOT))
        if drawn.index == index:
            return
    raise AssertionError(f"block {index} of {drawn.count} was not drawn in 100 steps")


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainable(model).items()}


def cut(file: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """What docs/how-to/use-the-result.md tells users to do."""
    rows = {name: tensor[:rank] for name, tensor in file.items() if name.endswith("lora_down.weight")}
    columns = {name: tensor[:, :rank] for name, tensor in file.items() if name.endswith("lora_up.weight")}
    return {**file, **rows, **columns}


@pytest.mark.parametrize("way", ["apply_to", "merge_to"])
def test_a_file_cut_to_a_lower_rank_gives_what_training_at_that_block_gave(case: FamilyCase, way: str) -> None:
    model, report = installed(case)
    file = file_tensors(weights_of(model), ADAPTER, case.family)
    predictions = []
    for index in range(RANK // BLOCK):
        use_block(report, index)
        predictions.append(case.predict(model))
        stock = case.denoiser()
        for module in stock_modules(stock, cut(file, (index + 1) * BLOCK)):
            assert module.lora_dim == (index + 1) * BLOCK
            getattr(module, way)()
        torch.testing.assert_close(case.predict(stock), predictions[-1], atol=1e-4, rtol=1e-4)
    assert all((one - other).abs().max() > 1e-3 for one, other in pairwise(predictions))
    use_block(report, 0)
    torch.testing.assert_close(case.predict(model.eval()), predictions[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_step_trains_the_drawn_block_and_no_other(case: FamilyCase, index: int) -> None:
    model, report = installed(case)
    use_block(report, index)
    case.predict(model, grad=True).square().sum().backward()
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None
        blocks = parameter.grad.split(BLOCK, dim=0 if "lora_down" in name else 1)
        assert [bool(block.any()) for block in blocks] == [each == index for each in range(3)], name


def test_recomputing_uses_the_block_of_the_step() -> None:
    case = family_case("wan")
    model, report = installed(case)
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        if recompute:
            model.enable_gradient_checkpointing()
        use_block(report, 0)
        case.predict(model, grad=True).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in trainable(model).values()])
    for once, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, once, atol=1e-6, rtol=1e-5)


def test_the_block_is_a_function_of_the_seed_and_the_step_and_each_comes_as_often() -> None:
    model = family_case("wan").denoiser()
    report = install(model, ADAPTER, family_case("wan").family)
    assert report.draw is not None
    drawn: Any = report.draw.__self__  # type: ignore[attr-defined]

    def blocks(seed: int, steps: range) -> list[int]:
        indices = []
        for step in steps:
            report.draw(sample_generator(seed, step, ADAPTER_SLOT))  # type: ignore[misc]
            torch.rand(3)  # what else is drawn in a step does not matter
            indices.append(drawn.index)
        return indices

    straight = blocks(4, range(300))
    assert blocks(4, range(150, 300)) == straight[150:]
    assert blocks(5, range(300)) != straight
    assert all(80 <= count <= 120 for count in Counter(straight).values())
    assert sorted(Counter(straight)) == [0, 1, 2]
