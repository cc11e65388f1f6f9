"""The trainer's question, in every step, whether its checkpoint writer has said anything."""

import select
import threading
import time

import pytest

from atelier_runtime.checkpoint.messages import Idle, Pipe


def pair() -> tuple[Pipe, Pipe]:
    ours, descriptor = Pipe.pair()
    return ours, Pipe.inherited(descriptor)


def test_a_message_waits_until_it_is_received() -> None:
    ours, theirs = pair()
    assert not ours.waiting()
    theirs.send(Idle())
    theirs.send("more")
    assert ours.waiting()
    assert isinstance(ours.receive(), Idle)
    assert ours.waiting(5)
    assert ours.receive() == "more"
    assert not ours.waiting()


def test_the_time_to_wait_is_in_seconds_and_a_message_ends_it() -> None:
    ours, theirs = pair()
    started = time.monotonic()
    assert not ours.waiting(0.2)
    assert 0.2 <= time.monotonic() - started < 30
    threading.Timer(0.1, theirs.send, ["late"]).start()
    assert ours.waiting(60)
    assert ours.receive() == "late"


def test_the_end_of_the_other_process_is_something_to_receive() -> None:
    ours, theirs = pair()
    theirs.close()
    assert ours.waiting()
    with pytest.raises(EOFError):
        ours.receive()


def test_a_closed_pipe_is_not_asked() -> None:
    ours, _theirs = pair()
    ours.close()
    with pytest.raises(OSError, match="closed"):
        ours.waiting()


def test_asking_makes_no_poller_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _theirs = pair()
    monkeypatch.setattr(select, "poll", None)
    assert not any(ours.waiting() for _ in range(3))
