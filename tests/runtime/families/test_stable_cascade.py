"""Stable Cascade: the sampler's cosine, latents of three quarters of the picture, pictures by stage B, a folder put together."""

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, StableCascadeCombinedPipeline, StableCascadePriorPipeline, StableCascadeUNet
from safetensors.torch import save_file

from atelier_api.errors import ConfigError
from atelier_api.families import FAMILIES
from atelier_api.model_files import lora_loading
from atelier_api.v1alpha1.adapter import LoraAdapter
from atelier_api.v1alpha1.objective import Objective
from atelier_runtime import adapters, components, networks
from atelier_runtime.checkpoint.export import export_lora
from atelier_runtime.families import get_family
from atelier_runtime.family import Stage
from atelier_runtime.networks import StableCascadePipeline
from atelier_runtime.objectives import build_objective
from export_runs import PROVENANCE, trained
from family_cases import Case, make_case
from family_models import published_denoiser, save_tiny, tiny_pipeline
from family_models.stable_cascade import efficientnet, stage_c
from stock_loader import draw

FAMILY = get_family("stable_cascade")
CPU = torch.device("cpu")
PAGE = Path(__file__).parents[3] / "docs" / "models" / "stable-cascade.md"


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("stable_cascade")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("stable_cascade", tmp_path_factory.mktemp("whole"))


@pytest.fixture
def without_decoder(tmp_path: Path) -> Path:
    pipe = tiny_pipeline("stable_cascade")
    pipe.register_modules(decoder=None, vqgan=None)
    pipe.save_pretrained(tmp_path)
    return tmp_path


# --- noise, latents, text ---------------------------------------------------------------------------------------------


def test_noise_of_training_grows_by_the_samplers_cosine_and_not_by_linear_betas(case: Case, folder: Path) -> None:
    clean = case.latents(2)
    objective = build_objective(Objective(), FAMILY.facts, components.scheduler_config(folder))
    made = objective.prepare(
        clean, [torch.Generator().manual_seed(seed) for seed in (0, 1)], stage=Stage("prior"), tokens=18
    )
    torch.testing.assert_close(made.noisy, case.pipe.scheduler.add_noise(clean, made.target, made.time))
    linear = DDPMScheduler().add_noise(clean, made.target, (made.time * 999).long())
    assert (made.noisy - linear).abs().max() > 0.1


def test_a_checkpoint_with_a_schedule_of_betas_is_refused() -> None:
    config = {"_class_name": "DDPMScheduler", "beta_schedule": "linear"}
    with pytest.raises(ConfigError, match="the checkpoint's scheduler is DDPMScheduler"):
        build_objective(Objective(), FAMILY.facts, config)


@torch.no_grad()
def test_the_encoder_is_shown_three_quarters_of_the_picture_as_imagenet_has_it(case: Case) -> None:
    seen: list[torch.Tensor] = []
    handle = case.pipe.effnet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    left_white = torch.full((1, 3, 256, 384), -1.0)
    left_white[..., :192] = 1.0
    latents = FAMILY.encode_pixels(case.pipe, left_white)
    handle.remove()
    assert seen[0].shape == (1, 3, 192, 288)
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        torch.testing.assert_close(seen[0][0, channel, 7, 10].item(), (1 - mean) / std)
        torch.testing.assert_close(seen[0][0, channel, 7, 200].item(), -mean / std)
    assert latents.std is None
    assert latents.mean.shape == (1, 16, 6, 9)  # ceil(256 / 42.67), ceil(384 / 42.67)


@pytest.mark.parametrize(("width", "height"), [(128, 128), (1024, 1024), (1152, 896), (3968, 128), (4096, 4096)])
def test_latents_of_every_size_are_as_many_as_the_pipeline_draws(width: int, height: int) -> None:
    drawn = StableCascadePriorPipeline(None, None, stage_c(), None).prepare_latents(
        1, height, width, 1, torch.float32, CPU, None, None, DDPMWithoutScale()
    )
    facts = FAMILY.facts
    assert drawn.shape == (1, 16, height // facts.latent_factor, width // facts.latent_factor)
    assert facts.latent_tokens(width, height) == drawn.shape[2] * drawn.shape[3]


class DDPMWithoutScale:
    init_noise_sigma = 1.0


@torch.no_grad()
def test_text_is_padded_as_in_the_pipeline_and_another_length_is_another_prediction(case: Case) -> None:
    pipe = case.pipe
    features = FAMILY.encode_text(pipe, ["a fox", "a very long caption of letters"])
    assert [item["embeds"].shape for item in features] == [(16, 24)] * 2
    assert [item["pooled"].shape for item in features] == [(1, 20)] * 2
    noisy, time, _ = case.noised(case.latents(1), (0.5,))
    conditions = case.conditions(["a fox"])
    whole = FAMILY.predict(pipe.prior, noisy, time, conditions)
    conditions.text["embeds"] = conditions.text["embeds"][:, :8]
    assert (FAMILY.predict(pipe.prior, noisy, time, conditions) - whole).abs().max() > 1e-5


@torch.no_grad()
def test_a_time_in_bf16_is_another_time(case: Case) -> None:
    """Why bf16 is refused: what the pipeline would sample with."""
    noisy, _, _ = case.noised(case.latents(1), (0.5,))
    conditions = case.conditions(["a fox"])
    exact = torch.tensor([0.683])
    rounded = exact.bfloat16().float()
    first, second = (case.pipe.prior.get_timestep_ratio_embedding(time) for time in (exact, rounded))
    assert (first - second).abs().max() > 0.5
    predictions = [FAMILY.predict(case.pipe.prior, noisy, time, conditions) for time in (exact, rounded)]
    assert (predictions[0] - predictions[1]).abs().max() > 1e-3


def test_dropout_of_the_published_network_trains_and_does_not_sample(case: Case) -> None:
    model = stage_c(dropout=0.1)
    adapters.install(model, LoraAdapter(rank=4, targets=["all"]), FAMILY)
    conditions = case.conditions(["a fox"])
    noisy, time, target = case.noised(case.latents(1), (0.5,))

    def gradients(seed: int, recompute: bool) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        model.zero_grad()
        (model.enable_gradient_checkpointing if recompute else model.disable_gradient_checkpointing)()
        (FAMILY.predict(model, noisy, time, conditions) - target).square().mean().backward()
        return [p.grad.clone() for p in adapters.trainable(model).values() if p.grad is not None]

    kept, recomputed, other = gradients(0, False), gradients(0, True), gradients(1, False)
    for one, same in zip(kept, recomputed, strict=True):
        torch.testing.assert_close(one, same)
    assert any(not torch.equal(one, another) for one, another in zip(kept, other, strict=True))
    model.eval()
    with torch.no_grad():
        assert torch.equal(*(FAMILY.predict(model, noisy, time, conditions) for _ in range(2)))


# --- samples ----------------------------------------------------------------------------------------------------------


def test_a_sample_is_the_picture_of_the_stock_combined_pipeline(case: Case) -> None:
    pipe = case.pipe
    stock = StableCascadeCombinedPipeline(
        tokenizer=pipe.tokenizer,
        text_encoder=pipe.text_encoder,
        decoder=pipe.decoder,
        scheduler=type(pipe.scheduler)(),
        vqgan=pipe.vqgan,
        prior_prior=pipe.prior,
        prior_text_encoder=pipe.text_encoder,
        prior_tokenizer=pipe.tokenizer,
        prior_scheduler=type(pipe.scheduler)(),
    )
    stock.set_progress_bar_config(disable=True)
    arguments = FAMILY.sampling_arguments(pipe, case.request(3.0, steps=3))
    ours = pipe(**arguments, output_type="np")[0]
    theirs = stock(
        "a fox",
        width=256,
        height=128,
        prior_num_inference_steps=3,
        prior_guidance_scale=3.0,
        num_inference_steps=10,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images
    assert ours.shape == (1, 128, 256, 3)
    assert abs(ours - theirs).max() < 1e-5
    assert ours.std() > 1e-3


@torch.no_grad()
def test_the_decoder_is_given_the_latents_that_training_is_on(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    latents, seen = case.latents(1), []
    handle = case.pipe.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["effnet"]), with_kwargs=True
    )
    result = type("Step", (), {"prev_sample": latents})
    monkeypatch.setattr(case.pipe.scheduler, "step", lambda *_, **__: result)
    case.pipe(**FAMILY.sampling_arguments(case.pipe, case.request(1.0, steps=1)), output_type="np")
    handle.remove()
    assert all(torch.equal(each, latents) for each in seen)
    assert len(seen) == 10


def test_without_a_decoder_latents_are_drawn_and_pictures_are_refused(case: Case, without_decoder: Path) -> None:
    prior = components.load_denoiser(without_decoder, "prior", torch.float32, CPU)
    pipe = components.load_pipeline(FAMILY, without_decoder, torch.float32, CPU, denoisers={"prior": prior})
    arguments = FAMILY.sampling_arguments(pipe, case.request(1.0, steps=1))
    assert pipe(**arguments, output_type="latent")[0].shape == (1, 16, 3, 6)
    with pytest.raises(ValueError, match="there is no decoder and vqgan"):
        pipe(**arguments)
    with pytest.raises(ConfigError, match=r"has no decoder and no vqgan.*docs/models/stable-cascade\.md"):
        FAMILY.check_sampling(components.read_pipeline_config(without_decoder))


def test_a_checkpoint_with_a_decoder_is_not_refused(folder: Path) -> None:
    FAMILY.check_sampling(components.read_pipeline_config(folder))


# --- checkpoints ------------------------------------------------------------------------------------------------------


def changed_index(folder: Path, **entries: Any) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index |= entries
    (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if v is not None}))


def test_the_pipelines_library_has_the_denoiser_too_since_results_are_loaded_from_there(folder: Path) -> None:
    name = components.read_pipeline_config(folder)["prior"][1]
    assert getattr(import_module(FAMILY.facts.library), name) is StableCascadeUNet


def test_the_published_folder_lacks_the_encoder_and_says_so(tmp_path: Path) -> None:
    save_tiny("stable_cascade", tmp_path)
    changed_index(tmp_path, _class_name="StableCascadePriorPipeline", effnet=None, decoder=None, vqgan=None)
    with pytest.raises(ConfigError, match="has no effnet, which StableCascadePipeline needs"):
        components.load_encoders(FAMILY, tmp_path, torch.float32, CPU)


def test_the_published_folder_with_the_encoder_added_loads_whatever_libraries_its_index_names(
    case: Case, tmp_path: Path
) -> None:
    save_tiny("stable_cascade", tmp_path)
    changed_index(
        tmp_path,
        _class_name="StableCascadePriorPipeline",
        resolution_multiple=42.67,
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        effnet=["somewhere", "EfficientNetEncoder"],
        vqgan=["wuerstchen", "PaellaVQModel"],
    )
    pipe = components.load_encoders(FAMILY, tmp_path, torch.float32, CPU)
    assert isinstance(pipe, StableCascadePipeline)
    for name in ("effnet", "vqgan"):
        expected = getattr(case.pipe, name).state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in getattr(pipe, name).state_dict().items())
        assert not getattr(pipe, name).training


def test_a_folder_is_put_together_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline("stable_cascade")
    prior = tmp_path / "stabilityai" / "stable-cascade-prior"
    StableCascadePriorPipeline(pipe.tokenizer, pipe.text_encoder, pipe.prior, pipe.scheduler).save_pretrained(prior)
    for name in ("decoder", "vqgan"):
        getattr(pipe, name).save_pretrained(tmp_path / "stabilityai" / "stable-cascade" / name)
    save_file(pipe.effnet.state_dict(), tmp_path / "effnet_encoder.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(networks, "EfficientNetEncoder", lambda: efficientnet())  # of the published size otherwise
    program = next(
        code for code in re.findall(r"(?:^    .*\n|^\n)+", PAGE.read_text(), re.MULTILINE) if "effnet_encoder" in code
    )
    exec("\n".join(line[4:] for line in program.splitlines()), {})
    made = components.load_encoders(FAMILY, tmp_path / "checkpoint", torch.float32, CPU)
    FAMILY.check_sampling(components.read_pipeline_config(tmp_path / "checkpoint"))
    assert components.denoiser_names(FAMILY, tmp_path / "checkpoint") == ("prior",)
    for name in ("effnet", "decoder", "vqgan", "text_encoder"):
        expected = getattr(pipe, name).state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in getattr(made, name).state_dict().items())


@pytest.mark.parametrize(("flavour", "billions"), [("3.6b", 3.6), ("1b", 1.0)])
def test_the_published_networks_have_the_published_number_of_parameters(flavour: str, billions: float) -> None:
    parameters = sum(parameter.numel() for parameter in published_denoiser("stable_cascade", flavour).parameters())
    assert round(parameters / 1e9, 1) == billions


@pytest.mark.parametrize("stock", [False, True], ids=["the whole pipeline", "the stock pipeline of stage C"])
@torch.no_grad()
def test_an_exported_lora_draws_what_the_training_side_draws_loaded_as_the_report_says(
    tmp_path: Path, stock: bool
) -> None:
    adapter = {"type": "lora", "rank": 4, "alpha": 9, "targets": ["all"]}
    result = trained("stable_cascade", tmp_path, adapter, publish={"formats": ["diffusers"]})
    files = export_lora(result.weights, result.file, FAMILY, tmp_path, provenance=PROVENANCE)
    ours = result.picture()
    whole = tiny_pipeline("stable_cascade")
    base = draw(whole, result.arguments)
    pipe = whole.prior_pipeline() if stock else whole
    lines = lora_loading(FAMILIES["stable_cascade"], str(files[0].path.parent), files[0].path.name)
    exec("\n".join(lines), {"pipe": pipe})
    loaded = draw(whole, result.arguments)
    assert abs(loaded - ours).max() <= 1e-5
    assert abs(loaded - base).max() > 1e-3
