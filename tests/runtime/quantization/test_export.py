"""A LoRA that was trained on a quantised base goes on the whole base, in the stock pipeline."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open

from atelier_api.quantizations import Quantization
from atelier_runtime.adapters import trainable
from atelier_runtime.checkpoint.export import export_lora
from export_runs import PROVENANCE, trained
from stock_loader import draw

LORA = {"type": "lora", "rank": 4, "alpha": 9, "targets": ["all"]}
BASES: tuple[tuple[str, Quantization], ...] = (("sd3", "int8"), ("flux", "fp8"), ("sdxl", "nf4"))
NEAR: dict[Quantization, float] = {"int8": 0.005, "fp8": 0.03, "nf4": 0.1}
"""Root mean square of the difference to the training process's picture, of values in [0, 1]. The LoRA's weights are random here:
none of them was trained to make up for what the quantisation does."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


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
