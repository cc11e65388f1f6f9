"""Every label, annotation, port and path that the operator writes, with its reader. Names of children are made here, too."""

GROUP = "atelier.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

FIELD_MANAGER = "atelier-operator"
MANAGED_BY = "app.kubernetes.io/managed-by"  # for people who list objects by the tool that made them
MANAGER = "atelier"

RUN_LABEL = f"{GROUP}/run"  # name of the run: the operator's watches select by it, PodMonitors relabel it
UID_LABEL = f"{GROUP}/run-uid"  # tells a child of this run from that of an older one of the same name
ATTEMPT_LABEL = f"{GROUP}/attempt"  # number of the attempt
STEPS_ANNOTATION = f"{GROUP}/steps"  # steps that the attempt was asked for: more in the spec make another attempt
PLAN_ANNOTATION = f"{GROUP}/plan"  # the ExecutionPlan of the attempt, so that an operator that comes back knows it

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"  # Kueue takes the object in charge
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"  # WorkloadPriorityClass
RESTART_LABEL = (
    "jobset.sigs.k8s.io/restart-attempt"  # which life of the JobSet a pod belongs to; the pod hands it to the agent
)

UNREACHABLE_TAINT = "node.kubernetes.io/unreachable"  # the cluster puts it on a node whose kubelet does not answer

REPLICATED_JOB = "node"  # name of the ReplicatedJob whose pods train
CONTAINER = "trainer"  # the pods' only container that trains

MODEL_CONTAINER = "model"  # init container that fetches the base model of a remote source

WEBHOOK = f"trainingruns.{GROUP}"  # name in the chart's configuration; the API server begins refusals with it

AGENT_PORT = 9400  # /metrics and /progress
RENDEZVOUS_PORT = 29400  # torchrun of node 0

RUN_FILE_FOLDER = "/etc/atelier"
RUN_FILE_KEY = "run.json"
SNAPSHOT_KEY = "snapshot.json"  # beside it in the ConfigMap, for the operator alone: what the attempt was made from
SCRATCH = "/scratch"  # emptyDir: staging, caches, logs


def child_name(run: str, attempt: int) -> str:
    """Name of the child of an attempt, and of its ConfigMap and Service: at most 40 + 1 + 3 characters."""
    return f"{run}-{attempt}"


def rendezvous(child: str, backend: str) -> str:
    """Host and port of node 0, by its name in the headless Service. A JobSet's and an Indexed Job's pods are named differently."""
    host = f"{child}-{REPLICATED_JOB}-0-0" if backend == "jobset" else f"{child}-0"
    return f"{host}.{child}:{RENDEZVOUS_PORT}"
