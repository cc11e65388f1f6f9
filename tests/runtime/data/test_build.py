"""The whole way with the stock encoders of a tiny checkpoint: what is encoded, what is trained on, what is left out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from atelier_api.errors import DataError
from atelier_runtime import components
from atelier_runtime.data import build as build_module
from atelier_runtime.data import build_dataset
from atelier_runtime.data import encode as encode_module
from atelier_runtime.data.buckets import Bucket, place
from atelier_runtime.data.image import UnreadableError, fit, read_picture
from atelier_runtime.families import get_family
from atelier_runtime.family import Latents
from family_models import save_tiny
from tiny_data import (
    SAMPLE_SIZES,
    CountingFamily,
    OneRank,
    all_samples,
    built,
    grey_frames,
    no_report,
    picture,
    training_run_file,
    write_clip,
    write_pictures,
    write_truncated_picture,
)

KEEP_CAPTIONS = {"captions": {"dropout": 0}}


def test_latents_and_features_are_those_of_the_stock_encoders(tmp_path: Path, pictures: Path, checkpoint: Path) -> None:
    dataset, _ = built(training_run_file(tmp_path, [pictures], checkpoint, data=KEEP_CAPTIONS))
    family = get_family("sd3")
    pipe = components.load_encoders(family, checkpoint, torch.float32, torch.device("cpu"))
    samples = all_samples(dataset)
    assert sorted(samples) == ["000.png", "001.png", "002.png", "003.png"]
    expected_buckets = {"000.png": (32, 32), "001.png": (48, 32), "002.png": (32, 48), "003.png": (32, 32)}
    for number, (name, (width, height)) in enumerate(expected_buckets.items()):
        placement = place(*SAMPLE_SIZES[number], Bucket(width, height))
        pixels = fit(read_picture((pictures / name).read_bytes()), placement)
        with torch.no_grad():
            latents = family.encode_pixels(pipe, pixels[None])
            [features] = family.encode_text(pipe, [f"a picture {number}"])
        sample = samples[name]
        assert torch.allclose(sample.latents, latents.mean, atol=1e-5)
        assert sample.std is not None
        assert latents.std is not None
        assert torch.allclose(sample.std, latents.std, atol=1e-5)
        assert sample.text[0].keys() == features.keys()
        assert all(torch.allclose(sample.text[0][key], features[key], atol=1e-5) for key in features)
        assert sample.sizes.tolist() == [list(placement.sizes)]


def test_micro_batches_are_stacked_in_the_order_of_their_slots(tmp_path: Path, checkpoint: Path) -> None:
    write_pictures(tmp_path / "square", [(40, 40)] * 3)
    run = training_run_file(tmp_path, [tmp_path / "square"], checkpoint, hyperparameters={"globalBatchSize": 4})
    dataset, _ = built(run)
    batch = dataset.order.batch(0)
    loaded = dataset.load(batch.slots[1:], step=0, epoch=0)
    assert loaded.latents.shape == (3, 16, 4, 4)
    assert loaded.slots == (1, 2, 3)
    assert loaded.weights.tolist() == [1, 1, 0]
    assert loaded.sizes.shape == (3, 6)
    assert [loaded.names[i] for i in range(3)] == [f"{slot.sample:03d}.png" for slot in batch.slots[1:]]
    singles = [dataset.load([slot], step=0, epoch=0) for slot in batch.slots[1:]]
    assert torch.equal(loaded.latents, torch.cat([single.latents for single in singles]))


def test_bad_files_are_listed_with_their_reasons_and_the_rest_is_trained_on(
    tmp_path: Path, pictures: Path, checkpoint: Path, loads: list[Path]
) -> None:
    write_truncated_picture(pictures / "cut.png")
    (pictures / "cut.txt").write_text("cut in half")
    (pictures / "text.jpg").write_text("this is no picture")
    (pictures / "dead.png").symlink_to(pictures / "nowhere.png")
    picture(12, 12).save(pictures / "tiny.png")
    picture(40, 40).save(pictures / "mute.png")
    picture(40, 40).save(pictures / "latin.png")
    (pictures / "latin.txt").write_bytes("Käfer".encode("latin-1"))
    run = training_run_file(tmp_path, [pictures], checkpoint)
    for _ in range(2):  # the second time from what is remembered
        dataset, _ = built(run)
        funnel = dataset.funnel
        assert (funnel.found, funnel.kept, len(dataset)) == (10, 4, 4)
        assert (funnel.unreadable, funnel.too_small, funnel.no_caption, funnel.too_short) == (3, 1, 2, 0)
        assert sorted(funnel.rejected) == ["cut.png", "dead.png", "latin.png", "mute.png", "text.jpg", "tiny.png"]
        assert (
            funnel.rejected["tiny.png"]
            == "12 x 12 would be enlarged 2.67 times to cover 32 x 32; spec.data.maxUpscale is 1.5"
        )
        assert "not UTF-8" in funnel.rejected["latin.png"]
        assert "fallback" in funnel.rejected["mute.png"]
        assert sorted(all_samples(dataset)) == [f"{n:03d}.png" for n in range(4)]
    assert len(loads) == 1


def test_no_sample_left_is_an_error_with_the_funnel_before_any_encoder_is_loaded(
    tmp_path: Path, checkpoint: Path, loads: list[Path]
) -> None:
    write_pictures(tmp_path / "tiny", [(8, 8), (9, 9)])
    with pytest.raises(DataError, match=r"0 of 2 files .*2 too small"):
        built(training_run_file(tmp_path, [tmp_path / "tiny"], checkpoint))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"0 files .* png, jpg"):
        built(training_run_file(tmp_path, [tmp_path / "empty"], checkpoint))
    with pytest.raises(DataError, match="no such folder"):
        built(training_run_file(tmp_path, [tmp_path / "nowhere"], checkpoint))
    assert loads == []


def test_a_file_that_fails_only_when_it_is_encoded_is_listed(
    tmp_path: Path, pictures: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = encode_module.read_picture
    bad = (pictures / "001.png").read_bytes()

    def failing(content: bytes) -> Any:
        if content == bad:
            raise UnreadableError("gone bad")
        return real(content)

    monkeypatch.setattr(encode_module, "read_picture", failing)
    dataset, _ = built(training_run_file(tmp_path, [pictures], checkpoint))
    assert (dataset.funnel.unreadable, dataset.funnel.kept) == (1, 3)
    assert dataset.funnel.rejected == {"001.png": "gone bad"}
    assert "001.png" not in all_samples(dataset)


def test_a_file_that_changes_while_the_cache_is_built_is_listed(
    tmp_path: Path, pictures: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = build_module.select

    def change_and_select(*arguments: Any) -> Any:
        picture(64, 40, seed=50).save(pictures / "001.png")
        return real(*arguments)

    monkeypatch.setattr(build_module, "select", change_and_select)
    dataset, _ = built(training_run_file(tmp_path, [pictures], checkpoint))
    assert dataset.funnel.rejected == {"001.png": "it changed while the cache was built"}


class HalfBlindFamily(CountingFamily):
    """Its autoencoder fails on bright pictures."""

    def encode_pixels(self, pipe: Any, pixels: Tensor) -> Latents:
        latents = super().encode_pixels(pipe, pixels)
        latents.mean[pixels.mean(dim=(1, 2, 3)) > 0.9] = torch.nan
        return latents


def test_latents_that_are_not_finite_are_listed_and_not_kept(tmp_path: Path, pictures: Path, checkpoint: Path) -> None:
    picture(40, 40).point(lambda _: 255).save(pictures / "white.png")
    (pictures / "white.txt").write_text("white")
    dataset = build_dataset(
        training_run_file(tmp_path, [pictures], checkpoint), HalfBlindFamily(), OneRank(), no_report
    )
    assert list(dataset.funnel.rejected) == ["white.png"]
    assert "not finite" in dataset.funnel.rejected["white.png"]
    assert dataset.funnel.kept == 4


def test_dropped_captions_train_on_the_features_of_the_empty_caption(
    tmp_path: Path, pictures: Path, checkpoint: Path
) -> None:
    run = training_run_file(tmp_path, [pictures], checkpoint, data={"captions": {"dropout": 0.5}})
    dataset, _ = built(run)
    family = get_family("sd3")
    pipe = components.load_encoders(family, checkpoint, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        [empty] = family.encode_text(pipe, [""])
    dropped = 0
    for step in range(200):
        batch = dataset.order.batch(step)
        loaded = dataset.load(batch.slots, step=step, epoch=batch.epoch)
        dropped += torch.allclose(loaded.text[0]["embeds"], empty["embeds"], atol=1e-5)
        again = dataset.load(batch.slots, step=step, epoch=batch.epoch)
        assert torch.equal(again.text[0]["embeds"], loaded.text[0]["embeds"])
    assert 70 < dropped < 130


@pytest.mark.parametrize(("objective", "has"), [({}, False), ({"enhancedRatio": "0"}, False), ({"order": 1}, True)])
def test_samples_come_with_the_empty_caption_where_the_objective_contrasts_with_it(
    tmp_path: Path, pictures: Path, checkpoint: Path, objective: dict[str, Any], has: bool
) -> None:
    spec = {"objective": {"twinFlow": objective}, "hyperparameters": {"ema": {}}} if objective else {}
    dataset, _ = built(training_run_file(tmp_path, [pictures], checkpoint, **spec))
    family = get_family("sd3")
    pipe = components.load_encoders(family, checkpoint, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        [empty] = family.encode_text(pipe, [""])
    batch = dataset.order.batch(0)
    loaded = dataset.load(batch.slots, step=0, epoch=batch.epoch)
    assert len(loaded.contrast) == (len(batch.slots) if has else 0)
    for features in loaded.contrast:
        torch.testing.assert_close(features["embeds"], empty["embeds"], atol=1e-5, rtol=1e-5)


def test_alternative_captions_take_turns_over_the_epochs(tmp_path: Path, checkpoint: Path) -> None:
    write_pictures(tmp_path / "one", [(40, 40)])
    (tmp_path / "one" / "000.txt").write_text("abc\nxyz\n")
    dataset, family = built(training_run_file(tmp_path, [tmp_path / "one"], checkpoint, data=KEEP_CAPTIONS))
    assert sorted(family.captions) == ["", "abc", "xyz"]
    epochs = [all_samples(dataset, epoch)["000.png"].text[0]["embeds"] for epoch in range(20)]
    distinct = {tuple(np.round(embeds.flatten().tolist(), 4)) for embeds in epochs}
    assert len(distinct) == 2


def test_sources_are_trained_together_each_with_its_repeats(tmp_path: Path, checkpoint: Path) -> None:
    write_pictures(tmp_path / "a", [(40, 40)] * 2)
    write_pictures(tmp_path / "b", [(40, 40)] * 3)
    run = training_run_file(
        tmp_path,
        [],
        checkpoint,
        data={"sources": [{"uri": str(tmp_path / "a"), "repeats": 2}, {"uri": str(tmp_path / "b")}]},
    )
    dataset, family = built(run)
    assert len(dataset) == 5
    assert dataset.order.samples_per_epoch == 2 * 3 + 3
    assert family.pictures == 3  # 000 and 001 are the same files in both
    assert sorted(all_samples(dataset)) == ["a/000.png", "a/001.png", "b/000.png", "b/001.png", "b/002.png"]


def test_a_source_named_twice_is_trained_on_twice(tmp_path: Path, checkpoint: Path) -> None:
    write_pictures(tmp_path / "a", [(40, 40)] * 2)
    dataset, family = built(training_run_file(tmp_path, [tmp_path / "a"] * 2, checkpoint))
    assert (len(dataset), dataset.order.samples_per_epoch, family.pictures) == (4, 4, 2)


def test_the_fallback_is_for_missing_captions_not_for_broken_ones(tmp_path: Path, checkpoint: Path) -> None:
    write_pictures(tmp_path / "a", [(40, 40)] * 3)
    (tmp_path / "a" / "000.txt").unlink()
    (tmp_path / "a" / "001.txt").write_bytes(b"\xff\xfe")
    run = training_run_file(
        tmp_path, [tmp_path / "a"], checkpoint, data={"captions": {"fallback": "a thing", "trigger": "sks"}}
    )
    dataset, family = built(run)
    assert sorted(family.captions) == ["", "sks, a picture 2", "sks, a thing"]
    assert list(dataset.funnel.rejected) == ["001.png"]


def test_progress_is_told_with_counts(tmp_path: Path, pictures: Path, checkpoint: Path) -> None:
    told: list[tuple[str, str, int, int]] = []
    build_dataset(
        training_run_file(tmp_path, [pictures], checkpoint),
        CountingFamily(),
        OneRank(),
        lambda stage, detail, done, total: told.append((stage, detail, done, total)),
    )
    assert {stage for stage, *_ in told} == {"reading files", "encoding captions", "encoding pictures"}
    assert ("reading files", "4/4", 4, 4) in told
    assert ("encoding captions", "5/5", 5, 5) in told
    assert ("encoding pictures", "4/4", 4, 4) in told


def test_a_report_that_raises_stops_the_build(tmp_path: Path, pictures: Path, checkpoint: Path) -> None:
    class Stop(Exception):
        pass

    def stop(stage: str, detail: str, done: int, total: int) -> None:
        if stage == "encoding pictures":
            raise Stop

    run = training_run_file(tmp_path, [pictures], checkpoint)
    with pytest.raises(Stop):
        build_dataset(run, CountingFamily(), OneRank(), stop)
    _, family = built(run)
    assert family.captions == []  # what was finished before is kept


@pytest.fixture(scope="module")
def video_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("wan", tmp_path_factory.mktemp("checkpoint") / "wan")


def test_clips_are_resampled_encoded_and_listed_when_too_short(tmp_path: Path, video_checkpoint: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    write_clip(clips / "long.mp4", grey_frames([20 + 5 * n for n in range(30)]), 25)
    write_clip(clips / "short.mp4", grey_frames([100] * 5), 25)
    (clips / "broken.mp4").write_text("no clip")
    for name in ("long", "short", "broken"):
        (clips / f"{name}.txt").write_text(f"a {name} clip")
    picture(40, 40).save(clips / "ignored.png")
    run = training_run_file(
        tmp_path, [clips], video_checkpoint, family="wan", data={"clip": {"frames": 5, "fps": 16}, **KEEP_CAPTIONS}
    )
    family = get_family("wan")
    dataset = build_dataset(run, family, OneRank(), no_report)
    funnel = dataset.funnel
    assert (funnel.found, funnel.kept, funnel.too_short, funnel.unreadable) == (3, 1, 1, 1)
    assert funnel.rejected["short.mp4"] == "4 frames at 16 per second; spec.data.clip.frames asks for 5"
    assert dataset.frame_rate == 16
    batch = dataset.order.batch(0)
    loaded = dataset.load(batch.slots, step=0, epoch=0)
    assert loaded.latents.ndim == 5
    assert loaded.latents.shape[2] == 2  # 5 frames: the first alone, then four in one
    assert batch.tokens == family.facts.latent_tokens(32, 32, 5)
    again = build_dataset(run.model_copy(update={"model_folder": str(video_checkpoint)}), family, OneRank(), no_report)
    assert again.hash == dataset.hash
