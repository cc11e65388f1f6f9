"""ACE-Step v1's network against its equations, written again with loops over tokens, heads and channels in float64."""

import cmath
import math
from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from atelier_runtime.networks import ACEStepTransformer2DModel
from family_models.ace_step_v1 import CHANNELS, ROWS, TRANSFORMER, published_parts, transformer

Weights = Mapping[str, Tensor]
HEADS, HEAD_WIDTH = TRANSFORMER["num_attention_heads"], TRANSFORMER["attention_head_dim"]
COLUMNS, TEXT, WORDS = 5, 3, 4


def linear(weights: Weights, name: str, vector: Tensor) -> Tensor:
    product = weights[f"{name}.weight"] @ vector
    return product + weights[f"{name}.bias"] if f"{name}.bias" in weights else product


def silu(values: Tensor) -> Tensor:
    return values / (1 + torch.exp(-values))


def standardised(weights: Weights, name: str, vector: Tensor) -> Tensor:
    centred = vector - vector.mean()
    normed = centred / (centred.square().mean() + 1e-5).sqrt()
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def unit(vector: Tensor) -> Tensor:
    return vector / (vector.square().mean() + 1e-6).sqrt()


def by_head(vector: Tensor) -> list[Tensor]:
    return list(vector.split(len(vector) // HEADS))


def turned(vector: Tensor, position: int) -> Tensor:
    """Each of a pair is the part of a complex product that it would be, were the pair turned at its own speed."""
    result = vector.clone()
    for channel in range(HEAD_WIDTH):
        pair = channel - channel % 2
        speed = 1e6 ** (-2 * (channel % (HEAD_WIDTH // 2)) / HEAD_WIDTH)
        product = complex(float(vector[pair]), float(vector[pair + 1])) * cmath.exp(1j * position * speed)
        result[channel] = product.imag if channel % 2 else product.real
    return result


def linear_attention(weights: Weights, name: str, tokens: list[Tensor]) -> list[Tensor]:
    queries, keys = (
        [
            [turned(head, place).clamp(min=0) for head in by_head(linear(weights, f"{name}.{part}", token))]
            for place, token in enumerate(tokens)
        ]
        for part in ("to_q", "to_k")
    )
    values = [by_head(linear(weights, f"{name}.to_v", token)) for token in tokens]
    outputs = []
    for query in queries:
        heads = []
        for head in range(HEADS):
            scores = [float(query[head] @ key[head]) for key in keys]
            summed = sum(score * value[head] for score, value in zip(scores, values, strict=True))
            heads.append(summed / (sum(scores) + 1e-15))
        outputs.append(linear(weights, f"{name}.to_out.0", torch.cat(heads)))
    return outputs


def softmax_sum(scores: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    shares = [math.exp(score) for score in scores]
    return sum((share * value for share, value in zip(shares, values, strict=True)), torch.zeros(())) / sum(shares)


def cross_attention(weights: Weights, name: str, token: Tensor, place: int, told: dict[int, Tensor]) -> Tensor:
    """`told`: what is seen, by its place."""
    query = [turned(head, place) for head in by_head(linear(weights, f"{name}.to_q", token))]
    heads = []
    for head in range(HEADS):
        keys = [turned(by_head(linear(weights, f"{name}.to_k", word))[head], at) for at, word in told.items()]
        values = [by_head(linear(weights, f"{name}.to_v", word))[head] for word in told.values()]
        heads.append(softmax_sum([float(query[head] @ key) / math.sqrt(HEAD_WIDTH) for key in keys], values))
    return linear(weights, f"{name}.to_out.0", torch.cat(heads))


def feed_forward(weights: Weights, name: str, tokens: list[Tensor]) -> list[Tensor]:
    """A token's gate and value see the token before and behind, of which there are none at the ends."""
    pointwise = weights[f"{name}.inverted_conv.conv.weight"][:, :, 0]
    wide = [silu(pointwise @ token + weights[f"{name}.inverted_conv.conv.bias"]) for token in tokens]
    kernel, last = weights[f"{name}.depth_conv.conv.weight"][:, 0], weights[f"{name}.point_conv.conv.weight"][:, :, 0]
    outputs = []
    for place in range(len(tokens)):
        mixed = weights[f"{name}.depth_conv.conv.bias"].clone()
        for offset in (-1, 0, 1):
            if 0 <= place + offset < len(tokens):
                mixed += kernel[:, offset + 1] * wide[place + offset]
        values, gates = mixed.split(len(mixed) // 2)
        outputs.append(last @ (values * silu(gates)))
    return outputs


def through_block(
    weights: Weights, name: str, tokens: list[Tensor], told: dict[int, Tensor], modulation: Tensor
) -> list[Tensor]:
    shift, scale, gate, shift_2, scale_2, gate_2 = weights[f"{name}.scale_shift_table"] + modulation
    changes = linear_attention(weights, f"{name}.attn", [unit(x) * (1 + scale) + shift for x in tokens])
    tokens = [x + gate * change for x, change in zip(tokens, changes, strict=True)]
    tokens = [x + cross_attention(weights, f"{name}.cross_attn", x, at, told) for at, x in enumerate(tokens)]
    changes = feed_forward(weights, f"{name}.ff", [unit(x) * (1 + scale_2) + shift_2 for x in tokens])
    return [x + gate_2 * change for x, change in zip(tokens, changes, strict=True)]


def wave(distance: int, width: int) -> Tensor:
    angles = [distance / 10000 ** (2 * (channel // 2) / width) for channel in range(width)]
    return torch.tensor(
        [math.cos(angle) if channel % 2 else math.sin(angle) for channel, angle in enumerate(angles)]
    ).double()


def relative_attention(weights: Weights, name: str, tokens: list[Tensor]) -> list[Tensor]:
    width = len(tokens[0])
    queries, keys, values = (
        [by_head(linear(weights, f"{name}.linear_{part}", token)) for token in tokens] for part in "qkv"
    )
    outputs = []
    for i, query in enumerate(queries):
        heads = []
        for head in range(HEADS):
            u, v = (weights[f"{name}.pos_bias_{which}"][head] for which in "uv")
            scores = []
            for j, key in enumerate(keys):
                relative = by_head(linear(weights, f"{name}.linear_pos", wave(i - j, width)))[head]
                scores.append(float((query[head] + u) @ key[head] + (query[head] + v) @ relative))
            scores = [score / math.sqrt(width / HEADS) for score in scores]
            heads.append(softmax_sum(scores, [value[head] for value in values]))
        outputs.append(linear(weights, f"{name}.linear_out", torch.cat(heads)))
    return outputs


def lyric_features(weights: Weights, lyrics: Sequence[int]) -> list[Tensor]:
    first = [linear(weights, "lyric_encoder.embed.out.0", weights["lyric_embs.weight"][word]) for word in lyrics]
    tokens = [math.sqrt(len(x)) * standardised(weights, "lyric_encoder.embed.out.1", x) for x in first]
    for number in range(TRANSFORMER["lyric_layers"]):
        name = f"lyric_encoder.encoders.{number}"
        normed = [standardised(weights, f"{name}.norm_mha", x) for x in tokens]
        changes = relative_attention(weights, f"{name}.self_attn", normed)
        tokens = [x + change for x, change in zip(tokens, changes, strict=True)]
        inner = [
            linear(weights, f"{name}.feed_forward.w_1", standardised(weights, f"{name}.norm_ff", x)) for x in tokens
        ]
        tokens = [x + linear(weights, f"{name}.feed_forward.w_2", silu(y)) for x, y in zip(tokens, inner, strict=True)]
    return [linear(weights, "lyric_proj", standardised(weights, "lyric_encoder.after_norm", x)) for x in tokens]


def music_tokens(weights: Weights, latents: Tensor) -> list[Tensor]:
    """Of one sample [C, rows, T]: 32 groups of channels are normalised over all columns."""
    kernel, bias = (weights[f"proj_in.early_conv_layers.0.{part}"] for part in ("weight", "bias"))
    columns = [(kernel[..., 0] * latents[..., t]).sum(dim=(1, 2)) + bias for t in range(latents.shape[-1])]
    stacked = torch.stack(columns, dim=1)
    for group in stacked.split(len(stacked) // 32):
        group.copy_((group - group.mean()) / (group.var(unbiased=False) + 1e-6).sqrt())
    scale, shift = (weights[f"proj_in.early_conv_layers.1.{part}"] for part in ("weight", "bias"))
    last = weights["proj_in.early_conv_layers.2.weight"][:, :, 0, 0]
    return [last @ (x * scale + shift) + weights["proj_in.early_conv_layers.2.bias"] for x in stacked.unbind(1)]


def reference(
    weights: Weights, latents: Tensor, time: float, text: Tensor, speaker: Tensor, lyrics: Sequence[int], sung: bool
) -> Tensor:
    angles = [time * math.exp(-math.log(10000) * index / 128) for index in range(128)]
    waves = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles]).double()
    embedded = linear(weights, "timestep_embedder.linear_1", waves)
    embedded = linear(weights, "timestep_embedder.linear_2", silu(embedded))
    modulation = linear(weights, "t_block.1", silu(embedded)).view(6, -1)
    told = [linear(weights, "speaker_embedder", speaker), *(linear(weights, "genre_embedder", x) for x in text)]
    if sung:
        told += lyric_features(weights, lyrics)
    tokens = music_tokens(weights, latents)
    for number in range(TRANSFORMER["num_layers"]):
        tokens = through_block(weights, f"transformer_blocks.{number}", tokens, dict(enumerate(told)), modulation)
    shift, scale = weights["final_layer.scale_shift_table"] + embedded
    flow = torch.zeros_like(latents)
    for column, token in enumerate(tokens):
        values = linear(weights, "final_layer.linear", unit(token) * (1 + scale) + shift)
        for row in range(ROWS):
            flow[:, row, column] = values[CHANNELS * row : CHANNELS * (row + 1)]
    return flow


def disturbed() -> ACEStepTransformer2DModel:
    """Scales and shifts of norms random, too: ones and zeros would hide that they are left out."""
    model = transformer().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, CHANNELS, ROWS, COLUMNS, generator=generator),
        "timestep": torch.tensor([730.25, 20.0]),
        "encoder_text_hidden_states": torch.randn(2, TEXT, 24, generator=generator),
        "speaker_embeds": torch.randn(2, 6, generator=generator),
        "lyric_token_idx": torch.randint(1, 64, (2, WORDS), generator=generator),
    }


@pytest.mark.parametrize("sung", [True, False], ids=["sung", "instrumental"])
@torch.no_grad()
def test_the_network_equals_its_equations_written_with_loops(sung: bool) -> None:
    model, given = disturbed(), inputs()
    actual = model(**given, lyric_mask=torch.full((2, WORDS), sung), return_dict=False)[0]
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for one in range(2):
        expected = reference(
            weights,
            given["hidden_states"][one].double(),
            float(given["timestep"][one]),
            given["encoder_text_hidden_states"][one].double(),
            given["speaker_embeds"][one].double(),
            given["lyric_token_idx"][one].tolist(),
            sung,
        )
        torch.testing.assert_close(actual[one].double(), expected, atol=1e-4, rtol=1e-4)
        assert expected.std() > 0.1


@torch.no_grad()
def test_lyrics_without_a_mask_are_all_seen() -> None:
    model, given = disturbed(), inputs()
    whole = model(**given, lyric_mask=torch.ones(2, WORDS), return_dict=False)[0]
    torch.testing.assert_close(model(**given).sample, whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_one_lyric_token_attends_to_itself() -> None:
    model, given = disturbed(), inputs()
    given["lyric_token_idx"] = given["lyric_token_idx"][:, :1]
    assert model(**given).sample.isfinite().all()


@torch.no_grad()
def test_what_is_dropped_of_lyrics_is_dropped_while_training_alone() -> None:
    model, given = ACEStepTransformer2DModel(**TRANSFORMER | {"lyric_dropout": 0.1}), inputs()
    assert not torch.equal(model.train()(**given).sample, model(**given).sample)
    assert torch.equal(model.eval()(**given).sample, model(**given).sample)


def test_patches_of_several_columns_are_refused() -> None:
    with pytest.raises(ValueError, match=r"patch_size is \(16, 2\)"):
        ACEStepTransformer2DModel(**TRANSFORMER, patch_size=(16, 2))


def test_the_published_files_have_as_many_bytes_as_these_sizes_make() -> None:
    """All files of the published repository are 8,275,790,207 bytes: bf16, but the text encoder is in fp32."""
    with torch.device("meta"):
        parts = published_parts()
    bytes_each = {"ace_step_transformer": 2, "music_dcae_f8c8": 2, "music_vocoder": 2, "umt5-base": 4}
    weights = sum(bytes_each[name] * sum(p.numel() for p in part.parameters()) for name, part in parts.items())
    mel_filters = 2 * (1025 * 128 + 2048)
    rest = 8_275_790_207 - weights - mel_filters  # the tokenizer of UMT5, of 16.8 MB, and names of tensors
    assert 16.8e6 < rest < 17.3e6


def test_names_and_shapes_are_those_of_the_published_checkpoint() -> None:
    with torch.device("meta"):
        model = ACEStepTransformer2DModel()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == dict(published_shapes())


def published_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    wide, words = 2560, 1024
    yield from layer("proj_in.early_conv_layers.0", 2048, 8, 16, 1)
    yield from layer("proj_in.early_conv_layers.1", 2048)
    yield from layer("proj_in.early_conv_layers.2", wide, 2048, 1, 1)
    yield from layer("timestep_embedder.linear_1", wide, 256)
    yield from layer("timestep_embedder.linear_2", wide, wide)
    yield from layer("t_block.1", 6 * wide, wide)
    yield from layer("speaker_embedder", wide, 512)
    yield from layer("genre_embedder", wide, 768)
    yield from layer("lyric_proj", wide, words)
    yield "lyric_embs.weight", (6693, words)
    yield from layer("lyric_encoder.embed.out.0", words, words)
    for norm in ("embed.out.1", "after_norm"):
        yield from layer(f"lyric_encoder.{norm}", words)
    for number in range(6):
        yield from lyric_block(f"lyric_encoder.encoders.{number}", words)
    for number in range(24):
        yield from block(f"transformer_blocks.{number}", wide)
    for number, outputs in enumerate((1024, 768)):
        yield from layer(f"projectors.{number}.0", 2 * wide, wide)
        yield from layer(f"projectors.{number}.2", 2 * wide, 2 * wide)
        yield from layer(f"projectors.{number}.4", outputs, 2 * wide)
    yield from layer("final_layer.linear", 128, wide)
    yield "final_layer.scale_shift_table", (2, wide)


def lyric_block(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part in ("linear_q", "linear_k", "linear_v", "linear_out"):
        yield from layer(f"{name}.self_attn.{part}", width, width)
    yield f"{name}.self_attn.linear_pos.weight", (width, width)
    for which in "uv":
        yield f"{name}.self_attn.pos_bias_{which}", (16, 64)
    yield from layer(f"{name}.feed_forward.w_1", 4096, width)
    yield from layer(f"{name}.feed_forward.w_2", width, 4096)
    for norm in ("norm_mha", "norm_ff"):
        yield from layer(f"{name}.{norm}", width)


def block(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for attention in ("attn", "cross_attn"):
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            yield from layer(f"{name}.{attention}.{part}", width, width)
    for part in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
        yield from layer(f"{name}.cross_attn.{part}", width, width)
    yield from layer(f"{name}.ff.inverted_conv.conv", 12800, width, 1)
    yield from layer(f"{name}.ff.depth_conv.conv", 12800, 1, 3)
    yield f"{name}.ff.point_conv.conv.weight", (width, 6400, 1)
    yield f"{name}.scale_shift_table", (6, width)


def layer(name: str, outputs: int, *inputs_: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, *inputs_)
    yield f"{name}.bias", (outputs,)
