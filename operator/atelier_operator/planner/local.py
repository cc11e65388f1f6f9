"""A run on this machine: from a parsed TrainingRun to its RunFile.

With `checkpoint_facts` this is the only planner module that reads the disk. Hardware, home folder and environment are arguments;
nothing here looks at the network.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from atelier_api.errors import ConfigError, CredentialsError
from atelier_api.model_files import current_copy, hub_name, hub_snapshot, objects_folder
from atelier_api.problem import shown
from atelier_api.rules import picture_places
from atelier_api.run_file import ExecutionPlan, RunFile
from atelier_api.v1alpha1 import TrainingRun, TrainingRunSpec
from atelier_api.v1alpha1.data import DataSource
from atelier_api.v1alpha1.validation import ValidationPrompt
from atelier_operator.planner.checkpoint_facts import checkpoint_facts
from atelier_operator.planner.execution import Paths, plan, resolve
from atelier_operator.planner.memory import ModelFacts, table_facts
from atelier_operator.planner.strategy import Machine

Referring = TypeVar("Referring", DataSource, ValidationPrompt)
"""Blocks that name places of reference pictures."""

WEB_IDENTITY = ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN")
"""Credentials of a pod's service account."""

CONTAINER = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
"""Credentials of a container service's task role, or of a pod identity."""


@dataclass(frozen=True)
class Host:
    """This machine's hardware, as the command line found it. `gpu_memory_bytes` has one entry per GPU. None: unknown."""

    cores: int
    memory_bytes: int | None
    gpu_memory_bytes: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class Surroundings:
    """What lies around a run: the folder of its YAML, where relative paths start, the user's home, and the environment."""

    folder: Path
    home: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    machine_vendor: Path = Path("/sys/class/dmi/id/sys_vendor")

    @property
    def hub_cache(self) -> Path:
        """Where the hub library keeps its snapshots."""
        if "HF_HUB_CACHE" in self.environment:
            return Path(self.environment["HF_HUB_CACHE"])
        base = self.environment.get("HF_HOME")
        return (Path(base) if base else self._user_cache / "huggingface") / "hub"

    @property
    def cache(self) -> Path:
        """Where a run whose store is remote keeps its cache and scratch."""
        return self._user_cache / "atelier"

    @property
    def model_cache(self) -> Path:
        """Where checkpoints that came from an S3 prefix are kept."""
        return self.cache / "models"

    @property
    def _user_cache(self) -> Path:
        return Path(self.environment.get("XDG_CACHE_HOME") or self.home / ".cache")

    def absolute(self, path: str) -> Path:
        """A path of the YAML. A `~` is the user's home."""
        expanded = self.home / path[2:] if path.startswith("~/") else Path(path)
        return Path(self.folder.absolute() / expanded).resolve()


def local_machine(spec: TrainingRunSpec, host: Host) -> Machine:
    """The part of this machine that one node of the run has. Raises ConfigError when there are not enough GPUs.

    Nodes of a local run share the machine: each has its own GPUs, or an equal part of the RAM and the cores.
    """
    nodes, gpus = spec.parallelism.nodes, spec.parallelism.gpus_per_node
    cores = max(1, host.cores // nodes)
    if gpus == 0:
        memory = None if host.memory_bytes is None else host.memory_bytes // nodes
        return Machine("cpu", 0, memory, cores)
    found = len(host.gpu_memory_bytes)
    if nodes * gpus > found:
        has = f"this machine has {found or 'no'} GPU{'' if found == 1 else 's'}"
        needs = f" for each of {nodes} nodes" if nodes > 1 else ""
        raise ConfigError(f"spec.parallelism.gpusPerNode is {gpus}{needs}; {has}; 0 trains on the CPU")
    known = [memory for memory in host.gpu_memory_bytes[: nodes * gpus] if memory is not None]
    smallest = min(known) if len(known) == nodes * gpus else None
    return Machine("cuda", gpus, smallest, cores)


def local_facts(spec: TrainingRunSpec, around: Surroundings) -> ModelFacts:
    """The model's sizes: from the checkpoint where it is on this machine, from the table of families where it is yet to be fetched.

    Raises ConfigError when a local folder is no checkpoint of the family.
    """
    folder = model_folder(spec, around)
    return table_facts(spec.model) if folder is None else checkpoint_facts(spec.model, folder)


def model_folder(spec: TrainingRunSpec, around: Surroundings) -> Path | None:
    """The folder of the base checkpoint: a local source itself, or the whole copy of a remote one. None: it is yet to be fetched."""
    model = spec.model
    if model.source.startswith("hf://"):
        return hub_snapshot(around.hub_cache, *hub_name(model))
    if model.source.startswith("s3://"):
        return current_copy(objects_folder(around.model_cache, model.source, spec.storage.s3))
    return around.absolute(model.source)


def check_places(spec: TrainingRunSpec, around: Surroundings) -> None:
    """Raises ConfigError, with one line per mistake, for places that are not there, and CredentialsError. Asks no network."""
    mistakes = list(_missing(spec, around))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    check_s3_credentials(spec, around)


def check_flavour_fits(run: TrainingRun, *, machine: Machine, around: Surroundings) -> None:
    """Raises ConfigError when the flavour that the run names does not fit, before its gigabytes are fetched.

    A run that names none is checked with its own files, once they are here.
    """
    if run.spec.model.flavour is not None and model_folder(run.spec, around) is None:
        plan(run, table_facts(run.spec.model), machine)


def resolve_local(run: TrainingRun, *, machine: Machine, around: Surroundings) -> RunFile:
    """The RunFile of a run on this machine, whose model is here. Raises ConfigError, with one line per mistake, or CredentialsError.

    Checked in the order of their cost: places and credentials, then the checkpoint's files, then the fit.
    """
    spec = run.spec
    check_places(spec, around)
    folder = model_folder(spec, around)
    if folder is None:
        raise ConfigError(
            f"spec.model.source is {shown(spec.model.source)}, which is not on this machine; fetch it first"
        )
    execution = _within_threads(plan(run, checkpoint_facts(spec.model, folder), machine), around.environment)
    remote = spec.storage.uri.startswith("s3://")
    runs = around.cache if remote else around.absolute(spec.storage.uri)
    name = f"{run.metadata.namespace}-{run.metadata.name}"
    paths = Paths(
        model_folder=str(folder),
        data_uris=tuple(_absolute_uri(source.uri, around) for source in spec.data.sources),
        storage_uri=_absolute_uri(spec.storage.uri, around),
        scratch=str(runs / ".scratch" / name),
        cache_uri=str(runs / ".cache"),
        ca_bundle=None if spec.storage.s3.ca_bundle is None else str(around.absolute(spec.storage.s3.ca_bundle)),
    )
    return resolve(_with_pictures_here(run, around), execution, paths)


def _within_threads(execution: ExecutionPlan, environment: Mapping[str, str]) -> ExecutionPlan:
    """The plan with no more threads in a process than `OMP_NUM_THREADS` allows: whoever shares a machine says so with it."""
    allowed = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if not allowed.isdecimal() or not 0 < int(allowed) < execution.threads_per_process:
        return execution
    return execution.model_copy(update={"threads_per_process": int(allowed)})


def _with_pictures_here(run: TrainingRun, around: Surroundings) -> TrainingRun:
    """The run whose places of references and prompts' pictures do not depend on the folder of its YAML."""
    data, validation = run.spec.data, run.spec.validation

    def here(uri: str | None) -> str | None:
        return None if uri is None else _absolute_uri(uri, around)

    sources = [
        source.model_copy(
            update={
                "references": [here(uri) for uri in source.references],
                "conditioning": here(source.conditioning),
            }
        )
        for source in data.sources
    ]
    prompts = [
        prompt.model_copy(
            update={
                "image": here(prompt.image),
                "last_image": here(prompt.last_image),
                "references": [here(uri) for uri in prompt.references],
                "conditioning": here(prompt.conditioning),
            }
        )
        for prompt in validation.prompts
    ]
    update = {
        "data": data.model_copy(update={"sources": sources}),
        "validation": validation.model_copy(update={"prompts": prompts}),
    }
    return run.model_copy(update={"spec": run.spec.model_copy(update=update)})


def check_s3_credentials(spec: TrainingRunSpec, around: Surroundings) -> None:
    """Raises CredentialsError when the run uses S3 and nothing on this machine could give credentials for it."""
    uris = {"spec.model.source": spec.model.source, "spec.storage.uri": spec.storage.uri}
    uris |= {f"spec.data.sources[{index}].uri": source.uri for index, source in enumerate(spec.data.sources)}
    uris |= dict(picture_places(spec))
    remote = {path: uri for path, uri in uris.items() if uri.startswith("s3://")}
    if not remote or _has_s3_credentials(around):
        return
    path, uri = next(iter(remote.items()))
    raise CredentialsError(
        f"{path} is {shown(uri)}, and there are no credentials for S3; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
        "or AWS_PROFILE, or write ~/.aws/credentials"
    )


def _has_s3_credentials(around: Surroundings) -> bool:
    """Whether one of the places where boto3 looks has something. An EC2 machine may have a role, which only the network tells."""
    environment = {name for name, value in around.environment.items() if value}
    if {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= environment or environment.issuperset(WEB_IDENTITY):
        return True
    if environment.intersection((*CONTAINER, "AWS_PROFILE")):
        return True
    aws = around.home / ".aws"
    files = (
        around.environment.get("AWS_SHARED_CREDENTIALS_FILE") or aws / "credentials",
        around.environment.get("AWS_CONFIG_FILE") or aws / "config",
    )
    if any(Path(file).is_file() for file in files):
        return True
    return around.machine_vendor.is_file() and "Amazon EC2" in around.machine_vendor.read_text()


def _missing(spec: TrainingRunSpec, around: Surroundings) -> Iterator[str]:
    """Places that the run reads and that are not there."""
    folder = model_folder(spec, around)
    if folder is not None and not folder.is_dir():
        yield f"spec.model.source is {shown(spec.model.source)}; there is no folder {folder}"
    for index, source in enumerate(spec.data.sources):
        if not source.uri.startswith("s3://") and not around.absolute(source.uri).is_dir():
            place = around.absolute(source.uri)
            yield f"spec.data.sources[{index}].uri is {shown(source.uri)}; there is no folder {place}"
    for path, uri in picture_places(spec):
        if uri.startswith("s3://"):
            continue
        place, is_folder = around.absolute(uri), path.startswith("spec.data.")
        if not (place.is_dir() if is_folder else place.is_file()):
            yield f"{path} is {shown(uri)}; there is no {'folder' if is_folder else 'file'} {place}"
    bundle = spec.storage.s3.ca_bundle
    if bundle is not None and not around.absolute(bundle).is_file():
        yield f"spec.storage.s3.caBundle is {shown(bundle)}; there is no file {around.absolute(bundle)}"


def _absolute_uri(uri: str, around: Surroundings) -> str:
    return uri if uri.startswith("s3://") else str(around.absolute(uri))
