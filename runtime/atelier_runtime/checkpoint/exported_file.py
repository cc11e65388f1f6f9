"""One file of a result: its header, its hash, and the proof that it reads back as it was written."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from atelier_api.errors import StoreError
from atelier_api.run_file import RunFile
from atelier_api.sliders import strength_of
from atelier_api.v1alpha1.adapter import LoraAdapter, LycorisAdapter, ScaledLycorisAdapter, alpha_of, is_slider
from atelier_runtime import components
from atelier_runtime.family import Family

State = Mapping[str, Tensor]

_SUFFIXES = {"full": "", "controlnet": "/controlnet", "textual-inversion": "/textual-inversion"}
"""What follows the architecture in `modelspec.architecture`, by type of adapter; of the others it is that of LoRA."""


@dataclass(frozen=True)
class ExportedFile:
    """One file of a result, read back and found equal. `format` is `diffusers`, `kohya`, `lycoris` or `few-steps`."""

    path: Path
    format: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Provenance:
    """What is written into the files besides the weights: where they come from. `date` is that of the export."""

    step: int
    date: datetime


def complete(path: Path, layout: str, details: Mapping[str, str]) -> ExportedFile:
    """Add `details` and the hash of the tensors to the header of a file, and read it back."""
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata() or {})
    tensors = load_file(path)
    header |= {**details, "format": "pt", "modelspec.hash_sha256": f"0x{_tensors_sha256(path)}"}
    save_file(tensors, path, metadata=header)
    compare(path, [path], tensors)
    return as_exported(path, layout)


def _tensors_sha256(path: Path) -> str:
    """SHA-256 of a safetensors file without its header, so that it does not depend on the metadata (modelspec 1.0.0)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        file.seek(8 + length)
        return hashlib.file_digest(file, "sha256").hexdigest()


def compare(what: Path, paths: Sequence[Path], expected: State) -> None:
    """Raise StoreError where `paths` together do not hold `expected`, bit for bit."""
    found = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    different = [name for name, tensor in expected.items() if name not in found or not torch.equal(found[name], tensor)]
    if different or len(found) != len(expected):
        raise StoreError(
            f"{what} reads back different from what was written, at {', '.join(different[:3]) or 'extra names'}"
        )


def as_exported(path: Path, layout: str) -> ExportedFile:
    """The facts of a file as it lies there."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ExportedFile(path, layout, digest, path.stat().st_size)


def noise_range(run_file: RunFile, family: Family, names: Sequence[str], component: str) -> str:
    """`high_noise` or `low_noise` where experts share the range of sigma; empty where there is one denoiser."""
    if len(names) == 1:
        return ""
    stages = family.stages(components.read_pipeline_config(run_file.model_folder), names)
    return "high_noise" if next(stage for stage in stages if stage.denoiser == component).high >= 1 else "low_noise"


def details_of(run_file: RunFile, family: Family, component: str, provenance: Provenance) -> dict[str, str]:
    """The `modelspec.*` header (sai_model_spec 1.0.0) and where the weights come from."""
    spec, adapter = run_file.spec, run_file.spec.adapter
    # A control network is not in the base.
    denoiser = component if component in family.denoisers else family.denoisers[0]
    architecture = family.architecture(components.denoiser_config(run_file.model_folder, denoiser))
    details: dict[str, str | int | float | bool | None] = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture + _SUFFIXES.get(adapter.type, "/lora"),
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": run_file.identity.name,
        "modelspec.date": provenance.date.isoformat(timespec="seconds"),
        "modelspec.resolution": f"{spec.data.resolution}x{spec.data.resolution}",
        "modelspec.trigger_phrase": spec.data.captions.trigger,
        "atelier.version": version("atelier-training"),
        "atelier.family": family.name,
        "atelier.component": component,
        "atelier.base_model": spec.model.source,
        "atelier.base_revision": spec.model.revision,
        "atelier.step": provenance.step,
        "atelier.precision": spec.hyperparameters.precision,
        "atelier.quantization": spec.model.quantization,
        "atelier.trigger": spec.data.captions.trigger,
        "atelier.adapter": adapter.type,
    }
    if isinstance(adapter, LoraAdapter):
        details |= {
            "atelier.rank": adapter.rank,
            "atelier.alpha": adapter.rank if adapter.alpha is None else adapter.alpha,
            "atelier.dora": adapter.dora,
            "atelier.rslora": adapter.rslora,
            "atelier.slider": adapter.slider,
        }
    elif isinstance(adapter, LycorisAdapter):
        details |= _lycoris_details(adapter)
    if is_slider(adapter):
        strengths = sorted({strength_of(source, adapter) for source in spec.data.sources})
        details["atelier.slider_strengths"] = ", ".join(f"{strength:g}" for strength in strengths)
    return {key: str(value) for key, value in details.items() if value is not None}


def _lycoris_details(adapter: LycorisAdapter) -> dict[str, str | int | float | bool | None]:
    """The settings, ours by their names in the API, and `ss_network_*`, by which kohya's tools show what a file is."""
    settings = adapter.model_dump(by_alias=True, exclude={"type", "targets"})
    if isinstance(adapter, ScaledLycorisAdapter):
        settings["alpha"] = alpha_of(adapter)
    return {f"atelier.{name}": value for name, value in settings.items()} | {
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": json.dumps({"algo": adapter.type}),
    }
