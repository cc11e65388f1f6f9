"""The cluster as the command line uses it: runs, their pods and logs, with the user's own rights (kubeconfig, or a pod's)."""

import json
from collections.abc import Iterator
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from atelier_api.errors import ConfigError, RunError
from atelier_api.exit_codes import ExitCode
from atelier_api.v1alpha1 import TrainingRun
from atelier_operator.names import ATTEMPT_LABEL, CONTAINER, FIELD_MANAGER, GROUP, RUN_LABEL, VERSION

Object = dict[str, Any]

RUNS: Object = {"group": GROUP, "version": VERSION, "plural": "trainingruns"}
CLI_MANAGER = FIELD_MANAGER.replace("operator", "cli")
TIMEOUT_SECONDS = 15


class ClusterUnreachable(RunError):
    """The API server does not answer, or there is no way to it."""

    exit_code = ExitCode.STORE_UNREACHABLE


class ClusterApi:
    """A connection. Every method raises ConfigError for what the API server refuses, ClusterUnreachable where it is away."""

    def __init__(self, context: str | None = None) -> None:
        """`context` of the kubeconfig; None: the present one, or that of the pod this runs in."""
        try:
            config.load_kube_config(context=context)
            self.namespace = _namespace_of(context)
        except config.ConfigException as error:
            try:
                config.load_incluster_config()
                self.namespace = "default"
            except config.ConfigException:
                raise ConfigError(
                    f"there is no cluster to talk to: {error}; set KUBECONFIG, or choose a context with --context"
                ) from None
        self._custom = client.CustomObjectsApi()
        self._core = client.CoreV1Api()

    def apply(self, run: TrainingRun) -> Object:
        """Make the run, or change it to what the file says. Fields that the file leaves out get their defaults."""
        body = run.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=True)
        body |= {"apiVersion": run.api_version, "kind": run.kind}
        metadata = run.metadata
        answer: Object = self._call(
            self._custom.patch_namespaced_custom_object,
            **RUNS,
            namespace=metadata.namespace,
            name=metadata.name,
            body=body,
            field_manager=CLI_MANAGER,
            force=True,
            _content_type="application/apply-patch+yaml",
        )
        return answer

    def run(self, namespace: str, name: str) -> Object:
        """A run. Raises ConfigError when there is none of that name."""
        answer: Object = self._call(self._custom.get_namespaced_custom_object, **RUNS, namespace=namespace, name=name)
        return answer

    def runs(self, namespace: str | None) -> list[Object]:
        """The runs of a namespace, or of all."""
        if namespace is None:
            found = self._call(self._custom.list_cluster_custom_object, **RUNS)
        else:
            found = self._call(self._custom.list_namespaced_custom_object, **RUNS, namespace=namespace)
        return list(found["items"])

    def suspend(self, namespace: str, name: str, wanted: bool) -> Object:
        """Ask for the run to be stopped with a checkpoint, or to go on."""
        answer: Object = self._call(
            self._custom.patch_namespaced_custom_object,
            **RUNS,
            namespace=namespace,
            name=name,
            body={"spec": {"schedule": {"suspend": wanted}}},
            field_manager=CLI_MANAGER,
            _content_type="application/merge-patch+json",
        )
        return answer

    def delete(self, namespace: str, name: str) -> None:
        """Delete the run and its pods. What lies in the store stays."""
        self._call(self._custom.delete_namespaced_custom_object, **RUNS, namespace=namespace, name=name)

    def pods(self, namespace: str, name: str) -> list[Any]:
        """The pods of a run, newest attempt first, then by node."""
        found = self._call(self._core.list_namespaced_pod, namespace=namespace, label_selector=f"{RUN_LABEL}={name}")
        return sorted(found.items, key=_newest_first)

    def log(self, namespace: str, pod: str, *, follow: bool, lines: int | None) -> Iterator[str]:
        """The lines of a pod's log, for as long as they come when it is followed."""
        options: Object = {
            "container": CONTAINER,
            "follow": follow,
            "_preload_content": False,
            "_request_timeout": None,
        }
        if lines is not None:
            options["tail_lines"] = lines
        answer = self._call(self._core.read_namespaced_pod_log, name=pod, namespace=namespace, **options)
        rest = b""
        for chunk in answer.stream():
            *whole, rest = (rest + chunk).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
        if rest:
            yield rest.decode(errors="replace")

    def serves(self, group: str, version: str, plural: str) -> bool:
        """Whether the cluster has a kind."""
        try:
            found = self._custom.get_api_resources(group, version, _request_timeout=TIMEOUT_SECONDS)
        except ApiException as error:
            if error.status == 404:
                return False
            raise _problem(error) from None
        except Exception as error:
            raise ClusterUnreachable(f"the cluster does not answer: {error}") from None
        return any(each.name == plural for each in found.resources)

    def objects(self, group: str, version: str, plural: str) -> list[Object]:
        """All objects of a kind that this user may list."""
        found = self._call(self._custom.list_cluster_custom_object, group=group, version=version, plural=plural)
        return list(found["items"])

    def lease(self, namespace: str, name: str) -> Any | None:
        """A Lease; None when there is none."""
        try:
            return client.CoordinationV1Api().read_namespaced_lease(name, namespace, _request_timeout=TIMEOUT_SECONDS)
        except ApiException as error:
            if error.status == 404:
                return None
            raise _problem(error) from None

    def leases(self, name: str) -> list[Any]:
        """Leases of a name in all namespaces."""
        found = self._call(
            client.CoordinationV1Api().list_lease_for_all_namespaces, field_selector=f"metadata.name={name}"
        )
        return list(found.items)

    def nodes(self) -> list[Any]:
        """The nodes."""
        return list(self._call(self._core.list_node).items)

    def may(self, verb: str, namespace: str) -> bool:
        """Whether this user may do that with runs of a namespace."""
        attributes = {"namespace": namespace, "verb": verb, "group": GROUP, "resource": "trainingruns"}
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        answer = self._call(client.AuthorizationV1Api().create_self_subject_access_review, body=review)
        return bool(answer.status.allowed)

    def _call(self, method: Any, /, **arguments: Any) -> Any:
        try:
            return method(**{"_request_timeout": TIMEOUT_SECONDS, **arguments})
        except ApiException as error:
            raise _problem(error) from None
        except Exception as error:  # urllib3 has a dozen of them for a server that is away
            raise ClusterUnreachable(f"the cluster does not answer: {error}") from None


def _problem(error: ApiException) -> RunError:
    """What the API server said, one mistake a line, without its envelope."""
    try:
        status = json.loads(error.body or "")
    except ValueError:
        status = {}
    causes = (status.get("details") or {}).get("causes") or ()
    said = [f"{each.get('field', '')}: {each.get('message', '')}".strip(": ") for each in causes]
    message = "\n".join(said) or status.get("message") or str(error.reason)
    if error.status == 404 and not causes:
        hint = "" if "not found" in message and "the server could not find" not in message else _NOT_INSTALLED
        return ConfigError(f"{message}{hint}")
    if error.status in (401, 403):
        return ConfigError(f"the cluster does not allow it: {message}")
    if error.status in (400, 409, 422):
        return ConfigError(message)
    return ClusterUnreachable(f"the cluster answers {error.status}: {message}")


_NOT_INSTALLED = "; Atelier is not installed there (see `atelier install-check`)"


def _namespace_of(context: str | None) -> str:
    contexts, active = config.list_kube_config_contexts()
    chosen = next((each for each in contexts if each["name"] == context), active)
    return str(chosen["context"].get("namespace") or "default")


def _newest_first(pod: Any) -> tuple[int, int]:
    labels, annotations = pod.metadata.labels or {}, pod.metadata.annotations or {}
    attempt = int(labels.get(ATTEMPT_LABEL) or 0)
    return -attempt, int(annotations.get("batch.kubernetes.io/job-completion-index") or 0)
