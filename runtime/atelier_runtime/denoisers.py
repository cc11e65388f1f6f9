"""The denoisers of a run: loaded, with the adapter on, spread over the ranks, and gathered again for the export."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from atelier_api.run_file import RunFile
from atelier_runtime import adapters, components, parallel
from atelier_runtime.checkpoint.export import check_formats
from atelier_runtime.family import Family, Stage
from atelier_runtime.parallel import Distributed

log = logging.getLogger(__name__)


@dataclass
class Denoisers:
    """The denoisers of a run: `models` as diffusers has them, `wrapped` as the strategy calls them."""

    models: dict[str, nn.Module]
    wrapped: dict[str, nn.Module]
    stages: tuple[Stage, ...]

    @classmethod
    def load(cls, run_file: RunFile, family: Family, distributed: Distributed) -> "Denoisers":
        """Load, put the adapter on, and spread over the ranks. Raises ConfigError when nothing would be trained."""
        hyperparameters, adapter = run_file.spec.hyperparameters, run_file.spec.adapter
        base_dtype, trained_dtype = _dtypes(hyperparameters.precision, hyperparameters.optimizer.type, adapter.type)
        # Sharding moves piece by piece to the device: the whole model may not fit there, which is why it is sharded.
        loading_device = torch.device("cpu") if parallel.shards_weights(run_file.plan) else distributed.device
        names = components.denoiser_names(family, run_file.model_folder)
        models: dict[str, nn.Module] = {}
        wrapped: dict[str, nn.Module] = {}
        for name in names:
            model = components.load_denoiser(run_file.model_folder, name, base_dtype, loading_device)
            if adapter.type == "lora":
                check_formats(run_file, family, adapters.resolve_targets(model, adapter.targets, family))
            torch.manual_seed(hyperparameters.seed)
            report = adapters.install(model, adapter, family, dtype=trained_dtype)
            log.info(
                "adapter installed",
                extra={
                    "denoiser": name,
                    "trainable": report.trainable,
                    "total": report.total,
                    "modules": report.modules,
                },
            )
            models[name] = model
            wrapped[name] = parallel.wrap(
                model, run_file.plan, family, distributed, hyperparameters=hyperparameters
            )
        return cls(models, wrapped, family.stages(components.read_pipeline_config(run_file.model_folder), names))

    def trainable(self) -> dict[str, Parameter]:
        """Trained parameters by `<denoiser>.<name>`, after sharding."""
        return {
            f"{name}.{key}": p for name, model in self.models.items() for key, p in adapters.trainable(model).items()
        }


def _dtypes(precision: str, optimizer: str, adapter: str) -> tuple[torch.dtype, torch.dtype]:
    """(dtype the base is loaded in, dtype of the trained weights). Full-rank trains the base itself, so both are one there."""
    trained = torch.bfloat16 if optimizer == "adamw-bf16" else torch.float32
    if adapter == "full":
        return trained, trained
    return (torch.bfloat16 if precision == "bf16" else torch.float32), trained


def gathered_weights(denoisers: Denoisers) -> dict[str, dict[str, Any]]:
    """Trained weights by denoiser, whole and on the CPU, on rank 0 (empty elsewhere). Collective."""
    return {
        name: parallel.full_state(denoisers.wrapped[name], list(adapters.trainable(model)))
        for name, model in denoisers.models.items()
    }
