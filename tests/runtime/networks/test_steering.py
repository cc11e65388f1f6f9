"""A base that is steered is the base again afterwards, and its network runs once in each pass, whatever is recomputed."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atelier_runtime.families import FAMILIES
from atelier_runtime.family_parts.steered import BlockControl
from atelier_runtime.networks.steering import steering
from control_cases import CONTROLLED, ControlledCase, control_network, controlled_case
from family_cases import PROMPTS
from family_models import FAMILY_OF

STEERED = [name for name in CONTROLLED if isinstance(FAMILIES[FAMILY_OF[name]].control, BlockControl)]


@pytest.fixture(params=STEERED)
def case(request: pytest.FixtureRequest) -> ControlledCase:
    fresh = controlled_case(request.param, trained=False)
    return replace(fresh, network=control_network(fresh, trained=True))


def predicts(case: ControlledCase, *, controlled: bool) -> Callable[[], Tensor]:
    noisy, time, _ = case.noised(case.latents(2), (0.3, 0.9))
    conditions = case.conditions(PROMPTS)
    if controlled:
        return lambda: case.family.predict(case.together, noisy, time, conditions)
    return lambda: case.family.predict(case.base, noisy, time, replace(conditions, control=None))


@torch.no_grad()
def test_what_comes_out_of_the_network_is_added_to_the_tokens_of_the_picture_alone(case: ControlledCase) -> None:
    noisy, time, _ = case.noised(case.latents(2), (0.3, 0.9))
    conditions = case.conditions(PROMPTS)
    assert conditions.control is not None
    network: Any = case.network
    blocks = network.steered_blocks(case.base)
    asked: list[Any] = []
    calls: list[tuple[dict[str, Any], list[Tensor]]] = []
    before: list[Any] = []
    after: list[Any] = []
    blocks[0].register_forward_pre_hook(
        lambda _, given, named: asked.extend([*given, *named.values()]), with_kwargs=True
    )
    for block in blocks:
        block.register_forward_hook(lambda *call: before.append(call[-1]))
    network.register_forward_hook(lambda *call: calls.append(call[-2:]), with_kwargs=True)
    with steering(case.base, network, lambda _: conditions.control, 0.5):
        for block in blocks:
            block.register_forward_hook(lambda *call: after.append(call[-1]))
        case.family.predict(case.base, noisy, time, replace(conditions, control=None))
    [(told, additions)] = calls
    # PixArt's is given what comes out of the first block, as it was published; ours what goes in.
    assert torch.equal(told["hidden_states"], before[0] if case.name == "pixart_sigma" else asked[0])
    each = math.ceil(len(blocks) / len(additions))
    for number, (plain, steered) in enumerate(zip(before, after, strict=True)):
        difference, addition = in_one(steered) - in_one(plain), 0.5 * additions[number // each]
        text = difference.shape[1] - addition.shape[1]
        places = (0, text) if case.family.blocks[0].streams.startswith("tokens") else (text, 0)
        torch.testing.assert_close(difference, F.pad(addition, (0, 0, *places)), atol=1e-5, rtol=1e-5)


def in_one(output: Any) -> Tensor:
    """[B, tokens, width] of a block of one stream, or of two."""
    return torch.cat(output, dim=1) if isinstance(output, tuple) else output


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_the_network_runs_once_in_a_pass_and_not_in_the_backward_pass(case: ControlledCase, recompute: bool) -> None:
    if recompute:
        case.network.enable_gradient_checkpointing()  # type: ignore[operator]
        case.base.enable_gradient_checkpointing()  # type: ignore[operator]
    passes: list[bool] = []
    case.network.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    predicts(case, controlled=True)().sum().backward()
    assert passes == [True]


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_the_base_is_its_own_again_after_a_pass_and_after_one_that_failed(
    case: ControlledCase, recompute: bool
) -> None:
    if recompute:
        case.base.enable_gradient_checkpointing()  # type: ignore[operator]
    alone, steered = predicts(case, controlled=False), predicts(case, controlled=True)
    case.base.train(case.network.training)
    before = alone()
    assert not torch.equal(steered(), before)
    assert torch.equal(alone(), before)
    with pytest.raises(KeyError), steering(case.base, case.network, lambda _: {}["no condition"], 1.0):
        alone()
    assert torch.equal(alone(), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.base.modules())
