"""A run on a cluster, followed to its end with the bars of a run on this machine."""

import time
from typing import Any

from atelier_api.exit_codes import MEANINGS, ExitCode
from atelier_api.progress import CheckpointReport, FunnelReport, Progress
from atelier_cli import terminal
from atelier_cli.cluster_api import ClusterApi, ClusterUnreachable, KindMissing, NotThere
from atelier_cli.cluster_commands import ENDED, NOT_SEEN
from atelier_cli.follow import Display, Watch, display_for

LOOK_SECONDS = 2.0
MOST_FAILURES = 30
"""Looks in a row that may fail: a minute without an API server is no reason to leave."""

UNSEEN_LOOKS = 10
"""Looks after which it is said that no operator has looked at the run."""

Object = dict[str, Any]


def follow(api: ClusterApi, namespace: str, name: str, *, quiet: bool) -> int:
    """Show a run that was submitted until it ends, is stopped, or waits for the user to change it; the exit code. Ctrl-C only stops
    looking. Raises NotThere when it is deleted meanwhile."""
    with display_for(quiet=quiet) as display:
        run = _Follower(api, display).last(namespace, name)
    return _ended(run, quiet=quiet)


class _Follower:
    def __init__(self, api: ClusterApi, display: Display) -> None:
        self._api = api
        self._display = display
        self._watch: Watch | None = None
        self._told = ""
        self._unseen = 0

    def last(self, namespace: str, name: str) -> Object:
        """The run as it is when there is nothing more to wait for."""
        failures = 0
        while True:
            try:
                run = self._api.run(namespace, name)
                failures = 0
                self._tell(run)
                if decided(run):
                    return run
            except KindMissing:
                raise
            except NotThere:
                raise NotThere(f"run {name} has been deleted by somebody") from None
            except ClusterUnreachable as error:
                failures += 1
                if failures == MOST_FAILURES:
                    raise
                if failures == 1:
                    self._display.note(f"looking again: {error}")
            time.sleep(LOOK_SECONDS)

    def _tell(self, run: Object) -> None:
        """A line for each change of phase, and how far it is."""
        status = run.get("status") or {}
        if not status:
            self._unseen += 1
            if self._unseen == UNSEEN_LOOKS:
                self._display.note(NOT_SEEN)
            return
        key, line = headline(status)
        if key != self._told:
            self._told = key
            self._display.note(line)
        progress = progress_of(status)
        if progress is not None:
            self._watch = self._watch or Watch(self._display, status.get("storeUri", ""))
            self._watch.look(progress)


def headline(status: Object) -> tuple[str, str]:
    """What must change for a new line, and the line. While it trains the message counts steps, which the bar shows."""
    phase, reason, message = (status.get(key) or "" for key in ("phase", "reason", "message"))
    line = phase + (f" ({reason})" if reason and reason != phase else "") + (f": {message}" if message else "")
    return (f"{phase} {reason}", phase) if phase == "Running" else (line, line)


def decided(run: Object) -> bool:
    """Whether there is nothing to wait for: it has ended, is stopped by request, or cannot begin before it is changed."""
    status, spec = run.get("status") or {}, run["spec"]
    if status.get("phase") in ENDED:
        return True
    if status.get("observedGeneration") != run["metadata"]["generation"]:
        return False  # what is said is about an earlier text of the run
    if status.get("phase") == "Suspended":
        return bool((spec.get("schedule") or {}).get("suspend")) and status.get("reason") == "Requested"
    return status.get("phase") == "Pending" and refused(status)


def refused(status: Object) -> bool:
    """Whether the run is not accepted, or does not fit."""
    return any(
        each["type"] in ("Accepted", "Fits") and each["status"] == "False" for each in status.get("conditions") or ()
    )


def _ended(run: Object, *, quiet: bool) -> int:
    status, metadata = run["status"], run["metadata"]
    name, where = metadata["name"], f"{metadata['name']} -n {metadata['namespace']}"
    if status["phase"] == "Succeeded":
        if not quiet:
            terminal.say(f"results  {status.get('storeUri', '')}")
        return 0
    if status["phase"] == "Suspended":
        if not quiet:
            terminal.say(f"run {name} is stopped; `atelier resume {where}` lets it go on")
        return int(ExitCode.STOPPED)
    if status["phase"] == "Pending":
        terminal.say_errors(f"run {name} cannot begin ({status.get('reason')}): {status.get('message')}")
        return int(ExitCode.CONFIG)
    terminal.say_errors(f"run {name} has failed ({status.get('reason')}): {status.get('message')}")
    if not quiet:
        terminal.say(f"logs     atelier logs {where}")
    return int(exit_code(status))


def exit_code(status: Object) -> ExitCode:
    """The exit code that the failed run would have had on this machine: by its reason, else that of its last failure."""
    reason = status.get("reason")
    if reason == "DeadlineExceeded":
        return ExitCode.STOPPED
    named = next((code for code, meaning in MEANINGS.items() if meaning.reason == reason), None)
    if named is not None:
        return named
    last = (status.get("restarts") or {}).get("lastExitCode")
    return next((code for code, meaning in MEANINGS.items() if code == last and meaning.restart), ExitCode.INTERNAL)


def progress_of(status: Object) -> Progress | None:
    """The runtime's message, as far as the status holds it."""
    said = status.get("progress")
    if said is None:
        return None
    checkpoint, data = status.get("checkpoint"), status.get("data")
    root = f"{status.get('storeUri', '')}/"
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
            manifest=checkpoint["uri"].removeprefix(root),
            size_bytes=checkpoint["sizeBytes"],
            manifest_sha256=checkpoint["manifestSha256"],
            time=checkpoint["time"],
        ),
        funnel=None if data is None else FunnelReport.model_validate(data),
        samples=[uri.removeprefix(root) for uri in status.get("samples") or ()],
        updated_at=said.get("updatedAt", ""),
    )


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)
