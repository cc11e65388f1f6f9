"""The parts of a run on a GPU without a checkpoint or pictures: a network with random weights, and encoded samples in memory."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from workloads import SCHEDULERS, Workload

from activation_bytes import text_features
from atelier_api.families import FAMILIES
from atelier_api.run_file import RunFile
from atelier_operator.planner import Machine, Paths, plan, resolve, table_facts
from atelier_operator.planner.memory import Choice, Prediction, predict
from atelier_runtime import adapters, parallel
from atelier_runtime.checkpoint import Checkpointer
from atelier_runtime.data import Dataset, MicroBatch
from atelier_runtime.data.order import SampleOrder, Slot
from atelier_runtime.denoisers import Denoisers
from atelier_runtime.families import get_family
from atelier_runtime.observe.metrics import TrainMetrics
from atelier_runtime.observe.progress import ProgressWriter
from atelier_runtime.reporter import Reporter
from atelier_runtime.store import open_store
from atelier_runtime.trainer import Parts, build_run_objective, build_state, staging_folder
from family_models import PUBLISHED
from planned_runs import run as valid_run
from sessions import alone

SAMPLES = 64
STEPS = 1_000_000
"""More than is ever trained: the gauge stops the trainer."""


def run_file(work: Workload, folder: Path, device: torch.device) -> RunFile:
    """The workload as a user would write it, planned for this machine."""
    adapter: dict[str, Any] = {"type": "lora", "rank": work.rank, "targets": ["all"]}
    changes: dict[str, Any] = {}
    if work.full_rank:
        adapter = {"type": "full"}
        changes["hyperparameters__optimizer__type"] = "adamw-bf16"
    if FAMILIES[work.family].modality == "video":
        changes["data__clip__frames"] = work.frames
    run = valid_run(
        work.family,
        model__flavour=work.flavour,
        adapter=adapter,
        data__resolution=work.edge,
        hyperparameters__steps=STEPS,
        hyperparameters__globalBatchSize=work.batch,
        hyperparameters__microBatchSize=work.batch,
        hyperparameters__gradientCheckpointing=work.recompute,
        hyperparameters__precision="bf16",
        parallelism__gpusPerNode=1 if device.type == "cuda" else 0,
        storage__checkpoint={"everySteps": 0, "everySeconds": 604_800},
        **changes,
    )
    machine = Machine(cast("Any", device.type), 1, None, cores=torch.get_num_threads())
    execution = plan(run, table_facts(run.spec.model), machine)
    model = folder / "model"
    (model / "scheduler").mkdir(parents=True, exist_ok=True)
    scheduler = SCHEDULERS[FAMILIES[work.family].objective]
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (model / "model_index.json").write_text(json.dumps({"_class_name": FAMILIES[work.family].pipelines[0]}))
    paths = Paths(str(model), (str(folder),), str(folder / "runs"), str(folder / "scratch"), str(folder / "cache"))
    return resolve(run, execution, paths)


def prediction(file: RunFile, work: Workload) -> Prediction:
    """What the planner expects."""
    choice = Choice(file.plan.strategy, 1, work.batch, work.recompute)
    return predict(file.spec, table_facts(file.spec.model), choice, file.plan.device)


def random_denoiser(work: Workload, device: torch.device) -> nn.Module:
    """The published network in bf16, initialised where it is used, frozen. What its class keeps in fp32 is fp32."""
    model_class, config = PUBLISHED[work.family].denoisers[work.flavour]
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = model_class(**(config | dict(work.shrink)))
    finally:
        torch.set_default_dtype(before)
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, parameter in model.named_parameters():
        # Some classes leave single parameters as the memory was, for a checkpoint to fill.
        parameter.data.nan_to_num_(0.0).clamp_(-1.0, 1.0)
        if any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.float()
    return model


class EncodedSamples:
    """A training set of one bucket that needs no cache: every sample is drawn from its number. Stands in for `Dataset`."""

    hash = "synthetic"
    frame_rate: float | None

    def __init__(self, work: Workload, file: RunFile, model: nn.Module, device: torch.device) -> None:
        facts = FAMILIES[work.family]
        features = PUBLISHED[work.family].features
        text = features() if features else text_features(model, table_facts(file.spec.model).text_tokens)
        video = facts.modality == "video"
        self.device = device
        self.frame_rate = 16.0 if video else None
        self.shared: dict[str, Tensor] = {}
        edge = work.edge // facts.latent_factor
        depth = [(work.frames - 1) // facts.temporal_factor + 1] if video else []
        self._shape = (facts.latent_channels, *depth, edge, edge)
        self._has_std = not video
        self._text = {key: value[0] for key, value in text.items()}
        self._sizes = torch.tensor([work.edge, work.edge, 0, 0, work.edge, work.edge], dtype=torch.float32)
        tokens = facts.latent_tokens(work.edge, work.edge, work.frames)
        zeros = np.zeros(SAMPLES, np.int32)
        self.order = SampleOrder(zeros, zeros, tokens=(tokens,), global_batch_size=work.batch, seed=0)

    def latents(self, sample: int) -> Tensor:
        return torch.randn(self._shape, generator=torch.Generator().manual_seed(sample)).to(torch.bfloat16)

    def text(self, sample: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1_000_000 + sample)
        return {
            key: torch.randn(value.shape, generator=generator).to(value.dtype) if value.is_floating_point() else value
            for key, value in self._text.items()
        }

    def load(self, slots: Sequence[Slot], *, step: int, epoch: int) -> MicroBatch:
        latents = torch.stack([self.latents(slot.sample) for slot in slots])
        return MicroBatch(
            latents=latents,
            std=torch.full_like(latents, 0.01) if self._has_std else None,
            text=[self.text(slot.sample) for slot in slots],
            sizes=self._sizes.repeat(len(slots), 1),
            weights=torch.tensor([slot.weight for slot in slots], dtype=torch.float32),
            slots=tuple(slot.index for slot in slots),
            names=tuple(f"{slot.sample}" for slot in slots),
        )


def build(
    work: Workload, file: RunFile, folder: Path, distributed: parallel.Distributed, *, compiled: bool = False
) -> Parts:
    """The parts as `launch.prepare` makes them from a checkpoint and a data set. The caller closes the checkpointer."""
    distributed, writer = alone(
        file.plan, folder
    )  # there may be a GPU already, unlike in a run: the writer touches none
    family = get_family(work.family)
    model = random_denoiser(work, distributed.device)
    dataset = EncodedSamples(work, file, model, distributed.device)
    trained = torch.bfloat16 if work.full_rank else torch.float32
    torch.manual_seed(file.spec.hyperparameters.seed)
    adapters.install(model, file.spec.adapter, family, dtype=trained)
    if compiled:
        cast("Any", model).compile_repeated_blocks()
    name = family.denoisers[0]
    wrapped = parallel.wrap(model, file.plan, family, distributed, hyperparameters=file.spec.hyperparameters)
    denoisers = Denoisers({name: model}, {name: wrapped}, family.stages({}, (name,)))
    store = open_store(file.store_uri, file.spec.storage.s3)
    metrics = TrainMetrics(0)
    reporter = Reporter(file, store, ProgressWriter(folder / "progress.json"), metrics)
    state = build_state(denoisers, file.spec.hyperparameters, file.plan, distributed)
    checkpointer = Checkpointer(
        file, distributed, store, staging_folder(file), writer=writer, dataset_hash=dataset.hash
    )
    objective = build_run_objective(file, family)
    samples = cast(Dataset, dataset)
    return Parts(file, family, distributed, denoisers, objective, samples, state, checkpointer, metrics, reporter)
