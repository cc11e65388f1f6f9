"""`spec.validation` and `spec.publish`: samples while training, and what comes out."""

from typing import Annotated, Literal

from pydantic import Field

from atelier_api.v1alpha1.base import Block, Decimal
from atelier_api.v1alpha1.data import MOST_REFERENCES, ReferencePlace

PICTURE_FIELDS = {"first": "image", "last": "lastImage"}
"""The field of a prompt that has the picture of a frame."""


class ValidationPrompt(Block):
    """One sample that is drawn again and again."""

    text: str = Field(max_length=1024, description="Prompt.")
    negative: str | None = Field(default=None, max_length=1024, description="Negative prompt.")
    seed: int = Field(default=1, ge=0, le=2**31 - 1, description="Seed of the start noise.")
    image: str | None = Field(
        default=None,
        min_length=1,
        max_length=2048,
        description="First frame, for image-to-video checkpoints: a file (relative to the run's YAML) or `s3://bucket/key`. Where `data.clip.shownFrames` is above 1, a clip that begins with these frames.",
    )
    last_image: str | None = Field(
        default=None,
        min_length=1,
        max_length=2048,
        description="Last frame, for checkpoints that draw between two pictures. A file or `s3://bucket/key`.",
    )
    references: list[ReferencePlace] = Field(
        default=[],
        max_length=MOST_REFERENCES,
        description="Reference pictures that are edited, for families that train on pairs: files, or `s3://bucket/key`.",
    )
    conditioning: str | None = Field(
        default=None,
        min_length=1,
        max_length=2048,
        description="Conditioning picture, for adapter type `controlnet`: a file or `s3://bucket/key`. It is cut to the size of the sample.",
    )
    conditioning_scale: Annotated[Decimal, Field(ge=0, le=10)] | None = Field(
        default=None,
        description="How much of the control network counts, for adapter type `controlnet`: 0 is the base alone, 1 what was trained.",
    )
    adapter_strength: Annotated[Decimal, Field(ge=-10, le=10)] | None = Field(
        default=None,
        description="What the adapter's update is multiplied by for this sample, of a slider how far it is pushed: 0 is the base alone, 1 what was trained. For adapters that are put on layers, without `dora`. Default: 1.",
    )
    lyrics: str | None = Field(
        default=None, max_length=4096, description="Words that are sung, for audio families; lines as they are."
    )

    @property
    def shown(self) -> dict[str, str | None]:
        """Where the picture of each frame is, by the frame's name."""
        return {"first": self.image, "last": self.last_image}

    @property
    def pictures(self) -> dict[str, str]:
        """Where all its pictures are, by the field."""
        frames = {PICTURE_FIELDS[frame]: uri for frame, uri in self.shown.items() if uri is not None}
        references = {f"references[{number}]": uri for number, uri in enumerate(self.references)}
        return frames | references | ({} if self.conditioning is None else {"conditioning": self.conditioning})


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
    seconds: int | None = Field(
        default=None, ge=1, le=600, description="Length, for audio families. Default: `data.audio.maxSeconds`."
    )

    @property
    def pictures(self) -> dict[str, str]:
        """Where the pictures of all prompts are, by the path of the field."""
        return {
            f"spec.validation.prompts[{index}].{field}": uri
            for index, prompt in enumerate(self.prompts)
            for field, uri in prompt.pictures.items()
        }


class Publish(Block):
    """What is exported at the end, below `exports/` of the run's folder."""

    formats: list[Literal["diffusers", "kohya", "lycoris"]] = Field(
        default=["diffusers", "kohya", "lycoris"],
        min_length=1,
        max_length=3,
        description="`diffusers`: `pytorch_lora_weights.safetensors` (LoRA), a model folder (full-rank, control network) or one file for each placeholder (textual inversion). `kohya`: the layout of ComfyUI and kohya-ss, LoRA only. `lycoris`: that of lycoris-lora, for its types of adapter. What cannot hold the run's adapter is left out.",
    )
