"""What the runtime tells of itself, as parts of the status.

A pod's answer is not trusted: what the schema of the status would not take is cut or left out here, since one such field would have
the API server refuse the whole status.
"""

import math
from collections.abc import Iterable

from atelier_api.progress import ArtifactReport, Progress
from atelier_api.v1alpha1.status import (
    MOST_ARTIFACTS,
    MOST_SAMPLES,
    ArtifactStatus,
    CheckpointStatus,
    DataStatus,
    ProgressStatus,
)

LARGEST_NUMBER = 2**53
LONGEST_KEY = 1024


def progress_status(progress: Progress) -> ProgressStatus:
    """How far it is. Numbers are rounded: a status is for looking at, metrics are for measuring."""
    step, total = _whole(progress.step), _whole(progress.total_steps)
    return ProgressStatus(
        stage=progress.stage,
        detail=progress.detail[:500],
        step=step,
        total_steps=total,
        percent=min(100, step * 100 // total) if total else 0,
        loss=_rounded(progress.loss),
        samples_per_second=_rounded(progress.samples_per_second),
        eta_seconds=None if _rounded(progress.eta_seconds) is None else _whole(progress.eta_seconds),
        peak_memory_bytes=None if progress.peak_memory_bytes is None else _whole(progress.peak_memory_bytes),
        updated_at=progress.updated_at[:60],
    )


def checkpoint_status(progress: Progress, store_uri: str) -> CheckpointStatus | None:
    """The newest committed checkpoint; None where there is none, or none that can be one."""
    checkpoint = progress.checkpoint
    if checkpoint is None or not 0 <= checkpoint.step <= LARGEST_NUMBER or len(checkpoint.manifest) > LONGEST_KEY:
        return None
    return CheckpointStatus(
        step=checkpoint.step,
        uri=f"{store_uri}/{checkpoint.manifest}",
        size_bytes=_whole(checkpoint.size_bytes),
        manifest_sha256=checkpoint.manifest_sha256[:64],
        time=checkpoint.time[:60],
    )


def sample_uris(progress: Progress, store_uri: str) -> list[str]:
    """The newest round of samples."""
    keys = [key for key in progress.samples if len(key) <= LONGEST_KEY]
    return [f"{store_uri}/{key}" for key in keys[:MOST_SAMPLES]]


def artifact_statuses(artifacts: Iterable[ArtifactReport], store_uri: str) -> list[ArtifactStatus]:
    """The published files."""
    kept = [each for each in artifacts if len(each.key) <= LONGEST_KEY][:MOST_ARTIFACTS]
    return [
        ArtifactStatus(
            format=each.format[:63],
            uri=f"{store_uri}/{each.key}",
            size_bytes=_whole(each.size_bytes),
            sha256=each.sha256[:64],
        )
        for each in kept
    ]


def data_status(progress: Progress) -> DataStatus | None:
    """What became of the files found."""
    funnel = progress.funnel
    if funnel is None:
        return None
    return DataStatus(
        found=_whole(funnel.found),
        kept=_whole(funnel.kept),
        unreadable=_whole(funnel.unreadable),
        too_small=_whole(funnel.too_small),
        no_caption=_whole(funnel.no_caption),
        too_short=_whole(funnel.too_short),
        no_reference=_whole(funnel.no_reference),
        no_conditioning=_whole(funnel.no_conditioning),
    )


def _whole(number: float | None) -> int:
    """A count as the status may hold it."""
    return round(min(max(number or 0, 0), LARGEST_NUMBER))


def _rounded(number: float | None) -> float | None:
    """Four significant digits; None for what is no number."""
    return float(f"{number:.4g}") if number is not None and math.isfinite(number) else None
