"""C1: what a training loop costs over the bare forward and backward pass of the same model on the same batch.

Three loops over the demo's base model (LoRA, flow matching), in turns of a few steps:

* bare: forward and backward of one cached micro-batch;
* ours: the trainer with its loader, objective, clipping, optimizer, metrics and progress;
* peer: the loop of diffusers' example trainers (accelerate, DataLoader over cached latents, clipping, AdamW, scheduler, `.item()`, tqdm).

Ours is driven through the trainer's own sample hook: each time it pauses, the other two run.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from bench_run import bench_parts
from peft import LoraConfig
from pairs import Ratio, count_calls, ratio

from atelier_runtime.family import Conditions
from atelier_runtime.trainer import Parts, Trainer

STEPS_PER_TURN = 4


def measure(batch_size: int, turns: int) -> dict[str, object]:
    """Paired ratios and Python calls per step at one batch size."""
    with tempfile.TemporaryDirectory() as folder:
        steps = STEPS_PER_TURN * (turns + 2)
        parts = bench_parts(Path(folder), batch_size=batch_size, steps=steps, sample_every=STEPS_PER_TURN)
        peer, bare = PeerLoop(parts), BareLoop(parts)
        ours_seconds, peer_seconds, bare_seconds = [], [], []
        started = time.perf_counter()

        def turn(_step: int) -> None:
            nonlocal started
            ours_seconds.append(time.perf_counter() - started)
            bare_seconds.append(bare.run(STEPS_PER_TURN))
            peer_seconds.append(peer.run(STEPS_PER_TURN))
            started = time.perf_counter()

        Trainer(parts, lambda: False).run(turn)
        parts.checkpointer.close()
        ours, theirs, floor = (values[1:] for values in (ours_seconds, peer_seconds, bare_seconds))
        step = sorted(floor)[len(floor) // 2] / STEPS_PER_TURN
        over = [(a - b) / STEPS_PER_TURN for a, b in zip(ours, floor, strict=True)]
        return {
            "step_ms": 1e3 * step,
            "ours_over_bare": ratio(ours, floor),
            "peer_over_bare": ratio(theirs, floor),
            "added_us_per_step": 1e6 * sorted(over)[len(over) // 2],
            "peer_calls": peer.calls(),
            "bare_calls": bare.calls(),
        }


class BareLoop:
    """Forward and backward of one micro-batch, nothing else."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        batch = parts.dataset.load(parts.dataset.order.batch(0).slots, step=0, epoch=0)
        generators = [torch.Generator().manual_seed(i) for i in range(len(batch.slots))]
        stage = parts.denoisers.stages[0]
        self._prepared = parts.objective.prepare(batch.latents.float(), generators, stage=stage, tokens=16)
        self._conditions = Conditions(parts.family.collate_text(batch.text), batch.sizes)
        self._model = parts.denoisers.wrapped[stage.denoiser]

    def _step(self) -> None:
        prediction = self._parts.family.predict(self._model, self._prepared.noisy, self._prepared.time, self._conditions)
        torch.nn.functional.mse_loss(prediction, self._prepared.target).backward()

    def run(self, steps: int) -> float:
        kept = {parameter: parameter.grad for parameter in self._parts.state.parameters.values()}
        started = time.perf_counter()
        for _ in range(steps):
            self._step()
        seconds = time.perf_counter() - started
        for parameter, gradient in kept.items():
            parameter.grad = gradient
        return seconds

    def calls(self) -> int:
        return count_calls(self._step)


class PeerLoop:
    """The step of diffusers' example trainers, with latents and text cached in memory."""

    def __init__(self, parts: Parts) -> None:
        from accelerate import Accelerator
        from diffusers.optimization import get_scheduler
        from tqdm import tqdm

        from atelier_runtime import components

        self._family = parts.family
        batch_size = parts.run_file.spec.hyperparameters.global_batch_size
        samples = [parts.dataset.load(parts.dataset.order.batch(i).slots[:1], step=i, epoch=0) for i in range(2 * batch_size)]
        model = components.load_denoiser(parts.run_file.model_folder, "transformer", torch.float32, torch.device("cpu"))
        model.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        loader = torch.utils.data.DataLoader(
            [(s.latents[0].float(), {k: v.float() for k, v in s.text[0].items()}) for s in samples], batch_size=batch_size, shuffle=True
        )
        scheduler = get_scheduler("constant", optimizer=optimizer)
        self._accelerator = Accelerator(cpu=True, gradient_accumulation_steps=1)
        self._model, self._optimizer, self._loader, self._scheduler = self._accelerator.prepare(model, optimizer, loader, scheduler)
        self._batches = self._forever()
        self._bar = tqdm(total=10**9, disable=None, mininterval=1e9)

    def _forever(self) -> Iterator[object]:
        while True:
            yield from self._loader

    def _step(self) -> None:
        latents, text = next(self._batches)
        with self._accelerator.accumulate(self._model):
            noise = torch.randn_like(latents)
            sigma = torch.sigmoid(torch.randn(len(latents)))
            spread = sigma.view(-1, 1, 1, 1)
            noisy = (1 - spread) * latents + spread * noise
            conditions = Conditions(text, torch.zeros(len(latents), 6))
            prediction = self._family.predict(self._model, noisy, sigma, conditions)
            loss = ((prediction.float() - (noise - latents).float()) ** 2).reshape(len(latents), -1).mean(1).mean()
            self._accelerator.backward(loss)
            if self._accelerator.sync_gradients:
                self._accelerator.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizer.step()
            self._scheduler.step()
            self._optimizer.zero_grad()
        self._bar.update(1)
        self._bar.set_postfix(loss=loss.detach().item(), lr=self._scheduler.get_last_lr()[0])

    def run(self, steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            self._step()
        return time.perf_counter() - started

    def calls(self) -> int:
        return count_calls(self._step)


def rows(quick: bool) -> list[tuple[str, str, str]]:
    """Rows of the table: what, measured, target."""
    turns = 5 if quick else 13
    result = []
    for batch_size in (4, 24):
        figures = measure(batch_size, turns)
        shape = f"batch {batch_size}, step {figures['step_ms']:.0f} ms"
        ours, peer = figures["ours_over_bare"], figures["peer_over_bare"]
        assert isinstance(ours, Ratio)
        result.append((f"C1 loop / bare pass, ours, {shape}", str(ours), "1.01 at 100 ms"))
        result.append((f"C1 loop / bare pass, accelerate, {shape}", str(peer), "–"))
        result.append((f"C1 added per step, {shape}", f"{figures['added_us_per_step']:.0f} µs", "250 µs"))
        result.append((f"C1 calls per step over the bare pass, accelerate, {shape}", f"{figures['peer_calls'] - figures['bare_calls']}", "–"))
    return result
