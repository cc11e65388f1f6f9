"""A download as a person sees it: a bar on a terminal, lines in a log, nothing when asked to be quiet."""

import io

import pytest
from rich.console import Console
from rich.progress import Progress as Bars

from atelier_cli import prefetching
from atelier_cli.prefetching import Bar, Lines, watch_for


def test_a_log_gets_a_line_every_ten_seconds_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 0.0, 4.0, 10.0, 19.0, 20.0])
    monkeypatch.setattr(prefetching.time, "monotonic", lambda: next(clock))
    lines = Lines()
    lines.note("fetching hf://owner/name: 3 files, 8 GB, 2 GB of them are here")
    for done in (2, 3, 4, 5, 6):
        lines.show(done * 10**9, 8 * 10**9)
    assert capsys.readouterr().out.splitlines() == [
        "fetching hf://owner/name: 3 files, 8 GB, 2 GB of them are here",
        "fetching the model: 4 GB of 8 GB, 20 s left",
        "fetching the model: 6 GB of 8 GB, 10 s left",
    ]


def test_a_terminal_gets_a_bar_with_bytes_and_the_time_left() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160, highlight=False)
    with Bars(*prefetching.COLUMNS, console=console) as bars:
        bar = Bar(bars)
        bar.note("fetching hf://owner/name")
        bar.show(0, 8 * 10**9)
        bar.show(2 * 10**9, 8 * 10**9)
        bars.refresh()
    shown = screen.getvalue()
    assert "fetching hf://owner/name" in shown
    assert "2.0/8.0 GB" in shown
    assert "fetching the model" in shown


def test_a_quiet_download_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with watch_for(quiet=True) as watch:
        watch.note("fetching")
        watch.show(1, 2)
    assert capsys.readouterr() == ("", "")


def test_where_nobody_watches_there_are_lines() -> None:
    with watch_for(quiet=False) as watch:
        assert isinstance(watch, Lines)
