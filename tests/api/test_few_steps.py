"""What the fields of a run must be to `spec.objective.twinFlow`."""

from typing import Any

import pytest

from atelier_api.families import FAMILIES
from atelier_api.read import problems, validated
from refusals import assert_refused_alike
from run_documents import document
from structural_schema import violations

ON: dict[str, Any] = {"objective__twinFlow": {}, "hyperparameters__ema": {}}
TWIN = "spec.objective.twinFlow"
MANY = {"parallelism": {"gpusPerNode": 2, "strategy": "deepspeed-zero2"}, "hyperparameters__globalBatchSize": 2}

REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a generator without a teacher": (
        {"objective__twinFlow": {}},
        "spec.hyperparameters.ema",
        " is empty; spec.objective.twinFlow needs it, as the moving average is the teacher",
    ),
    "another loss": (ON | {"objective__loss": "huber"}, "spec.objective.loss", " is 'huber'; must be l2: "),
    "a comparison with what is never learnt": (
        ON | {"objective__twinFlow": {"adversarial": False}},
        f"{TWIN}.rectifyWeight",
        " is 0.5; must be 0 without adversarial",
    ),
    "a slider": (
        ON
        | {
            "adapter": {"type": "lora", "slider": True},
            "data__sources": [{"uri": "a", "sliderStrength": "1"}],
        },
        "spec.adapter.slider",
        " is true; not with spec.objective.twinFlow",
    ),
    "an average that DeepSpeed keeps": (
        ON | MANY,
        "spec.parallelism.strategy",
        " is 'deepspeed-zero2'; keeps the moving",
    ),
    "steps of its own for samples": (
        ON | {"validation": {"prompts": [{"text": "a"}], "steps": 4}},
        "spec.validation.steps",
        " is 4; samples of spec.objective.twinFlow are drawn in its sampleSteps steps without guidance",
    ),
    "guidance for samples": (
        ON | {"validation": {"prompts": [{"text": "a"}], "guidance": "2"}},
        "spec.validation.guidance",
        " is 2.0; samples of spec.objective.twinFlow are drawn in",
    ),
    "a family that predicts noise": (
        ON | {"model": {"family": "sdxl", "source": "base"}},
        TWIN,
        " is a mapping; only for flow families, and sdxl is of diffusion",
    ),
    "two networks for different noise levels": (
        ON | {"model": {"family": "wan", "source": "base", "flavour": "2.2-t2v-a14b"}},
        "spec.model.flavour",
        " is '2.2-t2v-a14b'; has 2 networks, and spec.objective.twinFlow trains one network that knows all noise levels, as a step "
        "goes from noise to the picture; name one of 2.1-t2v-1.3b, 2.1-t2v-14b, ",
    ),
    "a control network": (
        ON | {"adapter": {"type": "controlnet"}, "data__sources": [{"uri": "a", "conditioning": "b"}]},
        TWIN,
        " is a mapping; only for type lora or full or",
    ),
}


@pytest.mark.parametrize(("changes", "field", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_with_few_steps_is_one_sentence_here_and_refused_by_the_cluster(
    changes: dict[str, Any], field: str, sentence: str
) -> None:
    assert_refused_alike(changes, field, sentence)


def test_a_negative_prompt_is_refused_where_there_is_no_guidance() -> None:
    prompts = [{"text": "a", "negative": "b"}]
    changes = ON | {"model": {"family": "sana", "source": "base"}, "validation": {"prompts": prompts}}
    [found] = problems(document(**changes))
    assert found.path == "spec.validation.prompts[0].negative"
    assert "without guidance; remove it" in found.message
    assert violations(document(**changes)) == ["spec.validation.prompts"]


ACCEPTED: dict[str, dict[str, Any]] = {
    "an empty block": ON,
    "a quantised base": ON | {"model__quantization": "nf4"},
    "full-rank training in many processes": ON
    | {"adapter": {"type": "full"}, "parallelism": {"gpusPerNode": 2, "strategy": "fsdp2"}}
    | {"hyperparameters__globalBatchSize": 2},
    "a block that learns from another beside it": ON
    | {"techniques__layerSync": {"studentBlock": 8, "teacherBlock": 40}},
    "no twin": ON | {"objective__twinFlow": {"adversarial": False, "rectifyWeight": "0"}},
    "a flavour of one network": ON | {"model": {"family": "wan", "source": "base", "flavour": "2.1-t2v-14b"}},
    "samples": ON | {"validation": {"prompts": [{"text": "a"}]}},
}


def test_new_words_leave_the_steps_as_they_are() -> None:
    """No flow family learns words, so that the run breaks the rules of the family as well."""
    tokens = [{"token": "<fox>", "initializer": "fox"}]
    changes = ON | {"adapter": {"type": "textual-inversion", "tokens": tokens}}
    assert f"{TWIN} is a mapping; only for type lora or full or" in "\n".join(map(str, problems(document(**changes))))
    assert TWIN in violations(document(**changes))


@pytest.mark.parametrize("changes", ACCEPTED.values(), ids=ACCEPTED)
def test_what_goes_with_few_steps_is_accepted(changes: dict[str, Any]) -> None:
    assert problems(document(**changes)) == []
    assert violations(document(**changes)) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_every_flow_family_takes_it_and_no_other(name: str) -> None:
    refused = FAMILIES[name].objective != "flow"
    changes = ON | {"model": {"family": name, "source": "base"}}
    assert (TWIN in [problem.path for problem in problems(document(**changes))]) == refused
    assert (TWIN in violations(document(**changes))) == refused


def test_the_block_has_its_defaults() -> None:
    run = validated(document(**ON))
    twin = run.spec.objective.twin_flow
    assert twin is not None
    numbers = (twin.order, twin.delta, twin.enhanced_ratio, twin.target_clamp, twin.rectify_weight, twin.adversarial)
    assert (*numbers, twin.sample_steps) == (2, 0.01, 0.5, 1.0, 0.5, True, 1)
