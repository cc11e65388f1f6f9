"""Sizes are read from configs and headers, and a folder that is no checkpoint of the family is refused in a sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atelier_api.errors import ConfigError
from atelier_api.families import FAMILIES
from atelier_api.v1alpha1.model import ModelSpec
from atelier_operator.planner import ModelFacts
from atelier_operator.planner.checkpoint_facts import DENOISERS, Shape, checkpoint_facts, shape_of
from header_checkpoints import SD3_BLOCKS, SD3_INDEX, write_checkpoint, write_header


def facts(folder: Path, family: str = "sd3") -> ModelFacts:
    return checkpoint_facts(ModelSpec(family=family, source=str(folder)), folder)


def refusal(folder: Path, family: str = "sd3") -> str:
    with pytest.raises(ConfigError) as refused:
        facts(folder, family)
    return str(refused.value)


def test_sizes_are_counted_in_the_headers(tmp_path: Path) -> None:
    found = facts(write_checkpoint(tmp_path / "base"))
    assert found.parameters == 64 * 16 * 2 * 2 + 4 * 64 * 64
    assert (found.layers, found.width, found.mlp_width) == (2, 64, 256)
    assert found.largest_block == 2 * 64 * 64
    assert found.encoder_parameters == 2 * 1000
    assert found.vae_parameters == 8 * 27
    assert found.experts == 1
    assert found.origin == f"the checkpoint in {tmp_path / 'base'}"


def test_activations_scale_with_the_width_of_the_nearest_flavour(tmp_path: Path) -> None:
    found = facts(write_checkpoint(tmp_path / "base"))
    smallest = min(FAMILIES["sd3"].flavours, key=lambda flavour: flavour.parameters)
    assert found.activation_bytes_per_token == smallest.activation_bytes_per_token * 64 // smallest.width


def test_two_experts_are_counted(tmp_path: Path) -> None:
    index = {"_class_name": "WanPipeline", "boundary_ratio": 0.875, "expand_timesteps": False}
    index |= {name: ["diffusers", "WanTransformer3DModel"] for name in ("transformer", "transformer_2")}
    config = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 100}
    found = facts(write_checkpoint(tmp_path / "base", index, config), "wan")
    assert found.experts == 2
    assert (found.mlp_width, found.encoder_parameters, found.vae_parameters) == (100, 0, 0)


def test_the_largest_block_of_a_list_of_lists_is_one_of_the_inner_list(tmp_path: Path) -> None:
    lists = {f"down_blocks.{level}.{block}.depthwise.weight": (64, 64) for level in (0, 1) for block in (0, 1)}
    found = facts(write_checkpoint(tmp_path / "base", denoiser=lists | {"down_blocks.1.1.mapper.weight": (64, 8)}))
    assert found.largest_block == 64 * 64 + 64 * 8


def test_files_of_two_precisions_hold_the_same_tensors_and_are_counted_once(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "base")
    before = facts(folder)
    write_header(folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors", SD3_BLOCKS)
    assert facts(folder) == before


def test_shards_are_added_up_and_a_missing_one_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "base")
    whole, transformer = facts(folder), folder / "transformer"
    (transformer / "diffusion_pytorch_model.safetensors").unlink()
    shards = {
        "a-00001-of-00002.safetensors": list(SD3_BLOCKS)[:2],
        "a-00002-of-00002.safetensors": list(SD3_BLOCKS)[2:],
    }
    for shard, names in shards.items():
        write_header(transformer / shard, {name: SD3_BLOCKS[name] for name in names})
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (transformer / "a.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert facts(folder) == whole
    (transformer / "a-00002-of-00002.safetensors").unlink()
    assert (
        refusal(folder)
        == f"spec.model.source: {transformer / 'a-00002-of-00002.safetensors'} is missing; fetch the checkpoint again"
    )


def test_a_checkpoint_of_another_family_is_refused_with_the_family_that_fits(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "base")
    assert refusal(folder, "flux") == (
        f"spec.model.family is flux, but the checkpoint in {folder} is a StableDiffusion3Pipeline; families that fit: sd3"
    )


def test_a_checkpoint_of_no_family_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "base", SD3_INDEX | {"_class_name": "OtherPipeline"})
    assert refusal(folder).endswith("is a OtherPipeline; families that fit: none")


def _remove(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
HARMED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (
        _remove("model_index.json"),
        "model_index.json is missing; the folder must be laid out as a hub repository",
    ),
    "an index cut short": (_write("model_index.json", b'{"_class_name": '), "cannot be read as JSON"),
    "an index of another kind": (_write("model_index.json", b"[]"), "holds no JSON object"),
    "nothing to train": (
        _write(
            "model_index.json", b'{"_class_name": "StableDiffusion3Pipeline", "vae": ["diffusers", "AutoencoderKL"]}'
        ),
        "names none of transformer, transformer_2, unet, dit, prior; there is nothing to train",
    ),
    "no config": (_remove("transformer/config.json"), "transformer/config.json is missing"),
    "no weights": (_remove(WEIGHTS), "transformer holds no .safetensors file"),
    "no weights of an encoder": (
        _remove("text_encoder_2/model.safetensors"),
        "text_encoder_2 holds no .safetensors file",
    ),
    "a pointer of git-lfs": (
        _write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "is no safetensors file, or a git-lfs pointer",
    ),
    "an empty file": (_write(WEIGHTS, b""), "has no safetensors header"),
    "a header that is none": (_write(WEIGHTS, b"\x02" + bytes(7) + b"[]" + bytes(64)), "has no safetensors header"),
    "a header without shapes": (
        _write(WEIGHTS, b"\x0a" + bytes(7) + b'{"a": {}} ' + bytes(64)),
        "has no safetensors header",
    ),
    "weights cut short": (
        lambda folder: write_header(folder / WEIGHTS, SD3_BLOCKS, cut=1),
        "is cut short, 41",
    ),
}


@pytest.mark.parametrize(("harm", "sentence"), HARMED.values(), ids=HARMED)
def test_a_checkpoint_that_is_not_whole_is_refused_with_the_file(
    harm: Callable[[Path], Any], sentence: str, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "base")
    harm(folder)
    told = refusal(folder)
    assert sentence in told
    assert told.startswith("spec.model.source: ")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "nowhere"
    assert refusal(source) == f"spec.model.source is {str(source)!r}; there is no folder {source}"


# Sizes in the published configs.
CONFIGS: dict[str, tuple[dict[str, Any], Shape | None]] = {
    "two lists of blocks": (
        {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "attention_head_dim": 128},
        Shape(57, 3072, 12288),
    ),
    "one list": ({"num_layers": 38, "num_attention_heads": 38, "attention_head_dim": 64}, Shape(38, 2432, 9728)),
    "its own feed-forward": (
        {"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824},
        Shape(40, 5120, 13824),
    ),
    "refiners": ({"dim": 3840, "n_layers": 30, "n_refiner_layers": 2}, Shape(34, 3840, 10240)),
    "a UNet": (
        {
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "layers_per_block": 2,
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "num_attention_heads": None,
        },
        Shape(70, 1280, 5120),
    ),
    "a UNet of equal levels": (
        {
            "block_out_channels": [32, 64],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "layers_per_block": 1,
        },
        Shape(1 + 1 + 2, 64, 256),
    ),
    "a UNet that names no kinds of blocks": (
        {"block_out_channels": [2048, 2048], "num_attention_heads": [32, 32]},
        None,
    ),
    "other names": ({"hidden_size": 512}, None),
    "no blocks": ({"num_layers": 0, "num_attention_heads": 4, "attention_head_dim": 4}, None),
}


@pytest.mark.parametrize(("config", "shape"), CONFIGS.values(), ids=CONFIGS)
def test_the_shape_is_read_from_the_config(config: dict[str, Any], shape: Shape | None) -> None:
    assert shape_of(config) == shape


def test_a_config_with_other_names_is_scaled_from_the_nearest_flavour(tmp_path: Path) -> None:
    found = facts(write_checkpoint(tmp_path / "base", config={"hidden_size": 512}))
    nearest = min(FAMILIES["sd3"].flavours, key=lambda flavour: flavour.parameters)
    assert found.layers == nearest.layers
    assert found.width == round(nearest.width * (found.parameters / nearest.parameters) ** 0.5)


def stored(module: Any) -> int:
    """Values that are saved: parameters and persistent buffers, shared ones once."""
    return sum({tensor.data_ptr(): tensor.numel() for tensor in module.state_dict().values()}.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_facts_of_a_real_checkpoint_are_what_its_modules_count(family: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from family_models import tiny_pipeline

    pipe = tiny_pipeline(family)
    pipe.save_pretrained(tmp_path)
    found = facts(tmp_path, family)
    modules = {name: part for name, part in pipe.components.items() if hasattr(part, "parameters")}
    counts = {name: stored(part) for name, part in modules.items()}
    denoisers = [counts[name] for name in DENOISERS if name in counts]
    assert found.parameters == denoisers[0]
    assert found.experts == len(denoisers)
    assert found.vae_parameters == sum(counts[name] for name in FAMILIES[family].autoencoder)
    assert found.encoder_parameters == sum(count for name, count in counts.items() if name.startswith("text_encoder"))
    assert 0 < found.largest_block < found.parameters
