"""What tests of the rules share: a run is refused by the types and by the cluster alike."""

from typing import Any

from atelier_api.read import problems
from run_documents import document
from structural_schema import violations


def assert_refused_alike(changes: dict[str, Any], field: str, sentence: str) -> None:
    """A run with these changes has one problem, which begins with the field and the sentence; the CRD refuses it at that field."""
    [found] = [str(problem) for problem in problems(document(**changes))]
    assert found.startswith(f"{field}{sentence}")
    assert violations(document(**changes)) == [field]
