"""LongCat-Video: text, its own pipeline, and a published index that names a library of the maker's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from atelier_runtime import components
from atelier_runtime.families import get_family
from atelier_runtime.networks import LongCatVideoPipeline
from family_models import published_denoiser, save_tiny, tiny_pipeline

FAMILY = get_family("longcat_video")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline("longcat_video")


@torch.no_grad()
def test_text_is_stored_short_and_collated_to_the_512_tokens_of_the_pipeline(pipe: Any) -> None:
    prompts = ["a", "a fox in fog", ""]
    embeds, mask = pipe.encode_prompt(prompts, device=CPU)
    features = FAMILY.encode_text(pipe, prompts)
    assert len({len(item["embeds"]) for item in features}) == 3
    collated = FAMILY.collate_text(features)
    assert embeds.shape == (3, 512, 24)
    assert torch.equal(collated["mask"], mask.bool())
    assert torch.equal(collated["embeds"], embeds * mask.unsqueeze(-1))


@torch.no_grad()
def test_the_number_of_padding_tokens_changes_the_prediction_so_text_of_another_length_is_wrong(pipe: Any) -> None:
    text = FAMILY.collate_text(FAMILY.encode_text(pipe, ["a fox"]))
    latents = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    whole, short = (
        pipe.dit(latents, torch.tensor([500.0]), text["embeds"][:, :length], text["mask"][:, :length]).sample
        for length in (512, 226)
    )
    assert (whole - short).abs().max() > 1e-5


def test_the_published_network_has_the_published_number_of_parameters() -> None:
    parameters = sum(parameter.numel() for parameter in published_denoiser("longcat_video", "13.6b").parameters())
    assert parameters == pytest.approx(13.6e9, rel=0.01)


@pytest.mark.parametrize("library", ["longcat_video", "diffusers"])
def test_a_checkpoint_loads_whatever_library_its_index_names_for_the_denoiser(tmp_path: Path, library: str) -> None:
    folder = save_tiny("longcat_video", tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    index["dit"] = [library, "LongCatVideoTransformer3DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    config = json.loads((folder / "dit" / "config.json").read_text())
    config |= {"enable_bsa": False, "enable_flashattn2": True, "bsa_params": None, "cp_split_hw": None}  # as published
    (folder / "dit" / "config.json").write_text(json.dumps(config))
    dit = components.load_denoiser(folder, "dit", torch.float32, CPU)
    assert components.load_pipeline(FAMILY, folder, torch.float32, CPU, denoisers={"dit": dit}).dit is dit
    loaded = LongCatVideoPipeline.from_pretrained(str(folder), dtype=torch.bfloat16)
    assert loaded.dit.dtype == loaded.vae.dtype == torch.bfloat16
    for name, tensor in loaded.dit.state_dict().items():
        assert torch.equal(tensor, dit.state_dict()[name].to(torch.bfloat16))


def test_sizes_that_would_be_cut_are_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        pipe("a fox", height=40, width=64, num_frames=5)
    with pytest.raises(ValueError, match="num_frames is 6"):
        pipe("a fox", height=32, width=64, num_frames=6)
