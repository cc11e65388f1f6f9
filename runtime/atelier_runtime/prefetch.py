"""The base model, brought to this machine before any rank starts: once per node, and without GPUs.

`atelier run` calls `fetch_model`. On a cluster a pod of its own runs

    python -m atelier_runtime.prefetch --run-file run.json

and leaves the checkpoint at the RunFile's `model_folder`: a link into the caches beside it, which later runs share. It ends with an
exit code of `atelier_api.exit_codes` and leaves its result where the kubelet looks, as the agent does. Imports no torch.
"""

import argparse
import logging
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from atelier_api.errors import ConfigError, RunError
from atelier_api.exit_codes import MEANINGS, ExitCode
from atelier_api.families import FAMILIES
from atelier_api.log import setup_logging
from atelier_api.model_files import hub_name, is_whole
from atelier_api.result import AgentResult, shorten
from atelier_api.run_file import RunFile
from atelier_api.v1alpha1.model import ModelSpec
from atelier_api.v1alpha1.storage import S3Settings
from atelier_runtime.agent import read_run_file, write_result
from atelier_runtime.fetching.transfer import Watch
from atelier_runtime.observe.failure import exit_code_of

log = logging.getLogger(__name__)

LINE_SECONDS = 10.0


@dataclass(frozen=True)
class ModelCaches:
    """Where checkpoints are kept: `hub` as huggingface_hub lays it out, `objects` for those from an S3 prefix."""

    hub: Path
    objects: Path


def is_remote(model: ModelSpec) -> bool:
    """Whether the source has to be fetched."""
    return model.source.startswith(("hf://", "s3://"))


def fetch_model(model: ModelSpec, s3: S3Settings, caches: ModelCaches, watch: Watch) -> Path:
    """The folder with the checkpoint of a remote source, fetched where it is not there.

    Raises ConfigError (no such model or revision, another family, no room), CredentialsError (gated, refused), StoreError (no answer).
    """
    family = FAMILIES[model.family]
    if model.source.startswith("s3://"):
        from atelier_runtime.fetching.objects import fetch_objects

        return fetch_objects(model.source, s3, family, cache=caches.objects, watch=watch)
    from atelier_runtime.fetching.hub import fetch_snapshot
    from atelier_runtime.fetching.hub_errors import Repository

    return fetch_snapshot(Repository(model.source, *hub_name(model)), family, caches.hub, watch)


class LogLines:
    """Progress as log lines, every ten seconds."""

    def __init__(self) -> None:
        self._started = self._at = time.monotonic()
        self._first: int | None = None

    def note(self, text: str) -> None:
        log.info(text)

    def show(self, done: int, total: int) -> None:
        now = time.monotonic()
        self._first = done if self._first is None else self._first
        if now - self._at < LINE_SECONDS:
            return
        self._at = now
        rate = (done - self._first) / (now - self._started)
        eta = round((total - done) / rate) if rate > 0 else None
        log.info(
            "fetching the model", extra={"bytes": done, "of": total, "bytes_per_second": round(rate), "eta_s": eta}
        )


def prefetch(run_file: RunFile, caches: ModelCaches, watch: Watch) -> Path:
    """Let `model_folder` hold the checkpoint. Raises what `fetch_model` does, ConfigError for a local source that is not whole."""
    spec, folder = run_file.spec, Path(run_file.model_folder)
    if is_remote(spec.model):
        fetched = fetch_model(spec.model, spec.storage.s3, caches, watch)
        if folder.resolve() != fetched.resolve():
            _link(folder, fetched)
    elif not is_whole(folder):
        raise ConfigError(
            f"spec.model.source is {spec.model.source!r}; {folder} is no whole checkpoint laid out as a diffusers pipeline"
        )
    return folder


def _link(folder: Path, target: Path) -> None:
    """Make `folder` a link to `target` in one step; relative, as other pods may see the disk elsewhere."""
    if folder.exists() and not folder.is_symlink():
        raise ConfigError(f"the model belongs at {folder}, where there is something else; remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target.resolve(), folder.parent.resolve()))
    temporary.replace(folder)


def _caches(run_file: RunFile, cache: Path | None) -> ModelCaches:
    """Both caches below `cache`, by default beside the model's folder. HF_HUB_CACHE has the last word about the hub's."""
    root = cache or Path(run_file.model_folder).parent / ".cache"
    given = os.environ.get("HF_HUB_CACHE")
    return ModelCaches(hub=Path(given) if given else root / "hub", objects=root / "models")


def _result(code: ExitCode, message: str) -> AgentResult:
    return AgentResult(
        exit_code=code, reason=MEANINGS[code].reason, message=shorten(message), attempt="", time=time.time()
    )


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m atelier_runtime.prefetch", description="Fetch a run's base model.")
    parser.add_argument("--run-file", type=Path, required=True, help="the RunFile")
    parser.add_argument(
        "--cache", type=Path, default=None, help="folder of the caches; default: .cache beside the model"
    )
    parser.add_argument(
        "--termination-message", type=Path, default=None, help="file for the result; default: the kubelet's"
    )
    options = parser.parse_args(arguments)
    kubelets = Path("/dev/termination-log")
    message_file = options.termination_message or (kubelets if os.access(kubelets, os.W_OK) else None)

    def stop(_number: int, _frame: FrameType | None) -> None:
        # As PID 1 a process is not ended by a signal it does not handle. What has been fetched stays for the next try.
        write_result(_result(ExitCode.STOPPED, "stopped on request while the model was fetched"), message_file)
        os._exit(ExitCode.STOPPED)

    signal.signal(signal.SIGTERM, stop)
    setup_logging()
    try:
        run_file = read_run_file(options.run_file)
        setup_logging(run=run_file.identity.name)
        folder = prefetch(run_file, _caches(run_file, options.cache), LogLines())
        result = _result(ExitCode.DONE, f"the model is in {folder}")
        log.info("the model is there", extra={"folder": str(folder)})
    except Exception as error:
        log.error("the model could not be fetched", exc_info=not isinstance(error, RunError))
        result = _result(exit_code_of(error), str(error))
    write_result(result, message_file)
    log.info("leaving", extra={"exit_code": int(result.exit_code), "reason": result.reason, "cause": result.message})
    return int(result.exit_code)


if __name__ == "__main__":
    sys.exit(main())
