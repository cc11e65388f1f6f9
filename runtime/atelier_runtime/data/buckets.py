"""Aspect buckets: the sizes that samples are resized and cropped to. Pure arithmetic.

A bucket has (nearly) the area of a square of `resolution` pixels and the aspect of the picture rounded to two decimals; both
edges are multiples of an alignment. All pictures whose aspect leads to the same size share a bucket. Sounds share one by their length.
"""

import math
from dataclasses import dataclass

from atelier_api.families import FamilyFacts
from atelier_api.family_rules import edge_multiple
from atelier_api.v1alpha1.data import Data


@dataclass(frozen=True, order=True, slots=True)
class Bucket:
    """A size of training samples in pixels; `frames` is 1 for pictures. A sound is of 1 x 1, and its frames are samples."""

    width: int
    height: int
    frames: int = 1


@dataclass(frozen=True, slots=True)
class Placement:
    """How one picture fills its bucket: resized to `resized` (height, width), then cut at `top`, `left` to the bucket's size.

    `length`: of a sound, how many samples of its bucket it fills.
    """

    resized: tuple[int, int]
    top: int
    left: int
    bucket: Bucket
    length: int = 0

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """Resized height and width, crop top and left, target height and width, in pixels: a model may be told these."""
        return (*self.resized, self.top, self.left, self.bucket.height, self.bucket.width)


def alignment(data: Data, facts: FamilyFacts) -> int:
    """The multiple that both edges of a bucket are rounded to. `atelier_api.rules` refuses one that the family cannot take."""
    align = edge_multiple(data, facts)
    if align % facts.pixel_multiple:
        raise ValueError(
            f"spec.data.bucketAlign is {align}, no multiple of {facts.pixel_multiple}, and was not refused"
        )
    return align


def bucket_for(width: int, height: int, resolution: int, align: int, *, frames: int = 1) -> Bucket:
    """The bucket of a picture of `width` x `height`: edges `edge * sqrt(aspect)` and `edge / sqrt(aspect)`, rounded."""
    edge = _rounded(resolution, align)
    aspect = max(round(width / height, 2), 0.01)
    return Bucket(_rounded(edge * math.sqrt(aspect), align), _rounded(edge / math.sqrt(aspect), align), frames)


def enlargement(width: int, height: int, bucket: Bucket) -> float:
    """The factor by which a picture is scaled to cover the bucket; above 1 it is enlarged."""
    return max(bucket.width / width, bucket.height / height)


def place(width: int, height: int, bucket: Bucket, draw: tuple[float, float] | None = None) -> Placement:
    """Resizes to cover the bucket keeping the aspect, and cuts at the fractions `draw` (down, right) of what is left over.

    Fractions are in [0, 1); without them the centre is kept.
    """
    scale = enlargement(width, height, bucket)
    resized_width = max(bucket.width, round(width * scale))
    resized_height = max(bucket.height, round(height * scale))
    down, right = draw or (None, None)
    top = _offset(resized_height - bucket.height, down)
    return Placement((resized_height, resized_width), top, _offset(resized_width - bucket.width, right), bucket)


def place_whole(width: int, height: int) -> Placement:
    """Resizes a picture to this size as a whole: nothing is cut, and its aspect is given up."""
    return Placement((height, width), 0, 0, Bucket(width, height))


def place_sound(samples: int, unit: int, step: int, most: int) -> Placement:
    """Keeps whole units of a sound, up to `most`; its bucket is that rounded up to a multiple of `step`, at most `most`.

    All in samples; `unit` is what one latent is made of, and a divisor of `step` and `most`.
    """
    length = min(samples, most) // unit * unit
    return Placement((1, 1), 0, 0, Bucket(1, 1, min(-(-length // step) * step, most)), length)


def _offset(spare: int, fraction: float | None) -> int:
    """Where to cut of `spare` pixels too many: 0 to `spare`, all equally likely for a uniform fraction."""
    return spare // 2 if fraction is None else int(fraction * (spare + 1))


def _rounded(length: float, align: int) -> int:
    """`length` to the nearest multiple of `align`, at least one; halves go up."""
    return max(align, math.floor(length / align + 0.5) * align)
