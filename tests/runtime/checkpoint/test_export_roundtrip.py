"""A result loaded by the stock pipeline in a new process draws what the training side draws, and not what the base draws."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stock_loader
from atelier_runtime.checkpoint.export import export_lora, export_models
from export_runs import FULL, PROVENANCE, Trained, trained

pytestmark = pytest.mark.processes

CHECKPOINTS = ("sd3", "flux", "sdxl", "z_image", "wan", "wan22")
KOHYA_READ_BACK = ("sdxl", "z_image", "wan", "wan22")  # of SD3 diffusers reads no such file; of Flux see below


@dataclass(frozen=True)
class Case:
    name: str
    checkpoint: str
    layouts: tuple[str, ...]
    adapter: dict[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> dict[str, Any]:
        return (
            FULL
            if self.adapter == FULL
            else {"type": "lora", "rank": 4, "alpha": 9, "targets": ["all"], **self.adapter}
        )


# diffusers' reader of kohya's Flux files takes the first layer of a single block to have 3072 + ... rows.
FLUX_BUT_FUSED_SINGLE = [
    r"transformer_blocks\.\d+\.(attn|ff|ff_context)\..*",
    r"single_transformer_blocks\.\d+\.proj_out",
]
CASES = [
    *(Case(name, name, ("diffusers", "kohya") if name in KOHYA_READ_BACK else ("diffusers",)) for name in CHECKPOINTS),
    Case("flux-kohya", "flux", ("kohya",), {"targets": FLUX_BUT_FUSED_SINGLE}),
    Case("flux-one-of-three", "flux", ("kohya",), {"targets": [r"transformer_blocks\.\d+\.attn\.(to_k|add_v_proj)"]}),
    Case("wan-attention-alone", "wan", ("diffusers", "kohya"), {"targets": ["attention"]}),
    Case("sdxl-rslora", "sdxl", ("diffusers", "kohya"), {"rslora": True, "alpha": 3}),
    Case("z_image-rslora", "z_image", ("diffusers", "kohya"), {"rslora": True}),
    *(Case(f"{name}-dora", name, ("diffusers",), {"dora": True}) for name in ("flux", "sdxl", "wan22")),
    *(Case(f"{name}-full", name, ("diffusers",), FULL) for name in ("sd3", "sdxl", "wan22")),
]
PAIRS = [(case, layout) for case in CASES for layout in case.layouts]
OURS: dict[str, np.ndarray] = {}


def export(case: Case, folder: Path) -> Trained:
    result = trained(case.checkpoint, folder, case.spec, publish={"formats": list(case.layouts)})
    write = export_models if case.adapter == FULL else export_lora
    files = write(result.weights, result.file, result.family, folder / case.name, provenance=PROVENANCE)
    assert {file.format for file in files} == set(case.layouts)
    OURS[case.name] = result.picture()
    return result


def lora_arguments(folder: Path, layout: str, denoisers: list[str]) -> list[dict[str, Any]]:
    """Calls of `load_lora_weights`, one per denoiser."""
    stem = {"diffusers": "pytorch_lora_weights", "kohya": "fox"}[layout]
    if len(denoisers) == 1:
        return [{"folder": str(folder / layout), "weight_name": f"{stem}.safetensors"}]
    first = stem if layout == "diffusers" else f"{stem}_high_noise"
    return [
        {"folder": str(folder / layout), "weight_name": f"{first}.safetensors"},
        {
            "folder": str(folder / layout),
            "weight_name": f"{stem}_low_noise.safetensors",
            "load_into_transformer_2": True,
        },
    ]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Pictures of the stock pipeline, all drawn by one new process: `<case>/<layout>`, and `<checkpoint>` for the base."""
    folder = tmp_path_factory.mktemp("exports")
    jobs: dict[str, dict[str, Any]] = {}
    for case in CASES:
        result = export(case, folder)
        job = {"base": str(result.base), "arguments": result.arguments, "components": {}, "loras": []}
        jobs[case.checkpoint] = job
        for layout in case.layouts:
            if case.adapter == FULL:
                models = {name: str(folder / case.name / layout / name) for name in result.denoisers}
                jobs[f"{case.name}/{layout}"] = job | {"components": models}
            else:
                loras = lora_arguments(folder / case.name, layout, list(result.denoisers))
                jobs[f"{case.name}/{layout}"] = job | {"loras": loras}
    for number, job in enumerate(jobs.values()):
        job["out"] = str(folder / f"{number}.npy")
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    command = [sys.executable, stock_loader.__file__, str(folder / "jobs.json")]
    environment = os.environ | {"DIFFUSERS_VERBOSITY": "warning"}
    process = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert process.returncode == 0, process.stderr[-4000:]
    assert "led to unexpected keys" not in process.stderr
    return {name: np.load(job["out"]) for name, job in jobs.items()}


@pytest.mark.parametrize(("case", "layout"), PAIRS, ids=[f"{case.name}-{layout}" for case, layout in PAIRS])
def test_the_stock_pipeline_draws_what_the_training_side_draws(
    case: Case, layout: str, theirs: dict[str, np.ndarray]
) -> None:
    ours, loaded, base = OURS[case.name], theirs[f"{case.name}/{layout}"], theirs[case.checkpoint]
    assert np.abs(loaded - ours).max() <= 1e-5
    assert np.abs(loaded - base).max() > 1e-3
