"""A run on a cluster, followed to its end with the bars of a run on this machine."""

import time
from typing import Any

from atelier_api.exit_codes import MEANINGS, ExitCode
from atelier_api.progress import CheckpointReport, FunnelReport, Progress
from atelier_cli import terminal
from atelier_cli.cluster_api import ClusterApi, ClusterUnreachable
from atelier_cli.follow import Display, Watch, display_for

LOOK_SECONDS = 2.0
MOST_FAILURES = 30
"""Looks in a row that may fail: a minute without an API server is no reason to leave."""

Object = dict[str, Any]


def follow(api: ClusterApi, namespace: str, name: str, *, quiet: bool) -> int:
    """Show the run until it ends; the exit code. Ctrl-C only stops looking."""
    with display_for(quiet=quiet) as display:
        watch, told, failures = Watch(display, ""), "", 0
        while True:
            try:
                status = api.run(namespace, name).get("status") or {}
                failures = 0
            except ClusterUnreachable as error:
                failures += 1
                if failures == MOST_FAILURES:
                    raise
                display.note(f"looking again: {error}")
                time.sleep(LOOK_SECONDS)
                continue
            told = _tell(display, status, told)
            watch.look(progress_of(status))
            if status.get("phase") in ("Succeeded", "Failed"):
                break
            time.sleep(LOOK_SECONDS)
    return _ended(status, namespace, name)


def _tell(display: Display, status: Object, told: str) -> str:
    """A line for each change of phase; gives what was told last."""
    phase, reason, message = (status.get(key) or "" for key in ("phase", "reason", "message"))
    line = phase + (f" ({reason})" if reason and reason != phase else "") + (f": {message}" if message else "")
    # While it trains the message counts steps, which the bar shows.
    key = f"{phase} {reason}" if phase == "Running" else line
    if phase and key != told:
        display.note(line)
    return key


def _ended(status: Object, namespace: str, name: str) -> int:
    store = status.get("storeUri", "")
    if status["phase"] == "Succeeded":
        terminal.say(f"results  {store}")
        return 0
    terminal.say_errors(f"run {name} has failed ({status.get('reason')}): {status.get('message')}")
    terminal.say(f"logs: atelier logs {name} --namespace {namespace}")
    return int(exit_code(str(status.get("reason"))))


def exit_code(reason: str) -> ExitCode:
    """The exit code that a run on this machine would have had."""
    return next((code for code, meaning in MEANINGS.items() if meaning.reason == reason), ExitCode.INTERNAL)


def progress_of(status: Object) -> Progress | None:
    """The runtime's message, as far as the status holds it."""
    said = status.get("progress")
    if said is None:
        return None
    checkpoint, data = status.get("checkpoint"), status.get("data")
    store = status.get("storeUri", "")
    return Progress(
        stage=said["stage"],
        detail=said.get("detail", ""),
        done=said["step"],
        total=said["totalSteps"] if said["stage"] == "Training" else 0,
        step=said["step"],
        total_steps=said["totalSteps"],
        loss=_number(said.get("loss")),
        samples_per_second=_number(said.get("samplesPerSecond")),
        eta_seconds=said.get("etaSeconds"),
        peak_memory_bytes=said.get("peakMemoryBytes"),
        checkpoint=None
        if checkpoint is None
        else CheckpointReport(
            step=checkpoint["step"],
            manifest=checkpoint["uri"].removeprefix(f"{store}/"),
            size_bytes=checkpoint["sizeBytes"],
            manifest_sha256=checkpoint["manifestSha256"],
            time=checkpoint["time"],
        ),
        funnel=None if data is None else FunnelReport.model_validate(data),
        samples=list(status.get("samples") or ()),
        updated_at=said.get("updatedAt", ""),
    )


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)
