"""The chart in a test's cluster, and the operator as its service account: it may do what the chart allows and nothing else."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.control_plane import audit_log
from cluster.local import Cluster
from cluster_documents import PROFILE
from operator_process import OperatorProcess, free_port

CHART = Path(__file__).resolve().parents[2] / "helm" / "atelier"
SYSTEM = "atelier-system"
ACCOUNT = "atelier-operator"
USER = f"system:serviceaccount:{SYSTEM}:{ACCOUNT}"
IMAGE = {"image": {"repository": "localhost/atelier-operator"}}


def install_chart(cluster: Cluster, values: Mapping[str, Any] | None = None) -> None:
    """Install the chart, or upgrade to these values: our kinds, the roles, the profile of the tests. Without the webhook: nobody
    answers at its Service's address, since the operator runs beside the cluster. Kinds that are there stay as they are."""
    chosen = {"operator": IMAGE, "profiles": {"cluster": {"default": PROFILE["spec"]}}, "webhook": {"enabled": False}}
    chosen |= {"crds": {"install": not cluster.api.has_kind("trainingruns.atelier.dev")}} | dict(values or {})
    file = cluster.state / "values.json"
    file.write_text(json.dumps(chosen))
    install = ("upgrade", "--install", "atelier", str(CHART), "-f", str(file), f"-n={SYSTEM}", "--create-namespace")
    # The check of helm's own, for which the API server puts together what it knows of all kinds, is made in tests/helm.
    cluster.helm(*install, "--disable-openapi-validation")


def chart_operator(cluster: Cluster, log: Path, url: str = "") -> OperatorProcess:
    """The operator's process as the Deployment would run it: its variables, its service account. `url`: of a relay."""
    deployment = cluster.get("deployment", ACCOUNT, f"--namespace={SYSTEM}")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    settings = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    settings |= {"ATELIER_LEASE_NAMESPACE": SYSTEM, "ATELIER_METRICS_PORT": "0"}
    if "ATELIER_WEBHOOK_PORT" in settings:
        settings["ATELIER_WEBHOOK_PORT"] = str(free_port())
    return OperatorProcess(cluster, log, cluster.kubeconfig_of_service_account(SYSTEM, ACCOUNT, url), settings=settings)


@dataclass
class Rights:
    """What the API server's audit log says of the operator's calls since the last look, or since this was made: a cluster that
    tests share has had another operator before."""

    cluster: Cluster
    asked: int = field(init=False, default=0)
    _offset: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.forget()

    def denied(self) -> set[tuple[str, str]]:
        """Verb and path of the calls that no role allows. A quota's or a webhook's 403 is no denial of a right."""
        return {
            (each["verb"], each["requestURI"])
            for each in self._news()
            if (each.get("annotations") or {}).get("authorization.k8s.io/decision") == "forbid"
        }

    def check(self) -> None:
        """Fails when a call was denied."""
        denied = self.denied()
        assert denied == set(), f"the chart's roles do not allow what the operator does: {sorted(denied)}"

    def forget(self) -> None:
        """What was until now does not count."""
        self._news()
        self.asked = 0

    def _news(self) -> list[dict[str, Any]]:
        with audit_log(self.cluster.state).open("rb") as log:
            log.seek(self._offset)
            text = log.read()
        whole = text.rfind(b"\n") + 1  # the last line may be in the making
        self._offset += whole
        user = USER.encode()
        lines = (json.loads(line) for line in text[:whole].splitlines() if user in line)
        found = [each for each in lines if each["user"]["username"] == USER]
        self.asked += len(found)
        return found
