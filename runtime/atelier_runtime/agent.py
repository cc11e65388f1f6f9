"""The node's entry point, PID 1 of a pod: starts torchrun, passes a stop on, finds the cause of a failure, restarts, serves metrics.

python -m atelier_runtime.agent --run-file run.json --node-rank 0 --rendezvous HOST:PORT --port 9400

Its exit code is one of `atelier_api.exit_codes`, never 0 after a request to stop. A run on one node is restarted here; a gang of
several nodes is restarted as a whole by who started it (JobSet, or the command line), because one node alone cannot know that
the others have left the same attempt. Imports no torch: it must be up, and answer, before torch is.
"""

import argparse
import logging
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from atelier_api.errors import ConfigError, RunError
from atelier_api.exit_codes import MEANINGS, ExitCode
from atelier_api.log import setup_logging
from atelier_api.progress import Progress, Stage
from atelier_api.result import AgentResult, shorten
from atelier_api.run_file import RunFile
from atelier_runtime.node import Attempt, hold_lock, kill_descendants
from atelier_runtime.observe.exposition import Endpoint
from atelier_runtime.observe.failure import Failure, exit_code_of
from atelier_runtime.observe.progress import read_progress, write_progress
from atelier_runtime.observe.scratch import Scratch
from atelier_runtime.process_group import adopt_orphans
from atelier_runtime.stop_request import StopRequest

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
# torchrun waits up to 300 s for other nodes once its own ranks are done, and cannot be stopped in that.
IDLE_TORCHRUN_SECONDS = 5.0
# Peers that only lost another node wait this long before they leave, so that the node with the cause is seen to fail first.
LOST_PEER_PAUSE_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 300.0


@dataclass(frozen=True)
class Options:
    """The command line. `rendezvous` is where node 0 listens, needed for more than one node. `restart` is how often whoever
    starts the agent has started it before in this attempt; None: nobody restarts it, so it restarts its ranks itself."""

    run_file: Path
    node_rank: int
    rendezvous: str
    port: int
    launch_module: str
    termination_message: Path | None
    restart: int | None = None


class Agent:
    """One node of a run, from its first attempt to its exit code."""

    def __init__(self, options: Options, run_file: RunFile, stop: StopRequest) -> None:
        self._options = options
        self._run_file = run_file
        self._scratch = Scratch(Path(run_file.scratch))
        self._stop = stop
        self._reached_step = 0

    def run(self) -> AgentResult:
        """Attempts until one is done, cannot be cured, or the restarts are used up."""
        self._stop.not_after(self._run_file.spec.schedule.active_deadline_seconds)
        retry = self._run_file.spec.retry
        alone = self._options.restart is None and self._run_file.plan.nodes == 1
        restarts_allowed = retry.max_restarts if alone else 0
        pause = float(retry.backoff_seconds)
        restarts = 0
        if self._options.restart and self._stopped_within(backoff_seconds(pause, self._options.restart)):
            return self._stopped(self._name(0))
        while True:
            result = self._attempt(restarts)
            if not MEANINGS[result.exit_code].restart or self._stop.wanted():
                return result
            if restarts == restarts_allowed:
                return self._give_up(result, restarts)
            restarts += 1
            log.warning(
                "restarting",
                extra={"restart": restarts, "of": restarts_allowed, "pause_seconds": pause, "cause": result.message},
            )
            self._say("Preparing", f"restart {restarts} of {restarts_allowed} in {pause:g} s: {result.message}")
            if self._stopped_within(pause):
                return self._stopped(result.attempt)
            pause *= 2

    def _attempt(self, restarts: int) -> AgentResult:
        """One life of the process group."""
        run_file = self._run_file.model_copy(update={"attempt": self._name(restarts)})
        attempt = Attempt(run_file, self._options.node_rank, self._options.rendezvous, self._options.launch_module)
        log.info("starting the ranks", extra={"attempt": run_file.attempt, "ranks": run_file.plan.processes_per_node})
        attempt.start(recover_until=self._reached_step)
        killed = self._wait(attempt)
        kill_descendants()
        step = self._step()
        self._reached_step = max(self._reached_step, step or 0)
        failure = attempt.cause(self._stop.at)
        if failure is not None:
            return self._failed(run_file.attempt, failure)
        if killed:
            return self._result(
                run_file.attempt,
                ExitCode.INTERNAL,
                f"the ranks did not stop within {self._grace_seconds():g} s and were killed",
            )
        if self._stop.at is not None:
            return self._stopped(run_file.attempt)
        return self._result(run_file.attempt, ExitCode.DONE, MEANINGS[ExitCode.DONE].text)

    def _name(self, restarts: int) -> str:
        """`<attempt>.<restart>` of a life of the process group."""
        name, _, restart = self._run_file.attempt.partition(".")
        return f"{name}.{int(restart or 0) + (self._options.restart or 0) + restarts}"

    def _wait(self, attempt: Attempt) -> bool:
        """Until the group has ended. True: it had to be killed."""
        passed_on = False
        while attempt.group.poll() is None:
            if self._stop.wanted():
                if not passed_on:
                    log.info(
                        "stopping the ranks", extra={"cause": self._stop.text, "grace_seconds": self._grace_seconds()}
                    )
                    attempt.group.terminate()
                    passed_on = True
                elif self._stop.seconds_ago > IDLE_TORCHRUN_SECONDS and not attempt.group.has_children():
                    attempt.group.kill()
                    return False
                elif self._stop.seconds_ago > self._grace_seconds():
                    log.warning("killing the ranks", extra={"grace_seconds": self._grace_seconds()})
                    attempt.group.kill()
                    return True
            time.sleep(POLL_SECONDS)
        return False

    def _grace_seconds(self) -> float:
        """Time for the ranks, a little less than the pod has: the agent must tell why before it is killed itself."""
        grace = self._run_file.spec.schedule.termination_grace_seconds
        return grace - min(5.0, grace / 5)

    def _stopped_within(self, seconds: float) -> bool:
        """Wait; True as soon as a stop is asked for."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._stop.wanted():
                return True
            time.sleep(POLL_SECONDS)
        return self._stop.wanted()

    def _failed(self, attempt: str, failure: Failure) -> AgentResult:
        log.error(
            "attempt failed",
            extra={"attempt": attempt, "failed_rank": failure.rank, "error": failure.error, "cause": failure.message},
        )
        if failure.exit_code is ExitCode.COLLECTIVE_TIMEOUT and self._run_file.plan.nodes > 1:
            self._stopped_within(LOST_PEER_PAUSE_SECONDS)
        result = self._result(attempt, failure.exit_code, failure.message)
        step = failure.step if failure.step is not None else result.step
        return result.model_copy(update={"rank": failure.rank, "time": failure.time, "step": step})

    def _stopped(self, attempt: str) -> AgentResult:
        result = self._result(attempt, ExitCode.STOPPED, self._stop.text)
        return result.model_copy(update={"reason": self._stop.reason})

    def _give_up(self, result: AgentResult, restarts: int) -> AgentResult:
        if restarts == 0:
            return result
        return result.model_copy(
            update={"message": shorten(f"{result.message} (after {restarts} restarts, spec.retry.maxRestarts)")}
        )

    def _result(self, attempt: str, code: ExitCode, message: str) -> AgentResult:
        progress = read_progress(self._scratch.progress)
        return AgentResult(
            exit_code=code,
            reason=MEANINGS[code].reason,
            message=shorten(message),
            attempt=attempt,
            time=time.time(),
            step=self._step(),
            checkpoint_step=progress.checkpoint.step if progress and progress.checkpoint else None,
            artifacts=progress.artifacts if progress and code is ExitCode.DONE else [],
        )

    def _step(self) -> int | None:
        progress = read_progress(self._scratch.progress)
        return progress.step if progress else None

    def _say(self, stage: Stage, detail: str) -> None:
        """Rank 0's progress, told by its agent while there is no rank 0."""
        if self._options.node_rank == 0 and (progress := read_progress(self._scratch.progress)):
            write_progress(
                self._scratch.progress,
                progress.model_copy(update={"stage": stage, "detail": detail, "eta_seconds": None}),
            )

    def finish(self, result: AgentResult) -> None:
        """Leave the terminal facts where the operator, the kubelet and the command line look for them."""
        if result.exit_code is ExitCode.STOPPED:
            self._say("Stopped", result.message)
        elif result.exit_code is not ExitCode.DONE:
            self._say("Failed", result.message)
        write_result(result, self._scratch.result(self._options.node_rank), self._options.termination_message)


def backoff_seconds(first: float, restart: int) -> float:
    """Pause before the restart of that number (from 1): `first`, doubled each time."""
    return min(first * 2.0 ** (restart - 1), LONGEST_PAUSE_SECONDS)


def write_result(result: AgentResult, *paths: Path | None) -> None:
    """Write the terminal facts; a place that cannot be written is only logged."""
    for path in paths:
        try:
            if path is not None:
                path.write_bytes(result.message_bytes())
        except OSError as problem:
            log.warning("the result cannot be written", extra={"path": str(path), "error": str(problem)})


def parse(arguments: list[str] | None = None) -> Options:
    """The options; argparse leaves with a message when they are wrong."""
    parser = argparse.ArgumentParser(prog="python -m atelier_runtime.agent", description=__doc__.splitlines()[0])
    parser.add_argument("--run-file", type=Path, required=True, help="the RunFile")
    parser.add_argument("--node-rank", type=int, default=0, help="number of this node")
    parser.add_argument(
        "--rendezvous", default="localhost:29400", help="HOST:PORT of node 0, for runs on several nodes"
    )
    parser.add_argument(
        "--port", type=int, default=0, help="port of /metrics and /progress; 0: a free one, on the loopback address"
    )
    parser.add_argument("--launch-module", default="atelier_runtime.rank", help="module that every rank runs")
    parser.add_argument(
        "--termination-message", type=Path, default=None, help="file for the terminal facts; default: the kubelet's"
    )
    parser.add_argument(
        "--restart",
        type=lambda text: int(text or 0),
        default=None,
        help="how often this agent was started before in the attempt, by a gang's owner that restarts it",
    )
    options = Options(**vars(parser.parse_args(arguments)))
    kubelets = Path("/dev/termination-log")
    if options.termination_message is None and os.access(kubelets, os.W_OK):
        return Options(**{**vars(options), "termination_message": kubelets})
    return options


def run_node(options: Options, run_file: RunFile, stop: StopRequest) -> AgentResult:
    """Serve and train until the end. Raises ConfigError when another agent works on the run."""
    scratch = Scratch(Path(run_file.scratch))
    scratch.root.mkdir(parents=True, exist_ok=True)
    with hold_lock(scratch.lock(options.node_rank), f"run {run_file.identity.name}"):
        scratch.result(options.node_rank).unlink(missing_ok=True)
        shutil.rmtree(scratch.metrics(options.node_rank), ignore_errors=True)
        if options.node_rank == 0:
            write_progress(
                scratch.progress, Progress(detail="starting")
            )  # what an earlier run of the name left is not true any more
        agent = Agent(options, run_file, stop)
        adopt_orphans()
        identity = run_file.identity
        # In a cluster the scrape target's relabelling names the run.
        labels = {"namespace": identity.namespace, "run": identity.name} if identity.uid == "local" else {}
        endpoint = Endpoint(
            options.port, metrics=scratch.metrics(options.node_rank), labels=labels, progress=scratch.progress
        )
        scratch.port(options.node_rank).write_text(str(endpoint.port))
        try:
            result = agent.run()
            agent.finish(result)
        finally:
            kill_descendants()
            scratch.port(options.node_rank).unlink(missing_ok=True)
            endpoint.close()
        return result


def read_run_file(path: Path) -> RunFile:
    """The RunFile. Raises ConfigError when there is none that can be read."""
    try:
        return RunFile.read(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--run-file is {path}, which is no RunFile: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    options = parse(arguments)
    stop = StopRequest()  # first of all: the kernel drops a signal that PID 1 has no handler for
    setup_logging()
    try:
        run_file = read_run_file(options.run_file)
        setup_logging(run=run_file.identity.name)
        result = run_node(options, run_file, stop)
    except Exception as error:
        log.error("the agent failed", exc_info=not isinstance(error, RunError))
        code = exit_code_of(error)
        result = AgentResult(
            exit_code=code, reason=MEANINGS[code].reason, message=shorten(str(error)), attempt="", time=time.time()
        )
        write_result(result, options.termination_message)
    log.info("leaving", extra={"exit_code": int(result.exit_code), "reason": result.reason, "cause": result.message})
    return int(result.exit_code)


if __name__ == "__main__":
    sys.exit(main())
