"""Numbers for people."""

import pytest

from atelier_cli import terminal


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (790 << 20, "790 MiB"),
        (3 << 29, "1.5 GiB"),
        (141 << 30, "141 GiB"),
    ],
)
def test_sizes(size: int, text: str) -> None:
    assert terminal.size(size) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
def test_durations(seconds: float, text: str) -> None:
    assert terminal.duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(2_243_171_520, "2.24 B"), (817_720_320, "818 M")])
def test_parameters(count: int, text: str) -> None:
    assert terminal.parameters(count) == text


def test_each_line_is_an_error_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say_errors("one [bold]\n" + "x" * 500)
    assert capsys.readouterr().err == "error: one [bold]\nerror: " + "x" * 500 + "\n"
