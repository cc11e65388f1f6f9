"""What fields must be to the model family: one row for each rule, refused and accepted."""

from dataclasses import replace
from typing import Any

import pytest

from atelier_api.cel import spec_rules
from atelier_api.families import FAMILIES
from atelier_api.family_rules import bucket_alignment
from atelier_api.quantizations import QUANTIZATIONS, Quantization
from atelier_api.read import problems
from atelier_api.rules import notes
from atelier_api.v1alpha1 import TrainingRun
from run_documents import document

WAN = {"family": "wan", "source": "base"}
SDXL = {"family": "sdxl", "source": "base"}
CONTINUED = {"family": "longcat_video_edit", "source": "base"}
KONTEXT = {"family": "flux_kontext", "source": "base"}
LONGCAT_EDIT = {"family": "longcat_image_edit", "source": "base"}
CASCADE = {"family": "stable_cascade", "source": "base"}
PROMPTS = [{"text": "a cat"}]
SHOWN = [{"text": "a cat", "image": "a.png"}]
CONTROLNET = {"type": "controlnet"}
CONDITIONED = [{"uri": "a", "conditioning": "edges"}]
NEGATIVE = [{"text": "a cat", "negative": "b"}]

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "frames that a family cannot have": (
        {"model": WAN, "data__clip__frames": 48},
        "spec.data.clip.frames is 48; must be 4n+1 for wan, for example 45 or 49",
    ),
    "frames of a sample": (
        {"model": WAN, "validation": {"prompts": PROMPTS, "frames": 2}},
        "spec.validation.frames is 2; must be 4n+1 for wan, for example 1 or 5",
    ),
    "several first frames for a family that is shown one": (
        {"model": WAN, "data__clip__shownFrames": 5},
        "spec.data.clip.shownFrames is 5; wan continues no clips; remove it, or train longcat_video_edit",
    ),
    "first frames between latents": (
        {"model": CONTINUED, "data__clip__shownFrames": 12},
        "spec.data.clip.shownFrames is 12; must be 4n+1 for longcat_video_edit, for example 9 or 13",
    ),
    "first frames that leave nothing to train on": (
        {"model": CONTINUED, "data__clip": {"frames": 13, "shownFrames": 13}},
        "spec.data.clip.shownFrames is 13; must be less than spec.data.clip.frames, which is 13",
    ),
    "first frames that leave nothing to draw": (
        {
            "model": CONTINUED,
            "data__clip__shownFrames": 13,
            "validation": {"prompts": [{"text": "a cat", "image": "a.mp4"}], "frames": 9},
        },
        "spec.data.clip.shownFrames is 13; must be less than spec.validation.frames, which is 9",
    ),
    "bucket edges between the family's": (
        {"data__bucketAlign": 40},
        "spec.data.bucketAlign is 40; must be a multiple of 16 for flux, for example 48",
    ),
    "pictures smaller than a bucket": (
        {"data__resolution": 96, "data__bucketAlign": 128},
        "spec.data.resolution is 96; must be at least 128, the alignment of the buckets",
    ),
    "bf16 of a family that loses its times in it": (
        {"model": CASCADE, "hyperparameters__precision": "bf16"},
        "spec.hyperparameters.precision is 'bf16'; must be fp32 for stable_cascade: ",
    ),
    "bf16 weights of a family that needs fp32": (
        {"model": CASCADE, "hyperparameters__optimizer": {"type": "adamw-bf16"}},
        "spec.hyperparameters.optimizer.type is 'adamw-bf16'; must be adamw for stable_cascade: ",
    ),
    "kohya alone of a family without it": (
        {"model": {"family": "sana", "source": "m"}, "publish__formats": ["kohya"]},
        "spec.publish.formats is ['kohya']; kohya has no names for the layers of sana; must hold diffusers",
    ),
    "a picture for a family that draws from text": (
        {"validation__prompts": SHOWN},
        "spec.validation.prompts[0].image is 'a.png'; flux is not shown the first frame of a clip; remove it",
    ),
    "a picture for a flavour that draws from text": (
        {"model": WAN | {"flavour": "2.1-t2v-14b"}, "validation__prompts": SHOWN},
        "spec.validation.prompts[0].image is 'a.png'; wan 2.1-t2v-14b is not shown the first frame of a clip; remove it",
    ),
    "no picture for a flavour that draws from one": (
        {"model": WAN | {"flavour": "2.1-i2v-14b-480p"}, "validation__prompts": PROMPTS},
        "spec.validation.prompts[0].image is empty; wan 2.1-i2v-14b-480p draws from a picture of the first frame; name its file",
    ),
    "one picture for a flavour that draws between two": (
        {"model": WAN | {"flavour": "2.1-flf2v-14b-720p"}, "validation__prompts": SHOWN},
        "spec.validation.prompts[0].lastImage is empty; wan 2.1-flf2v-14b-720p draws from a picture of the last frame; name its file",
    ),
    "a last picture for a flavour that draws from one": (
        {"model": WAN | {"flavour": "2.2-i2v-a14b"}, "validation__prompts": [SHOWN[0] | {"lastImage": "b.png"}]},
        "spec.validation.prompts[0].lastImage is 'b.png'; wan 2.2-i2v-a14b is not shown the last frame of a clip; remove it",
    ),
    "no picture for a family that always draws from one": (
        {"model": WAN | {"family": "wan_ti2v"}, "validation__prompts": PROMPTS},
        "spec.validation.prompts[0].image is empty; wan_ti2v draws from a picture of the first frame; name its file",
    ),
    "a control network of a family without": (
        {"model": {"family": "chroma", "source": "m"}, "adapter": CONTROLNET, "data__sources": CONDITIONED},
        "spec.adapter.type is 'controlnet'; not for chroma: none is built in for it; train another type, or a model of sd3 or flux "
        "or sdxl or pixart_sigma or qwen_image or hidream or flux_kontext or auraflow or sd15",
    ),
    "a negative prompt of a distilled flavour": (
        {"validation__prompts": [{"text": "a"}, {"text": "a", "negative": "b"}]},
        "spec.validation.prompts[1].negative is 'b'; samples of flux distilled on guidance know no negative prompt; remove it, or "
        "set spec.model.flavour to schnell where the checkpoint is one",
    ),
    "a negative prompt of a flavour that samples without guidance": (
        {"model__flavour": "schnell", "validation__prompts": NEGATIVE},
        "spec.validation.prompts[0].negative is 'b'; does something only with spec.validation.guidance above 1; set that",
    ),
    "a negative prompt without guidance": (
        {"model": SDXL, "validation": {"prompts": NEGATIVE, "guidance": "1"}},
        "spec.validation.prompts[0].negative is 'b'; does something only with spec.validation.guidance above 1, which is 1",
    ),
    "a sample between the family's pixels": (
        {"validation": {"prompts": PROMPTS, "width": 1000}},
        "spec.validation.width is 1000; must be a multiple of 16 for flux, for example 1008",
    ),
    "a size of samples that have that of their reference": (
        {
            "model": LONGCAT_EDIT,
            "data__sources": [{"uri": "a", "references": ["b"]}],
            "validation": {"prompts": [{"text": "make it red", "references": ["a.png"]}], "width": 512},
        },
        "spec.validation.width is 512; longcat_image_edit draws in a size that follows its reference; remove it",
    ),
    "an unknown flavour": (
        {"model__flavour": "def"},
        "spec.model.flavour is 'def'; did you mean dev? allowed: dev, krea, schnell",
    ),
    "references of a family that takes none": (
        {"data__sources": [{"uri": "a"}, {"uri": "b", "references": ["c"]}]},
        "spec.data.sources[1].references is ['c']; flux takes no reference pictures; remove it, or train flux_kontext",
    ),
    "a picture to edit of a family that takes none": (
        {"validation__prompts": [{"text": "a cat", "references": ["cat.png"]}]},
        "spec.validation.prompts[0].references is ['cat.png']; flux takes no reference pictures; remove it",
    ),
    "targets without references": (
        {"model": KONTEXT, "data__sources": [{"uri": "a", "references": ["b"]}, {"uri": "c"}]},
        "spec.data.sources[1].references is []; must name 1 folder of reference pictures for flux_kontext",
    ),
    "more references than the family takes": (
        {"model": KONTEXT, "data__sources": [{"uri": "a", "references": ["b", "c"]}]},
        "spec.data.sources[0].references is ['b', 'c']; must name 1 folder of reference pictures for flux_kontext",
    ),
    "a quantised base of a family that needs it whole": (
        {"model": CASCADE | {"quantization": "int8"}},
        "spec.model.quantization is 'int8'; the base of stable_cascade is not quantised: it trains in fp32 throughout, and no ",
    ),
    "tiles of an autoencoder that has none": (
        {"model": {"family": "ace_step_v1", "source": "base", "autoencoderTiling": "always"}},
        "spec.model.autoencoderTiling is 'always'; must be auto or never for ace_step_v1: its spectrograms and its vocoder are ",
    ),
    "a prompt without a picture to edit": (
        {"model": KONTEXT, "validation__prompts": [{"text": "make it red"}]},
        "spec.validation.prompts[0].references is []; must name 1 reference picture for flux_kontext",
    ),
}


@pytest.mark.parametrize(("changes", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_broken_rule_of_a_family_is_one_sentence_that_says_what_is_allowed(
    changes: dict[str, Any], sentence: str
) -> None:
    found = [str(problem) for problem in problems(document(**changes))]
    assert len(found) == 1
    assert found[0].startswith(sentence)


ACCEPTED: dict[str, dict[str, Any]] = {
    "frames of the rule": {"model": WAN, "data__clip__frames": 81},
    "a clip that is continued": {
        "model": CONTINUED,
        "data__clip__shownFrames": 13,
        "validation": {"prompts": [{"text": "a cat", "image": "a.mp4"}], "frames": 17},
    },
    "one frame": {"model": WAN, "data__clip__frames": 1},
    "a resolution below a coarse bucket": {"data__resolution": 32},
    "a picture, without a flavour": {"model": WAN, "validation__prompts": SHOWN},
    "no picture, without a flavour": {"model": WAN, "validation__prompts": PROMPTS},
    "two pictures": {
        "model": WAN | {"flavour": "2.1-flf2v-14b-720p"},
        "validation__prompts": [SHOWN[0] | {"lastImage": "s3://bucket/b.png"}],
    },
    "a negative prompt": {"model": SDXL, "validation__prompts": NEGATIVE},
    "a negative prompt of z_image, which contrasts above 0": {
        "model": {"family": "z_image", "source": "base"},
        "validation": {"prompts": NEGATIVE, "guidance": "0.5"},
    },
    "a negative prompt of a Flux with real guidance": {
        "model__flavour": "schnell",
        "validation": {"prompts": NEGATIVE, "guidance": "3"},
    },
    "a quantised base that is not recommended": {"model": SDXL | {"quantization": "int8"}},
    "tiles": {"model": SDXL | {"autoencoderTiling": "always"}},
    "no tiles of an autoencoder that has none": {
        "model": {"family": "ace_step_v1", "source": "base", "autoencoderTiling": "never"}
    },
    "an empty negative prompt": {"validation__prompts": [{"text": "a", "negative": ""}]},
    "pairs": {
        "model": KONTEXT,
        "data__sources": [{"uri": "a", "references": ["b"]}, {"uri": "s3://data/d", "references": ["s3://data/e"]}],
        "validation__prompts": [{"text": "make it red", "references": ["s3://data/e/1.png"]}],
    },
}


@pytest.mark.parametrize("changes", ACCEPTED.values(), ids=ACCEPTED)
def test_a_sound_run_of_a_family_has_no_problem(changes: dict[str, Any]) -> None:
    assert problems(document(**changes)) == []


def test_a_quantised_base_that_is_not_recommended_is_noted_with_the_reason() -> None:
    run = TrainingRun.model_validate(document(model=SDXL | {"quantization": "nf4"}))
    assert notes(run) == [
        "spec.model.quantization nf4 is not recommended for sdxl: its activations fill the memory rather than its weights, and "
        "its convolutions stay as they are"
    ]
    assert notes(TrainingRun.model_validate(document(model=SDXL))) == []
    assert notes(TrainingRun.model_validate(document(model__quantization="nf4"))) == []


def test_families_whose_base_is_not_quantised_or_had_better_not_be() -> None:
    """UNets, which are convolutions and activations, and what other trainers refuse or advise against."""
    doubted = {name for name, facts in FAMILIES.items() if facts.quantization_doubt}
    assert doubted == {"sdxl", "kolors", "sd15", "cosmos2", "stable_cascade"}
    assert {name for name, facts in FAMILIES.items() if facts.quantizations != QUANTIZATIONS} == {"stable_cascade"}


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        ((), "the base of flux is not quantised: its weights need fp32"),
        (("int8", "fp8"), "flux allows int8, fp8: its weights need fp32"),
    ],
)
def test_kinds_that_a_family_does_not_have_are_refused_with_its_reason_here_and_by_the_cluster(
    monkeypatch: pytest.MonkeyPatch, kinds: tuple[Quantization, ...], reason: str
) -> None:
    facts = replace(FAMILIES["flux"], quantizations=kinds, quantization_doubt="its weights need fp32")
    monkeypatch.setitem(FAMILIES, "flux", facts)
    wanted = document(model__quantization="nf4")
    assert [str(problem) for problem in problems(wanted)] == [f"spec.model.quantization is 'nf4'; {reason}"]
    rules = {rule.message: rule.rule for rule in spec_rules() if rule.field == "model.quantization"}
    among = " || self.model.quantization in ['int8', 'fp8']" if kinds else ""
    assert rules[reason] == f"self.model.family != 'flux' || !has(self.model.quantization){among}"


def test_tiles_are_refused_with_a_reason_by_the_cluster_too_where_the_autoencoder_has_none() -> None:
    rules = [rule for rule in spec_rules() if rule.field == "model.autoencoderTiling"]
    assert {name: facts.passages.untiled for name, facts in FAMILIES.items() if facts.passages.untiled} == {
        rule.rule.split("'")[1]: rule.message.split(": ", 1)[1] for rule in rules
    }
    assert all(rule.rule.endswith("|| self.model.autoencoderTiling != 'always'") for rule in rules)
    assert len(rules) == 2


def test_kohya_of_a_family_without_it_is_noted_where_something_else_is_published() -> None:
    run = TrainingRun.model_validate(document(model={"family": "sana", "source": "m"}))
    assert notes(run) == ["spec.publish.formats: kohya is left out; that layout has no names for the layers of sana"]


@pytest.mark.parametrize(
    ("resolution", "given", "expected"), [(1024, None, 64), (512, None, 64), (511, None, 16), (1024, 32, 32)]
)
def test_buckets_are_coarse_from_512_pixels_on(resolution: int, given: int | None, expected: int) -> None:
    run = TrainingRun.model_validate(
        document(data={"sources": [{"uri": "a"}], "resolution": resolution, "bucketAlign": given})
    )
    assert bucket_alignment(run.spec, FAMILIES["flux"]) == expected


def test_every_family_trains_the_smallest_run() -> None:
    for family in FAMILIES:
        assert problems(document(model={"family": family, "source": "base"})) == []
