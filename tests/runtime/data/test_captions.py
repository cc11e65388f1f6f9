import pytest

from atelier_api.v1alpha1.data import Captions
from atelier_runtime.data.captions import alternatives, chosen, is_dropped


@pytest.mark.parametrize(
    ("sidecar", "spec", "expected"),
    [
        pytest.param("a cat\n", {}, ("a cat",), id="one line"),
        pytest.param("a cat\n\n  the cat  \n", {}, ("a cat", "the cat"), id="lines are alternatives"),
        pytest.param("a cat\na cat\n", {}, ("a cat",), id="the same twice counts once"),
        pytest.param("a cat", {"trigger": "sks"}, ("sks, a cat",), id="trigger"),
        pytest.param(None, {}, (), id="no file"),
        pytest.param(" \n", {}, (), id="empty file"),
        pytest.param(None, {"fallback": "a thing"}, ("a thing",), id="fallback"),
        pytest.param(" \n", {"fallback": "a thing"}, ("a thing",), id="fallback for an empty file"),
        pytest.param("a cat", {"fallback": "a thing"}, ("a cat",), id="fallback is not needed"),
        pytest.param(None, {"fallback": "a thing", "trigger": "sks"}, ("sks, a thing",), id="trigger and fallback"),
        pytest.param(None, {"fallback": "", "trigger": "sks"}, ("sks",), id="trigger alone"),
        pytest.param(None, {"fallback": ""}, ("",), id="the empty caption on purpose"),
    ],
)
def test_captions_come_from_the_sidecar_or_the_fallback_behind_the_trigger(
    sidecar: str | None, spec: dict[str, str], expected: tuple[str, ...]
) -> None:
    assert alternatives(sidecar, Captions.model_validate(spec)) == expected


def test_alternatives_are_drawn_evenly_and_change_with_epoch_and_sample() -> None:
    draws = [chosen(4, seed=1, epoch=epoch, sample=sample) for epoch in range(100) for sample in range(100)]
    for alternative in range(4):
        assert abs(draws.count(alternative) - 2500) < 5 * (10_000 * 0.25 * 0.75) ** 0.5
    assert len({tuple(draws[i : i + 100]) for i in range(0, 10_000, 100)}) == 100
    assert draws == [chosen(4, seed=1, epoch=epoch, sample=sample) for epoch in range(100) for sample in range(100)]


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_dropout_has_its_frequency_over_ten_thousand_draws(probability: float) -> None:
    drops = sum(is_dropped(probability, seed=3, step=step, slot=slot) for step in range(1000) for slot in range(10))
    assert abs(drops - 10_000 * probability) < 4 * (10_000 * probability * (1 - probability)) ** 0.5


def test_dropout_is_off_at_zero_and_total_at_one() -> None:
    assert not any(is_dropped(0.0, seed=3, step=step, slot=0) for step in range(1000))
    assert all(is_dropped(1.0, seed=3, step=step, slot=0) for step in range(1000))


def test_dropout_depends_on_seed_step_and_slot() -> None:
    def drops(seed: int, slot: int) -> list[bool]:
        return [is_dropped(0.5, seed=seed, step=step, slot=slot) for step in range(64)]

    assert drops(1, 0) == drops(1, 0)
    assert drops(1, 0) != drops(2, 0)
    assert drops(1, 0) != drops(1, 1)
