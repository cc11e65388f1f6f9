"""Checkpoint folders made of configs and safetensors headers, with holes for weights: what the planner reads, without torch."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

SD3_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusion3Pipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": [None, None],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SD3_CONFIG = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16}
SD3_BLOCKS: Shapes = {
    "pos_embed.proj.weight": (64, 16, 2, 2),
    "transformer_blocks.0.attn.to_q.weight": (64, 64),
    "transformer_blocks.1.attn.to_q.weight": (64, 64),
    "transformer_blocks.1.attn.to_k.weight": (64, 64),
    "proj_out.weight": (64, 64),
}


def write_header(path: Path, shapes: Shapes, *, cut: int = 0) -> None:
    """A safetensors file of bf16 zeros; `cut` bytes are missing at its end. The file is sparse: zeros take no room."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end - cut)


def write_checkpoint(
    folder: Path,
    index: Mapping[str, Any] = SD3_INDEX,
    config: Mapping[str, Any] = SD3_CONFIG,
    denoiser: Shapes = SD3_BLOCKS,
) -> Path:
    """A whole checkpoint: each present component with weights, the denoisers with `config`. Gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[1] is None:
            continue
        (folder / name).mkdir(exist_ok=True)
        if name in ("transformer", "transformer_2", "unet"):
            (folder / name / "config.json").write_text(json.dumps(config))
            write_header(folder / name / "diffusion_pytorch_model.safetensors", denoiser)
        elif name.startswith("text_encoder"):
            write_header(folder / name / "model.safetensors", {"embeddings.weight": (100, 10)})
        elif name == "vae":
            write_header(
                folder / name / "diffusion_pytorch_model.safetensors", {"encoder.conv_in.weight": (8, 3, 3, 3)}
            )
    return folder
