"""G1, G1b, G3: a training step on a GPU, ours and that of diffusers' example trainers, eager and with compiled blocks.

The contestants do not take turns, since two copies of a network need not fit: each runs alone, 10 steps to warm up, 30 timed with
events of the device, 3 under the profiler.
"""

import functools
import gc
import statistics
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gauge import GIB, Gauge, Reading
from gpu_peer import GpuPeer
from gpu_run import EncodedSamples, build, prediction, random_denoiser, run_file
from pairs import Row, at_most
from torch.utils.flop_counter import FlopCounterMode
from workloads import Workload

from atelier_operator.planner.memory import Parts as MemoryParts
from atelier_runtime import parallel
from atelier_runtime.data.order import Slot
from atelier_runtime.families import get_family
from atelier_runtime.family import Conditions
from atelier_runtime.trainer import Trainer

DENSE_BF16 = 989e12
"""Floating-point operations per second of an H100 or H200 in bf16, by the datasheet: what MFU is a part of."""

LOSS_TOLERANCE = 0.1
"""How far apart the mean losses of two contestants may be: they draw other noise and other timesteps."""

LOSSES = 20
"""Steps whose losses are compared."""

TARGETS = {("G1", 1): 0.31, ("G3", 1): 0.055}
"""Seconds per step that performance.md asks for, by workload and batch."""

Tell = Callable[[Row], None]


@dataclass(frozen=True)
class Trained:
    """What came of a loop. `predicted` is the planner's, for our own."""

    reading: Reading
    losses: list[float]
    predicted: MemoryParts | None = None


def ours(work: Workload, gauge: Gauge, distributed: parallel.Distributed, *, compiled: bool = False) -> Trained:
    """The trainer itself. Blocks are compiled before the strategy wraps the network."""
    with tempfile.TemporaryDirectory(prefix="atelier-bench-") as folder:
        file = run_file(work, Path(folder), distributed.device)
        parts = build(work, file, Path(folder), distributed, compiled=compiled)
        try:
            Trainer(parts, gauge.stop_requested).run(_no_samples)
        finally:
            parts.checkpointer.close()
        losses = [loss for _, loss, _, _ in parts.reporter.history.rows]
        return Trained(gauge.reading(), losses, prediction(file, work).train)


def peer(work: Workload, gauge: Gauge, distributed: parallel.Distributed, *, compiled: bool = False) -> Trained:
    with tempfile.TemporaryDirectory(prefix="atelier-bench-") as folder:
        loop = GpuPeer(work, run_file(work, Path(folder), distributed.device), distributed.device, compiled=compiled)
        loop.step()
        while not gauge.stop_requested():
            loop.step()
        return Trained(gauge.reading(), loop.losses)


CONTESTANTS: dict[str, tuple[Callable[..., Trained], bool]] = {
    "ours": (ours, False),
    "peer": (peer, False),
    "ours, blocks compiled": (ours, True),
    "peer, blocks compiled": (peer, True),
}


def attempt(loop: Callable[[], Trained], device: torch.device) -> Trained | str:
    """What came of it, or why it failed, out of memory for one: the others still run. The memory is free again."""
    try:
        return loop()
    except Exception as error:
        # Before anything else: after an illegal access, freeing the tensors of the frames ends the process.
        traceback.print_exc()
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        free_memory(device)


def operations(work: Workload, distributed: parallel.Distributed) -> tuple[float, float]:
    """(2F + A, F) per sample: floating-point operations of a LoRA step without recompute, and of a forward pass.

    F is counted while a forward pass of one sample runs (matrix products, convolutions, attention; a multiply-add is two), A the part
    of attention.
    """
    device, family = distributed.device, get_family(work.family)
    model = random_denoiser(work, device)
    with tempfile.TemporaryDirectory(prefix="atelier-bench-") as folder:
        samples = EncodedSamples(work, run_file(work, Path(folder), device), model, device)
    sample = samples.load([Slot(sample=0, weight=1.0, index=0)], step=0, epoch=0)
    text = {key: value.to(device) for key, value in family.collate_text(sample.text).items()}
    conditions = Conditions(text, sample.sizes.to(device), frame_rate=samples.frame_rate)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16), counter:
        family.predict(model, sample.latents.to(device), torch.full((1,), 0.5, device=device), conditions)
    by_kind = counter.get_flop_counts()["Global"]
    attention = sum(number for kind, number in by_kind.items() if "attention" in str(kind))
    forward = sum(by_kind.values())
    return 2.0 * forward + attention, float(forward)


def measure(
    work: Workload, distributed: parallel.Distributed, *, steps: tuple[int, int, int], compiled: bool, tell: Tell
) -> dict[str, Any]:
    """Everything raw of one workload; `tell` is given the row of each contestant as it comes."""
    lora_flops, forward_flops = operations(work, distributed)
    free_memory(distributed.device)
    warm, timed, profiled = steps
    raw: dict[str, Any] = {
        "id": work.id,
        "title": work.title,
        "tflop_per_sample": lora_flops / 1e12,
        "forward_tflop": forward_flops / 1e12,
        "contestants": {},
    }
    for name, (loop, compiles) in CONTESTANTS.items():
        if compiles and not compiled:
            continue
        gauge = Gauge(distributed.device, warm=warm, timed=timed, profiled=profiled)
        started = functools.partial(loop, work, gauge, distributed, compiled=compiles)
        trained = attempt(started, distributed.device)
        one = {"failed": trained} if isinstance(trained, str) else _columns(trained, work, lora_flops)
        raw["contestants"][name] = one
        tell(_row(work, name, one))
    return raw


def _columns(trained: Trained, work: Workload, flops: float) -> dict[str, Any]:
    seconds = trained.reading.median
    return {
        **trained.reading.columns(),
        "samples_per_second": work.batch / seconds,
        "mfu": flops * work.batch / seconds / DENSE_BF16,
        "mean_loss": statistics.fmean(trained.losses[:LOSSES]),
    }


def free_memory(device: torch.device) -> None:
    """Give back what the last contestant held, and forget what was compiled for it."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _row(work: Workload, name: str, one: dict[str, Any]) -> Row:
    what = f"{work.title}: {name}"
    if "failed" in one:
        return Row(work.id, what, one["failed"])
    target = TARGETS.get((work.id, work.batch)) if name.startswith("ours") and not work.shrink else None
    goal = at_most(one["median"], target, f"{target:g} s") if target else ()
    measured = (
        f"{one['median']:.4f} s/step (p95 {one['p95']:.4f}), {one['samples_per_second']:.2f} samples/s, MFU {one['mfu']:.1%}, "
        f"{one['allocated'] / GIB:.1f} GiB; {one['launches']:.0f} launches, {one['waits']:.1f} waits, kernels "
        f"{one['busy']:.0%} of the step"
    )
    return Row(work.id, what, measured, *goal)


def _ratios(raw: dict[str, Any]) -> Iterator[Row]:
    run = {name: one for name, one in raw["contestants"].items() if "failed" not in one}
    for kind in ("", ", blocks compiled"):
        mine, theirs = run.get(f"ours{kind}"), run.get(f"peer{kind}")
        if mine is None or theirs is None:
            continue
        loss = mine["mean_loss"] / theirs["mean_loss"]
        valid = "" if abs(loss - 1) <= LOSS_TOLERANCE else "VOID, the losses differ: "
        faster = theirs["median"] / mine["median"]
        text = f"{valid}{faster:.3f} times as fast; mean loss of {LOSSES} steps, ours / peer, {loss:.3f}"
        yield Row(raw["id"], f"{raw['title']}: ours over the peer{kind}", text)


def run(
    work: Workload, distributed: parallel.Distributed, *, steps: tuple[int, int, int], compiled: bool, tell: Tell
) -> list[dict[str, Any]]:
    """`compiled`: with the contestants whose blocks are compiled, which costs a minute each."""
    raw = measure(work, distributed, steps=steps, compiled=compiled, tell=tell)
    for row in _ratios(raw):
        tell(row)
    return [raw]


def _no_samples(_step: int) -> None:
    """The benchmark's runs have no prompts."""
