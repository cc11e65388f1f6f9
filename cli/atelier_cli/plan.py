"""`atelier plan`: what the planner would do with a run on this machine, and whether it fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atelier_cli import terminal

if TYPE_CHECKING:
    from atelier_api.v1alpha1 import TrainingRun, TrainingRunSpec
    from atelier_api.v1alpha1.adapter import Adapter
    from atelier_operator.planner.memory import ModelFacts
    from atelier_operator.planner.strategy import Fit, Machine

STRATEGIES = {
    "single": "one process",
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "deepspeed-zero2": "DeepSpeed ZeRO-2",
    "deepspeed-zero3": "DeepSpeed ZeRO-3",
}
ADAPTERS = {
    "lora": "LoRA",
    "lokr": "LoKr",
    "loha": "LoHa",
    "locon": "LoCon",
    "diag-oft": "Diag-OFT",
    "boft": "BOFT",
    "dylora": "DyLoRA",
    "ia3": "(IA)³",
}
"""Types of adapter as people write them."""


def plan(
    file: Annotated[Path, typer.Argument(help="TrainingRun YAML file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change a field: PATH=VALUE.", metavar="PATH=VALUE")
    ] = None,
) -> None:
    """Show strategy, micro-batch and predicted memory. Exit code 64 when the run does not fit, with what would."""
    from atelier_api.errors import ConfigError
    from atelier_cli.machine import host, surroundings
    from atelier_cli.run_source import load
    from atelier_operator.planner.advice import refusal
    from atelier_operator.planner.local import Host, local_facts, local_machine
    from atelier_operator.planner.strategy import best_fit, fits_of

    run = load(file, changes or [])
    found = host()
    notes = []
    try:
        machine = local_machine(run.spec, found)
    except ConfigError as error:
        # Planning for another machine: its GPUs are taken as given.
        notes.append(f"not for this machine: {error}")
        wanted = run.spec.parallelism.gpus_per_node * run.spec.parallelism.nodes
        machine = local_machine(run.spec, Host(cores=found.cores, memory_bytes=None, gpu_memory_bytes=(None,) * wanted))
    model = local_facts(run.spec, surroundings(file))
    fit = best_fit(run.spec, model, machine)
    shown = fit or min(fits_of(run.spec, model, machine), key=lambda each: each.prediction.peak)
    if shown.limit is None:
        notes.append("the device's memory is unknown, so the fit is not checked; set spec.parallelism.deviceMemory")
    refused = None if fit else refusal(run, model, machine, shown)
    document = _document(run, model, machine, shown)
    if as_json:
        terminal.say(json.dumps({**document, "fits": refused is None, "notes": notes, "refusal": refused}, indent=2))
    else:
        _table(run, model, machine, shown)
        for note in notes:
            terminal.say(f"note: {note}")
    if refused is not None:
        if as_json:
            raise typer.Exit(int(ConfigError.exit_code))
        raise ConfigError(refused)


def _document(run: TrainingRun, model: ModelFacts, machine: Machine, fit: Fit) -> dict[str, Any]:
    from dataclasses import asdict

    from atelier_operator.planner.memory import trained_parameters
    from atelier_operator.planner.strategy import learning_rate

    choice = fit.choice
    return {
        "run": run.metadata.name,
        "model": model.origin,
        "adapter": run.spec.adapter.type,
        "trainedParameters": trained_parameters(run.spec, model),
        "quantization": run.spec.model.quantization,
        "device": machine.device,
        "strategy": choice.strategy,
        "nodes": run.spec.parallelism.nodes,
        "processes": choice.processes,
        "microBatchSize": choice.micro_batch_size,
        "gradientAccumulation": _accumulation(run, fit),
        "gradientCheckpointing": choice.gradient_checkpointing,
        "tiledEncoding": choice.tiled_encoding,
        "tiledSamples": choice.tiled_samples,
        "learningRate": learning_rate(run.spec),
        "memory": {
            "train": {**asdict(fit.prediction.train), "total": fit.prediction.train.total},
            "encode": fit.prediction.encode,
            "sample": fit.prediction.sample,
            "peak": fit.prediction.peak,
            "usable": fit.limit,
        },
    }


def _accumulation(run: TrainingRun, fit: Fit) -> int:
    return run.spec.hyperparameters.global_batch_size // (fit.choice.processes * fit.choice.micro_batch_size)


def _table(run: TrainingRun, model: ModelFacts, machine: Machine, fit: Fit) -> None:
    from dataclasses import asdict

    from atelier_operator.planner.memory import trained_parameters

    trained = f"about {trained_parameters(run.spec, model) / 1e6:,.1f} million parameters"
    choice, prediction = fit.choice, fit.prediction
    per_process = f"micro-batch {choice.micro_batch_size}, {_accumulation(run, fit)} accumulated"
    batch = f"{run.spec.hyperparameters.global_batch_size}: {processes(choice.processes)}, {per_process}"
    device = "CPU" if machine.device == "cpu" else "GPU"
    terminal.say(run.metadata.name, style="bold")
    terminal.facts(
        [
            ("model", model.origin),
            ("base", base_text(run.spec)),
            ("adapter", f"{adapter_text(run.spec.adapter)}, {trained}"),
            ("strategy", f"{STRATEGIES[choice.strategy]}, {processes(choice.processes)} on the {device}"),
            ("batch", batch),
            ("recompute", "gradient checkpointing" if choice.gradient_checkpointing else "none"),
            ("tiles", tiles_text(encoding=choice.tiled_encoding, samples=choice.tiled_samples)),
        ]
    )
    terminal.say()
    parts = [(name.replace("_", " "), terminal.size(part)) for name, part in asdict(prediction.train).items() if part]
    phases = [("encode", prediction.encode), ("train", prediction.train.total), ("sample", prediction.sample)]
    rows = [*parts, *((f"phase: {name}", terminal.size(total)) for name, total in phases if total)]
    rows.append(("peak of a process", terminal.size(prediction.peak)))
    if fit.limit is not None:
        rows.append(("usable", terminal.size(fit.limit)))
    terminal.table(("MEMORY", "PREDICTED"), rows, right=(1,))
    if fit.limit is not None:
        terminal.say("fits" if fit.fits else "does not fit")


def base_text(spec: TrainingRunSpec) -> str:
    """`frozen, nf4`."""
    from atelier_api.v1alpha1.adapter import FullAdapter

    if isinstance(spec.adapter, FullAdapter):
        return "trained"
    return f"frozen, {spec.model.quantization or spec.hyperparameters.precision}"


def tiles_text(*, encoding: bool, samples: bool) -> str:
    """What goes through the autoencoder in tiles, or `none`."""
    tiled = [what for what, tiles in (("what is trained on", encoding), ("what is drawn", samples)) if tiles]
    return f"of {' and '.join(tiled)}" if tiled else "none"


def processes(count: int) -> str:
    """`1 process`, `2 processes`."""
    return f"{count} process{'' if count == 1 else 'es'}"


def adapter_text(adapter: Adapter) -> str:
    """`LoRA of rank 16, alpha 16, on attention`."""
    from atelier_api.v1alpha1.adapter import (
        BoftAdapter,
        ControlNetAdapter,
        DiagOftAdapter,
        DyloraAdapter,
        FullAdapter,
        Ia3Adapter,
        LokrAdapter,
        TextualInversionAdapter,
        alpha_of,
    )

    if isinstance(adapter, FullAdapter):
        return "none, full rank"
    if isinstance(adapter, ControlNetAdapter):
        return "control network"
    if isinstance(adapter, TextualInversionAdapter):
        told = (f"{each.token} ({each.vectors} vector{'' if each.vectors == 1 else 's'})" for each in adapter.tokens)
        return f"textual inversion of {', '.join(told)}"
    name, on = ADAPTERS[adapter.type], f"on {', '.join(adapter.targets)}{', a slider' if adapter.slider else ''}"
    if isinstance(adapter, DiagOftAdapter | BoftAdapter):
        return f"{name} of blocks up to {adapter.block_size}, {on}"
    if isinstance(adapter, Ia3Adapter):
        inputs = f", of {', '.join(adapter.input_targets)} on inputs" if adapter.input_targets else ""
        return f"{name} {on}{inputs}"
    if isinstance(adapter, DyloraAdapter):
        return f"{name} of rank {adapter.rank} in blocks of {adapter.rank_block}, alpha {alpha_of(adapter):g}, {on}"
    factor = f"factor {adapter.factor}, " if isinstance(adapter, LokrAdapter) else ""
    dora = ", weight-decomposed" if adapter.dora else ""
    return f"{name} of {factor}rank {adapter.rank}, alpha {alpha_of(adapter):g}{dora}, {on}"
