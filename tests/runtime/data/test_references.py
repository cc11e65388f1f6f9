"""Training on pairs: reference pictures are found, encoded, cached and left out with a reason, with the stock encoders."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from atelier_api.errors import DataError
from atelier_api.run_file import RunFile
from atelier_runtime import components
from atelier_runtime.data import Dataset, build_dataset
from atelier_runtime.data import build as build_module
from atelier_runtime.data.order import Slot
from atelier_runtime.families import get_family
from atelier_runtime.families.flux_kontext import FluxKontext
from atelier_runtime.family import Features, Latents
from atelier_runtime.store import LocalStore
from family_models import save_tiny
from tiny_data import (
    OneRank,
    all_samples,
    no_report,
    picture,
    training_run_file,
    write_pictures,
    write_truncated_picture,
)


class Counting(FluxKontext):
    """The real family; counts what it encodes."""

    def __init__(self) -> None:
        self.captions: list[str] = []
        self.targets = 0
        self.references = 0

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        self.captions += prompts
        return super().encode_text(pipe, prompts)

    def encode_pixels(self, pipe: Any, pixels: Tensor) -> Latents:
        self.targets += len(pixels)
        return super().encode_pixels(pipe, pixels)

    def encode_reference(self, pipe: Any, pixels: Tensor) -> Tensor:
        self.references += len(pixels)
        return super().encode_pixels(pipe, pixels).mean


class Seeing(Counting):
    """A family whose text encoder looks at the references, as those with a language model of pictures do."""

    text_sees_references = True

    def encode_instructions(
        self, pipe: Any, prompts: Sequence[str], references: Sequence[Sequence[Image.Image]]
    ) -> list[Features]:
        seen = [torch.tensor([np.asarray(one).mean() for one in pictures]) for pictures in references]
        texts = self.encode_text(pipe, prompts)
        return [text | {"seen": mean} for text, mean in zip(texts, seen, strict=True)]


@pytest.fixture(scope="session")
def kontext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("flux_kontext", tmp_path_factory.mktemp("checkpoint") / "flux_kontext")


@pytest.fixture
def run(tmp_path: Path, kontext: Path) -> RunFile:
    """Three targets of one size in `targets`, their references in `originals`, of 40 x 40, 40 x 40 and 64 x 32 pixels."""
    write_pictures(tmp_path / "targets", [(40, 40)] * 3, caption="make it red")
    (tmp_path / "originals").mkdir()
    for number, size in enumerate([(40, 40), (40, 40), (64, 32)]):
        picture(*size, seed=20 + number).save(tmp_path / "originals" / f"{number:03d}.png")
    sources = [{"uri": str(tmp_path / "targets"), "references": [str(tmp_path / "originals")]}]
    data = {"sources": sources, "captions": {"dropout": 0}}
    return training_run_file(tmp_path, [], kontext, family="flux_kontext", data=data)


def built(run: RunFile, family: Counting | None = None) -> tuple[Dataset, Counting]:
    family = family or Counting()
    return build_dataset(run, family, OneRank(), no_report), family


def test_references_are_the_latents_that_the_pipeline_would_make_of_the_picture(
    run: RunFile, tmp_path: Path, kontext: Path
) -> None:
    dataset, family = built(run)
    pipe = components.load_encoders(get_family("flux_kontext"), kontext, torch.float32, torch.device("cpu"))
    samples = all_samples(dataset)
    for name, (width, height) in {"000.png": (32, 32), "001.png": (32, 32), "002.png": (48, 16)}.items():
        pixels = pipe.image_processor.preprocess(Image.open(tmp_path / "originals" / name), height, width)
        with torch.no_grad():
            expected = pipe._encode_vae_image(pixels, None)
        [reference] = samples[name].references
        torch.testing.assert_close(reference, expected, atol=1e-4, rtol=1e-4)
        assert samples[name].latents.shape[-2:] == (4, 4)
    assert (family.targets, family.references) == (3, 3)


def test_a_batch_has_references_of_one_size_and_targets_of_one_size(run: RunFile) -> None:
    dataset, _ = built(run)
    assert dataset.order.steps_per_epoch == 3  # of one sample each; by the target's size alone the three would be alike
    square = [Slot(sample, 1.0, sample) for sample in (0, 1)]
    loaded = dataset.load(square, step=0, epoch=0)
    assert [each.shape for each in loaded.references] == [(2, 16, 4, 4)]
    alone = [dataset.load([slot], step=0, epoch=0).references[0] for slot in square]
    assert torch.equal(loaded.references[0], torch.cat(alone))
    larger = run.spec.hyperparameters.model_copy(update={"global_batch_size": 2})
    dataset, _ = built(run.model_copy(update={"spec": run.spec.model_copy(update={"hyperparameters": larger})}))
    batches = [dataset.order.batch(step) for step in range(dataset.order.steps_per_epoch)]
    assert {frozenset(slot.sample for slot in batch.slots) for batch in batches} == {frozenset({0, 1}), frozenset({2})}
    assert {batch.tokens for batch in batches} == {4}  # of the target alone: the shift depends on them


def test_samples_without_a_usable_reference_are_listed_and_the_rest_is_trained_on(run: RunFile, tmp_path: Path) -> None:
    write_pictures(tmp_path / "targets", [(40, 40)] * 7)
    originals = tmp_path / "originals"
    write_truncated_picture(originals / "003.png")
    picture(40, 40).save(originals / "004.png")
    picture(40, 40).save(originals / "004.jpg")
    (originals / "005.png").symlink_to(originals / "nowhere.png")
    place = "spec.data.sources[0].references[0]"
    for _ in range(2):  # the second time from what is remembered
        dataset, _ = built(run)
        funnel = dataset.funnel
        assert (funnel.found, funnel.kept, funnel.no_reference, funnel.unreadable) == (7, 3, 4, 0)
        assert funnel.rejected["006.png"] == f"no picture 006.* in {place}"
        assert funnel.rejected["004.png"] == f"2 pictures 004.* in {place}, where there must be one"
        assert funnel.rejected["003.png"].startswith("its reference 003.png cannot be read: ")
        assert funnel.rejected["005.png"].startswith("its reference 005.png cannot be read: ")
        assert sorted(all_samples(dataset)) == ["000.png", "001.png", "002.png"]
    picture(40, 40).save(originals / "006.webp")
    assert built(run)[0].funnel.kept == 4


def test_no_pair_left_is_an_error_with_the_funnel(run: RunFile, tmp_path: Path) -> None:
    for path in (tmp_path / "originals").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"0 of 3 files .*3 no reference.*000\.png: no picture 000\.\*"):
        built(run)
    (tmp_path / "originals").rmdir()
    with pytest.raises(DataError, match=r"spec\.data\.sources\[0\]\.references\[0\] is '.*originals'; no such folder"):
        built(run)


def test_a_reference_may_lie_in_a_subfolder_and_be_of_another_kind(run: RunFile, tmp_path: Path) -> None:
    for name in ("targets", "originals"):
        (tmp_path / name / "sub").mkdir()
        for path in (tmp_path / name).glob("00[01].*"):
            path.rename(tmp_path / name / "sub" / path.name)
    jpeg = tmp_path / "originals" / "sub" / "001.JPG"
    Image.open(jpeg.with_suffix(".png")).save(jpeg, "JPEG")
    jpeg.with_suffix(".png").unlink()
    dataset, _ = built(run)
    assert sorted(all_samples(dataset)) == ["002.png", "sub/000.png", "sub/001.png"]


def test_references_are_turned_upright_and_put_on_white(run: RunFile, tmp_path: Path) -> None:
    originals = tmp_path / "originals"
    upright = picture(64, 32, seed=5)
    upright.save(originals / "000.png")
    turned, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise
    turned.save(originals / "001.png", exif=exif)
    white = Image.new("RGB", (40, 40), "white")
    white.save(originals / "002.png")
    samples = all_samples(built(run)[0])
    assert torch.equal(samples["000.png"].references[0], samples["001.png"].references[0])
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(originals / "002.png")
    assert torch.equal(all_samples(built(run)[0])["002.png"].references[0], samples["002.png"].references[0])


def test_a_restart_encodes_nothing_and_a_changed_reference_alone_is_encoded_again(
    run: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = built(run)
    before = all_samples(first)
    with monkeypatch.context() as patched:
        patched.setattr("atelier_runtime.data.prepare.probe", pytest.fail)
        again, family = built(run)
    assert (family.targets, family.references, family.captions, again.hash) == (0, 0, [], first.hash)
    picture(40, 40, seed=77).save(tmp_path / "originals" / "001.png")
    changed, family = built(run)
    assert (family.targets, family.references, family.captions) == (0, 1, [])
    assert changed.hash != first.hash
    after = all_samples(changed)
    for name, sample in before.items():
        assert torch.equal(sample.latents, after[name].latents)
        assert torch.equal(sample.references[0], after[name].references[0]) == (name != "001.png")


def test_another_resolution_encodes_references_of_another_size(run: RunFile) -> None:
    built(run)
    data = run.spec.data.model_copy(update={"resolution": 64, "max_upscale": 4.0})
    dataset, family = built(run.model_copy(update={"spec": run.spec.model_copy(update={"data": data})}))
    assert (family.targets, family.references) == (3, 3)
    assert all_samples(dataset)["000.png"].references[0].shape[-2:] == (8, 8)


def test_a_reference_that_changes_while_the_cache_is_built_is_listed(
    run: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = build_module.select

    def change_and_select(*arguments: Any) -> Any:
        picture(40, 40, seed=50).save(tmp_path / "originals" / "001.png")
        return real(*arguments)

    monkeypatch.setattr(build_module, "select", change_and_select)
    for family in (Counting(), Seeing()):
        picture(40, 40, seed=21).save(tmp_path / "originals" / "001.png")
        dataset, _ = built(run, family)
        assert (dataset.funnel.kept, dataset.funnel.no_reference) == (2, 1)
        assert dataset.funnel.rejected == {"001.png": "of its reference: it changed while the cache was built"}


class Elsewhere(Counting):
    """A checkpoint with the same encoders in another of the family's pipelines."""

    def pipeline_of(self, pipeline_config: Mapping[str, Any]) -> str:
        return "FluxPipeline"


def test_text_belongs_to_the_pipeline_whose_template_it_stands_in(run: RunFile) -> None:
    built(run)
    _, family = built(run, Elsewhere())
    assert (family.targets, family.references) == (0, 0)
    assert sorted(family.captions) == ["", "make it red 0", "make it red 1", "make it red 2"]


def test_text_that_sees_references_belongs_to_both(run: RunFile, tmp_path: Path) -> None:
    first, family = built(run, Seeing())
    assert sorted(family.captions) == ["", "", "", "make it red 0", "make it red 1", "make it red 2"]
    for name, sample in all_samples(first).items():
        mean = np.asarray(Image.open(tmp_path / "originals" / name)).mean()
        torch.testing.assert_close(sample.text[0]["seen"], torch.tensor([mean], dtype=torch.float32))
    picture(40, 40, seed=77).save(tmp_path / "originals" / "001.png")
    _, family = built(run, Seeing())
    assert (family.targets, family.references, sorted(family.captions)) == (0, 1, ["", "make it red 1"])


def test_a_dropped_caption_keeps_the_reference_that_its_text_sees(run: RunFile, tmp_path: Path) -> None:
    captions = run.spec.data.captions.model_copy(update={"dropout": 1.0})
    data = run.spec.data.model_copy(update={"captions": captions})
    dataset, _ = built(run.model_copy(update={"spec": run.spec.model_copy(update={"data": data})}), Seeing())
    for name, sample in all_samples(dataset).items():
        mean = np.asarray(Image.open(tmp_path / "originals" / name)).mean()
        torch.testing.assert_close(sample.text[0]["seen"], torch.tensor([mean], dtype=torch.float32))
        assert len(sample.references) == 1


def test_a_prefix_of_references_is_copied_once(run: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atelier_runtime.data.source.open_store", lambda *_: LocalStore(tmp_path / "originals"))
    [source] = run.spec.data.sources
    remote = source.model_copy(update={"references": ["s3://bucket/originals"]})
    data = run.spec.data.model_copy(update={"sources": [remote]})
    remote_run = run.model_copy(update={"spec": run.spec.model_copy(update={"data": data})})
    dataset, _ = built(remote_run)
    assert len(list((tmp_path / "cache" / "downloads").rglob("*.png"))) == 3
    near, family = built(run)
    assert (family.references, near.hash) == (0, dataset.hash)
