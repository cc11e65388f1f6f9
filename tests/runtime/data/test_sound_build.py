"""Sounds the whole way, with the stock encoders of a tiny checkpoint: what is encoded, what is trained on, what is left out."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atelier_api.errors import ConfigError
from atelier_runtime import components
from atelier_runtime.data import Dataset, build_dataset
from atelier_runtime.data.sound import read_sound
from atelier_runtime.families.ace_step import AceStep
from atelier_runtime.family import Features, Latents, Song
from family_models import save_tiny
from tiny_data import OneRank, all_samples, no_report, slow_down, tone, training_run_file, write_tone

RATE, UNIT = 7680, 1920
"""Four latents a second: the checkpoint says at which rate it takes sounds."""
CUT = {"maxSeconds": 3, "minSeconds": 1, "bucketSeconds": 1}


class CountingMusician(AceStep):
    """The real family; counts what it encodes."""

    def __init__(self) -> None:
        self.songs: list[Song | None] = []
        self.sounds = 0
        self.shared = 0

    def encode_songs(self, pipe: Any, songs: Sequence[Song | None]) -> list[Features]:
        self.songs += songs
        return super().encode_songs(pipe, songs)

    def encode_pixels(self, pipe: Any, pixels: Tensor) -> Latents:
        self.sounds += len(pixels)
        return super().encode_pixels(pipe, pixels)

    def encode_shared(self, pipe: Any) -> Features:
        self.shared += 1
        return super().encode_shared(pipe)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return slow_down(save_tiny("ace_step", tmp_path_factory.mktemp("checkpoint") / "ace_step"), RATE)


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """Of 5, 6 and more than 12 latents; one is sung."""
    folder = tmp_path / "sounds"
    folder.mkdir()
    write_tone(folder / "a.wav", tone(1.3, 16_000, 440, 660), 16_000)
    write_tone(folder / "b.flac", tone(1.52, 8_000, 330), 8_000)
    write_tone(folder / "c.mp3", tone(3.6, 24_000, 220, 110), 24_000)
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"a tune {name}\n")
    (folder / "b.lyrics.txt").write_text("\n[verse]\nla la\n\nla\n")
    return folder


def built(
    folder: Path, sounds: Path, checkpoint: Path, cut: dict[str, int] = CUT, batch: int = 1, **data: Any
) -> tuple[Dataset, CountingMusician]:
    family = CountingMusician()
    settings = {"audio": cut, "captions": {"dropout": 0}} | data
    run = training_run_file(
        folder, [sounds], checkpoint, "ace_step", data=settings, hyperparameters={"globalBatchSize": batch}
    )
    return build_dataset(run, family, OneRank(), no_report), family


def test_latents_and_features_are_those_of_the_stock_encoders_at_each_sounds_own_length(
    tmp_path: Path, sounds: Path, checkpoint: Path
) -> None:
    dataset, family = built(tmp_path, sounds, checkpoint)
    pipe = components.load_encoders(AceStep(), checkpoint, torch.float32, torch.device("cpu"))
    samples = all_samples(dataset)
    expected = {
        "a.wav": (5, 8, Song("a tune a", "", 1.25)),
        "b.flac": (6, 8, Song("a tune b", "[verse]\nla la\n\nla", 1.5)),
        "c.mp3": (12, 12, Song("a tune c", "", 3.0)),
    }
    assert sorted(samples) == sorted(expected)
    for name, (length, padded, song) in expected.items():
        with torch.no_grad():
            latents = AceStep().encode_pixels(pipe, read_sound(sounds / name, RATE, length * UNIT)[None])
            [features] = AceStep().encode_songs(pipe, [song])
        sample = samples[name]
        assert sample.latents.shape == (1, 4, padded)
        assert sample.lengths is not None
        assert sample.lengths.tolist() == [length]
        assert sample.std is not None
        assert latents.std is not None
        for kept, encoded in ((sample.latents, latents.mean), (sample.std, latents.std)):
            torch.testing.assert_close(kept[..., :length], encoded, atol=1e-5, rtol=1e-5)
            assert not kept[..., length:].any()
        torch.testing.assert_close(sample.text[0]["embeds"], features["embeds"], atol=1e-5, rtol=1e-5)
    assert torch.equal(dataset.shared["silence"], pipe.condition_encoder.silence_latent[0])
    assert (family.sounds, family.shared, dataset.frame_rate) == (3, 1, None)


def test_sounds_of_nearly_one_length_are_trained_together_each_with_its_own(
    tmp_path: Path, sounds: Path, checkpoint: Path
) -> None:
    dataset, family = built(tmp_path, sounds, checkpoint, batch=2)
    batches = {}
    for step in range(dataset.order.steps_per_epoch):
        batch = dataset.order.batch(step)
        loaded = dataset.load(batch.slots, step=step, epoch=0)
        assert loaded.lengths is not None
        assert batch.tokens == family.facts.latent_tokens(1, 1, loaded.latents.shape[-1] * UNIT)
        batches[loaded.latents.shape] = dict(zip(loaded.names, loaded.lengths.tolist(), strict=True))
        for length, latents in zip(loaded.lengths.tolist(), loaded.latents, strict=True):
            assert latents[:, length - 1].any()
            assert not latents[:, length:].any()
    assert batches == {(2, 4, 8): {"a.wav": 5, "b.flac": 6}, (2, 4, 12): {"c.mp3": 12}}


def test_bad_files_are_listed_with_their_reasons_and_the_rest_is_trained_on(
    tmp_path: Path, sounds: Path, checkpoint: Path
) -> None:
    write_tone(sounds / "short.wav", tone(0.5, 8_000, 440), 8_000)
    (sounds / "text.ogg").write_text("no sound")
    for name in ("short", "text", "latin"):
        (sounds / f"{name}.txt").write_text(name)
    shutil.copy(sounds / "a.wav", sounds / "latin.wav")
    (sounds / "latin.lyrics.txt").write_bytes("Käfer".encode("latin-1"))
    shutil.copy(sounds / "a.wav", sounds / "mute.wav")
    (sounds / "picture.png").write_text("of another kind")
    for _ in range(2):  # the second time from what is remembered
        dataset, _ = built(tmp_path, sounds, checkpoint)
        funnel = dataset.funnel
        assert (funnel.found, funnel.kept) == (7, 3)
        assert (funnel.unreadable, funnel.too_short, funnel.no_caption) == (1, 1, 2)
        assert funnel.rejected["short.wav"] == "0.50 seconds; spec.data.audio.minSeconds asks for 1.00"
        assert funnel.rejected["latin.wav"] == "its lyrics latin.lyrics.txt is not UTF-8"
        assert "fallback" in funnel.rejected["mute.wav"]


def test_other_lyrics_encode_the_text_again_and_nothing_else(tmp_path: Path, sounds: Path, checkpoint: Path) -> None:
    first, family = built(tmp_path, sounds, checkpoint)
    assert len(family.songs) == 4  # and what a dropped caption trains on
    again, family = built(tmp_path, sounds, checkpoint)
    assert (family.songs, family.sounds, family.shared, again.hash) == ([], 0, 0, first.hash)
    (sounds / "a.lyrics.txt").write_text("and now it is sung")
    sung, family = built(tmp_path, sounds, checkpoint)
    assert family.songs == [Song("a tune a", "and now it is sung", 1.25)]
    assert family.sounds == 0
    assert sung.hash != first.hash


def test_buckets_of_another_size_encode_nothing_and_another_length_that_one(
    tmp_path: Path, sounds: Path, checkpoint: Path
) -> None:
    built(tmp_path, sounds, checkpoint)
    _, family = built(tmp_path, sounds, checkpoint, CUT | {"bucketSeconds": 3})
    assert (family.songs, family.sounds) == ([], 0)
    dataset, family = built(tmp_path, sounds, checkpoint, CUT | {"maxSeconds": 2})
    assert ([song and song.seconds for song in family.songs], family.sounds) == ([2.0], 1)
    lengths = all_samples(dataset)["c.mp3"].lengths
    assert lengths is not None
    assert lengths.tolist() == [8]


def test_dropped_captions_train_on_what_guidance_contrasts_with(tmp_path: Path, sounds: Path, checkpoint: Path) -> None:
    dataset, family = built(tmp_path, sounds, checkpoint, captions={"dropout": 1})
    assert family.songs.count(None) == 1
    pipe = components.load_encoders(AceStep(), checkpoint, torch.float32, torch.device("cpu"))
    for sample in all_samples(dataset).values():
        assert torch.equal(sample.text[0]["embeds"], pipe.condition_encoder.null_condition_emb[0])


def test_a_checkpoint_of_another_family_is_refused_before_a_file_is_read(tmp_path: Path, sounds: Path) -> None:
    save_tiny("sd3", tmp_path / "base")
    with pytest.raises(
        ConfigError, match=r"spec\.model\.family is 'ace_step', which trains checkpoints of AceStepPipeline"
    ):
        built(tmp_path, sounds, tmp_path / "base")


def test_progress_is_told_of_sounds(tmp_path: Path, sounds: Path, checkpoint: Path) -> None:
    told: list[tuple[str, int]] = []
    run = training_run_file(tmp_path, [sounds], checkpoint, family="ace_step", data={"audio": CUT})
    build_dataset(run, AceStep(), OneRank(), lambda stage, detail, done, total: told.append((stage, total)))
    assert set(told) == {
        ("reading files", 3),
        ("encoding what all samples share", 1),
        ("encoding captions", 4),
        ("encoding sounds", 3),
    }
