"""Whole runs on this machine, by the command that users type: two processes, real pictures, a real checkpoint.

What is compared with such a run, and does not try the command itself, is trained by ranks that are forks (see `runs`).
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file

from atelier_api.exit_codes import ExitCode
from atelier_api.result import AgentResult
from atelier_runtime.observe.scratch import Scratch
from forked_script import run_script
from runs import LocalRun, checkpoint_state, history, kill_tree, merged, tiny_run, wait_for, write_run

pytestmark = pytest.mark.processes

PROMPTS = [{"text": "a handwritten three", "seed": 5}, {"text": "a handwritten seven in black ink on paper", "seed": 6}]

DRAW = """
import sys, json, torch
from diffusers import StableDiffusion3Pipeline
base, lora, out, prompts = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
pipe = StableDiffusion3Pipeline.from_pretrained(base, torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
for kind in ("base", "lora"):
    if kind == "lora":
        pipe.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    for index, prompt in enumerate(prompts):
        picture = pipe(
            prompt["text"], width=32, height=32, num_inference_steps=4, guidance_scale=3.0, max_sequence_length=16,
            generator=torch.Generator("cpu").manual_seed(prompt["seed"]),
        ).images[0]
        picture.save(f"{out}/{kind}-{index}.png")
"""


def same_pixels(one: Path, other: Path, tolerance: int = 0) -> bool:
    difference = ImageChops.difference(Image.open(one).convert("RGB"), Image.open(other).convert("RGB"))
    return max(high for _, high in difference.getextrema()) <= tolerance


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalRun, str]:
    """A LoRA run of 12 steps with samples, one truncated picture among good ones."""
    folder = tmp_path_factory.mktemp("run")
    run = tiny_run(
        folder,
        name="finished",
        hyperparameters={"steps": 12, "learningRate": "3e-2", "ema": {"decay": "0.5"}},
        validation={"everySteps": 6, "prompts": PROMPTS, "steps": 4, "guidance": "3"},
        storage={"checkpoint": {"everySteps": 4, "everySeconds": 0, "keepLast": 2}},
    )
    (folder / "pictures" / "0001.png").write_bytes((folder / "pictures" / "0002.png").read_bytes()[:200])
    return run, run.train()


def test_a_run_leaves_everything_that_users_expect(finished: tuple[LocalRun, str]) -> None:
    run, output = finished
    assert (run.folder / "run.json").exists()
    assert (run.folder / "report.html").exists()
    assert (run.folder / "exports/diffusers/pytorch_lora_weights.safetensors").exists()
    assert (run.folder / "exports/kohya/finished.safetensors").exists()
    left = AgentResult.model_validate_json(Scratch(run.scratch).result(0).read_bytes())
    assert {each.key: each.sha256 for each in left.artifacts} == {
        path.relative_to(run.folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (run.folder / "exports").rglob("*.safetensors")
    }
    assert sorted(path.name for path in (run.folder / "samples").iterdir()) == ["00000000", "00000006", "00000012"]
    assert sorted(history(run)) == list(range(12))
    assert "report.html" in output


def test_retention_keeps_the_newest_checkpoints_only(finished: tuple[LocalRun, str]) -> None:
    run, _ = finished
    # A save that waits while another is written gives way to a newer one, so which step is the other depends on the disk.
    steps = saved_steps(run)
    assert len(steps) <= 2
    assert steps[-1] == 12
    assert sorted(int(path.name[:8]) for path in (run.folder / "checkpoints").iterdir()) == steps


def test_an_unreadable_picture_is_listed_and_the_run_goes_on(finished: tuple[LocalRun, str]) -> None:
    run, output = finished
    report = (run.folder / "report.html").read_text()
    assert "0001.png" in report
    assert re.search(r"unreadable\D+1", output)
    assert re.search(r"kept\D+7", output)


def test_the_exported_lora_in_a_new_process_draws_what_the_training_process_drew(
    finished: tuple[LocalRun, str], tmp_path: Path
) -> None:
    run, _ = finished
    base = run.path.parent / "base"
    lora = run.folder / "exports" / "diffusers"
    (tmp_path / "draw.py").write_text(DRAW)
    assert run_script(tmp_path / "draw.py", str(base), str(lora), str(tmp_path), json.dumps(PROMPTS)) == ""
    for index in range(len(PROMPTS)):
        drawn = run.folder / "samples" / "00000012" / f"{index}.png"
        untrained = run.folder / "samples" / "00000000" / f"{index}.png"
        assert same_pixels(tmp_path / f"lora-{index}.png", drawn, tolerance=1)
        assert same_pixels(tmp_path / f"base-{index}.png", untrained, tolerance=1)
        assert not same_pixels(drawn, untrained, tolerance=8)


def like(run: LocalRun, name: str) -> LocalRun:
    """The same run under another name."""
    return write_run(run.path.parent / f"{name}.yaml", dict(run.document) | {"metadata": {"name": name}})


def test_two_then_one_then_two_processes_train_the_same_samples(finished: tuple[LocalRun, str]) -> None:
    """Whatever the strategy: by ZeRO-3 and FSDP2 they make the LoRA that DDP makes of the same run."""
    ddp, _ = finished
    changing = like(ddp, "changing")
    for steps, strategy, processes in ((6, "deepspeed-zero3", 2), (8, "single", 1), (12, "fsdp2", 2)):
        parallelism = {"strategy": strategy, "processesPerNode": processes}
        changing = changing.changed(hyperparameters={"steps": steps}, parallelism=parallelism)
        changing.train_in_forks()
        manifest = json.loads(max((changing.folder / "manifests").glob("*.json")).read_text())
        assert (manifest["step"], manifest["strategy"], manifest["worldSize"]) == (steps, strategy, processes)
    assert history(changing) == pytest.approx(history(ddp), rel=1e-4)
    lora = "exports/diffusers/pytorch_lora_weights.safetensors"
    found, expected = load_file(changing.folder / lora), load_file(ddp.folder / lora)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-5)
    for step in ("00000006", "00000012"):
        sample = f"samples/{step}/0.png"
        assert same_pixels(changing.folder / sample, ddp.folder / sample, tolerance=1)


def test_a_finished_run_is_not_trained_again_and_can_be_made_longer(finished: tuple[LocalRun, str]) -> None:
    run, _ = finished
    before = history(run)
    untrained = run.folder / "samples" / "00000000" / "0.png"
    drawn_at = untrained.stat().st_mtime_ns
    longer = run.changed(hyperparameters={"steps": 14}, parallelism={"processesPerNode": 1})
    longer.train_in_forks()
    assert untrained.stat().st_mtime_ns == drawn_at
    after = history(longer)
    assert sorted(after) == list(range(14))
    assert {step: after[step] for step in before} == before


def resumable(folder: Path, name: str, **spec: Any) -> LocalRun:
    """A run of twelve steps with a checkpoint after six and a moving average."""
    changes: dict[str, Any] = {
        "hyperparameters": {"steps": 12, "microBatchSize": 1, "ema": {"decay": "0.9"}},
        "storage": {"checkpoint": {"everySteps": 6}},
    }
    return write_run(folder / f"{name}.yaml", tiny_run(folder, name=name, **merged(changes, spec)).document)


def assert_equal_to_the_bit(broken: LocalRun, straight: LocalRun, steps: int) -> None:
    """Weights, optimizer, averages and history."""
    expected, got = checkpoint_state(straight, steps), checkpoint_state(broken, steps)
    assert expected.keys() == got.keys()
    assert any("ema" in key for key in expected)
    different = [key for key in expected if not expected[key].equal(got[key])]
    assert different == []
    assert history(broken) == history(straight)


@dataclass(frozen=True)
class Interrupted:
    """A run without power after `killed_after` steps, gone on with and stopped by SIGTERM; what the second command said."""

    run: LocalRun
    killed_after: int
    exit_code: int
    output: str


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    spec = {"adapter": {"dropout": "0.1"}, "hyperparameters": {"steps": 4000, "optimizer": {"type": "adamw-bf16"}}}
    run = resumable(tmp_path_factory.mktemp("interrupted"), "broken", **spec)
    process = run.start()
    wait_for(run, lambda _: any((run.folder / "manifests").glob("00000006-*.json")), process)
    kill_tree(process)
    kept = saved_steps(run)[-1]
    Scratch(run.scratch).progress.unlink()  # of the killed attempt
    run = run.changed(storage={"checkpoint": {"everySteps": 1000}})
    process = run.start()
    wait_for(run, lambda progress: progress.step >= kept + 3, process)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    return Interrupted(run, kept, process.returncode, output)


def saved_steps(run: LocalRun) -> list[int]:
    return sorted(int(path.name[:8]) for path in (run.folder / "manifests").glob("*.json"))


def test_sigterm_commits_a_checkpoint_and_the_next_run_goes_on_from_it(interrupted: Interrupted) -> None:
    run = interrupted.run
    assert interrupted.exit_code == ExitCode.STOPPED, interrupted.output[-3000:]
    assert "goes on from what is there" in interrupted.output
    saved = saved_steps(run)
    assert len([step for step in saved if step > interrupted.killed_after]) == 1
    assert saved[-1] >= interrupted.killed_after + 3
    assert sorted(history(run)) == list(range(saved[-1]))


def test_six_steps_a_kill_and_the_rest_equal_a_straight_run(interrupted: Interrupted) -> None:
    steps = saved_steps(interrupted.run)[-1] + 3
    broken = interrupted.run.changed(hyperparameters={"steps": steps})
    broken.train_in_forks()
    straight = like(broken, "straight")
    straight.train_in_forks()
    assert_equal_to_the_bit(broken, straight, steps)


@pytest.mark.parametrize(
    "adapter", [{"type": "dylora", "rank": 4, "rankBlock": 2}, {"type": "full"}], ids=["dylora", "full"]
)
def test_six_steps_and_six_more_equal_twelve(adapter: dict[str, Any], tmp_path: Path) -> None:
    one = {"adapter": adapter, "parallelism": {"processesPerNode": 1}}
    broken = resumable(tmp_path, "broken", **one)
    for steps in (6, 12):
        broken = broken.changed(hyperparameters={"steps": steps})
        broken.train_in_forks()
    straight = like(broken, "straight")
    straight.train_in_forks()
    assert_equal_to_the_bit(broken, straight, 12)
    is_dylora = adapter["type"] == "dylora"
    file = straight.folder / "exports/lycoris/straight.safetensors"
    assert file.exists() is is_dylora
    assert ("create_lycoris_from_weights" in (straight.folder / "report.html").read_text()) is is_dylora
    if is_dylora:  # both blocks of the second matrices, which start at zero, have been drawn
        ups = {key: tensor for key, tensor in load_file(file).items() if key.endswith("lora_up.weight")}
        assert [key for key, tensor in ups.items() if not all(block.any() for block in tensor.split(2, dim=1))] == []


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_files(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, name="diverged", parallelism={"processesPerNode": 1})
    weights = tmp_path / "base" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["proj_out.bias"][0] = float("inf")  # as a base that was saved in too small a range of numbers
    save_file(tensors, weights, metadata={"format": "pt"})
    failure = run.failure_in_forks()
    assert failure.exit_code is ExitCode.DIVERGED
    assert "must be finite" in failure.message
    assert re.search(r"\d{4}\.png", failure.message)
    assert not list((run.folder / "manifests").glob("*.json"))


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"adapter": {"targets": ["nothing_like_this"]}}, ExitCode.CONFIG, "nothing_like_this"),
        ({"data": {"sources": [{"uri": "empty"}]}}, ExitCode.DATA, "has 0 files to train on"),
    ],
    ids=["an adapter that matches nothing", "an empty folder"],
)
def test_what_only_the_runtime_can_see_is_the_users_to_mend(
    changes: dict[str, object], code: ExitCode, text: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    run = tiny_run(tmp_path, name="bad", parallelism={"processesPerNode": 1}, **changes)
    failure = run.failure_in_forks()
    assert failure.exit_code is code
    assert text in failure.message
