"""`spec.techniques`: what is trained beside the objective. Each technique is a block of its own and off where it is left out."""

from typing import Annotated

from pydantic import Field

from atelier_api.v1alpha1.base import Block, Decimal

MOST_BLOCKS = 1023
"""The highest number of a block: beyond any network that there is."""


class LayerSync(Block):
    """Alignment of an earlier block with a later one of the same network (arXiv:2510.12581).

    Blocks are those that the picture's, clip's or sound's tokens go through, counted from 0 in the order in which they do; those of the
    text alone do not count.
    """

    student_block: int = Field(
        ge=0,
        le=MOST_BLOCKS,
        description="The earlier block, which learns. Blocks are counted from 0, as the tokens of what is drawn go through them, in a UNet its transformer blocks; blocks of the text alone do not count.",
    )
    teacher_block: int = Field(
        ge=0,
        le=MOST_BLOCKS,
        description="The later block, which is compared with and gets no gradient by it. In a UNet it is as wide as the student and of the same resolution.",
    )
    weight: Annotated[Decimal, Field(gt=0, le=100)] = Field(
        default=0.2,
        description="The loss beside the objective's is minus this times the mean cosine between the two blocks' tokens.",
    )


class Techniques(Block):
    """What is trained beside the objective."""

    layer_sync: LayerSync | None = Field(
        default=None, description="Align an earlier block with a later one (LayerSync, arXiv:2510.12581). Default: off."
    )
