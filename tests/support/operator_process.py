"""The operator as a process beside a test's cluster, and runs seen through the API."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atelier_api.crdgen import resources
from cluster.api import place
from cluster.local import Cluster
from invariants import broken, changes

Object = dict[str, Any]
PATIENCE_SECONDS = 90.0
LONGEST_PAUSE = 0.3
CHILDREN = ("jobsets", "jobs", "pods", "configmaps", "services")


def until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> Any:
    """Wait for a condition, which may take long on a busy machine."""
    end = time.monotonic() + seconds
    pause = 0.05
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(pause)
        pause = min(1.2 * pause, LONGEST_PAUSE)
    raise AssertionError(f"waited {seconds:g} s in vain for {what}")


def install_crds(cluster: Cluster) -> None:
    """Our kinds, as the chart brings them."""
    for resource in resources():
        cluster.apply(resource.path.read_text())
    for resource in resources():
        wait_for_crd(cluster, f"{resource.plural}.atelier.dev")


def wait_for_crd(cluster: Cluster, name: str) -> None:
    """Wait until a kind is served. `kubectl wait` fails at once where the CRD has no conditions yet."""
    until(lambda: cluster.api.has_kind(name), f"{name} to be served")


@contextlib.contextmanager
def checked(cluster: Cluster) -> Iterator[None]:
    """Fails in the end if an invariant was broken at any moment meanwhile, or if a child outlives its run.
    A ClusterQueue of a namespace's name is its quota."""
    before = cluster.audited()
    yield
    until(lambda: not left_behind(cluster), "the deletion of what belonged to runs that are gone")
    quotas = {each["metadata"]["name"]: _gpus(each) for each in cluster.api.items("clusterqueues")}
    found = broken(changes(cluster.audit(before)), quotas)
    assert not found, "\n".join(found)


def left_behind(cluster: Cluster) -> list[str]:
    """The children of runs that are gone which nobody has deleted."""
    children = [*cluster.api.items("jobsets"), *cluster.api.items("jobs")]
    runs = {each["metadata"]["uid"] for each in cluster.api.items("trainingruns")}
    return [
        each["metadata"]["name"]
        for each in children
        for owner in each["metadata"].get("ownerReferences") or ()
        if owner["kind"] == "TrainingRun" and owner["uid"] not in runs and "deletionTimestamp" not in each["metadata"]
    ]


def forget_namespace(cluster: Cluster, namespace: str) -> None:
    """Delete the runs of a namespace, whose pods would keep their GPUs from the tests that follow. The namespace itself stays: for
    its end the API server is asked eighty times, for whatever of any kind may be in it."""
    cluster.api.send("DELETE", place("trainingruns", namespace), None)


def _gpus(queue: Object) -> int:
    groups = queue["spec"]["resourceGroups"]
    resources = [each for group in groups for flavor in group["flavors"] for each in flavor["resources"]]
    return sum(int(each["nominalQuota"]) for each in resources if each["name"] == "nvidia.com/gpu")


@dataclass
class OperatorProcess:
    """`python -m atelier_operator` with the rights of a kubeconfig. Started again it is the same replica: it has its Lease."""

    cluster: Cluster
    log: Path
    kubeconfig: Path | None = None
    prefix: Sequence[str] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    identity: str = field(default_factory=lambda: f"operator-{time.monotonic_ns()}")
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> "OperatorProcess":
        """Start it; `ready` waits until it leads."""
        environment = {
            **os.environ,
            "KUBECONFIG": str(self.kubeconfig or self.cluster.kubeconfig),
            "ATELIER_IDENTITY": self.identity,
            "ATELIER_METRICS_PORT": str(free_port()),
            "ATELIER_PROGRESS_SECONDS": "1",
            **self.settings,
        }
        command = [*self.prefix, sys.executable, "-m", "atelier_operator"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        return self

    def kill(self) -> None:
        """SIGKILL, in the middle of whatever it does."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM: it lets go of its Lease."""
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"the operator did not stop:\n{self.text()[-3000:]}") from None
        self.process = None

    def text(self) -> str:
        """What it has logged."""
        return self.log.read_text(errors="replace")


@dataclass(frozen=True)
class ClusterRun:
    """A TrainingRun of a test, in a namespace of its own."""

    cluster: Cluster
    namespace: str
    name: str

    @property
    def place(self) -> str:
        return place("trainingruns", self.namespace, self.name)

    def get(self) -> Object:
        found = self.cluster.api.get(self.place)
        assert found is not None, f"there is no run {self.name} in namespace {self.namespace}"
        return found

    def status(self) -> Object:
        return dict(self.get().get("status") or {})

    def condition(self, kind: str) -> Object:
        found = [each for each in self.status().get("conditions", ()) if each["type"] == kind]
        return dict(found[0]) if found else {}

    def patch(self, spec: Object) -> None:
        """Change part of the spec."""
        self.cluster.api.send("PATCH", self.place, {"spec": spec})

    def delete(self) -> None:
        self.cluster.api.send("DELETE", self.place, None)

    def wait(self, phase: str, reason: str | None = None, seconds: float = PATIENCE_SECONDS) -> Object:
        """The status, once the run is in the phase. Fails with the status that it had instead."""
        seen: Object = {}

        def reached() -> bool:
            seen.clear()
            seen.update(self.status())
            return seen.get("phase") == phase and reason in (None, seen.get("reason"))

        try:
            until(reached, f"{self.name} to be {phase} {reason or ''}", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {json.dumps(seen, indent=1)}") from None
        return seen

    def objects(self, *plurals: str) -> list[Object]:
        """Everything of these kinds, of all without any, that is labelled as the run's."""
        selector = f"atelier.dev/run={self.name}"
        found = (self.cluster.api.items(plural, self.namespace, selector) for plural in plurals or CHILDREN)
        return [each for items in found for each in items]

    def pods(self) -> list[Object]:
        """Pods that have not ended and are not being deleted, by index."""
        live = [
            pod
            for pod in self.objects("pods")
            if pod["status"].get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]
        ]
        return sorted(live, key=_index)

    def end_pod(self, pod: Object, code: int, message: str = "") -> None:
        """Let a pod of a fake node end, as its kubelet would tell it."""
        terminated = {
            "exitCode": code,
            "reason": "Completed" if code == 0 else "Error",
            "message": message,
            "startedAt": pod["status"].get("startTime"),
            "finishedAt": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        container = {"name": "trainer", "image": "x", "imageID": "", "ready": False, "restartCount": 0}
        status = {
            "phase": "Succeeded" if code == 0 else "Failed",
            "containerStatuses": [container | {"state": {"terminated": terminated}}],
        }
        path = place("pods", self.namespace, pod["metadata"]["name"], "status")
        self.cluster.api.send("PATCH", path, {"status": status})


def _index(pod: Object) -> int:
    return int(pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"])


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
