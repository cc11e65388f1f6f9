"""Reading a run: every mistake is told once, in one sentence, with its line."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atelier_api.errors import ConfigError
from atelier_api.families import NAMES
from atelier_api.fields import tree, walk
from atelier_api.read import PATTERNS, parse_run, problems, read_run
from run_documents import document

RUN = """\
apiVersion: atelier.dev/v1alpha1
kind: TrainingRun
metadata: {name: knight}
spec:
  model:
    family: flux
    source: base
  adapter:
    rank: 8
  data:
    sources:
      - uri: pictures
  hyperparameters:
    steps: 10
"""


def told(text: str) -> list[str]:
    """The lines of the refusal of a text."""
    with pytest.raises(ConfigError) as refusal:
        parse_run(text, "run.yaml")
    return str(refusal.value).splitlines()


def test_a_small_run_is_read_with_every_default() -> None:
    run = parse_run(RUN, "run.yaml")
    assert run.metadata.namespace == "default"
    assert run.spec.adapter.type == "lora"
    assert run.spec.adapter.rank == 8
    assert run.spec.hyperparameters.gradient_clip == 1.0


def test_a_number_is_taken_for_a_decimal_and_text_for_a_date() -> None:
    changed = RUN.replace("steps: 10", "steps: 10\n    learningRate: 0.5").replace(
        "name: knight", "name: knight, labels: {day: 2024-01-02}"
    )
    run = parse_run(changed, "run.yaml")
    assert run.spec.hyperparameters.learning_rate == 0.5
    assert run.metadata.labels == {"day": "2024-01-02"}


def test_an_adapter_without_type_is_lora_and_one_with_type_is_what_it_says() -> None:
    assert parse_run(RUN, "run.yaml").spec.adapter.type == "lora"
    assert parse_run(RUN.replace("rank: 8", "type: full"), "run.yaml").spec.adapter.type == "full"


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a typo": (
        {"hyperparameters": {"steps": 1, "stepz": 2}},
        "spec.hyperparameters.stepz is not a field; did you mean steps?",
    ),
    "a key of Python": (
        {"data__max_upscale": "2"},
        "spec.data.max_upscale is not a field; did you mean maxUpscale?",
    ),
    "a key of another block": (
        {"learningRate": "1e-4"},
        "spec.learningRate is not a field; did you mean spec.hyperparameters.learningRate?",
    ),
    "a key of nothing": (
        {"data__captions": {"xyzzy": 1}},
        "spec.data.captions.xyzzy is not a field; spec.data.captions has dropout, trigger, fallback",
    ),
    "a key of another type": (
        {"adapter": {"type": "full", "rank": 8}},
        "spec.adapter.rank is not a field of this type; it belongs to type lora or lokr or loha or locon or dylora",
    ),
    "a key that is no text": ({"data__captions": {7: 1}}, "spec.data.captions.7 is not a field"),
    "a missing key": ({"hyperparameters": {}}, "spec.hyperparameters.steps is missing; optimizer steps of the run"),
    "too low": ({"adapter__rank": 0}, "spec.adapter.rank is 0; must be 1–1024"),
    "too high": ({"adapter__rank": 1025}, "spec.adapter.rank is 1025; must be 1–1024"),
    "at an open bound": (
        {"hyperparameters__learningRate": "0"},
        "spec.hyperparameters.learningRate is '0'; must be more than 0 and at most 1",
    ),
    "at an open upper bound": (
        {"adapter__dropout": "1"},
        "spec.adapter.dropout is '1'; must be at least 0 and less than 1",
    ),
    "a number of many digits": (
        {"hyperparameters__seed": 10**400},
        "spec.hyperparameters.seed is a number of more than 60 digits; must be 0–2147483647",
    ),
    "a decimal of many digits": (
        {"adapter__alpha": 10**400},
        'spec.adapter.alpha is a number of more than 60 digits; must be a decimal such as "0.1" or "1e-4"',
    ),
    "no decimal": (
        {"data__captions__dropout": "a tenth"},
        'spec.data.captions.dropout is \'a tenth\'; must be a decimal such as "0.1" or "1e-4", 0–1',
    ),
    "a decimal that is not finite": ({"adapter__alpha": "1e999"}, "spec.adapter.alpha is '1e999'; must be a decimal"),
    "a decimal that is too long": ({"adapter__alpha": "1." + "0" * 40}, "must be a decimal such as"),
    "a truth for a decimal": ({"adapter__alpha": True}, "spec.adapter.alpha is true; must be a decimal"),
    "text for a number": (
        {"adapter__rank": "16"},
        "spec.adapter.rank is '16'; must be a whole number, 1–1024; leave out the quotes",
    ),
    "a fraction": ({"adapter__rank": 1.5}, "spec.adapter.rank is 1.5; must be a whole number, 1–1024"),
    "a truth for a number": ({"adapter__rank": True}, "spec.adapter.rank is true; must be a whole number"),
    "text for a truth": ({"adapter__dora": "yes"}, "spec.adapter.dora is 'yes'; must be true or false"),
    "a truth for text": (
        {"data__captions__trigger": True},
        'spec.data.captions.trigger is true; must be text; put it in quotes: "true"',
    ),
    "no text": ({"model__source": ""}, "spec.model.source has 0 characters; must have 1–2048"),
    "too much text": (
        {"data__captions__trigger": "x" * 257},
        "spec.data.captions.trigger has 257 characters; must have at most 256",
    ),
    "half a letter": (
        {"data__captions__trigger": "\ud800"},
        "spec.data.captions.trigger is '?'; must be text in UTF-8",
    ),
    "the wrong form": (
        {"parallelism__deviceMemory": "80GB"},
        'spec.parallelism.deviceMemory is \'80GB\'; must be a size such as "80Gi" or "512Mi"',
    ),
    "an unknown choice": (
        {"objective__prediction": "eps"},
        "spec.objective.prediction is 'eps'; did you mean epsilon? allowed: auto, epsilon, v",
    ),
    "an unknown type": (
        {"adapter__type": "lore"},
        "spec.adapter.type is 'lore'; did you mean lora? allowed: lora, lokr, loha, locon, diag-oft, boft, dylora, ia3, "
        "textual-inversion, full",
    ),
    "an unknown family": (
        {"model__family": "sdx"},
        "spec.model.family is 'sdx'; did you mean sdxl? allowed: ",
    ),
    "no list": ({"data__sources": "pictures"}, "spec.data.sources is 'pictures'; must be a list"),
    "an empty list": ({"data__sources": []}, "spec.data.sources has 0 items; must have 1–64"),
    "a long list": (
        {"adapter__targets": ["all"] * 33},
        "spec.adapter.targets has 33 items; must have 1–32",
    ),
    "a wrong item": (
        {"data__sources": ["pictures"]},
        "spec.data.sources[0] is 'pictures'; must be a mapping with the keys uri",
    ),
    "no block": ({"adapter": "lora"}, "spec.adapter is 'lora'; must be a mapping with the keys type, rank"),
    "an empty block": (
        {"data__clip": None},
        "spec.data.clip is empty; must be a mapping with the keys frames, fps, shownFrames; leave the line out for the default",
    ),
    "a check of the type itself": (
        {"storage__checkpoint": {"everySteps": 0, "everySeconds": 0}},
        "spec.storage.checkpoint: everySteps and everySeconds are both 0; at least one must be positive",
    ),
}


@pytest.mark.parametrize(("changes", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence_with_path_value_and_what_is_allowed(changes: dict[str, Any], sentence: str) -> None:
    found = problems(document(**changes))
    assert len(found) == 1
    assert sentence in str(found[0])


def test_labels_must_be_text() -> None:
    found = problems(document() | {"metadata": {"name": "a", "labels": {"b": 1, 2: "c"}}})
    assert [str(problem) for problem in found] == [
        'metadata.labels.b is 1; must be text; put it in quotes: "1"',
        'metadata.labels.2 is 2; must be text; put it in quotes: "2"',
    ]


def test_all_mistakes_are_told_at_once_in_the_order_of_their_lines() -> None:
    broken = (
        RUN.replace("rank: 8", "rank: 0\n    alpha: -1")
        .replace("family: flux", "family: flu")
        .replace("steps: 10", "stepz: 10")
    )
    assert told(broken) == [
        f"run.yaml:6: spec.model.family is 'flu'; did you mean flux? allowed: {', '.join(NAMES)}",
        "run.yaml:9: spec.adapter.rank is 0; must be 1–1024",
        "run.yaml:10: spec.adapter.alpha is -1; must be more than 0 and at most 65536",
        "run.yaml:14: spec.hyperparameters.steps is missing; optimizer steps of the run",
        "run.yaml:15: spec.hyperparameters.stepz is not a field; did you mean steps?",
    ]


def test_rules_between_fields_are_told_with_lines_too() -> None:
    assert told(RUN.replace("rank: 8", 'rank: 8\n    targets: ["(to_q"]')) == [
        "run.yaml:10: spec.adapter.targets[0] is '(to_q'; must be a preset (attention, mlp, all) or a regular expression: "
        "missing ), unterminated subpattern at position 0"
    ]


BROKEN_YAML = {
    "nothing": ("", "run.yaml is empty; must hold a TrainingRun"),
    "a comment": ("# nothing\n", "run.yaml is empty; must hold a TrainingRun"),
    "an open bracket": ("a: 1\nb: [", "run.yaml:2: not valid YAML: "),
    "a tab": ("a:\n\t- 1", "run.yaml:2: not valid YAML: "),
    "two documents": ("a: 1\n---\nb: 2\n", "run.yaml:2: not valid YAML: expected a single document"),
    "a key that stands twice": (RUN + "    steps: 20\n", "run.yaml:15: not valid YAML: the key steps stands twice"),
    "a key that is a list": (
        "? [a]\n: 1\n",
        "run.yaml:1: not valid YAML: while constructing a mapping found unhashable key",
    ),
    "a foreign tag": ("a: !!python/name:os.system 1", "run.yaml:1: not valid YAML: could not determine a constructor"),
    "a wrong tag": ("a: !!int x", "run.yaml: not valid YAML: "),
    "a control character": ("a: \x00", "run.yaml: not valid YAML: "),
    "deep nesting": ("[" * 3000, "run.yaml: not valid YAML for a TrainingRun: nested too deeply"),
    "a list": (
        "- 1\n",
        "run.yaml:1: the document is [1]; must be a mapping with the keys apiVersion, kind, metadata, spec",
    ),
    "a text": ("hello", "run.yaml:1: the document is 'hello'; must be a mapping"),
    "an anchor inside itself": ("&a [*a]", "run.yaml:1: the document is a list of 1; must be a mapping"),
}


@pytest.mark.parametrize(("text", "start"), BROKEN_YAML.values(), ids=BROKEN_YAML)
def test_broken_yaml_is_one_error_with_its_place(text: str, start: str) -> None:
    lines = told(text)
    assert lines[0].startswith(start)


def test_anchors_that_multiply_are_read_in_a_moment() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    assert any("a39 is not a field" in line for line in told(bomb))


def test_merge_keys_work() -> None:
    merged = RUN.replace("  adapter:\n    rank: 8", "  adapter:\n    <<: {rank: 4, rslora: true}\n    rank: 8")
    adapter = parse_run(merged, "run.yaml").spec.adapter
    assert adapter.type == "lora"
    assert (adapter.rank, adapter.rslora) == (8, True)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    missing, folder, picture, huge = (tmp_path / name for name in ("no.yaml", "folder", "a.png", "huge.yaml"))
    folder.mkdir()
    picture.write_bytes(b"\x89PNG\r\n\xff")
    huge.write_bytes(b"#" * (2 << 20))
    for path, part in (
        (missing, "does not exist"),
        (folder, "cannot be read: Is a directory"),
        (picture, "is not a text file in UTF-8: byte 0 is 0x89"),
        (huge, "has 2097152 bytes; a TrainingRun has at most 1048576"),
    ):
        with pytest.raises(ConfigError, match=part):
            read_run(path)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("\ufeff" + RUN, encoding="utf-8")
    assert read_run(path).metadata.name == "knight"


def test_every_pattern_of_the_api_is_put_into_words() -> None:
    used = {node.pattern for _, node in walk(tree()) if node.pattern}
    assert used == set(PATTERNS)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=8,
)
PLACES = sorted(path.replace(".", "__") for path, node in walk(tree().fields["spec"]) if "[" not in path)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(PLACES), JUNK)
def test_whatever_stands_in_a_field_gets_a_sentence_of_ours(place: str, junk: Any) -> None:
    for problem in problems(document(**{place: junk})):
        assert problem.path
        assert problem.message.startswith(problem.path)
        assert "Input should" not in problem.message
        assert "valid dictionary" not in problem.message


@settings(max_examples=100, deadline=None, derandomize=True)
@given(JUNK)
def test_whatever_the_document_is_it_is_refused_not_raised_over(junk: Any) -> None:
    assert problems(junk)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=60))
def test_whatever_the_text_is_the_error_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_run(text, "run.yaml")


def test_a_document_of_the_reader_round_trips() -> None:
    run = parse_run(RUN, "run.yaml")
    again = parse_run(yaml.safe_dump(run.model_dump(mode="json", by_alias=True)), "again")
    assert again == run
