"""G1, G1b, G3: a training step on a GPU, ours and that of diffusers' example trainers, eager and with compiled blocks.

The contestants do not take turns, since two copies of a network need not fit: each runs alone, 10 steps to warm up, 30 timed with
events of the device, 3 under the profiler.
"""

import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gauge import GIB, Gauge, Reading
from gpu_peer import GpuPeer
from gpu_run import build, prediction, random_denoiser, run_file, text_features
from pairs import Findings, Row, at_most
from torch.utils.flop_counter import FlopCounterMode
from workloads import Workload

from atelier_api.families import FAMILIES
from atelier_operator.planner import table_facts
from atelier_runtime import parallel
from atelier_runtime.families import get_family
from atelier_runtime.family import Conditions
from atelier_runtime.trainer import Trainer

DENSE_BF16 = 989e12
"""Floating-point operations per second of an H100 or H200 in bf16, by the datasheet: what MFU is a part of."""

LOSS_TOLERANCE = 0.1
"""How far apart the mean losses of two contestants may be: they draw other noise and other timesteps."""

TARGETS = {("G1", 1): 0.31, ("G3", 1): 0.055}
"""Seconds per step that performance.md asks for, by workload and batch."""


def ours(work: Workload, gauge: Gauge, distributed: parallel.Distributed, *, compiled: bool) -> dict[str, Any]:
    """The trainer itself. Blocks are compiled before the strategy wraps the network."""
    with tempfile.TemporaryDirectory(prefix="atelier-bench-") as folder:
        file = run_file(work, Path(folder), distributed.device)
        parts = build(work, file, Path(folder), distributed, compiled=compiled)
        try:
            Trainer(parts, gauge.stop_requested).run(_no_samples)
            losses = [loss for _, loss, _, _ in parts.reporter.history.rows]
            expected = prediction(file, work).train
            # The profiler keeps no tensors, and the trainer's save is after the peak was read.
            return {
                "reading": gauge.reading(),
                "losses": losses,
                "predicted": expected.total,
                "overhead": expected.overhead,
            }
        finally:
            parts.checkpointer.close()


def peer(work: Workload, gauge: Gauge, distributed: parallel.Distributed, *, compiled: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="atelier-bench-") as folder:
        loop = GpuPeer(work, run_file(work, Path(folder), distributed.device), distributed.device, compiled=compiled)
        loop.step()
        while not gauge.stop_requested():
            loop.step()
        return {"reading": gauge.reading(), "losses": loop.losses}


Contestant = Callable[..., dict[str, Any]]
CONTESTANTS: dict[str, tuple[Contestant, bool]] = {
    "ours": (ours, False),
    "peer": (peer, False),
    "ours, blocks compiled": (ours, True),
    "peer, blocks compiled": (peer, True),
}


def operations(work: Workload, device: torch.device) -> tuple[float, float]:
    """(2F + A, F) per sample: floating-point operations of a LoRA step without recompute, and of a forward pass.

    F is counted while a forward pass runs (matrix products, convolutions, attention; a multiply-add is two), A the part of attention.
    """
    model = random_denoiser(work, device)
    with tempfile.TemporaryDirectory(prefix="atelier-bench-") as folder:
        facts = table_facts(run_file(work, Path(folder), device).spec.model)
    family, known = get_family(work.family), FAMILIES[work.family]
    text = {key: value.to(device) for key, value in text_features(model, facts.text_tokens).items()}
    edge = work.edge // known.latent_factor
    noisy = torch.randn(1, known.latent_channels, edge, edge, device=device, dtype=torch.bfloat16)
    size = torch.tensor([[work.edge, work.edge, 0, 0, work.edge, work.edge]], device=device, dtype=torch.float32)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16), counter:
        family.predict(model, noisy, torch.full((1,), 0.5, device=device), Conditions(text, size))
    by_kind = counter.get_flop_counts()["Global"]
    attention = sum(number for kind, number in by_kind.items() if "attention" in str(kind))
    forward = sum(by_kind.values())
    return 2.0 * forward + attention, float(forward)


def measure(
    work: Workload, distributed: parallel.Distributed, *, steps: tuple[int, int, int], compiled: bool
) -> dict[str, Any]:
    """Everything raw of one workload. A contestant that fails is reported with its error; the others still run."""
    lora_flops, forward_flops = operations(work, distributed.device)
    free_memory(distributed.device)
    found: dict[str, Any] = {}
    for name, (run, compiles) in CONTESTANTS.items():
        if compiles and not compiled:
            continue
        warm, timed, profiled = steps
        gauge = Gauge(distributed.device, warm=warm, timed=timed, profiled=profiled)
        began = time.perf_counter()
        try:
            one = run(work, gauge, distributed, compiled=compiles)
        except RuntimeError as error:  # out of memory too
            found[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        else:
            found[name] = _columns(one, work, lora_flops)
        found[name]["seconds"] = time.perf_counter() - began
        print(f"{work.id} {name}: {found[name]}", flush=True)
        free_memory(distributed.device)
    return {
        "id": work.id,
        "title": work.title,
        "batch": work.batch,
        "tflop_per_sample": lora_flops / 1e12,
        "forward_tflop": forward_flops / 1e12,
        "contestants": found,
    }


def _columns(one: dict[str, Any], work: Workload, flops: float) -> dict[str, Any]:
    reading: Reading = one["reading"]
    first = one["losses"][:20]
    return {
        **reading.columns(),
        "samples_per_second": work.batch / reading.median,
        "mfu": flops * work.batch / reading.median / DENSE_BF16,
        "mean_loss": sum(first) / len(first),
        **{key: one[key] for key in ("predicted", "overhead") if key in one},
    }


def free_memory(device: torch.device) -> None:
    """Give back what the last contestant held, and forget what was compiled for it."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def rows(raw: dict[str, Any]) -> list[Row]:
    """What `measure` found, for the table."""
    found = []
    for name, one in raw["contestants"].items():
        what = f"{raw['title']}: {name}"
        if "failed" in one:
            found.append(Row(raw["id"], what, one["failed"]))
            continue
        target = TARGETS.get((raw["id"], raw["batch"])) if name.startswith("ours") else None
        goal = at_most(one["median"], target, f"{target:g} s") if target else ()
        measured = (
            f"{one['median']:.4f} s/step (p95 {one['p95']:.4f}), {one['samples_per_second']:.2f} samples/s, MFU {one['mfu']:.1%}, "
            f"{one['allocated'] / GIB:.1f} GiB; {one['launches']:.0f} launches, {one['waits']:.1f} waits, kernels "
            f"{one['busy']:.0%} of the step"
        )
        found.append(Row(raw["id"], what, measured, *goal))
    return found + _ratios(raw)


def _ratios(raw: dict[str, Any]) -> list[Row]:
    found = []
    run = {name: one for name, one in raw["contestants"].items() if "failed" not in one}
    for kind in ("", ", blocks compiled"):
        mine, theirs = run.get(f"ours{kind}"), run.get(f"peer{kind}")
        if mine is None or theirs is None:
            continue
        loss = mine["mean_loss"] / theirs["mean_loss"]
        valid = "" if abs(loss - 1) <= LOSS_TOLERANCE else "VOID, the losses differ: "
        faster = theirs["median"] / mine["median"]
        text = f"{valid}{faster:.3f} times as fast; mean loss of 20 steps, ours / peer, {loss:.3f}"
        found.append(Row(raw["id"], f"{raw['title']}: ours over the peer{kind}", text))
    return found


def run(work: Workload, distributed: parallel.Distributed, *, steps: tuple[int, int, int], compiled: bool) -> Findings:
    """`compiled`: with the contestants whose blocks are compiled, which costs a minute each."""
    raw = measure(work, distributed, steps=steps, compiled=compiled)
    return Findings(rows(raw), {"workloads": [raw]})


def _no_samples(_step: int) -> None:
    """The benchmark's runs have no prompts."""
