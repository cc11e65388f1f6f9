"""The denoisers of a run: loaded, with the adapter on, spread over the ranks, and gathered again for the export."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from atelier_api.errors import ConfigError
from atelier_api.few_steps import checkpoint_refusal
from atelier_api.run_file import RunFile
from atelier_runtime import adapters, components, parallel
from atelier_runtime.checkpoint.export import check_formats
from atelier_runtime.control import CONTROL_NETWORK, Controlled
from atelier_runtime.family import Family, Stage
from atelier_runtime.few_steps import FewSteps
from atelier_runtime.parallel import Distributed
from atelier_runtime.quantization import quantize

log = logging.getLogger(__name__)


@dataclass
class Denoisers:
    """The denoisers of a run: `models` as diffusers has them, `wrapped` as the strategy calls them.

    `draws` are called before each step of the denoiser, where its adapter draws something once for the whole step. `encode` is what
    captions go through in the step, where the adapter trains what reads them. A control network is one of the models; its denoiser is
    called together with it.
    """

    models: dict[str, nn.Module]
    wrapped: dict[str, nn.Module]
    stages: tuple[Stage, ...]
    draws: Mapping[str, adapters.Draw] = field(default_factory=dict)
    encode: adapters.Encode | None = None

    @classmethod
    def load(cls, run_file: RunFile, family: Family, distributed: Distributed) -> "Denoisers":
        """Load, put the adapter on, and spread over the ranks. Raises ConfigError when nothing would be trained."""
        hyperparameters, adapter = run_file.spec.hyperparameters, run_file.spec.adapter
        base_dtype, trained_dtype = _dtypes(hyperparameters.precision, hyperparameters.optimizer.type, adapter.type)
        load_encoders = partial(components.load_encoders, family, run_file.model_folder, base_dtype, distributed.device)
        names = components.denoiser_names(family, run_file.model_folder)
        if adapter.type == "controlnet":
            return cls._controlled(run_file, family, distributed, names)
        models: dict[str, nn.Module] = {}
        wrapped: dict[str, nn.Module] = {}
        draws: dict[str, adapters.Draw] = {}
        encode: adapters.Encode | None = None
        for name in names:
            model = components.load_denoiser(
                run_file.model_folder, name, base_dtype, _loading_device(run_file, distributed)
            )
            _quantize(model, run_file, family, distributed)
            if adapter.type == "lora":
                check_formats(run_file, family, adapters.resolve_targets(model, adapter.targets, family))
            few_steps = _few_steps(model, run_file, family)
            torch.manual_seed(hyperparameters.seed)
            report = adapters.install(model, adapter, family, dtype=trained_dtype, load_encoders=load_encoders)
            if few_steps is not None:
                few_steps.put_on(model, trained_dtype)
            _log_installed(name, report)
            if report.draw is not None:
                draws[name] = report.draw
            encode = report.encode or encode
            models[name] = model
            wrapped[name] = parallel.wrap(model, run_file.plan, family, distributed, hyperparameters=hyperparameters)
        stages = family.stages(components.read_pipeline_config(run_file.model_folder), names)
        return cls(models, wrapped, stages, draws, encode)

    @classmethod
    def _controlled(
        cls, run_file: RunFile, family: Family, distributed: Distributed, names: tuple[str, ...]
    ) -> "Denoisers":
        """The frozen denoiser and its control network, each spread over the ranks by itself."""
        [name] = names
        assert family.control is not None  # every flow family has one, and others are refused
        hyperparameters, plan = run_file.spec.hyperparameters, run_file.plan
        base_dtype, trained_dtype = _dtypes(hyperparameters.precision, hyperparameters.optimizer.type, "controlnet")
        base = components.load_denoiser(run_file.model_folder, name, base_dtype, _loading_device(run_file, distributed))
        torch.manual_seed(hyperparameters.seed)
        # A copy of the base's blocks as they are: the base is quantised after it.
        network, report = adapters.build_control_network(
            base, family, dtype=trained_dtype, device=_home(run_file, distributed)
        )
        _quantize(base, run_file, family, distributed)
        _log_installed(CONTROL_NETWORK, report)
        wrapped = Controlled(
            parallel.wrap(base, plan, family, distributed, hyperparameters=hyperparameters),
            parallel.wrap(network, plan, family, distributed, hyperparameters=hyperparameters),
            family.control,
        )
        wrapped.train()  # the base too: gradients go through it, and some layers let them through in that mode alone
        return cls({name: base, CONTROL_NETWORK: network}, {name: wrapped}, (Stage(name),))

    def trainable(self) -> dict[str, Parameter]:
        """Trained parameters by `<denoiser>.<name>`, after sharding."""
        return {
            f"{name}.{key}": p for name, model in self.models.items() for key, p in adapters.trainable(model).items()
        }


def check_networks(run_file: RunFile, family: Family) -> None:
    """Raises ConfigError for a checkpoint of more networks than the objective can train."""
    names = components.denoiser_names(family, run_file.model_folder)
    if run_file.spec.objective.twin_flow is not None and len(names) > 1:
        raise ConfigError(checkpoint_refusal(run_file.spec.model.source, len(names)))


def _home(run_file: RunFile, distributed: Distributed) -> torch.device:
    """Sharding moves piece by piece to the device: the whole model may not fit there, which is why it is sharded."""
    return torch.device("cpu") if parallel.shards_weights(run_file.plan) else distributed.device


def _loading_device(run_file: RunFile, distributed: Distributed) -> torch.device:
    """A base that is to be quantised goes to the device layer by layer, packed: as a whole it may not fit there either."""
    return _home(run_file, distributed) if run_file.spec.model.quantization is None else torch.device("cpu")


def _quantize(model: nn.Module, run_file: RunFile, family: Family, distributed: Distributed) -> None:
    if run_file.spec.model.quantization is not None:
        home = _home(run_file, distributed)
        quantize(model, run_file.spec.model.quantization, family, distributed.device, home=home)


def _few_steps(model: nn.Module, run_file: RunFile, family: Family) -> FewSteps | None:
    """What tells the model of the end of a step, where the run trains that."""
    if run_file.spec.objective.twin_flow is None:
        return None
    assert family.time_embedder is not None  # every flow family has one, and others are refused
    return FewSteps(model, family.time_embedder)


def _log_installed(name: str, report: adapters.AdapterReport) -> None:
    extra = {"denoiser": name, "trainable": report.trainable, "total": report.total, "modules": report.modules}
    log.info("adapter installed", extra=extra)


def _dtypes(precision: str, optimizer: str, adapter: str) -> tuple[torch.dtype, torch.dtype]:
    """(dtype the base is loaded in, dtype of the trained weights). Full-rank trains the base itself, so both are one there."""
    trained = torch.bfloat16 if optimizer == "adamw-bf16" else torch.float32
    if adapter == "full":
        return trained, trained
    return (torch.bfloat16 if precision == "bf16" else torch.float32), trained


def gathered_weights(denoisers: Denoisers) -> dict[str, dict[str, Any]]:
    """Trained weights by model, whole and on the CPU, on rank 0 (empty elsewhere); no entry for one that is frozen. Collective."""
    trained = {name: list(adapters.trainable(model)) for name, model in denoisers.models.items()}
    # A control network is wrapped inside its denoiser's wrapper; by itself it is gathered as any other.
    holders = denoisers.models | denoisers.wrapped
    return {name: parallel.full_state(holders[name], keys) for name, keys in trained.items() if keys}
