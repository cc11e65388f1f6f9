"""A slider that is published, in the stock pipeline: at weight k it predicts what the run does at strength k."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from atelier_runtime.adapters import at_strength
from atelier_runtime.checkpoint.export import export_lora
from export_runs import PROVENANCE, trained
from family_cases import PROMPTS, Case
from shared_cases import shared_case

WEIGHTS = (-1.0, 1.0, 0.0, 2.5)
SOURCES = {"sources": [{"uri": "more", "sliderStrength": "1"}, {"uri": "less", "sliderStrength": "-1"}]}


def predicted(case: Case, denoiser: nn.Module) -> Tensor:
    noisy, time, _ = case.noised(case.latents(2), (0.3, 0.9))
    return case.family.predict(denoiser, noisy, time, case.conditions(PROMPTS))


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    ("name", "options"), [("sdxl", {"alpha": 9}), ("wan22", {"alpha": 9}), ("z_image", {"rslora": True})]
)
@torch.no_grad()
def test_a_slider_has_the_weights_of_the_stock_pipeline(
    name: str, options: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    case = shared_case(name)
    adapter = {"type": "lora", "rank": 4, "slider": True, "targets": ["all"], **options}
    data = {**SOURCES, "resolution": 32}
    result = trained(name, tmp_path, adapter, publish={"formats": [layout]}, data=data)
    files = export_lora(result.weights, result.file, case.family, tmp_path / "exports", provenance=PROVENANCE)
    for file in files:
        with safe_open(file.path, "pt") as opened:
            told = opened.metadata()
        assert (told["atelier.slider"], told["atelier.slider_strengths"]) == ("True", "-1, 1")
    pipe = shared_case(name).pipe
    for file, component in zip(files, result.denoisers, strict=True):
        second = {"load_into_transformer_2": True} if component == "transformer_2" else {}
        pipe.load_lora_weights(str(file.path.parent), weight_name=file.path.name, adapter_name=component, **second)
    for component, denoiser in result.denoisers.items():
        base = predicted(case, case.denoisers[component])
        for weight in WEIGHTS:
            getattr(pipe, component).set_adapters([component], [weight])
            loaded = predicted(case, getattr(pipe, component))
            with at_strength([denoiser], weight):
                expected = predicted(case, denoiser)
            torch.testing.assert_close(loaded, expected, atol=1e-5, rtol=1e-5)
            assert ((loaded - base).abs().max() > 1e-3) == (weight != 0)
