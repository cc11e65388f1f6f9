"""What is encoded, what is found in the cache again, and what is built anew: with the stock encoders of a tiny checkpoint."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atelier_api.errors import ConfigError, StoreError
from atelier_api.run_file import RunFile
from atelier_runtime import components
from atelier_runtime.data import Dataset, build_dataset
from atelier_runtime.data import build as build_module
from atelier_runtime.data.buckets import Bucket, place
from atelier_runtime.data.encode import Limits
from atelier_runtime.data.image import fit, read_picture
from atelier_runtime.family import Latents
from atelier_runtime.tiles import work_on_tiles
from tiny_data import (
    CountingFamily,
    OneRank,
    all_samples,
    built,
    no_report,
    picture,
    training_run_file,
    write_pictures,
)


def same(left: Dataset, right: Dataset) -> bool:
    ours, theirs = all_samples(left), all_samples(right)
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name].latents, theirs[name].latents)
        and all(torch.equal(ours[name].text[0][key], theirs[name].text[0][key]) for key in ours[name].text[0])
        for name in ours
    )


def test_a_restart_loads_no_encoder_reads_no_file_and_gives_the_same(
    tmp_path: Path, pictures: Path, checkpoint: Path, loads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = training_run_file(tmp_path, [pictures], checkpoint)
    first, family = built(run)
    assert loads == [checkpoint]
    assert (family.pictures, sorted(family.captions)) == (4, ["", *(f"a picture {n}" for n in range(4))])
    monkeypatch.setattr("atelier_runtime.data.prepare.probe", pytest.fail)
    monkeypatch.setattr("atelier_runtime.data.prepare.read_caption", pytest.fail)
    monkeypatch.setattr("atelier_runtime.data.keys.file_sha256", pytest.fail)
    second, family = built(run)
    assert loads == [checkpoint]
    assert (family.pictures, family.captions) == (0, [])
    assert second.hash == first.hash
    assert same(first, second)


def test_another_run_with_the_same_encoders_shares_the_cache(
    tmp_path: Path, pictures: Path, checkpoint: Path, loads: list[Path]
) -> None:
    built(training_run_file(tmp_path, [pictures], checkpoint))
    shutil.copytree(checkpoint, tmp_path / "moved")
    other = training_run_file(
        tmp_path, [pictures], tmp_path / "moved", hyperparameters={"seed": 9, "globalBatchSize": 2}
    )
    built(other)
    assert len(loads) == 1


def edit_picture(run: RunFile, folder: Path) -> RunFile:
    picture(40, 40, seed=99).save(folder / "000.png")
    return run


def edit_caption(run: RunFile, folder: Path) -> RunFile:
    (folder / "000.txt").write_text("something else")
    return run


def edit_data(**changes: Any) -> Callable[[RunFile, Path], RunFile]:
    def edit(run: RunFile, folder: Path) -> RunFile:
        data = run.spec.data.model_copy(update=changes)
        return run.model_copy(update={"spec": run.spec.model_copy(update={"data": data})})

    return edit


def edit_weights(component: str) -> Callable[[RunFile, Path], RunFile]:
    def edit(run: RunFile, folder: Path) -> RunFile:
        changed = folder.parent / "changed"
        shutil.copytree(run.model_folder, changed)
        [path] = (changed / component).glob("*.safetensors")
        weights = load_file(path)
        save_file({name: tensor * 1.5 for name, tensor in weights.items()}, path, {"format": "pt"})
        return run.model_copy(update={"model_folder": str(changed)})

    return edit


def edit_precision(run: RunFile, folder: Path) -> RunFile:
    hyperparameters = run.spec.hyperparameters.model_copy(update={"precision": "bf16"})
    return run.model_copy(update={"spec": run.spec.model_copy(update={"hyperparameters": hyperparameters})})


@pytest.mark.parametrize(
    ("edit", "pictures_encoded", "captions_encoded"),
    [
        pytest.param(edit_picture, 1, 0, id="one file"),
        pytest.param(edit_caption, 0, 1, id="one caption"),
        pytest.param(edit_data(crop="random"), 3, 0, id="crop: 000 has nothing to cut"),
        pytest.param(edit_data(resolution=48, max_upscale=4), 4, 0, id="resolution"),
        pytest.param(edit_weights("vae"), 4, 0, id="autoencoder"),
        pytest.param(edit_weights("text_encoder_3"), 0, 5, id="text encoder"),
        pytest.param(edit_weights("transformer"), 0, 0, id="not the denoiser"),
        pytest.param(edit_precision, 4, 5, id="precision"),
    ],
)
def test_an_edit_encodes_again_what_depends_on_it_and_nothing_else(
    tmp_path: Path,
    pictures: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    edit: Callable[[RunFile, Path], RunFile],
    pictures_encoded: int,
    captions_encoded: int,
) -> None:
    monkeypatch.setattr(
        "atelier_runtime.data.prepare.crop_draw", lambda seed, content: (0.99, 0.99)
    )  # never the centre
    run = training_run_file(tmp_path, [pictures], checkpoint)
    before, _ = built(run)
    after, family = built(edit(run, pictures))
    assert (family.pictures, len(family.captions)) == (pictures_encoded, captions_encoded)
    assert (after.hash == before.hash) == (pictures_encoded == captions_encoded == 0)


def test_stored_values_have_the_precision_of_the_run(tmp_path: Path, pictures: Path, checkpoint: Path) -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        dataset, _ = built(
            training_run_file(tmp_path, [pictures], checkpoint, hyperparameters={"precision": precision})
        )
        sample = next(iter(all_samples(dataset).values()))
        assert sample.latents.dtype == dtype
        assert {tensor.dtype for tensor in sample.text[0].values()} == {dtype}


def test_a_damaged_shard_is_built_again(tmp_path: Path, pictures: Path, checkpoint: Path, loads: list[Path]) -> None:
    run = training_run_file(tmp_path, [pictures], checkpoint)
    first, _ = built(run)
    expected = all_samples(first)
    shards = sorted((tmp_path / "cache" / "shards").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    for shard in shards:
        data = bytearray(shard.read_bytes())
        data[-10] ^= 0xFF
        shard.unlink()  # the first data set still looks into the old file
        shard.write_bytes(data)
    second, family = built(run)
    assert (family.pictures, len(family.captions), len(loads)) == (4, 5, 2)
    rebuilt = all_samples(second)
    assert all(torch.equal(expected[name].latents, rebuilt[name].latents) for name in expected)


def test_an_interrupted_build_goes_on_with_what_was_committed(
    tmp_path: Path, pictures: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(CountingFamily):
        def encode_pixels(self, pipe: Any, pixels: Tensor) -> Latents:
            if self.pictures == 2:
                raise RuntimeError("the device fell off the bus")
            return super().encode_pixels(pipe, pixels)

    monkeypatch.setattr(build_module, "Limits", lambda: Limits(batch_samples=1, round_samples=1, shard_bytes=1))
    run = training_run_file(tmp_path, [pictures], checkpoint)
    with pytest.raises(RuntimeError, match="fell off the bus"):
        build_dataset(run, Interrupted(), OneRank(), no_report)
    dataset, family = built(run)
    assert (family.pictures, family.captions) == (2, [])
    assert len(all_samples(dataset)) == 4


def test_encoding_backs_off_to_one_sample_when_memory_runs_out(tmp_path: Path, checkpoint: Path) -> None:
    class SmallDevice(CountingFamily):
        def encode_pixels(self, pipe: Any, pixels: Tensor) -> Latents:
            if len(pixels) > 1:
                raise torch.OutOfMemoryError("out of memory")
            return super().encode_pixels(pipe, pixels)

    write_pictures(tmp_path / "square", [(40, 40)] * 5)
    family = SmallDevice()
    dataset = build_dataset(
        training_run_file(tmp_path, [tmp_path / "square"], checkpoint), family, OneRank(), no_report
    )
    assert family.pictures == 5
    assert len(all_samples(dataset)) == 5


def test_latents_of_tiles_and_of_whole_pictures_are_cached_apart_and_are_those_of_either_way(
    tmp_path: Path, checkpoint: Path, loads: list[Path]
) -> None:
    write_pictures(tmp_path / "pictures", [(640, 64), (40, 40)])
    whole = training_run_file(
        tmp_path, [tmp_path / "pictures"], checkpoint, data={"resolution": 192, "maxUpscale": 5, "bucketAlign": 16}
    )
    tiled = whole.model_copy(update={"plan": whole.plan.model_copy(update={"tiled_encoding": True})})
    first, family = built(whole)
    assert family.pictures == 2
    second, family = built(tiled)
    assert (family.pictures, family.captions) == (1, [])  # the small one is in one piece either way
    assert second.hash != first.hash
    left, right = all_samples(first), all_samples(second)
    assert torch.equal(left["001.png"].latents, right["001.png"].latents)
    pipe = components.load_encoders(family, checkpoint, torch.float32, torch.device("cpu"))
    placement = place(640, 64, Bucket(608, 64))
    pixels = fit(read_picture((tmp_path / "pictures/000.png").read_bytes()), placement)
    for sample, on_tiles in ((left["000.png"], False), (right["000.png"], True)):
        if on_tiles:
            work_on_tiles(pipe, family)
        with torch.no_grad():
            expected = family.encode_pixels(pipe, pixels[None]).mean
        torch.testing.assert_close(sample.latents, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(left["000.png"].latents, right["000.png"].latents, atol=1e-3)
    assert built(tiled)[1].pictures == built(whole)[1].pictures == 0
    assert len(loads) == 3


def test_encoders_are_freed_before_the_data_set_is_given_out(
    tmp_path: Path, pictures: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc
    import weakref

    references = []
    load = components.load_encoders

    def remembering(*arguments: Any) -> Any:
        pipe = load(*arguments)
        references.append(weakref.ref(pipe.text_encoder_3))
        return pipe

    monkeypatch.setattr(components, "load_encoders", remembering)
    dataset, _ = built(training_run_file(tmp_path, [pictures], checkpoint))
    gc.collect()
    assert [reference() for reference in references] == [None]
    assert len(dataset) == 4


def test_a_cache_folder_that_cannot_be_made_is_refused(tmp_path: Path, pictures: Path, checkpoint: Path) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    with pytest.raises(ConfigError, match=r"cache folder .* cannot be made"):
        built(training_run_file(tmp_path, [pictures], checkpoint))


def test_entries_that_vanish_right_after_they_were_built_are_a_store_error(
    tmp_path: Path, pictures: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "_VISIBLE_SECONDS", 0.0)
    monkeypatch.setattr("atelier_runtime.data.cache.ShardWriter.commit", lambda self: None)
    with pytest.raises(StoreError, match=r"9 entries of the cache .* missing right after"):
        built(training_run_file(tmp_path, [pictures], checkpoint))
