"""One rank from its RunFile to its exports, of several families: the parts fit together, and nothing in the trainer knows a family."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder, Encoder
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from atelier_api.errors import ConfigError, DivergedError
from atelier_api.families import FAMILIES
from atelier_api.run_file import RunFile
from atelier_runtime import launch, parallel
from atelier_runtime.family import Stage
from atelier_runtime.observe.failure import read_failures
from atelier_runtime.observe.scratch import Scratch
from atelier_runtime.sampling import draw_samples
from atelier_runtime.train_state import TrainState
from atelier_runtime.trainer import Trainer
from family_models import save_tiny
from finished_runs import assert_finished, assert_lora_trained
from run_files import run_file
from runs import write_digits
from sessions import opened
from tiny_data import slow_down, tone, write_clip, write_tone

pytestmark = pytest.mark.processes  # a session has a writer

# What e2e/test_each_kind.py does not train.
CASES = [
    ("sd3", "lora", "fp32"),
    ("sdxl", "full", "bf16"),
    ("z_image", "full", "fp32"),
    ("wan_ti2v", "lora", "bf16"),
    ("ace_step_v1", "lora", "bf16"),
]


@pytest.fixture
def alone() -> Iterator[None]:
    yield
    parallel.stop()


def write_clips(folder: Path, count: int) -> Path:
    """Clips of a real handwritten digit that moves to the right."""
    folder.mkdir()
    for index in range(count):
        digit = np.kron(load_digits().images[index] * 15.9, np.ones((3, 3))).astype(np.uint8)
        frames = []
        for time in range(9):
            canvas = np.zeros((32, 32), np.uint8)
            canvas[4:28, time // 2 : time // 2 + 24] = digit
            frames.append(np.repeat(canvas[:, :, None], 3, axis=2))
        write_clip(folder / f"{index}.mp4", frames, 16)
        (folder / f"{index}.txt").write_text("a digit that moves\n")
    return folder


def write_sounds(folder: Path, count: int) -> Path:
    """Sung tones of unequal length that share a bucket."""
    folder.mkdir()
    for index in range(count):
        write_tone(folder / f"{index}.wav", tone(1 + index / 4, 8_000, 220 * (1 + index), 330), 8_000)
        (folder / f"{index}.txt").write_text("a tone\n")
        (folder / f"{index}.lyrics.txt").write_text("la\n" * index)
    return folder


def write_picture(path: Path) -> Path:
    digit = np.kron(load_digits().images[0] * 15.9, np.ones((6, 8))).astype(np.uint8)
    Image.fromarray(digit).save(path)
    return path


def resolved(folder: Path, tiny: str, adapter: str, precision: str, **spec: Any) -> RunFile:
    video = tiny.startswith("wan")
    base = save_tiny(tiny, folder / "base")
    if tiny == "ace_step":
        slow_down(base, 7680)
    if tiny.startswith("ace_step"):
        data = write_sounds(folder / "sounds", 3)
    else:
        data = write_clips(folder / "clips", 3) if video else write_digits(folder / "pictures", 3)
    shown = {"image": str(write_picture(folder / "start.png"))} if "i2v" in tiny else {}
    family = tiny if tiny in FAMILIES else "wan"
    made = run_file(
        folder,
        model={"family": family, "source": str(base)},
        adapter={"type": adapter},
        data={
            "sources": [{"uri": str(data)}],
            "resolution": max(32, FAMILIES[family].pixel_multiple),
            "maxUpscale": 4,
            "clip": {"frames": 5},
            "audio": {"maxSeconds": 2, "minSeconds": 1},
        },
        hyperparameters={
            "steps": 8,
            "globalBatchSize": 4,
            "precision": precision,
            "learningRate": "1e-3",
            "ema": {"decay": "0.9"},
        },
        validation={"prompts": [{"text": "a digit"} | shown], "steps": 2, "frames": 5},
        publish={"formats": ["diffusers"]},
        **spec,
    )
    changes = {
        "strategy": "single",
        "micro_batch_size": 2,
        "gradient_accumulation": 2,
        "threads_per_process": 1,
        "learning_rate": 1e-3,
    }
    return made.model_copy(update={"model_folder": str(base), "plan": made.plan.model_copy(update=changes)})


@pytest.mark.parametrize(("tiny", "adapter", "precision"), CASES)
@pytest.mark.usefixtures("alone")
def test_a_run_trains_samples_and_exports(tiny: str, adapter: str, precision: str, tmp_path: Path) -> None:
    plan = resolved(tmp_path, tiny, adapter, precision)
    session = opened(plan)
    assert launch.train(session)
    root = Path(plan.store_uri)
    assert_finished(root, 8)
    assert len(list((root / "samples/00000008").iterdir())) == 1
    is_sound = tiny.startswith("ace_step")
    assert ((root / "report.html").read_text().count("<audio controls") == 2) == is_sound
    assert (root / f"samples/00000008/0.{'flac' if is_sound else 'webp' if 'wan' in tiny else 'png'}").exists()
    [file] = (root / "exports").rglob("*.safetensors")
    if adapter == "lora":
        assert_lora_trained(file)


@pytest.mark.usefixtures("alone")
def test_a_run_with_tiles_caches_trains_and_draws_through_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: dict[type[nn.Module], set[int]] = {Encoder: set(), Decoder: set()}
    for kind, seen in widths.items():
        monkeypatch.setattr(kind, "forward", widths_into(seen, kind.forward))
    file = resolved(tmp_path, "sdxl", "lora", "fp32")
    Image.new("RGB", (576, 32), "red").save(tmp_path / "pictures/wide.png")
    (tmp_path / "pictures/wide.txt").write_text("a wall")
    data = file.spec.data.model_copy(update={"resolution": 136, "bucket_align": 8})
    validation = file.spec.validation.model_copy(update={"width": 576, "height": 32})
    spec = file.spec.model_copy(update={"data": data, "validation": validation})
    tiles = {"tiled_encoding": True, "tiled_samples": True}
    file = file.model_copy(update={"spec": spec, "plan": file.plan.model_copy(update=tiles)})
    session = opened(file)
    assert launch.train(session)
    assert (max(widths[Encoder]), max(widths[Decoder])) == (512, 64)
    root = Path(file.store_uri)
    assert Image.open(root / "samples/00000008/0.png").size == (576, 32)
    report = (root / "report.html").read_text()
    assert all(
        re.search(f"{what}.{{0,40}}tiles", report, re.DOTALL) for what in ("latents made of", "samples drawn in")
    )


def widths_into(seen: set[int], forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The method, which notes the widths of what it is given."""

    def noting(module: nn.Module, sample: Tensor, *others: Any) -> Tensor:
        seen.add(sample.shape[-1])
        return forward(module, sample, *others)

    return noting


@pytest.mark.usefixtures("alone")
def test_a_run_of_the_flow_objective_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole = resolved(tmp_path, "sdxl", "lora", "fp32")
    straight, halves = (
        trained_by_flow(whole, tmp_path / name, steps) for name, steps in (("one", [4]), ("two", [2, 4]))
    )
    assert straight.keys() == halves.keys()
    assert all(torch.equal(tensor, halves[name]) for name, tensor in straight.items())
    assert any(tensor.abs().max() > 0 for name, tensor in straight.items() if "lora_B" in name)


def trained_by_flow(plan: RunFile, folder: Path, steps: list[int]) -> dict[str, torch.Tensor]:
    """The LoRA of a run with Diff2Flow that was ended and taken up again after each of these steps."""
    for last in steps:
        document = plan.spec.model_dump(mode="json", by_alias=True)
        document["objective"]["diff2Flow"] = {"maxWeight": "50"}
        document["hyperparameters"]["steps"] = last
        document["storage"]["uri"] = str(folder)
        document["validation"] = {}
        changes = {"spec": type(plan.spec).model_validate(document), "attempt": f"{last}.0"}
        part = plan.model_copy(update=changes)
        assert launch.train(opened(part))
        parallel.stop()
        assert list(Path(part.store_uri, "manifests").glob(f"{last:08d}-*"))
    [file] = folder.rglob("exports/**/*.safetensors")
    return load_file(file)


@pytest.mark.usefixtures("alone")
def test_prompts_that_the_checkpoint_cannot_draw_are_refused_before_anything_is_encoded(tmp_path: Path) -> None:
    plan = resolved(tmp_path, "stable_cascade", "lora", "fp32")
    index = tmp_path / "base" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"decoder": [None, None]}))
    session = opened(plan)
    with pytest.raises(
        ConfigError, match=r"spec\.validation\.prompts are to be drawn, and the checkpoint .* has no decoder"
    ):
        launch.train(session)
    assert not list(Path(plan.cache_uri).rglob("*.index"))


def test_the_record_of_a_failure_names_its_step_and_the_samples_of_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    plan, reached = run_file(tmp_path), launch.Reached()
    folder = Scratch(tmp_path).failures(plan.attempt)
    launch.record(plan, 0, ValueError("before there is a state"), reached)
    reached.state = TrainState({}, cast(Any, None), None, step=7)
    launch.record(plan, 1, ValueError("after the seventh step"), reached)
    launch.record(plan, 2, DivergedError("nan", step=6, files=["a.png", "b.png"]), reached)
    launch.record(plan, 3, DivergedError("nan"), reached)
    found = {failure.rank: (failure.step, failure.files) for failure in read_failures(folder)}
    assert found == {0: (None, []), 1: (7, []), 2: (6, ["a.png", "b.png"]), 3: (7, [])}


@pytest.mark.usefixtures("alone")
def test_three_pictures_and_a_batch_of_four_train_every_picture_once_an_epoch(tmp_path: Path) -> None:
    plan = resolved(tmp_path, "sd3", "lora", "fp32")
    session = opened(plan)
    parts = launch.prepare(session)
    parts.checkpointer.close()
    batch = parts.dataset.order.batch(5)
    assert batch.total_weight == 3
    assert len(batch.slots) == 4
    assert torch.equal(parts.dataset.load(batch.slots, step=5, epoch=5).weights, torch.tensor([1.0, 1.0, 1.0, 0.0]))


@pytest.mark.usefixtures("alone")
def test_the_loss_of_a_technique_is_beside_the_objectives_which_is_as_without(tmp_path: Path) -> None:
    techniques = {"layerSync": {"studentBlock": 0, "teacherBlock": 1}}
    plan = resolved(tmp_path, "wan_ti2v", "lora", "bf16", techniques=techniques)
    parts = launch.prepare(opened(plan))
    parts.checkpointer.close()
    batch = parts.dataset.load(parts.dataset.order.batch(0).slots, step=0, epoch=0)
    given = (parts.denoisers.wrapped["transformer"], batch, 0, Stage("transformer"))
    [loss, aligned] = Trainer(parts, lambda: False)._losses(*given)
    [alone] = Trainer(replace(parts, techniques=()), lambda: False)._losses(*given)
    assert torch.equal(loss, alone)
    assert -0.2 * float(batch.weights.sum()) <= aligned < 0
    aligned.backward()  # type: ignore[no-untyped-call]
    reached = {name for name, p in parts.state.parameters.items() if p.grad is not None and p.grad.any()}
    assert reached
    assert all(name.startswith("transformer.blocks.0.") for name in reached)


@pytest.mark.usefixtures("alone")
def test_a_block_that_the_checkpoint_lacks_is_refused_when_training_starts(tmp_path: Path) -> None:
    plan = resolved(tmp_path, "sd3", "lora", "fp32", techniques={"layerSync": {"studentBlock": 0, "teacherBlock": 9}})
    with pytest.raises(ConfigError, match=r"spec\.techniques\.layerSync\.teacherBlock is 9; must be at most 2"):
        launch.prepare(opened(plan))


@pytest.mark.usefixtures("alone")
def test_the_loss_of_a_run_does_not_count_on_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a clip that is drawn from its first frame, whatever is predicted for that frame."""
    plan = resolved(tmp_path, "wan_ti2v", "lora", "fp32")
    parts = launch.prepare(opened(plan))
    parts.checkpointer.close()
    trainer, order, predict = Trainer(parts, lambda: False), parts.dataset.order, parts.family.predict
    batch = parts.dataset.load(order.batch(0).slots, step=0, epoch=0)
    [loss] = trainer._losses(parts.denoisers.wrapped["transformer"], batch, 0, Stage("transformer"))

    def wrong_where_shown(*given: Any) -> torch.Tensor:
        return torch.cat([torch.full_like(given[1][:, :, :1], 100.0), predict(*given)[:, :, 1:]], dim=2)

    monkeypatch.setattr(type(parts.family), "predict", lambda _, *given: wrong_where_shown(*given))
    [other] = trainer._losses(parts.denoisers.wrapped["transformer"], batch, 0, Stage("transformer"))
    assert torch.equal(other, loss)
    assert loss < 100


@pytest.mark.usefixtures("alone")
def test_a_step_draws_latents_of_its_own_and_is_the_same_whatever_was_drawn_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache keeps what latents are drawn from, not one draw; and samples of the prompts take no numbers from the training."""
    plan = resolved(tmp_path, "sd3", "lora", "fp32")
    still = plan.plan.model_copy(update={"learning_rate": 0.0})
    dropping = plan.spec.model_copy(update={"adapter": plan.spec.adapter.model_copy(update={"dropout": 0.5})})
    plan = plan.model_copy(update={"plan": still, "spec": dropping})
    parts = launch.prepare(opened(plan))
    parts.checkpointer.close()
    trainer, prepare = Trainer(parts, lambda: False), parts.objective.prepare
    clean: list[torch.Tensor] = []
    monkeypatch.setattr(
        parts.objective, "prepare", lambda x, *given, **named: clean.append(x) or prepare(x, *given, **named)
    )

    def step(number: int) -> tuple[float, float]:
        batch = parts.dataset.order.batch(number)
        [loss], norm = trainer._step(batch, [parts.dataset.load(batch.slots, step=number, epoch=0)], lambda: None)
        return float(loss), float(norm)

    def noise(number: int, drawn: torch.Tensor) -> torch.Tensor:
        kept = parts.dataset.load(parts.dataset.order.batch(number).slots, step=number, epoch=0)
        assert kept.std is not None
        return (drawn - kept.latents) / kept.std

    first = step(2)
    draw_samples(plan, parts.family, dict(parts.denoisers.models), parts.distributed)
    assert step(2) == first
    step(3)
    once, again, later = (noise(number, drawn) for number, drawn in zip((2, 2, 3), clean, strict=True))
    assert torch.equal(once, again)
    assert (once - later).abs().mean() > 0.5
    assert float(once.mean()) == pytest.approx(0, abs=0.1)
    assert float(once.std()) == pytest.approx(1, abs=0.1)
