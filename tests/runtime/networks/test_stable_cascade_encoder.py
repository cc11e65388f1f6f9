"""Stable Cascade's encoder against its equations, written again with loops over places in float64, and against published names."""

from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch

from atelier_runtime.networks import EfficientNetEncoder
from family_models.stable_cascade import efficientnet

Array = np.ndarray
Weights = Mapping[str, Array]
BLOCKS = (  # of the tiny encoder: (kind, stride), by stage
    (("whole", 1), ("whole", 1)),
    (("widened", 2), ("widened", 1)),
    (("widened", 2),),
    (("squeezed", 2), ("squeezed", 1)),
    (("squeezed", 1),),
    (("squeezed", 2), ("squeezed", 1)),
)


def convolved(weights: Weights, name: str, maps: Array, stride: int = 1) -> Array:
    """Maps [C, H, W] under the kernel at every place, zeros around them. A kernel of depth 1 sees its own channel alone."""
    kernel = weights[f"{name}.weight"]
    edge = kernel.shape[-1]
    around = np.pad(maps, ((0, 0), (edge // 2,) * 2, (edge // 2,) * 2))
    rows, columns = (-(-side // stride) for side in maps.shape[1:])
    result = np.zeros((len(kernel), rows, columns))
    for row in range(rows):
        for column in range(columns):
            top, left = row * stride, column * stride
            seen = around[:, top : top + edge, left : left + edge]
            if kernel.shape[1] == 1 and len(maps) > 1:
                result[:, row, column] = (kernel[:, 0] * seen).sum(axis=(1, 2))
            else:
                result[:, row, column] = np.tensordot(kernel, seen, axes=3)
    bias = weights.get(f"{name}.bias")
    return result if bias is None else result + bias[:, None, None]


def standardised(weights: Weights, name: str, maps: Array, epsilon: float) -> Array:
    mean, variance = (weights[f"{name}.running_{of}"][:, None, None] for of in ("mean", "var"))
    return (maps - mean) / np.sqrt(variance + epsilon)


def layer(weights: Weights, name: str, maps: Array, stride: int = 1, *, active: bool = True) -> Array:
    maps = standardised(weights, f"{name}.1", convolved(weights, f"{name}.0", maps, stride), 1e-3)
    maps = maps * weights[f"{name}.1.weight"][:, None, None] + weights[f"{name}.1.bias"][:, None, None]
    return silu(maps) if active else maps


def silu(values: Array) -> Array:
    return values * logistic(values)


def logistic(values: Array) -> Array:
    return 1 / (1 + np.exp(-values))


def through_block(weights: Weights, name: str, maps: Array, kind: str, stride: int) -> Array:
    if kind == "whole":
        changed = layer(weights, f"{name}.0", maps, stride)
    elif kind == "widened":
        changed = layer(weights, f"{name}.1", layer(weights, f"{name}.0", maps, stride), active=False)
    else:
        changed = layer(weights, f"{name}.1", layer(weights, f"{name}.0", maps), stride)
        mean = changed.mean(axis=(1, 2), keepdims=True)
        asked = convolved(weights, f"{name}.2.fc2", silu(convolved(weights, f"{name}.2.fc1", mean)))
        changed = layer(weights, f"{name}.3", changed * logistic(asked), active=False)
    return maps + changed if changed.shape == maps.shape else changed


def reference(weights: Weights, pixels: Array) -> Array:
    maps = layer(weights, "backbone.0", pixels, stride=2)
    for stage, blocks in enumerate(BLOCKS, start=1):
        for number, (kind, stride) in enumerate(blocks):
            maps = through_block(weights, f"backbone.{stage}.{number}.block", maps, kind, stride)
    features = layer(weights, "backbone.7", maps)
    return standardised(weights, "mapper.1", convolved(weights, "mapper.0", features), 1e-5)


def disturbed() -> EfficientNetEncoder:
    """Scales and shifts of the batch norms random, too: ones and zeros would hide that they are left out."""
    model = efficientnet()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("size", [(64, 96), (72, 40)], ids=["whole latents", "edges that 32 does not divide"])
@torch.no_grad()
def test_the_network_equals_its_equations_written_with_loops(size: tuple[int, int]) -> None:
    model = disturbed()
    pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    actual = model(pixels)[0].double().numpy()
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    expected = reference(weights, pixels[0].double().numpy())
    assert actual.shape == (16, -(-size[0] // 32), -(-size[1] // 32))
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.1


def test_the_published_network_has_the_parameters_of_efficientnet_v2_s_and_a_mapper() -> None:
    with torch.device("meta"):
        model = EfficientNetEncoder()
    whole, classifier = 21_458_488, 1280 * 1000 + 1000  # of EfficientNetV2-S, as torchvision publishes it
    assert sum(parameter.numel() for parameter in model.parameters()) == whole - classifier + 1280 * 16


def test_names_and_shapes_are_those_of_the_published_checkpoint() -> None:
    with torch.device("meta"):
        model = EfficientNetEncoder()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == dict(published_shapes())


def published_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from named("backbone.0", 24, 3, 3)
    width = 24
    for stage, (kind, expansion, outputs, depth) in enumerate(
        (
            ("whole", 1, 24, 2),
            ("widened", 4, 48, 4),
            ("widened", 4, 64, 4),
            ("squeezed", 4, 128, 6),
            ("squeezed", 6, 160, 9),
            ("squeezed", 6, 256, 15),
        ),
        start=1,
    ):
        for number in range(depth):
            name, inner = f"backbone.{stage}.{number}.block", width * expansion
            if kind == "whole":
                yield from named(f"{name}.0", outputs, width, 3)
            elif kind == "widened":
                yield from named(f"{name}.0", inner, width, 3)
                yield from named(f"{name}.1", outputs, inner, 1)
            else:
                yield from named(f"{name}.0", inner, width, 1)
                yield from named(f"{name}.1", inner, 1, 3)
                for part, rows, columns in (("fc1", width // 4, inner), ("fc2", inner, width // 4)):
                    yield f"{name}.2.{part}.weight", (rows, columns, 1, 1)
                    yield f"{name}.2.{part}.bias", (rows,)
                yield from named(f"{name}.3", outputs, inner, 1)
            width = outputs
    yield from named("backbone.7", 1280, 256, 1)
    yield "mapper.0.weight", (16, 1280, 1, 1)
    yield from statistics("mapper.1", 16)


def named(name: str, outputs: int, inputs: int, kernel: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A convolution and its batch norm."""
    yield f"{name}.0.weight", (outputs, inputs, kernel, kernel)
    yield f"{name}.1.weight", (outputs,)
    yield f"{name}.1.bias", (outputs,)
    yield from statistics(f"{name}.1", outputs)


def statistics(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.running_mean", (width,)
    yield f"{name}.running_var", (width,)
    yield f"{name}.num_batches_tracked", ()
