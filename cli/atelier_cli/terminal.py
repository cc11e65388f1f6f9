"""What the command line prints: plain sentences on stdout, errors on stderr as `error: …`, one per line."""

import sys
import traceback
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

GIB = 1 << 30
PIPE_WIDTH = 400
"""Columns of tables where nobody's window is: wide enough that a row is one line, which scripts count on."""


def console(*, stderr: bool = False) -> Console:
    """The console of a stream. Paths and numbers keep their own look: no markup, no highlighting."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, markup=False, highlight=False, width=None if stream.isatty() else PIPE_WIDTH)


def say(text: str = "", style: str | None = None) -> None:
    """A line on stdout, never wrapped: it may hold a path that someone copies."""
    console().print(text, style=style, soft_wrap=True)


def say_errors(text: str) -> None:
    """Each line of `text` as an error."""
    for line in text.splitlines() or [""]:
        console(stderr=True).print(f"error: {line}", style="red", soft_wrap=True)


def say_bug(error: BaseException) -> None:
    """The traceback of what must not happen, and what to do with it."""
    stream = console(stderr=True)
    stream.print("".join(traceback.format_exception(error)), soft_wrap=True)
    say_errors(f"this is a bug of atelier ({type(error).__name__}: {error}); please report it with the lines above")


def facts(rows: Iterable[tuple[str, str]]) -> None:
    """Names and values, one a line."""
    for name, value in rows:
        say(f"  {name:<10} {value}")


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """A table without lines. `right` are the columns of numbers."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for index, heading in enumerate(headings):
        grid.add_column(heading, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    console().print(grid)


def size(size_bytes: int) -> str:
    """Bytes for people: 1.5 GiB, 12 MiB, 300 B."""
    for name, unit in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.3g} {name}" if size_bytes < 100 * unit else f"{size_bytes / unit:.0f} {name}"
    return f"{size_bytes} B"


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def parameters(count: int) -> str:
    """A number of parameters: 2.24 B, 567 M."""
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"
