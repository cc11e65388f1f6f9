import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atelier_api.errors import StoreError
from atelier_runtime.data import cache as cache_module
from atelier_runtime.data.cache import Cache, ShardWriter, remove_leftovers


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def entry(number: int) -> dict[str, Tensor]:
    """Text-like: a length that differs, a pooled vector, integers; every third one has a tensor more."""
    generator = torch.Generator().manual_seed(number)
    values = {
        "tokens": torch.randn(number % 4, 8, generator=generator).to(torch.bfloat16),
        "pooled": torch.randn(5, generator=generator),
        "mask": torch.ones(number % 4, dtype=torch.bool),
        "scalar": torch.tensor(number),
    }
    return values | ({"std": torch.full((2, 3), float(number))} if number % 3 == 0 else {})


def fill(folder: Path, numbers: range) -> None:
    writer = ShardWriter(folder / "shards")
    for number in numbers:
        writer.add(key(number), entry(number))
    writer.commit()


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def read(cache: Cache, number: int) -> dict[str, Tensor]:
    row = cache.row(key(number))
    assert row is not None
    return cache.read(row)


def data_files(folder: Path) -> list[Path]:
    return sorted((folder / "shards").glob("*.safetensors"))


def test_entries_come_back_with_their_names_shapes_and_dtypes(tmp_path: Path) -> None:
    fill(tmp_path, range(10))
    fill(tmp_path, range(10, 14))
    cache = Cache(tmp_path)
    assert len(cache) == 14
    for number in range(14):
        assert equal(read(cache, number), entry(number)), number
    assert cache.row(key(99)) is None


def test_shards_committed_later_are_seen_after_a_refresh_and_rows_stay_valid(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    cache = Cache(tmp_path)
    row = cache.row(key(2))
    fill(tmp_path, range(3, 6))
    assert cache.row(key(4)) is None
    cache.refresh()
    assert cache.row(key(2)) == row
    assert equal(read(cache, 4), entry(4))


def test_nothing_is_seen_of_entries_that_were_not_committed(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "shards")
    writer.add(key(1), entry(1))
    assert len(writer) == 1
    assert len(Cache(tmp_path)) == 0
    writer.commit()
    assert len(writer) == 0
    assert len(Cache(tmp_path)) == 1


def test_an_empty_commit_writes_nothing(tmp_path: Path) -> None:
    ShardWriter(tmp_path / "shards").commit()
    assert not (tmp_path / "shards").exists()


def test_a_writer_killed_before_the_index_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path, content: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_module, "replace_file", killed)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, range(3))
    assert len(data_files(tmp_path)) == 1
    assert len(Cache(tmp_path)) == 0


def test_leftovers_of_killed_writers_are_removed_after_a_day(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    shards = tmp_path / "shards"
    [indexed] = data_files(tmp_path)
    old, fresh, hidden = shards / "aa.safetensors", shards / "bb.safetensors", shards / ".cc.safetensors"
    for path in (old, fresh, hidden):
        path.write_bytes(b"x")
    for path in (old, hidden, indexed):
        os.utime(path, (1, 1))
    remove_leftovers(shards)
    assert not old.exists()
    assert not hidden.exists()
    assert fresh.exists()
    assert len(Cache(tmp_path)) == 3  # an indexed shard is no leftover, however old


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_last_byte(path: Path) -> None:
    """In an index this is no syntax error but a wrong offset or shape."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_byte, flip_last_byte, cut, os.unlink])
@pytest.mark.parametrize("pattern", ["*.safetensors", "*.index"])
def test_a_damaged_shard_is_removed_and_its_entries_are_missing(tmp_path: Path, damage: object, pattern: str) -> None:
    fill(tmp_path, range(3))
    [first] = (tmp_path / "shards").glob(pattern)
    fill(tmp_path, range(3, 6))
    damage(first)  # type: ignore[operator]
    cache = Cache(tmp_path)
    assert [cache.row(key(number)) is None for number in range(6)] == [True] * 3 + [False] * 3
    assert not first.exists()
    fill(tmp_path, range(3))
    cache.refresh()
    assert equal(read(cache, 1), entry(1))


def test_a_copied_cache_is_hashed_once_and_then_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, range(3))
    [data] = data_files(tmp_path)
    os.utime(data, (1, 1))
    hashed = []

    def counting(path: Path) -> str:
        hashed.append(path)
        return file_sha256(path)

    file_sha256 = cache_module.file_sha256
    monkeypatch.setattr(cache_module, "file_sha256", counting)
    assert len(Cache(tmp_path)) == 3
    assert len(Cache(tmp_path)) == 3
    assert hashed == [data]


def test_the_same_entry_written_twice_is_found(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    fill(tmp_path, range(3))
    assert equal(read(Cache(tmp_path), 2), entry(2))


def test_more_shards_than_are_kept_open_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_OPEN_SHARDS", 2)
    for number in range(5):
        fill(tmp_path, range(number, number + 1))
    cache = Cache(tmp_path)
    for number in (0, 1, 2, 3, 4, 0, 4):
        assert equal(read(cache, number), entry(number))
    assert len(cache._open) == 2


def test_rows_are_read_without_keys(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    cache = Cache(tmp_path)
    row = cache.row(key(1))
    assert row is not None
    cache.forget_keys()
    assert equal(cache.read(row), entry(1))


def test_a_shard_that_vanished_while_in_use_is_a_store_error(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    cache = Cache(tmp_path)
    [data] = data_files(tmp_path)
    data.unlink()
    with pytest.raises(StoreError, match="cannot be read any more"):
        read(cache, 1)


def test_a_full_disk_is_a_store_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "replace_file", full)
    with pytest.raises(StoreError, match="No space left on device"):
        fill(tmp_path, range(3))


def test_the_tensors_kept_do_not_change_with_the_batch_they_were_cut_from(tmp_path: Path) -> None:
    batch = torch.ones(2, 3)
    writer = ShardWriter(tmp_path / "shards")
    writer.add(key(0), {"mean": batch[0]})
    batch.zero_()
    writer.commit()
    assert read(Cache(tmp_path), 0)["mean"].tolist() == [1, 1, 1]


def mapped_ranges() -> list[range]:
    """Addresses where this process has a data file mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if ".safetensors" in line]
    return [range(*(int(end, 16) for end in line[0].split("-"))) for line in lines]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_what_is_read_looks_into_the_mapped_file(tmp_path: Path) -> None:
    fill(tmp_path, range(10))
    read_entry = read(Cache(tmp_path), 3)
    assert all(any(tensor.data_ptr() in found for found in mapped_ranges()) for tensor in read_entry.values())


@pytest.mark.parametrize("numbers", [range(1, 2), range(0, 4, 4), range(3, 30, 3), range(1, 11)])
def test_shards_of_equal_and_of_different_shapes_read_alike(tmp_path: Path, numbers: range) -> None:
    """One entry, an empty tensor, all with a `std`, and some without."""
    fill(tmp_path, numbers)
    cache = Cache(tmp_path)
    for number in reversed(numbers):
        assert equal(read(cache, number), entry(number)), number


def test_a_file_stays_mapped_as_long_as_something_read_from_it_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_OPEN_SHARDS", 1)
    fill(tmp_path, range(5))
    fill(tmp_path, range(5, 10))
    cache = Cache(tmp_path)
    held = read(cache, 2)
    for path in data_files(tmp_path):
        assert equal(read(cache, 7), entry(7)), path
    assert len(cache._open) == 1
    del cache
    assert equal(held, entry(2))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_reading_every_entry_again_and_again_takes_no_private_memory(tmp_path: Path) -> None:
    fill(tmp_path, range(2000))
    cache = Cache(tmp_path)
    rows = [row for number in range(2000) if (row := cache.row(key(number))) is not None]

    def passes(count: int) -> int:
        for _ in range(count):
            for row in rows:
                for tensor in cache.read(row).values():
                    tensor.sum()
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
        return int(line.split()[1]) * 1024

    before = passes(1)
    assert passes(5) - before < 1 << 20
