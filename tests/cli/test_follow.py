"""What is told while a run goes on."""

import io
import re
import socket
import threading
from pathlib import Path

import pytest
from rich.console import Console

from atelier_api.progress import CheckpointReport, FunnelReport, Progress
from atelier_cli.follow import Bar, Lines, Watch, fetch, funnel_lines, last_lines, numbers


class Record:
    """A display that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.shown: list[Progress] = []

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def show(self, progress: Progress) -> None:
        self.shown.append(progress)

    def note(self, text: str) -> None:
        self.notes.append(text)


CHECKPOINT = CheckpointReport(step=4, manifest="m", size_bytes=3 << 20, manifest_sha256="0", time="2030")


def test_each_piece_of_news_is_told_once() -> None:
    record = Record()
    watch = Watch(record, "/store")
    watch.look(None)
    watch.look(Progress(stage="Caching", funnel=FunnelReport(found=3, unreadable=1, kept=2)))
    training = Progress(
        stage="Training", step=4, funnel=FunnelReport(found=3, unreadable=1, kept=2), checkpoint=CHECKPOINT
    )
    watch.look(training)
    watch.look(training)
    watch.look(training.model_copy(update={"samples": ["samples/00000004/0.png"]}))
    assert record.notes == [
        "data: found 3, unreadable 1, kept 2",
        "checkpoint at step 4 (3 MiB)",
        "samples: /store/samples/00000004",
    ]
    assert len(record.shown) == 3, "a message that was seen is not shown again"


def test_after_a_restart_old_news_is_not_told_again() -> None:
    record = Record()
    watch = Watch(record, "/store")
    facts = {"funnel": FunnelReport(found=1, kept=1), "checkpoint": CHECKPOINT}
    watch.look(Progress(stage="Training", **facts))  # type: ignore[arg-type]
    watch.look(Progress(stage="Preparing", detail="restart 1 of 3 in 5 s: killed by SIGKILL", **facts))  # type: ignore[arg-type]
    watch.look(Progress(stage="Caching"))
    watch.look(Progress(stage="Training", **facts))  # type: ignore[arg-type]
    assert record.notes == [
        "data: found 1, kept 1",
        "checkpoint at step 4 (3 MiB)",
        "restart 1 of 3 in 5 s: killed by SIGKILL",
    ]


def test_many_rejected_files_are_cut() -> None:
    rejected = {f"{index}.png": "too dark" for index in range(13)}
    lines = list(funnel_lines(FunnelReport(found=20, unreadable=13, kept=7, rejected=rejected)))
    assert lines[0] == "data: found 20, unreadable 13, kept 7"
    assert lines[1] == "  left out 0.png: too dark"
    assert lines[-1] == "  … and 3 more, listed in the report"
    assert len(lines) == 12


def test_unknown_numbers_are_left_out() -> None:
    assert numbers(Progress()) == ""
    known = Progress(stage="Training", loss=0.5, samples_per_second=3.14159, eta_seconds=80, peak_memory_bytes=3 << 30)
    assert numbers(known) == "loss 0.5000, 3.14 samples/s, 1 min 20 s left, 3 GiB memory"


def test_a_log_gets_a_line_per_stage_and_not_per_step(capsys: pytest.CaptureFixture[str]) -> None:
    with Lines() as lines:
        lines.show(Progress(stage="Caching", detail="captions", done=1, total=8))
        for step in range(1, 6):
            lines.show(Progress(stage="Training", done=step, total=5, loss=0.25))
        lines.show(Progress(stage="Failed", detail="no"))
    assert capsys.readouterr().out == "Caching 1/8: captions\nTraining 1/5: loss 0.2500\n"


def test_a_terminal_gets_a_bar_with_the_numbers_and_lines_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    window = io.StringIO()
    monkeypatch.setattr(
        "atelier_cli.terminal.console", lambda: Console(file=window, force_terminal=True, highlight=False, width=120)
    )
    with Bar() as bar:
        bar.show(Progress(stage="Caching", detail="captions"))
        bar.show(Progress(stage="Training", done=3, total=12, loss=0.25))
        bar.note("checkpoint at step 2")
    assert "checkpoint at step 2\n" in window.getvalue()
    assert re.search(r"Training .*3/12 loss 0\.2500", window.getvalue())


def test_json_lines_of_a_log_are_made_readable(tmp_path: Path) -> None:
    path = tmp_path / "stderr.log"
    path.write_text(
        'first\n\n{"time": "t", "level": "WARNING", "logger": "x", "message": "careful", "rank": 1, "step": 7}\n'
        '{"level": "ERROR", "message": "failed", "error": "Traceback: no"}\n{"a": 1}\n[1]\n'
    )
    assert last_lines(path, 4) == ["WARNING careful step=7", "ERROR failed\nTraceback: no", '{"a": 1}', "[1]"]
    assert last_lines(tmp_path / "none", 4) == []


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 602\r\n\r\n", b"nothing of the kind\r\n\r\n"]
)
def test_an_agent_that_ends_while_it_answers_is_none(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        agent = threading.Thread(target=hang_up)
        agent.start()
        assert fetch(server.getsockname()[1]) is None
        agent.join()
