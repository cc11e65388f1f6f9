"""What a single process can show of working together; `test_ranks.py` has the processes."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from atelier_runtime.data.collective import Announcer, Share, folder_share, gather, in_rounds, on_rank_zero, together
from tiny_data import OneRank

ALONE = OneRank()


def test_one_rank_works_without_a_process_group(tmp_path: Path) -> None:
    assert gather(ALONE, 5) == [5]
    assert on_rank_zero(ALONE, lambda: 7) == 7
    assert folder_share(ALONE, tmp_path) == Share(0, 1)


@pytest.mark.parametrize(("count", "size"), [(0, 3), (1, 3), (3, 3), (7, 3), (7, 1)])
def test_rounds_take_every_item_once_in_order(count: int, size: int) -> None:
    taken: list[int] = []

    def work(items: Sequence[int]) -> int:
        assert 0 < len(items) <= size
        taken.extend(items)
        return len(items)

    rounds = list(in_rounds(ALONE, range(count), size, work))
    assert taken == list(range(count))
    assert [answers[0] for answers in rounds] == [min(size, count - start) for start in range(0, count, size)]


def test_an_error_in_a_round_is_raised_as_it_is() -> None:
    def work(items: Sequence[int]) -> None:
        raise KeyError("bad item")

    with pytest.raises(KeyError, match="bad item"):
        list(in_rounds(ALONE, [1], 1, work))
    with pytest.raises(KeyError, match="bad item"):
        together(ALONE, lambda: work([1]))


def test_progress_is_logged_at_the_start_and_end_of_a_stage_but_not_each_time(caplog: pytest.LogCaptureFixture) -> None:
    told = []
    announcer = Announcer(ALONE, lambda stage, detail, done, total: told.append(detail))
    with caplog.at_level("INFO"):
        for done in range(6):
            announcer.tell("encoding", done, 5)
    assert told == [f"{done}/5" for done in range(6)]
    assert [(record.done, record.total) for record in caplog.records] == [(0, 5), (5, 5)]  # type: ignore[attr-defined]
