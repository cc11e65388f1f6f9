"""The whole life of a run on a real control plane, with an operator that may be killed at one of its writes.

A run waits for quota, trains, crashes and is restarted by its JobSet, is suspended and resumed, succeeds, and is deleted by the
operator when its time is over. Each life has a namespace, an operator and a relay of its own, so several are lived at a time.
"""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from api_proxy import Aim, ApiProxy, Moment
from atelier_api.exit_codes import ExitCode
from chart_release import SYSTEM
from cluster.local import Cluster
from cluster_documents import PROFILE, queues, run_document
from fake_pods import result
from forked_operator import ForkedOperator
from operator_process import ClusterRun

Object = dict[str, Any]

PATIENCE_SECONDS = 60.0
GPUS = 2
LEASES: Object = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "ClusterRole",
    "metadata": {"name": "sweep-leases"},
    "rules": [{"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"]}],
}
"""Each operator of the sweep has its Lease in its own namespace; the chart's role is about one in the release's."""


@dataclass(frozen=True)
class End:
    """What must be the same, whenever the operator was killed."""

    phase: str
    conditions: frozenset[tuple[str, str, str]]
    attempts: tuple[tuple[int, str, int, int], ...]
    restarts: tuple[int, int]
    children: frozenset[tuple[str, str]]
    made: frozenset[tuple[str, str, int]]
    left: frozenset[tuple[str, str]]


class Life:
    """One life in a new namespace. `live` gives its end; `proxy.writes` tells afterwards what the operator has written."""

    def __init__(self, cluster: Cluster, namespace: str, proxy: ApiProxy, token: str, folder: Path) -> None:
        self.cluster, self.namespace, self.proxy = cluster, namespace, proxy
        self.run = ClusterRun(cluster, namespace, "run")
        kubeconfig = folder / f"{namespace}.kubeconfig"
        cluster.certificates.write_kubeconfig(kubeconfig, {"token": token}, proxy.url)
        environment = {
            "KUBECONFIG": str(kubeconfig),
            "NO_PROXY": "127.0.0.1",
            "ATELIER_NAMESPACES": namespace,
            "ATELIER_LEASE_NAMESPACE": namespace,
            "ATELIER_IDENTITY": "operator",
            "ATELIER_METRICS_PORT": "0",
            "ATELIER_PROGRESS_SECONDS": "600",
        }
        self.operator = ForkedOperator(environment, folder / f"{namespace}.log")

    def live(self, at: Aim, moment: Moment) -> End:
        """The whole life. Raises AssertionError with all writes when the run does not come on."""
        self.proxy.aim(at, moment, self.operator.kill)
        self._prepare()
        self.operator.start()
        try:
            self._train()
            status = self.run.status()
            children = frozenset(self._objects())
            self._be_forgotten()
        finally:
            self.operator.kill()
        return self._end(status, children)

    def _train(self) -> None:
        self._until(lambda: self._is("Queued", "ExceedsMaxQuota"), "the run to be queued")
        self.cluster.apply(queues(self.namespace, GPUS))
        first = self._gang(set())
        self._until(lambda: self._is("Preparing", "Starting"), "the gang to start")
        self._end_pod(first[0], ExitCode.INTERNAL)
        known = {pod["metadata"]["uid"] for pod in first}
        second = self._gang(known)
        self._until(lambda: self.run.status()["restarts"]["counted"] == 1, "the restart to be counted")
        self._until(self._starts_again, "the gang to start again")
        self.run.patch({"schedule": {"suspend": True}})
        self._until(lambda: self._is("Suspended", "Requested"), "the run to be suspended")
        self.run.patch({"schedule": {"suspend": False}})
        third = self._gang(known | {pod["metadata"]["uid"] for pod in second})
        self._until(self._starts_again, "the gang to start after the pause")
        for pod in third:
            self._end_pod(pod, ExitCode.DONE)
        self._until(lambda: self._is("Succeeded", "Completed"), "the run to succeed")

    def _be_forgotten(self) -> None:
        self.run.patch({"schedule": {"ttlSecondsAfterFinished": 0}})
        self._until(lambda: self.cluster.api.get(self.run.place) is None, "the run to be deleted")
        self._until(lambda: not self._objects(), "everything of the run to go")

    def _prepare(self) -> None:
        """A namespace with a queue that is too small for the run, and with what the operator needs."""
        namespace = self.cluster.make_namespace(self.namespace)
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": LEASES["metadata"]["name"]}
        subject = {"kind": "ServiceAccount", "name": "atelier-operator", "namespace": SYSTEM}
        binding = {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": {"name": "leases", "namespace": namespace},
            "roleRef": role,
            "subjects": [subject],
        }
        profile = {**PROFILE, "kind": "TrainingProfile", "metadata": {"name": "own", "namespace": namespace}}
        run = run_document(
            namespace,
            "run",
            profileRef={"kind": "TrainingProfile", "name": "own"},
            schedule={"queue": "gpu", "terminationGraceSeconds": 5},
        )
        self.cluster.apply([LEASES, binding, profile, *queues(namespace, GPUS - 1), run])

    def _until(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait; an operator that was struck is followed by another one."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not (value := condition()):
            if not self.operator.running():
                mine = self.operator.starts == len(self.proxy.struck)
                assert mine, f"the operator has ended by itself; {self._story()}"
                self.operator.start()
            assert time.monotonic() < end, f"in vain for {what}; {self._story()}"
            time.sleep(0.2)
        return value

    def _story(self) -> str:
        status = json.dumps(self.cluster.api.get(self.run.place) or {}, indent=1)
        writes = "\n".join(map(str, self.proxy.writes))
        return f"killed at {self.proxy.struck}; writes:\n{writes}\n{status}\n{self.operator.text()[-2000:]}"

    def _is(self, phase: str, reason: str) -> bool:
        status = self.run.status()
        return (status.get("phase"), status.get("reason")) == (phase, reason)

    def _starts_again(self) -> bool:
        return self._is("Recovering", "Restarting") and self.run.condition("Scheduled").get("status") == "True"

    def _gang(self, known: set[str]) -> list[Object]:
        """Two running pods, none of which was known before."""

        def found() -> list[Object] | None:
            pods = [pod for pod in self.run.pods() if pod["metadata"]["uid"] not in known]
            return pods if len(pods) == 2 else None

        pods: list[Object] = self._until(found, "two new pods")
        return pods

    def _end_pod(self, pod: Object, code: ExitCode) -> None:
        self.run.end_pod(pod, int(code), result(code))

    def _objects(self) -> set[tuple[str, str]]:
        """Everything of the run that is there: what is labelled as its own, and its Workloads. Pods come by their Jobs."""
        kinds = ("jobsets", "jobs", "configmaps", "services", "workloads")
        found = ((kind, each) for kind in kinds for each in self.cluster.api.items(kind, self.namespace))
        return {
            (kind, each["metadata"]["name"]) for kind, each in found if each["metadata"]["name"] != "kube-root-ca.crt"
        } | {("pods", pod["metadata"]["name"].rsplit("-", 1)[0]) for pod in self.run.objects("pods")}

    def _end(self, status: Object, children: frozenset[tuple[str, str]]) -> End:
        made = Counter((each.resource, each.name) for each in self.proxy.writes if each.made)
        return End(
            phase=status["phase"],
            conditions=frozenset((each["type"], each["status"], each["reason"]) for each in status["conditions"]),
            attempts=tuple(
                (each["number"], each["reason"], each["counted"], each["uncounted"]) for each in status["attempts"]
            ),
            restarts=(status["restarts"]["counted"], status["restarts"]["uncounted"]),
            children=frozenset((kind, _without_hash(kind, name)) for kind, name in children),
            made=frozenset((*what, number) for what, number in made.items()),
            left=frozenset(self._objects()),
        )


def _without_hash(kind: str, name: str) -> str:
    """Kueue ends the name of a Workload with a hash."""
    return name.rsplit("-", 1)[0] if kind == "workloads" else name
