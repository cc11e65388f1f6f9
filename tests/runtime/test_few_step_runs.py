"""Runs of few-step generators: stopped and gone on with, as if they had not been, and drawn with by the stock pipeline."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from atelier_api.errors import ConfigError
from atelier_api.families import FAMILIES
from atelier_api.run_file import RunFile
from atelier_api.v1alpha1 import TrainingRunSpec
from atelier_runtime import components, launch, parallel
from atelier_runtime.families import get_family
from atelier_runtime.few_steps import few_step_pipeline
from family_models import save_tiny
from run_files import run_file
from runs import write_digits
from sessions import opened

pytestmark = pytest.mark.processes  # a session has a writer


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    yield
    parallel.stop()


def resolved(folder: Path, tiny: str, adapter: dict[str, Any], family: str | None = None) -> RunFile:
    base, data = save_tiny(tiny, folder / "base"), write_digits(folder / "pictures", 3)
    made = run_file(
        folder,
        model={"family": family or tiny, "source": str(base)},
        adapter=adapter,
        data={"sources": [{"uri": str(data)}], "resolution": 32, "maxUpscale": 4, "captions": {"dropout": "0.5"}},
        objective={"twinFlow": {"sampleSteps": 2}},
        hyperparameters={
            **{"steps": 4, "globalBatchSize": 4, "precision": "fp32", "learningRate": "1e-2"},
            "ema": {"decay": "0.9"},
        },
        validation={"prompts": [{"text": "a digit", "seed": 5}]},
        publish={"formats": ["diffusers"]},
    )
    changes = {"strategy": "single", "micro_batch_size": 2, "gradient_accumulation": 2, "learning_rate": 1e-2}
    return made.model_copy(update={"model_folder": str(base), "plan": made.plan.model_copy(update=changes)})


def ended(plan: RunFile, folder: Path, steps: list[int]) -> Path:
    """The folder of a run that was ended and taken up again after each of these steps."""
    for last in steps:
        document = plan.spec.model_dump(mode="json", by_alias=True)
        document["hyperparameters"]["steps"] = last
        document["storage"]["uri"] = str(folder)
        part = plan.model_copy(update={"spec": TrainingRunSpec.model_validate(document), "attempt": f"{last}.0"})
        assert launch.train(opened(part))
        parallel.stop()
    return Path(part.store_uri)


def test_a_run_goes_on_as_if_it_had_not_stopped_and_all_it_trains_has_moved(tmp_path: Path) -> None:
    whole = resolved(tmp_path, "sd3", {"type": "lora", "rank": 4, "dropout": "0.1"})
    straight, halves = (ended(whole, tmp_path / name, steps) for name, steps in (("one", [4]), ("two", [2, 4])))
    names = ["diffusers/pytorch_lora_weights.safetensors", "few_steps/demo.safetensors"]
    found = [str(path.relative_to(straight / "exports")) for path in sorted(straight.glob("exports/**/*.safetensors"))]
    assert found == names
    for name in names:
        one, two = (load_file(run / "exports" / name) for run in (straight, halves))
        assert one.keys() == two.keys()
        assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())
    learnt = load_file(straight / "exports" / names[1])
    assert learnt["negative"].abs().max() > 0
    layers = {name.removeprefix("embedder."): tensor for name, tensor in learnt.items() if name != "negative"}
    base = components.load_denoiser(tmp_path / "base", "transformer", torch.float32, torch.device("cpu"))
    own = base.get_submodule("time_text_embed.timestep_embedder").state_dict()
    assert layers.keys() == own.keys()
    assert all(not torch.equal(layers[name], own[name]) for name in own)


@pytest.mark.parametrize(("tiny", "adapter"), [("z_image", "lora"), ("sana", "full")])
def test_the_stock_pipeline_draws_by_the_exports_what_the_run_drew(tmp_path: Path, tiny: str, adapter: str) -> None:
    plan = resolved(tmp_path, tiny, {"type": adapter})
    root = ended(plan, tmp_path / "run", [4])
    exports = {each["key"]: each["format"] for each in json.loads((root / "result.json").read_text())["exports"]}
    assert exports["exports/few_steps/demo.safetensors"] == "few-steps"
    with safe_open(root / "exports/few_steps/demo.safetensors", framework="pt") as file:
        header = file.metadata()
    assert header["atelier.twin_flow.sample_steps"] == "2"
    pipeline = components.class_named(components.pipeline_name(get_family(tiny), plan.model_folder))
    changed = {}
    if adapter == "full":
        kind = components.class_named(json.loads((tmp_path / "base/model_index.json").read_text())["transformer"][1])
        changed = {"transformer": kind.from_pretrained(root / "exports/diffusers/transformer")}
    pipe = few_step_pipeline(
        pipeline.from_pretrained(plan.model_folder, **changed), root / "exports/few_steps/demo.safetensors"
    )
    if adapter == "lora":
        pipe.load_lora_weights(root / "exports/diffusers")
    generator = torch.Generator().manual_seed(5)
    sizes = {"height": 32, "width": 32} | ({"use_resolution_binning": False} if tiny == "sana" else {})
    drawn = pipe(
        "a digit", num_inference_steps=2, guidance_scale=FAMILIES[tiny].guidance_above, generator=generator, **sizes
    )
    expected = Image.open(io.BytesIO((root / "samples/00000004/0.png").read_bytes()))
    apart = np.abs(np.asarray(drawn[0][0], int) - np.asarray(expected, int))
    assert apart.max() <= 1
    first = Image.open(io.BytesIO((root / "samples/00000000/0.png").read_bytes()))
    assert np.abs(np.asarray(first, int) - np.asarray(expected, int)).max() > 1
    report = (root / "report.html").read_text()
    assert "few_step_pipeline(pipe, " in report
    assert "num_inference_steps=2, guidance_scale=" in report


def test_a_checkpoint_of_two_networks_is_refused_before_anything_is_encoded(tmp_path: Path) -> None:
    plan = resolved(tmp_path, "wan22", {"type": "lora"}, family="wan")
    with pytest.raises(ConfigError) as found:
        ended(plan, tmp_path / "run", [1])
    assert str(found.value) == (
        f"spec.model.source is '{tmp_path / 'base'}'; has 2 networks, and spec.objective.twinFlow trains one network that knows all "
        "noise levels, as a step goes from noise to the picture; name a checkpoint of one, or remove spec.objective.twinFlow"
    )
    assert not list(Path(plan.cache_uri).rglob("*.index"))


def pipe_guidance(tiny: str) -> float:
    """What switches guidance off."""
    return FAMILIES[tiny].guidance_above
