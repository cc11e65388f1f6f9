"""The API server as a test asks it: over one kept connection per thread instead of a kubectl process per question.

A test that waits asks often; a process for each question costs more processor time than what it waits for.
"""

import http.client
import json
import ssl
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from cluster.certificates import Certificates
from cluster.daemons import ClusterError

Object = dict[str, Any]

MERGE = "application/merge-patch+json"
APPLY = "application/apply-patch+yaml"
_GROUPS = {
    **dict.fromkeys(("pods", "services", "configmaps", "namespaces", "serviceaccounts", "resourcequotas"), "api/v1"),
    **dict.fromkeys(("trainingruns", "trainingprofiles"), "apis/atelier.dev/v1alpha1"),
    **dict.fromkeys(("clusterqueues", "localqueues", "workloads"), "apis/kueue.x-k8s.io/v1beta1"),
    "jobsets": "apis/jobset.x-k8s.io/v1alpha2",
    "jobs": "apis/batch/v1",
    "leases": "apis/coordination.k8s.io/v1",
}


def place(plural: str, namespace: str | None = None, name: str | None = None, subresource: str = "") -> str:
    """The path of objects, or of one, of the kinds that tests ask for."""
    parts = [_GROUPS[plural], *(("namespaces", namespace) if namespace else ()), plural]
    return "/" + "/".join([*parts, *([quote(name)] if name else []), *([subresource] if subresource else [])])


class Api:
    """Calls with the administrator's certificate."""

    def __init__(self, certificates: Certificates) -> None:
        self._host = urlsplit(certificates.api_url).netloc
        self._certificates = certificates
        self._local = threading.local()
        self._known: dict[tuple[str, str], Object] = {}

    def get(self, path: str, **query: str) -> Object | None:
        """An object or a list; None where there is none, or no such kind."""
        status, answer = self._ask("GET", path + (f"?{urlencode(query)}" if query else ""), None, "")
        if status == 404:
            return None
        return _checked("GET", path, status, answer)

    def items(self, plural: str, namespace: str | None = None, selector: str = "") -> list[Object]:
        """The objects with these labels; none where the kind is not served."""
        found = self.get(place(plural, namespace), **({"labelSelector": selector} if selector else {})) or {}
        return list(found.get("items") or ())

    def is_ready(self) -> bool:
        """Whether the API server answers, and calls itself ready."""
        try:
            return self.get("/readyz") is not None
        except ClusterError:
            return False

    def has_kind(self, crd: str) -> bool:
        """Whether the kind of a CRD is served."""
        found = self.get(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{crd}") or {}
        conditions = (found.get("status") or {}).get("conditions") or ()
        return any((each["type"], each["status"]) == ("Established", "True") for each in conditions)

    def send(self, verb: str, path: str, body: Mapping[str, Any] | None, content_type: str = MERGE) -> Object:
        """A write: POST, PATCH (a merge by default), DELETE. Raises ClusterError with what the server says."""
        kind = "application/json" if verb in ("POST", "PUT", "DELETE") else content_type
        return _checked(verb, path, *self._ask(verb, path, body, kind))

    def apply(self, manifest: Mapping[str, Any]) -> None:
        """Server-side apply of one object, as `kubectl apply --server-side` does it; in `default` when it names no namespace."""
        version, kind, metadata = manifest["apiVersion"], manifest["kind"], manifest["metadata"]
        resource = self._resource(version, kind)
        where = ["apis" if "/" in version else "api", version]
        where += ["namespaces", metadata.get("namespace", "default")] if resource["namespaced"] else []
        path = "/" + "/".join([*where, resource["name"], quote(metadata["name"])])
        self.send("PATCH", f"{path}?fieldManager=kubectl", manifest, APPLY)

    def _resource(self, version: str, kind: str) -> Object:
        """What the server says of a kind: its plural name, and whether it is namespaced. It is asked again for one not known yet."""
        if (version, kind) not in self._known:
            served = self.get(f"/{'apis' if '/' in version else 'api'}/{version}") or {}
            found = (each for each in served.get("resources", ()) if "/" not in each["name"])
            self._known |= {(version, each["kind"]): each for each in found}
        if (version, kind) not in self._known:
            raise ClusterError(f"the API server does not serve {kind} of {version}")
        return self._known[version, kind]

    def _ask(self, verb: str, path: str, body: Mapping[str, Any] | None, kind: str) -> tuple[int, Object]:
        headers = {"Accept": "application/json", **({"Content-Type": kind} if body is not None else {})}
        text = None if body is None else json.dumps(body)
        for last in (False, True):
            connection = self._connection()
            try:
                connection.request(verb, path, text, headers)
                answer = connection.getresponse()
                return answer.status, _document(answer.read())
            except (http.client.HTTPException, OSError) as error:
                self._local.connection = None  # it was kept for long, or the server has been started anew
                connection.close()
                if last:
                    raise ClusterError(f"{verb} {path}: the API server does not answer: {error}") from error
        raise AssertionError

    def _connection(self) -> http.client.HTTPSConnection:
        connection: http.client.HTTPSConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            files = self._certificates
            trust = ssl.create_default_context(cafile=str(files.authority))
            trust.load_cert_chain(files.certificate("admin"), files.key("admin"))
            connection = self._local.connection = http.client.HTTPSConnection(self._host, timeout=60, context=trust)
        return connection


def _document(text: bytes) -> Object:
    """Of a group that is not served the answer is a line of text."""
    try:
        return dict(json.loads(text or b"{}"))
    except ValueError:
        return {"message": text.decode(errors="replace").strip()}


def _checked(verb: str, path: str, status: int, answer: Object) -> Object:
    if status >= 300:
        raise ClusterError(f"{verb} {path}: {status}: {answer.get('message')}")
    return answer
