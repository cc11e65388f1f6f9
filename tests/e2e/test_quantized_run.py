"""A whole run on a quantised base: two processes that share the base, stopped and resumed. Ranks are forks (see `runs`)."""

from pathlib import Path

import pytest
from safetensors import safe_open

from runs import LocalRun, checkpoint_state, history, tiny_run, write_run

pytestmark = pytest.mark.processes


def run(folder: Path, name: str, steps: int) -> LocalRun:
    spec = {
        "model": {"quantization": "nf4"},
        "hyperparameters": {"steps": steps, "learningRate": "1e-2"},
        "parallelism": {"strategy": "fsdp2"},
        "validation": {"prompts": [{"text": "a handwritten three"}], "steps": 2},
    }
    made = tiny_run(folder, name=name, **spec)
    return write_run(folder / f"{name}.yaml", made.document)


def test_a_run_on_a_quantised_base_resumes_to_the_bit_and_keeps_the_adapter_alone(tmp_path: Path) -> None:
    broken = run(tmp_path, "broken", steps=2)
    broken.train_in_forks()
    broken.changed(hyperparameters={"steps": 4}).train_in_forks()
    straight = run(tmp_path, "straight", steps=4)
    straight.train_in_forks()
    assert history(broken) == history(straight)
    pictures = [each.folder / "samples" / "00000004" / "0.png" for each in (broken, straight)]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    first = straight.folder / "samples" / "00000000" / "0.png"
    assert first.read_bytes() != pictures[1].read_bytes()

    kept = checkpoint_state(straight, 4)
    assert kept
    assert all(".lora_" in name for name in kept if name.count(".") > 1)
    assert not any("packed_" in name for name in kept)
    with safe_open(straight.folder / "exports/diffusers/pytorch_lora_weights.safetensors", framework="pt") as file:
        assert file.metadata()["atelier.quantization"] == "nf4"


def test_a_whole_model_with_a_quantised_base_is_refused_by_name(tmp_path: Path) -> None:
    made = tiny_run(tmp_path, name="full", adapter={"type": "full"}, model={"quantization": "int8"})
    output = made.train(expect=64)
    assert "spec.model.quantization is 'int8'; with adapter type full" in output
    assert "Traceback" not in output
