"""`--check` tells a stale file from a fresh one."""

import sys
from pathlib import Path

import pytest

from atelier_api.generated import Generated, main


def test_check_passes_for_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Generated(tmp_path / "docs" / "page.md", lambda: "a\nb\n")
    monkeypatch.setattr(sys, "argv", ["generate"])
    main(file)
    assert file.path.read_text() == "a\nb\n"
    monkeypatch.setattr(sys, "argv", ["generate", "--check"])
    main(file)


def test_check_fails_with_the_difference_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "page.md"
    path.write_text("a\nold\n")
    monkeypatch.setattr(sys, "argv", ["generate", "--check"])
    with pytest.raises(SystemExit, match="run `make crds`"):
        main(Generated(path, lambda: "a\nnew\n"))
    assert "-old\n+new" in capsys.readouterr().err
    assert path.read_text() == "a\nold\n"


def test_check_fails_where_there_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["generate", "--check"])
    with pytest.raises(SystemExit):
        main(Generated(tmp_path / "none", lambda: "a\n"))
