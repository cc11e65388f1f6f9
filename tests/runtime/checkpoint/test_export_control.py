"""An exported control network, loaded by the stock classes as the report says, is what was trained."""

from pathlib import Path
from typing import Any

import pytest
import torch

from atelier_runtime import adapters, components
from atelier_runtime.checkpoint.export import export_models
from atelier_runtime.control import CONTROL_NETWORK
from atelier_runtime.usage import usage
from control_cases import CONTROLLED, controlled_case
from export_runs import PROVENANCE, run_file
from family_models import FAMILY_OF, save_tiny


@pytest.mark.cell("controlnet")
@pytest.mark.parametrize("name", CONTROLLED)
@torch.no_grad()
def test_the_program_of_the_report_draws_what_the_training_side_draws(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny(name, tmp_path / "base")
    case = controlled_case(name, trained=True)
    references = ["photos"] if case.family.facts.references else []
    source = {"uri": "pictures", "conditioning": "edges", "references": references}
    data = {"sources": [source], "resolution": 32}
    file = run_file(
        FAMILY_OF[name], base, {"type": "controlnet"}, data=data, model={"family": FAMILY_OF[name], "source": str(base)}
    )
    weights = {CONTROL_NETWORK: {key: p.detach().clone() for key, p in adapters.trainable(case.network).items()}}
    files = export_models(weights, file, case.family, tmp_path / "exports", provenance=PROVENANCE)
    assert {path.path.relative_to(tmp_path).as_posix() for path in files} == {
        f"exports/diffusers/controlnet/{file}"
        for file in ("atelier.json", "config.json", "diffusion_pytorch_model.safetensors")
    }
    lines = usage(file, case.family, [path.path.relative_to(tmp_path).as_posix() for path in files]).splitlines()
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec("\n".join(line for line in lines if not line.startswith("pipe(")), names)
    pipe = names["pipe"]
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.controlnet) is components.class_named(case.control.network)
    ours = components.load_pipeline(
        case.family,
        base,
        torch.float32,
        torch.device("cpu"),
        denoisers={case.family.denoisers[0]: case.base, CONTROL_NETWORK: case.network},
    )
    ours.set_progress_bar_config(disable=True)
    pictures = []
    for each in (ours, pipe):
        torch.manual_seed(0)  # some draw the latents of the conditioning picture from it
        pictures.append(each(**case.family.sampling_arguments(each, case.request(2.0, steps=2)), output_type="pt")[0])
    torch.testing.assert_close(pictures[1], pictures[0], atol=1e-5, rtol=1e-5)
