"""Sizes of a checkpoint in a local folder that is laid out as a hub repository, from its configs and safetensors headers.

Only JSON is read: a safetensors file begins with the length of its header (8 bytes, little endian) and the header, which names
every tensor's shape. Weights are not touched, and neither torch nor safetensors is imported.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atelier_api.errors import ConfigError
from atelier_api.families import FAMILIES, FamilyFacts, Flavour
from atelier_api.problem import shown
from atelier_api.v1alpha1.model import ModelSpec
from atelier_operator.planner.memory import ModelFacts

INDEX = "model_index.json"
LONGEST_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format itself."""

DENOISERS = ("transformer", "transformer_2", "unet", "dit", "prior")
"""Components of a pipeline that can be trained."""

ENCODERS = ("text_encoder", "image_encoder")
"""How the names of components begin that encode what the denoiser is told."""


@dataclass(frozen=True)
class Tensors:
    """Number of values in each tensor of a component, by name."""

    values: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.values.values())

    @property
    def largest_block(self) -> int:
        """The largest group of tensors whose names agree up to the first number: one block of a list of blocks. 0: no lists.

        Up to the second where that follows at once: a list of lists.
        """
        blocks: dict[str, int] = {}
        for name, count in self.values.items():
            parts = name.split(".")
            place = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
            if place is not None:
                length = place + 2 if parts[place + 1 : place + 2] and parts[place + 1].isdecimal() else place + 1
                block = ".".join(parts[:length])
                blocks[block] = blocks.get(block, 0) + count
        return max(blocks.values(), default=0)


@dataclass(frozen=True)
class Shape:
    """Number of blocks, their width and that of their feed-forward."""

    layers: int
    width: int
    mlp_width: int


def checkpoint_facts(model: ModelSpec, folder: Path) -> ModelFacts:
    """The facts of the checkpoint in `folder`. Raises ConfigError when it is none, not whole, or of another family."""
    family = FAMILIES[model.family]
    if not folder.is_dir():
        raise ConfigError(f"spec.model.source is {shown(model.source)}; there is no folder {folder}")
    index = _json(folder / INDEX)
    _check_pipeline(family, folder, index)
    components = [name for name, entry in index.items() if _is_component(entry)]
    denoisers = [name for name in components if name in DENOISERS]
    if not denoisers:
        raise ConfigError(
            f"spec.model.source: {folder / INDEX} names none of {', '.join(DENOISERS)}; there is nothing to train"
        )
    denoiser = _tensors(folder / denoisers[0])
    encoders = [_tensors(folder / name).total for name in components if name.startswith(ENCODERS)]
    flavour = min(family.flavours, key=lambda flavour: abs(math.log(denoiser.total / flavour.parameters)))
    shape = shape_of(_json(folder / denoisers[0] / "config.json")) or _scaled(flavour, denoiser.total)
    return ModelFacts(
        family=family,
        origin=f"the checkpoint in {folder}",
        parameters=denoiser.total,
        layers=shape.layers,
        width=shape.width,
        mlp_width=shape.mlp_width,
        text_tokens=flavour.text_tokens,
        encoder_parameters=sum(encoders),
        vae_parameters=sum(_tensors(folder / name).total for name in family.autoencoder if name in components),
        activation_bytes_per_token=max(1, flavour.activation_bytes_per_token * shape.width // flavour.width),
        largest_block=denoiser.largest_block or denoiser.total,
        experts=len(denoisers),
        quantized_share=flavour.quantized_share,
        fp32_share=flavour.fp32_share,
        control_parameters=flavour.control_parameters * denoiser.total // flavour.parameters,
        control_layers=-(-flavour.control_layers * shape.layers // flavour.layers),
    )


def shape_of(config: Mapping[str, Any]) -> Shape | None:
    """The shape that a denoiser's `config.json` tells; None when it names its sizes in another way."""
    if "down_block_types" in config:
        return _unet_shape(config)
    heads, head_width = config.get("num_attention_heads"), config.get("attention_head_dim")
    if isinstance(heads, int) and isinstance(head_width, int):
        width = heads * head_width
        layers = int(config.get("num_layers", 0)) + int(config.get("num_single_layers", 0))
        mlp_width = int(config.get("ffn_dim", 4 * width))
    elif "dim" in config:
        width = int(config["dim"])
        layers = int(config.get("n_layers", 0)) + 2 * int(config.get("n_refiner_layers", 0))
        mlp_width = width * 8 // 3
    else:
        return None
    return Shape(layers, width, mlp_width) if layers > 0 and width > 0 else None


def _unet_shape(config: Mapping[str, Any]) -> Shape:
    """Transformer blocks of a UNet, and the width of its deepest level."""
    channels = config["block_out_channels"]
    depths, resnets = config.get("transformer_layers_per_block", 1), config.get("layers_per_block", 2)
    depths = depths if isinstance(depths, list) else [depths] * len(channels)
    resnets = resnets if isinstance(resnets, list) else [resnets] * len(channels)
    down = zip(config.get("down_block_types", []), resnets, depths, strict=True)
    up = zip(config.get("up_block_types", []), reversed(resnets), reversed(depths), strict=True)
    layers = sum(number * depth for kind, number, depth in down if "CrossAttn" in kind)
    layers += sum((number + 1) * depth for kind, number, depth in up if "CrossAttn" in kind)
    return Shape(layers + depths[-1], max(channels), 4 * max(channels))


def _scaled(flavour: Flavour, parameters: int) -> Shape:
    """As many blocks as the flavour has, of the width that gives the number of parameters."""
    scale = math.sqrt(parameters / flavour.parameters)
    return Shape(flavour.layers, max(1, round(flavour.width * scale)), max(1, round(flavour.mlp_width * scale)))


def _check_pipeline(family: FamilyFacts, folder: Path, index: Mapping[str, Any]) -> None:
    kind = index.get("_class_name")
    if kind in family.pipelines:
        return
    fitting = [other.name for other in FAMILIES.values() if kind in other.pipelines]
    raise ConfigError(
        f"spec.model.family is {family.name}, but the checkpoint in {folder} is a {kind}; "
        f"families that fit: {', '.join(fitting) or 'none'}"
    )


def _is_component(entry: Any) -> bool:
    """`[library, class]`; `[null, null]` stands for a component that the checkpoint goes without."""
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"spec.model.source: {path} is missing; {_LAYOUT}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"spec.model.source: {path} cannot be read as JSON ({error}); fetch the checkpoint again"
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f"spec.model.source: {path} holds no JSON object; {_LAYOUT}")
    return content


_LAYOUT = "the folder must be laid out as a hub repository of diffusers, with model_index.json at its top"


def _tensors(folder: Path) -> Tensors:
    """The tensors of one component. Files of several precisions name the same tensors, which are counted once."""
    files = sorted(folder.glob("*.safetensors"))
    for listing in sorted(folder.glob("*.safetensors.index.json")):
        for name in sorted(set(_json(listing).get("weight_map", {}).values())):
            if folder / name not in files:
                raise ConfigError(f"spec.model.source: {folder / name} is missing; fetch the checkpoint again")
    if not files:
        raise ConfigError(
            f"spec.model.source: {folder} holds no .safetensors file; {_LAYOUT}, its weights as safetensors"
        )
    return Tensors({name: count for file in files for name, count in _header(file)})


def _header(path: Path) -> Iterator[tuple[str, int]]:
    """Name and number of values of each tensor in a safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if length > min(size, LONGEST_HEADER_BYTES):
            raise ConfigError(f"spec.model.source: {path} is no safetensors file, or a git-lfs pointer; fetch it again")
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
            counts = [(name, math.prod(entry["shape"])) for name, entry in tensors.items()]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise ConfigError(f"spec.model.source: {path} has no safetensors header; fetch it again") from None
    if size < 8 + length + end:
        raise ConfigError(f"spec.model.source: {path} is cut short, {size} of {8 + length + end} bytes; fetch it again")
    yield from counts
