"""Losses per element. Both take fp32 tensors; what is averaged and weighted afterwards is `Objective.loss`."""

from torch import Tensor


def squared_error(difference: Tensor) -> Tensor:
    """d^2."""
    return difference.square()


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """2c (sqrt(d^2 + c^2) - c): d^2 for d much smaller than c, slope 2c for d much larger.

    Computed as 2c d^2 / (sqrt(d^2 + c^2) + c), which is the same number without the cancellation at small d.
    """
    square = difference.square()
    return 2 * c * square / ((square + c * c).sqrt() + c)
