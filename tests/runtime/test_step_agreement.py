"""The numbers of a step, given one step later."""

import math

import pytest
import torch
from torch import Tensor

from atelier_runtime.parallel import Distributed
from atelier_runtime.step_agreement import StepAgreement, StepFacts

CPU = torch.device("cpu")


def test_one_rank_gives_its_own_numbers_and_flags_one_step_later_and_each_once() -> None:
    agreement = StepAgreement(Distributed(0, 0, 1, CPU))
    flags = [(False, False), (True, False), (False, True)]
    given = [
        agreement.submit(step, [torch.tensor(step + 0.5)], torch.tensor(2.0 * step), stop=stop, checkpoint_due=due)
        for step, (stop, due) in enumerate(flags)
    ]
    assert given == [None, StepFacts(0, 0.5, 0.0, False, False), StepFacts(1, 1.5, 2.0, True, False)]
    assert agreement.collect() == StepFacts(2, 2.5, 4.0, False, True)
    assert agreement.collect() is None


def test_a_number_that_is_not_finite_comes_through() -> None:
    agreement = StepAgreement(Distributed(0, 0, 1, CPU))
    agreement.submit(0, [torch.tensor(float("nan"))], torch.tensor(float("inf")), stop=False, checkpoint_due=False)
    facts = agreement.collect()
    assert facts is not None
    assert math.isnan(facts.loss)
    assert math.isinf(facts.gradient_norm)


def test_losses_and_flags_of_two_ranks_are_summed_and_the_norm_is_the_one_that_both_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Done:
        def wait(self) -> None:
            values.add_(torch.tensor([0.25, 1.5, -0.5, 1.0, 0.0]))  # the other rank: its shares, half the norm, stop

    values = torch.zeros(5)

    def all_reduce(tensor: Tensor, *, async_op: bool) -> Done:
        nonlocal values
        assert async_op
        values = tensor
        return Done()

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    agreement = StepAgreement(Distributed(0, 0, 2, CPU))
    losses = [torch.tensor(0.5), torch.tensor(-0.25)]  # the second a technique's
    agreement.submit(7, losses, torch.tensor(3.0), stop=False, checkpoint_due=True)
    assert agreement.collect() == StepFacts(7, 0.75, 3.0, True, True, (-0.75,))
    agreement.submit(8, losses, torch.tensor(3.0), stop=False, checkpoint_due=False)
    assert agreement.collect() == StepFacts(8, 0.75, 3.0, True, False, (-0.75,))
