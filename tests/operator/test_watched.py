"""What is watched, listed and compared is decided in one place."""

import kopf

from atelier_operator.cluster import KINDS
from atelier_operator.main import register
from atelier_operator.observed import Apis
from atelier_operator.settings import Settings
from atelier_operator.watched import served_kinds, watched_kinds, watched_namespaces

EVERYWHERE, SOMEWHERE = Settings(), Settings(namespaces=("art", "lab"))
BOTH = Apis(jobset=True, kueue=True)


def test_an_operator_of_some_namespaces_sees_nothing_outside_of_them() -> None:
    left_out = watched_kinds(EVERYWHERE).keys() - watched_kinds(SOMEWHERE).keys()
    assert left_out == {"ClusterTrainingProfile"}
    for kind in watched_kinds(SOMEWHERE):
        assert watched_namespaces(SOMEWHERE, kind) == ("art", "lab")
    for kind in watched_kinds(EVERYWHERE):
        assert watched_namespaces(EVERYWHERE, kind) == (None,)


def test_what_the_cluster_lacks_is_watched_for_but_not_listed() -> None:
    assert served_kinds(EVERYWHERE, BOTH) == watched_kinds(EVERYWHERE)
    assert watched_kinds(EVERYWHERE).keys() - served_kinds(EVERYWHERE, Apis()).keys() == {"JobSet", "Workload"}
    assert "ClusterTrainingProfile" not in served_kinds(SOMEWHERE, BOTH)


def test_kopf_watches_the_same_kinds() -> None:
    for settings in (EVERYWHERE, SOMEWHERE):
        registry = kopf.OperatorRegistry()
        register(registry, object(), settings)  # type: ignore[arg-type]
        handlers = registry._watching.get_all_handlers()
        assert {handler.id for handler in handlers} == set(watched_kinds(settings))
        plurals = {handler.selector.any_name or handler.selector.plural for handler in handlers if handler.selector}
        assert plurals == {KINDS[kind].plural for kind in watched_kinds(settings)}
