"""The history and the clock that the report is drawn from."""

import pytest

from atelier_runtime.reporter import History, PhaseClock


def test_phases_inside_each_other_add_up_to_the_time_that_passed() -> None:
    now = iter([0.0, 10.0, 14.0, 20.0])
    seconds: dict[str, float] = {}
    clock = PhaseClock(seconds, lambda: next(now))
    with clock.phase("training"), clock.phase("sampling"):
        pass
    assert seconds == {"training": 16.0, "sampling": 4.0}


def test_a_phase_that_fails_is_counted_and_the_outer_one_goes_on() -> None:
    now = iter([0.0, 1.0, 3.0, 6.0])
    seconds: dict[str, float] = {}
    clock = PhaseClock(seconds, lambda: next(now))
    with clock.phase("training"), pytest.raises(RuntimeError), clock.phase("sampling"):
        raise RuntimeError
    assert seconds == {"training": 4.0, "sampling": 2.0}


def test_a_resumed_history_forgets_the_steps_that_are_trained_again() -> None:
    rows = [(step, 0.5 + step, 0.1, 1e-4) for step in range(10)]
    history = History(rows, {"training": 3.0}, {0: ["a"], 4: ["b"], 8: ["c"]}, ["resumed at step 2"])
    history.techniques["layerSync"] = [(step, -0.1 * step) for step in range(10)]
    read = History.from_bytes(history.to_bytes(), before_step=6)
    assert read.rows == rows[:6]
    assert read.samples == {0: ["a"], 4: ["b"]}
    assert read.seconds == {"training": 3.0}
    assert read.events == ["resumed at step 2"]
    assert read.techniques == {"layerSync": [(step, -0.1 * step) for step in range(6)]}
