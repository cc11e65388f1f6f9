"""What the tests of strategies share: cases with data to train on, and what it means that two trainings agree."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from family_cases import make_case
from training_ranks import Case, Trained, samples_of

EACH_KIND = ("sd3", "sd15", "wan", "hidream", "qwen_image", "ace_step")
"""Tokens, maps, clips, routed experts, layers that are dead by design, sounds: for what is tried of one family of each kind."""

CAPTIONS = ("a fox", "a lighthouse in the fog", "", "two red cars")


def prepared(cases: Sequence[Case]) -> list[Case]:
    """The cases with samples of their families; writes the tiny checkpoints into their folders."""
    ready = []
    for tiny, folder in dict.fromkeys((case.tiny, case.folder) for case in cases):
        made = make_case(tiny)
        made.pipe.save_pretrained(folder)
        samples = samples_of(made, CAPTIONS)
        ready += [replace(case, samples=samples) for case in cases if case.tiny == tiny]
    return ready


def distance(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """How far the weights are apart, as a fraction of how far training moved them."""
    assert found.keys() == expected.keys()
    apart = sum((found[name].double() - expected[name].double()).square().sum() for name in expected)
    moved = sum((expected[name].double() - start[name].double()).square().sum() for name in expected)
    assert moved > 0
    return float((apart / moved).sqrt())


def assert_same_training(together: Trained, alone: Trained) -> None:
    """Several processes have trained in fp32 what one does, and predict the same where the case draws."""
    assert all(torch.equal(together.before[name], weight) for name, weight in alone.before.items())
    assert together.losses == pytest.approx(alone.losses, rel=1e-5)
    assert together.norms == pytest.approx(alone.norms, rel=1e-5)
    assert distance(together.weights, alone.weights, alone.before) < 1e-4
    assert distance(together.averages, alone.averages, alone.before) < 1e-4
    torch.testing.assert_close(together.drawn, alone.drawn, rtol=1e-4, atol=1e-5)


def assert_near_training(together: Trained, alone: Trained, *, weights: float = 0.03) -> None:
    """The same in bf16. `weights` is how far they may be apart, as a fraction of how far training moved them."""
    assert together.losses == pytest.approx(alone.losses, rel=2e-3)
    assert together.norms == pytest.approx(alone.norms, rel=1e-2)
    assert distance(together.weights, alone.weights, alone.before) < weights
    assert distance(together.averages, alone.averages, alone.before) < weights
