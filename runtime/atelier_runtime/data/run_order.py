"""The order in which a run sees its samples: those that have the same shapes are batches together."""

import logging
from collections.abc import Sequence

import numpy as np

from atelier_api.errors import DataError
from atelier_api.run_file import RunFile
from atelier_api.sliders import strength_of
from atelier_api.v1alpha1.adapter import is_slider
from atelier_runtime.data.buckets import Bucket
from atelier_runtime.data.order import SampleOrder, SliderOrder
from atelier_runtime.data.prepare import Sample
from atelier_runtime.family import Family

log = logging.getLogger(__name__)


def order_of(samples: Sequence[Sample], run_file: RunFile, family: Family) -> SampleOrder | SliderOrder:
    """Batches of one bucket, and of a slider of one strength. Raises DataError where a slider has lost one of its ends."""
    hyperparameters, adapter = run_file.spec.hyperparameters, run_file.spec.adapter
    alike = [(strength_of(sample.source, adapter), _shapes(sample)) for sample in samples]
    buckets = sorted(set(alike))
    number = {bucket: i for i, bucket in enumerate(buckets)}
    of_samples = np.array([number[bucket] for bucket in alike], np.int32)
    repeats = np.array([sample.source.repeats for sample in samples], np.int32)
    tokens = tuple(family.facts.latent_tokens(own.width, own.height, own.frames) for _, (own, *_) in buckets)
    size, seed = hyperparameters.global_batch_size, hyperparameters.seed
    if is_slider(adapter):
        strengths = tuple(strength for strength, _ in buckets)
        _require_ends(strengths, [strength_of(source, adapter) for source in run_file.spec.data.sources])
        slider = SliderOrder(of_samples, repeats, strengths=strengths, tokens=tokens, global_batch_size=size, seed=seed)
        for part in slider.parts:
            _log_order(part, len(buckets), size)
        return slider
    order = SampleOrder(of_samples, repeats, tokens=tokens, global_batch_size=size, seed=seed)
    _log_order(order, len(buckets), size)
    return order


def _shapes(sample: Sample) -> tuple[Bucket, ...]:
    """What samples of one batch have in common: the sizes of the target and of the references."""
    return (sample.placement.bucket, *(reference.placement.bucket for reference in sample.references))


def _require_ends(left: Sequence[float], given: Sequence[float]) -> None:
    """Raises DataError when no sample is left of an end of a slider that sources have: it would learn the other alone."""
    for side, sign in (("above", 1), ("below", -1)):
        if not any(sign * strength > 0 for strength in left) and any(sign * strength > 0 for strength in given):
            raise DataError(
                f"0 samples are left of the sources with a sliderStrength {side} 0; a slider needs at least one of each end "
                "that spec.data.sources names; mend these files, or remove the sources"
            )


def _log_order(order: SampleOrder, buckets: int, size: int) -> None:
    log.info(
        "order of samples",
        extra={
            "buckets": buckets,
            "steps_per_epoch": order.steps_per_epoch,
            "samples": order.samples_per_epoch,
            "filled_up": order.steps_per_epoch * size - order.samples_per_epoch,
        },
    )
