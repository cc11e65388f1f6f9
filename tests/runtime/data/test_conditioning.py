"""Conditioning pictures: found beside their samples, cut like them, and kept as what the control network of a family is given."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from atelier_api.errors import DataError
from atelier_api.run_file import RunFile
from atelier_api.v1alpha1.adapter import ControlNetAdapter
from atelier_runtime import components
from atelier_runtime.data import Dataset, build_dataset
from atelier_runtime.data.image import read_picture
from atelier_runtime.data.order import Slot
from atelier_runtime.families import get_family
from atelier_runtime.families.sd3 import StableDiffusion3
from atelier_runtime.families.sdxl import StableDiffusionXL
from atelier_runtime.family import Latents
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

PLACE = "spec.data.sources[0].conditioning"


class Counting(StableDiffusion3):
    """The real family; counts what it encodes."""

    def __init__(self) -> None:
        self.conditions = 0

    def encode_condition(self, pipe: Any, pixels: Tensor) -> Latents:
        self.conditions += len(pixels)
        return super().encode_condition(pipe, pixels)


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("sdxl", tmp_path_factory.mktemp("checkpoint") / "sdxl")


def run_of(folder: Path, checkpoint: Path, family: str, **data: Any) -> RunFile:
    """Four pictures, and conditioning pictures twice as large, of what they show and a frame around it."""
    if not (folder / "edges").exists():
        sizes = [(40, 40), (64, 40), (40, 64), (41, 40)]
        write_pictures(folder / "pictures", sizes)
        (folder / "edges").mkdir()
        for number, (width, height) in enumerate(sizes):
            picture(2 * width, 2 * height, seed=20 + number).save(folder / "edges" / f"{number:03d}.jpg")
    sources = [{"uri": str(folder / "pictures"), "conditioning": str(folder / "edges")}]
    settings = {"sources": sources, "captions": {"dropout": 0}, **data}
    file = training_run_file(folder, [], checkpoint, family=family, data=settings)
    spec = file.spec.model_copy(update={"adapter": ControlNetAdapter(type="controlnet")})
    return file.model_copy(update={"spec": spec})


def built(run: RunFile, family: Any = None) -> Dataset:
    return build_dataset(run, family or get_family(run.spec.model.family), OneRank(), no_report)


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_picture_that_is_its_own_condition_is_cut_to_the_same_pixels(tmp_path: Path, sdxl: Path, crop: str) -> None:
    """What the network is given shows, place by place, what the sample does: the autoencoder makes the sample's latents of it."""
    run = run_of(tmp_path, sdxl, "sdxl", crop=crop, maxUpscale="4")
    for path in (tmp_path / "pictures").glob("*.png"):
        (tmp_path / "edges" / path.with_suffix(".jpg").name).unlink()
        Image.open(path).save(tmp_path / "edges" / path.name)
    pipe = components.load_encoders(StableDiffusionXL(), sdxl, torch.float32, torch.device("cpu"))
    for sample in all_samples(built(run)).values():
        assert sample.condition is not None
        pixels = sample.condition["pixels"]
        assert pixels.dtype == torch.uint8
        with torch.no_grad():
            latents = StableDiffusionXL().encode_pixels(pipe, pixels / 127.5 - 1)
        torch.testing.assert_close(sample.latents, latents.mean, atol=1e-5, rtol=1e-5)


def test_pixels_are_those_that_the_stock_pipeline_feeds_its_network(tmp_path: Path, sdxl: Path) -> None:
    samples = all_samples(built(run_of(tmp_path, sdxl, "sdxl")))
    for name, sample in samples.items():
        assert sample.condition is not None
        height, width = sample.condition["pixels"].shape[-2:]
        assert (height, width) == tuple(8 * side for side in sample.latents.shape[-2:])
        scale = max(width, height) / 64
        edges = read_picture((tmp_path / "edges" / f"{name[:3]}.jpg").read_bytes())
        assert (sample.sizes[0, :2] >= torch.tensor([height, width])).all()
        down, across = (int(side) for side in sample.sizes[0, :2])
        top, left = (int(side) for side in sample.sizes[0, 2:4])
        whole = edges.resize((across, down), Image.Resampling.LANCZOS)
        expected = np.asarray(whole.crop((left, top, left + width, top + height)))
        assert np.array_equal(sample.condition["pixels"][0].permute(1, 2, 0).numpy(), expected), scale


def test_latents_are_the_posterior_of_the_same_cut(tmp_path: Path, checkpoint: Path) -> None:
    family = Counting()
    run = run_of(tmp_path, checkpoint, "sd3")
    dataset = built(run, family)
    pipe = components.load_encoders(StableDiffusion3(), checkpoint, torch.float32, torch.device("cpu"))
    for sample in all_samples(dataset).values():
        assert sample.condition is not None
        assert sample.condition.keys() == {"mean", "std"}
        assert sample.condition["mean"].shape == sample.condition["std"].shape == sample.latents.shape
    assert family.conditions == 4
    square = all_samples(dataset)["000.png"].condition
    edges = read_picture((tmp_path / "edges" / "000.jpg").read_bytes()).resize((32, 32), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(edges).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
    assert square is not None
    # The pipeline leaves the autoencoder's shift out.
    torch.testing.assert_close(square["mean"], posterior.mean * pipe.vae.config.scaling_factor, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(square["std"], posterior.std * pipe.vae.config.scaling_factor, atol=1e-4, rtol=1e-4)


def test_a_restart_encodes_nothing_and_a_changed_picture_alone_is_encoded_again(
    tmp_path: Path, checkpoint: Path
) -> None:
    run = run_of(tmp_path, checkpoint, "sd3")
    first = built(run, Counting())
    again = Counting()
    assert built(run, again).hash == first.hash
    assert again.conditions == 0
    picture(80, 80, seed=77).save(tmp_path / "edges" / "000.jpg")
    assert built(run, again).hash != first.hash
    assert again.conditions == 1


def test_a_batch_has_the_condition_of_each_of_its_samples(tmp_path: Path, sdxl: Path) -> None:
    dataset = built(run_of(tmp_path, sdxl, "sdxl"))
    alike = [Slot(sample, 1.0, sample) for sample in (0, 3)]
    loaded = dataset.load(alike, step=0, epoch=0)
    alone = [dataset.load([slot], step=0, epoch=0).condition for slot in alike]
    assert loaded.condition is not None
    assert torch.equal(loaded.condition["pixels"], torch.cat([each["pixels"] for each in alone if each is not None]))


def test_samples_whose_condition_does_not_fit_are_listed_and_the_rest_is_trained_on(tmp_path: Path, sdxl: Path) -> None:
    run, edges = run_of(tmp_path, sdxl, "sdxl"), tmp_path / "edges"
    write_pictures(tmp_path / "pictures", [(40, 40)] * 3 + [(41, 40)] + [(40, 40)] * 4)
    write_truncated_picture(edges / "004.png")
    for kind in ("png", "jpg"):
        picture(40, 40).save(edges / f"005.{kind}")
    picture(40, 30).save(edges / "006.png")
    picture(80, 80).save(edges / "001.jpg")
    picture(80, 80).save(edges / "002.jpg")
    for _ in range(2):  # the second time from what is remembered
        funnel = built(run).funnel
        assert (funnel.found, funnel.kept, funnel.no_conditioning, funnel.no_reference) == (8, 4, 4, 0)
        assert funnel.rejected["007.png"] == f"no picture 007.* in {PLACE}"
        assert funnel.rejected["005.png"] == f"2 pictures 005.* in {PLACE}, where there must be one"
        assert funnel.rejected["004.png"].startswith("its conditioning picture 004.png cannot be read: ")
        sizes = "40 x 30 and the sample 40 x 40; their aspects must be the same"
        assert funnel.rejected["006.png"] == f"its conditioning picture 006.png is {sizes}"


def test_no_condition_left_is_an_error_with_the_funnel(tmp_path: Path, sdxl: Path) -> None:
    run = run_of(tmp_path, sdxl, "sdxl")
    for path in (tmp_path / "edges").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"0 of 4 files .*4 no conditioning.*000\.png: no picture 000\.\*"):
        built(run)
    (tmp_path / "edges").rmdir()
    with pytest.raises(DataError, match=r"spec\.data\.sources\[0\]\.conditioning is '.*edges'; no such folder"):
        built(run)
