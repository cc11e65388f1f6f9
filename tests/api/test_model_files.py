"""Which files of a repository a run reads, and whether a copy of them is whole."""

import json
from pathlib import Path

import pytest

from atelier_api.model_files import components, hub_snapshot, is_whole, lacking, needed

SDXL = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}
READ = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json",
]
IGNORED = [
    ".gitattributes",
    "01.png",
    "README.md",
    "sd_xl_base_1.0.safetensors",
    "sd_xl_base_1.0_0.9vae.ckpt",
    "config.json",
    "comparison/model.safetensors",
    "text_encoder/flax_model.msgpack",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.onnx",
    "text_encoder/openvino_model.bin",
    "text_encoder/openvino_model.xml",
    "text_encoder/pytorch_model.bin",
    "unet/diffusion_pytorch_model.bin.index.json",
    "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
    "unet/old/config.json",
    "vae_1_0/diffusion_pytorch_model.safetensors",
]


def test_of_a_published_repository_only_what_a_run_reads_is_needed() -> None:
    assert components(SDXL) == ["scheduler", "text_encoder", "tokenizer", "unet"]
    assert needed([*IGNORED, *READ], SDXL) == READ
    assert lacking([*IGNORED, *READ], SDXL) == []


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (["model_index.json"], ["model_index.json"]),
        (["scheduler/scheduler_config.json"], ["the configuration of scheduler"]),
        (
            ["tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json"],
            ["the configuration of tokenizer"],
        ),
        (["text_encoder/model.safetensors"], ["the weights of text_encoder as safetensors"]),
        (
            ["unet/diffusion_pytorch_model-00002-of-00002.safetensors"],
            ["unet/diffusion_pytorch_model-00002-of-00002.safetensors"],
        ),
        (
            ["unet/diffusion_pytorch_model.safetensors.index.json"],
            ["unet/diffusion_pytorch_model.safetensors.index.json"],
        ),
    ],
)
def test_what_is_missing_is_named(gone: list[str], said: list[str]) -> None:
    assert lacking([name for name in [*IGNORED, *READ] if name not in gone], SDXL) == said


def snapshot(cache: Path, commit: str) -> Path:
    folder = cache / "models--owner--name" / "snapshots" / commit
    for name in READ:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(SDXL) if name == "model_index.json" else "{}")
    return folder


def test_a_snapshot_is_found_by_its_commit_or_by_a_name_of_it(tmp_path: Path) -> None:
    folder = snapshot(tmp_path, "c0ffee")
    assert hub_snapshot(tmp_path, "owner/name", "c0ffee") == folder
    assert hub_snapshot(tmp_path, "owner/name", "main") is None
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("c0ffee\n")
    assert hub_snapshot(tmp_path, "owner/name", "main") == folder


def test_a_link_whose_bytes_are_gone_is_no_file(tmp_path: Path) -> None:
    folder = snapshot(tmp_path, "c0ffee")
    assert is_whole(folder)
    weights = folder / "text_encoder" / "model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "gone")
    assert not is_whole(folder)
    (folder / "model_index.json").write_text("[]")
    assert not is_whole(folder)
