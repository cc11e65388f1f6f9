"""The program in a report that draws with the result."""

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from atelier_runtime.components import class_named
from atelier_runtime.data.sound import read_sound
from atelier_runtime.families import FAMILIES
from atelier_runtime.usage import usage
from control_cases import CONTROLLED
from export_runs import run_file
from family_models import FAMILY_OF, TINY, save_tiny
from tiny_data import tone

LORA = "exports/diffusers/pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("checkpoint", TINY)
def test_it_is_a_program_that_calls_the_pipeline_with_what_it_takes(checkpoint: str, tmp_path: Path) -> None:
    family = FAMILIES[FAMILY_OF[checkpoint]]
    save_tiny(checkpoint, tmp_path)
    text = usage(run_file(family.name, tmp_path, {"type": "lora"}), family, [LORA])
    program = ast.parse(text)
    imports = [node for node in program.body if isinstance(node, ast.ImportFrom)]
    names: dict[str, Any] = {}
    exec(compile(ast.Module(imports, []), "usage", "exec"), names)
    [call] = [node for node in ast.walk(program) if isinstance(node, ast.Call) and ast.unparse(node.func) == "pipe"]
    pipeline = names[imports[0].names[0].name]
    assert pipeline is class_named(pipeline.__name__)
    given = {str(keyword.arg): None for keyword in call.keywords}
    inspect.signature(pipeline.__call__).bind(None, *call.args, **given)  # some take the picture before the prompt
    assert all(node.id in names for node in ast.walk(call) if isinstance(node, ast.Name) and node.id != "pipe")


@pytest.mark.parametrize("checkpoint", CONTROLLED)
def test_a_control_network_is_loaded_into_the_pipeline_that_samples_with_one(checkpoint: str, tmp_path: Path) -> None:
    family = FAMILIES[FAMILY_OF[checkpoint]]
    save_tiny(checkpoint, tmp_path)
    references = ["image"] if family.facts.references else []
    source = {"uri": "pictures", "conditioning": "edges", "references": references}
    spec = {"data": {"sources": [source], "resolution": 32}}
    file = run_file(family.name, tmp_path, {"type": "controlnet"}, **spec)
    weights = "exports/diffusers/controlnet/diffusion_pytorch_model.safetensors"
    program = ast.parse(usage(file, family, [weights]))
    imports = [node for node in program.body if isinstance(node, ast.ImportFrom)]
    names: dict[str, Any] = {}
    exec(compile(ast.Module(imports, []), "usage", "exec"), names)
    calls = {ast.unparse(node.func): node for node in ast.walk(program) if isinstance(node, ast.Call)}
    assert family.control is not None
    assert ast.unparse(calls[f"{family.control.network}.from_pretrained"].args[0]) == "'exports/diffusers/controlnet'"
    made = {
        str(keyword.arg): ast.unparse(keyword.value)
        for keyword in calls[f"{family.control.pipeline}.from_pretrained"].keywords
    }
    assert made["controlnet"] == "network"
    given = {str(keyword.arg): None for keyword in calls["pipe"].keywords}
    inspect.signature(names[family.control.pipeline].__call__).bind(None, **given)
    assert given.keys() == {"prompt", family.control.picture, *references}


def test_pictures_clips_and_sounds_are_loaded_and_saved_by_their_kind(tmp_path: Path) -> None:
    last = {}
    for checkpoint in ("sd3", "wan", "wan_flf2v", "flux_kontext", "ace_step"):
        family = FAMILIES[FAMILY_OF[checkpoint]]
        save_tiny(checkpoint, tmp_path / checkpoint)
        made = usage(run_file(family.name, tmp_path / checkpoint, {"type": "lora"}), family, [LORA])
        last[checkpoint] = made.splitlines()[-1]
    shown = 'image=load_image("image.png"), last_image=load_image("last_image.png")'
    assert last == {
        "sd3": 'pipe(prompt="your prompt")[0][0].save("picture.png")',
        "wan": 'export_to_video(pipe(prompt="your prompt")[0][0], "clip.mp4", fps=16)',
        "wan_flf2v": f'export_to_video(pipe(prompt="your prompt", {shown})[0][0], "clip.mp4", fps=16)',
        "flux_kontext": 'pipe(prompt="your prompt", image=load_image("image.png"))[0][0].save("picture.png")',
        "ace_step": "    file.writeframes((waveform.T * 32767).short().cpu().contiguous().numpy().tobytes())",
    }


def test_a_clip_is_continued_in_as_many_steps_as_the_run_was_trained_for(tmp_path: Path) -> None:
    save_tiny("longcat_video_continued", tmp_path)
    spec = {
        "data": {"sources": [{"uri": "clips"}], "resolution": 32, "clip": {"frames": 9, "shownFrames": 5}},
        "objective": {"twinFlow": {"sampleSteps": 2}},
        "hyperparameters": {"steps": 1, "ema": {}},
    }
    text = usage(
        run_file("longcat_video_edit", tmp_path, {"type": "lora"}, **spec), FAMILIES["longcat_video_edit"], [LORA]
    )
    assert "num_cond_frames=5, uniform_tail=False, num_inference_steps=2, guidance_scale=1" in text


def test_the_program_writes_a_sound_that_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("ace_step", tmp_path / "base")
    text = usage(run_file("ace_step", tmp_path / "base", {"type": "lora"}), FAMILIES["ace_step"], [LORA])
    start = text.index("waveform = ")
    waveform = torch.from_numpy(tone(0.5, 48_000, 440, 660))

    class Pipe:
        sample_rate = 48_000

        def __call__(self, prompt: str) -> Any:
            return (waveform[None],)

    monkeypatch.chdir(tmp_path)
    exec(text[: text.index("from ")] + text[start:], {"pipe": Pipe()})
    torch.testing.assert_close(
        read_sound(tmp_path / "sound.wav", 48_000, waveform.shape[1]), waveform, atol=1e-4, rtol=0
    )


def test_each_kind_of_adapter_is_loaded_in_its_way(tmp_path: Path) -> None:
    family = FAMILIES["wan"]
    save_tiny("wan22", tmp_path)
    two = [LORA, LORA.replace(".safetensors", "_low_noise.safetensors"), "exports/kohya/fox_low_noise.safetensors"]
    lines = usage(run_file("wan", tmp_path, {"type": "lora"}), family, two).splitlines()
    assert [line.startswith("pipe.load_lora_weights") for line in lines].count(True) == 2
    assert lines[-2].endswith('_low_noise.safetensors", load_into_transformer_2=True)')
    keys = [f"exports/lycoris/fox_{noise}_noise.safetensors" for noise in ("high", "low")]
    merged = usage(run_file("wan", tmp_path, {"type": "lokr"}), family, keys)
    assert [f'"{keys[0]}", pipe.transformer)' in merged, f'"{keys[1]}", pipe.transformer_2)' in merged] == [True, True]
    scaled = usage(run_file("wan", tmp_path, {"type": "ia3"}), family, keys)
    assert ast.parse(scaled)
    assert [f'load_file("{keys[0]}")' in scaled, "in pipe.transformer_2.named_modules():" in scaled] == [True, True]
    whole = ["exports/diffusers/transformer/config.json", "exports/diffusers/transformer/model.safetensors"]
    full = usage(run_file("wan", tmp_path, {"type": "full"}), family, whole)
    assert full.count("exports/diffusers/transformer") == 1
