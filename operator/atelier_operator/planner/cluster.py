"""A run on a cluster: from a parsed TrainingRun and its profile to the RunFile of its pods. Pure.

Paths are those of the pods: what the profile mounts, and their scratch volume.
"""

from atelier_api.errors import ConfigError
from atelier_api.problem import choice, refused, shown
from atelier_api.rules import picture_places
from atelier_api.run_file import ExecutionPlan, RunFile
from atelier_api.v1alpha1 import TrainingRun, TrainingRunSpec
from atelier_api.v1alpha1.profile import GpuClass, NetworkProfile, TrainingProfileSpec
from atelier_api.v1alpha1.storage import Storage
from atelier_operator.planner.execution import Paths, plan, resolve
from atelier_operator.planner.memory import table_facts
from atelier_operator.planner.strategy import Machine, size_bytes

DEFAULT_STORAGE_URI = Storage.model_fields["uri"].default


class DoesNotFit(ConfigError):
    """Nothing that the spec allows fits into the GPU's memory."""


def cluster_machine(spec: TrainingRunSpec, profile: TrainingProfileSpec) -> Machine:
    """One pod of the run. Raises ConfigError for a kind of GPU that the profile lacks."""
    gpu = gpu_class(spec, profile)
    if gpu is None:
        return Machine("cpu", 0, None, max(1, int(_cores(profile.resources.cpu))))
    return Machine("cuda", spec.parallelism.gpus_per_node, size_bytes(gpu.memory), 0)


def gpu_class(spec: TrainingRunSpec, profile: TrainingProfileSpec) -> GpuClass | None:
    """The kind of GPU that the run trains on; None on the CPU."""
    wanted = spec.parallelism.gpu_class
    if spec.parallelism.gpus_per_node == 0:
        return None
    if not profile.gpu_classes:
        raise ConfigError(
            f"spec.parallelism.gpusPerNode is {spec.parallelism.gpus_per_node}, but the profile has no gpuClasses; "
            "set it to 0 to train on the CPU, or ask the administrator for a profile with GPUs"
        )
    if wanted is None:
        return profile.gpu_classes[0]
    found = next((each for each in profile.gpu_classes if each.name == wanted), None)
    if found is None:
        known = choice(wanted, [each.name for each in profile.gpu_classes])
        raise ConfigError(str(refused("spec.parallelism.gpuClass", wanted, f"the profile has no such class; {known}")))
    return found


def network(spec: TrainingRunSpec, profile: TrainingProfileSpec) -> NetworkProfile | None:
    """The network between the nodes; None: the pods' own. Raises ConfigError for one that the profile lacks."""
    wanted = spec.parallelism.network
    if wanted is None:
        return None
    found = next((each for each in profile.networks if each.name == wanted), None)
    if found is None:
        known = choice(wanted, [each.name for each in profile.networks]) if profile.networks else "it has none"
        raise ConfigError(str(refused("spec.parallelism.network", wanted, f"the profile has no such network; {known}")))
    return found


def with_profile(run: TrainingRun, profile: TrainingProfileSpec) -> TrainingRun:
    """The run with the profile's store where it names none of its own."""
    storage, default = run.spec.storage, profile.storage
    if default is None or storage.uri != DEFAULT_STORAGE_URI:
        return run
    update = {
        "uri": default.uri,
        "s3": default.s3,
        "credentials_ref": storage.credentials_ref or default.credentials_ref,
    }
    spec = run.spec.model_copy(update={"storage": storage.model_copy(update=update)})
    return run.model_copy(update={"spec": spec})


def not_permitted(spec: TrainingRunSpec, profile: TrainingProfileSpec) -> list[str]:
    """What the profile does not allow, one sentence each."""
    found = []
    limits, parallelism = profile.limits, spec.parallelism
    if limits.nodes is not None and parallelism.nodes > limits.nodes:
        found.append(f"spec.parallelism.nodes is {parallelism.nodes}; the profile allows at most {limits.nodes}")
    gpus = parallelism.nodes * parallelism.gpus_per_node
    if limits.gpus is not None and gpus > limits.gpus:
        found.append(
            f"spec.parallelism asks for {gpus} GPUs (nodes × gpusPerNode); the profile allows at most {limits.gpus}"
        )
    source = spec.model.source
    if profile.allowed_models and not any(source.startswith(prefix) for prefix in profile.allowed_models):
        allowed = ", ".join(profile.allowed_models)
        found.append(f"spec.model.source is {shown(source)}; the profile allows sources that begin with {allowed}")
    return found


def cluster_run_file(
    run: TrainingRun, profile: TrainingProfileSpec, *, uid: str, attempt: int, scratch: str
) -> RunFile:
    """The RunFile of an attempt. Raises ConfigError when the spec cannot work in pods, DoesNotFit when the GPU is too small."""
    run = with_profile(run, profile)
    _check_paths(run.spec)
    network(run.spec, profile)
    machine = cluster_machine(run.spec, profile)
    try:
        execution = plan(run, table_facts(run.spec.model), machine)
    except ConfigError as error:
        raise DoesNotFit(str(error)) from None
    return run_file_of(run, execution, uid=uid, attempt=attempt, scratch=scratch)


def run_file_of(run: TrainingRun, execution: ExecutionPlan, *, uid: str, attempt: int, scratch: str) -> RunFile:
    """The RunFile for a plan that is made. The operator watches the deadline itself, over all attempts."""
    spec = run.spec
    schedule = spec.schedule.model_copy(update={"active_deadline_seconds": None})
    run = run.model_copy(update={"spec": spec.model_copy(update={"schedule": schedule})})
    remote = "://" in spec.model.source
    paths = Paths(
        model_folder=f"{scratch}/model" if remote else spec.model.source,
        data_uris=tuple(source.uri for source in spec.data.sources),
        storage_uri=spec.storage.uri,
        scratch=f"{scratch}/run",
        cache_uri=f"{scratch}/cache",
        ca_bundle=spec.storage.s3.ca_bundle,
    )
    return resolve(run, execution, paths, uid=uid).model_copy(update={"attempt": f"{attempt}.0"})


def _check_paths(spec: TrainingRunSpec) -> None:
    """Raises ConfigError for paths that mean nothing in a pod."""
    places = [("spec.model.source", spec.model.source), ("spec.storage.uri", spec.storage.uri)]
    places += [(f"spec.data.sources[{index}].uri", source.uri) for index, source in enumerate(spec.data.sources)]
    places += picture_places(spec)
    if spec.storage.s3.ca_bundle is not None:
        places.append(("spec.storage.s3.caBundle", spec.storage.s3.ca_bundle))
    for path, uri in places:
        if "://" not in uri and not uri.startswith("/"):
            allowed = "on a cluster it must be an absolute path of a volume that the profile mounts, or lie in S3"
            raise ConfigError(str(refused(path, uri, allowed)))


def _cores(quantity: str) -> float:
    """CPUs of a quantity such as 500m or 4."""
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)
