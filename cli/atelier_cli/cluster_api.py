"""The cluster as the command line uses it: runs, their pods and logs, with the user's own rights (kubeconfig, or a pod's)."""

import json
import re
import time
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import urllib3  # type: ignore[import-untyped]
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from atelier_api.errors import ConfigError, CredentialsError, RunError
from atelier_api.exit_codes import ExitCode
from atelier_api.v1alpha1 import TrainingRun
from atelier_operator.names import (
    ATTEMPT_LABEL,
    CONTAINER,
    FIELD_MANAGER,
    GROUP,
    MODEL_CONTAINER,
    RUN_LABEL,
    VERSION,
    WEBHOOK,
)

Object = dict[str, Any]

RUNS: Object = {"group": GROUP, "version": VERSION, "plural": "trainingruns"}
CLI_MANAGER = FIELD_MANAGER.replace("operator", "cli")
TIMEOUT_SECONDS = 15
BUSY_TRIES = 5
INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"
POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class ClusterUnreachable(RunError):
    """The API server does not answer, or there is no way to it."""

    exit_code = ExitCode.STORE_UNREACHABLE


class NotThere(ConfigError):
    """The API server knows no such object, or no such kind."""


class KindMissing(NotThere):
    """Atelier's kinds are not installed."""


class NotAllowed(CredentialsError):
    """The user's rights are not enough."""


class ClusterApi:
    """A connection. Raises ConfigError for what the API server refuses, NotThere, NotAllowed, ClusterUnreachable."""

    def __init__(self, context: str | None = None) -> None:
        """`context` of the kubeconfig; None: the present one, or without a kubeconfig that of the pod this runs in."""
        settings = client.Configuration()
        try:
            config.load_kube_config(context=context, client_configuration=settings)
            self.namespace = _namespace_of(context)
        except config.ConfigException as error:
            if context is not None or not POD_NAMESPACE.exists():
                raise ConfigError(_no_cluster(error)) from None
            config.load_incluster_config(client_configuration=settings)
            self.namespace = POD_NAMESPACE.read_text().strip()
        settings.retries = 0  # the client's own tries print warnings and take a minute
        api = client.ApiClient(settings)
        self._custom = client.CustomObjectsApi(api)
        self._core = client.CoreV1Api(api)
        self._leases = client.CoordinationV1Api(api)
        self._authorization = client.AuthorizationV1Api(api)

    def apply(self, run: TrainingRun) -> Object:
        """Make the run, or change it to what the file says. Fields that the file leaves out get their defaults."""
        # An explicit null is kept where it means something: `gradientClip: null` turns clipping off.
        body = run.model_dump(mode="json", by_alias=True, exclude_unset=True)
        body |= {"apiVersion": run.api_version, "kind": run.kind}
        metadata = run.metadata
        answer: Object | None = self._call(
            self._custom.patch_namespaced_custom_object,
            **RUNS,
            namespace=metadata.namespace,
            name=metadata.name,
            body=body,
            field_manager=CLI_MANAGER,
            force=True,
            _content_type="application/apply-patch+yaml",
        )
        # The client knows no 201 as an answer to a patch, which is what making an object this way gives.
        return answer or self.run(metadata.namespace, metadata.name)

    def run(self, namespace: str, name: str) -> Object:
        """A run. Raises NotThere when there is none of that name."""
        try:
            answer: Object = self._call(
                self._custom.get_namespaced_custom_object, **RUNS, namespace=namespace, name=name
            )
        except KindMissing:
            raise
        except NotThere:
            raise NotThere(
                f"there is no run {name} in namespace {namespace}; `atelier status -A` lists those of all namespaces"
            ) from None
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
        """The pods of a run's newest attempt that has any, by node; of a node's pods the newest."""
        found = self._call(self._core.list_namespaced_pod, namespace=namespace, label_selector=f"{RUN_LABEL}={name}")
        return newest_pods(found.items)

    def log(self, namespace: str, pod: Any, *, follow: bool, lines: int | None) -> Iterator[str]:
        """The lines of a pod's log, for as long as they come when it is followed. While the base model is fetched it is that
        container's."""
        options: Object = {"container": container_of(pod), "follow": follow, "_preload_content": False}
        options["_request_timeout"] = (TIMEOUT_SECONDS, None) if follow else TIMEOUT_SECONDS
        if lines is not None:
            options["tail_lines"] = lines
        name, node = pod.metadata.name, pod.spec.node_name
        try:
            answer = self._call(self._core.read_namespaced_pod_log, name=name, namespace=namespace, **options)
        except ServerError as error:  # the API server passes on what it got from the node
            raise ClusterUnreachable(f"node {node} does not give the log of pod {name}: {error.said}") from None
        rest = b""
        try:
            for chunk in answer.stream():
                *whole, rest = (rest + chunk).split(b"\n")
                yield from (line.decode(errors="replace") for line in whole)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ClusterUnreachable(f"the log of pod {name} broke off: {_cause(error)}") from None
        if rest:
            yield rest.decode(errors="replace")

    def serves(self, group: str, version: str, plural: str) -> bool:
        """Whether the cluster has a kind."""
        try:
            found = self._call(self._custom.get_api_resources, group=group, version=version)
        except NotThere:
            return False
        return any(each.name == plural for each in found.resources)

    def objects(self, group: str, version: str, plural: str, namespace: str | None = None) -> list[Object]:
        """All objects of a kind, in a namespace or in the cluster."""
        place = {"group": group, "version": version, "plural": plural}
        if namespace is None:
            found = self._call(self._custom.list_cluster_custom_object, **place)
        else:
            found = self._call(self._custom.list_namespaced_custom_object, **place, namespace=namespace)
        return list(found["items"])

    def leases(self, label: str) -> list[Any]:
        """Leases with a label, in all namespaces."""
        return list(self._call(self._leases.list_lease_for_all_namespaces, label_selector=label).items)

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
        answer = self._call(self._authorization.create_self_subject_access_review, body=review)
        return bool(answer.status.allowed)

    def _call(self, method: Any, /, **arguments: Any) -> Any:
        """Ask, again where the server is only busy (429: of a kind that has just come, or for all of its users)."""
        try:
            for tries_left in reversed(range(BUSY_TRIES)):
                try:
                    return method(**{"_request_timeout": TIMEOUT_SECONDS, **arguments})
                except ApiException as error:
                    if error.status != HTTPStatus.TOO_MANY_REQUESTS or not tries_left:
                        raise problem(error) from None
                    time.sleep(_retry_after(error))
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ClusterUnreachable(f"the cluster does not answer: {_cause(error)}") from None


class ServerError(ClusterUnreachable):
    """The API server answers that it cannot answer. `said` is its own message."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"the cluster answers {status}: {said}")
        self.said = said


def problem(error: ApiException) -> RunError:
    """What the API server said, one mistake a line, without its envelope."""
    if not error.status:  # the client's word for TLS that has failed
        return ClusterUnreachable(f"the cluster does not answer: {' '.join(str(error.reason).split())}")
    status = _status(error.body)
    causes = (status.get("details") or {}).get("causes") or ()
    said = [_said(str(each.get("field", "")), str(each.get("message", ""))) for each in causes]
    message = str("\n".join(dict.fromkeys(said)) or status.get("message") or error.reason)
    if (spec := message.removeprefix(_DENIED)) != message:
        return ConfigError(spec)
    if error.status == 404:
        # An object that is missing has a kind; a kind that is missing has none.
        if not (status.get("details") or {}).get("name"):
            return KindMissing(NOT_INSTALLED)
        return NotThere(message)
    if error.status == 401:
        return NotAllowed("the cluster does not know this user: it refuses the credentials of the kubeconfig")
    if error.status == 403:
        return NotAllowed(f"the cluster does not allow it: {message}")
    if error.status in (400, 409, 422):
        return ConfigError(message)
    return ServerError(error.status, message)


NOT_INSTALLED = "the cluster has no such kind: Atelier is not installed there (see `atelier install-check`)"


def _retry_after(error: ApiException) -> float:
    """The seconds that the server asks for, at most ten."""
    text = str((error.headers or {}).get("Retry-After", ""))
    return float(min(int(text), 10)) if text.isdecimal() else 1.0


def _status(body: Any) -> Object:
    """The Status object of an answer; a server that knows no such path sends plain text."""
    try:
        found = json.loads(body or "")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


# Our webhook says what the operator would: a mistake in the file, also where the profile forbids it (403).
_DENIED = f'admission webhook "{WEBHOOK}" denied the request: '

# Before the message of a rule stands the type of what it judges, in newer servers nothing; a value is part of the message.
_INVALID = re.compile(
    r'^Invalid value: (?:"(?:object|string|integer|boolean|array)": |(?=[a-z])(?!(?:true|false|null):))'
)


def _said(field: str, message: str) -> str:
    """`spec.model: cannot change …` of the API server's `Invalid value: "object": cannot change …`."""
    message = _INVALID.sub("", message)
    return f"{field}: {message}".strip(": ")


def _cause(error: BaseException) -> str:
    """The innermost reason, without the addresses of Python's objects."""
    while isinstance(getattr(error, "reason", None), BaseException):
        error = error.reason  # type: ignore[attr-defined]
    text = str(error)
    return text.split(">: ", 1)[-1] if text.startswith("<") else text or type(error).__name__


def _no_cluster(error: Exception) -> str:
    said = str(error).removeprefix("Invalid kube-config file. ").rstrip(".")
    return f"there is no cluster to talk to: {said}; set KUBECONFIG to a kubeconfig file, or choose one of its contexts with --context"


def _namespace_of(context: str | None) -> str:
    contexts, active = config.list_kube_config_contexts()
    chosen = next((each for each in contexts if each["name"] == context), active)
    return str(chosen["context"].get("namespace") or "default")


def newest_pods(pods: list[Any]) -> list[Any]:
    """One pod a node, by its number: the newest of the newest attempt."""
    newest = max((attempt_of(pod) for pod in pods), default=0)
    found: dict[int, Any] = {}
    for pod in sorted(pods, key=lambda pod: pod.metadata.creation_timestamp):
        if attempt_of(pod) == newest:
            found[index_of(pod)] = pod
    return [found[index] for index in sorted(found)]


def attempt_of(pod: Any) -> int:
    """Number of the attempt that a pod belongs to."""
    return int((pod.metadata.labels or {}).get(ATTEMPT_LABEL) or 0)


def index_of(pod: Any) -> int:
    """Number of the node that a pod is."""
    return int((pod.metadata.annotations or {}).get(INDEX_ANNOTATION) or 0)


def container_of(pod: Any) -> str:
    """The container that has something to tell: the one that fetches the model, until it is done."""
    for status in pod.status.init_container_statuses or ():
        ended = status.state.terminated if status.state else None
        if status.name == MODEL_CONTAINER and (ended is None or ended.exit_code != 0):
            return MODEL_CONTAINER
    return CONTAINER
