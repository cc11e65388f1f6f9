"""The base model on its way to this machine: a bar with bytes and the time left on a terminal, lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars

from atelier_api.v1alpha1 import TrainingRunSpec
from atelier_cli import terminal
from atelier_cli.follow import LINE_SECONDS
from atelier_operator.planner.local import Surroundings
from atelier_runtime.fetching.transfer import Watch, gigabytes
from atelier_runtime.prefetch import ModelCaches, fetch_model, is_remote

COLUMNS = (
    TextColumn("fetching the model"),
    BarColumn(bar_width=30, complete_style="cyan", finished_style="green"),
    DownloadColumn(),
    TransferSpeedColumn(),
    TimeRemainingColumn(),
)


def ensure_model(spec: TrainingRunSpec, around: Surroundings, *, quiet: bool) -> None:
    """Fetch the model of a remote source where it is not on this machine. Raises ConfigError, CredentialsError, StoreError."""
    if not is_remote(spec.model):
        return
    bundle = spec.storage.s3.ca_bundle
    s3 = spec.storage.s3.model_copy(update={"ca_bundle": None if bundle is None else str(around.absolute(bundle))})
    try:
        with watch_for(quiet=quiet) as watch:
            fetch_model(spec.model, s3, ModelCaches(hub=around.hub_cache, objects=around.model_cache), watch)
    except KeyboardInterrupt:
        terminal.say("stopped; what has been fetched stays, the same command goes on from there")
        raise


@contextmanager
def watch_for(*, quiet: bool) -> Iterator[Watch]:
    """Who shows the download: a bar on a terminal, lines elsewhere, nobody when asked to be quiet."""
    if quiet:
        yield Silence()
    elif terminal.console().is_terminal:
        with Bars(*COLUMNS, console=terminal.console(), transient=True) as bars:
            yield Bar(bars)
    else:
        yield Lines()


class Silence:
    """Shows nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def show(self, done: int, total: int) -> None:
        """Nothing."""


class Bar:
    """One bar for all files."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task = bars.add_task("", total=None, visible=False)

    def note(self, text: str) -> None:
        """Print above the bar."""
        self._bars.console.print(text, soft_wrap=True)

    def show(self, done: int, total: int) -> None:
        """Move the bar."""
        self._bars.update(self._task, completed=done, total=total, visible=True)


class Lines:
    """A line every ten seconds."""

    def __init__(self) -> None:
        self._started = self._at = time.monotonic()
        self._first: int | None = None

    def note(self, text: str) -> None:
        """Print."""
        terminal.say(text)

    def show(self, done: int, total: int) -> None:
        """Print when it is time to."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._started = done, now
        if now - self._at < LINE_SECONDS:
            return
        self._at = now
        rate = (done - self._first) / max(now - self._started, 1e-3)
        left = f", {terminal.duration((total - done) / rate)} left" if rate > 0 else ""
        terminal.say(f"fetching the model: {gigabytes(done)} of {gigabytes(total)}{left}")
