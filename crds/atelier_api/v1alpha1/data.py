"""`spec.data`: pictures, clips or sounds with captions, and how they are cut and cached."""

from typing import Annotated, Literal

from pydantic import Field

from atelier_api.v1alpha1.base import Block, Decimal

MOST_REFERENCES = 4
"""Reference pictures of a sample that the API has room for; a family may take fewer."""

ReferencePlace = Annotated[str, Field(min_length=1, max_length=2048)]


class DataSource(Block):
    """One folder or S3 prefix."""

    uri: str = Field(
        description="A folder (relative to the run's YAML) or `s3://bucket/prefix`.", min_length=1, max_length=2048
    )
    repeats: int = Field(default=0, ge=0, le=1000, description="Extra passes over this source in each epoch.")
    slider_strength: Annotated[Decimal, Field(ge=-10, le=10)] | None = Field(
        default=None,
        description="Of which end of a slider (`adapter.slider`) these samples are: above 0 of more, below 0 of less. The adapter's update is multiplied by it in their steps. Without it, as with 0, they are neutral: their steps see the base alone and train nothing.",
    )
    references: list[ReferencePlace] = Field(
        default=[],
        max_length=MOST_REFERENCES,
        description="Folders or prefixes of reference pictures, one picture per sample from each, under the sample's name with any ending. For families that train on pairs: there the captions are instructions.",
    )
    conditioning: ReferencePlace | None = Field(
        default=None,
        description="Folder or prefix of conditioning pictures (edges, depths, poses …), one for each sample, under its name with any ending, and cut like it. For adapter type `controlnet`.",
    )

    @property
    def beside(self) -> dict[str, str]:
        """Where the pictures beside its samples are, by the field."""
        places = {f"references[{number}]": uri for number, uri in enumerate(self.references)}
        return places if self.conditioning is None else places | {"conditioning": self.conditioning}


class Captions(Block):
    """Where captions come from and what is done to them."""

    dropout: Annotated[Decimal, Field(ge=0, le=1)] = Field(
        default=0.1,
        description="Probability with which a sample trains on the empty caption, so that classifier-free guidance keeps working.",
    )
    trigger: str | None = Field(
        default=None, max_length=256, description="Text put in front of every caption, followed by a comma."
    )
    fallback: str | None = Field(
        default=None,
        max_length=1024,
        description="Caption of samples without a sidecar `.txt`. Default: such samples are left out and listed.",
    )


class Clip(Block):
    """How clips are cut; only for video families."""

    frames: int = Field(
        default=49, ge=1, le=1025, description="Frames of a training clip. Must fit the family's rule (Wan: 4n + 1)."
    )
    fps: Annotated[Decimal, Field(gt=0, le=120)] | None = Field(
        default=None, description="Frame rate that clips are resampled to. Default: the family's own."
    )
    shown_frames: int = Field(
        default=1,
        ge=1,
        le=1025,
        description="First frames of a clip that the model is shown, for families that continue clips: 1 is image to video. Must fit the family's rule and leave frames to draw.",
    )


class Audio(Block):
    """How sounds are cut; only for audio families."""

    max_seconds: int = Field(
        default=60, ge=1, le=600, description="Of a longer file the first so many seconds are trained on."
    )
    min_seconds: int = Field(default=3, ge=1, le=600, description="Shorter files are left out and listed.")
    bucket_seconds: int = Field(
        default=10,
        ge=1,
        le=600,
        description="Files whose lengths are the same when rounded up to a multiple of this are trained together.",
    )


class Data(Block):
    """Training data."""

    sources: list[DataSource] = Field(min_length=1, max_length=64, description="Folders or prefixes, trained together.")
    resolution: int = Field(
        default=1024, ge=16, le=4096, description="Edge in pixels of the square whose area the aspect buckets have."
    )
    bucket_align: int | None = Field(
        default=None,
        ge=8,
        le=256,
        description="Both edges of a bucket are multiples of this. Default: 64, or the family's own multiple where it is larger or the resolution is below 512.",
    )
    crop: Literal["center", "random"] = Field(
        default="center",
        description="Which part is kept after resizing to cover the bucket. `random` draws once per sample from the seed.",
    )
    max_upscale: Annotated[Decimal, Field(ge=1, le=16)] = Field(
        default=1.5, description="Pictures that would have to be enlarged by more than this are left out as too small."
    )
    captions: Captions = Field(default_factory=Captions, description="Captions.")
    clip: Clip = Field(default_factory=Clip, description="Cutting of clips, for video families.")
    audio: Audio = Field(default_factory=Audio, description="Cutting of sounds, for audio families.")
