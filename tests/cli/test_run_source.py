"""`--set`: values laid over a file."""

from pathlib import Path

import pytest

from atelier_api.errors import ConfigError
from atelier_cli.run_source import load

TEXT = """\
apiVersion: atelier.dev/v1alpha1
kind: TrainingRun
metadata: {name: demo, annotations: {made: 2030-01-01}}
spec:
  model: {family: sd3, source: base}
  data:
    sources:
      - uri: pictures
  hyperparameters: {steps: 10}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    return path


def test_without_changes_the_file_is_taken_as_it_is(file: Path) -> None:
    assert load(file).spec.hyperparameters.steps == 10


def test_values_are_set_by_path(file: Path) -> None:
    run = load(
        file,
        [
            "spec.hyperparameters.steps=20",
            "hyperparameters.learningRate=1e-3",
            "metadata.name=other",
            "adapter.targets=[attention, mlp]",
            "data.captions.trigger=1234",
            "hyperparameters.gradientClip=null",
            "hyperparameters.gradientCheckpointing=true",
            "data.sources[0].repeats=3",
            "metadata.labels.team=x=y",
        ],
    )
    assert (run.spec.hyperparameters.steps, run.spec.hyperparameters.learning_rate) == (20, 1e-3)
    assert (run.metadata.name, run.metadata.labels) == ("other", {"team": "x=y"})
    assert run.spec.adapter.targets == ["attention", "mlp"]  # type: ignore[union-attr]
    assert run.spec.data.captions.trigger == "1234"
    assert run.spec.hyperparameters.gradient_clip is None
    assert run.spec.hyperparameters.gradient_checkpointing is True
    assert run.spec.data.sources[0].repeats == 3
    assert run.metadata.annotations == {"made": "2030-01-01"}


def test_a_list_grows_by_its_next_item(file: Path) -> None:
    run = load(file, ["data.sources[1].uri=more", "validation.prompts[0].text=a cat"])
    assert [source.uri for source in run.spec.data.sources] == ["pictures", "more"]
    assert run.spec.validation.prompts[0].text == "a cat"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            "hyperparameters.stps=4",
            "--set spec.hyperparameters.stps: there is no such field; did you mean spec.hyperparameters.steps?",
        ),
        ("steps=4", "--set spec.steps: there is no such field; did you mean spec.hyperparameters.steps or"),
        ("data.sources[0].url=x", "did you mean spec.data.sources.uri?"),
        ("data.sources.uri=x", "spec.data.sources is a list; name an item, such as spec.data.sources[0]"),
        ("data.sources[5].uri=x", "--set spec.data.sources[5].uri: there are 1 items; the first is [0]"),
        ("steps", "--set is 'steps'; must be a path and a value"),
        ("hyperparameters..steps=1", "there is no such field"),
        ("hyperparameters.steps=abc", "spec.hyperparameters.steps is 'abc'; must be a whole number"),
        ("hyperparameters.steps={", "spec.hyperparameters.steps is '{'; must be a whole number"),
        ("adapter.rank=0", "with --set: spec.adapter.rank is 0; must be 1–1024"),
    ],
)
def test_a_wrong_change_is_one_clear_error(file: Path, change: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(file, [change])
    assert text in str(caught.value)


def test_every_mistake_of_the_changes_is_told(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(file, ["adapter.rank=0", "hyperparameters.steps=0"])
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("text", ["", "- a\n", "a: [", "a: b: c\n"])
def test_a_file_that_is_no_run_keeps_its_own_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as plain:
        load(path)
    with pytest.raises(ConfigError) as changed:
        load(path, ["hyperparameters.steps=1"])
    assert str(changed.value) == str(plain.value)
