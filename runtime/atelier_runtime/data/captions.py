"""Captions: which texts a sample has, which one it trains on, and when it trains on the empty one. Pure functions."""

import hashlib

from atelier_api.v1alpha1.data import Captions

EMPTY = ""
"""The caption that replaces a dropped one: its features are what the pipeline uses for an empty prompt."""


def alternatives(sidecar: str | None, spec: Captions) -> tuple[str, ...]:
    """The captions of a sample, trigger included: one for each non-empty line of its sidecar, else the fallback.

    Empty when the sample has no caption at all and must be left out.
    """
    lines = [line.strip() for line in (sidecar or "").splitlines()]
    texts = [line for line in lines if line]
    if not texts and spec.fallback is not None:
        texts = [spec.fallback]
    return tuple(dict.fromkeys(_with_trigger(text, spec.trigger) for text in texts))


def chosen(count: int, seed: int, epoch: int, sample: int) -> int:
    """Which of `count` alternatives the sample trains on in an epoch, uniform in [0, count)."""
    return int(_uniform("alternative", seed, epoch, sample) * count)


def is_dropped(probability: float, seed: int, step: int, slot: int) -> bool:
    """Whether the sample at place `slot` of the global batch of `step` trains on the empty caption."""
    return _uniform("dropout", seed, step, slot) < probability


def _with_trigger(text: str, trigger: str | None) -> str:
    return ", ".join(part for part in (trigger, text) if part)


def _uniform(purpose: str, *key: int) -> float:
    """A number in [0, 1) that depends on the key alone: the same on every rank and after a restart."""
    digest = hashlib.blake2b(repr((purpose, key)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53
