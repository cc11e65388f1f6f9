"""C2: how fast encoded samples come out of the cache, against one `torch.save` file per sample, plain and gzipped.

A sample has the shapes of a 1024-pixel picture of Flux: latents [16, 128, 128] and text [512, 4096], bf16, 4.7 MB. All three are read
in shuffled order from the page cache, in turns, and copied into batch tensors, so that every byte is touched. That copy alone, from
tensors in memory, has a turn of its own: it is the most that any reader can reach. The cache is read as the trainer reads it: opened
once, shards mapped; "first pass" is the first time that a sample is read through a mapping.
"""

import gzip
import random
import resource
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pairs import Findings, Row, Turns, at_least, at_most, ratio
from torch import Tensor

from atelier_runtime.data.cache import Cache, ShardWriter

LATENTS, TEXT = (16, 128, 128), (512, 4096)
SHARD_SAMPLES = 16
SMALL_ENTRIES = 20_000
PER_TURN = 8


@dataclass(frozen=True)
class Sets:
    """The same samples three times. `zipped` are the first few of them."""

    cache: Cache
    rows: Sequence[int]
    plain: Sequence[Path]
    zipped: Sequence[Path]


def sample(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "mean": torch.randn(LATENTS, generator=generator).bfloat16(),
        "embeds": torch.randn(TEXT, generator=generator).bfloat16(),
    }


def write_sets(folder: Path, count: int, zipped_count: int) -> Sets:
    """`count` samples in shards and in files, the first `zipped_count` gzipped as well."""
    writer = ShardWriter(folder / "cache" / "shards")
    keys, plain, zipped = [], [], []
    for number in range(count):
        entry = sample(number)
        keys.append(number.to_bytes(32, "big"))
        writer.add(keys[-1], entry)
        if len(writer) == SHARD_SAMPLES or number == count - 1:
            writer.commit()
        plain.append(folder / f"{number}.pt")
        torch.save(entry, plain[-1])
        if number < zipped_count:
            zipped.append(folder / f"{number}.pt.gz")
            with gzip.open(zipped[-1], "wb", compresslevel=6) as file:
                torch.save(entry, file)  # type: ignore[arg-type]
    cache = Cache(folder / "cache")
    rows = [row for key in keys if (row := cache.row(key)) is not None]
    assert len(rows) == count
    return Sets(cache, rows, plain, zipped)


class Batch:
    """Where the samples are copied to."""

    def __init__(self) -> None:
        self._latents = torch.zeros(LATENTS, dtype=torch.bfloat16)
        self._text = torch.zeros(TEXT, dtype=torch.bfloat16)

    def take(self, entry: dict[str, Tensor]) -> None:
        self._latents.copy_(entry["mean"])
        self._text.copy_(entry["embeds"])


def load_zipped(path: Path) -> dict[str, Tensor]:
    with gzip.open(path, "rb") as file:
        entry: dict[str, Tensor] = torch.load(file, weights_only=True)  # type: ignore[arg-type]
    return entry


def measure(folder: Path, *, count: int, zipped_count: int, turns: int) -> dict[str, Any]:
    """Everything raw."""
    sets, batch, shuffle = write_sets(folder, count, zipped_count), Batch(), random.Random(0)
    fresh = Cache(sets.cache.folder.parent)

    def ours(number: int) -> dict[str, Tensor]:
        return sets.cache.read(sets.rows[number])

    def first_epoch(number: int) -> dict[str, Tensor]:
        return fresh.read(sets.rows[number])

    in_memory = [sample(number) for number in range(PER_TURN)]
    readers: dict[str, tuple[Callable[[int], dict[str, Tensor]], int]] = {
        "the copy alone": (in_memory.__getitem__, PER_TURN),
        "cache": (ours, count),
        "cache, first pass": (first_epoch, count),
        "torch.load": (lambda number: torch.load(sets.plain[number], weights_only=True), count),
        "torch.load, gzip": (lambda number: load_zipped(sets.zipped[number]), zipped_count),
    }
    for number in range(count):
        batch.take(ours(number))
    _check_equal(readers)
    once = shuffle.sample(range(count), count)
    seconds = {name: Turns() for name in readers}
    for turn in range(turns):
        for name, (read, available) in readers.items():
            if name == "cache, first pass":
                chosen = once[turn * PER_TURN : (turn + 1) * PER_TURN]  # every sample once: its pages are mapped here
            else:
                chosen = shuffle.sample(range(available), min(PER_TURN, available))
            with seconds[name]:
                for number in chosen:
                    batch.take(read(number))
    return {
        "samples": count,
        "sample_bytes": sum(tensor.nbytes for tensor in sample(0).values()),
        "samples_per_turn": {name: min(PER_TURN, available) for name, (_, available) in readers.items()},
        "seconds_per_turn": {name: turn.columns() for name, turn in seconds.items()},
        "per_sample": {name: _io_per_sample(read, available, batch) for name, (read, available) in readers.items()},
        "files": {"cache": len(list(sets.cache.folder.iterdir())), "torch.load": count},
    }


def _check_equal(readers: dict[str, tuple[Callable[[int], dict[str, Tensor]], int]]) -> None:
    """All readers give the same bytes, or the figures mean nothing."""
    wanted = sample(0)
    for name, (read, _) in readers.items():
        for key, tensor in read(0).items():
            assert torch.equal(tensor, wanted[key]), name


def _io_per_sample(read: Callable[[int], dict[str, Tensor]], available: int, batch: Batch) -> dict[str, float]:
    """Reading system calls, their bytes and page faults of this process."""
    before = _io()
    for number in range(available):
        batch.take(read(number))
    return {key: (value - before[key]) / available for key, value in _io().items()}


def _io() -> dict[str, float]:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {
        "read_calls": float(lines["syscr"]),
        "read_bytes": float(lines["rchar"]),
        "page_faults": float(resource.getrusage(resource.RUSAGE_SELF).ru_minflt),
    }


def memory_growth(folder: Path, entries: int) -> dict[str, float]:
    """Private memory that reading `entries` small samples twice adds, after a first pass; and what the open cache holds, in bytes."""
    writer = ShardWriter(folder / "small" / "shards")
    tensor = torch.zeros(4, 8, 8, dtype=torch.bfloat16)
    for number in range(entries):
        writer.add(number.to_bytes(32, "big"), {"mean": tensor})
        if len(writer) == 1000 or number == entries - 1:
            writer.commit()
    before = _private_bytes()
    cache = Cache(folder / "small")
    rows = list(range(len(cache)))
    cache.forget_keys()
    opened = _private_bytes()
    passes = []
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        for row in rows:
            cache.read(row)["mean"].sum()
        passes.append(_private_bytes())
    return {"entries": entries, "opened_bytes": opened - before, "growth_bytes": passes[-1] - passes[0]}


def _private_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


def rows(raw: dict[str, Any]) -> list[Row]:
    """What `measure` found, for the table."""
    seconds = {name: columns["wall_seconds"] for name, columns in raw["seconds_per_turn"].items()}
    each = {name: [s / raw["samples_per_turn"][name] for s in values] for name, values in seconds.items()}
    found = [
        Row("C2", f"samples per second, {name}", f"{1 / sorted(values)[len(values) // 2]:.0f}")
        for name, values in each.items()
    ]
    goals = {"torch.load": 5, "torch.load, gzip": 100}
    for contestant in ("cache", "cache, first pass"):
        for name, goal in goals.items():
            times = ratio(each[name], each[contestant])
            found.append(
                Row("C2", f"{contestant} faster than {name}", str(times), *at_least(times.median, goal, f"{goal} ×"))
            )
    for name in ("cache", "torch.load"):
        io = raw["per_sample"][name]
        measured = f"{io['read_calls']:.1f} reads, {io['read_bytes'] / 1e6:.2f} MB, {io['page_faults']:.0f} page faults"
        found.append(Row("C2", f"system calls per sample, {name}", measured))
    memory = raw["memory"]
    grown, opened = memory["growth_bytes"], memory["opened_bytes"] / memory["entries"]
    measured = f"+{grown / 1024:.0f} KiB; {opened:.0f} B per sample when opened"
    what = f"private memory added by passes 2 and 3 over {memory['entries']:.0f} samples"
    found.append(Row("C2", what, measured, *at_most(grown, 1 << 20, "1 MiB (flat)")))
    return found


def run(*, quick: bool) -> Findings:
    """96 samples (450 MB); 16 when quick."""
    count, zipped, turns = (16, 2, 2) if quick else (96, 16, 12)
    with tempfile.TemporaryDirectory(prefix="atelier-bench-") as folder:
        raw = measure(Path(folder), count=count, zipped_count=zipped, turns=turns)
        raw["memory"] = memory_growth(Path(folder), 2000 if quick else SMALL_ENTRIES)
    return Findings(rows(raw), raw)
