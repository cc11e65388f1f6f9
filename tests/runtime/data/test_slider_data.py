"""The training set of a slider: its sources by their strengths, in batches of one shape and one strength."""

from pathlib import Path
from typing import Any

import pytest

from atelier_api.errors import DataError
from atelier_api.run_file import RunFile
from atelier_runtime.data import Dataset, SampleOrder, SliderOrder
from tiny_data import SAMPLE_SIZES, built, training_run_file, write_pictures

SLIDER = {"type": "lora", "slider": True}
STRENGTHS = {"plain": None, "less": "-1", "more": "1", "far-less": "-2", "zero": "0"}


def run_of(folder: Path, checkpoint: Path, strengths: dict[str, str | None], **spec: Any) -> RunFile:
    """Sources of four pictures in three shapes each, by their names."""
    sources: list[dict[str, Any]] = []
    for name, strength in strengths.items():
        if not (folder / name).exists():
            write_pictures(folder / name, SAMPLE_SIZES, caption=name)
        sources.append({"uri": str(folder / name)} | ({} if strength is None else {"sliderStrength": strength}))
    return training_run_file(folder, [], checkpoint, data={"sources": sources}, **spec)


def dataset_of(run: RunFile) -> Dataset:
    return built(run)[0]


def test_batches_have_the_strength_of_their_samples_source(tmp_path: Path, checkpoint: Path) -> None:
    size = {"globalBatchSize": 2}
    dataset = dataset_of(run_of(tmp_path, checkpoint, STRENGTHS, adapter=SLIDER, hyperparameters=size))
    assert isinstance(dataset.order, SliderOrder)
    expected = {name: float(strength or 0) for name, strength in STRENGTHS.items()}
    signs, seen = [], set()
    for step in range(dataset.order.steps_per_epoch):
        batch = dataset.order.batch(step)
        loaded = dataset.load(batch.slots, step=step, epoch=batch.epoch)
        assert {expected[name.partition("/")[0]] for name in loaded.names} == {batch.strength}
        signs.append((batch.strength > 0) - (batch.strength < 0))
        seen |= set(loaded.names)
    assert signs == [1, -1, 0] * (len(signs) // 3)
    assert len(seen) == 20


def test_another_strength_is_another_training_set_and_encodes_nothing_again(
    tmp_path: Path, checkpoint: Path, loads: list[Path]
) -> None:
    ends = {"less": "-1", "more": "1"}
    first = dataset_of(run_of(tmp_path, checkpoint, ends, adapter=SLIDER))
    assert dataset_of(run_of(tmp_path, checkpoint, ends, adapter=SLIDER)).hash == first.hash
    assert dataset_of(run_of(tmp_path, checkpoint, ends | {"less": "-2"}, adapter=SLIDER)).hash != first.hash
    assert len(loads) == 1


def test_an_end_of_which_nothing_is_left_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    """The slider would learn the other end alone, or with neutral samples nothing."""
    broken = run_of(tmp_path, checkpoint, {"less": "-1", "more": "1", "plain": None}, adapter=SLIDER)
    for picture in (tmp_path / "less").glob("*.png"):
        picture.write_bytes(b"no picture")
    refused = (
        "^0 samples are left of the sources with a sliderStrength below 0; a slider needs at least one of each end"
    )
    with pytest.raises(DataError, match=refused):
        dataset_of(broken)


def test_what_is_no_slider_is_ordered_as_ever(tmp_path: Path, checkpoint: Path) -> None:
    dataset = dataset_of(run_of(tmp_path, checkpoint, {"less": None, "more": None}))
    assert isinstance(dataset.order, SampleOrder)
    batches = [dataset.order.batch(step) for step in range(dataset.order.steps_per_epoch)]
    assert {batch.strength for batch in batches} == {1.0}
