"""C1: what a training loop costs over the bare forward and backward pass of the same network on the same batch. C2: the wait share.

The contestants take turns of a few steps in one process:

* ours: the trainer, with its loader, objective, clipping, optimizer, metrics and progress;
* bare: forward and backward of a micro-batch that lies ready, on the same network;
* peer: the loop of diffusers' example trainers, with torch's default AdamW and with the fused one.

Ours is driven through the trainer's question whether to stop, which it asks once per step, after the pass and the optimizer: when a
turn is over, the answer is late, and the others have theirs. The loader has caught up by then, so none of its work hides in the
others' time. Every turn begins with a step that is not measured: it fills the processor's caches, which the others have emptied.
A last stretch runs under a profiler that counts the calls.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_run import BenchRun, bench_run
from pairs import CallCounter, Findings, Row, Turns, at_most, count_calls, difference, ratio
from peer_loop import BareLoop, PeerLoop, cpu_parts

from atelier_runtime.trainer import Trainer

WARM_UP_TURNS = 2
COUNTED_STEPS = 50
COUNTED_STEP_SECONDS = 0.01
"""What the clock of periodic work says of a counted step: flushes come every 25 steps, progress every 50."""

OTHERS = ("bare", "accelerate", "accelerate, fused AdamW")


class Contest:
    """The trainer's stop question, answered late: a turn of ours ends there, the others have theirs, and the next one begins."""

    def __init__(self, run: BenchRun, others: dict[str, Callable[[], None]], *, turns: int, turn_steps: int) -> None:
        self.ours = Turns()
        self.others = {name: Turns() for name in others}
        self.wait_share = 0.0
        self._run = run
        self._steps_of = others
        self._turns = turns + WARM_UP_TURNS
        self._turn_steps = turn_steps
        self._steps = 0
        self._own_seconds = 0.0
        self._waited_before = 0.0
        self._turn_began = 0.0

    def stop_requested(self) -> bool:
        turn, place = divmod(self._steps, self._turn_steps + 1)
        self._steps += 1
        if place == 0:
            self.ours.__enter__()  # the step before was the first one of the turn
        elif place == self._turn_steps:
            self.ours.__exit__()
            self._add_up(turn)
            if turn + 1 == self._turns:
                return True
            self._run.clock.pause()
            self._others_turn()
            self._run.clock.go_on()
            self._turn_began = time.perf_counter()
        return False

    def _others_turn(self) -> None:
        for name, step in self._steps_of.items():
            step()
            with self.others[name]:
                for _ in range(self._turn_steps):
                    step()

    def _add_up(self, turn: int) -> None:
        """The share of ours' time, all steps of its turns, that it has waited for data."""
        if turn < WARM_UP_TURNS:
            self._waited_before = self._run.reporter.data_wait_seconds
            return
        self._own_seconds += time.perf_counter() - self._turn_began
        self.wait_share = (self._run.reporter.data_wait_seconds - self._waited_before) / self._own_seconds


class Count:
    """Counts the calls of `COUNTED_STEPS` steps of the trainer, then stops it."""

    def __init__(self, run: BenchRun) -> None:
        self.counter = CallCounter()
        self._run = run
        self._steps = 0

    def stop_requested(self) -> bool:
        self.counter.is_on = False
        self._steps += 1
        self._run.clock.step()
        counted = self._steps - WARM_UP_TURNS
        self.counter.is_on = 0 <= counted < COUNTED_STEPS
        return counted >= COUNTED_STEPS

    def per_step(self) -> tuple[float, float]:
        """(calls of the trainer's thread, of the loader's thread)."""
        return self.counter.here / COUNTED_STEPS, self.counter.elsewhere / COUNTED_STEPS


def measure(batch_size: int, *, turns: int, turn_steps: int) -> dict[str, Any]:
    """Everything raw at one batch size."""
    steps = (turns + WARM_UP_TURNS) * (turn_steps + 1) + COUNTED_STEPS + 20
    with tempfile.TemporaryDirectory(prefix="atelier-bench-") as folder:
        run = bench_run(Path(folder), batch_size=batch_size, steps=steps)
        try:
            bare, peer = BareLoop(run.parts), PeerLoop(cpu_parts(run.parts))
            fused = PeerLoop(cpu_parts(run.parts, fused=True))
            loops = dict(zip(OTHERS, (bare.step, peer.step, fused.step), strict=True))
            contest = Contest(run, loops, turns=turns, turn_steps=turn_steps)
            Trainer(run.parts, contest.stop_requested).run(_no_samples)
            calls = _count(run, loops)
        finally:
            run.parts.checkpointer.close()
        measured = {"ours": contest.ours, **contest.others}
        seconds = {name: _measured(turns_of_one, turns) for name, turns_of_one in measured.items()}
        losses = {"ours": run.losses, "accelerate": peer.losses}
    return {
        "batch_size": batch_size,
        "turn_steps": turn_steps,
        "seconds_per_turn": seconds,
        "calls_per_step": calls,
        "wait_share": contest.wait_share,
        "mean_loss": {name: statistics.fmean(values[: turns * (turn_steps + 1)]) for name, values in losses.items()},
    }


def _count(run: BenchRun, loops: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Python and C calls of a step."""
    run.clock.go_by_steps(COUNTED_STEP_SECONDS)
    count = Count(run)
    count.counter.install()
    try:
        Trainer(run.parts, count.stop_requested).run(_no_samples)
    finally:
        count.counter.remove()
    trainer, loader = count.per_step()
    others = {name: count_calls(lambda step=step: [step() for _ in range(8)]) / 8 for name, step in loops.items()}
    return {"ours": trainer, "ours, loader thread": loader, **others}


def _measured(turns: Turns, count: int) -> dict[str, list[float]]:
    """The last `count` turns: of the others' turns, each is the one right before that of ours."""
    return {kind: values[-count:] for kind, values in turns.columns().items()}


def _no_samples(_step: int) -> None:
    """The benchmark's run has no prompts."""


def rows(raw: dict[str, Any]) -> list[Row]:
    """What `measure` found, for the table."""
    seconds, steps = raw["seconds_per_turn"], raw["turn_steps"]
    step_ms = 1e3 * statistics.median(seconds["bare"]["thread_seconds"]) / steps
    shape = f"batch {raw['batch_size']}, bare step {step_ms:.0f} ms CPU"
    found = []
    for name in ("ours", *OTHERS[1:]):
        for kind, label in (("thread_seconds", "CPU of the thread"), ("wall_seconds", "wall")):
            over = ratio(seconds[name][kind], seconds["bare"][kind])
            goal = at_most(over.median, 1.01, "1.01", excess=True) if name == "ours" and step_ms > 50 else ()
            found.append(Row("C1", f"loop / bare pass, {name}, {shape}, {label}", str(over), *goal))
    for name in ("ours", *OTHERS[1:]):
        us = {kind: 1e6 * difference(seconds[name][kind], seconds["bare"][kind]) / steps for kind in seconds[name]}
        measured = f"{us['thread_seconds']:.0f} µs CPU ({us['process_seconds']:.0f} of all threads, wall {us['wall_seconds']:.0f})"
        goal = at_most(us["thread_seconds"], 250, "250 µs") if name == "ours" else ()
        found.append(Row("C1", f"added per step, {name}, batch {raw['batch_size']}", measured, *goal))
    calls = added_calls(raw)
    for name, number in calls.items():
        found.append(Row("C1", f"calls added per step, {name}, batch {raw['batch_size']}", f"{number:.0f}"))
    share = calls["ours"] / calls["accelerate"]
    goal = at_most(share, 0.25, "0.25")
    found.append(Row("C1", f"calls added, ours / accelerate, batch {raw['batch_size']}", f"{share:.3f}", *goal))
    loss = raw["mean_loss"]["ours"] / raw["mean_loss"]["accelerate"]
    found.append(Row("C1", f"mean loss, ours / accelerate, batch {raw['batch_size']}", f"{loss:.2f}"))
    wait = raw["wait_share"]
    found.append(
        Row("C2", f"share of wall time waiting for data, {shape}", f"{wait:.2%}", *at_most(wait, 0.003, "0.3 %"))
    )
    return found


def added_calls(raw: dict[str, Any]) -> dict[str, float]:
    """Calls per step over those of the bare pass; of our loader's thread, all of them."""
    calls = dict(raw["calls_per_step"])
    bare = calls.pop("bare")
    return {name: number if name.endswith("thread") else number - bare for name, number in calls.items()}


def run(*, quick: bool) -> Findings:
    """Two batch sizes: a step of some 20 ms and one of some 100 ms; only the first when quick."""
    shapes = [(1, 3, 4)] if quick else [(1, 25, 6), (24, 15, 2)]
    raw = [measure(batch, turns=turns, turn_steps=steps) for batch, turns, steps in shapes]
    return Findings([row for one in raw for row in rows(one)], {"shapes": raw})
