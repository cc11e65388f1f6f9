"""`spec.adapter`: what is trained."""

from typing import Annotated, Literal

from pydantic import Field

from atelier_api.v1alpha1.base import Block, Decimal


class LoraAdapter(Block):
    """Low-rank adaptation (arXiv:2106.09685) through peft."""

    type: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1, le=1024, description="Rank of the two matrices.")
    alpha: Annotated[Decimal, Field(gt=0, le=65536)] | None = Field(
        default=None, description="Scale numerator: the update is multiplied by alpha / rank. Default: the rank."
    )
    dropout: Annotated[Decimal, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Dropout in front of the first matrix."
    )
    init: Literal["default", "gaussian"] = Field(
        default="default",
        description="Start values of the first matrix: `default` is Kaiming-uniform, `gaussian` is N(0, 1/rank). The second matrix starts at zero.",
    )
    dora: bool = Field(default=False, description="Weight-decomposed LoRA (arXiv:2402.09353).")
    rslora: bool = Field(default=False, description="Rank-stabilised scale alpha / sqrt(rank) (arXiv:2312.03732).")
    targets: list[Annotated[str, Field(min_length=1, max_length=512)]] = Field(
        default=["attention"],
        min_length=1,
        max_length=32,
        description="Presets of the family (`attention`, `mlp`, `all`) or regular expressions that match whole module names.",
    )


class FullAdapter(Block):
    """Full-rank: every weight of the denoiser is trained."""

    type: Literal["full"]


Adapter = Annotated[LoraAdapter | FullAdapter, Field(discriminator="type")]
