"""The learning rate of each step against closed forms."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atelier_api.v1alpha1.hyperparameters import Hyperparameters, LearningRateSchedule
from atelier_runtime.optimizers import learning_rate_at

PEAK = 2e-4


def rates(steps: int, **schedule: object) -> list[float]:
    hyperparameters = Hyperparameters(steps=steps, schedule=LearningRateSchedule(**schedule))
    return [learning_rate_at(step, hyperparameters, PEAK) for step in range(steps)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        pytest.param({"type": "constant"}, [1, 1, 1, 1, 1], id="constant"),
        pytest.param({"type": "constant", "warmup_steps": 3}, [1 / 4, 2 / 4, 3 / 4, 1, 1], id="warm-up"),
        pytest.param({"type": "linear"}, [1, 3 / 4, 2 / 4, 1 / 4, 0], id="linear"),
        pytest.param({"type": "linear", "end": 0.5}, [1, 7 / 8, 6 / 8, 5 / 8, 1 / 2], id="linear to an end"),
        pytest.param({"type": "linear", "warmup_steps": 2}, [1 / 3, 2 / 3, 1, 1 / 2, 0], id="linear after a warm-up"),
        pytest.param(
            {"type": "cosine"}, [(1 + math.cos(math.pi * p / 4)) / 2 for p in range(5)], id="cosine"
        ),
        pytest.param(
            {"type": "cosine", "end": 0.2}, [0.2 + 0.8 * (1 + math.cos(math.pi * p / 4)) / 2 for p in range(5)],
            id="cosine to an end",
        ),
        pytest.param({"type": "polynomial"}, [(1 - p / 4) ** 0.8 for p in range(5)], id="polynomial, power 0.8"),
        pytest.param({"type": "polynomial", "power": 2.0}, [(1 - p / 4) ** 2 for p in range(5)], id="polynomial, power 2"),
    ],
)  # fmt: skip
def test_the_rate_of_each_step_is_its_closed_form(schedule: dict[str, object], expected: list[float]) -> None:
    assert rates(5, **schedule) == pytest.approx([PEAK * factor for factor in expected], abs=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial"])
def test_a_run_that_ends_with_its_warm_up_never_falls(kind: str) -> None:
    assert rates(3, type=kind, warmup_steps=3) == pytest.approx([PEAK / 4, PEAK / 2, PEAK * 3 / 4])
    assert rates(1, type=kind) == [PEAK]


@given(
    st.integers(1, 200), st.integers(0, 200), st.sampled_from(["constant", "linear", "cosine", "polynomial"]),
    st.floats(0, 1),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_the_rate_rises_then_falls_and_stays_between_nothing_and_the_peak(
    steps: int, warmup: int, kind: str, end: float
) -> None:
    found = rates(steps, type=kind, warmup_steps=warmup, end=end)
    top = min(warmup, steps - 1)
    assert all(early < late for early, late in pairwise(found[: top + 1]))
    assert all(early >= late for early, late in pairwise(found[top:]))
    assert all(0 <= rate <= PEAK * (1 + 1e-12) for rate in found)
    assert found[0] > 0


def test_steps_after_the_last_keep_its_rate() -> None:
    hyperparameters = Hyperparameters(steps=5, schedule=LearningRateSchedule(type="linear", end=0.1))
    assert learning_rate_at(99, hyperparameters, PEAK) == learning_rate_at(4, hyperparameters, PEAK)
