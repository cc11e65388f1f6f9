"""`TrainingProfile` and `ClusterTrainingProfile`: how an administrator lets runs be executed on the cluster."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from atelier_api.v1alpha1.base import Block, Decimal
from atelier_api.v1alpha1.references import OBJECT_NAME, SecretRef
from atelier_api.v1alpha1.storage import S3Settings

CPUS = r"^([0-9]+(\.[0-9]{1,3})?|[0-9]+m)$"
SIZE = r"^[0-9]+(\.[0-9]+)?(k|M|G|T|Ki|Mi|Gi|Ti)?$"

VOLUME_KINDS = ("hostPath", "persistentVolumeClaim", "nfsServer")
ONE_KIND = f"a volume has exactly one of {', '.join(VOLUME_KINDS)}"
NFS_PATH = "nfsPath goes with nfsServer"
EQUAL = "a toleration with operator Equal needs key and value, one with Exists has no value"


class NodeSelectorTerm(Block):
    """A label that nodes must have."""

    key: str = Field(min_length=1, max_length=317, description="Label.")
    value: str = Field(max_length=63, description="Its value.")


class Toleration(Block):
    """A taint that pods tolerate."""

    key: str | None = Field(default=None, max_length=317, description="Taint. Default: any.")
    operator: Literal["Exists", "Equal"] = Field(default="Exists", description="How the value is compared.")
    value: str | None = Field(default=None, max_length=63, description="Value for `Equal`.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Effect. Default: all."
    )

    @model_validator(mode="after")
    def _has_what_its_operator_needs(self) -> "Toleration":
        given = (self.key is not None and self.value is not None) if self.operator == "Equal" else self.value is None
        if not given:
            raise ValueError(f"{EQUAL}; key is {self.key!r}, value is {self.value!r}")
        return self


class GpuClass(Block):
    """A kind of GPU that runs may ask for by `spec.parallelism.gpuClass`."""

    name: str = Field(min_length=1, max_length=63, pattern=OBJECT_NAME, description="Name, for example h100-80g.")
    memory: str = Field(
        pattern=r"^[0-9]+(Mi|Gi)$", max_length=16, description='Memory of one GPU, for the fit check: "80Gi".'
    )
    resource: str = Field(
        default="nvidia.com/gpu", min_length=1, max_length=317, description="Extended resource of the device plugin."
    )
    node_selector: Annotated[list[NodeSelectorTerm], Field(max_length=16)] = Field(
        default=[], description="Labels of the nodes that have it."
    )
    tolerations: Annotated[list[Toleration], Field(max_length=16)] = Field(
        default=[], description="Taints of these nodes."
    )
    price_per_hour: Annotated[Decimal, Field(ge=0)] | None = Field(
        default=None, description="Price of one GPU for an hour, in `currency`: the status of a run says what it costs."
    )


class EnvironmentVariable(Block):
    """A variable of the training processes."""

    name: str = Field(min_length=1, max_length=256, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="Name.")
    value: str = Field(default="", max_length=4096, description="Value.")


class NetworkProfile(Block):
    """How the nodes of a run reach each other, chosen by `spec.parallelism.network`."""

    name: str = Field(min_length=1, max_length=63, pattern=OBJECT_NAME, description="Name, for example infiniband.")
    environment: Annotated[list[EnvironmentVariable], Field(max_length=64)] = Field(
        default=[], description="NCCL's settings and the like."
    )


class Volume(Block):
    """Something that every training pod mounts. Exactly one of `hostPath`, `persistentVolumeClaim` and `nfsServer`."""

    name: str = Field(min_length=1, max_length=55, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", description="Name.")
    mount_path: str = Field(min_length=1, max_length=1024, pattern=r"^/", description="Where pods see it.")
    read_only: bool = Field(default=True, description="Whether pods may only read it.")
    host_path: str | None = Field(
        default=None,
        max_length=1024,
        pattern=r"^/",
        description="Folder of the node. Restricted Pod Security refuses it.",
    )
    persistent_volume_claim: str | None = Field(
        default=None, max_length=253, pattern=OBJECT_NAME, description="Claim in the run's namespace."
    )
    nfs_server: str | None = Field(
        default=None, max_length=253, description="NFS server. Restricted Pod Security refuses it."
    )
    nfs_path: str | None = Field(
        default=None, max_length=1024, pattern=r"^/", description="Path that the NFS server exports. Default: /."
    )

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> "Volume":
        values = (self.host_path, self.persistent_volume_claim, self.nfs_server)
        given = [name for name, value in zip(VOLUME_KINDS, values, strict=True) if value is not None]
        if len(given) != 1:
            raise ValueError(f"{ONE_KIND}; {self.name} has {' and '.join(given) or 'none'}")
        if self.nfs_path is not None and self.nfs_server is None:
            raise ValueError(f"{NFS_PATH}; {self.name} has {given[0]}")
        return self


class PodResources(Block):
    """CPU and memory of a training pod: requests and, for memory, the limit too."""

    cpu: str = Field(default="1", max_length=16, pattern=CPUS, description="CPUs that are requested: 4, 0.5, 500m.")
    memory: str = Field(default="8Gi", max_length=16, pattern=SIZE, description="Memory, requested and limited.")
    ephemeral_storage: str | None = Field(
        default=None,
        max_length=16,
        pattern=SIZE,
        description="Scratch and cache on the node's disk. Default: none asked.",
    )
    shared_memory: str = Field(
        default="2Gi", max_length=16, pattern=SIZE, description="Size of /dev/shm. Counts as memory of the pod."
    )


class PodSecurity(Block):
    """Who the training processes are."""

    run_as_user: int = Field(default=1000, ge=1, le=2_147_483_647, description="User id.")
    run_as_group: int = Field(default=1000, ge=1, le=2_147_483_647, description="Group id, also of the volumes.")


class ProfileLimits(Block):
    """The most that one run may ask for."""

    nodes: int | None = Field(default=None, ge=1, le=1024, description="Nodes. Default: no limit.")
    gpus: int | None = Field(default=None, ge=0, le=16384, description="GPUs of all nodes together. Default: no limit.")


class ProfileStorage(Block):
    """Store for runs that leave `spec.storage.uri` at its default."""

    uri: str = Field(
        min_length=1,
        max_length=2048,
        pattern=r"^(s3://.|/)",
        description="`s3://bucket/prefix`, or the absolute path of a folder of a volume.",
    )
    s3: S3Settings = Field(default_factory=S3Settings, description="Connection.")
    credentials_ref: SecretRef | None = Field(default=None, description="Secret of the run's namespace.")


class TrainingProfileSpec(Block):
    """How runs that name this profile are executed."""

    image: str = Field(min_length=1, max_length=1024, description="Image of the training pods, best by digest.")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        default="IfNotPresent", description="When nodes pull the image."
    )
    image_pull_secrets: Annotated[list[SecretRef], Field(max_length=8)] = Field(
        default=[], description="Secrets of the run's namespace for the registry."
    )
    python: str = Field(
        default="python", min_length=1, max_length=1024, description="Interpreter that has the runtime installed."
    )
    gpu_classes: Annotated[list[GpuClass], Field(max_length=32)] = Field(
        default=[], description="Kinds of GPUs; the first is the default. Empty: runs train on the CPU only."
    )
    currency: str = Field(
        default="USD", pattern=r"^[A-Z]{3}$", max_length=3, description="Currency of prices, ISO 4217."
    )
    networks: Annotated[list[NetworkProfile], Field(max_length=32)] = Field(
        default=[], description="Networks that runs may choose."
    )
    resources: PodResources = Field(default_factory=PodResources, description="CPU and memory of a pod.")
    environment: Annotated[list[EnvironmentVariable], Field(max_length=64)] = Field(
        default=[], description="Variables of every training process."
    )
    volumes: Annotated[list[Volume], Field(max_length=32)] = Field(default=[], description="What every pod mounts.")
    security: PodSecurity = Field(default_factory=PodSecurity, description="User of the processes.")
    storage: ProfileStorage | None = Field(default=None, description="Default store. Without it a run must name one.")
    limits: ProfileLimits = Field(default_factory=ProfileLimits, description="The most that a run may ask for.")
    allowed_models: Annotated[list[Annotated[str, Field(min_length=1, max_length=2048)]], Field(max_length=64)] = Field(
        default=[], description="What `spec.model.source` may start with. Empty: anything."
    )
    default_queue: str | None = Field(
        default=None, max_length=253, pattern=OBJECT_NAME, description="Kueue LocalQueue of runs that name none."
    )

    @model_validator(mode="after")
    def _names_are_unique(self) -> "TrainingProfileSpec":
        """As in the CRD, where these are map lists."""
        lists: tuple[tuple[str, Sequence[GpuClass | NetworkProfile | Volume]], ...] = (
            ("gpuClasses", self.gpu_classes),
            ("networks", self.networks),
            ("volumes", self.volumes),
        )
        for field, items in lists:
            names = [item.name for item in items]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"{field} has the name {twice!r} twice; each must have a name of its own")
        return self


class TrainingProfile(Block):
    """How runs of a namespace are executed."""

    api_version: Literal["atelier.dev/v1alpha1"] = Field(description="Version of this API.")
    kind: Literal["TrainingProfile"] = Field(description="Kind.")
    spec: TrainingProfileSpec = Field(description="The profile.")


class ClusterTrainingProfile(Block):
    """How runs of all namespaces are executed."""

    api_version: Literal["atelier.dev/v1alpha1"] = Field(description="Version of this API.")
    kind: Literal["ClusterTrainingProfile"] = Field(description="Kind.")
    spec: TrainingProfileSpec = Field(description="The profile.")
