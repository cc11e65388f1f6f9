"""Files of lycoris-lora's types: what stands in them, and what the library makes of them in a process that knows nothing of ours."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import stock_loader
from atelier_api.model_files import lycoris_loading
from atelier_runtime.checkpoint.export_lycoris import export_lycoris
from export_runs import FULL, PROVENANCE, Trained, trained
from lycoris_adapters import OPTIONS

LAYOUT = {"formats": ["lycoris"]}


def write(result: Trained, folder: Path) -> dict[str, Path]:
    """Exports and gives the files by path below `folder`."""
    files = export_lycoris(result.weights, result.file, result.family, folder, provenance=PROVENANCE)
    for file in files:
        assert file.format == "lycoris"
        assert hashlib.sha256(file.path.read_bytes()).hexdigest() == file.sha256
    return {file.path.relative_to(folder).as_posix(): file.path for file in files}


def adapter(name: str) -> Mapping[str, Any]:
    return OPTIONS[name] | {"targets": ["all"]}


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def test_the_file_has_the_librarys_names_and_says_what_it_is(tmp_path: Path) -> None:
    result = trained("sdxl", tmp_path, adapter("lokr low-rank"), publish=LAYOUT)
    paths = write(result, tmp_path / "out")
    assert set(paths) == {"lycoris/fox.safetensors"}
    path = paths["lycoris/fox.safetensors"]
    layer = "lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = load_file(path)
    assert {name.partition(".")[2] for name in tensors if name.startswith(f"{layer}.")} == {
        "lokr_w1",
        "lokr_w2_a",
        "lokr_w2_b",
        "alpha",
    }
    assert tensors[f"{layer}.alpha"].item() == 2  # the rank: the scale is in the first factor
    facts = header(path)
    assert facts["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert (facts["atelier.adapter"], facts["atelier.rank"], facts["atelier.alpha"]) == ("lokr", "2", "3.0")
    assert (facts["atelier.factor"], facts["atelier.decomposeBoth"], facts["atelier.dora"]) == ("4", "False", "False")
    assert facts["ss_network_module"] == "lycoris.kohya"
    assert json.loads(facts["ss_network_args"]) == {"algo": "lokr"}
    assert facts["atelier.trigger"] == "sks fox"


def test_a_file_of_ia3_says_of_each_layer_which_side_it_scales(tmp_path: Path) -> None:
    result = trained("sdxl", tmp_path, adapter("ia3 on inputs"), publish=LAYOUT)
    tensors = load_file(write(result, tmp_path / "out")["lycoris/fox.safetensors"])
    block = "lycoris_down_blocks_1_attentions_0_transformer_blocks_0"
    assert {name.partition(".")[2] for name in tensors} == {"weight", "on_input"}
    sides = {name: tensors[f"{block}_{name}.on_input"].item() for name in ("attn1_to_q", "ff_net_0_proj", "ff_net_2")}
    assert sides == {"attn1_to_q": 0, "ff_net_0_proj": 1, "ff_net_2": 1}
    assert (
        len(tensors[f"{block}_ff_net_2.weight"])
        == result.denoisers["unet"]
        .get_submodule(  # type: ignore[arg-type]
            "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"
        )
        .in_features
    )


def test_each_of_two_experts_gets_a_file_of_its_own(tmp_path: Path) -> None:
    result = trained("wan22", tmp_path, adapter("loha"), publish=LAYOUT)
    paths = write(result, tmp_path / "out")
    assert set(paths) == {"lycoris/fox_high_noise.safetensors", "lycoris/fox_low_noise.safetensors"}
    for noise, component in {"high": "transformer", "low": "transformer_2"}.items():
        path = paths[f"lycoris/fox_{noise}_noise.safetensors"]
        assert header(path)["atelier.component"] == component
        weight = result.weights[component]["blocks.1.attn1.to_q.lycoris.hada_w1_b"]
        assert torch.equal(load_file(path)["lycoris_blocks_1_attn1_to_q.hada_w1_b"], weight)


def test_weights_keep_the_dtype_they_were_trained_in(tmp_path: Path) -> None:
    result = trained("wan", tmp_path, adapter("locon"), publish=LAYOUT)
    weights = {name: {key: w.to(torch.bfloat16) for key, w in state.items()} for name, state in result.weights.items()}
    (file,) = export_lycoris(weights, result.file, result.family, tmp_path / "out", provenance=PROVENANCE)
    matrices = {tensor.dtype for name, tensor in load_file(file.path).items() if not name.endswith(".alpha")}
    assert matrices == {torch.bfloat16}


@pytest.mark.parametrize("other", [FULL, {"type": "lora", "targets": ["all"]}], ids=["full", "lora"])
def test_other_types_are_an_error_of_ours(tmp_path: Path, other: Mapping[str, Any]) -> None:
    result = trained("wan", tmp_path, other)
    with pytest.raises(ValueError, match=f"of type {other['type']}"):
        write(result, tmp_path / "out")


DRAWN = [
    *(("wan", name) for name in OPTIONS),
    ("sdxl", "lokr low-rank"),
    ("flux", "lokr"),
    ("sana", "loha"),
    ("sana", "ia3 on inputs"),
    ("wan22", "lokr"),
]
OURS: dict[tuple[str, str], np.ndarray] = {}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], np.ndarray]:
    """Pictures of the stock pipeline with the library's own loader, all drawn by one new process; with `base`, without an adapter."""
    folder = tmp_path_factory.mktemp("exports")
    jobs: dict[tuple[str, str], dict[str, Any]] = {}
    for checkpoint, name in DRAWN:
        result = trained(checkpoint, folder, adapter(name), publish=LAYOUT)
        paths = write(result, folder / f"{checkpoint} {name}")
        OURS[checkpoint, name] = result.picture()
        files = zip(result.denoisers, paths.values(), strict=True)
        kind = OPTIONS[name]["type"]
        lines = [line for component, path in files for line in lycoris_loading(component, str(path), kind)]
        job = {"base": str(result.base), "arguments": result.arguments, "components": {}, "loras": [], "lycoris": []}
        jobs[checkpoint, "base"] = job
        jobs[checkpoint, name] = job | {"lycoris": lines}
    for number, job in enumerate(jobs.values()):
        job["out"] = str(folder / f"{number}.npy")
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    command = [sys.executable, stock_loader.__file__, str(folder / "jobs.json")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ)
    assert process.returncode == 0, process.stderr[-4000:]
    return {case: np.load(job["out"]) for case, job in jobs.items()}


@pytest.mark.processes
@pytest.mark.parametrize(("checkpoint", "name"), DRAWN)
def test_the_stock_pipeline_draws_what_the_training_side_draws(
    checkpoint: str, name: str, theirs: dict[tuple[str, str], np.ndarray]
) -> None:
    ours, loaded, base = OURS[checkpoint, name], theirs[checkpoint, name], theirs[checkpoint, "base"]
    assert np.abs(loaded - ours).max() <= 2e-5
    assert np.abs(loaded - base).max() > 1e-3
