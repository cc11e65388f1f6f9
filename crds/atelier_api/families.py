"""The table of model families: what validation and the planner must know without torch. One row per family."""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Flavour:
    """A published checkpoint and its sizes.

    `parameters` counts the denoiser only (one expert), `width` is the hidden size of a block, `mlp_width` of its feed-forward.
    `text_tokens` are the tokens that take part in attention beside the picture's. `encoder_parameters` counts the text encoders,
    `vae_parameters` the autoencoder. `activation_bytes_per_token` is what one block keeps for the backward pass of LoRA on
    `attention`, in bf16 and without recompute, per token of a sample (averaged where blocks differ). `largest_block` is the
    parameters of the largest unit that is sharded as a whole, where the blocks differ; 0: they are all alike. `guidance` is what the
    stock pipeline does with a negative prompt: contrasts with it (`on`), does so only when it is given a guidance (`off`), or ignores
    it, as the checkpoint embeds its guidance (`distilled`).
    """

    name: str
    source: str
    parameters: int
    layers: int
    width: int
    mlp_width: int
    text_tokens: int
    encoder_parameters: int
    vae_parameters: int
    activation_bytes_per_token: int
    experts: int = 1
    largest_block: int = 0
    guidance: Literal["on", "off", "distilled"] = "on"


@dataclass(frozen=True)
class FamilyFacts:
    """One row. `frame_rule` (m, r): a clip has n = r modulo m frames. `shift` is the fallback where a checkpoint names none.

    `latent_factor` and `temporal_factor` are the autoencoder's, `patch` is the side of a token in latent pixels. `pipelines` are
    the `_class_name`s in `model_index.json` of checkpoints that the family can train. Above `guidance_above` the stock pipeline
    contrasts with the negative prompt. `backward_blocks` is how many average blocks' activations the backward pass holds with
    recompute: one and its gradients, but more in a UNet, whose widest level is many times the average.
    """

    name: str
    title: str
    modality: Literal["image", "video"]
    objective: Literal["flow", "diffusion"]
    pixel_multiple: int
    latent_channels: int
    latent_factor: int
    patch: int
    shift: float | Literal["dynamic", "none"]
    licence: str
    flavours: tuple[Flavour, ...]
    frame_rule: tuple[int, int] | None = None
    temporal_factor: int = 1
    frame_rate: float | None = None
    pipelines: tuple[str, ...] = ()
    guidance_above: float = 1.0
    backward_blocks: int = 2

    def latent_tokens(self, width: int, height: int, frames: int = 1) -> int:
        """Tokens of one sample of `width` x `height` pixels and `frames` frames."""
        edge = self.latent_factor * self.patch
        latent_frames = (frames - 1) // self.temporal_factor + 1
        return (width // edge) * (height // edge) * latent_frames


# Sizes are those of the published configs: tests/runtime/test_family_facts.py builds each one without memory and compares.
# `activation_bytes_per_token` is measured there on a whole forward pass over one sample (1024 x 1024 pixels, clips 81 frames of
# 832 x 480) as: bytes of all storages that autograd saves, weights apart / layers / (latent tokens + text tokens). It assumes CUDA's
# autocast, so norms and their inputs are kept in fp32, and flash attention, which keeps query, key, value, output and one number
# per query. With adapters on `all` as well it is 1.14 to 1.32 times as much, in full-rank training 1.17 (UNet) to 1.76 times.
SD3 = FamilyFacts(
    name="sd3",
    title="Stable Diffusion 3 and 3.5",
    modality="image",
    objective="flow",
    pixel_multiple=16,
    latent_channels=16,
    latent_factor=8,
    patch=2,
    shift=3.0,
    licence="Stability AI Community License",
    flavours=(
        Flavour(
            name="3.5-medium",
            source="hf://stabilityai/stable-diffusion-3.5-medium",
            parameters=2_243_171_520,
            layers=24,
            width=1536,
            mlp_width=6144,
            text_tokens=333,
            encoder_parameters=5_580_620_800,
            vae_parameters=83_819_683,
            activation_bytes_per_token=90_000,
            largest_block=101_506_944,
        ),
        Flavour(
            name="3.5-large",
            source="hf://stabilityai/stable-diffusion-3.5-large",
            parameters=8_056_627_520,
            layers=38,
            width=2432,
            mlp_width=9728,
            text_tokens=333,
            encoder_parameters=5_580_620_800,
            vae_parameters=83_819_683,
            activation_bytes_per_token=108_000,
        ),
        Flavour(
            name="3-medium",
            source="hf://stabilityai/stable-diffusion-3-medium-diffusers",
            parameters=2_028_328_000,
            layers=24,
            width=1536,
            mlp_width=6144,
            text_tokens=333,
            encoder_parameters=5_580_620_800,
            vae_parameters=83_819_683,
            activation_bytes_per_token=50_000,
        ),
    ),
    pipelines=("StableDiffusion3Pipeline",),
)

_FLUX_DEV = Flavour(
    name="dev",
    source="hf://black-forest-labs/FLUX.1-dev",
    parameters=11_901_408_320,
    layers=57,
    width=3072,
    mlp_width=12288,
    text_tokens=512,
    encoder_parameters=4_885_371_136,
    vae_parameters=83_819_683,
    activation_bytes_per_token=112_000,
    largest_block=339_831_296,
    guidance="distilled",
)

FLUX = FamilyFacts(
    name="flux",
    title="Flux.1",
    modality="image",
    objective="flow",
    pixel_multiple=16,
    latent_channels=16,
    latent_factor=8,
    patch=2,
    shift="dynamic",
    licence="FLUX.1 [dev] Non-Commercial License; schnell: Apache-2.0",
    flavours=(
        _FLUX_DEV,
        replace(_FLUX_DEV, name="krea", source="hf://black-forest-labs/FLUX.1-Krea-dev"),
        replace(
            _FLUX_DEV,
            name="schnell",
            source="hf://black-forest-labs/FLUX.1-schnell",
            parameters=11_891_178_560,
            text_tokens=256,
            guidance="off",
        ),
    ),
    pipelines=("FluxPipeline",),
)

SDXL = FamilyFacts(
    name="sdxl",
    title="Stable Diffusion XL",
    modality="image",
    objective="diffusion",
    pixel_multiple=8,
    latent_channels=4,
    latent_factor=8,
    # A UNet has no tokens of one size: this is the side of those in its deepest level, where 60 of the 70 transformer blocks are.
    patch=4,
    shift="none",
    licence="CreativeML Open RAIL++-M",
    flavours=(
        Flavour(
            name="base-1.0",
            source="hf://stabilityai/stable-diffusion-xl-base-1.0",
            parameters=2_567_463_684,
            layers=70,
            width=1280,
            mlp_width=5120,
            text_tokens=77,
            encoder_parameters=817_720_320,
            vae_parameters=83_653_863,
            activation_bytes_per_token=101_000,
            largest_block=1_206_568_960,
        ),
    ),
    pipelines=("StableDiffusionXLPipeline",),
    backward_blocks=5,  # 4.2 measured: LoRA on an H200, 1024 x 1024, batch 4
)

_Z_IMAGE_TURBO = Flavour(
    name="turbo",
    source="hf://Tongyi-MAI/Z-Image-Turbo",
    parameters=6_154_908_736,
    layers=34,
    width=3840,
    mlp_width=10240,
    text_tokens=512,
    encoder_parameters=4_022_468_096,
    vae_parameters=83_819_683,
    activation_bytes_per_token=247_000,
)

Z_IMAGE = FamilyFacts(
    name="z_image",
    title="Z-Image",
    modality="image",
    objective="flow",
    pixel_multiple=16,
    latent_channels=16,
    latent_factor=8,
    patch=2,
    shift=3.0,
    licence="Apache-2.0",
    flavours=(_Z_IMAGE_TURBO, replace(_Z_IMAGE_TURBO, name="base", source="hf://Tongyi-MAI/Z-Image")),
    pipelines=("ZImagePipeline",),
    guidance_above=0.0,
)

_WAN_14B = Flavour(
    name="2.1-t2v-14b",
    source="hf://Wan-AI/Wan2.1-T2V-14B-Diffusers",
    parameters=14_288_491_584,
    layers=40,
    width=5120,
    mlp_width=13824,
    text_tokens=512,
    encoder_parameters=5_680_910_336,
    vae_parameters=126_892_531,
    activation_bytes_per_token=271_000,
)

WAN = FamilyFacts(
    name="wan",
    title="Wan 2.1 and 2.2, text to video",
    modality="video",
    objective="flow",
    pixel_multiple=16,
    latent_channels=16,
    latent_factor=8,
    patch=2,
    shift=3.0,
    licence="Apache-2.0",
    flavours=(
        Flavour(
            name="2.1-t2v-1.3b",
            source="hf://Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            parameters=1_418_996_800,
            layers=30,
            width=1536,
            mlp_width=8960,
            text_tokens=512,
            encoder_parameters=5_680_910_336,
            vae_parameters=126_892_531,
            activation_bytes_per_token=91_000,
        ),
        _WAN_14B,
        replace(_WAN_14B, name="2.2-t2v-a14b", source="hf://Wan-AI/Wan2.2-T2V-A14B-Diffusers", experts=2),
    ),
    frame_rule=(4, 1),
    temporal_factor=4,
    frame_rate=16.0,
    pipelines=("WanPipeline",),
)

FAMILIES: dict[str, FamilyFacts] = {facts.name: facts for facts in (SD3, FLUX, SDXL, Z_IMAGE, WAN)}
