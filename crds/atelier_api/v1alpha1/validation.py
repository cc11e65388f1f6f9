"""`spec.validation` and `spec.publish`: pictures while training, and what comes out."""

from typing import Annotated, Literal

from pydantic import Field

from atelier_api.v1alpha1.base import Block, Decimal


class ValidationPrompt(Block):
    """One picture that is drawn again and again."""

    text: str = Field(max_length=1024, description="Prompt.")
    negative: str | None = Field(default=None, max_length=1024, description="Negative prompt.")
    seed: int = Field(default=1, ge=0, le=2**31 - 1, description="Seed of the start noise.")


class Validation(Block):
    """Samples by the stock diffusers pipeline at intervals, with fixed seeds."""

    every_steps: int = Field(
        default=0, ge=0, le=10_000_000, description="Steps between sample rounds; 0: only at the start and the end."
    )
    prompts: list[ValidationPrompt] = Field(default=[], max_length=32, description="Prompts; none: no samples.")
    steps: int | None = Field(default=None, ge=1, le=1000, description="Sampling steps. Default: the pipeline's.")
    guidance: Annotated[Decimal, Field(ge=0, le=100)] | None = Field(
        default=None, description="Guidance scale. Default: the pipeline's."
    )
    width: int | None = Field(default=None, ge=8, le=4096, description="Width in pixels. Default: `data.resolution`.")
    height: int | None = Field(default=None, ge=8, le=4096, description="Height in pixels. Default: `data.resolution`.")
    frames: int | None = Field(
        default=None, ge=1, le=1025, description="Frames, for video families. Default: `data.clip.frames`."
    )


class Publish(Block):
    """What is exported at the end, below `exports/` of the run's folder."""

    formats: list[Literal["diffusers", "kohya", "lycoris"]] = Field(
        default=["diffusers", "kohya", "lycoris"],
        min_length=1,
        max_length=3,
        description="`diffusers`: `pytorch_lora_weights.safetensors` (LoRA) or a model folder (full-rank). `kohya`: the layout of ComfyUI and kohya-ss, LoRA only. `lycoris`: that of lycoris-lora, for its types of adapter. What cannot hold the run's adapter is left out.",
    )
