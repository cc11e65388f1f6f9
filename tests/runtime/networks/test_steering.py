"""A base that is steered is the base again afterwards, and its network runs once in each pass, whatever is recomputed."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from atelier_runtime.control import BlockControl
from atelier_runtime.families import FAMILIES
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
