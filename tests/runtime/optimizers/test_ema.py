"""The moving average: its formula, and that sampling with it leaves the weights alone."""

import pytest
import torch
from torch.nn import Parameter

from atelier_runtime.optimizers import Ema


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: Parameter(torch.randn(3, 2, generator=generator).to(dtype)) for name in ("a", "b")}


def move(weights: dict[str, Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in weights.values():
            weight.add_(torch.randn(3, 2, generator=generator).to(weight.dtype))


def test_early_decays_are_one_plus_n_over_ten_plus_n_and_the_limit_holds() -> None:
    ema, seen = Ema(parameters(), 0.5), []
    for _ in range(10):
        seen.append(ema.decay)
        ema.update()
    assert seen == pytest.approx([min(0.5, (1 + n) / (10 + n)) for n in range(10)])
    assert seen[-1] == 0.5


def test_the_average_is_its_recurrence() -> None:
    weights = parameters()
    ema, expected = Ema(weights, 0.995), {name: weight.detach().double().clone() for name, weight in weights.items()}
    for n in range(20):
        move(weights, n)
        ema.update()
        decay = min(0.995, (1 + n) / (10 + n))
        for name, weight in weights.items():
            expected[name] = decay * expected[name] + (1 - decay) * weight.detach().double()
    for name, average in ema.state_dict()["averages"].items():
        torch.testing.assert_close(average.double(), expected[name])


def test_the_average_of_bf16_weights_is_fp32_and_moves_by_less_than_a_bf16_step() -> None:
    weights = {"a": Parameter(torch.ones(1, dtype=torch.bfloat16))}
    ema = Ema(weights, 0.999)
    ema.load_state_dict({"updates": 100_000, "averages": {"a": torch.ones(1)}})
    with torch.no_grad():
        weights["a"].fill_(2.0)
    ema.update()
    assert ema.state_dict()["averages"]["a"].item() == pytest.approx(1.001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inside_swapped_the_weights_are_the_average_and_afterwards_what_they_were(dtype: torch.dtype) -> None:
    weights = parameters(dtype)
    ema = Ema(weights, 0.9)
    move(weights, 1)
    ema.update()
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with ema.swapped():
        for name, weight in weights.items():
            assert torch.equal(weight, ema.state_dict()["averages"][name].to(dtype))
            assert not torch.equal(weight, before[name])
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())


def test_swapped_puts_the_weights_back_after_an_exception() -> None:
    weights = parameters()
    ema = Ema(weights, 0.9)
    move(weights, 1)
    before = weights["a"].detach().clone()
    with pytest.raises(RuntimeError, match="sampling broke"), ema.swapped():
        raise RuntimeError("sampling broke")
    assert torch.equal(weights["a"], before)


def test_a_loaded_average_goes_on_to_the_bit() -> None:
    straight, resumed = parameters(), parameters()
    ema = Ema(straight, 0.9)
    for seed in range(4):
        move(straight, seed)
        ema.update()
    state = {"updates": 4, "averages": {k: v.clone() for k, v in ema.state_dict()["averages"].items()}}
    with torch.no_grad():
        for name in resumed:
            resumed[name].copy_(straight[name])
    other = Ema(resumed, 0.9)
    other.load_state_dict(state)
    for seed in range(4, 8):
        for weights, average in ((straight, ema), (resumed, other)):
            move(weights, seed)
            average.update()
    for name, average in ema.state_dict()["averages"].items():
        assert torch.equal(average, other.state_dict()["averages"][name])


def test_the_state_of_other_parameters_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="of other parameters: b, c"):
        Ema(parameters(), 0.9).load_state_dict(
            {"updates": 0, "averages": {"a": torch.zeros(3, 2), "c": torch.zeros(3, 2)}}
        )
