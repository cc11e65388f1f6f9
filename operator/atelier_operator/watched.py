"""Which kinds the operator watches, and where: kopf's watches, the first list and the comparisons later agree by this."""

from collections.abc import Mapping

from atelier_operator.cluster import KINDS
from atelier_operator.names import RUN_LABEL
from atelier_operator.observed import Apis
from atelier_operator.settings import Settings

WATCHED: Mapping[str, str] = {
    "ClusterTrainingProfile": "",
    "TrainingProfile": "",
    "TrainingRun": "",
    "JobSet": RUN_LABEL,
    "Job": RUN_LABEL,
    "Pod": RUN_LABEL,
    "Workload": "",
}
"""The label by which objects of ours are selected on the server, so that not every Pod comes here."""


def watched_kinds(settings: Settings) -> dict[str, str]:
    """What an operator with these settings watches: one of some namespaces may see nothing outside of them."""
    return {kind: label for kind, label in WATCHED.items() if KINDS[kind].namespaced or not settings.namespaces}


def served_kinds(settings: Settings, apis: Apis) -> dict[str, str]:
    """Those of them that the cluster has: only they can be listed."""
    absent = {*(() if apis.jobset else ("JobSet",)), *(() if apis.kueue else ("Workload",))}
    return {kind: label for kind, label in watched_kinds(settings).items() if kind not in absent}


def watched_namespaces(settings: Settings, kind: str) -> tuple[str | None, ...]:
    """Where to list a kind; None: everywhere."""
    return settings.namespaces if settings.namespaces and KINDS[kind].namespaced else (None,)
