"""Only the newest attempt of a run may write."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from atelier_api.errors import ConfigError
from atelier_runtime.checkpoint.attempts import claim_attempt, is_newest
from atelier_runtime.store import LocalStore


@pytest.mark.parametrize(
    ("taken", "wanted", "given"),
    [
        ([], "1.0", "1.0"),
        (["1.0"], "1.0", "1.1"),
        (["1.0", "1.1"], "1.0", "1.2"),
        (["1.0", "1.9", "1.10"], "1.0", "1.11"),
        (["1.0", "1.3"], "2.0", "2.0"),
        (["1.0"], "1.4", "1.4"),
    ],
)
def test_a_taken_number_becomes_the_next_free_restart(
    tmp_path: Path, taken: list[str], wanted: str, given: str
) -> None:
    store = LocalStore(tmp_path)
    for attempt in taken:
        store.put_bytes(f"attempts/{attempt}.json", b"{}")
    assert claim_attempt(store, wanted) == given
    assert is_newest(store, given)
    assert not any(is_newest(store, attempt) for attempt in taken)


def test_an_attempt_older_than_one_that_has_written_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    claim_attempt(store, "3.0")
    with pytest.raises(ConfigError, match=r"attempt 2\.7 of the run starts although attempt 3\.0 has written"):
        claim_attempt(store, "2.7")


def test_claims_at_the_same_moment_get_different_numbers(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(lambda _: claim_attempt(store, "1.0"), range(8)))
    assert len(set(given)) == 8
