"""The Kubernetes API as the operator uses it: nine calls on plain objects. The only module that imports the client.

The client brings authentication and TLS; the requests are made here, since server-side apply of our own kinds, deletion by uid
and discovery are the same for every kind.
"""

import asyncio
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from kubernetes.aio import client, config

from atelier_operator.names import FIELD_MANAGER, GROUP, VERSION

Object = dict[str, Any]

TIMEOUT_SECONDS = 30.0
TRIES = 5
PAGE = 500
RETRIED = frozenset({429, 500, 502, 503, 504})


class ApiError(Exception):
    """The API server said no. `code` is its status, 0 where it did not answer."""

    def __init__(self, code: int, message: str, retry_after: float = 0.0) -> None:
        super().__init__(f"{code}: {message}" if code else message)
        self.code = code
        self.message = message
        self.retry_after = retry_after


class LostLeadership(Exception):
    """Another replica may be writing by now: nothing more is written."""


@dataclass(frozen=True)
class Kind:
    """Where the objects of a kind lie."""

    group: str
    version: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str = "") -> str:
        """The path of the kind, of a namespace's objects, or of one object."""
        parts = ["api" if not self.group else f"apis/{self.group}", self.version]
        if self.namespaced and namespace:
            parts += ["namespaces", namespace]
        parts += [self.plural, *([name] if name else []), *([subresource] if subresource else [])]
        return "/" + "/".join(parts)


KINDS: Mapping[str, Kind] = {
    "TrainingRun": Kind(GROUP, VERSION, "trainingruns"),
    "TrainingProfile": Kind(GROUP, VERSION, "trainingprofiles"),
    "ClusterTrainingProfile": Kind(GROUP, VERSION, "clustertrainingprofiles", namespaced=False),
    "JobSet": Kind("jobset.x-k8s.io", "v1alpha2", "jobsets"),
    "Job": Kind("batch", "v1", "jobs"),
    "Workload": Kind("kueue.x-k8s.io", "v1beta1", "workloads"),
    "Pod": Kind("", "v1", "pods"),
    "Node": Kind("", "v1", "nodes", namespaced=False),
    "ConfigMap": Kind("", "v1", "configmaps"),
    "Service": Kind("", "v1", "services"),
    "Event": Kind("", "v1", "events"),
    "ResourceQuota": Kind("", "v1", "resourcequotas"),
    "Lease": Kind("coordination.k8s.io", "v1", "leases"),
}


class Cluster:
    """A connection. `observe` is told of every request: verb, kind, status. `may_write` is asked before each try of a write but
    to a Lease; where it says no, LostLeadership is raised."""

    def __init__(self, api: Any, observe: Callable[[str, str, int], None] = lambda *_: None) -> None:
        self._api = api
        self._observe = observe
        self.may_write: Callable[[], bool] = lambda: True

    @classmethod
    async def connect(cls, observe: Callable[[str, str, int], None] = lambda *_: None) -> "Cluster":
        """With the pod's service account, or outside of a cluster with the kubeconfig."""
        try:
            config.load_incluster_config()
        except config.ConfigException:
            await config.load_kube_config()
        return cls(client.ApiClient(), observe)

    async def close(self) -> None:
        await self._api.close()

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        """The object as the API server has it now; None when there is none."""
        try:
            return await self._request("GET", kind, KINDS[kind].path(namespace, name))
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    async def list(self, kind: str, namespace: str | None, selector: str = "") -> list[Object]:
        """The objects of a namespace, or of all, read page by page; none where the kind is not served."""
        found: list[Object] = []
        query = {"limit": str(PAGE), **({"labelSelector": selector} if selector else {})}
        try:
            while True:
                page = await self._request("GET", kind, KINDS[kind].path(namespace), query=query)
                found += page.get("items") or ()
                rest = page["metadata"].get("continue")
                if not rest:
                    break
                query["continue"] = rest
        except ApiError as error:
            if error.code != 404:
                raise
        named = {"apiVersion": f"{KINDS[kind].group}/{KINDS[kind].version}".removeprefix("/"), "kind": kind}
        return [named | each for each in found]  # in a list the items do not say what they are

    async def create(self, manifest: Object) -> Object:
        """Make an object. Raises ApiError 409 when there is one of that name."""
        kind = manifest["kind"]
        path = KINDS[kind].path(manifest["metadata"]["namespace"])
        return await self._request("POST", kind, path, manifest, {"fieldManager": FIELD_MANAGER})

    async def delete(self, kind: str, namespace: str, name: str, uid: str, *, force: bool = False) -> None:
        """Delete that very object and, first, what belongs to it. It may be gone already, or be another one by now. `force`: a
        pod goes without its node's answer."""
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Foreground",
            "preconditions": {"uid": uid},
            **({"gracePeriodSeconds": 0} if force else {}),
        }
        try:
            await self._request("DELETE", kind, KINDS[kind].path(namespace, name), options)
        except ApiError as error:
            if error.code not in (404, 409):
                raise

    async def apply_status(self, metadata: Object, status: Object) -> Object:
        """Make `status` what our field manager says of the run that `metadata` was read of: fields that are left out are
        removed. Raises ApiError 409 where the run has changed since, or is another one."""
        namespace, name = metadata["namespace"], metadata["name"]
        manifest = {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": "TrainingRun",
            "metadata": {each: metadata[each] for each in ("name", "namespace", "uid", "resourceVersion")},
            "status": status,
        }
        path = KINDS["TrainingRun"].path(namespace, name, "status")
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        return await self._request("PATCH", "TrainingRun", path, manifest, query, "application/apply-patch+yaml")

    async def replace(self, manifest: Object) -> Object:
        """Replace an object that has not changed since it was read. Raises ApiError 409 when it has."""
        kind, metadata = manifest["kind"], manifest["metadata"]
        path = KINDS[kind].path(metadata["namespace"], metadata["name"])
        return await self._request("PUT", kind, path, manifest, {"fieldManager": FIELD_MANAGER}, tries=1)

    async def serves(self, kind: str) -> bool:
        """Whether the cluster has the kind."""
        where = KINDS[kind]
        try:
            found = await self._request("GET", "APIResourceList", f"/apis/{where.group}/{where.version}")
        except ApiError as error:
            if error.code == 404:
                return False
            raise
        return any(each["name"] == where.plural for each in found.get("resources") or ())

    async def _request(
        self,
        verb: str,
        kind: str,
        path: str,
        body: Object | None = None,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
        tries: int = TRIES,
    ) -> Object:
        """One request, tried again where the server is busy or away. A POST that got no answer is not repeated blindly:
        its second try finds the object there (409), which callers take for success when it is theirs."""
        for attempt in range(1, tries + 1):
            if verb != "GET" and kind != "Lease" and not self.may_write():
                raise LostLeadership
            try:
                answer = await self._once(verb, path, body, query, content_type)
            except ApiError as error:
                self._observe(verb, kind, error.code)
                if attempt == tries or (error.code and error.code not in RETRIED):
                    raise
                await asyncio.sleep(max(error.retry_after, min(5.0, 0.2 * 2**attempt) * random.uniform(0.8, 1.2)))
            else:
                self._observe(verb, kind, 200)
                return answer
        raise ValueError(f"tries is {tries}; must be at least 1")

    async def _once(
        self, verb: str, path: str, body: Object | None, query: Mapping[str, str] | None, content_type: str
    ) -> Object:
        headers = {"Accept": "application/json", "Content-Type": content_type, "User-Agent": FIELD_MANAGER}
        parameters: list[tuple[str, Any]] = []
        try:
            await self._api.update_params_for_auth(headers, parameters, ["BearerToken"])
            response = await self._api.request(
                verb,
                self._api.configuration.host + path,
                query_params=[*parameters, *(query or {}).items()],
                headers=headers,
                body=body,
                _request_timeout=TIMEOUT_SECONDS,
            )
            return dict(json.loads(response.data or "{}"))
        except client.ApiException as error:
            said = _said(error.body) or str(error.reason)
            raise ApiError(error.status or 0, said, _retry_after(error.headers)) from None
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ApiError(0, f"no answer to {verb} {path}: {error or type(error).__name__}") from error


def _retry_after(headers: Any) -> float:
    """Seconds that a busy server asks to wait for, at most half a minute."""
    text = (headers or {}).get("Retry-After", "")
    return min(30.0, float(text)) if text.isdecimal() else 0.0


def _said(body: Any) -> str:
    """The message of a Status object."""
    try:
        return str(json.loads(body)["message"])
    except (TypeError, ValueError, KeyError):
        return ""
