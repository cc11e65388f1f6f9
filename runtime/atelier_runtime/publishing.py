"""What comes out of a run: exports in the layouts that others load, and the report."""

import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import yaml
from PIL import Image

from atelier_api.errors import RunError
from atelier_api.progress import ArtifactReport
from atelier_runtime.checkpoint.export import export_lora, export_models
from atelier_runtime.checkpoint.export_few_steps import export_few_steps, parted
from atelier_runtime.checkpoint.export_lycoris import export_lycoris
from atelier_runtime.checkpoint.export_tokens import export_tokens
from atelier_runtime.checkpoint.exported_file import ExportedFile, Provenance
from atelier_runtime.denoisers import gathered_weights
from atelier_runtime.observe.report import Picture, ReportData, Sound, render_report
from atelier_runtime.reporter import History, peak_memory_bytes
from atelier_runtime.store import Store
from atelier_runtime.trainer import Parts
from atelier_runtime.usage import usage

log = logging.getLogger(__name__)

MEDIA_TYPES = {"png": "image/png", "webp": "image/webp", "flac": "audio/flac"}


_EXPORTS = {"lora": export_lora, "full": export_models, "controlnet": export_models, "textual-inversion": export_tokens}
"""By type of adapter; the others are those of lycoris-lora."""


@dataclass(frozen=True)
class PublishedFile:
    """One file below `exports/` of the run's folder."""

    format: str
    key: str
    sha256: str
    size_bytes: int

    @property
    def report(self) -> ArtifactReport:
        """As it is told to the operator and the command line."""
        return ArtifactReport(format=self.format, key=self.key, size_bytes=self.size_bytes, sha256=self.sha256)


def publish(parts: Parts, store: Store) -> list[PublishedFile]:
    """Export the trained weights (their moving average where there is one) and store them. Collective; files on rank 0 only."""
    with parts.state.averaged():
        weights = gathered_weights(parts.denoisers)
    if parts.distributed.rank != 0:
        return []
    folder = Path(parts.run_file.scratch) / "exports"
    provenance = Provenance(step=parts.state.step, date=datetime.now(UTC))
    export = _EXPORTS.get(parts.run_file.spec.adapter.type, export_lycoris)
    adapters, steps = parted(weights)
    files = export(adapters, parts.run_file, parts.family, folder, provenance=provenance)
    files += export_few_steps(steps, parts.run_file, parts.family, folder, provenance=provenance)
    return [_store(store, folder, file) for file in files]


def _store(store: Store, folder: Path, file: ExportedFile) -> PublishedFile:
    key = f"exports/{file.path.relative_to(folder).as_posix()}"
    store.put_file(key, file.path, file.sha256)
    log.info("exported", extra={"key": key, "bytes": file.size_bytes})
    return PublishedFile(file.format, key, file.sha256, file.size_bytes)


def write_result(parts: Parts, store: Store, exports: Sequence[PublishedFile]) -> None:
    """Write `result.json`: the terminal facts of a run that has succeeded, for programs. Written last."""
    result = {
        "outcome": "Succeeded",
        "step": parts.state.step,
        "loss": parts.reporter.history.rows[-1][1] if parts.reporter.history.rows else None,
        "funnel": parts.dataset.funnel.model_dump(by_alias=True, exclude={"rejected"}),
        "exports": [
            {"format": file.format, "key": file.key, "sha256": file.sha256, "sizeBytes": file.size_bytes}
            for file in exports
        ],
    }
    store.put_bytes("result.json", (json.dumps(result, indent=2) + "\n").encode())


def write_report(parts: Parts, store: Store, exports: Sequence[PublishedFile]) -> None:
    """Write `report.html`. A report that cannot be made is logged; it never fails a run that trained."""
    try:
        store.put_bytes("report.html", render_report(_report_data(parts, store, exports)).encode())
    except (OSError, RunError, ValueError):
        log.exception("the report could not be written")


def _report_data(parts: Parts, store: Store, exports: Sequence[PublishedFile]) -> ReportData:
    run_file, history = parts.run_file, parts.reporter.history
    spec, plan = run_file.spec, run_file.plan
    trained = sum(parameter.numel() for parameter in parts.state.parameters.values())
    losses = [row[1] for row in history.rows[-20:]]
    seconds = history.seconds.get("training", 0.0)
    memory = peak_memory_bytes()
    return ReportData(
        title=run_file.identity.name,
        subtitle=f"{parts.family.facts.title}, {spec.adapter.type}, written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        facts=[
            ("steps", f"{parts.state.step} of {spec.hyperparameters.steps}"),
            ("loss, last 20 steps", f"{sum(losses) / len(losses):.4f}" if losses else "–"),
            ("trained parameters", f"{trained:,}"),
            ("samples kept", f"{parts.dataset.funnel.kept} of {parts.dataset.funnel.found}"),
            ("training", f"{seconds:.0f} s"),
            ("peak memory, rank 0", f"{memory / 2**30:.2f} GiB"),
        ],
        rows=[(row[0], row[1]) for row in history.rows],
        prompts=[prompt.text for prompt in spec.validation.prompts],
        samples=_samples(store, history),
        funnel=parts.dataset.funnel,
        seconds=history.seconds,
        settings=yaml.safe_dump(json.loads(spec.model_dump_json(by_alias=True, exclude_none=True)), sort_keys=False),
        plan=[
            ("strategy", plan.strategy),
            ("processes", f"{plan.nodes} x {plan.processes_per_node} on {plan.device}"),
            ("micro-batch x accumulation", f"{plan.micro_batch_size} x {plan.gradient_accumulation}"),
            ("gradient checkpointing", "on" if plan.gradient_checkpointing else "off"),
            ("latents made of", "tiles" if plan.tiled_encoding else "whole samples"),
            ("samples drawn in", "tiles" if plan.tiled_samples else "one piece"),
            ("learning rate", f"{plan.learning_rate:g}"),
            ("predicted peak memory", f"{plan.predicted_peak_memory_bytes / 2**30:.2f} GiB per process"),
            ("observed peak memory, rank 0", f"{memory / 2**30:.2f} GiB"),
        ],
        exports=[(file.format, file.key, file.sha256) for file in exports],
        usage=usage(run_file, parts.family, [file.key for file in exports]),
        events=history.events,
        techniques=history.techniques,
    )


def _samples(store: Store, history: History) -> dict[int, Sequence[Picture | Sound | None]]:
    return {step: [_sample(store, key) for key in keys] for step, keys in sorted(history.samples.items())}


def _sample(store: Store, key: str) -> Picture | Sound | None:
    try:
        data = store.get_bytes(key)
    except (OSError, RunError):
        return None
    media_type = MEDIA_TYPES[key.rsplit(".", 1)[1]]
    if media_type.startswith("audio/"):
        return Sound(data, media_type)
    return Picture(data, media_type, Image.open(io.BytesIO(data)).width)
