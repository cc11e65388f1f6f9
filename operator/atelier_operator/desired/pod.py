"""The pod template of a node: restricted Pod Security, no token, everything that is written lies in emptyDirs."""

from collections.abc import Iterator
from typing import Any

from atelier_api.v1alpha1.profile import GpuClass, TrainingProfileSpec, Volume
from atelier_operator.desired.order import Order
from atelier_operator.names import (
    AGENT_PORT,
    CONTAINER,
    MODEL_CONTAINER,
    RENDEZVOUS_PORT,
    RESTART_LABEL,
    RUN_FILE_FOLDER,
    RUN_FILE_KEY,
    SCRATCH,
    rendezvous,
)
from atelier_operator.planner.cluster import gpu_class, network

GRACE_MARGIN_SECONDS = 15
"""The kubelet kills so much later than the agent gives up waiting for its ranks."""

S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def pod_template(order: Order) -> dict[str, Any]:
    """Template of the pods of the attempt, one per node."""
    spec, profile = order.run_file.spec, order.profile
    gpu = gpu_class(spec, profile)
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": spec.schedule.termination_grace_seconds + GRACE_MARGIN_SECONDS,
        "securityContext": _pod_security(profile),
        "containers": [_container(order, gpu)],
        "volumes": list(_volumes(order)),
    }
    if "://" in spec.model.source:
        pod["initContainers"] = [_model_container(order)]
    if order.backend == "job":
        pod["subdomain"] = order.name
    if profile.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": secret.name} for secret in profile.image_pull_secrets]
    if spec.schedule.priority and order.queue is None:
        pod["priorityClassName"] = spec.schedule.priority
    if gpu is not None:
        pod |= _placement(gpu)
    if order.excluded_nodes:
        pod["affinity"] = _away_from(order.excluded_nodes)
    return {"metadata": {"labels": order.labels}, "spec": pod}


def _pod_security(profile: TrainingProfileSpec) -> dict[str, Any]:
    security = profile.security
    return {
        "runAsNonRoot": True,
        "runAsUser": security.run_as_user,
        "runAsGroup": security.run_as_group,
        "fsGroup": security.run_as_group,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _model_container(order: Order) -> dict[str, Any]:
    """Fetches the base model into the pod's scratch, which the trainer then finds there."""
    arguments = ["-m", "atelier_runtime.prefetch", "--run-file", f"{RUN_FILE_FOLDER}/{RUN_FILE_KEY}"]
    return _process(order, MODEL_CONTAINER, arguments) | {"resources": _resources(order, None)}


def _container(order: Order, gpu: GpuClass | None) -> dict[str, Any]:
    """The agent, with everything below it."""
    arguments = ["-m", "atelier_runtime.agent", "--run-file", f"{RUN_FILE_FOLDER}/{RUN_FILE_KEY}"]
    arguments += ["--node-rank", "$(JOB_COMPLETION_INDEX)", "--rendezvous", rendezvous(order.name, order.backend)]
    arguments += ["--port", str(AGENT_PORT), "--restart", "$(ATELIER_RESTART)"]
    return _process(order, CONTAINER, arguments) | {
        "ports": [
            {"name": "metrics", "containerPort": AGENT_PORT},
            {"name": "rendezvous", "containerPort": RENDEZVOUS_PORT},
        ],
        "resources": _resources(order, gpu),
    }


def _process(order: Order, name: str, arguments: list[str]) -> dict[str, Any]:
    """What both containers have in common."""
    profile = order.profile
    return {
        "name": name,
        "image": profile.image,
        "imagePullPolicy": profile.image_pull_policy,
        "command": [profile.python],
        "args": arguments,
        "env": list({each["name"]: each for each in _environment(order)}.values()),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": list(_mounts(order)),
    }


def _environment(order: Order) -> Iterator[dict[str, Any]]:
    """Later ones replace earlier ones of the same name (a JobSet takes no name twice), so what must be so comes last."""
    spec, profile = order.run_file.spec, order.profile
    yield from ({"name": each.name, "value": each.value} for each in profile.environment)
    chosen = network(spec, profile)
    if chosen is not None:
        yield from ({"name": each.name, "value": each.value} for each in chosen.environment)
    for reference, keys in ((spec.storage.credentials_ref, S3_KEYS), (spec.model.credentials_ref, ("HF_TOKEN",))):
        if reference is not None:
            for key in keys:
                selector = {"name": reference.name, "key": key, "optional": key == "AWS_SESSION_TOKEN"}
                yield {"name": key, "valueFrom": {"secretKeyRef": selector}}
    for name, value in (("HOME", SCRATCH), ("XDG_CACHE_HOME", f"{SCRATCH}/cache"), ("TMPDIR", "/tmp")):
        yield {"name": name, "value": value}
    if order.backend == "jobset":
        restart = {"fieldRef": {"fieldPath": f"metadata.labels['{RESTART_LABEL}']"}}
        yield {"name": "ATELIER_RESTART", "valueFrom": restart}
    else:
        yield {"name": "ATELIER_RESTART", "value": "0"}  # an Indexed Job has one life; the next is another attempt


def _resources(order: Order, gpu: GpuClass | None) -> dict[str, Any]:
    """CPU is only requested: a limit would throttle the loader. Memory is limited to what is requested."""
    asked, parallelism = order.profile.resources, order.run_file.spec.parallelism
    requests = {"cpu": asked.cpu, "memory": asked.memory}
    limits = {"memory": asked.memory}
    if asked.ephemeral_storage is not None:
        requests["ephemeral-storage"] = limits["ephemeral-storage"] = asked.ephemeral_storage
    if gpu is not None:
        requests[gpu.resource] = limits[gpu.resource] = str(parallelism.gpus_per_node)
    return {"requests": requests, "limits": limits}


def _volumes(order: Order) -> Iterator[dict[str, Any]]:
    items = [{"key": RUN_FILE_KEY, "path": RUN_FILE_KEY}]
    yield {"name": "run-file", "configMap": {"name": order.name, "items": items}}
    yield {"name": "scratch", "emptyDir": {}}
    yield {"name": "tmp", "emptyDir": {}}
    yield {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": order.profile.resources.shared_memory}}
    for volume in order.profile.volumes:
        yield {"name": f"profile-{volume.name}"} | _source(volume)


def _source(volume: Volume) -> dict[str, Any]:
    if volume.host_path is not None:
        return {"hostPath": {"path": volume.host_path}}
    if volume.persistent_volume_claim is not None:
        return {"persistentVolumeClaim": {"claimName": volume.persistent_volume_claim, "readOnly": volume.read_only}}
    return {"nfs": {"server": volume.nfs_server, "path": volume.nfs_path or "/", "readOnly": volume.read_only}}


def _mounts(order: Order) -> Iterator[dict[str, Any]]:
    yield {"name": "run-file", "mountPath": RUN_FILE_FOLDER, "readOnly": True}
    yield {"name": "scratch", "mountPath": SCRATCH}
    yield {"name": "tmp", "mountPath": "/tmp"}
    yield {"name": "shm", "mountPath": "/dev/shm"}
    for volume in order.profile.volumes:
        yield {"name": f"profile-{volume.name}", "mountPath": volume.mount_path, "readOnly": volume.read_only}


def _placement(gpu: GpuClass) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if gpu.node_selector:
        result["nodeSelector"] = {term.key: term.value for term in gpu.node_selector}
    if gpu.tolerations:
        result["tolerations"] = [
            toleration.model_dump(by_alias=True, exclude_none=True) for toleration in gpu.tolerations
        ]
    return result


def _away_from(nodes: tuple[str, ...]) -> dict[str, Any]:
    """Nodes whose GPUs have failed."""
    terms = [{"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]}]
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}
