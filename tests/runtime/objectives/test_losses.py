"""Limits of the losses, and what `Objective.loss` averages."""

import pytest
import torch

from atelier_api.v1alpha1.objective import Objective
from atelier_runtime.objectives import Prepared
from atelier_runtime.objectives.flow import FlowObjective
from atelier_runtime.objectives.losses import pseudo_huber, squared_error
from atelier_runtime.objectives.timesteps import ConstantShift


def test_pseudo_huber_is_the_square_for_small_differences() -> None:
    small = torch.tensor([1e-3, -2e-4, 1e-5])
    torch.testing.assert_close(pseudo_huber(small, 0.1), squared_error(small), rtol=1e-4, atol=0)


def test_pseudo_huber_has_slope_two_c_for_large_differences() -> None:
    large = torch.tensor([1e3, -1e4], requires_grad=True)
    pseudo_huber(large, 0.1).sum().backward()
    torch.testing.assert_close(large.grad, torch.tensor([0.2, -0.2]))


def test_pseudo_huber_is_its_textbook_formula() -> None:
    difference, c = torch.linspace(-3, 3, 31, dtype=torch.float64), 0.3
    expected = 2 * c * ((difference**2 + c**2).sqrt() - c)
    torch.testing.assert_close(pseudo_huber(difference, c), expected)


def test_pseudo_huber_approaches_the_square_as_c_grows() -> None:
    difference = torch.linspace(-2, 2, 9, dtype=torch.float64)
    torch.testing.assert_close(pseudo_huber(difference, 1e4), squared_error(difference), rtol=1e-6, atol=0)


def prepared(target: torch.Tensor, weight: torch.Tensor) -> Prepared:
    return Prepared(noisy=target, time=weight, target=target, weight=weight)


@pytest.mark.parametrize("kind", ["l2", "huber"])
def test_the_loss_is_one_fp32_mean_per_sample_times_its_weight(kind: str) -> None:
    objective = FlowObjective(Objective(loss=kind, huber_c=0.2 if kind == "huber" else 0.1), ConstantShift(1.0))
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(3, 4, 5, 6, generator=generator)
    prediction = torch.randn(3, 4, 5, 6, generator=generator).bfloat16()
    weight = torch.tensor([1.0, 0.5, 0.0])
    loss = objective.loss(prediction, prepared(target, weight))
    element = squared_error if kind == "l2" else lambda d: pseudo_huber(d, 0.2)
    expected = torch.stack([element(prediction[i].float() - target[i]).mean() * weight[i] for i in range(3)])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def test_a_mask_leaves_the_mean_over_what_it_keeps() -> None:
    target, prediction = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    mask = torch.ones(1, 1, 3, 1, 1)
    mask[:, :, 0] = 0
    objective = FlowObjective(Objective(), ConstantShift(1.0))
    loss = objective.loss(prediction, prepared(target, torch.tensor([1.0, 0.5])), mask)
    kept = (prediction - target)[:, :, 1:].square().flatten(1).mean(1)
    torch.testing.assert_close(loss, kept * torch.tensor([1.0, 0.5]))


def test_weight_one_leaves_the_squared_loss_equal_to_the_bit() -> None:
    target, prediction = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    loss = FlowObjective(Objective(), ConstantShift(1.0)).loss(prediction, prepared(target, torch.ones(2)))
    assert torch.equal(loss, (prediction - target).square().flatten(1).mean(1))
