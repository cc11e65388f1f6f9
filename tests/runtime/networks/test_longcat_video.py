"""LongCat-Video's network against its equations, written again with loops over tokens, heads and channels in float64."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from atelier_runtime.networks import LongCatVideoTransformer3DModel
from atelier_runtime.networks.longcat_video_pipeline import cfg_zero_star
from family_models.longcat_video import longcat_transformer, projected

Weights = Mapping[str, Tensor]
FRAMES, ROWS, COLUMNS = 3, 2, 3  # of tokens
HEADS, HEAD_WIDTH = 2, 16
TEXT_LENGTHS = (2, 5)


def linear(weights: Weights, name: str, vector: Tensor) -> Tensor:
    product = weights[f"{name}.weight"] @ vector
    return product + weights[f"{name}.bias"] if f"{name}.bias" in weights else product


def silu(vector: Tensor) -> Tensor:
    return vector / (1 + torch.exp(-vector))


def standardised(vector: Tensor) -> Tensor:
    centred = vector - vector.sum() / len(vector)
    return centred / torch.sqrt((centred * centred).sum() / len(vector) + 1e-6)


def normed_head(weights: Weights, name: str, vector: Tensor) -> Tensor:
    return vector / torch.sqrt((vector * vector).sum() / len(vector) + 1e-6) * weights[f"{name}.weight"]


def time_vector(weights: Weights, time: float) -> Tensor:
    half = weights["t_embedder.mlp.0.weight"].shape[1] // 2
    angles = [time * math.exp(-math.log(10000) * index / half) for index in range(half)]
    waves = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
    return linear(weights, "t_embedder.mlp.2", silu(linear(weights, "t_embedder.mlp.0", waves)))


def text_vector(weights: Weights, vector: Tensor) -> Tensor:
    inner = linear(weights, "y_embedder.y_proj.0", vector)
    inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    return linear(weights, "y_embedder.y_proj.2", inner)


def turned(vector: Tensor, place: tuple[int, int, int]) -> Tensor:
    """A head's channels as complex numbers, one pair after the other: 4 of the frame, 2 of the row, 2 of the column."""
    result = vector.clone()
    pair = 0
    for position, width in zip(place, (8, 4, 4), strict=True):
        for index in range(width // 2):
            angle = position / 10000 ** (2 * index / width)
            number = complex(*vector[2 * pair : 2 * pair + 2].tolist()) * complex(math.cos(angle), math.sin(angle))
            result[2 * pair], result[2 * pair + 1] = number.real, number.imag
            pair += 1
    return result


def attention(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    scores = [math.exp(float(query @ key) / math.sqrt(HEAD_WIDTH)) for key in keys]
    return sum(score * value for score, value in zip(scores, values, strict=True)) / sum(scores)


def by_head(vector: Tensor) -> list[Tensor]:
    return [vector[head * HEAD_WIDTH : (head + 1) * HEAD_WIDTH] for head in range(HEADS)]


def self_attention(weights: Weights, name: str, tokens: list[Tensor], clean: int) -> list[Tensor]:
    places = [(f, r, c) for f in range(FRAMES) for r in range(ROWS) for c in range(COLUMNS)]
    queries, keys, values = [], [], []
    for token, place in zip(tokens, places, strict=True):
        projected = linear(weights, f"{name}.qkv", token)
        query, key, value = (by_head(part) for part in projected.split(len(token)))
        queries.append([turned(normed_head(weights, f"{name}.q_norm", head), place) for head in query])
        keys.append([turned(normed_head(weights, f"{name}.k_norm", head), place) for head in key])
        values.append(value)
    outputs = []
    for number, query in enumerate(queries):
        seen = range(clean) if number < clean else range(len(tokens))
        heads = [
            attention(query[head], [keys[i][head] for i in seen], [values[i][head] for i in seen])
            for head in range(HEADS)
        ]
        outputs.append(linear(weights, f"{name}.proj", torch.cat(heads)))
    return outputs


def cross_attention(weights: Weights, name: str, token: Tensor, text: list[Tensor]) -> Tensor:
    query = [
        normed_head(weights, f"{name}.q_norm", head) for head in by_head(linear(weights, f"{name}.q_linear", token))
    ]
    pairs = [linear(weights, f"{name}.kv_linear", word).split(len(token)) for word in text]
    keys = [[normed_head(weights, f"{name}.k_norm", head) for head in by_head(key)] for key, _ in pairs]
    values = [by_head(value) for _, value in pairs]
    heads = [attention(query[h], [key[h] for key in keys], [value[h] for value in values]) for h in range(HEADS)]
    return linear(weights, f"{name}.proj", torch.cat(heads))


def through_block(
    weights: Weights, name: str, tokens: list[Tensor], text: list[Tensor], times: list[Tensor], clean: int
) -> list[Tensor]:
    width, in_frame = len(tokens[0]), ROWS * COLUMNS
    modulation = [linear(weights, f"{name}.adaLN_modulation.1", silu(time)).split(width) for time in times]
    of = [modulation[number // in_frame] for number in range(len(tokens))]
    shifted = [standardised(x) * (1 + m[1]) + m[0] for x, m in zip(tokens, of, strict=True)]
    changes = self_attention(weights, f"{name}.attn", shifted, clean)
    tokens = [x + m[2] * change for x, m, change in zip(tokens, of, changes, strict=True)]
    outputs = []
    for number, (token, m) in enumerate(zip(tokens, of, strict=True)):
        x = token
        if number >= clean:
            norm = f"{name}.pre_crs_attn_norm"
            asking = standardised(x) * weights[f"{norm}.weight"] + weights[f"{norm}.bias"]
            x = x + cross_attention(weights, f"{name}.cross_attn", asking, text)
        inner = standardised(x) * (1 + m[4]) + m[3]
        inner = silu(linear(weights, f"{name}.ffn.w1", inner)) * linear(weights, f"{name}.ffn.w3", inner)
        outputs.append(x + m[5] * linear(weights, f"{name}.ffn.w2", inner))
    return outputs


def reference(weights: Weights, latents: Tensor, times: list[float], text: list[Tensor], conditions: int) -> Tensor:
    """The flow of one sample [16, F, H, W]; `text` are the caption's embedded tokens that are attended to."""
    kernel, bias = weights["x_embedder.proj.weight"], weights["x_embedder.proj.bias"]
    places = [(f, r, c) for f in range(FRAMES) for r in range(ROWS) for c in range(COLUMNS)]
    tokens = [
        (kernel[:, :, 0] * latents[:, f, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2]).sum(dim=(1, 2, 3)) + bias
        for f, r, c in places
    ]
    vectors = [time_vector(weights, time) for time in times]
    for block in range(2):
        clean = conditions * ROWS * COLUMNS
        tokens = through_block(weights, f"blocks.{block}", tokens, text, vectors, clean)
    flow = torch.zeros_like(latents)
    for token, (f, r, c) in zip(tokens, places, strict=True):
        shift, scale = linear(weights, "final_layer.adaLN_modulation.1", silu(vectors[f])).split(len(token))
        values = linear(weights, "final_layer.linear", standardised(token) * (1 + scale) + shift)
        for row in range(2):
            for column in range(2):
                start = (2 * row + column) * 16
                flow[:, f, 2 * r + row, 2 * c + column] = values[start : start + 16]
    return flow


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    longest = max(TEXT_LENGTHS)
    return {
        "hidden_states": torch.randn(2, 16, FRAMES, 2 * ROWS, 2 * COLUMNS, generator=generator),
        "timestep": torch.tensor([[0.0, 250.0, 730.0], [0.0, 990.0, 10.0]]),
        "encoder_hidden_states": torch.randn(2, longest, 24, generator=generator),
        "encoder_attention_mask": torch.tensor([[int(i < length) for i in range(longest)] for length in TEXT_LENGTHS]),
    }


def network(zero_pad: bool) -> LongCatVideoTransformer3DModel:
    """Weights of all norms and biases random, too: ones and zeros would hide that they are left out."""
    model = longcat_transformer(zero_pad)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("conditions", [0, 1, 2], ids=["text alone", "a clean first frame", "two clean frames"])
@pytest.mark.parametrize("zero_pad", [True, False], ids=["padding attended as zero", "padding masked"])
@torch.no_grad()
def test_the_network_equals_its_equations_written_with_loops(zero_pad: bool, conditions: int) -> None:
    model, given = network(zero_pad), inputs()
    actual = model(**given, num_cond_latents=conditions, return_dict=False)[0]
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for sample in range(2):
        text = [text_vector(weights, vector) for vector in given["encoder_hidden_states"][sample].double()]
        real = text[: TEXT_LENGTHS[sample]]
        padding = [torch.zeros_like(word) for word in text[len(real) :]] if zero_pad else []
        times = given["timestep"][sample].tolist()
        expected = reference(weights, given["hidden_states"][sample].double(), times, real + padding, conditions)
        torch.testing.assert_close(actual[sample].double(), expected, atol=1e-5, rtol=1e-5)
        assert expected.std() > 0.1


@torch.no_grad()
def test_one_time_for_a_sample_is_the_same_time_for_every_frame() -> None:
    model, given = network(True), inputs()
    one = given | {"timestep": torch.tensor([250.0, 730.0])}
    each = given | {"timestep": torch.tensor([[250.0] * FRAMES, [730.0] * FRAMES])}
    assert torch.equal(model(**one).sample, model(**each).sample)


@torch.no_grad()
def test_what_is_to_be_drawn_changes_no_clean_frame_and_the_clean_frame_changes_what_is_drawn() -> None:
    model, given = network(True), inputs()
    noisy_changed = given["hidden_states"].clone()
    noisy_changed[:, :, 1:] += 1
    clean_changed = given["hidden_states"].clone()
    clean_changed[:, :, 0] += 1
    before, noisy, clean = (
        model(**(given | {"hidden_states": latents}), num_cond_latents=1).sample
        for latents in (given["hidden_states"], noisy_changed, clean_changed)
    )
    torch.testing.assert_close(before[:, :, 0], noisy[:, :, 0])
    assert (before - clean)[:, :, 1:].abs().max() > 1e-3


@torch.no_grad()
def test_time_modulation_and_output_stay_exact_under_autocast() -> None:
    """In bf16 the modulation of 0.001 beside 1 would be lost."""
    layer = network(True).final_layer
    generator = torch.Generator().manual_seed(0)
    hidden, time = torch.randn(1, 12, 32, generator=generator), torch.randn(1, 3, 16, generator=generator)
    expected = layer(hidden, time)
    with torch.autocast("cpu", torch.bfloat16):
        actual = layer(hidden, time)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_patches_over_frames_are_refused() -> None:
    with pytest.raises(ValueError, match=r"patch_size is \(2, 2, 2\)"):
        LongCatVideoTransformer3DModel(hidden_size=32, depth=1, num_heads=2, patch_size=(2, 2, 2))


def test_names_and_shapes_are_those_of_the_published_checkpoint() -> None:
    with torch.device("meta"):
        model: Any = LongCatVideoTransformer3DModel(depth=1)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    block, wide = "blocks.0.", 4096
    assert shapes == {
        "x_embedder.proj.weight": (wide, 16, 1, 2, 2),
        "x_embedder.proj.bias": (wide,),
        **layer("t_embedder.mlp.0", 512, 256),
        **layer("t_embedder.mlp.2", 512, 512),
        **layer("y_embedder.y_proj.0", wide, 4096),
        **layer("y_embedder.y_proj.2", wide, wide),
        **layer(f"{block}adaLN_modulation.1", 6 * wide, 512),
        f"{block}pre_crs_attn_norm.weight": (wide,),
        f"{block}pre_crs_attn_norm.bias": (wide,),
        **layer(f"{block}attn.qkv", 3 * wide, wide),
        **layer(f"{block}attn.proj", wide, wide),
        **layer(f"{block}cross_attn.q_linear", wide, wide),
        **layer(f"{block}cross_attn.kv_linear", 2 * wide, wide),
        **layer(f"{block}cross_attn.proj", wide, wide),
        **{f"{block}{part}.{norm}.weight": (128,) for part in ("attn", "cross_attn") for norm in ("q_norm", "k_norm")},
        f"{block}ffn.w1.weight": (11008, wide),
        f"{block}ffn.w2.weight": (wide, 11008),
        f"{block}ffn.w3.weight": (11008, wide),
        **layer("final_layer.linear", 64, wide),
        **layer("final_layer.adaLN_modulation.1", 2 * wide, 512),
    }


def layer(name: str, outputs: int, inputs_: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs_), f"{name}.bias": (outputs,)}


def test_guidance_takes_its_base_from_each_sample_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(2, 3, 2, 2, 2, generator=generator) for _ in range(2))
    together = cfg_zero_star(positive, negative, 4.0)
    alone = [projected(positive[i : i + 1], negative[i : i + 1], 4.0) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
