"""Words learnt by the real text encoders of a tiny SDXL: what trains, what does not, and what others make of the file."""

import copy
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from atelier_api.errors import ConfigError
from atelier_api.model_files import inversion_loading
from atelier_api.v1alpha1.adapter import TextualInversionAdapter
from atelier_runtime import components
from atelier_runtime.adapters import AdapterReport, install, show_tokens, trainable
from atelier_runtime.checkpoint.export_tokens import export_tokens
from atelier_runtime.checkpoint.exported_file import Provenance
from atelier_runtime.families import get_family
from atelier_runtime.family import Conditions, Features
from export_runs import run_file
from family_models import save_tiny

SDXL = get_family("sdxl")
DEVICE = torch.device("cpu")
TOKENS = [
    {"token": "<fox>", "initializer": "f", "vectors": 3},
    {"token": "<red-hat>", "initializer": "hat", "vectors": 4},
    {"token": "<ink>", "initializer": "i"},
]
ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}


def inversion(*tokens: Mapping[str, Any]) -> TextualInversionAdapter:
    return TextualInversionAdapter.model_validate({"type": "textual-inversion", "tokens": tokens or TOKENS})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    save_tiny("sdxl", folder)
    return folder


class Installed:
    """A denoiser with the adapter on, and the encoders that learn."""

    def __init__(
        self, base: Path, adapter: TextualInversionAdapter, *, dtype: torch.dtype = torch.float32, pipe: Any = None
    ) -> None:
        self.pipe = pipe or components.load_encoders(SDXL, base, dtype, DEVICE)
        self.adapter = adapter
        self.unet: Any = components.load_denoiser(base, "unet", dtype, DEVICE)
        self.report: AdapterReport = install(self.unet, adapter, SDXL, load_encoders=lambda: self.pipe)

    @property
    def rows(self) -> dict[str, Tensor]:
        return {name.rpartition(".")[2]: parameter for name, parameter in trainable(self.unet).items()}

    def encode(self, *captions: str) -> Features:
        assert self.report.encode is not None
        return self.report.encode(captions)

    def predict(self, text: Features) -> Tensor:
        """The denoiser's answer to fixed noise, which is the same for every sample."""
        count = len(text["embeds"])
        noisy = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(5)).expand(count, 4, 4, 4)
        sizes = torch.tensor([[32, 32, 0, 0, 32, 32]]).repeat(count, 1)
        return SDXL.predict(self.unet, noisy, torch.full((count,), 400), Conditions(text, sizes))

    def disturb(self) -> None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for rows in self.rows.values():
                rows += torch.randn(rows.shape, generator=generator) * rows.std()


@pytest.fixture
def learning(base: Path) -> Installed:
    return Installed(base, inversion())


def embedding_of(pipe: Any, key: str) -> nn.Embedding:
    embedding: nn.Embedding = getattr(pipe, ENCODERS[key]).get_input_embeddings()
    return embedding


def test_rows_and_nothing_else_are_trained_and_the_report_counts_them(learning: Installed) -> None:
    assert {name: rows.shape for name, rows in learning.rows.items()} == {"clip_l": (8, 16), "clip_g": (8, 16)}
    assert learning.report.trainable == 2 * 8 * 16
    assert learning.report.modules == {"<fox>": 3, "<red-hat>": 4, "<ink>": 1}
    assert not any(p.requires_grad for name in ENCODERS.values() for p in getattr(learning.pipe, name).parameters())


def test_a_placeholder_starts_as_its_initializer(base: Path, learning: Installed) -> None:
    plain = components.load_encoders(SDXL, base, torch.float32, DEVICE)
    told = SDXL.collate_text(SDXL.encode_text(plain, ["a f f f b", "hath i"]))
    learnt = learning.encode("a <fox> b", "<red-hat> <ink>")
    # `hat` is three tokens in turns: h a t h; the last one ends a word in the plain caption.
    for key in told:
        torch.testing.assert_close(learnt[key][0], told[key][0])
    start = learning.pipe.tokenizer("hat", add_special_tokens=False).input_ids
    for key, rows in learning.rows.items():
        assert torch.equal(rows[3:7], embedding_of(plain, key).weight[[*start, start[0]]])
    torch.testing.assert_close(learning.predict(learnt)[:1], learning.predict(told)[:1])


def test_the_gradient_is_of_the_rows_that_a_caption_has(base: Path, learning: Installed) -> None:
    learning.predict(learning.encode("a <fox> <ink>")).square().sum().backward()
    for name, rows in learning.rows.items():
        assert rows.grad is not None
        assert [bool(row.any()) for row in rows.grad] == [True] * 3 + [False] * 4 + [True], name
    frozen = [p for name, p in learning.unet.named_parameters() if "textual_inversion" not in name]
    frozen += [p for name in ENCODERS.values() for p in getattr(learning.pipe, name).parameters()]
    assert all(parameter.grad is None for parameter in frozen)


def test_after_training_every_other_row_and_weight_is_the_checkpoints_to_the_bit(
    base: Path, learning: Installed
) -> None:
    before = {key: rows.detach().clone() for key, rows in learning.rows.items()}
    optimizer = torch.optim.AdamW(trainable(learning.unet).values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        learning.predict(learning.encode("<fox> in a <red-hat>", "<ink>")).square().sum().backward()
        optimizer.step()
    assert all((rows != before[key]).all() for key, rows in learning.rows.items())
    plain = components.load_encoders(SDXL, base, torch.float32, DEVICE)
    for name in ENCODERS.values():
        weights = dict(getattr(learning.pipe, name).named_parameters())
        for key, weight in getattr(plain, name).named_parameters():
            assert torch.equal(weights[key][: len(weight)], weight), key
    unet = components.load_denoiser(base, "unet", torch.float32, DEVICE)
    trained_unet = dict(learning.unet.named_parameters())
    assert [key for key, weight in unet.named_parameters() if not torch.equal(trained_unet[key], weight)] == []


def test_a_batch_of_two_is_two_alone(learning: Installed) -> None:
    captions = ("a <fox>", "<ink> and <fox> in a <red-hat>")
    learning.disturb()

    def gradients(*batch: str) -> dict[str, Tensor]:
        learning.unet.zero_grad()
        learning.predict(learning.encode(*batch)).square().sum().backward()
        return {key: rows.grad.clone() for key, rows in learning.rows.items() if rows.grad is not None}

    together, first, second = gradients(*captions), gradients(captions[0]), gradients(captions[1])
    for key, gradient in together.items():
        torch.testing.assert_close(gradient, first[key] + second[key], atol=1e-6, rtol=1e-4)


def test_recomputing_the_denoiser_changes_no_gradient(learning: Installed) -> None:
    found = []
    for recompute in (False, True):
        learning.unet.zero_grad()
        if recompute:
            learning.unet.enable_gradient_checkpointing()
        learning.predict(learning.encode("a <fox> <ink>")).square().sum().backward()
        found.append([rows.grad.clone() for rows in learning.rows.values() if rows.grad is not None])
    for once, again in zip(*found, strict=True):
        torch.testing.assert_close(again, once, atol=1e-7, rtol=1e-5)


def test_it_finds_the_words_that_drew_a_prediction(base: Path) -> None:
    """An overfit: what the denoiser says to one word is learnt by another that starts elsewhere."""
    learning = Installed(base, inversion({"token": "<fox>", "initializer": "a"}))
    with torch.no_grad():
        wanted = learning.predict(learning.encode("q b"))
    optimizer = torch.optim.AdamW(trainable(learning.unet).values(), lr=0.01, weight_decay=0.0)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (learning.predict(learning.encode("<fox> b")) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0], (losses[0], losses[-1])


def exported(learning: Installed, base: Path, folder: Path) -> dict[str, Path]:
    spec = json.loads(learning.adapter.model_dump_json(by_alias=True))
    weights = {"unet": {name: rows.detach().clone() for name, rows in trainable(learning.unet).items()}}
    run = run_file("sdxl", base, spec)
    files = export_tokens(
        weights, run, SDXL, folder, provenance=Provenance(step=7, date=datetime(2025, 1, 2, tzinfo=UTC))
    )
    assert all(file.format == "diffusers" for file in files)
    return {file.path.name: file.path for file in files}


def stock(base: Path, adapter: TextualInversionAdapter, files: Mapping[str, Path]) -> Any:
    """The stock pipeline with each file loaded by the lines that users are shown."""
    pipe: Any = diffusers.StableDiffusionXLPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    for token, path in zip(adapter.tokens, files.values(), strict=True):
        exec("\n".join(inversion_loading(SDXL.facts, token.token, str(path))), {"pipe": pipe})
    return pipe


@pytest.mark.parametrize("end_token", [None, 2], ids=["end token", "old end token"])
def test_the_stock_pipeline_reads_the_file_as_training_read_the_captions(
    base: Path, tmp_path: Path, end_token: int | None
) -> None:
    """The published checkpoints name an end token of 2, for which CLIP pools at the highest number of a caption: a new word's."""
    if end_token is not None:
        folder = tmp_path / "base"
        save_tiny("sdxl", folder)
        for name in ENCODERS.values():
            config = folder / name / "config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": end_token}))
        base = folder
    learning = Installed(base, inversion())
    learning.disturb()
    files = exported(learning, base, tmp_path / "out")
    assert list(files) == ["fox.safetensors", "red-hat.safetensors", "ink.safetensors"]
    with safe_open(files["red-hat.safetensors"], framework="pt") as file:
        assert sorted(file.keys()) == ["clip_g", "clip_l"]
        facts = file.metadata()
    assert facts["modelspec.architecture"] == "stable-diffusion-xl-v1-base/textual-inversion"
    assert (facts["atelier.token"], facts["atelier.step"]) == ("<red-hat>", "7")
    pipe = stock(base, learning.adapter, files)
    captions = ["a <fox> in a <red-hat>", "<ink>"]
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=True)
        ours = learning.encode(*captions)
        untouched = SDXL.encode_text(components.load_encoders(SDXL, base, torch.float32, DEVICE), captions)
        torch.testing.assert_close(embeds, ours["embeds"])
        torch.testing.assert_close(pooled, ours["pooled"])
        torch.testing.assert_close(
            pipe.unet(
                torch.zeros(2, 4, 4, 4),
                torch.tensor([400, 400]),
                encoder_hidden_states=embeds,
                added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.zeros(2, 6)},
            ).sample,
            learning_prediction(learning, ours),
        )
    assert (embeds[0] - untouched[0]["embeds"]).abs().max() > 0.1


def learning_prediction(learning: Installed, text: Features) -> Tensor:
    conditions = Conditions(text, torch.zeros(2, 6))
    return SDXL.predict(learning.unet, torch.zeros(2, 4, 4, 4), torch.tensor([400, 400]), conditions)


def picture(pipe: Any) -> np.ndarray:
    output = pipe(
        "a <fox> in a <red-hat>",
        width=32,
        height=32,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    )
    return np.asarray(output.images)


def test_samples_of_training_are_those_of_the_loaded_files(base: Path, tmp_path: Path, learning: Installed) -> None:
    learning.disturb()
    pipe = components.load_pipeline(SDXL, base, torch.float32, DEVICE, denoisers={"unet": learning.unet})
    pipe.set_progress_bar_config(disable=True)
    before = copy.deepcopy(torch.get_rng_state())
    show_tokens(pipe, learning.adapter, SDXL, {"unet": learning.unet})
    assert torch.equal(torch.get_rng_state(), before)
    loaded = stock(base, learning.adapter, exported(learning, base, tmp_path))
    assert np.array_equal(picture(pipe), picture(loaded))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_train_in_their_own_precision_under_encoders_in_bf16(base: Path, dtype: torch.dtype) -> None:
    pipe = components.load_encoders(SDXL, base, torch.bfloat16, DEVICE)
    unet: Any = components.load_denoiser(base, "unet", torch.bfloat16, DEVICE)
    report = install(unet, inversion(), SDXL, dtype=dtype, load_encoders=lambda: pipe)
    assert report.encode is not None
    text = report.encode(["a <fox>"])
    assert {tensor.dtype for tensor in text.values()} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        conditions = Conditions(text, torch.zeros(1, 6))
        SDXL.predict(unet, torch.zeros(1, 4, 4, 4), torch.tensor([400]), conditions).float().square().sum().backward()
    for rows in trainable(unet).values():
        assert rows.dtype == dtype
        assert rows.grad is not None
        assert rows.grad[:3].any()


REFUSED: dict[str, tuple[Sequence[Mapping[str, Any]], str]] = {
    "fewer vectors than tokens": (
        [{"token": "<fox>", "initializer": "red", "vectors": 2}],
        r"spec\.adapter\.tokens\[\]\.vectors of <fox> is 2; must be 3–14: its initializer 'red' has 3 tokens",
    ),
    "more vectors than a caption has room for": (
        [{"token": "<fox>", "initializer": "f", "vectors": 15}],
        r"vectors of <fox> is 15; must be 1–14: its initializer 'f' has 1 token,",
    ),
    "an initializer without a word": (
        [{"token": "<fox>", "initializer": " "}],
        r"initializer of <fox> is ' ', in which the checkpoint's tokenizer finds no word",
    ),
    "an initializer of unknown letters": (
        [{"token": "<fox>", "initializer": "7"}],
        r"initializer of <fox> is '7', in which the checkpoint's tokenizer finds no word, or one that it does not know",
    ),
}


@pytest.mark.parametrize(("tokens", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_learnt_is_refused(base: Path, tokens: Sequence[Mapping[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Installed(base, inversion(*tokens))


def test_a_word_of_the_checkpoint_is_refused_as_a_placeholder(base: Path) -> None:
    pipe = components.load_encoders(SDXL, base, torch.float32, DEVICE)
    pipe.tokenizer.add_tokens("<ink>")
    with pytest.raises(ConfigError, match=r"spec\.adapter\.tokens has <ink>, which is a token of the checkpoint"):
        Installed(base, inversion(), pipe=pipe)
