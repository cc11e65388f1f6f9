"""The manifest: believed only when every bit is as it was written."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from atelier_api.run_file import RunIdentity
from atelier_runtime.checkpoint.manifest import (
    Base,
    DataFacts,
    FileRecord,
    Manifest,
    ManifestError,
    ManifestName,
    NewerManifest,
    describe_base,
)
from atelier_runtime.store import ObjectInfo
from atelier_runtime.store.protocol import sha256_of


def manifest(*files: FileRecord, step: int = 20) -> Manifest:
    return Manifest(
        run=RunIdentity(namespace="team", name="portrait", uid="u-1"),
        attempt="2.1",
        save_id="0123abcd",
        step=step,
        previous_step=10,
        time="2026-01-01T00:00:00Z",
        world_size=2,
        strategy="ddp",
        versions={"torch": "2.13.0"},
        base=Base(source="hf://owner/name", revision=None, files=()),
        files=files or (FileRecord(path=".metadata", size=3, sha256="a" * 64),),
        data=DataFacts(seed=42, dataset_hash="é"),
        store={},
    )


def encoded_again(data: bytes, **changes: object) -> bytes:
    """The manifest with changes, its own hash made right again."""
    content = json.loads(data) | changes
    del content["sha256"]

    def canonical(value: object) -> bytes:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    return canonical(content | {"sha256": sha256_of(canonical(content))})


def test_it_comes_back_as_it_was_written() -> None:
    written = manifest()
    assert Manifest.decode(written.encode()) == written
    assert written.folder == "checkpoints/00000020-2.1-0123abcd/"
    assert written.name.key == "manifests/00000020-2.1.json"


def test_every_single_flipped_bit_is_refused() -> None:
    data = manifest().encode()
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            with pytest.raises(ManifestError):
                Manifest.decode(bytes(flipped))


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_a_truncated_one_is_refused(length: int) -> None:
    with pytest.raises(ManifestError):
        Manifest.decode(manifest().encode()[:length])


def test_other_spellings_of_the_same_content_are_refused() -> None:
    with pytest.raises(ManifestError, match="does not match its own SHA-256"):
        Manifest.decode(manifest().encode() + b"\n")


def test_a_newer_schema_is_told_from_damage() -> None:
    with pytest.raises(NewerManifest, match="its schemaVersion is 2, this version reads up to 1"):
        Manifest.decode(encoded_again(manifest().encode(), schemaVersion=2, novelty=True))


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/passwd", "..", ""])
def test_file_names_cannot_lead_out_of_the_folder(name: str) -> None:
    files = [{"path": name, "size": 1, "sha256": "a" * 64}]
    with pytest.raises(ManifestError, match="not a plain name"):
        Manifest.decode(encoded_again(manifest().encode(), files=files))


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({".metadata": 3, "__0_0.distcp": 5}, None),
        ({".metadata": 3, "__0_0.distcp": 5, "more": 1}, None),
        ({".metadata": 3}, "__0_0.distcp is missing"),
        ({".metadata": 3, "__0_0.distcp": 4}, "__0_0.distcp has 4 bytes instead of 5"),
    ],
)
def test_files_must_be_there_with_their_sizes(sizes: dict[str, int], reason: str | None) -> None:
    made = manifest(
        FileRecord(path=".metadata", size=3, sha256="a" * 64), FileRecord(path="__0_0.distcp", size=5, sha256="b" * 64)
    )
    listing = [ObjectInfo(made.folder + name, size, datetime.now(UTC)) for name, size in sizes.items()]
    assert made.missing(listing) == reason


def test_names_are_ordered_by_step_and_then_by_attempt() -> None:
    keys = ["00000010-9.0", "00000009-10.0", "00000010-10.0", "00000010-10.2", "00000010-10.10", "100000000-1.0"]
    names = [ManifestName.parse(f"manifests/{key}.json") for key in keys]
    ordered = sorted(name for name in names if name is not None)
    assert [name.file.removesuffix(".json") for name in ordered] == [
        "00000009-10.0",
        "00000010-9.0",
        "00000010-10.0",
        "00000010-10.2",
        "00000010-10.10",
        "100000000-1.0",
    ]


@pytest.mark.parametrize("key", ["manifests/x.json", "manifests/1-1.0.json", "manifests/a/00000001-1.0.json", "latest"])
def test_other_keys_are_no_manifests(key: str) -> None:
    assert ManifestName.parse(key) is None


def test_the_base_is_described_by_hashes_and_hub_blobs_are_not_read(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("c" * 64)
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    folder = tmp_path / "model"
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_bytes(b"{}")
    (folder / "picture.png").write_bytes(b"no")
    os.symlink(blob, folder / "transformer" / "model.safetensors")
    base = describe_base(folder, "hf://owner/name", "main")
    assert base.files == (
        FileRecord(path="model_index.json", size=2, sha256=sha256_of(b"{}")),
        FileRecord(path="transformer/model.safetensors", size=7, sha256="c" * 64),
    )
