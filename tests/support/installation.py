"""Atelier as an administrator has it: the chart installed with the image of `images/operator`, two replicas in pods of two real nodes.

Pod Security "restricted" is enforced on them, they talk to the API server by its Service and with their service account's token, and
they ask training pods for progress over the pod network.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from atelier_operator.names import FIELD_MANAGER
from chart_release import ACCOUNT, CHART, SYSTEM
from cluster.api import place
from cluster.buildah import BuiltImage
from cluster.daemons import ClusterError
from cluster.local import Cluster
from cluster_training import Place, profile
from operator_process import checked
from s3_server import BUCKET, S3Server

TEAM = "art"

Object = dict[str, Any]


@dataclass(frozen=True)
class Installation:
    """The release `atelier`, and a team's namespace to train in."""

    place: Place
    folder: Path
    values: Mapping[str, Any]

    @property
    def cluster(self) -> Cluster:
        return self.place.cluster

    def helm(self, verb: str, *, team_cpu: str | None) -> None:
        """Install or upgrade, with so much CPU for the team's runs, or without the team."""
        values = copy.deepcopy(dict(self.values))
        if team_cpu is None:
            values["quotas"] = {"engine": "none"}
        else:
            values["quotas"]["teams"][0]["host"] = {"cpu": team_cpu}
        path = self.folder / "values.json"
        path.write_text(json.dumps(values))
        given = ["-f", str(path), f"--namespace={SYSTEM}", "--wait", "--timeout=1m"]
        try:
            self.cluster.helm(verb, "atelier", str(CHART), *given)
        except ClusterError as error:
            raise AssertionError(f"{error}\n{self.story()}") from None

    def story(self) -> str:
        """What happened to the replicas, for whoever reads of a failure."""
        where = f"--namespace={SYSTEM}"
        logs = self.cluster.kubectl("logs", where, f"deployment/{ACCOUNT}", "--tail=40", "--ignore-errors")
        return self.cluster.kubectl("get", "pods,events", where, "-o", "wide") + logs

    def replicas(self) -> list[Object]:
        """The operator's pods that are not on their way out."""
        pods = self.cluster.api.items("pods", SYSTEM, "app.kubernetes.io/component=operator")
        return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    def leader(self) -> str:
        """The pod that holds the Lease; nothing while nobody does."""
        lease = self.cluster.api.get(place("leases", SYSTEM, ACCOUNT)) or {"spec": {}}
        return str(lease["spec"].get("holderIdentity") or "")

    def tried(self, namespace: str) -> int:
        """The operator's writes below a namespace, those that were refused among them."""
        found = (each for each in self.cluster.audit() if each.get("userAgent") == FIELD_MANAGER)
        return sum(f"/namespaces/{namespace}/" in each["requestURI"] and each["verb"] != "get" for each in found)


@pytest.fixture(scope="module")
def installation(
    start_cluster: Callable[..., Cluster],
    operator_image: BuiltImage,
    store: S3Server,
    base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Installation]:
    """Fails in the end if an invariant was broken at any moment meanwhile. The team has room for half a run."""
    image = {"repository": operator_image.repository, "tag": operator_image.tag, "pullPolicy": "Never"}
    team = {"name": TEAM, "namespaces": [TEAM], "gpus": [{"flavor": "gpu", "quota": 2}]}
    priorities = [{"name": "high", "value": 1000}]
    with start_cluster(nodes=2) as cluster:
        given = profile(base) | {"storage": storage(cluster, store)}
        values = {
            "operator": {"image": image, "progressSeconds": 1},
            "profiles": {"cluster": {"default": given}},
            "quotas": {"engine": "kueue", "flavors": [{"name": "gpu"}], "teams": [team], "priorityClasses": priorities},
        }
        cluster.import_image(operator_image.archive)
        cluster.make_namespace(SYSTEM)
        cluster.kubectl("label", "namespace", SYSTEM, "pod-security.kubernetes.io/enforce=restricted")
        made = Installation(Place.make(cluster, TEAM, store, base), tmp_path_factory.mktemp("values"), values)
        made.helm("install", team_cpu="500m")
        with checked(cluster):
            yield made


def storage(cluster: Cluster, store: S3Server) -> Object:
    """The store of runs that name none, as the profile has it."""
    endpoint = f"http://{cluster.share(int(store.url.rsplit(':', 1)[1]))}"
    return {"uri": f"s3://{BUCKET}/runs", "s3": {"endpoint": endpoint}, "credentialsRef": {"name": "s3"}}
