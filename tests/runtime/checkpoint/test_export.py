"""What stands in exported files, what is refused, and that a file which reads back different is noticed."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from atelier_api.errors import ConfigError, StoreError
from atelier_runtime.checkpoint import exported_file
from atelier_runtime.checkpoint.export import check_formats, export_lora, export_models, kohya_tensors, lora_weights
from atelier_runtime.families import get_family
from atelier_runtime.lora_layout import LoraLayout
from export_runs import FULL, PROVENANCE, Trained, run_file, trained
from family_models import save_tiny, tiny_pipeline

LORA = {"type": "lora", "rank": 4, "alpha": 9, "targets": ["all"]}


def make(checkpoint: str, folder: Path, adapter: Mapping[str, Any] = LORA, **spec: Any) -> Trained:
    return trained(checkpoint, folder, adapter, **spec)


def layout(family: str) -> LoraLayout:
    found = get_family(family).lora_layout
    assert found is not None
    return found


def write(result: Trained, folder: Path) -> dict[str, Path]:
    """Exports and gives the files by path below `folder`."""
    files = export_lora(result.weights, result.file, result.family, folder, provenance=PROVENANCE)
    for file in files:
        assert hashlib.sha256(file.path.read_bytes()).hexdigest() == file.sha256
        assert file.path.stat().st_size == file.size_bytes
    return {file.path.relative_to(folder).as_posix(): file.path for file in files}


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def updates(result: Trained, component: str) -> dict[str, Tensor]:
    """The change of each module's weight by training, by its name in diffusers."""
    return {
        name: layer.get_delta_weight("default")
        for name, layer in result.denoisers[component].named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def test_both_files_say_what_they_are_and_where_they_come_from(tmp_path: Path) -> None:
    paths = write(make("sdxl", tmp_path), tmp_path / "out")
    assert set(paths) == {"diffusers/pytorch_lora_weights.safetensors", "kohya/fox.safetensors"}
    for path in paths.values():
        facts = header(path)
        assert facts["modelspec.sai_model_spec"] == "1.0.0"
        assert facts["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
        assert facts["modelspec.title"] == "fox"
        assert facts["modelspec.date"] == "2025-01-02T03:04:05+00:00"
        assert facts["modelspec.trigger_phrase"] == facts["atelier.trigger"] == "sks fox"
        assert facts["atelier.base_model"] == "hf://someone/base"
        assert facts["atelier.base_revision"] == "abc123"
        assert facts["atelier.family"] == "sdxl"
        assert (facts["atelier.rank"], facts["atelier.alpha"], facts["atelier.step"]) == ("4", "9.0", "120")
        assert facts["atelier.precision"] == "fp32"
        assert facts["atelier.version"]


def test_the_modelspec_hash_is_that_of_the_tensors_alone(tmp_path: Path) -> None:
    for path in write(make("wan", tmp_path), tmp_path / "out").values():
        data = path.read_bytes()
        tensors = data[8 + int.from_bytes(data[:8], "little") :]
        assert header(path)["modelspec.hash_sha256"] == "0x" + hashlib.sha256(tensors).hexdigest()


def test_the_adapter_config_in_the_diffusers_file_stays_small_and_holds_alpha(tmp_path: Path) -> None:
    paths = write(make("sd3", tmp_path, publish={"formats": ["diffusers"]}), tmp_path / "out")
    text = header(paths["diffusers/pytorch_lora_weights.safetensors"])["lora_adapter_metadata"]
    config = json.loads(text)
    assert config["transformer.lora_alpha"] == 9
    assert config["transformer.r"] == 4
    assert len(text) < 1000
    assert json.loads(text).keys() == {
        f"transformer.{key}" for key in ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora")
    }


@pytest.mark.parametrize("checkpoint", ["sd3", "flux", "sdxl", "z_image", "wan"])
@pytest.mark.parametrize("options", [{}, {"rslora": True}], ids=["lora", "rslora"])
def test_every_kohya_layer_has_an_alpha_and_all_parts_add_up_to_the_update(
    checkpoint: str, options: dict[str, Any], tmp_path: Path
) -> None:
    result = make(checkpoint, tmp_path, LORA | options)
    tensors = load_file(write(result, tmp_path / "out")["kohya/fox.safetensors"])
    layers = {name.split(".lora_")[0].removesuffix(".alpha") for name in tensors}
    assert len(tensors) == 3 * len(layers)
    whole = {}
    for layer in layers:
        down, up = tensors[f"{layer}.lora_down.weight"], tensors[f"{layer}.lora_up.weight"]
        whole[layer] = up @ down * tensors[f"{layer}.alpha"].item() / len(down)
    component = result.family.denoisers[0]
    for module, update in updates(result, component).items():
        key = layout(checkpoint).key(module)
        assert key is not None
        width = update.shape[1]
        start = sum(key.heights[: key.part]) * width
        part = whole[key.name][start : start + len(update)]
        torch.testing.assert_close(part, update)
        part.zero_()
    # What is left are parts that are not trained, such as the queries of a text stream that ends here.
    assert [layer for layer, rest in whole.items() if rest.any()] == []


@pytest.mark.parametrize(
    ("family", "module", "layer"),
    [
        ("sd3", "transformer_blocks.3.attn.to_k", "lora_unet_joint_blocks_3_x_block_attn_qkv"),
        ("sd3", "transformer_blocks.3.attn2.to_out.0", "lora_unet_joint_blocks_3_x_block_attn2_proj"),
        ("sd3", "transformer_blocks.11.attn.add_v_proj", "lora_unet_joint_blocks_11_context_block_attn_qkv"),
        ("sd3", "transformer_blocks.0.ff_context.net.0.proj", "lora_unet_joint_blocks_0_context_block_mlp_fc1"),
        ("flux", "transformer_blocks.18.attn.add_q_proj", "lora_unet_double_blocks_18_txt_attn_qkv"),
        ("flux", "transformer_blocks.0.ff.net.2", "lora_unet_double_blocks_0_img_mlp_2"),
        ("flux", "single_transformer_blocks.7.proj_mlp", "lora_unet_single_blocks_7_linear1"),
        ("flux", "single_transformer_blocks.7.proj_out", "lora_unet_single_blocks_7_linear2"),
        (
            "sdxl",
            "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0",
            "lora_unet_down_blocks_2_attentions_1_transformer_blocks_9_attn2_to_out_0",
        ),
        ("z_image", "context_refiner.1.attention.to_out.0", "diffusion_model.context_refiner.1.attention.to_out.0"),
        ("wan", "blocks.4.attn2.to_out.0", "diffusion_model.blocks.4.cross_attn.o"),
        ("wan", "blocks.4.ffn.net.0.proj", "diffusion_model.blocks.4.ffn.0"),
    ],
)
def test_a_module_has_the_name_that_comfyui_knows(family: str, module: str, layer: str) -> None:
    key = layout(family).key(module)
    assert key is not None
    assert key.name == layer


def test_flux_at_its_published_width_is_split_again_by_diffusers(tmp_path: Path) -> None:
    width, rank, generator = 3072, 4, torch.Generator().manual_seed(0)
    double, single = "transformer_blocks.18.", "single_transformer_blocks.37."
    heights = {f"{double}attn.to_{x}": 1 for x in "qkv"} | {f"{double}attn.add_{x}_proj": 1 for x in "qkv"}
    heights |= {f"{single}attn.to_q": 1, f"{single}attn.to_k": 1, f"{single}proj_mlp": 4}  # to_v is not trained
    state = {}
    for module, height in heights.items():
        state[f"{module}.lora_A.default.weight"] = torch.randn(rank, width, generator=generator)
        state[f"{module}.lora_B.default.weight"] = torch.randn(height * width, rank, generator=generator)
    file = run_file("flux", save_tiny("flux", tmp_path), LORA, publish={"formats": ["kohya"]})
    export_lora({"transformer": state}, file, get_family("flux"), tmp_path, provenance=PROVENANCE)

    read = FluxPipeline.lora_state_dict(str(tmp_path / "kohya"), weight_name="fox.safetensors")
    untrained = f"transformer.{single}attn.to_v"
    assert {key.rpartition(".lora_")[0] for key in read} == {f"transformer.{module}" for module in heights} | {
        untrained
    }
    assert not read[f"{untrained}.lora_B.weight"].any()
    for module in heights:
        down, up = (read[f"transformer.{module}.lora_{matrix}.weight"] for matrix in "AB")
        torch.testing.assert_close(down, state[f"{module}.lora_A.default.weight"] * 9 / rank)
        torch.testing.assert_close(up, state[f"{module}.lora_B.default.weight"])


def test_each_of_two_experts_gets_files_of_its_own(tmp_path: Path) -> None:
    result = make("wan22", tmp_path)
    paths = write(result, tmp_path / "out")
    assert set(paths) == {
        "diffusers/pytorch_lora_weights.safetensors",
        "diffusers/pytorch_lora_weights_low_noise.safetensors",
        "kohya/fox_high_noise.safetensors",
        "kohya/fox_low_noise.safetensors",
    }
    for name, component in {"": "transformer", "_low_noise": "transformer_2"}.items():
        path = paths[f"diffusers/pytorch_lora_weights{name}.safetensors"]
        assert header(path)["atelier.component"] == component
        # The loader reads the name of the first component, whichever expert it loads into.
        key = "blocks.1.attn1.to_q.lora_B"
        assert torch.equal(
            load_file(path)[f"transformer.{key}.weight"], result.weights[component][f"{key}.default.weight"]
        )


def test_weights_keep_the_dtype_they_were_trained_in(tmp_path: Path) -> None:
    result = make("wan", tmp_path)
    weights = {
        name: {key: value.to(torch.bfloat16) for key, value in state.items()} for name, state in result.weights.items()
    }
    for file in export_lora(weights, result.file, result.family, tmp_path / "out", provenance=PROVENANCE):
        matrices = [tensor for name, tensor in load_file(file.path).items() if not name.endswith(".alpha")]
        assert {tensor.dtype for tensor in matrices} == {torch.bfloat16}


def test_dora_in_the_kohya_layout_is_a_bug_as_the_rules_refuse_it(tmp_path: Path) -> None:
    file = run_file("wan", tmp_path, LORA | {"dora": True})
    with pytest.raises(ValueError, match=r"'kohya' with spec\.adapter\.dora, and was not refused"):
        check_formats(file, get_family("wan"), ["blocks.0.attn1.to_q"])
    allowed = run_file("wan", tmp_path, LORA | {"dora": True}, publish={"formats": ["diffusers"]})
    check_formats(allowed, get_family("wan"), ["blocks.0.attn1.to_q"])


def test_a_family_without_the_kohya_layout_has_the_other(tmp_path: Path) -> None:
    result = make("pixart_sigma", tmp_path)
    assert result.family.lora_layout is None
    assert set(write(result, tmp_path / "out")) == {"diffusers/pytorch_lora_weights.safetensors"}
    alone = run_file("pixart_sigma", tmp_path, LORA, publish={"formats": ["kohya"]})
    with pytest.raises(ValueError, match=r"is \[kohya\], which pixart_sigma does not have, and was not refused"):
        check_formats(alone, result.family, ["transformer_blocks.0.attn1.to_q"])


def test_a_module_without_a_name_in_the_kohya_layout_is_refused(tmp_path: Path) -> None:
    file = run_file("wan", tmp_path, LORA)
    with pytest.raises(ConfigError, match="no name for 1 trained modules, such as proj_out"):
        check_formats(file, get_family("wan"), ["blocks.0.attn1.to_q", "proj_out"])
    check_formats(run_file("wan", tmp_path, FULL), get_family("wan"), ["proj_out"])


def test_a_refused_export_writes_nothing(tmp_path: Path) -> None:
    result = make("wan", tmp_path, LORA | {"targets": ["proj_out"]})
    with pytest.raises(ConfigError):
        export_lora(result.weights, result.file, result.family, tmp_path / "out", provenance=PROVENANCE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_file_that_reads_back_different_is_noticed(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = make("wan", tmp_path)
    original, written = exported_file.save_file, []

    def save_damaged(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
        tensors, name = dict(tensors), next(iter(tensors))
        written.append(path)
        if damage == "changed":
            tensors[name] = tensors[name] + 1
        else:
            del tensors[name]
        original(tensors, path, metadata)

    monkeypatch.setattr(exported_file, "save_file", save_damaged)
    with pytest.raises(StoreError, match="reads back different"):
        write(result, tmp_path / "out")
    assert len(written) == 1


def test_a_full_rank_folder_has_the_precision_of_the_run_and_its_provenance(tmp_path: Path) -> None:
    result = make("sdxl", tmp_path, FULL, hyperparameters={"steps": 120, "precision": "bf16"})
    files = export_models(result.weights, result.file, result.family, tmp_path / "out", provenance=PROVENANCE)
    names = {file.path.relative_to(tmp_path / "out").as_posix() for file in files}
    assert names == {
        f"diffusers/unet/{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors", "atelier.json")
    }
    tensors = load_file(tmp_path / "out/diffusers/unet/diffusion_pytorch_model.safetensors")
    for name, trained_weight in result.weights["unet"].items():
        assert torch.equal(tensors[name], trained_weight.to(torch.bfloat16))
    details = json.loads((tmp_path / "out/diffusers/unet/atelier.json").read_text())
    assert details["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert details["atelier.step"] == "120"


def test_what_full_rank_training_froze_comes_from_the_base(tmp_path: Path) -> None:
    result = make("wan", tmp_path, FULL)
    state = {name: value for name, value in result.weights["transformer"].items() if name != "proj_out.bias"}
    export_models({"transformer": state}, result.file, result.family, tmp_path / "out", provenance=PROVENANCE)
    tensors = load_file(tmp_path / "out/diffusers/transformer/diffusion_pytorch_model.safetensors")
    base = load_file(result.base / "transformer/diffusion_pytorch_model.safetensors")
    assert torch.equal(tensors["proj_out.bias"], base["proj_out.bias"])
    assert not torch.equal(tensors["proj_out.weight"], base["proj_out.weight"])


def test_a_fused_layer_has_the_parts_in_blocks_of_their_own() -> None:
    ones = torch.ones(2, 3)
    state = {
        "transformer_blocks.0.attn.to_k.lora_A.default.weight": ones,
        "transformer_blocks.0.attn.to_k.lora_B.default.weight": ones.T,
    }
    tensors = kohya_tensors(lora_weights(state), layout("flux"), alpha=math.pi)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
    assert down.shape == (6, 3)
    assert down[2:4].eq(1).all()
    assert down.sum() == 6
    assert up.shape == (9, 6)
    assert up[3:6, 2:4].eq(1).all()
    assert up.sum() == 6
    assert tensors[f"{name}.alpha"].item() == pytest.approx(3 * math.pi)


def test_a_parameter_that_is_none_of_loras_is_an_error_of_ours() -> None:
    with pytest.raises(ValueError, match=r"proj_out\.weight"):
        lora_weights({"proj_out.weight": torch.ones(1)})


def test_diffusers_loads_nothing_from_the_kohya_file_of_sd3_as_the_docs_say(tmp_path: Path) -> None:
    """The day this fails, diffusers has a converter, and the docs and the table of layouts can say so."""
    paths = write(make("sd3", tmp_path), tmp_path / "out")
    pipe = tiny_pipeline("sd3")
    pipe.load_lora_weights(str(tmp_path / "out" / "kohya"), weight_name=paths["kohya/fox.safetensors"].name)
    assert pipe.get_list_adapters() == {}
