"""Kandinsky 5.0 Image: captions of their own length without a mask, unshifted latents, any size, and what is refused."""

import io
from pathlib import Path

import pytest
import torch
from diffusers import Kandinsky5Transformer3DModel
from PIL import Image

from atelier_api.errors import ConfigError
from atelier_runtime.families import get_family
from atelier_runtime.parallel import Distributed
from atelier_runtime.sampling import draw_samples
from export_runs import run_file
from family_cases import PROMPTS, Case, make_case
from family_models import save_tiny
from family_models.parts import seeded

FAMILY = get_family("kandinsky5_image")


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("kandinsky5_image")


@torch.no_grad()
def test_captions_are_what_the_pipeline_encodes_of_each_alone_and_40_tokens_are_dropped(case: Case) -> None:
    assert "Describe the image by detailing" in case.pipe.prompt_template
    features = FAMILY.encode_text(case.pipe, PROMPTS)
    for prompt, item in zip(PROMPTS, features, strict=True):
        embeds, pooled, _ = case.pipe.encode_prompt([prompt])
        assert torch.equal(item["embeds"], embeds[0])
        assert torch.equal(item["pooled"], pooled[0])
        whole = case.pipe.tokenizer(case.pipe.prompt_template.format(prompt)).input_ids
        assert len(item["embeds"]) == len(whole) - 40
    assert len({len(item["embeds"]) for item in features}) == 2


@torch.no_grad()
def test_a_long_caption_is_cut_at_512_tokens_and_not_at_256(case: Case) -> None:
    (features,) = FAMILY.encode_text(case.pipe, ["z" * 2000])
    assert len(features["embeds"]) == 512


@torch.no_grad()
def test_the_shift_of_the_autoencoder_is_left_out_as_in_the_pipeline(case: Case) -> None:
    pixels = case.pixels(1)
    config = case.pipe.vae.config
    assert config.shift_factor
    expected = case.pipe.vae.encode(pixels).latent_dist.mean * config.scaling_factor
    torch.testing.assert_close(FAMILY.encode_pixels(case.pipe, pixels).mean, expected)


def test_there_are_as_many_calls_as_samples_whatever_the_lengths(case: Case) -> None:
    """Under sharding every call gathers weights from all ranks, and another rank may have captions of other lengths."""
    noisy, time, _ = case.noised(case.latents(2), (0.3, 0.9))
    for prompts in (["a fox", "a fox"], list(PROMPTS)):
        batches: list[int] = []
        handle = case.pipe.transformer.register_forward_pre_hook(
            lambda _, args, kwargs, seen=batches: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
        with torch.no_grad():
            FAMILY.predict(case.pipe.transformer, noisy, time, case.conditions(prompts))
        handle.remove()
        assert batches == [1, 1]


def test_a_size_beside_the_seven_of_the_pipeline_is_drawn_as_asked() -> None:
    case = make_case("kandinsky5_image")
    published = list(case.pipe.resolutions)
    assert len(published) == 7
    request = case.request(None, steps=1)
    for _ in range(2):
        picture = case.pipe(**FAMILY.sampling_arguments(case.pipe, request), output_type="pil").image[0]
        assert picture.size == (request.width, request.height)
    assert case.pipe.resolutions == [*published, (request.width, request.height)]


def test_a_run_draws_its_validation_prompts(tmp_path: Path) -> None:
    """This pipeline calls its output `image` where others call it `images`."""
    case = make_case("kandinsky5_image")
    save_tiny("kandinsky5_image", tmp_path)
    validation = {"prompts": [{"text": "a fox"}], "steps": 1, "width": 48, "height": 32}
    file = run_file("kandinsky5_image", tmp_path, {"type": "lora"}, validation=validation)
    pictures = draw_samples(file, FAMILY, case.denoisers, Distributed(0, 0, 1, torch.device("cpu")))
    assert Image.open(io.BytesIO(pictures[0])).size == (48, 32)


def test_a_denoiser_that_takes_a_picture_is_refused(case: Case) -> None:
    config = {key: value for key, value in case.pipe.transformer.config.items() if not key.startswith("_")}
    editing = seeded(lambda: Kandinsky5Transformer3DModel(**config | {"visual_cond": True}))
    with pytest.raises(ConfigError, match=r"takes a picture beside the noise .*: set spec.model.source to a T2I"):
        FAMILY.predict(editing, torch.zeros(1, 16, 4, 4), torch.ones(1), case.conditions(["a fox"]))


@pytest.mark.parametrize(("height", "width"), [(512, 768), (1024, 1024)], ids=str)
def test_positions_of_a_picture_are_not_scaled_as_those_of_a_clip(case: Case, height: int, width: int) -> None:
    """At edges of 480 to 854 a clip's are divided by 2, which the pipeline of pictures does not do."""
    told: list[tuple[float, ...]] = []
    handle = case.pipe.transformer.visual_rope_embeddings.register_forward_pre_hook(
        lambda _, args: told.append(tuple(args[2]))
    )
    with torch.no_grad():
        FAMILY.predict(
            case.pipe.transformer,
            torch.zeros(1, 16, height // 8, width // 8),
            torch.ones(1),
            case.conditions(PROMPTS[:1]),
        )
    handle.remove()
    assert told == [(1.0, 1.0, 1.0)]
