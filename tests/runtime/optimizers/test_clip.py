"""Clipping by the norm of the whole gradient (sharded gradients: tests/runtime/parallel)."""

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter

from atelier_runtime.optimizers import clip_gradients


def with_gradients(*gradients: torch.Tensor) -> list[Parameter]:
    parameters = [Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters


def test_clipping_gives_the_norm_before_and_leaves_the_norm_asked_for() -> None:
    ours, theirs = (with_gradients(torch.full((4, 4), 3.0), torch.full((9,), 4.0)) for _ in range(2))
    expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    assert clip_gradients(ours, 1.0).item() == pytest.approx(expected.item())
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.grad, their.grad)
    assert clip_gradients(ours, None).item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("max_norm", [None, 100.0])
def test_gradients_below_the_limit_stay_equal_to_the_bit(max_norm: float | None) -> None:
    gradient = torch.randn(5, 3)
    (parameter,) = with_gradients(gradient)
    assert clip_gradients([parameter], max_norm).item() == pytest.approx(gradient.norm().item())
    assert torch.equal(parameter.grad, gradient)


def test_bf16_gradients_are_measured_in_fp32() -> None:
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = clip_gradients(with_gradients(gradient, torch.ones(3)), None)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx((gradient.double().square().sum() + 3).sqrt().item(), rel=1e-5)


def test_parameters_without_a_gradient_do_not_count() -> None:
    (parameter,) = with_gradients(torch.tensor([3.0, 4.0]))
    assert clip_gradients([parameter, Parameter(torch.ones(2))], None).item() == pytest.approx(5.0)
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        clip_gradients([Parameter(torch.ones(2))], 1.0)


def test_a_norm_that_is_not_finite_is_given_as_it_is() -> None:
    assert clip_gradients(with_gradients(torch.tensor([1.0, float("nan")])), 1.0).isnan()
    assert clip_gradients(with_gradients(torch.tensor([1.0, float("inf")])), None).isinf()


@pytest.mark.parametrize("sharded", [(True, True, True), (False, True, False)], ids=["all", "one of three"])
def test_shards_are_clipped_together_with_whole_gradients(one_rank_mesh: DeviceMesh, sharded: tuple[bool, ...]) -> None:
    gradients = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((4, 3), (6,), (2, 2))]
    whole = with_gradients(*gradients)
    mixed = [
        Parameter(distribute_tensor(torch.zeros_like(gradient), one_rank_mesh, [Shard(0)]) if is_sharded else gradient)
        for gradient, is_sharded in zip(gradients, sharded, strict=True)
    ]
    for parameter, gradient, is_sharded in zip(mixed, gradients, sharded, strict=True):
        parameter.grad = distribute_tensor(gradient, one_rank_mesh, [Shard(0)]) if is_sharded else gradient.clone()
    assert clip_gradients(mixed, 0.5).item() == pytest.approx(clip_gradients(whole, 0.5).item())
    for one, other, is_sharded in zip(mixed, whole, sharded, strict=True):
        found = one.grad.full_tensor() if is_sharded else one.grad
        torch.testing.assert_close(found, other.grad)
