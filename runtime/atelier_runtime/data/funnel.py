"""The funnel: what became of every file found, and why."""

from collections import Counter
from enum import Enum
from typing import NoReturn

from atelier_api.errors import DataError
from atelier_api.progress import FunnelReport

MAX_LISTED = 100


class Fate(Enum):
    """Why a sample is left out. Values are the fields of FunnelReport."""

    UNREADABLE = "unreadable"
    TOO_SMALL = "too_small"
    NO_CAPTION = "no_caption"
    TOO_SHORT = "too_short"
    NO_REFERENCE = "no_reference"
    NO_CONDITIONING = "no_conditioning"


class Funnel:
    """Collects rejections. Every file is counted once, as kept or under one fate."""

    def __init__(self, found: int) -> None:
        self._found = found
        self._counts: Counter[Fate] = Counter()
        self._rejected: dict[str, str] = {}

    def reject(self, name: str, fate: Fate, reason: str) -> None:
        """Count a file as left out; the first hundred are listed by name."""
        self._counts[fate] += 1
        if len(self._rejected) < MAX_LISTED:
            self._rejected[name] = reason

    def report(self) -> FunnelReport:
        """The state of the funnel."""
        counts = {fate.value: self._counts[fate] for fate in Fate}
        return FunnelReport(
            found=self._found, kept=self._found - sum(counts.values()), rejected=dict(self._rejected), **counts
        )


def refuse_empty(report: FunnelReport, looked_for: str) -> NoReturn:
    """Raises the DataError of a run that has nothing to train on; `looked_for` names the kinds of file."""
    if report.found == 0:
        raise DataError(
            f"spec.data.sources has 0 files to train on; at least one of type {looked_for} is needed; "
            "look at the uris of spec.data.sources"
        )
    counts = [(getattr(report, fate.value), fate.value.replace("_", " ")) for fate in Fate]
    left_out = ", ".join(f"{count} {what}" for count, what in counts if count)
    first = next(iter(report.rejected.items()))
    raise DataError(
        f"spec.data.sources leaves 0 of {report.found} files to train on ({left_out}); at least one must be left; "
        f"the first is {first[0]}: {first[1]}; mend the files, or relax spec.data "
        "(maxUpscale, resolution, captions.fallback, clip, audio)"
    )
