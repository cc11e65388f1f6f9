from dataclasses import replace
from pathlib import Path

import pytest

from atelier_runtime.data import keys as keys_module
from atelier_runtime.data.buckets import Bucket, Placement, place, place_sound
from atelier_runtime.data.keys import Encoding, FolderHashes, crop_draw, pipeline_flags, text_components
from atelier_runtime.family import Song

ENCODING = Encoding("sd3", autoencoder="a" * 64, text_encoders="b" * 64, precision="bf16", rate=None)
PLACEMENT = place(100, 80, Bucket(64, 48))


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(ENCODING.latent_key("d" * 64, PLACEMENT), id="content"),
        pytest.param(ENCODING.latent_key("c" * 64, place(100, 80, Bucket(64, 32))), id="bucket"),
        pytest.param(ENCODING.latent_key("c" * 64, place(100, 80, Bucket(64, 48), (0.99, 0.99))), id="crop"),
        pytest.param(ENCODING.latent_key("c" * 64, place(100, 80, Bucket(64, 48, 5))), id="frames"),
        pytest.param(replace(ENCODING, autoencoder="e" * 64).latent_key("c" * 64, PLACEMENT), id="autoencoder"),
        pytest.param(replace(ENCODING, precision="fp32").latent_key("c" * 64, PLACEMENT), id="precision"),
        pytest.param(replace(ENCODING, family="flux").latent_key("c" * 64, PLACEMENT), id="family"),
        pytest.param(replace(ENCODING, rate=16.0).latent_key("c" * 64, PLACEMENT), id="frame rate"),
        pytest.param(ENCODING.text_key("c" * 64), id="kind"),
    ],
)
def test_latent_keys_change_with_everything_the_latents_depend_on(other: bytes) -> None:
    key = ENCODING.latent_key("c" * 64, PLACEMENT)
    assert len(key) == len(other) == 32
    assert key == ENCODING.latent_key("c" * 64, PLACEMENT)
    assert key != other


def latents_of(encoding: Encoding, placement: Placement) -> tuple[bytes, bytes, bytes]:
    """Keys of all that the autoencoder makes of a file: as a target, a reference, and a condition."""
    return (
        encoding.latent_key("c" * 64, placement),
        encoding.reference_key("c" * 64, placement),
        encoding.condition_key("c" * 64, placement, latents=True),
    )


def test_latents_that_were_made_of_tiles_are_others_and_a_sample_in_one_piece_is_the_same() -> None:
    tiles = replace(ENCODING, largest_whole=63)
    for whole, tiled in zip(latents_of(ENCODING, PLACEMENT), latents_of(tiles, PLACEMENT), strict=True):
        assert whole != tiled
    assert latents_of(replace(tiles, largest_whole=62), PLACEMENT)[0] != latents_of(tiles, PLACEMENT)[0]
    assert latents_of(replace(tiles, largest_whole=64), PLACEMENT) == latents_of(ENCODING, PLACEMENT)
    shown = [each.condition_key("c" * 64, PLACEMENT, latents=False) for each in (ENCODING, tiles)]
    assert shown[0] == shown[1]
    assert tiles.text_key("a cat") == ENCODING.text_key("a cat")


def test_a_sound_is_made_of_tiles_where_it_is_longer_than_one_whatever_its_bucket() -> None:
    tiles = replace(ENCODING, largest_whole=205)
    for samples, alike in ((205, True), (215, False)):
        placement = place_sound(samples, 5, 400, 800)
        assert (tiles.latent_key("c", placement) == ENCODING.latent_key("c", placement)) == alike


def test_keys_of_whole_samples_are_what_they_were_before_there_were_tiles() -> None:
    assert latents_of(ENCODING, PLACEMENT) == (
        bytes.fromhex("5abb1f7ce6f9e59fdb90a0e12587a6575e4e3858bcd201e03f1f1a573cf9665e"),
        bytes.fromhex("67969ef344536dcdd4db2e55e0378f99ed085eb2745642f658c2ea6ff5470f31"),
        bytes.fromhex("32eea452c6e28b3e148d4a8678576576153d8b1cae5f486ff9cd295022266247"),
    )


def test_latent_keys_do_not_depend_on_the_text_encoders() -> None:
    assert replace(ENCODING, text_encoders="e").latent_key("c", PLACEMENT) == ENCODING.latent_key("c", PLACEMENT)


def test_text_keys_change_with_caption_encoders_family_and_precision_only() -> None:
    key = ENCODING.text_key("a cat")
    assert key != ENCODING.text_key("a dog")
    assert key != replace(ENCODING, text_encoders="e").text_key("a cat")
    assert key != replace(ENCODING, family="flux").text_key("a cat")
    assert key != replace(ENCODING, precision="fp32").text_key("a cat")
    assert key == replace(ENCODING, autoencoder="e").text_key("a cat")


SONG = Song("a waltz", "one two three", 12.5)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(ENCODING.song_key(replace(SONG, caption="a march")), id="caption"),
        pytest.param(ENCODING.song_key(replace(SONG, lyrics="one two")), id="lyrics"),
        pytest.param(ENCODING.song_key(replace(SONG, seconds=12.0)), id="length"),
        pytest.param(replace(ENCODING, text_encoders="e").song_key(SONG), id="encoders"),
        pytest.param(ENCODING.text_key(SONG.caption), id="kind"),
        pytest.param(ENCODING.shared_key(), id="what is shared"),
    ],
)
def test_keys_of_sounds_change_with_all_that_their_text_encoder_is_told(other: bytes) -> None:
    assert ENCODING.song_key(SONG) == ENCODING.song_key(replace(SONG))
    assert ENCODING.song_key(SONG) != other


def test_latents_of_a_sound_are_those_of_its_length_whatever_bucket_it_is_in() -> None:
    keys = [
        ENCODING.latent_key("c", place_sound(samples, 10, step, 400))
        for samples, step in ((205, 50), (205, 100), (209, 50), (195, 50))
    ]
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_keys_change_with_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    key = ENCODING.text_key("a cat")
    monkeypatch.setattr(keys_module, "SCHEMA_VERSION", 2)
    assert ENCODING.text_key("a cat") != key


def test_a_random_crop_is_drawn_once_per_file_and_seed() -> None:
    draws = {crop_draw(seed, content) for seed in (1, 2) for content in ("a", "b")}
    assert len(draws) == 4
    assert all(0 <= part < 1 for draw in draws for part in draw)
    assert crop_draw(1, "a") == crop_draw(1, "a")


def test_text_components_are_all_but_denoisers_autoencoder_and_scheduler() -> None:
    config = {
        "_class_name": "SomePipeline",
        "transformer": ["diffusers", "A"],
        "vae": ["diffusers", "B"],
        "scheduler": ["diffusers", "C"],
        "text_encoder": ["transformers", "D"],
        "tokenizer": ["transformers", "E"],
        "image_encoder": [None, None],
        "force_zeros": True,
    }
    assert text_components(config, ["transformer", "vae"]) == ("text_encoder", "tokenizer")
    assert pipeline_flags(config) == {"force_zeros": True}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    for name in ("vae/config.json", "vae/weights", "tokenizer/vocab", "vae/.cached"):
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text(name)
    return tmp_path / "model"


def test_a_folders_digest_changes_with_names_and_contents_of_its_files(checkpoint: Path) -> None:
    def digest() -> str:
        return FolderHashes(checkpoint / "none").of(checkpoint, ["vae"])

    first = digest()
    (checkpoint / "tokenizer" / "vocab").write_text("other")
    (checkpoint / "vae" / ".cached").write_text("other")
    assert digest() == first
    (checkpoint / "vae" / "weights").write_text("VAE/weights")
    changed = digest()
    (checkpoint / "vae" / "weights").rename(checkpoint / "vae" / "weights2")
    assert len({first, changed, digest()}) == 3


def test_encoder_files_are_hashed_once_until_they_change(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    real = keys_module.file_sha256
    monkeypatch.setattr(keys_module, "file_sha256", lambda path: hashed.append(path.name) or real(path))
    memory = checkpoint.parent / "hashes.json"

    def digest() -> str:
        hashes = FolderHashes(memory)
        value = hashes.of(checkpoint, ["vae", "tokenizer"], {"flag": 1})
        hashes.save()
        return value

    first = digest()
    assert sorted(hashed) == ["config.json", "vocab", "weights"]
    assert digest() == first
    assert len(hashed) == 3
    (checkpoint / "vae" / "weights").write_text("something longer")
    assert digest() != first
    assert len(hashed) == 4
    memory.write_text("{")
    digest()
    assert len(hashed) == 7
