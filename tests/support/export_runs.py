"""Trained tiny models to export: a checkpoint on disk, denoisers with an adapter that does something, and the run file."""

from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from atelier_api.run_file import ExecutionPlan, RunFile, RunIdentity
from atelier_api.v1alpha1.training_run import TrainingRunSpec
from atelier_runtime import components
from atelier_runtime.adapters import install, trainable
from atelier_runtime.checkpoint.exported_file import ExportedFile, Provenance
from atelier_runtime.families import get_family
from atelier_runtime.family import Family, SampleRequest
from atelier_runtime.quantization import quantize
from atelier_runtime.usage import usage
from family_models import FAMILY_OF, save_tiny
from stock_loader import draw

PROVENANCE = Provenance(step=120, date=datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC))
FULL = {"type": "full"}


def run_file(family: str, base: Path, adapter: Mapping[str, Any], **spec: Any) -> RunFile:
    """A run of the family on a checkpoint that lies in `base`."""
    document = {
        "model": {"family": family, "source": "hf://someone/base", "revision": "abc123"},
        "adapter": dict(adapter),
        "data": {"sources": [{"uri": "pictures"}], "resolution": 32, "captions": {"trigger": "sks fox"}},
        "hyperparameters": {"steps": 120, "precision": "fp32"},
        **spec,
    }
    plan = ExecutionPlan(
        strategy="single",
        device="cpu",
        nodes=1,
        processes_per_node=1,
        micro_batch_size=1,
        gradient_accumulation=1,
        gradient_checkpointing=False,
        learning_rate=1e-4,
        threads_per_process=1,
        predicted_peak_memory_bytes=0,
    )
    return RunFile(
        identity=RunIdentity(namespace="default", name="fox", uid="local"),
        spec=TrainingRunSpec.model_validate(document),
        plan=plan,
        model_folder=str(base),
        scratch=str(base / "scratch"),
        cache_uri=str(base / "cache"),
    )


@dataclass(frozen=True)
class Trained:
    """A tiny checkpoint in `base` and what a run has made of its denoisers."""

    family: Family
    base: Path
    file: RunFile

    @cached_property
    def denoisers(self) -> dict[str, nn.Module]:
        """The denoisers with weights that differ from the start, and between experts."""
        models = {}
        for index, name in enumerate(components.denoiser_names(self.family, self.base)):
            model = components.load_denoiser(self.base, name, torch.float32, torch.device("cpu"))
            if self.file.spec.model.quantization is not None:
                quantize(model, self.file.spec.model.quantization, self.family, torch.device("cpu"))
            install(model, self.file.spec.adapter, self.family)
            scale = 0.02 if self.file.spec.adapter.type == "full" else 0.2
            generator = torch.Generator().manual_seed(index)
            with torch.no_grad():
                for parameter in trainable(model).values():
                    parameter += scale * torch.randn(parameter.shape, generator=generator)
            models[name] = model.eval()
        return models

    @property
    def weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """What the trainer hands to an export."""
        return {
            name: {key: p.detach().clone() for key, p in trainable(model).items()}
            for name, model in self.denoisers.items()
        }

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The pipeline's arguments, but for the generator."""
        pipe = components.load_pipeline(
            self.family, self.base, torch.float32, torch.device("cpu"), denoisers=self.denoisers
        )
        request = SampleRequest("a fox", None, 32, 32, frames=5, steps=3, guidance=2.0, generator=torch.Generator())
        arguments = self.family.sampling_arguments(pipe, request)
        arguments.pop("generator")
        return arguments

    @torch.no_grad()
    def picture(self) -> np.ndarray:
        """What the stock pipeline draws around the denoisers of the training side."""
        pipe = components.load_pipeline(
            self.family, self.base, torch.float32, torch.device("cpu"), denoisers=self.denoisers
        )
        return draw(pipe, self.arguments)


def trained(checkpoint: str, folder: Path, adapter: Mapping[str, Any], **spec: Any) -> Trained:
    """`checkpoint` is a tiny pipeline's name."""
    family = get_family(FAMILY_OF[checkpoint])
    base = folder / f"base-{checkpoint}"
    if not base.exists():
        save_tiny(checkpoint, base)
    return Trained(family, base, run_file(family.name, base, adapter, **spec))


def load_as_reported(result: Trained, files: Sequence[ExportedFile], root: Path, pipe: Any) -> None:
    """Loads the exported files into a stock pipeline by those lines of the report's program that do, `root` being the run's folder."""
    program = usage(result.file, result.family, [file.path.relative_to(root).as_posix() for file in files])
    lines = program.splitlines()
    made, drawn = (next(i for i, line in enumerate(lines) if part in line) for part in ("pipe = ", "your prompt"))
    with chdir(root):
        exec("\n".join(lines[made + 1 : drawn]), {"pipe": pipe})
