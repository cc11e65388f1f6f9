"""The parts of a checkpoint folder: who loads what, and what is refused."""

import errno
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from atelier_api.errors import ConfigError
from atelier_api.families import NAMES
from atelier_runtime import components
from atelier_runtime.families import get_family
from family_cases import CASES
from family_models import FAMILY_OF, save_tiny
from shared_cases import shared_case

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("sd3", tmp_path_factory.mktemp("sd3"))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_saved_checkpoint_comes_back_in_parts_that_sample_alike(name: str, tmp_path: Path) -> None:
    case = shared_case(name)
    save_tiny(name, tmp_path)
    family = get_family(FAMILY_OF[name])
    names = components.denoiser_names(family, tmp_path)
    assert names == tuple(case.denoisers)
    denoisers = {part: components.load_denoiser(tmp_path, part, torch.float32, CPU) for part in names}
    pipe = components.load_pipeline(family, tmp_path, torch.float32, CPU, denoisers=denoisers)
    first, second = (
        p(**family.sampling_arguments(p, case.request(None, steps=2)), output_type="latent", return_dict=False)[0]
        for p in (case.pipe, pipe)
    )
    torch.testing.assert_close(first, second)


def test_encoders_come_without_denoisers_and_without_gradients(folder: Path) -> None:
    pipe = components.load_encoders(get_family("sd3"), folder, torch.bfloat16, CPU)
    assert pipe.transformer is None
    modules = [component for component in pipe.components.values() if isinstance(component, nn.Module)]
    assert len(modules) == 4
    for module in modules:
        assert not module.training
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_denoiser_comes_in_the_asked_precision_and_without_gradients(folder: Path) -> None:
    denoiser = components.load_denoiser(folder, "transformer", torch.bfloat16, CPU)
    assert not denoiser.training
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())


@pytest.mark.parametrize("name", ["wan", "kandinsky5_image"])
def test_modules_that_a_network_keeps_in_fp32_are_not_cast_with_the_rest(name: str, tmp_path: Path) -> None:
    denoiser: Any = components.load_denoiser(save_tiny(name, tmp_path), "transformer", torch.bfloat16, CPU)
    kept = set(denoiser._keep_in_fp32_modules)
    found: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    for parameter_name, parameter in denoiser.named_parameters():
        found[bool(kept & set(parameter_name.split(".")))].add(parameter.dtype)
    assert found == {True: {torch.float32}, False: {torch.bfloat16}}


def test_a_pipeline_takes_loaded_denoisers_as_they_are(folder: Path) -> None:
    denoiser = components.load_denoiser(folder, "transformer", torch.float32, CPU).train().requires_grad_(True)
    before = dict(denoiser.named_parameters())
    pipe = components.load_pipeline(get_family("sd3"), folder, torch.bfloat16, CPU, denoisers={"transformer": denoiser})
    assert pipe.transformer is denoiser
    assert denoiser.training
    for name, parameter in denoiser.named_parameters():
        assert parameter is before[name]
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad
    assert pipe.vae.dtype == torch.bfloat16
    assert not pipe.vae.training


def test_configs_are_read_from_the_folder(folder: Path) -> None:
    assert components.read_pipeline_config(folder)["_class_name"] == "StableDiffusion3Pipeline"
    assert components.scheduler_config(folder)["shift"] == 3.0


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no model_index\.json; spec\.model\.source must be a checkpoint"):
        components.read_pipeline_config(tmp_path)


def test_a_damaged_config_is_refused_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": ')
    with pytest.raises(ConfigError, match=r"model_index\.json is no valid JSON"):
        components.read_pipeline_config(tmp_path)


def test_a_checkpoint_of_another_family_is_refused_with_both_names(folder: Path) -> None:
    expected = (
        r"spec\.model\.family is 'flux', which trains checkpoints of FluxPipeline, but .* is a StableDiffusion3Pipeline"
    )
    for attempt in (
        lambda: components.denoiser_names(get_family("flux"), folder),
        lambda: components.load_encoders(get_family("flux"), folder, torch.float32, CPU),
        lambda: components.load_pipeline(get_family("flux"), folder, torch.float32, CPU, denoisers={}),
    ):
        with pytest.raises(ConfigError, match=expected):
            attempt()


def test_a_checkpoint_without_its_denoiser_is_refused(tmp_path: Path) -> None:
    index = {"_class_name": "WanPipeline", "transformer": [None, None], "vae": ["diffusers", "AutoencoderKLWan"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="has no component 'transformer', which family 'wan' trains"):
        components.denoiser_names(get_family("wan"), tmp_path)
    with pytest.raises(ConfigError, match="has no component 'transformer'"):
        components.load_denoiser(tmp_path, "transformer", torch.float32, CPU)


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    known = ", ".join(sorted(NAMES))
    with pytest.raises(ConfigError, match=rf"spec\.model\.family is 'sd9'; allowed are {known}"):
        get_family("sd9")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def no_json(path: Path) -> None:
    path.write_text("{")


BROKEN = {
    "weights cut short": ("transformer/diffusion_pytorch_model.safetensors", cut_short),
    "weights missing": ("transformer/diffusion_pytorch_model.safetensors", Path.unlink),
    "a folder instead of weights": (
        "transformer/diffusion_pytorch_model.safetensors",
        lambda path: (path.unlink(), path.mkdir()),
    ),
    "a config that is no JSON": ("transformer/config.json", no_json),
    "the autoencoder cut short": ("vae/diffusion_pytorch_model.safetensors", cut_short),
    "a text encoder cut short": ("text_encoder/model.safetensors", cut_short),
    "a text encoder without a file": ("text_encoder/model.safetensors", Path.unlink),
    "a tokenizer that is no JSON": ("tokenizer/tokenizer_config.json", no_json),
}


@pytest.mark.parametrize(("file", "damage"), BROKEN.values(), ids=BROKEN)
def test_files_that_are_not_whole_are_the_users_to_mend(
    file: str, damage: Callable[[Path], Any], folder: Path, tmp_path: Path
) -> None:
    """No attempt would find them otherwise: the run fails at once and is not started again."""
    own = Path(shutil.copytree(folder, tmp_path / "base"))
    damage(own / file)
    load = partial(components.load_encoders, get_family("sd3"), own)
    if file.startswith("transformer"):
        load = partial(components.load_denoiser, own, "transformer")
    with pytest.raises(ConfigError, match=r"cannot be loaded \(.*fetch it again, or change spec\.model\.source"):
        load(torch.float32, CPU)


def test_components_that_the_publisher_left_to_be_fetched_elsewhere_are_named(folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "base"))
    index = own / "model_index.json"
    config = json.loads(index.read_text())
    del config["text_encoder_2"], config["tokenizer_2"]
    index.write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=r"has no text_encoder_2, tokenizer_2, which StableDiffusion3Pipeline needs; save"
    ):
        components.load_encoders(get_family("sd3"), own, torch.float32, CPU)


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_weights_that_are_missing_are_named(part: str, folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "base"))
    file = own / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    gone = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, file, metadata={"format": "pt"})
    load = partial(components.load_encoders, get_family("sd3"), own)
    if part == "transformer":
        load = partial(components.load_denoiser, own, part)
    with pytest.raises(ConfigError, match=rf"no weights for 1 tensors of {part}, the first is {re.escape(gone)}"):
        load(torch.float32, CPU)


def test_a_disk_that_fails_is_not_the_users_to_mend(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(diffusers.SD3Transformer2DModel, "from_pretrained", read)
    with pytest.raises(OSError, match="Input/output"):
        components.load_denoiser(folder, "transformer", torch.float32, CPU)
