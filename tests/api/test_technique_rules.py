"""What the fields of `spec.techniques` must be to each other, to the adapter and to the family."""

from typing import Any

import pytest

from atelier_api.read import problems
from refusals import assert_refused_alike
from run_documents import document
from structural_schema import violations

TEACHER = "spec.techniques.layerSync.teacherBlock"
SYNC = {"studentBlock": 8, "teacherBlock": 40, "weight": "0.5"}
WAN = {"family": "wan", "source": "base"}


def synced(student: int, teacher: int) -> dict[str, Any]:
    return {"techniques__layerSync": {"studentBlock": student, "teacherBlock": teacher}}


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a teacher that is its own student": (
        synced(8, 8),
        TEACHER,
        " is 8; must be more than studentBlock, which is 8: a block learns from a later one",
    ),
    "a teacher before its student": (synced(8, 7), TEACHER, " is 7; must be more than studentBlock, which is 8"),
    "a teacher beyond the largest flavour's last block": (
        synced(8, 57),
        TEACHER,
        " is 57; must be at most 56: the tokens of what is drawn go through 57 blocks of flux",
    ),
    "a teacher beyond the flavour's last block": (
        {"model": WAN | {"flavour": "2.1-t2v-1.3b"}} | synced(8, 30),
        TEACHER,
        " is 30; must be at most 29: the tokens of what is drawn go through 30 blocks of wan 2.1-t2v-1.3b, the first is 0",
    ),
    "a teacher in the text's blocks": (
        {"model": {"family": "z_image", "source": "base"}} | synced(8, 32),
        TEACHER,
        " is 32; must be at most 31: the tokens of what is drawn go through 32 blocks of z_image",
    ),
    "a block of a base that a control network leaves as it is": (
        {
            "adapter": {"type": "controlnet"},
            "data__sources": [{"uri": "a", "conditioning": "b"}],
            "techniques__layerSync": SYNC,
        },
        "spec.techniques.layerSync",
        " is a mapping; only for type lora or full or lokr or loha or locon or diag-oft or boft or dylora",
    ),
    "a block of a denoiser that new words leave as it is": (
        {
            "model": {"family": "sdxl", "source": "base"},
            "adapter": {"type": "textual-inversion", "tokens": [{"token": "<fox>", "initializer": "fox"}]},
            "data__captions": {"trigger": "<fox>"},
            "publish__formats": ["diffusers"],
            "techniques__layerSync": SYNC,
        },
        "spec.techniques.layerSync",
        " is a mapping; only for type lora or full or lokr",
    ),
}


@pytest.mark.parametrize(("changes", "field", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_broken_rule_of_a_technique_is_one_sentence_here_and_refused_by_the_cluster(
    changes: dict[str, Any], field: str, sentence: str
) -> None:
    assert_refused_alike(changes, field, sentence)


ACCEPTED: dict[str, dict[str, Any]] = {
    "a block that learns from a later one": {"techniques__layerSync": SYNC},
    "a block of the largest flavour, without a flavour": {"model": WAN} | synced(8, 30),
    "under DeepSpeed": {
        "parallelism": {"strategy": "deepspeed-zero3", "gpusPerNode": 2},
        "hyperparameters__globalBatchSize": 2,
        "techniques__layerSync": SYNC,
    },
    "of a quantised base": {"model__quantization": "nf4", "techniques__layerSync": SYNC},
}


@pytest.mark.parametrize("changes", ACCEPTED.values(), ids=ACCEPTED)
def test_a_sound_technique_has_no_problem(changes: dict[str, Any]) -> None:
    assert problems(document(**changes)) == []
    assert violations(document(**changes)) == []
