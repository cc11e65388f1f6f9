"""The entry point of a rank."""

import gc

import pytest

from atelier_runtime import launch, rank


def test_garbage_is_collected_in_training_and_not_looked_for_among_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []

    def main() -> int:
        seen.append((gc.isenabled(), gc.get_freeze_count() > 0))
        return 3

    monkeypatch.setattr(launch, "main", main)
    try:
        assert rank.main() == 3
    finally:
        gc.unfreeze()
    assert seen == [(True, True)]
