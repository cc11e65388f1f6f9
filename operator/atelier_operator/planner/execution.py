"""The execution plan of a run, and the RunFile made of both. Pure."""

from dataclasses import dataclass
from typing import Any

from atelier_api.errors import ConfigError
from atelier_api.families import FAMILIES
from atelier_api.family_rules import bucket_alignment
from atelier_api.few_steps import checkpoint_refusal
from atelier_api.layouts import written
from atelier_api.rules import processes_per_node, world_size
from atelier_api.run_file import ExecutionPlan, RunFile, RunIdentity
from atelier_api.v1alpha1 import TrainingRun, TrainingRunSpec
from atelier_operator.planner.advice import refusal
from atelier_operator.planner.memory import ModelFacts
from atelier_operator.planner.strategy import Fit, Machine, best_fit, device_memory, fits_of, learning_rate


@dataclass(frozen=True)
class Paths:
    """Where the run's things lie, all absolute. `data_uris` in the order of `spec.data.sources`."""

    model_folder: str
    data_uris: tuple[str, ...]
    storage_uri: str
    scratch: str
    cache_uri: str
    ca_bundle: str | None = None


def plan(run: TrainingRun, model: ModelFacts, machine: Machine) -> ExecutionPlan:
    """The execution plan of a valid run. Raises ConfigError, with what would fit, when nothing that the spec allows does."""
    spec = run.spec
    if spec.objective.twin_flow is not None and model.experts > 1:
        raise ConfigError(checkpoint_refusal(spec.model.source, model.experts))
    chosen = best_fit(spec, model, machine)
    if chosen is None:
        nearest = min(fits_of(spec, model, machine), key=lambda fit: fit.prediction.peak)
        raise ConfigError(refusal(run, model, machine, nearest))
    return _execution(spec, machine, chosen)


def _execution(spec: TrainingRunSpec, machine: Machine, chosen: Fit) -> ExecutionPlan:
    processes = processes_per_node(spec)
    micro_batch = chosen.choice.micro_batch_size
    return ExecutionPlan(
        strategy=chosen.choice.strategy,
        device=machine.device,
        nodes=spec.parallelism.nodes,
        processes_per_node=processes,
        micro_batch_size=micro_batch,
        gradient_accumulation=spec.hyperparameters.global_batch_size // (world_size(spec) * micro_batch),
        gradient_checkpointing=chosen.choice.gradient_checkpointing,
        tiled_encoding=chosen.choice.tiled_encoding,
        tiled_samples=chosen.choice.tiled_samples,
        learning_rate=learning_rate(spec),
        threads_per_process=max(1, machine.cores // processes) if machine.device == "cpu" else 0,
        predicted_peak_memory_bytes=chosen.prediction.peak,
        device_memory_bytes=device_memory(spec, machine),
    )


def plan_below(run: TrainingRun, model: ModelFacts, machine: Machine, peak: int) -> ExecutionPlan | None:
    """The next plan after one that was predicted to need `peak` bytes and ran out of memory; None when the spec leaves none."""
    smaller = (fit for fit in fits_of(run.spec, model, machine) if fit.fits and fit.prediction.peak < peak)
    fit = next(smaller, None)
    return None if fit is None else _execution(run.spec, machine, fit)


def resolve(run: TrainingRun, execution: ExecutionPlan, paths: Paths, *, uid: str = "local") -> RunFile:
    """The RunFile of a planned run: what the spec leaves to the family is filled in, and uris are absolute."""
    identity = RunIdentity(namespace=run.metadata.namespace, name=run.metadata.name, uid=uid)
    return RunFile(
        identity=identity,
        spec=_resolved(run.spec, paths),
        plan=execution,
        model_folder=paths.model_folder,
        scratch=paths.scratch,
        cache_uri=paths.cache_uri,
    )


def _resolved(spec: TrainingRunSpec, paths: Paths) -> TrainingRunSpec:
    family = FAMILIES[spec.model.family]
    sources = [
        source.model_copy(update={"uri": uri}) for source, uri in zip(spec.data.sources, paths.data_uris, strict=True)
    ]
    data: dict[str, Any] = {"sources": sources}
    validation: dict[str, Any] = {}
    if family.modality == "audio":
        validation["seconds"] = spec.validation.seconds or spec.data.audio.max_seconds
    else:
        data["bucket_align"] = bucket_alignment(spec, family)
        # A size that follows the reference is for the pipeline to say.
        edge = None if family.sample_edge else spec.data.resolution // family.pixel_multiple * family.pixel_multiple
        validation = {side: getattr(spec.validation, side) or edge for side in ("width", "height")}
    if family.modality == "video":
        data["clip"] = spec.data.clip.model_copy(update={"fps": spec.data.clip.fps or family.frame_rate})
        validation["frames"] = spec.validation.frames or spec.data.clip.frames
    s3 = spec.storage.s3.model_copy(update={"ca_bundle": paths.ca_bundle})
    formats = written(spec.adapter.type, spec.publish.formats)
    return spec.model_copy(
        update={
            "data": spec.data.model_copy(update=data),
            "storage": spec.storage.model_copy(update={"uri": paths.storage_uri, "s3": s3}),
            "validation": spec.validation.model_copy(update=validation),
            "publish": spec.publish.model_copy(update={"formats": formats}),
        }
    )
