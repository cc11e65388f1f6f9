"""Captions that are encoded in the step: they are in the micro-batch as texts, each has a word to learn, and none is in the cache."""

from pathlib import Path

import pytest

from atelier_api.errors import DataError
from atelier_api.run_file import RunFile
from atelier_runtime.data import Dataset, build_dataset
from atelier_runtime.data.encode import Builder
from atelier_runtime.families import get_family
from family_models import save_tiny
from tiny_data import SAMPLE_SIZES, OneRank, no_report, training_run_file, write_pictures

INVERSION = {
    "type": "textual-inversion",
    "tokens": [{"token": "<fox>", "initializer": "f"}, {"token": "<ink>", "initializer": "i"}],
}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    save_tiny("sdxl", folder)
    return folder


def run_of(folder: Path, checkpoint: Path, captions: list[str], trigger: str | None = None) -> RunFile:
    pictures = folder / "pictures"
    write_pictures(pictures, SAMPLE_SIZES)
    for number, caption in enumerate(captions):
        (pictures / f"{number:03d}.txt").write_text(caption)
    data = {"captions": {"trigger": trigger}}
    return training_run_file(folder, [pictures], checkpoint, "sdxl", adapter=INVERSION, data=data)


def built(run: RunFile) -> Dataset:
    return build_dataset(run, get_family("sdxl"), OneRank(), no_report)


def captions_of(dataset: Dataset, steps: int) -> dict[str, set[str]]:
    """The captions that each sample is trained on in so many steps."""
    told: dict[str, set[str]] = {}
    for step in range(steps):
        batch = dataset.order.batch(step)
        loaded = dataset.load(batch.slots, step=step, epoch=batch.epoch)
        assert loaded.text == []
        for name, caption in zip(loaded.names, loaded.captions, strict=True):
            told.setdefault(name, set()).add(caption)
    return told


def test_micro_batches_have_captions_and_nothing_of_them_is_encoded(
    tmp_path: Path, sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    encode = Builder.captions
    monkeypatch.setattr(Builder, "captions", lambda self, jobs: asked.append(len(jobs)) or encode(self, jobs))
    dataset = built(run_of(tmp_path, sdxl, ["<fox> one", "<ink>\n<fox> again\n", "two <fox>", "a <fox> in <ink>"]))
    assert asked == [0]
    assert captions_of(dataset, 60) == {  # the alternatives all come, and no caption is dropped
        "000.png": {"<fox> one"},
        "001.png": {"<ink>", "<fox> again"},
        "002.png": {"two <fox>"},
        "003.png": {"a <fox> in <ink>"},
    }


def test_a_trigger_puts_the_words_into_captions_without_them(tmp_path: Path, sdxl: Path) -> None:
    dataset = built(run_of(tmp_path, sdxl, ["one", "two", "three", "four"], trigger="<fox> <ink>"))
    assert captions_of(dataset, 8)["002.png"] == {"<fox> <ink>, three"}


def test_other_captions_make_another_data_set(tmp_path: Path, sdxl: Path) -> None:
    first = built(run_of(tmp_path / "a", sdxl, ["<fox> one"] * 3 + ["<ink>"]))
    second = built(run_of(tmp_path / "b", sdxl, ["<fox> two"] * 3 + ["<ink>"]))
    assert first.hash != second.hash


REFUSED = {
    "a caption without a word": (
        ["<fox>", "<ink>", "a fox\n<fox>", "<fox>"],
        r"a caption of 002\.png has none of spec\.adapter\.tokens \(<fox>, <ink>\): 'a fox'; write it into .*captions\.trigger to it",
    ),
    "a word in no caption": (["<fox>"] * 4, r"spec\.adapter\.tokens has <ink>, which is in no caption; write it"),
}


@pytest.mark.parametrize(("captions", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_teach_nothing_is_refused(tmp_path: Path, sdxl: Path, captions: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        built(run_of(tmp_path, sdxl, captions))
