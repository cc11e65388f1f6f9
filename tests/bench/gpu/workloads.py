"""What is measured on a GPU: published networks with random weights, at the sizes that performance.md names."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Workload:
    """A training run. `edge` in pixels; `shrink` are values of the network's config that make it small, to try things on a CPU."""

    id: str
    family: str
    flavour: str
    edge: int = 1024
    batch: int = 1
    rank: int = 16
    full_rank: bool = False
    recompute: bool = False
    frames: int = 1
    shrink: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        adapter = "full-rank, bf16 state" if self.full_rank else f"LoRA rank {self.rank} on attention and MLP"
        frames = f" x {self.frames} frames" if self.frames > 1 else ""
        recompute = "with" if self.recompute else "without"
        return f"{self.family} {self.flavour}, {adapter}, {self.edge} px{frames}, batch {self.batch}, {recompute} recompute"


FLUX = Workload("G1", "flux", "dev")
SDXL = Workload("G3", "sdxl", "base-1.0")
SPEED = (
    FLUX,
    replace(FLUX, id="G1b", edge=512, batch=6, rank=64),
    SDXL,
    replace(SDXL, batch=4),
)

Z_IMAGE = Workload("G11", "z_image", "turbo")
MEMORY = (
    FLUX,
    replace(FLUX, recompute=True),
    replace(FLUX, recompute=True, batch=4, rank=64),
    replace(FLUX, edge=512, batch=2),
    SDXL,
    replace(SDXL, batch=4),
    replace(SDXL, batch=4, recompute=True),
    replace(SDXL, full_rank=True, recompute=True),
    Z_IMAGE,
    replace(Z_IMAGE, recompute=True, batch=4),
    Workload("G11", "sd3", "3.5-large"),
    Workload("G11", "sd3", "3.5-medium", full_rank=True, recompute=True),
    Workload("G11", "wan", "2.1-t2v-1.3b", edge=512, frames=49, recompute=True),
    Workload("G11", "qwen_image", "base"),
    Workload("G11", "chroma", "base"),
    Workload("G11", "hidream", "full", recompute=True),
    Workload("G11", "auraflow", "0.3"),
    Workload("G11", "flux2", "klein-base-9b"),
    Workload("G11", "lumina2", "2.0"),
    Workload("G11", "pixart_sigma", "xl-2-1024"),
    Workload("G11", "sana", "1.5-1.6b"),
    Workload("G11", "kandinsky5_image", "t2i-lite-sft"),
    Workload("G11", "longcat_image", "base"),
    Workload("G11", "cosmos2", "2b"),
    Workload("G11", "hunyuan_video15", "480p-t2v", edge=512, frames=49, recompute=True),
    Workload("G11", "kandinsky5_video", "t2v-lite-sft-5s", edge=512, frames=49, recompute=True),
    Workload("G11", "wan_ti2v", "2.2-ti2v-5b", edge=512, frames=49, recompute=True),
    Workload("G11", "ltx", "0.9.0", edge=512, frames=49, recompute=True),
)
"""For G11, whatever their own id."""

TINY_FLUX = Workload(
    "G1",
    "flux",
    "dev",
    edge=64,
    rank=4,
    shrink={
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 6, 6),
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
    },
)
TINY_SDXL = Workload(
    "G3",
    "sdxl",
    "base-1.0",
    edge=64,
    rank=4,
    batch=2,
    shrink={
        "block_out_channels": (32, 64, 64),
        "transformer_layers_per_block": (1, 1, 1),
        "attention_head_dim": (2, 4, 4),
        "cross_attention_dim": 32,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    },
)
TINY = (TINY_FLUX, TINY_SDXL)
"""For a try without a GPU: the code is the same, the figures mean nothing."""

SCHEDULERS: dict[str, dict[str, Any]] = {
    "flow": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
    "diffusion": {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "epsilon",
        "clip_sample": False,
    },
}
"""`scheduler_config.json` of a checkpoint, as far as training reads it."""
