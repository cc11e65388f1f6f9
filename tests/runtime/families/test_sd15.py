"""Stable Diffusion 1.5 and 2.1: what the network predicts, the safety checker, sizes, and LoRA files of both."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors import safe_open

from atelier_api.v1alpha1.objective import Objective
from atelier_runtime import components
from atelier_runtime.checkpoint.export import export_lora
from atelier_runtime.families import get_family
from atelier_runtime.family import Conditions, Stage
from atelier_runtime.objectives import build_objective
from export_runs import PROVENANCE, trained
from family_cases import PROMPTS, make_case
from family_models import PUBLISHED, save_tiny, tiny_pipeline
from stock_loader import draw

FAMILY = get_family("sd15")
LORA = {"type": "lora", "rank": 4, "alpha": 9, "targets": ["all"]}
CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "prediction"), [("sd15", "epsilon"), ("sd21", "v")])
def test_the_target_is_what_the_checkpoints_sampler_takes_for_the_prediction(
    name: str, prediction: str, tmp_path: Path
) -> None:
    """The sampler finds the clean picture in it, at every noise level."""
    scheduler = components.scheduler_config(save_tiny(name, tmp_path))
    objective = build_objective(Objective(), FAMILY.facts, scheduler)
    assert objective.prediction == prediction
    clean = torch.randn(8, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(clean))]
    made = objective.prepare(clean, generators, stage=Stage("unet"), tokens=1)
    sampler = DDIMScheduler.from_config(scheduler, clip_sample=False)
    sampler.set_timesteps(1000)
    found = [
        sampler.step(target, int(time), noisy).pred_original_sample
        for target, time, noisy in zip(made.target, made.time, made.noisy, strict=True)
    ]
    torch.testing.assert_close(torch.stack(found), clean, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_checkpoint_whose_safety_checker_is_not_there_draws_all_the_same(tmp_path: Path) -> None:
    """It would blacken samples, and is neither loaded nor missed."""
    index = save_tiny("sd15", tmp_path) / "model_index.json"
    config = json.loads(index.read_text()) | {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    index.write_text(json.dumps(config))
    denoiser = components.load_denoiser(tmp_path, "unet", torch.float32, CPU)
    pipe = components.load_pipeline(FAMILY, tmp_path, torch.float32, CPU, denoisers={"unet": denoiser})
    assert pipe.safety_checker is None
    picture = pipe(**FAMILY.sampling_arguments(pipe, make_case("sd15").request(1.0, steps=1)), output_type="np").images
    assert picture.any()


@torch.no_grad()
def test_edges_need_be_multiples_of_8_pixels_only() -> None:
    """The UNet halves them further, and fits what it doubles again to what it had."""
    unet = tiny_pipeline("sd15").unet
    conditions = Conditions(text={"embeds": torch.randn(1, 16, 16)}, sizes=torch.zeros(1, 6))
    noisy = torch.randn(1, 4, 9, 5)
    assert FAMILY.predict(unet, noisy, torch.tensor([500]), conditions).shape == noisy.shape


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_a_lora_with_kohyas_names_draws_what_the_training_side_draws(name: str, tmp_path: Path) -> None:
    """Of 1.5 the projections around a transformer are convolutions, of 2.1 linear layers."""
    result = trained(name, tmp_path, LORA, publish={"formats": ["kohya"]})
    [file] = export_lora(result.weights, result.file, FAMILY, tmp_path, provenance=PROVENANCE)
    with safe_open(file.path, framework="pt") as tensors:
        shape = tensors.get_slice("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight").get_shape()
    assert len(shape) == (4 if name == "sd15" else 2)
    ours = result.picture()
    pipe = tiny_pipeline(name)
    base = draw(pipe, result.arguments)
    pipe.load_lora_weights(file.path.parent, weight_name=file.path.name)
    loaded = draw(pipe, result.arguments)
    assert abs(loaded - ours).max() <= 1e-5
    assert abs(loaded - base).max() > 1e-3


def test_the_header_of_a_result_tells_1_from_2_and_512_pixels_from_768() -> None:
    found = {name: FAMILY.architecture(config) for name, (_, config) in PUBLISHED["sd15"].denoisers.items()}
    assert found == {
        "1.5": "stable-diffusion-v1",
        "2.1": "stable-diffusion-v2-768-v",
        "2.1-base": "stable-diffusion-v2-512",
    }


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_text_is_the_encoders_last_layer_with_its_norm(name: str) -> None:
    pipe = tiny_pipeline(name)
    ids = pipe.tokenizer(PROMPTS[0], padding="max_length", return_tensors="pt").input_ids
    [features] = FAMILY.encode_text(pipe, PROMPTS[:1])
    torch.testing.assert_close(features["embeds"], pipe.text_encoder(ids).last_hidden_state[0])
