"""A rank without torch, for tests of the agent and the command line: what it does is named by an environment variable.

`FAKE_RANKS` lists attempts, separated by `;`, each a list of ranks, separated by `,`; the last of either list stands for all
later ones: `killed,wait;done` kills rank 0 of the first attempt and finishes the second.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from atelier_api.errors import ConfigError
from atelier_api.exit_codes import ExitCode
from atelier_api.log import setup_logging
from atelier_api.progress import ArtifactReport, CheckpointReport, FunnelReport
from atelier_api.run_file import RunFile
from atelier_runtime.observe.failure import record_failure
from atelier_runtime.observe.metrics import TrainMetrics
from atelier_runtime.observe.progress import ProgressWriter
from atelier_runtime.observe.scratch import Scratch
from atelier_runtime.store import open_store


class Rank:
    """One rank's part."""

    def __init__(self, run_file: RunFile) -> None:
        self.run_file = run_file
        self.rank = int(os.environ["RANK"])
        self.scratch = Scratch(Path(run_file.scratch))
        self.stopped = False
        signal.signal(signal.SIGTERM, self._stop)
        self.progress = ProgressWriter(self.scratch.progress if self.rank == 0 else None, every_seconds=0)
        self.metrics = TrainMetrics.from_environment(self.rank, os.environ)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self.stopped = True

    def fail(self, error: BaseException, step: int | None = None) -> int:
        record_failure(self.scratch.failures(self.run_file.attempt), self.rank, error, step=step)
        return 1

    def train(self) -> None:
        """The steps of the run, without work."""
        self.progress.update(funnel=FunnelReport(found=9, unreadable=1, kept=8))
        steps = self.run_file.spec.hyperparameters.steps
        for step in range(1, steps + 1):
            self.metrics.step_finished(step, samples=4, pixels=4096)
            self.metrics.numbers(loss=1 / step, gradient_norm=1.0, learning_rate=1e-3)
            self.metrics.data_waited(0.01 * step)
            self.progress.update(stage="Training", step=step, total_steps=steps, done=step, total=steps, loss=1 / step)
        with self.metrics.checkpoint_stall():
            pass
        if self.rank == 0:
            self.store_results(steps)
        self.metrics.checkpoint_finished(steps, size_bytes=1000, save_seconds=0.1, upload_seconds=0.2)
        report = CheckpointReport(
            step=steps, manifest="m.json", size_bytes=1000, manifest_sha256="0" * 64, time="2030-01-01T00:00:00Z"
        )
        self.progress.update(checkpoint=report)

    def store_results(self, steps: int) -> None:
        """What a run leaves in its store."""
        store = open_store(self.run_file.store_uri, self.run_file.spec.storage.s3)
        store.put_bytes("run.json", self.run_file.model_dump_json(by_alias=True).encode())
        store.put_bytes(f"manifests/{steps:08d}-{self.run_file.attempt}.json", b"{}")
        store.put_bytes("exports/diffusers/pytorch_lora_weights.safetensors", b"weights")
        store.put_bytes("report.html", b"<html></html>")
        store.put_bytes(f"samples/{steps:08d}/0.png", b"picture")
        self.progress.update(samples=[f"samples/{steps:08d}/0.png"])

    def act(self, part: str) -> int:
        """Play `part` to its end; gives the exit code."""
        match part:
            case "done":
                self.train()
                artifact = ArtifactReport(
                    format="diffusers", key="exports/x.safetensors", size_bytes=7, sha256="0f" * 32
                )
                self.progress.update(stage="Succeeded", artifacts=[artifact])
                return 0
            case "config":
                return self.fail(ConfigError("spec.adapter.targets is ['foo']; no module of the denoiser matches"))
            case "lost":
                self.wait_for_failure()  # a rank notices that a peer is gone after it is gone
                return self.fail(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), step=7)
            case "broken":
                return self.fail(ZeroDivisionError("division by zero"), step=7)
            case "killed":
                self.train()
                os.kill(os.getpid(), signal.SIGKILL)
            case "status":
                return 3
            case "wait":
                self.train()
                return self.wait()
            case "stop-and-lose-peer":
                self.train()
                self.wait()
                return self.fail(RuntimeError("Connection reset by peer"))
            case "hang":
                self.train()
                while True:
                    time.sleep(0.05)
        raise ValueError(part)

    def wait_for_failure(self) -> None:
        """Until a peer has failed; at most a minute."""
        deadline = time.monotonic() + 60
        while not any(self.scratch.failures(self.run_file.attempt).glob("*")) and time.monotonic() < deadline:
            time.sleep(0.02)

    def wait(self) -> int:
        """Until SIGTERM, as a training loop does; a failed peer makes torchrun send it as well."""
        while not self.stopped:
            time.sleep(0.02)
        return ExitCode.STOPPED


def pick(parts: list[str], index: int) -> str:
    return parts[min(index, len(parts) - 1)]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-file", type=Path, required=True)
    run_file = RunFile.read(parser.parse_args().run_file)
    setup_logging(rank=int(os.environ["RANK"]))
    attempt = int(run_file.attempt.partition(".")[2])
    ranks = pick(os.environ.get("FAKE_RANKS", "done").split(";"), attempt)
    print("environment", os.environ.get("OMP_NUM_THREADS"), os.environ.get("HF_HUB_OFFLINE"), file=sys.stderr)
    return Rank(run_file).act(pick(ranks.split(","), int(os.environ["RANK"])))


if __name__ == "__main__":
    sys.exit(main())
