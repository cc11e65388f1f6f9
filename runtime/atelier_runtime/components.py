"""The parts of a checkpoint folder that is laid out as a hub repository: configs, encoders, denoisers, the pipeline that samples.

Loading is diffusers' own, also of the networks that are ours because diffusers lacks them. What is decided here is who loads what:
encoders without denoisers to build the cache, denoisers alone to train, and a pipeline around denoisers that are already in memory to
sample.
"""

import errno
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from torch import nn

from atelier_api.errors import ConfigError
from atelier_runtime import networks
from atelier_runtime.control import CONTROL_NETWORK
from atelier_runtime.family import Family, Frame

_LASTING = {None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR}
"""Errors of files that stay; None is that of diffusers and transformers, who say so in words."""


def read_pipeline_config(folder: str | Path) -> dict[str, Any]:
    """`model_index.json`. Raises ConfigError where the folder is no pipeline checkpoint."""
    return _read_json(folder, "model_index.json")


def scheduler_config(folder: str | Path) -> dict[str, Any]:
    """`scheduler/scheduler_config.json`. Raises ConfigError where there is none."""
    return _read_json(folder, "scheduler/scheduler_config.json")


def denoiser_config(folder: str | Path, name: str) -> dict[str, Any]:
    """`config.json` of a denoiser. Raises ConfigError where there is none."""
    return _read_json(folder, f"{name}/config.json")


def denoiser_names(family: Family, folder: str | Path) -> tuple[str, ...]:
    """The family's denoisers that this checkpoint has, in the family's order. Raises ConfigError where it lacks the first."""
    config = _checked_config(family, folder)
    present = tuple(name for name in family.denoisers if _class_of(config, name) is not None)
    if family.denoisers[0] not in present:
        raise ConfigError(
            f"the checkpoint in {folder} has no component {family.denoisers[0]!r}, which family {family.name!r} trains; "
            "point spec.model.source at a whole checkpoint of the family"
        )
    return present


def given_frames(family: Family, folder: str | Path, shown_frames: int = 1) -> tuple[Frame, ...]:
    """The frames of a clip that this checkpoint is shown, of a family that continues clips as many first ones as `shown_frames`.

    Raises ConfigError for a checkpoint that the family cannot train.
    """
    if family.facts.modality != "video":
        return ()
    config = _checked_config(family, folder)
    given = family.given_frames(config, denoiser_config(folder, family.denoisers[0]))
    again: Frame = "first"
    return (*[again] * (shown_frames - 1), *given) if family.facts.continues else given


def sample_rate(family: Family, folder: str | Path) -> int:
    """Samples per second of the sounds that this checkpoint's autoencoder takes.

    Raises ConfigError for a checkpoint that the family cannot train.
    """
    _checked_config(family, folder)
    rate: int = _read_json(folder, "vae/config.json")["sampling_rate"]
    return rate


def pipeline_name(family: Family, folder: str | Path) -> str:
    """Class that samples this checkpoint."""
    return family.pipeline_of(read_pipeline_config(folder))


def class_named(name: str) -> Any:
    """The model or pipeline of that name in diffusers, or ours where diffusers has none."""
    return getattr(diffusers, name, None) or getattr(networks, name)


def library_of(name: str) -> str:
    """The Python module that has `class_named` by that name."""
    return diffusers.__name__ if hasattr(diffusers, name) else networks.__name__


def load_encoders(family: Family, folder: str | Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The stock pipeline without its denoisers, in eval mode and without gradients: text encoders, autoencoder, scheduler."""
    return _load_around({}, family, folder, dtype=dtype, device=device)


def load_denoiser(folder: str | Path, name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """One denoiser, in eval mode and without gradients. Layers that the class keeps in fp32 stay so whatever `dtype` says."""
    class_name = _class_of(read_pipeline_config(folder), name)
    if class_name is None:
        raise ConfigError(
            f"the checkpoint in {folder} has no component {name!r}; spec.model.source must be a whole checkpoint"
        )
    with _whole(folder):
        model: nn.Module = class_named(class_name).from_pretrained(
            str(folder), subfolder=name, dtype=dtype, local_files_only=True
        )
    return _placed(model, name, folder, device)


def load_pipeline(
    family: Family,
    folder: str | Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    denoisers: Mapping[str, nn.Module],
) -> Any:
    """The stock pipeline around `denoisers`, which are used as they are: neither moved nor cast, nor their mode changed.

    With a control network among them it is the one that samples with such.
    """
    training = {name: module.training for name, module in denoisers.items()}
    pipe = _load_around(denoisers, family, folder, dtype=dtype, device=device)
    for name, module in denoisers.items():
        module.train(training[name])
    return pipe


def _load_around(
    denoisers: Mapping[str, nn.Module], family: Family, folder: str | Path, *, dtype: torch.dtype, device: torch.device
) -> Any:
    config = _checked_config(family, folder)
    given: dict[str, Any] = dict.fromkeys((*family.denoisers, *family.left_out))
    # diffusers wants to be told of what the checkpoint goes without, although the index says so.
    given |= {name: None for name, entry in config.items() if entry == [None, None]}
    with _whole(folder):
        given |= family.provided_components(Path(folder))
    given |= denoisers
    controlled = family.control if CONTROL_NETWORK in denoisers else None
    pipeline = class_named(controlled.pipeline if controlled else family.pipeline_of(config))
    _check_whole(pipeline, {*config, *given}, folder)
    with _whole(folder):
        pipe = pipeline.from_pretrained(str(folder), dtype=dtype, local_files_only=True, **given)
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module) and name not in denoisers:
            _placed(component, name, folder, device)
    return pipe


def _check_whole(pipeline: Any, known: set[str], folder: str | Path) -> None:
    """Raises ConfigError where the index lacks a component: some publishers leave encoders to be fetched from elsewhere."""
    parameters = list(inspect.signature(pipeline.__init__).parameters.values())[1:]
    needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    lacking = [name for name in needed if name not in {*known, *pipeline._optional_components}]
    if lacking:
        raise ConfigError(
            f"the checkpoint in {folder} has no {', '.join(lacking)}, which {pipeline.__name__} needs; save a whole pipeline with "
            "save_pretrained, and set spec.model.source to it"
        )


def _placed(module: nn.Module, name: str, folder: str | Path, device: torch.device) -> nn.Module:
    """The component on its device, in eval mode and without gradients. What diffusers finds no weights for it leaves on `meta`."""
    missing = [tensor for tensor, value in module.state_dict().items() if value.is_meta]
    if missing:
        raise ConfigError(
            f"the checkpoint in {folder} has no weights for {len(missing)} tensors of {name}, the first is {missing[0]}; fetch it "
            "again, or change spec.model.source"
        )
    return module.to(device).eval().requires_grad_(False)


@contextmanager
def _whole(folder: str | Path) -> Iterator[None]:
    """Raises ConfigError for files that no other attempt would find whole. A disk that fails may be well again: its errors pass."""
    try:
        yield
    except (OSError, ValueError, SafetensorError, UnpicklingError) as error:
        if isinstance(error, OSError) and error.errno not in _LASTING:
            raise
        text = " ".join(str(error).split())
        raise ConfigError(
            f"the checkpoint in {folder} cannot be loaded ({type(error).__name__}: {text[:300]}); make its files readable or "
            "fetch it again, or change spec.model.source"
        ) from error


def _checked_config(family: Family, folder: str | Path) -> dict[str, Any]:
    config = read_pipeline_config(folder)
    if config.get("_class_name") not in family.facts.pipelines:
        raise ConfigError(
            f"spec.model.family is {family.name!r}, which trains checkpoints of {', '.join(family.facts.pipelines)}, but the one in "
            f"{folder} is a {config.get('_class_name')}; change spec.model.family or spec.model.source"
        )
    return config


def _class_of(config: Mapping[str, Any], name: str) -> str | None:
    """Class of a component in `model_index.json`, where it is [library, class]; None where the checkpoint goes without."""
    _, class_name = config.get(name) or (None, None)
    return class_name


def _read_json(folder: str | Path, name: str) -> dict[str, Any]:
    path = Path(folder) / name
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder} has no {name}; spec.model.source must be a checkpoint laid out as a diffusers pipeline"
        ) from error
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path} is no valid JSON ({error}); fetch the checkpoint of spec.model.source again"
        ) from error
    return content
