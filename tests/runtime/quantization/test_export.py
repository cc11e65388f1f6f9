"""A LoRA that was trained on a quantised base goes on the whole base, in the stock pipeline."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open

from atelier_api.quantizations import Quantization
from atelier_api.v1alpha1.adapter import LoraAdapter
from atelier_runtime.adapters import install, trainable
from atelier_runtime.checkpoint.export import export_lora
from export_runs import PROVENANCE, load_as_reported, trained
from family_cases import PROMPTS
from quantized import EVERY_PAIR, distance
from shared_cases import shared_case
from stock_loader import draw

LORA = {"type": "lora", "rank": 4, "alpha": 9, "targets": ["all"]}
BASES: tuple[tuple[str, Quantization], ...] = (("sd3", "int8"), ("flux", "fp8"), ("sdxl", "nf4"))
NEAR: dict[Quantization, float] = {"int8": 0.005, "fp8": 0.03, "nf4": 0.1}
"""Root mean square of the difference to the training process's picture, of values in [0, 1]. The LoRA's weights are random here:
none of them was trained to make up for what the quantisation does."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.mark.cell("quantized")
@pytest.mark.parametrize("pair", EVERY_PAIR)
@torch.no_grad()
def test_on_the_whole_base_the_saved_lora_predicts_what_its_weights_do_there(
    pair: tuple[str, Quantization], folder: Path
) -> None:
    """And on the packed base that they were trained on nearly the same: what packing changes is less than what they do."""
    name, kind = pair
    case, pipe = shared_case(name), shared_case(name).pipe
    model = {"family": case.family.name, "source": "hf://someone/base", "quantization": kind}
    result = trained(name, folder, LORA, model=model, publish={"formats": ["diffusers"]})
    root = folder / f"{name}-{kind}-lora"
    torch.manual_seed(0)
    weights = result.weights
    files = export_lora(weights, result.file, case.family, root / "exports", provenance=PROVENANCE)
    load_as_reported(result, files, root, pipe)
    noisy, time, _ = case.noised(case.latents(2), (0.3, 0.9))
    conditions = case.conditions(PROMPTS)
    for component, packed in result.denoisers.items():
        whole = case.denoisers[component]
        base = case.family.predict(whole, noisy, time, conditions)
        install(whole, LoraAdapter.model_validate(LORA), case.family)
        for key, parameter in trainable(whole).items():
            parameter.copy_(weights[component][key])
        expected, trained_on, loaded = (
            case.family.predict(denoiser, noisy, time, conditions)
            for denoiser in (whole, packed, getattr(pipe, component))
        )
        # A UNet of random weights makes rounding a hundred times as large; a LoRA of another scale is off by tenths.
        torch.testing.assert_close(loaded, expected, atol=1e-4, rtol=1e-4)
        assert 0 < distance(trained_on, loaded) < distance(base, loaded)


@pytest.mark.parametrize(("checkpoint", "kind"), BASES)
def test_the_lora_draws_on_the_whole_base_nearly_what_the_training_process_drew(
    checkpoint: str, kind: Quantization, folder: Path
) -> None:
    model = {"family": checkpoint, "source": "hf://someone/base"}
    on_whole = trained(checkpoint, folder, LORA, model=model)
    on_packed = trained(checkpoint, folder, LORA, model=model | {"quantization": kind})
    target = folder / f"{checkpoint}-{kind}"
    files = export_lora(on_packed.weights, on_packed.file, on_packed.family, target, provenance=PROVENANCE)
    with safe_open(files[0].path, framework="pt") as file:
        assert file.metadata()["atelier.quantization"] == kind
        assert not any(file.get_tensor(key).dtype == torch.uint8 for key in file.keys())  # noqa: SIM118
    stock = diffusers.DiffusionPipeline.from_pretrained(str(on_packed.base))
    base = draw(stock, on_packed.arguments)
    stock.load_lora_weights(str(target / "diffusers"), weight_name="pytorch_lora_weights.safetensors")
    loaded = draw(stock, on_packed.arguments)
    for name, denoiser in on_whole.denoisers.items():
        for key, parameter in trainable(denoiser).items():
            parameter.data.copy_(on_packed.weights[name][key])
    assert np.abs(loaded - on_whole.picture()).max() <= 1e-5
    off, effect = rms(loaded - on_packed.picture()), rms(loaded - base)
    assert 0 < off < NEAR[kind]
    assert off < effect


def rms(difference: np.ndarray) -> float:
    return float(np.sqrt(np.square(difference).mean()))
