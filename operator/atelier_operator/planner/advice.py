"""What to change in a run that does not fit, so that it does. Every piece of advice has been planned, and fits. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from atelier_api.families import FamilyFacts
from atelier_api.family_rules import bucket_alignment
from atelier_api.quantizations import Quantization
from atelier_api.read import problems, validated
from atelier_api.rules import processes_per_node
from atelier_api.v1alpha1 import TrainingRun
from atelier_api.v1alpha1.adapter import ControlNetAdapter, LoconAdapter, LohaAdapter, LoraAdapter
from atelier_operator.planner.memory import GIB, ModelFacts
from atelier_operator.planner.strategy import USABLE, Fit, Machine, best_fit, device_memory

Changes = Mapping[str, Any]
"""Values to set, by path: `spec.adapter.rank` -> 8."""

MOST_ADVICE = 4
MOST_COMBINED = 3
SMALLEST_RANK = 4
GPUS_PER_NODE = (2, 4, 8, 16)


@dataclass(frozen=True)
class Advice:
    """A change that makes the run fit, and the peak it then has."""

    changes: Changes
    peak: int

    def __str__(self) -> str:
        parts = (_text(path, value) for path, value in self.changes.items())
        return f"{' with '.join(parts)} ({gib(self.peak)} GiB)"


def refusal(run: TrainingRun, model: ModelFacts, machine: Machine, nearest: Fit) -> str:
    """The sentence for a run that does not fit. `nearest` is the choice that needs least."""
    memory = device_memory(run.spec, machine) or 0
    device = "the device has" if machine.device == "cuda" else "a process has"
    needs = (
        f"{model.origin} does not fit: needs {gib(nearest.prediction.peak)} GiB, {device} {gib(int(memory * USABLE))} usable of "
        f"{gib(memory)} (spec.parallelism.deviceMemory)"
    )
    found = advice(run, model, machine)
    if not found:
        return f"{needs}; no other setting that was tried fits either"
    return f"{needs}; would fit: {', or '.join(map(str, found))}"


def advice(run: TrainingRun, model: ModelFacts, machine: Machine) -> list[Advice]:
    """Changes that make the run fit: single ones where any does, else pairs, else threes. The mildest value of each."""
    levers = [lever for lever in _levers(run, model, machine) if lever]
    for size in range(1, MOST_COMBINED + 1):
        found = [fitting for some in combinations(levers, size) if (fitting := _mildest(run, model, machine, some))]
        if found:
            return found[:MOST_ADVICE]
    return []


def changed(run: TrainingRun, changes: Changes) -> TrainingRun | None:
    """The run with the changes; None when that is no valid run."""
    document = run.model_dump(mode="json", by_alias=True)
    for path, value in changes.items():
        *blocks, field = path.split(".")
        block = document
        for name in blocks:
            block = block[name]
        block[field] = value
    return None if problems(document) else validated(document)


def gib(size: int) -> str:
    """Bytes in GiB: 91.2, 80."""
    return f"{size / GIB:.1f}".removesuffix(".0")


def _mildest(run: TrainingRun, model: ModelFacts, machine: Machine, levers: tuple[list[Changes], ...]) -> Advice | None:
    """The first combination of values, mildest first, that fits; None at once when the strongest values do not."""
    if _tried(run, model, machine, [lever[-1] for lever in levers]) is None:
        return None
    for values in product(*levers):
        fitting = _tried(run, model, machine, values)
        if fitting is not None:
            return fitting
    return None


def _tried(run: TrainingRun, model: ModelFacts, machine: Machine, values: Any) -> Advice | None:
    changes = {path: value for each in values for path, value in each.items()}
    other = changed(run, changes)
    fit = None if other is None else best_fit(other.spec, model, machine)
    return None if fit is None else Advice(changes, fit.prediction.peak)


def _levers(run: TrainingRun, model: ModelFacts, machine: Machine) -> Iterator[list[Changes]]:
    """Lists of values to try for each setting, from the mildest to the strongest; first what leaves the result as it is."""
    spec = run.spec
    numbers, parallelism = spec.hyperparameters, spec.parallelism
    if numbers.gradient_checkpointing is False:
        yield [{"spec.hyperparameters.gradientCheckpointing": True}]
    if numbers.micro_batch_size is not None and numbers.micro_batch_size > 1:
        yield [{"spec.hyperparameters.microBatchSize": 1}]
    if parallelism.strategy == "ddp" and parallelism.nodes * processes_per_node(spec) > 1:
        yield [{"spec.parallelism.strategy": "fsdp2"}]
    if parallelism.strategy == "deepspeed-zero2":
        yield [{"spec.parallelism.strategy": "deepspeed-zero3"}]
    if spec.model.autoencoder_tiling == "never" and not model.family.passages.untiled:
        yield [{"spec.model.autoencoderTiling": "auto"}]
    if spec.validation.prompts:
        yield [{"spec.validation": {}}]
    yield list(_more_gpus(run, machine))
    if numbers.precision == "fp32":
        yield [{"spec.hyperparameters.precision": "bf16"}]
    elif numbers.optimizer.type == "adamw":
        yield [{"spec.hyperparameters.optimizer.type": "adamw-bf16"}]
    if numbers.ema is not None and run.spec.objective.twin_flow is None:
        yield [{"spec.hyperparameters.ema": None}]
    if not model.family.quantization_doubt:
        yield [{"spec.model.quantization": kind} for kind in _smaller_kinds(spec.model.quantization, model.family)]
    if isinstance(spec.adapter, LoraAdapter | LohaAdapter | LoconAdapter):
        yield [{"spec.adapter.rank": rank} for rank in _halvings(spec.adapter.rank) if rank >= SMALLEST_RANK]
    if not isinstance(spec.adapter, LoraAdapter | ControlNetAdapter):
        yield [{"spec.adapter": {"type": "lora"}}]
    if model.family.modality == "video":
        yield list(_fewer_frames(run, model))
    if model.family.modality == "audio":
        yield list(_shorter(run))
    else:
        yield list(_smaller(run, model))


def _more_gpus(run: TrainingRun, machine: Machine) -> Iterator[Changes]:
    """FSDP2 over more GPUs of a node; the batch grows where it could not be dealt out."""
    parallelism, batch = run.spec.parallelism, run.spec.hyperparameters.global_batch_size
    if machine.device == "cpu":
        return
    for gpus in GPUS_PER_NODE:
        if gpus <= parallelism.gpus_per_node:
            continue
        changes: dict[str, Any] = {"spec.parallelism.gpusPerNode": gpus}
        if parallelism.strategy in ("single", "ddp"):
            changes["spec.parallelism.strategy"] = "fsdp2"
        unit = gpus * parallelism.nodes * (run.spec.hyperparameters.micro_batch_size or 1)
        if batch % unit:
            changes["spec.hyperparameters.globalBatchSize"] = -(-batch // unit) * unit
        yield changes


def _smaller_kinds(kind: Quantization | None, family: FamilyFacts) -> list[Quantization]:
    """Kinds of a quantised base that take less memory, the mildest of each size."""
    smaller: dict[Quantization | None, tuple[Quantization, ...]] = {
        None: ("int8", "nf4"),
        "int8": ("nf4",),
        "fp8": ("nf4",),
    }
    return [other for other in smaller.get(kind, ()) if other in family.quantizations]


def _fewer_frames(run: TrainingRun, model: ModelFacts) -> Iterator[Changes]:
    """Shorter clips that fit the family's rule."""
    frames = run.spec.data.clip.frames
    modulus, remainder = model.family.frame_rule or (1, 0)
    for fewer in (frames * 3 // 4, *_halvings(frames)):
        fewer -= (fewer - remainder) % modulus
        if fewer > modulus:
            yield {"spec.data.clip.frames": fewer}


def _shorter(run: TrainingRun) -> Iterator[Changes]:
    """Less of long sounds."""
    audio = run.spec.data.audio
    for seconds in _halvings(audio.max_seconds):
        if seconds >= audio.min_seconds:
            yield {"spec.data.audio.maxSeconds": seconds}


def _smaller(run: TrainingRun, model: ModelFacts) -> Iterator[Changes]:
    """Lower resolutions, whole buckets, down to a quarter."""
    align = bucket_alignment(run.spec, model.family)
    for part in (6, 4, 3, 2):
        resolution = run.spec.data.resolution * part // 8 // align * align
        if resolution >= align:
            yield {"spec.data.resolution": resolution}


def _halvings(number: int) -> Iterator[int]:
    while number > 1:
        number //= 2
        yield number


def _text(path: str, value: Any) -> str:
    match value:
        case bool():
            return f"{path} {str(value).lower()}"
        case None:
            return f"{path} off"
        case {"type": kind}:
            return f"{path}.type {kind}"
        case {}:
            return f"{path} without prompts"
    return f"{path} {value}"
