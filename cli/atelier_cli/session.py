"""One `atelier run`: what was there before, the lock, the nodes, their restarts as a gang, and the end."""

import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from atelier_api.errors import ConfigError
from atelier_api.exit_codes import MEANINGS, ExitCode
from atelier_api.result import AgentResult
from atelier_api.run_file import RunFile
from atelier_cli import terminal
from atelier_cli.changes import refused_changes
from atelier_cli.follow import Display, Watch, display_for, fetch
from atelier_cli.gang import Gang, decisive
from atelier_cli.outcome import tell, tell_failure
from atelier_cli.plan import STRATEGIES, adapter_text, processes, tiles_text
from atelier_runtime.node import hold_lock, holder, in_use
from atelier_runtime.observe.progress import read_progress
from atelier_runtime.observe.scratch import Scratch
from atelier_runtime.store import ObjectMissing, Store, open_store

RUN_KEY = "run.json"
# Manifests first: files without a manifest are never loaded, a manifest without files would be an error.
OWN_PREFIXES = ("manifests/", "checkpoints/", "samples/", "logs/", RUN_KEY)
LOOK_SECONDS = 0.3


class Interrupts:
    """Requests to stop that reach the command: the first stops the run, a second Ctrl-C kills it."""

    def __init__(self) -> None:
        self.count = 0
        self._told = 0
        self.take_over()

    def take_over(self) -> None:
        """Handle the signals, also after torchx has put its own handlers in place."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._take)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, self._take)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        # Only a person who presses again means it: what stops a process may send its signal twice.
        if number == signal.SIGINT or self.count == 0:
            self.count += 1

    def pass_on(self, gang: Gang, display: Display) -> None:
        """Do what has been asked for since the last call."""
        while self._told < self.count:
            self._told += 1
            if self._told == 1:
                display.note("stopping after this step, with a checkpoint; Ctrl-C again kills")
                gang.stop()
            elif self._told == 2:
                display.note("killing")
                gang.kill()

    @property
    def killed(self) -> bool:
        """Whether the user lost patience."""
        return self._told > 1


class Session:
    """A run on this machine, from its plan to its exit code."""

    def __init__(self, run_file: RunFile, file: Path, *, quiet: bool, launch_module: str) -> None:
        self._run_file = run_file
        self._file = file
        self._quiet = quiet
        self._launch_module = launch_module
        self._scratch = Scratch(Path(run_file.scratch))

    def run(self, *, fresh: bool) -> int:
        """The exit code of the run."""
        with self._locked():
            store = open_store(self._run_file.store_uri, self._run_file.spec.storage.s3)
            before = self._before(store, must_be_readable=not fresh)
            if fresh:
                self._start_anew(store)
            elif before is not None:
                self._check(before)
            if before is not None:
                attempt = int(before.attempt.partition(".")[0]) + 1
                self._run_file = self._run_file.model_copy(update={"attempt": f"{attempt}.0"})
            if not self._quiet:
                self._introduce(continues=before is not None and not fresh)
            result = self._train()
        if result.exit_code in (ExitCode.DONE, ExitCode.STOPPED):
            if not self._quiet:
                tell(self._run_file, result, self._file)
        else:
            tell_failure(self._run_file, result)
        return int(result.exit_code)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody else trains this run here. An agent can outlive a command that was killed, until it has stopped."""
        what = f"run {self._run_file.identity.name}"
        with hold_lock(self._scratch.root / "run.lock", what):
            for lock in self._scratch.root.glob("agent-*.lock"):
                if other := holder(lock):
                    raise ConfigError(in_use(what, other))
            yield

    def _before(self, store: Store, *, must_be_readable: bool) -> RunFile | None:
        """The run of this name that the store holds. Raises ConfigError when it must be read and cannot be."""
        try:
            data = store.get_bytes(RUN_KEY)
        except ObjectMissing:
            return None
        try:
            return RunFile.model_validate_json(data)
        except ValueError as error:
            if not must_be_readable:
                return None
            raise ConfigError(
                f"{store.uri}/{RUN_KEY} cannot be read ({type(error).__name__}), another version may have written it; "
                "give the run another metadata.name, or start anew with --fresh"
            ) from error

    def _check(self, before: RunFile) -> None:
        refused = refused_changes(before.spec, self._run_file.spec)
        if refused:
            advice = (
                f"run {before.identity.name} has been trained with other settings; change them back, "
                "give the run another metadata.name, or start anew with --fresh"
            )
            raise ConfigError("\n".join([*refused, advice]))

    def _start_anew(self, store: Store) -> None:
        """Remove what a resume could find. Exports and the report stay until the run writes new ones."""
        for prefix in OWN_PREFIXES:
            store.delete([info.key for info in store.list(prefix)])
        shutil.rmtree(self._scratch.root / "staging", ignore_errors=True)

    def _introduce(self, *, continues: bool) -> None:
        run_file, spec, plan = self._run_file, self._run_file.spec, self._run_file.plan
        nodes = f"{plan.nodes} nodes of " if plan.nodes > 1 else ""
        where = "CPU" if plan.device == "cpu" else "GPU"
        recompute = ", gradient checkpointing" if plan.gradient_checkpointing else ""
        batch = f"batch {spec.hyperparameters.global_batch_size}"
        memory = f"{terminal.size(plan.predicted_peak_memory_bytes)} predicted"
        if plan.device_memory_bytes is not None:
            memory += f" of {terminal.size(plan.device_memory_bytes)} a process has"
        terminal.say(run_file.identity.name, style="bold")
        terminal.facts(
            [
                ("model", f"{spec.model.family} from {spec.model.source}"),
                ("adapter", adapter_text(spec.adapter)),
                (
                    "strategy",
                    f"{STRATEGIES[plan.strategy]}, {nodes}{processes(plan.processes_per_node)} on the {where}{recompute}",
                ),
                ("tiles", tiles_text(encoding=plan.tiled_encoding, samples=plan.tiled_samples)),
                ("memory", memory),
                ("steps", f"{spec.hyperparameters.steps}, {batch}, learning rate {plan.learning_rate:g}"),
                ("store", f"{run_file.store_uri} ({'goes on from what is there' if continues else 'new'})"),
                ("logs", str(self._scratch.root / "logs")),
            ]
        )

    def _train(self) -> AgentResult:
        """All attempts of the gang. A single node's agent restarts by itself; several nodes are restarted here, together."""
        retry, nodes = self._run_file.spec.retry, self._run_file.plan.nodes
        restarts_left = retry.max_restarts if nodes > 1 else 0
        pause = float(retry.backoff_seconds)
        with display_for(quiet=self._quiet) as display:
            watch = Watch(display, self._run_file.store_uri)
            interrupts = Interrupts()
            while True:
                result = self._attempt(watch, display, interrupts)
                if interrupts.count or restarts_left == 0 or not MEANINGS[result.exit_code].restart:
                    return result
                display.note(f"restarting all nodes in {pause:g} s, {restarts_left} restarts left: {result.message}")
                if not _slept(pause, interrupts):
                    return result
                restarts_left -= 1
                pause *= 2
                attempt, _, restart = self._run_file.attempt.partition(".")
                self._run_file = self._run_file.model_copy(update={"attempt": f"{attempt}.{int(restart) + 1}"})

    def _attempt(self, watch: Watch, display: Display, interrupts: Interrupts) -> AgentResult:
        with Gang(self._run_file, launch_module=self._launch_module) as gang:
            interrupts.take_over()
            while gang.running():
                interrupts.pass_on(gang, display)
                port = gang.port()
                watch.look(fetch(port) if port else None)
                time.sleep(LOOK_SECONDS)
            watch.look(read_progress(self._scratch.progress))
            result = decisive(gang.results())
        if interrupts.killed:
            return result.model_copy(update={"message": f"killed by the second Ctrl-C; {result.message}"})
        return result


def _slept(seconds: float, interrupts: Interrupts) -> bool:
    """Wait; False as soon as a stop is asked for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not interrupts.count:
        time.sleep(LOOK_SECONDS)
    return not interrupts.count
