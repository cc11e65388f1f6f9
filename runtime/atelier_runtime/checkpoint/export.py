"""Results in the layouts that others load: LoRA files of diffusers and of ComfyUI and kohya's scripts, full-rank model folders.

Below the folder that is given:

    diffusers/pytorch_lora_weights.safetensors   `pipe.load_lora_weights(folder / "diffusers")`, or as the facts say
    kohya/<run>.safetensors                      ComfyUI, kohya's scripts; the family's module says whether diffusers reads it
    diffusers/<component>/                       full-rank: `Pipeline.from_pretrained(base, <component>=Model.from_pretrained(...))`
    diffusers/controlnet/                        a control network: the same, of the pipeline that samples with one

A checkpoint with two experts gives two LoRA files: the first expert's under the names above (kohya: `<run>_high_noise`), the second's
with the ending `_low_noise`, which diffusers loads by `weight_name=..., load_into_transformer_2=True`.

A fused layer of the kohya layout holds the LoRAs of its parts block by block and a multiple of their rank. Its alpha is that multiple
as well, so that alpha / rank stays. DoRA is not written in that layout: diffusers drops its magnitudes, and ComfyUI divides by the
norm of the base weight where DoRA divides by that of the sum.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from safetensors.torch import save_file
from torch import Tensor

from atelier_api.errors import ConfigError
from atelier_api.run_file import RunFile
from atelier_api.v1alpha1.adapter import LoraAdapter, alpha_of
from atelier_runtime import components
from atelier_runtime.checkpoint.exported_file import (
    ExportedFile,
    Provenance,
    State,
    as_exported,
    compare,
    complete,
    details_of,
    noise_range,
)
from atelier_runtime.control import CONTROL_NETWORK
from atelier_runtime.family import Family
from atelier_runtime.lora_layout import LoraKey, LoraLayout
from atelier_runtime.module_names import matching_expression

_PARAMETER = re.compile(r"(?P<module>.+)\.(?P<matrix>lora_A|lora_B|lora_magnitude_vector)\.[^.]+\.weight")


@dataclass(frozen=True)
class LoraWeights:
    """The matrices of one module: `down` [rank, in], `up` [out, rank], and the magnitude [out] of DoRA."""

    down: Tensor
    up: Tensor
    magnitude: Tensor | None


def check_formats(run_file: RunFile, family: Family, modules: Iterable[str]) -> None:
    """Raise ConfigError where `spec.publish.formats` has a layout that cannot hold this LoRA. To be asked before training.

    `kohya` beside `diffusers`, the default, means: where the family has such a layout. `modules` are the full names of the trained
    modules. `atelier_api.rules` has refused what the spec alone tells.
    """
    adapter = run_file.spec.adapter
    if "kohya" not in run_file.spec.publish.formats or adapter.type != "lora":
        return
    if adapter.dora:
        raise ValueError("spec.publish.formats has 'kohya' with spec.adapter.dora, and was not refused")
    layout = family.lora_layout
    if layout is None:
        if "diffusers" in run_file.spec.publish.formats:
            return
        raise ValueError(f"spec.publish.formats is [kohya], which {family.name} does not have, and was not refused")
    unnamed = [module for module in modules if layout.key(module) is None]
    if unnamed:
        raise ConfigError(
            f"spec.publish.formats has 'kohya', which has no name for {len(unnamed)} trained modules, such as {unnamed[0]}; "
            "set spec.publish.formats to [diffusers] or spec.adapter.targets to attention or mlp"
        )


def export_lora(
    weights: Mapping[str, State], run_file: RunFile, family: Family, folder: Path, *, provenance: Provenance
) -> list[ExportedFile]:
    """Write the LoRA in all `spec.publish.formats`.

    `weights` are the adapter's whole tensors on the CPU by component and parameter name, in the dtype to be saved. Raises
    ConfigError as `check_formats` does, and StoreError where a file reads back different.
    """
    adapter = run_file.spec.adapter
    if adapter.type != "lora":
        raise ValueError(f"a LoRA cannot be made of an adapter of type {adapter.type}")
    loras = {component: lora_weights(state) for component, state in weights.items()}
    for modules in loras.values():
        check_formats(run_file, family, modules)
    exported = []
    for index, (component, modules) in enumerate(loras.items()):
        noise = noise_range(run_file, family, list(loras), component)
        details = details_of(run_file, family, component, provenance)
        if "diffusers" in run_file.spec.publish.formats:
            ending = "" if index == 0 else f"_{noise}"
            path = folder / "diffusers" / f"pytorch_lora_weights{ending}.safetensors"
            _write_diffusers(path, modules, family, adapter)
            exported.append(complete(path, "diffusers", details))
        if "kohya" in run_file.spec.publish.formats and family.lora_layout is not None:  # or it was refused above
            path = folder / "kohya" / f"{run_file.identity.name}{f'_{noise}' if noise else ''}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(kohya_tensors(modules, family.lora_layout, _reader_alpha(adapter)), path)
            exported.append(complete(path, "kohya", details))
    return exported


def export_models(
    weights: Mapping[str, State], run_file: RunFile, family: Family, folder: Path, *, provenance: Provenance
) -> list[ExportedFile]:
    """Write each trained model, a denoiser or a control network, as a folder in `hyperparameters.precision`, with `atelier.json`.

    `weights` are the trained parameters; what was frozen comes from the base checkpoint. Raises StoreError where a file reads
    back different.
    """
    exported = []
    for component, state in weights.items():
        model = _untrained(component, run_file, family)
        unexpected = model.load_state_dict(state, strict=False).unexpected_keys
        if unexpected:
            raise ValueError(f"the base checkpoint's {component} has no parameters {', '.join(unexpected[:5])}")
        target = folder / "diffusers" / component
        model.save_pretrained(target)
        details = details_of(run_file, family, component, provenance)
        (target / "atelier.json").write_text(json.dumps(details, indent=2) + "\n")
        compare(target, sorted(target.glob("*.safetensors")), model.state_dict())
        exported += [as_exported(path, "diffusers") for path in sorted(target.iterdir())]
    return exported


def _untrained(component: str, run_file: RunFile, family: Family) -> Any:
    """The model as the base checkpoint has it; a control network as it is copied from there."""
    dtype = torch.bfloat16 if run_file.spec.hyperparameters.precision == "bf16" else torch.float32
    if component != CONTROL_NETWORK:
        return components.load_denoiser(run_file.model_folder, component, dtype, torch.device("cpu"))
    assert family.control is not None
    base = components.load_denoiser(run_file.model_folder, family.denoisers[0], dtype, torch.device("cpu"))
    return family.control.copied(base).to(dtype)


def lora_weights(state: State) -> dict[str, LoraWeights]:
    """The matrices by module, from peft's parameters by name (`<module>.lora_A.<adapter>.weight` ...)."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = _PARAMETER.fullmatch(name)
        if match is None:
            raise ValueError(f"{name} is no parameter of a LoRA")
        modules.setdefault(match["module"], {})[match["matrix"]] = tensor.contiguous()
    return {
        module: LoraWeights(matrices["lora_A"], matrices["lora_B"], matrices.get("lora_magnitude_vector"))
        for module, matrices in modules.items()
    }


def kohya_tensors(modules: Mapping[str, LoraWeights], layout: LoraLayout, alpha: float) -> dict[str, Tensor]:
    """`<layer>.lora_down.weight`, `.lora_up.weight` and `.alpha` of every layer; the update is up @ down * alpha / rank."""
    layers: dict[str, list[tuple[LoraKey, LoraWeights]]] = {}
    for module, matrices in modules.items():
        key = layout.key(module)
        if key is None:
            raise ValueError(f"the layout has no name for {module}")
        layers.setdefault(key.name, []).append((key, matrices))
    tensors = {}
    for name, parts in layers.items():
        count = len(parts[0][0].heights)
        down, up = (parts[0][1].down, parts[0][1].up) if count == 1 else _fused(parts)
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = up
        tensors[f"{name}.alpha"] = torch.tensor(alpha * count)
    return tensors


def _fused(parts: Sequence[tuple[LoraKey, LoraWeights]]) -> tuple[Tensor, Tensor]:
    """One LoRA of `len(heights)` times the rank: each part's matrices in a block of their own, zeros for parts not trained."""
    heights = parts[0][0].heights
    trained = {key.part: matrices for key, matrices in parts}
    like = parts[0][1].down
    rank, width = like.shape
    rows = [len(trained[part].up) if part in trained else height * width for part, height in enumerate(heights)]
    down = like.new_zeros(len(heights) * rank, width)
    up = like.new_zeros(sum(rows), len(heights) * rank)
    for part, matrices in trained.items():
        start, block = sum(rows[:part]), slice(part * rank, (part + 1) * rank)
        down[block] = matrices.down
        up[start : start + rows[part], block] = matrices.up
    return down, up


def _reader_alpha(adapter: LoraAdapter) -> float:
    """The alpha with which alpha / rank is the scale of training, also for rank-stabilised LoRA, which readers do not know."""
    alpha = alpha_of(adapter)
    return alpha * math.sqrt(adapter.rank) if adapter.rslora else alpha


def _write_diffusers(path: Path, modules: Mapping[str, LoraWeights], family: Family, adapter: LoraAdapter) -> None:
    """The file as diffusers' pipelines write it, also for one that lacks the method.

    Every component goes under the name of the first: that is what the loader reads.
    """
    layers = {}
    for module, matrices in modules.items():
        layers[f"{module}.lora_A.weight"] = matrices.down
        layers[f"{module}.lora_B.weight"] = matrices.up
        if matrices.magnitude is not None:
            layers[f"{module}.lora_magnitude_vector"] = matrices.magnitude
    # The fields that every version of peft knows: one that is unknown to a reader makes it fail.
    config = {
        "r": adapter.rank,
        "lora_alpha": adapter.rank if adapter.alpha is None else adapter.alpha,
        "target_modules": matching_expression(modules),
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
    }
    component = family.denoisers[0]
    LoraBaseMixin._save_lora_weights(path.parent, {component: layers}, {component: config}, weight_name=path.name)
