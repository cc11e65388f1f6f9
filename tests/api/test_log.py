"""Log lines for machines and for people."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from atelier_api.log import setup_logging


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _handlers_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def test_a_machine_gets_one_json_object_a_line() -> None:
    stream = io.StringIO()
    setup_logging(rank=3, run="demo", attempt="1.0", stream=stream)
    logging.getLogger("atelier_runtime.trainer").info("step\ndone", extra={"step": 7})
    (text,) = stream.getvalue().splitlines()
    line = json.loads(text)
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "INFO",
        "logger": "atelier_runtime.trainer",
        "message": "step\ndone",
        "rank": 3,
        "run": "demo",
        "attempt": "1.0",
        "step": 7,
    }


def test_a_traceback_stays_on_the_line() -> None:
    stream = io.StringIO()
    setup_logging(stream=stream)
    try:
        raise ValueError("bad")
    except ValueError:
        logging.getLogger("atelier_runtime").exception("failed")
    (text,) = stream.getvalue().splitlines()
    assert json.loads(text)["error"].endswith("ValueError: bad")


def test_a_person_gets_a_short_line() -> None:
    stream = Terminal()
    setup_logging(rank=3, stream=stream)
    logging.getLogger("__main__").info("step done", extra={"step": 7})
    assert stream.getvalue()[8:] == " step done step=7\n"


def test_libraries_speak_through_our_handler_and_only_when_it_matters() -> None:
    library = logging.getLogger("some_library")
    own = io.StringIO()
    library.addHandler(logging.StreamHandler(own))
    library.propagate = False
    stream = io.StringIO()
    setup_logging(stream=stream)
    library.info("chatter")
    library.warning("careful")
    assert own.getvalue() == ""
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["careful"]


def test_a_second_call_replaces_the_first() -> None:
    first, second = io.StringIO(), io.StringIO()
    setup_logging(stream=first)
    setup_logging(stream=second)
    logging.getLogger("atelier_runtime").info("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1
