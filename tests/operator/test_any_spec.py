"""Two thousand specs that come past the API server: sound, against the rules, broken, hostile. None stops the operator or its
webhook; each is executed as the runtime would have it, or refused by the field, by both in the same words."""

import copy
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from atelier_api.families import FAMILIES
from atelier_api.fields import tree
from atelier_api.read import problems
from atelier_api.run_file import RunFile
from atelier_api.v1alpha1.status import RunStatus
from atelier_api.v1alpha1.storage import S3Settings
from atelier_operator.admission.review import answer
from atelier_operator.admission.verdict import judge
from atelier_operator.names import RUN_FILE_KEY
from atelier_operator.observed import Apis, Observed, Run
from atelier_operator.plan import Plan, plan
from atelier_runtime.components import scheduler_config
from atelier_runtime.families import get_family
from atelier_runtime.objectives import build_objective
from atelier_runtime.optimizers.schedule import learning_rate_at
from atelier_runtime.store import open_store
from family_models import save_tiny
from reviews import read, review
from run_documents import Document, documents, places, sound_documents, with_value, wrong_values
from run_stories import PROFILE, START, UID, profile

pytestmark = pytest.mark.sweep

SIZE_OF_A_CONFIG_MAP = 2**20
LABEL = re.compile(r"^(([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9])?$")
HOSTILE: list[Any] = [
    *(
        "\x00",
        "\u202egnp.exe",
        "../../etc/passwd",
        "{{ .Values }}",
        "$(reboot)",
        "'; DROP TABLE runs; --",
        "x" * 100_000,
    ),
    *(
        10**400,
        -(2**63),
        1e308,
        -0.0,
        [[[[[[]]]]]],
        {"$ref": "#"},
        {"": None},
        [None] * 1000,
        "http://169.254.169.254/latest",
    ),
]


def many(number: int) -> settings:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=slow,
        phases=(Phase.generate,),  # a document is told as it was drawn: to make it smaller takes minutes
    )


def decided(drawn: Document, *, jobset: bool = True) -> Plan:
    """What the operator plans for a new run with the drawn spec."""
    metadata = {"name": "knight", "namespace": "art", "uid": UID, "generation": 1}
    raw = json.loads(json.dumps({**copy.deepcopy(drawn), "metadata": metadata}))
    planned = plan(Run.of(raw), Observed(apis=Apis(jobset=jobset), profile=profile()), START)
    same_at_admission(raw, planned)
    return planned


def same_at_admission(raw: Document, planned: Plan) -> None:
    """The webhook refuses what the operator would, in the same words."""
    verdict = judge(read(review(raw)), lambda *_: {"spec": PROFILE})
    refused = planned.status.phase == "Pending"
    assert (verdict.result, bool(verdict.code)) == (("refused", True) if refused else ("allowed", False))
    assert verdict.message == (planned.status.message if refused else "")
    assert json.loads(json.dumps(answer(UID, verdict)))["response"]["allowed"] is not refused


def for_a_cluster(drawn: Document) -> Document:
    """The document with places that pods reach, and with names that the profile has."""
    spec = drawn["spec"]
    spec["storage"] = {**spec.get("storage", {}), "uri": "s3://bucket/runs"}
    for source in spec["data"]["sources"]:
        source["uri"] = f"s3://bucket/{source['uri'].rpartition('/')[2]}"
    for block in (*spec["data"]["sources"], *spec.get("validation", {}).get("prompts", ())):
        if block.get("references"):
            block["references"] = [f"s3://bucket/{each.rpartition('/')[2]}" for each in block["references"]]
    if "://" not in spec["model"]["source"]:
        spec["model"]["source"] = "/models/base"
    parallelism = spec.get("parallelism", {})
    for field, known in (("gpuClass", "h100-80g"), ("network", "infiniband")):
        if parallelism.get(field) is not None:
            parallelism[field] = known
    spec.pop("profileRef", None)
    return drawn


def told(planned: Plan) -> str:
    """The message of a status that the API server would take."""
    status = planned.status.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert RunStatus.model_validate(json.loads(json.dumps(status))) == planned.status
    return planned.status.message


def refused_by_field(planned: Plan) -> None:
    assert planned.create == ()
    message = told(planned)
    assert planned.status.phase == "Pending"
    assert re.search(r"\bspec\b", message), message


def sound_objects(planned: Plan) -> None:
    """Objects that the API server would take, as far as the spec has a part in them."""
    for manifest in planned.create:
        assert len(json.dumps(manifest)) < SIZE_OF_A_CONFIG_MAP
        for name, value in manifest["metadata"]["labels"].items():
            assert LABEL.fullmatch(value), (name, value)


@pytest.fixture(scope="module")
def schedulers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The scheduler configuration of each family's checkpoints."""
    root: Path = tmp_path_factory.mktemp("families")
    return {family: scheduler_config(save_tiny(family, root / family)) for family in FAMILIES}


@cache
def opened(uri: str, s3: str) -> None:
    """A client is made; most runs say the same of it."""
    settings = S3Settings.model_validate_json(s3)
    if settings.ca_bundle is None:
        open_store(uri, settings)


def taken_by_the_runtime(planned: Plan, schedulers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rank makes of the RunFile before it reads data and weights."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    run_file = RunFile.model_validate_json(planned.create[0]["data"][RUN_FILE_KEY])
    spec = run_file.spec
    family = get_family(spec.model.family)
    build_objective(spec.objective, family.facts, schedulers[spec.model.family])
    opened(run_file.store_uri, spec.storage.s3.model_dump_json())
    rates = [learning_rate_at(step, spec.hyperparameters, run_file.plan.learning_rate) for step in (0, 1)]
    assert all(rate >= 0 for rate in rates)


def test_a_sound_spec_is_executed_as_the_runtime_would_have_it(
    schedulers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a JobSet, and by a Job where there are no JobSets."""
    counts = {"executed": 0, "refused": 0}

    @many(350)
    @given(sound_documents())
    def each(drawn: Document) -> None:
        for_a_cluster(drawn)
        for jobset in (True, False):
            planned = decided(drawn, jobset=jobset)
            sound_objects(planned)
            if planned.create:
                taken_by_the_runtime(planned, schedulers, monkeypatch)
            elif planned.status.phase == "Suspended":
                assert drawn["spec"]["schedule"]["suspend"]
            else:  # places of one machine, what the profile has not, or what does not fit
                refused_by_field(planned)
            counts["executed" if planned.create else "refused"] += 1

    each()
    assert min(counts.values()) > 10, counts


@many(700)
@given(documents())
def test_a_spec_against_the_rules_is_refused_by_the_field(drawn: Document) -> None:
    planned = decided(drawn)
    sound_objects(planned)
    found = problems(drawn)
    if found:
        refused_by_field(planned)
        assert str(found[0]) in planned.status.message or found[0].path in planned.status.message


@many(600)
@given(documents(), st.data())
def test_a_broken_or_hostile_spec_is_refused_by_the_field(drawn: Document, data: st.DataObject) -> None:
    place, node = data.draw(st.sampled_from(list(places(drawn, tree(), ()))))
    wrong = data.draw(st.sampled_from([*wrong_values(node), *HOSTILE]))
    planned = decided(with_value(drawn, place, wrong))
    sound_objects(planned)
    if not planned.create and planned.status.phase != "Suspended":
        refused_by_field(planned)


@pytest.mark.parametrize("spec", [None, [], "spec", 7, {}, {"spec": {}}, {"model": None}], ids=repr)
def test_a_spec_that_is_none_is_refused(spec: Any) -> None:
    refused_by_field(decided({"apiVersion": "atelier.dev/v1alpha1", "kind": "TrainingRun", "spec": spec}))
