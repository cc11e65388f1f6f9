"""One rank's run: prepare, train, sample, publish. `rank` is its entry point."""

import argparse
import logging
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import diffusers
import torch
import transformers

from atelier_api.errors import ConfigError, DivergedError
from atelier_api.exit_codes import ExitCode
from atelier_api.log import setup_logging
from atelier_api.run_file import RunFile
from atelier_runtime import components, parallel
from atelier_runtime.checkpoint import Checkpointer, WriterProcess, resume
from atelier_runtime.data import build_dataset
from atelier_runtime.denoisers import Denoisers, check_networks
from atelier_runtime.families import get_family
from atelier_runtime.family import Family
from atelier_runtime.kernels import choose_adapters, choose_attention
from atelier_runtime.observe.failure import record_failure
from atelier_runtime.observe.metrics import TrainMetrics
from atelier_runtime.observe.progress import ProgressWriter
from atelier_runtime.observe.scratch import Scratch
from atelier_runtime.parallel import Distributed
from atelier_runtime.prompt_pictures import prompt_pictures
from atelier_runtime.publishing import publish, write_report, write_result
from atelier_runtime.reporter import Reporter
from atelier_runtime.sampling import draw_samples, sample_key, store_samples
from atelier_runtime.store import Store, open_store
from atelier_runtime.techniques import build_techniques
from atelier_runtime.train_state import State
from atelier_runtime.trainer import Parts, Trainer, build_run_objective, build_state, staging_folder

log = logging.getLogger(__name__)


class StopRequested(Exception):
    """SIGTERM came before the loop, where there is nothing to save."""


class StopFlag:
    """Set by SIGTERM and SIGINT; the loop reads it between steps."""

    def __init__(self) -> None:
        self.is_set = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._set)

    def _set(self, _number: int, _frame: FrameType | None) -> None:
        self.is_set = True

    def check(self) -> None:
        """Raise StopRequested when a stop has been asked for."""
        if self.is_set:
            raise StopRequested


class Reached:
    """How far the rank is, for the record of a failure."""

    state: State | None = None

    @property
    def step(self) -> int | None:
        """Steps done; None before there is a state."""
        return None if self.state is None else self.state.step


@dataclass(frozen=True)
class Session:
    """What lasts from the start of a rank to its end."""

    run_file: RunFile
    family: Family
    distributed: Distributed
    writer: WriterProcess
    store: Store
    metrics: TrainMetrics
    reporter: Reporter
    stop: StopFlag
    reached: Reached = field(default_factory=Reached)


def main() -> int:
    """Run one rank; the exit code is the agent's to classify, with the failure file."""
    parser = argparse.ArgumentParser(prog="atelier_runtime.rank", description=__doc__)
    parser.add_argument("--run-file", type=Path, required=True)
    run_file = RunFile.read(parser.parse_args().run_file)
    stop = StopFlag()
    rank = int(os.environ.get("RANK", "0"))
    session: Session | None = None
    try:
        writer = WriterProcess(Path(run_file.scratch))
        setup_logging(rank=rank)
        quiet_libraries()
        choose_attention()
        choose_adapters()
        if run_file.plan.threads_per_process:
            torch.set_num_threads(run_file.plan.threads_per_process)
        session = open_session(run_file, parallel.start(run_file.plan), writer, stop)
        finished = train(session)
        parallel.stop()
    except StopRequested:
        return ExitCode.STOPPED
    except BaseException as error:
        record(run_file, rank, error, session.reached if session else Reached())
        log.debug("rank failed", exc_info=True)
        # Peers may be inside a collective: leave at once, torchrun ends them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ExitCode.INTERNAL)
    return ExitCode.DONE if finished else ExitCode.STOPPED


def record(run_file: RunFile, rank: int, error: BaseException, reached: Reached) -> None:
    """Leave the failure file of this rank: why, at which step, and for a loss that is not finite which samples were in it."""
    step: int | None = reached.step
    files: tuple[str, ...] = ()
    if isinstance(error, DivergedError):
        step, files = reached.step if error.step is None else error.step, error.files
    folder = Scratch(Path(run_file.scratch)).failures(run_file.attempt)
    record_failure(folder, rank, error, step=step, files=files)


def quiet_libraries() -> None:
    """No bars and no chatter of the libraries in a rank's log: what users must know, we say."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def open_session(run_file: RunFile, distributed: Distributed, writer: WriterProcess, stop: StopFlag) -> Session:
    """Open the store and everything that reports."""
    metrics = TrainMetrics.from_environment(distributed.rank, os.environ)
    store = open_store(run_file.store_uri, run_file.spec.storage.s3, observer=metrics)
    progress = ProgressWriter(Scratch(Path(run_file.scratch)).progress if distributed.rank == 0 else None)
    reporter = Reporter(run_file, store, progress, metrics)
    family = get_family(run_file.spec.model.family)
    return Session(run_file, family, distributed, writer, store, metrics, reporter, stop)


def train(session: Session) -> bool:
    """The whole run of one rank. False: stopped on request."""
    parts = prepare(session)
    session.reached.state = parts.state
    total = session.run_file.spec.hyperparameters.steps
    if parts.state.step == 0:
        sample(session, parts, 0)
    session.reporter.training(parts.state.step)
    try:
        with session.reporter.timed("training"):
            finished = Trainer(parts, lambda: session.stop.is_set).run(lambda step: sample(session, parts, step))
        if finished:
            finish(session, parts)
        else:
            session.reporter.stage(
                "Stopped", f"checkpoint at step {parts.state.step}", done=parts.state.step, total=total
            )
            if session.distributed.rank == 0:
                write_report(parts, session.store, exports=[])
    finally:
        parts.checkpointer.close()
    return finished


def prepare(session: Session) -> Parts:
    """Data, network, state, resume."""
    run_file, family, distributed, reporter = session.run_file, session.family, session.distributed, session.reporter
    reporter.stage("Preparing", "reading the data")
    check_networks(run_file, family)
    prompt_pictures(run_file, family)  # a prompt that cannot be drawn is refused before anything is encoded
    if run_file.spec.validation.prompts:
        family.check_sampling(components.read_pipeline_config(run_file.model_folder))
    if distributed.rank == 0:
        session.store.put_bytes("run.json", run_file.model_dump_json(by_alias=True, indent=2).encode())

    def report(stage: str, detail: str, done: int, total: int) -> None:
        session.stop.check()
        reporter.stage("Caching", f"{stage} {detail}".strip(), done=done, total=total)

    with reporter.timed("caching"):
        dataset = build_dataset(run_file, family, distributed, report)
    reporter.funnel(dataset.funnel)
    reporter.stage("Preparing", "loading the model")
    with reporter.timed("loading"):
        denoisers = Denoisers.load(run_file, family, distributed)
        techniques = build_techniques(run_file.spec.techniques, family, denoisers.models)
        objective = build_run_objective(run_file, family)
        state = build_state(denoisers, run_file.spec.hyperparameters, run_file.plan, distributed)
        template = state.tensors()
        started = time.perf_counter()
        point = resume(run_file, distributed, session.store, template, staging_folder(run_file))
        if point is not None:
            state.restored(template)
            reporter.resumed(point, time.perf_counter() - started)
    if state.step > run_file.spec.hyperparameters.steps:
        raise ConfigError(
            f"the newest checkpoint is of step {state.step}, spec.hyperparameters.steps is {run_file.spec.hyperparameters.steps}; "
            "it must be at least the steps already trained"
        )
    checkpointer = Checkpointer(
        run_file,
        distributed,
        session.store,
        staging_folder(run_file),
        writer=session.writer,
        dataset_hash=dataset.hash,
    )
    return Parts(
        run_file,
        family,
        distributed,
        denoisers,
        objective,
        dataset,
        state,
        checkpointer,
        session.metrics,
        reporter,
        techniques,
    )


def sample(session: Session, parts: Parts, step: int) -> None:
    """Draw and keep a round of samples. Collective."""
    if not session.run_file.spec.validation.prompts:
        return
    session.reporter.stage("Sampling", f"step {step}", done=step, total=session.run_file.spec.hyperparameters.steps)
    with session.metrics.sampling(), session.reporter.timed("sampling"):
        with parts.state.averaged():
            pictures = draw_samples(session.run_file, session.family, parts.denoisers.models, session.distributed)
        store_samples(session.store, step, pictures, session.family.facts.modality)
        torch.distributed.barrier()
    modality = session.family.facts.modality
    keys = [sample_key(step, index, modality) for index in range(len(session.run_file.spec.validation.prompts))]
    session.reporter.samples_drawn(step, keys)
    session.reporter.training(step)


def finish(session: Session, parts: Parts) -> None:
    """Last samples, exports, report."""
    sample(session, parts, parts.state.step)
    session.reporter.stage("Publishing", "exporting", done=parts.state.step, total=parts.state.step)
    with session.reporter.timed("publishing"):
        exports = publish(parts, session.store)
    if session.distributed.rank == 0:
        write_report(parts, session.store, exports)
        write_result(parts, session.store, exports)
        session.reporter.published([file.report for file in exports])
    session.reporter.stage("Succeeded", "", done=parts.state.step, total=parts.state.step)
    torch.distributed.barrier()
