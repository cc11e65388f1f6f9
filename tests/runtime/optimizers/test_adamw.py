"""AdamW in fp32 and in bf16 with stochastic rounding: close to each other, and resumed to the bit."""

import copy
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import Parameter

from atelier_api.v1alpha1.hyperparameters import Hyperparameters, Optimizer
from atelier_runtime.optimizers import bf16, build_optimizer
from atelier_runtime.optimizers.bf16 import AdamWBf16, stochastic_round
from atelier_runtime.optimizers.fused import FusedAdamW

SHAPES = ((16, 8), (16,), (3, 5, 2), ())


def settings_of(kind: str, **options: float) -> Hyperparameters:
    return Hyperparameters(steps=10, seed=7, optimizer=Optimizer(type=kind, **options))


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def train(weights: list[Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps on a quadratic with its minimum at 0.25 and noise in the gradient."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            noise = torch.randn(weight.shape, generator=generator)
            weight.grad = (weight.detach().float() - 0.25 + 0.1 * noise).to(weight.dtype)
        optimizer.step()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- stochastic rounding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, 1e-30, -7.7e20])
def test_stochastic_rounding_is_unbiased_and_hits_only_the_two_neighbours(value: float) -> None:
    rounded = stochastic_round(torch.full((200_000,), value), generator()).double()
    step = 2.0 ** (torch.tensor(abs(value)).log2().floor().item() - 7)
    assert len(rounded.unique()) == 2
    assert (rounded - value).abs().max() < step
    assert rounded.mean().item() == pytest.approx(value, abs=0.01 * step)


@given(st.floats(-(2.0**100), 2.0**100, width=32))
@settings(max_examples=50, deadline=None)
def test_a_bf16_number_is_never_moved(value: float) -> None:
    exact = torch.full((64,), value).bfloat16()
    assert torch.equal(stochastic_round(exact.float(), generator()), exact)


def test_values_that_are_not_finite_stay_so() -> None:
    all_ones = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(
        torch.float32
    )  # NaNs that a carry would turn into zeros
    values = torch.cat([torch.tensor([float("inf"), float("-inf"), float("nan")]), all_ones])
    rounded = stochastic_round(values, generator())
    assert rounded[0] == float("inf")
    assert rounded[1] == float("-inf")
    assert rounded[2:].isnan().all()


# --- the two optimizers -----------------------------------------------------------------------------------------------


def test_adamw_is_the_one_of_torch() -> None:
    ours, theirs = parameters(), parameters()
    train(ours, build_optimizer(ours, settings_of("adamw", weight_decay=0.1), 1e-2), range(20))
    train(theirs, torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, foreach=False), range(20))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)


def equal_states(ours: torch.optim.Optimizer, our: Sequence[Parameter], theirs: torch.optim.Optimizer) -> bool:
    their = [parameter for group in theirs.param_groups for parameter in group["params"]]
    return all(
        ours.state[a].keys() == theirs.state[b].keys()
        and all(torch.equal(ours.state[a][key], theirs.state[b][key]) for key in ours.state[a])
        for a, b in zip(our, their, strict=True)
    )


@pytest.mark.parametrize("trained", [len(SHAPES), 2], ids=["all", "some without a gradient"])
def test_adamw_is_the_fused_one_of_torch_to_the_bit(trained: int) -> None:
    ours, theirs = parameters(), parameters()
    our = build_optimizer(ours, settings_of("adamw", weight_decay=0.1), 1e-2)
    their = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, fused=True)
    for steps, count in ((range(5), len(SHAPES)), (range(5, 12), trained), (range(12, 15), len(SHAPES))):
        for weights, optimizer in ((ours, our), (theirs, their)):
            optimizer.zero_grad()
            train(weights[:count], optimizer, steps)
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 + steps.stop)  # the schedule: each step has a rate of its own
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert equal_states(our, ours, their)
    assert float(our.state[ours[-1]]["step"]) == (15 if trained == len(SHAPES) else 8)


def test_a_state_saved_by_torchs_adamw_goes_on_in_ours_and_back() -> None:
    ours, theirs = parameters(), parameters()
    their = torch.optim.AdamW(theirs, lr=1e-2, fused=True)
    our = build_optimizer(ours, settings_of("adamw"), 1e-2)
    train(theirs, their, range(4))
    train(ours, our, range(1))  # its lists are made: a loaded state must replace them
    our.load_state_dict(copy.deepcopy(their.state_dict()))
    with torch.no_grad():
        for weight, other in zip(ours, theirs, strict=True):
            weight.copy_(other)
    for weights, optimizer in ((ours, our), (theirs, their)):
        train(weights, optimizer, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    their.load_state_dict(copy.deepcopy(our.state_dict()))
    for weights, optimizer in ((ours, our), (theirs, their)):
        train(weights, optimizer, range(8, 10))
    assert equal_states(our, ours, their)


def test_what_is_written_into_the_state_in_place_is_what_the_next_step_starts_from() -> None:
    """A resume loads into the tensors of the state."""
    straight, resumed = parameters(), parameters()
    first, second = (build_optimizer(weights, settings_of("adamw"), 1e-2) for weights in (straight, resumed))
    template = [dict(second.state[weight]) for weight in resumed]
    train(straight, first, range(5))
    with torch.no_grad():
        for place, weight in enumerate(straight):
            resumed[place].copy_(weight)
            for key, value in template[place].items():
                value.copy_(first.state[weight][key])
    train(straight, first, range(5, 8))
    train(resumed, second, range(5, 8))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_a_group_added_later_is_trained_and_one_of_two_dtypes_is_refused() -> None:
    early, late = parameters(), parameters()
    optimizer = build_optimizer(early, settings_of("adamw"), 1e-2)
    train(early, optimizer, range(2))
    optimizer.add_param_group({"params": late})
    train([*early, *late], optimizer, range(2, 4))
    assert [float(optimizer.state[weight]["step"]) for weight in (early[0], late[0])] == [4, 2]
    with pytest.raises(ValueError, match="one device and dtype"):
        FusedAdamW([Parameter(torch.ones(2)), Parameter(torch.ones(2, dtype=torch.bfloat16))], lr=1e-3)


def test_shards_are_stepped_like_whole_weights(one_rank_mesh: DeviceMesh) -> None:
    whole = parameters()
    sharded = [Parameter(distribute_tensor(weight.detach().clone(), one_rank_mesh, [Shard(0)])) for weight in whole[:3]]
    theirs = [Parameter(distribute_tensor(weight.detach().clone(), one_rank_mesh, [Shard(0)])) for weight in whole[:3]]
    mixed = [*sharded, Parameter(whole[3].detach().clone())]  # a weight that FSDP leaves whole
    ours = build_optimizer(mixed, settings_of("adamw"), 1e-2)
    plain = build_optimizer(whole, settings_of("adamw"), 1e-2)
    torchs = torch.optim.AdamW(theirs, lr=1e-2, fused=True)
    for step in range(6):
        train(whole, plain, range(step, step + 1))
        for group, optimizer in ((mixed, ours), (theirs, torchs)):
            for weight, other in zip(group, whole, strict=False):
                gradient = other.grad.clone()
                is_shard = isinstance(weight.detach(), DTensor)
                weight.grad = distribute_tensor(gradient, one_rank_mesh, [Shard(0)]) if is_shard else gradient
            optimizer.step()
    for shard, their, weight in zip(sharded, theirs, whole, strict=False):
        assert isinstance(ours.state[shard]["exp_avg"], DTensor)
        assert torch.equal(shard.full_tensor(), weight)
        assert torch.equal(shard.full_tensor(), their.full_tensor())
    assert torch.equal(mixed[3], whole[3])


def test_adamw_refuses_weights_that_are_not_fp32() -> None:
    with pytest.raises(ValueError, match=r"trains fp32 weights, not torch\.bfloat16"):
        build_optimizer(parameters(torch.bfloat16), settings_of("adamw"), 1e-3)


def test_bf16_follows_fp32_over_two_hundred_steps() -> None:
    # Many equal weights: their mean shows a bias, their spread the random walk of the rounding.
    exact, coarse = Parameter(torch.ones(4096)), Parameter(torch.ones(4096, dtype=torch.bfloat16))
    train([exact], build_optimizer([exact], settings_of("adamw"), 2e-3), range(200))
    train([coarse], build_optimizer([coarse], settings_of("adamw-bf16"), 2e-3), range(200))
    difference, moved = coarse.detach().float() - exact.detach(), float(1 - exact.detach().mean())
    assert moved > 0.3
    assert abs(float(difference.mean())) < 0.01 * moved
    assert float(difference.std()) < 0.2 * moved


def test_updates_far_below_a_bf16_step_still_move_the_weights() -> None:
    weight = Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = build_optimizer([weight], settings_of("adamw-bf16", weight_decay=0.0), 1e-5)
    for _ in range(50):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.float().mean().item() == pytest.approx(1 - 50 * 1e-5, abs=1e-4)  # a bf16 step at 1 is 0.0078


def test_moments_of_bf16_weights_are_bf16_and_fp32_weights_stay_exact() -> None:
    coarse, exact, reference = (
        Parameter(torch.ones(8, dtype=d)) for d in (torch.bfloat16, torch.float32, torch.float32)
    )
    optimizer = build_optimizer([coarse, exact], settings_of("adamw-bf16"), 1e-3)
    train([coarse, exact], optimizer, range(5))
    assert {optimizer.state[coarse][key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
    assert {optimizer.state[exact][key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    other = build_optimizer([reference], settings_of("adamw"), 1e-3)
    for step in range(5):  # the same second draw of noise as `exact` had
        draws = torch.Generator().manual_seed(step)
        noise = [torch.randn(8, generator=draws) for _ in range(2)][1]
        reference.grad = reference.detach() - 0.25 + 0.1 * noise
        other.step()
    torch.testing.assert_close(exact, reference)


def test_parameters_without_a_gradient_keep_weight_and_age() -> None:
    weights = parameters(torch.bfloat16)
    optimizer = build_optimizer(weights, settings_of("adamw-bf16"), 1e-2)
    train(weights[:2], optimizer, range(3))
    assert torch.equal(weights[2], parameters(torch.bfloat16)[2])
    assert [float(optimizer.state[weight]["step"]) for weight in weights] == [3, 3, 0, 0]


def test_laying_parameters_end_to_end_or_one_by_one_is_the_same_but_for_the_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together, apart = parameters(), parameters()  # fp32 weights: no rounding, so equal to the bit
    train(together, build_optimizer(together, settings_of("adamw-bf16"), 1e-2), range(3))
    monkeypatch.setattr(bf16, "ELEMENTS_AT_ONCE", 0)
    train(apart, build_optimizer(apart, settings_of("adamw-bf16"), 1e-2), range(3))
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


@pytest.mark.parametrize("kind", ["adamw", "adamw-bf16"])
def test_the_state_exists_before_the_first_step_and_is_what_a_step_starts_from(kind: str) -> None:
    dtype = torch.bfloat16 if kind == "adamw-bf16" else torch.float32
    weights, lazy = parameters(dtype), parameters(dtype)
    optimizer = build_optimizer(weights, settings_of(kind), 1e-2)
    assert all(set(optimizer.state[weight]) == {"step", "exp_avg", "exp_avg_sq"} for weight in weights)
    later = build_optimizer(lazy, settings_of(kind), 1e-2)
    later.state.clear()
    train(weights, optimizer, range(2))
    train(lazy, later, range(2))
    assert all(torch.equal(a, b) for a, b in zip(weights, lazy, strict=True))


@pytest.mark.parametrize("kind", ["adamw", "adamw-bf16"])
def test_a_loaded_optimizer_goes_on_to_the_bit(kind: str) -> None:
    dtype = torch.bfloat16 if kind == "adamw-bf16" else torch.float32
    weights = parameters(dtype)
    optimizer = build_optimizer(weights, settings_of(kind), 1e-2)
    train(weights, optimizer, range(4))
    state, kept = copy.deepcopy(optimizer.state_dict()), [weight.detach().clone() for weight in weights]
    train(weights, optimizer, range(4, 8))

    torch.manual_seed(999)  # the global generator plays no part
    resumed = [Parameter(weight) for weight in kept]
    other = build_optimizer(resumed, settings_of(kind), 1e-2)
    other.load_state_dict(state)
    train(resumed, other, range(4, 8))
    for straight, again in zip(weights, resumed, strict=True):
        assert torch.equal(straight, again)
        assert torch.equal(optimizer.state[straight]["exp_avg_sq"], other.state[again]["exp_avg_sq"])


def test_another_seed_rounds_differently() -> None:
    first, second = parameters(torch.bfloat16), parameters(torch.bfloat16)
    train(first, AdamWBf16(first, seed=1, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0), range(3))
    train(second, AdamWBf16(second, seed=2, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0), range(3))
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("kind", "dtype"), [("adamw", torch.float32), ("adamw-bf16", torch.bfloat16)])
def test_a_closure_is_refused(kind: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="takes no closure"):
        build_optimizer(parameters(dtype), settings_of(kind), 1e-3).step(lambda: 0.0)
