"""Sliders, and adapters at a strength: what is refused, by the reader and by the CRD alike, what is taken, and what is advised."""

from typing import Any

import pytest

from atelier_api.layouts import LAYOUTS, LYCORIS
from atelier_api.read import problems
from atelier_api.rules import notes
from atelier_api.sliders import strength_of
from atelier_api.v1alpha1 import TrainingRun
from run_documents import document
from structural_schema import violations

SDXL = {"family": "sdxl", "source": "base"}
ENDS = [{"uri": "more", "sliderStrength": "1"}, {"uri": "less", "sliderStrength": "-1"}]
SLIDER = {"type": "lora", "slider": True}
STRONG = [{"text": "a", "adapterStrength": "2"}]
FULL, CONTROLNET = {"type": "full"}, {"type": "controlnet"}
WORDS = {"type": "textual-inversion", "tokens": [{"token": "<fox>", "initializer": "fox"}]}
CONTROLLED = {"validation__prompts": [STRONG[0] | {"conditioning": "a.png", "conditioningScale": "1"}]}

REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a slider without strengths": (
        {"adapter": SLIDER},
        "spec.adapter.slider",
        "spec.adapter.slider is true; needs a source with spec.data.sources[].sliderStrength above or below 0, best one of each",
    ),
    "a slider of neutral samples": (
        {"adapter": SLIDER, "data__sources": [{"uri": "a", "sliderStrength": "0"}, {"uri": "b"}]},
        "spec.adapter.slider",
        "spec.adapter.slider is true; needs a source",
    ),
    "a slider with weight decomposition": (
        {"adapter": SLIDER | {"dora": True}, "data__sources": ENDS, "publish__formats": ["diffusers"]},
        "spec.adapter.slider",
        "spec.adapter.slider is true; not with spec.adapter.dora, whose trained norms stay as they are at any strength",
    ),
    "a slider of lycoris-lora with weight decomposition": (
        {"adapter": {"type": "lokr", "slider": True, "dora": True}, "data__sources": ENDS},
        "spec.adapter.slider",
        "spec.adapter.slider is true; not with spec.adapter.dora",
    ),
    "a strength for what is no slider": (
        {"data__sources": [{"uri": "a"}, ENDS[1]]},
        "spec.data.sources",
        "spec.data.sources[1].sliderStrength is -1.0; only for a slider; set spec.adapter.slider to true, or remove it",
    ),
    "a strength for a whole model": (
        {"adapter": FULL, "data__sources": ENDS[:1]},
        "spec.data.sources",
        "spec.data.sources[0].sliderStrength is 1.0; only for a slider, which adapter type full cannot be; remove it",
    ),
    "a strength for a control network": (
        {"model": SDXL, "adapter": CONTROLNET, "data__sources": [ENDS[0] | {"conditioning": "edges"}]},
        "spec.data.sources",
        "spec.data.sources[0].sliderStrength is 1.0; only for a slider, which adapter type controlnet cannot be",
    ),
    "a strength for words": (
        {"model": SDXL, "adapter": WORDS, "data__sources": ENDS[:1]},
        "spec.data.sources",
        "spec.data.sources[0].sliderStrength is 1.0; only for a slider, which adapter type textual-inversion cannot be",
    ),
    "a sample of a whole model at a strength": (
        {"adapter": FULL, "validation__prompts": STRONG},
        "spec.validation.prompts",
        "spec.validation.prompts[0].adapterStrength is 2.0; the update of adapter type full is multiplied by no number; remove it",
    ),
    "a sample of words at a strength": (
        {"model": SDXL, "adapter": WORDS, "validation__prompts": STRONG},
        "spec.validation.prompts",
        "spec.validation.prompts[0].adapterStrength is 2.0; the update of adapter type textual-inversion is",
    ),
    "a sample of a control network at a strength": (
        {"model": SDXL, "adapter": CONTROLNET, "data__sources": [{"uri": "a", "conditioning": "edges"}], **CONTROLLED},
        "spec.validation.prompts",
        "spec.validation.prompts[0].adapterStrength is 2.0; the update of adapter type controlnet is",
    ),
    "a sample of weight decomposition at a strength": (
        {"adapter": {"type": "loha", "dora": True}, "validation__prompts": STRONG},
        "spec.validation.prompts",
        "spec.validation.prompts[0].adapterStrength is 2.0; the update of adapter type loha with dora is multiplied by no number",
    ),
    "a strength beyond reason": (
        {"adapter": SLIDER, "data__sources": [ENDS[0], ENDS[1] | {"sliderStrength": "-10.5"}]},
        "spec.data.sources",
        "spec.data.sources[1].sliderStrength is '-10.5'; must be between -10 and 10",
    ),
}


@pytest.mark.parametrize(("changes", "field", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_slider_is_refused_by_the_reader_and_by_the_crd(
    changes: dict[str, Any], field: str, sentence: str
) -> None:
    broken = document(**changes)
    found = [str(problem) for problem in problems(broken)]
    assert len(found) == 1
    assert found[0].startswith(sentence)
    assert {path.split("[")[0].removesuffix(".") for path in violations(broken)} == {field}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_type_that_is_put_on_layers_can_be_a_slider_and_no_other(kind: str) -> None:
    changed = document(adapter={"type": kind, "slider": True}, data__sources=ENDS, validation__prompts=STRONG)
    if kind in ("lora", *LYCORIS):
        assert problems(changed) == []
        assert violations(changed) == []
        run = TrainingRun.model_validate(changed)
        assert [strength_of(source, run.spec.adapter) for source in run.spec.data.sources] == [1, -1]
    else:
        assert any("spec.adapter.slider" in str(problem) for problem in problems(changed))
        assert violations(changed)


def test_an_adapter_that_is_no_slider_may_be_drawn_at_a_strength() -> None:
    changed = document(adapter={"type": "boft"}, validation__prompts=[{"text": "a", "adapterStrength": "-0.5"}])
    assert problems(changed) == []
    assert violations(changed) == []
    run = TrainingRun.model_validate(document())
    assert [strength_of(source, run.spec.adapter) for source in run.spec.data.sources] == [1]


def test_one_end_alone_and_neutral_sources_are_noted() -> None:
    def noted(*sources: dict[str, Any]) -> list[str]:
        return notes(TrainingRun.model_validate(document(adapter=SLIDER, data__sources=list(sources))))

    assert noted(*ENDS) == []
    [neutral] = noted(*ENDS, {"uri": "plain"})
    assert neutral.startswith("spec.data.sources[2]: without a sliderStrength, or with 0, its steps see the base alone")
    [one_end] = noted(ENDS[0])
    assert one_end.startswith("spec.data.sources: none has a sliderStrength below 0;")
    assert [note[:50] for note in noted(ENDS[1], {"uri": "b", "sliderStrength": "0"})] == [
        "spec.data.sources: none has a sliderStrength above",
        "spec.data.sources[1]: without a sliderStrength, or",
    ]
