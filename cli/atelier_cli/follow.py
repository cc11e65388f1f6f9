"""Watching a run: what is new since the last look, as lines, and how far it is, as a bar or as a line now and then."""

import json
import time
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import Protocol

from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from atelier_api.progress import FunnelReport, Progress
from atelier_cli import terminal

LINE_SECONDS = 10.0
"""Time between two lines about one stage where nobody watches a bar."""

REJECTED_SHOWN = 10
ANSWER_SECONDS = 2.0


def fetch(port: int) -> Progress | None:
    """The agent's `/progress`; None when it does not answer, or ends before it has said all: a busy machine may cause both."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=ANSWER_SECONDS) as answer:
            return Progress.model_validate(json.loads(answer.read()))
    except (OSError, HTTPException, ValueError):
        return None


def news(before: Progress, after: Progress, store_uri: str) -> Iterator[str]:
    """What happened between two looks."""
    if after.funnel is not None and after.funnel != before.funnel:
        yield from funnel_lines(after.funnel)
    if after.stage == "Preparing" and after.detail.startswith("restart") and after.detail != before.detail:
        yield after.detail
    if after.checkpoint is not None and after.checkpoint != before.checkpoint:
        yield f"checkpoint at step {after.checkpoint.step} ({terminal.size(after.checkpoint.size_bytes)})"
    if after.samples and after.samples != before.samples:
        yield f"samples: {store_uri}/{after.samples[0].rpartition('/')[0]}"


def funnel_lines(funnel: FunnelReport) -> Iterator[str]:
    """What became of the files, and which were left out."""
    counts = (
        ("found", funnel.found),
        ("unreadable", funnel.unreadable),
        ("too small", funnel.too_small),
        ("no caption", funnel.no_caption),
        ("too short", funnel.too_short),
        ("no reference", funnel.no_reference),
        ("no conditioning", funnel.no_conditioning),
    )
    yield (
        "data: "
        + ", ".join(f"{name} {count}" for name, count in counts if count or name == "found")
        + f", kept {funnel.kept}"
    )
    for name, reason in list(funnel.rejected.items())[:REJECTED_SHOWN]:
        yield f"  left out {name}: {reason}"
    if len(funnel.rejected) > REJECTED_SHOWN:
        yield f"  … and {len(funnel.rejected) - REJECTED_SHOWN} more, listed in the report"


def numbers(progress: Progress) -> str:
    """The numbers of a moment; those not known are left out."""
    parts = []
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.samples_per_second is not None:
        parts.append(f"{progress.samples_per_second:.3g} samples/s")
    if progress.eta_seconds is not None and progress.stage == "Training":
        parts.append(f"{terminal.duration(progress.eta_seconds)} left")
    if progress.peak_memory_bytes is not None:
        parts.append(f"{terminal.size(progress.peak_memory_bytes)} memory")
    return ", ".join(parts)


class Display(Protocol):
    """Where progress is shown; a context, because a bar must be taken down."""

    def __enter__(self) -> "Display": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, progress: Progress) -> None:
        """How far the run is."""

    def note(self, text: str) -> None:
        """A line that stays."""


class Silence:
    """Shows nothing."""

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def show(self, progress: Progress) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


class Lines(Silence):
    """A line when the stage turns, and every ten seconds while it lasts: for logs."""

    def __init__(self) -> None:
        self._stage = ""
        self._at = 0.0

    def __enter__(self) -> "Lines":
        return self

    def show(self, progress: Progress) -> None:
        """Print when it is time to. How the run ended is told at the end."""
        if progress.stage in ("Succeeded", "Stopped", "Failed"):
            return
        now = time.monotonic()
        if progress.stage == self._stage and now - self._at < LINE_SECONDS:
            return
        self._stage, self._at = progress.stage, now
        count = f" {progress.done}/{progress.total}" if progress.total else ""
        parts = [progress.detail, numbers(progress) if progress.stage == "Training" else ""]
        terminal.say(": ".join([f"{progress.stage}{count}", *(part for part in parts if part)]))

    def note(self, text: str) -> None:
        """Print."""
        terminal.say(text)


class Bar:
    """One bar for the present stage."""

    def __init__(self) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30, complete_style="cyan", finished_style="green", pulse_style="cyan"),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[text]}"),
            console=terminal.console(),
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> "Bar":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, progress: Progress) -> None:
        """Move the bar; it pulses while the end is unknown."""
        total = float(progress.total) if progress.total else None
        text = numbers(progress) if progress.stage == "Training" else progress.detail
        count = f"{progress.done}/{progress.total}" if progress.total else ""
        if self._task is None:
            self._task = self._bars.add_task("", total=None, count="", text="")
        self._bars.update(
            self._task, description=progress.stage, total=total, completed=progress.done, count=count, text=text
        )

    def note(self, text: str) -> None:
        """Print above the bar."""
        self._bars.console.print(text, soft_wrap=True)


class Watch:
    """Follows the progress of one run and shows what is new, over all its restarts."""

    def __init__(self, display: Display, store_uri: str) -> None:
        self._display = display
        self._store_uri = store_uri
        self._seen = Progress()

    def look(self, progress: Progress | None) -> None:
        """Show a message of the run. None, or one older than what was seen, changes nothing."""
        if progress is None or progress == self._seen:
            return
        for line in news(self._seen, progress, self._store_uri):
            self._display.note(line)
        self._display.show(progress)
        # A restarted rank begins with an empty message: what was told already is not told again.
        kept = {
            name: getattr(self._seen, name)
            for name in ("funnel", "checkpoint", "samples")
            if not getattr(progress, name)
        }
        self._seen = progress.model_copy(update=kept)


def display_for(*, quiet: bool) -> Display:
    """A bar on a terminal, lines elsewhere, nothing when asked to be quiet."""
    if quiet:
        return Silence()
    return Bar() if terminal.console().is_terminal else Lines()


def last_lines(path: Path, count: int) -> list[str]:
    """The end of a log, JSON lines made readable."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    return [_readable(line) for line in text.splitlines() if line.strip()][-count:]


def _readable(line: str) -> str:
    try:
        record = json.loads(line)
    except ValueError:
        return line
    if not isinstance(record, dict) or "message" not in record:
        return line
    known = ("time", "level", "logger", "message", "run", "attempt", "rank", "error")
    fields = " ".join(f"{key}={value}" for key, value in record.items() if key not in known)
    text = " ".join(part for part in (record.get("level", ""), str(record["message"]), fields) if part)
    return f"{text}\n{record['error']}" if "error" in record else text
