"""The pod template: restricted Pod Security, the agent's command line, environment, volumes and placement."""

from typing import Any

import pytest

from atelier_api.run_file import RunFile
from atelier_operator.desired import config_map, jobset, service
from atelier_operator.desired.pod import pod_template
from atelier_operator.names import child_name
from orders import order

Pod = dict[str, Any]


def pod(**options: Any) -> Pod:
    spec: Pod = pod_template(order(**options))["spec"]
    return spec


VOLUMES = [
    {"name": "models", "mountPath": "/models", "persistentVolumeClaim": "models"},
    {"name": "data", "mountPath": "/data", "nfsServer": "nfs.example", "nfsPath": "/data", "readOnly": False},
    {"name": "disk", "mountPath": "/disk", "hostPath": "/mnt/disk"},
]

RESTRICTED_VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret")
}


def broken_rules(spec: Pod) -> list[str]:
    """What the restricted policy of the Pod Security Standards refuses in a pod of ours."""
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    security = spec.get("securityContext", {})
    for volume in spec["volumes"]:
        kinds = set(volume) - {"name"}
        found += [f"volume {kind}" for kind in kinds - RESTRICTED_VOLUMES]
    if security.get("runAsNonRoot") is not True or security.get("runAsUser") == 0:
        found.append("root")
    if security.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        found.append("seccomp")
    found += [name for name in ("sysctls", "windowsOptions", "seLinuxOptions", "appArmorProfile") if name in security]
    for container in [*spec["containers"], *spec.get("initContainers", ())]:
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False:
            found.append("escalation")
        if own.get("capabilities", {}).get("drop") != ["ALL"] or own["capabilities"].get("add"):
            found.append("capabilities")
        found += [name for name in ("privileged", "procMount", "seLinuxOptions", "runAsUser") if name in own]
        found += ["hostPort" for port in container.get("ports", ()) if port.get("hostPort")]
    return found


EVERY = {
    "a JobSet's": {},
    "a Job's": {"backend": "job"},
    "on the CPU": {"parallelism": {"nodes": 1, "gpusPerNode": 0}},
    "in a queue, with secrets": {
        "queue": "gpu",
        "storage": {"uri": "s3://bucket/runs", "credentialsRef": {"name": "s"}},
        "profile": {"volumes": VOLUMES[:1]},
    },
    "away from nodes": {"excluded_nodes": ("a",)},
}


@pytest.mark.parametrize("options", EVERY.values(), ids=EVERY)
def test_every_pod_passes_restricted_pod_security(options: dict[str, Any]) -> None:
    spec = pod(**options)
    assert broken_rules(spec) == []
    assert spec["automountServiceAccountToken"] is False
    assert spec["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True


def test_the_rules_that_pods_are_checked_against_can_be_broken() -> None:
    assert broken_rules(pod(profile={"volumes": VOLUMES})) == ["volume nfs", "volume hostPath"]
    spec = pod()
    spec["securityContext"] = {}
    spec["containers"][0]["securityContext"] = {"privileged": True}
    assert broken_rules(spec) == ["root", "seccomp", "escalation", "capabilities", "privileged"]


def arguments(spec: Pod) -> dict[str, str]:
    """The agent's options."""
    words = spec["containers"][0]["args"]
    assert words[:2] == ["-m", "atelier_runtime.agent"]
    return dict(zip(words[2::2], words[3::2], strict=True))


def environment(spec: Pod) -> dict[str, Any]:
    entries = spec["containers"][0]["env"]
    names = [each["name"] for each in entries]
    assert len(names) == len(set(names)), "a JobSet's schema takes no name twice"
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in entries}


def test_the_agent_of_a_jobset_is_told_its_node_and_restart_by_the_pod() -> None:
    spec = pod()
    assert arguments(spec) == {
        "--run-file": "/etc/atelier/run.json",
        "--node-rank": "$(JOB_COMPLETION_INDEX)",
        "--rendezvous": "knight-1-node-0-0.knight-1:29400",
        "--port": "9400",
        "--restart": "$(ATELIER_RESTART)",
    }
    label = "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"
    assert environment(spec)["ATELIER_RESTART"] == {"fieldRef": {"fieldPath": label}}
    assert "subdomain" not in spec, "JobSet sets it"


def test_the_agent_of_a_job_has_one_life_and_a_name_in_the_service() -> None:
    of = order(backend="job", attempt=2)
    spec = pod_template(of)["spec"]
    assert arguments(spec)["--rendezvous"] == "knight-2-0.knight-2:29400"
    assert environment(spec)["ATELIER_RESTART"] == "0"
    made = service(of)
    assert made is not None
    assert spec["subdomain"] == made["metadata"]["name"] == "knight-2"
    assert made["spec"]["selector"].items() <= pod_template(of)["metadata"]["labels"].items()
    assert service(order()) is None


def test_what_must_be_so_goes_before_what_the_profile_says() -> None:
    profile = {
        "environment": [{"name": name, "value": "mine"} for name in ("HOME", "NCCL_IB_HCA", "ATELIER_RESTART", "A")]
    }
    said = environment(pod(backend="job", profile=profile, parallelism={"network": "infiniband"}))
    assert (said["HOME"], said["NCCL_IB_HCA"], said["ATELIER_RESTART"], said["A"]) == ("/scratch", "mlx5", "0", "mine")


def test_secrets_are_only_named() -> None:
    said = environment(
        pod(
            storage={"uri": "s3://bucket/runs", "credentialsRef": {"name": "store"}},
            model={"source": "hf://owner/name", "credentialsRef": {"name": "hub"}},
        )
    )
    keys = {
        name: value["secretKeyRef"]
        for name, value in said.items()
        if isinstance(value, dict) and "secretKeyRef" in value
    }
    assert keys == {
        "AWS_ACCESS_KEY_ID": {"name": "store", "key": "AWS_ACCESS_KEY_ID", "optional": False},
        "AWS_SECRET_ACCESS_KEY": {"name": "store", "key": "AWS_SECRET_ACCESS_KEY", "optional": False},
        "AWS_SESSION_TOKEN": {"name": "store", "key": "AWS_SESSION_TOKEN", "optional": True},
        "HF_TOKEN": {"name": "hub", "key": "HF_TOKEN", "optional": False},
    }


def test_gpus_are_requested_and_limited_and_cpu_is_not_limited() -> None:
    resources = pod(parallelism={"gpusPerNode": 4})["containers"][0]["resources"]
    assert resources["requests"] == {"cpu": "1", "memory": "8Gi", "nvidia.com/gpu": "4"}
    assert resources["limits"] == {"memory": "8Gi", "nvidia.com/gpu": "4"}
    assert "nvidia.com/gpu" not in str(pod(parallelism={"nodes": 1, "gpusPerNode": 0}))


def test_the_volumes_of_the_profile_are_mounted_where_it_says() -> None:
    spec = pod(profile={"volumes": VOLUMES})
    sources = {volume.pop("name"): volume for volume in spec["volumes"]}
    assert sources["profile-models"] == {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}}
    assert sources["profile-data"] == {"nfs": {"server": "nfs.example", "path": "/data", "readOnly": False}}
    assert sources["profile-disk"] == {"hostPath": {"path": "/mnt/disk"}}
    mounts = {
        mount["name"]: (mount["mountPath"], mount.get("readOnly", False))
        for mount in spec["containers"][0]["volumeMounts"]
    }
    assert mounts["profile-data"] == ("/data", False)
    assert mounts["profile-disk"] == ("/disk", True)
    assert set(mounts) == set(sources)


def test_the_kubelet_waits_longer_than_the_agent() -> None:
    assert pod(schedule={"terminationGraceSeconds": 60})["terminationGracePeriodSeconds"] == 75


def test_a_priority_is_the_pods_without_a_queue_and_the_workloads_in_one() -> None:
    alone, queued = order(schedule={"priority": "high"}), order(queue="gpu", schedule={"priority": "high"})
    assert pod_template(alone)["spec"]["priorityClassName"] == "high"
    assert "priorityClassName" not in pod_template(queued)["spec"]
    labels = jobset(queued)["metadata"]["labels"]
    assert (labels["kueue.x-k8s.io/queue-name"], labels["kueue.x-k8s.io/priority-class"]) == ("gpu", "high")
    assert "kueue" not in str(jobset(queued)["spec"]), "only the child itself is Kueue's"
    assert "suspend" not in jobset(queued)["spec"]


def test_excluded_nodes_are_one_requirement_each() -> None:
    """The API takes one value in a matchFields requirement; the requirements of a term hold together."""
    affinity = pod(excluded_nodes=("a", "b"))["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert [each["values"] for each in term["matchFields"]] == [["a"], ["b"]]


def test_the_run_file_in_the_config_map_is_read_back_as_it_was() -> None:
    of = order(attempt=3)
    manifest = config_map(of)
    read = RunFile.model_validate_json(manifest["data"]["run.json"])
    assert read == of.run_file
    assert (read.attempt, manifest["immutable"]) == ("3.0", True)


def test_the_longest_names_are_names() -> None:
    """A pod of a JobSet is named <child>-node-0-<index>-<five letters>; a volume's name is a label as well."""
    child = child_name("k" * 40, 999)
    assert len(f"{child}-node-0-1023-abcde") <= 63
    volume = {"name": "v" * 55, "mountPath": "/v", "persistentVolumeClaim": "v"}
    assert max(len(each["name"]) for each in pod(profile={"volumes": [volume]})["volumes"]) == 63
