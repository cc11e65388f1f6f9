"""Whole runs on this machine, by the command that users type: two processes, real pictures, a real checkpoint."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file

from atelier_api.result import AgentResult
from atelier_runtime.observe.scratch import Scratch
from runs import LocalRun, checkpoint_state, history, kill_tree, tiny_run, wait_for, write_run

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
    steps = [int(path.name[:8]) for path in sorted((run.folder / "manifests").glob("*.json"))]
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
    subprocess.run([sys.executable, "-c", DRAW, str(base), str(lora), str(tmp_path), json.dumps(PROMPTS)], check=True)
    for index in range(len(PROMPTS)):
        drawn = run.folder / "samples" / "00000012" / f"{index}.png"
        untrained = run.folder / "samples" / "00000000" / f"{index}.png"
        assert same_pixels(tmp_path / f"lora-{index}.png", drawn, tolerance=1)
        assert same_pixels(tmp_path / f"base-{index}.png", untrained, tolerance=1)
        assert not same_pixels(drawn, untrained, tolerance=8)


def test_zero3_of_two_processes_and_then_one_process_make_the_same_lora(finished: tuple[LocalRun, str]) -> None:
    ddp, _ = finished
    document = dict(ddp.document) | {"metadata": {"name": "zero3"}}
    changing = LocalRun(ddp.path.parent / "zero3.yaml", document)
    changing = changing.changed(hyperparameters={"steps": 6}, parallelism={"strategy": "deepspeed-zero3"})
    assert "DeepSpeed ZeRO-3, 2 processes on the CPU" in changing.train()
    manifest = json.loads(max((changing.folder / "manifests").glob("*.json")).read_text())
    assert (manifest["strategy"], manifest["worldSize"]) == ("deepspeed-zero3", 2)
    changing = changing.changed(
        hyperparameters={"steps": 12}, parallelism={"strategy": "single", "processesPerNode": 1}
    )
    changing.train()
    assert history(changing) == pytest.approx(history(ddp), rel=1e-4)
    lora = "exports/diffusers/pytorch_lora_weights.safetensors"
    found, expected = load_file(changing.folder / lora), load_file(ddp.folder / lora)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-5)
    for prompt in range(len(PROMPTS)):
        sample = f"samples/00000006/{prompt}.png"
        assert same_pixels(changing.folder / sample, ddp.folder / sample, tolerance=1)


def test_a_finished_run_is_not_trained_again_and_can_be_made_longer(finished: tuple[LocalRun, str]) -> None:
    run, _ = finished
    longer = run.changed(hyperparameters={"steps": 14})
    longer.train()
    assert sorted(history(longer)) == list(range(14))


@pytest.mark.parametrize("adapter", ["lora", "dylora", "full"])
def test_twenty_steps_a_kill_and_twenty_more_equal_forty(adapter: str, tmp_path: Path) -> None:
    adapters = {
        "lora": {"type": "lora", "rank": 4, "alpha": 8, "dropout": "0.1"},
        "dylora": {"type": "dylora", "rank": 4, "rankBlock": 2},
        "full": {"type": "full"},
    }
    broken = tiny_run(
        tmp_path,
        name="broken",
        pictures=16,
        adapter=adapters[adapter],
        hyperparameters={
            "steps": 40,
            "globalBatchSize": 16,
            "microBatchSize": 2,
            "ema": {"decay": "0.9"},
            "optimizer": {"type": "adamw-bf16" if adapter == "lora" else "adamw"},
        },
        parallelism={
            "processesPerNode": 2 if adapter == "lora" else 1
        },  # a second process takes half a minute of two cores
        storage={"checkpoint": {"everySteps": 20}},
    )
    process = broken.start()
    wait_for(broken, lambda _: any((broken.folder / "manifests").glob("00000020-*.json")), process)
    kill_tree(process)
    # On a fast machine the last steps may be done before the kill; then the runs get twenty more to differ in.
    steps = 40 if max(history(broken)) < 39 else 60
    broken = broken.changed(hyperparameters={"steps": steps})
    broken.train()
    document = dict(broken.document) | {"metadata": {"name": "straight"}}
    straight = write_run(tmp_path / "straight.yaml", document)
    straight.train()
    expected, got = checkpoint_state(straight, steps), checkpoint_state(broken, steps)
    assert expected.keys() == got.keys()
    assert any("ema" in key for key in expected)
    different = [key for key in expected if not expected[key].equal(got[key])]
    assert different == []
    assert history(broken) == history(straight)
    file = straight.folder / "exports/lycoris/straight.safetensors"
    assert file.exists() is (adapter == "dylora")
    assert ("create_lycoris_from_weights" in (straight.folder / "report.html").read_text()) is (adapter == "dylora")
    if adapter == "dylora":  # both blocks of the second matrices, which start at zero, have been drawn
        ups = {key: tensor for key, tensor in load_file(file).items() if key.endswith("lora_up.weight")}
        assert [key for key, tensor in ups.items() if not all(block.any() for block in tensor.split(2, dim=1))] == []


def test_two_then_one_then_two_processes_train_the_same_samples(tmp_path: Path) -> None:
    straight = tiny_run(tmp_path, name="straight", hyperparameters={"steps": 9})
    straight.train()
    document = dict(straight.document) | {"metadata": {"name": "changing"}}
    changing = LocalRun(tmp_path / "changing.yaml", document)
    for steps, processes in ((3, 2), (6, 1), (9, 2)):
        changing = changing.changed(hyperparameters={"steps": steps}, parallelism={"processesPerNode": processes})
        changing.train()
    assert history(changing) == pytest.approx(history(straight), rel=1e-4)


def test_sigterm_commits_a_checkpoint_and_the_next_run_goes_on_from_it(tmp_path: Path) -> None:
    run = tiny_run(
        tmp_path, name="stopped", hyperparameters={"steps": 4000}, storage={"checkpoint": {"everySteps": 1000}}
    )
    process = run.start()
    wait_for(run, lambda progress: progress.step >= 3, process)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output[-3000:]
    saved = [int(path.name[:8]) for path in (run.folder / "manifests").glob("*.json")]
    assert len(saved) == 1
    assert saved[0] >= 3
    assert max(history(run)) == saved[0] - 1


def test_fsdp2_trains_like_ddp(tmp_path: Path) -> None:
    ddp = tiny_run(tmp_path, name="ddp", hyperparameters={"steps": 4})
    ddp.train()
    sharded = LocalRun(tmp_path / "sharded.yaml", dict(ddp.document) | {"metadata": {"name": "sharded"}})
    sharded = sharded.changed(parallelism={"strategy": "fsdp2"}, validation={"prompts": PROMPTS[:1], "steps": 2})
    sharded.train()
    assert history(sharded) == pytest.approx(history(ddp), rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_files(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, name="diverged")
    weights = tmp_path / "base" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["proj_out.bias"][0] = float("inf")  # as a base that was saved in too small a range of numbers
    save_file(tensors, weights, metadata={"format": "pt"})
    output = run.train(expect=81)
    assert "must be finite" in output
    assert re.search(r"\d{4}\.png", output)
    assert not list((run.folder / "manifests").glob("*.json"))


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"adapter": {"targets": ["nothing_like_this"]}}, 64, "nothing_like_this"),
        ({"data": {"sources": [{"uri": "empty"}]}}, 65, "has 0 files to train on"),
    ],
    ids=["an adapter that matches nothing", "an empty folder"],
)
def test_what_only_the_runtime_can_see_is_one_clear_error(
    changes: dict[str, object], code: int, text: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    output = tiny_run(tmp_path, name="bad", parallelism={"processesPerNode": 1}, **changes).train(expect=code)
    assert text in output
    assert "Traceback" not in output
