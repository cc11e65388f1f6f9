"""What a continuation of a run may change."""

from typing import Any

import pytest

from atelier_api.v1alpha1 import TrainingRunSpec
from atelier_cli.changes import ALLOWED, refused_changes
from runs import merged

BASE: dict[str, Any] = {
    "model": {"family": "sd3", "source": "base"},
    "adapter": {"type": "lora"},
    "data": {"sources": [{"uri": "/pictures"}]},
    "hyperparameters": {"steps": 10},
}


def refused(changes: dict[str, Any]) -> list[str]:
    return refused_changes(TrainingRunSpec.model_validate(BASE), TrainingRunSpec.model_validate(merged(BASE, changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hyperparameters": {"steps": 11}},
        {"hyperparameters": {"microBatchSize": 1, "gradientCheckpointing": True}},
        {"parallelism": {"gpusPerNode": 4}},
        {"storage": {"checkpoint": {"everySteps": 7}, "resume": {"mode": "Never"}, "s3": {"region": "eu"}}},
        {"validation": {"prompts": [{"text": "a cat"}]}},
        {"publish": {"formats": ["diffusers"]}},
        {"schedule": {"activeDeadlineSeconds": 9}, "retry": {"maxRestarts": 9}},
    ],
)
def test_what_leaves_the_next_step_as_it_is_may_change(changes: dict[str, Any]) -> None:
    assert refused(changes) == []


def test_steps_may_only_grow() -> None:
    assert refused({"hyperparameters": {"steps": 9}}) == [
        "spec.hyperparameters.steps is 9, it was 10; it may only grow"
    ]


def test_other_changes_are_told_one_by_one() -> None:
    changes = {
        "adapter": {"rank": 8},
        "data": {"sources": [{"uri": "/other"}]},
        "hyperparameters": {"learningRate": "1e-3"},
        "storage": {"uri": "elsewhere"},
    }
    assert refused(changes) == [
        "spec.adapter.rank is 8, it was 16",
        'spec.data.sources is [{"uri": "/other", "repeats": 0, "references": []}], '
        'it was [{"uri": "/pictures", "repeats": 0, "references": []}]',
        'spec.hyperparameters.learningRate is "0.001", it was null',
        'spec.storage.uri is "elsewhere", it was "runs"',
    ]


def test_another_adapter_is_refused() -> None:
    assert 'spec.adapter.type is "full", it was "lora"' in refused_changes(
        TrainingRunSpec.model_validate(BASE), TrainingRunSpec.model_validate({**BASE, "adapter": {"type": "full"}})
    )


def test_the_allowed_fields_exist() -> None:
    from atelier_api.fields import tree, walk

    assert set(ALLOWED) <= {path for path, _ in walk(tree())}
