"""One save, from a snapshot in memory to a committed manifest. Runs in the writer processes, on all ranks together.

    space     is there room in the staging folder, on every node?
    write     torch.distributed.checkpoint into staging; then the snapshot's memory is free
    upload    every rank: hash and upload its own files, then `records/<rank>.json`
    commit    rank 0: are all files there with their sizes? then the manifest, last

An error of any rank ends the save on all; training goes on, and the next save is tried.
"""

import errno
import logging
import os
import secrets
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as write_state

from atelier_api.errors import RunError, StoreError
from atelier_api.progress import CheckpointReport
from atelier_runtime.checkpoint.attempts import is_newest
from atelier_runtime.checkpoint.manifest import (
    CHECKPOINTS,
    MANIFESTS,
    QUARANTINE,
    Base,
    DataFacts,
    FileRecord,
    Manifest,
    ManifestName,
    describe_base,
    folder_name,
)
from atelier_runtime.checkpoint.messages import Save, SaveOutcome, SnapshotFree, WriterSettings
from atelier_runtime.checkpoint.ranks import Group
from atelier_runtime.checkpoint.retention import Collector
from atelier_runtime.store import Store
from atelier_runtime.store.protocol import sha256_of, sha256_of_file

log = logging.getLogger(__name__)

_SPARE = 1.2  # of the size, so that the file system's own needs are met as well
_SPARE_FILES = 64
_PACKAGES = ("atelier-training", "torch", "diffusers", "peft")


class StagingDiskFull(StoreError, OSError):
    """The disk of the staging folder has no room for a checkpoint."""

    errno = errno.ENOSPC


@dataclass
class _Timing:
    stage: str = "save"
    upload_seconds: float = 0.0


class Saver:
    """Writes saves of one run and attempt."""

    def __init__(self, settings: WriterSettings, group: Group, store: Store) -> None:
        self._settings = settings
        self._group = group
        self._store = store
        self._base: Base | None = None
        checkpoint = settings.run_file.spec.storage.checkpoint
        self._collector = Collector(
            store,
            settings.attempt,
            keep_last=checkpoint.keep_last,
            keep_every=checkpoint.keep_every,
            own_only=settings.run_file.spec.storage.resume.mode == "Never",
        )

    def describe_base(self) -> None:
        """Hash the base model's files, before the first save asks for them."""
        if self._group.rank == 0:
            model = self._settings.run_file.spec.model
            self._base = describe_base(Path(self._settings.run_file.model_folder), model.source, model.revision)

    def save(self, save: Save, state: dict[str, Any], tell: Callable[[object], None]) -> SaveOutcome:
        """Write and commit a snapshot. Collective."""
        save_id = self._group.gather(secrets.token_hex(4))[0]
        folder = self._settings.staging / folder_name(save.step, self._settings.attempt, save_id)
        timing = _Timing()
        report, failure = None, None
        try:
            self._group.together(lambda: check_space(self._settings.staging, self._needed_bytes(save)))
            self._group.together(lambda: folder.mkdir(parents=True, exist_ok=True))
            self._write(state, folder)
            state.clear()
            tell(SnapshotFree(save.step))
            timing.stage = "upload"
            report = self._upload_and_commit(save, save_id, folder, timing)
        except Exception as error:
            failure = error
        finally:
            self._clean_up(folder)
        seconds = time.monotonic() - save.started
        return SaveOutcome(save.step, report, timing.stage, failure, seconds, timing.upload_seconds)

    def collect_garbage(self) -> None:
        """Remove what the last commit made superfluous. Rank 0; errors are only logged, the next commit tries again."""
        if self._group.rank != 0:
            return
        try:
            self._collector.collect()
        except RunError:
            log.warning("superfluous checkpoints not removed", exc_info=True)

    def _needed_bytes(self, save: Save) -> int:
        """Upper bound of what the ranks of this node write: whole tensors are shared out, shards add up."""
        ranks = self._settings.ranks_on_node if save.snapshot.sharded else 1
        return save.snapshot.tensor_bytes * ranks

    def _write(self, state: dict[str, Any], folder: Path) -> None:
        writer = FileSystemWriter(folder, sync_files=True, overwrite=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                write_state(state, storage_writer=writer)
        except CheckpointException as error:
            _explain(error, self._settings.staging)

    def _upload_and_commit(self, save: Save, save_id: str, folder: Path, timing: _Timing) -> CheckpointReport:
        started = time.monotonic()
        try:
            records = self._group.together(lambda: self._upload(folder))
        finally:
            timing.upload_seconds = time.monotonic() - started
        files = tuple(sorted((record for rank in records for record in rank), key=lambda record: record.path))
        return self._group.on_rank_zero(lambda: self._commit(save, save_id, files))

    def _upload(self, folder: Path) -> list[FileRecord]:
        """Upload this rank's own files. The folder may be shared by the ranks of a node."""
        rank = self._settings.rank
        paths = sorted(folder.glob(f"__{rank}_*")) + ([folder / ".metadata"] if rank == 0 else [])
        prefix = f"{CHECKPOINTS}{folder.name}/"
        records = []
        for path in paths:
            record = FileRecord(path=path.name, size=path.stat().st_size, sha256=sha256_of_file(path))
            self._store.put_file(prefix + path.name, path, record.sha256, move=True)
            records.append(record)
        lines = "".join(record.model_dump_json(by_alias=True) + "\n" for record in records)
        self._store.put_bytes(f"{prefix}records/{rank}.json", lines.encode())
        return records

    def _commit(self, save: Save, save_id: str, files: tuple[FileRecord, ...]) -> CheckpointReport:
        """Make the files a checkpoint. Raises StoreError where that cannot be vouched for."""
        manifest = self._manifest(save, save_id, files)
        missing = manifest.missing(self._store.list(manifest.folder))
        if missing is not None:
            raise StoreError(f"{missing} in {self._store.uri}/{manifest.folder} right after its upload")
        self._refuse_when_old()
        data = manifest.encode()
        if not self._store.put_bytes(manifest.name.key, data, if_absent=True):
            raise StoreError(
                f"another writer has committed {manifest.name.key} in {self._store.uri}; this one gives way"
            )
        # A newer attempt's collector may have run between the two: only what it has seen, or will see, is vouched for.
        self._refuse_when_old()
        return CheckpointReport(
            step=save.step,
            manifest=manifest.name.key,
            size_bytes=manifest.size_bytes,
            manifest_sha256=sha256_of(data),
            time=manifest.time,
        )

    def _refuse_when_old(self) -> None:
        if not is_newest(self._store, self._settings.attempt):
            raise StoreError(f"a newer attempt writes to {self._store.uri}; attempt {self._settings.attempt} gives way")

    def _manifest(self, save: Save, save_id: str, files: tuple[FileRecord, ...]) -> Manifest:
        settings, run_file = self._settings, self._settings.run_file
        assert self._base is not None
        return Manifest(
            run=run_file.identity,
            attempt=settings.attempt,
            save_id=save_id,
            step=save.step,
            previous_step=self._previous_step(save.step),
            time=self._store.now().isoformat().replace("+00:00", "Z"),
            world_size=settings.world_size,
            strategy=run_file.plan.strategy,
            versions=_versions(),
            base=self._base,
            files=files,
            data=DataFacts(seed=run_file.spec.hyperparameters.seed, dataset_hash=settings.dataset_hash),
            store=settings.capabilities,
        )

    def _previous_step(self, step: int) -> int | None:
        names = (ManifestName.parse(info.key) for info in self._store.list(MANIFESTS) if QUARANTINE not in info.key)
        return max((name.step for name in names if name is not None and name.step < step), default=None)

    def _clean_up(self, folder: Path) -> None:
        """Remove this save's staging folder, after all ranks of the node have done with it."""
        self._group.gather(None)
        shutil.rmtree(folder, ignore_errors=True)


def check_space(staging: Path, size: int) -> None:
    """Raise StagingDiskFull where the staging disk has no room for `size` bytes and some to spare.

    Asked beforehand because torch hides the reason when a write fails for want of room.
    """
    staging.mkdir(parents=True, exist_ok=True)
    facts = os.statvfs(staging)
    free, needed = facts.f_bavail * facts.f_frsize, int(size * _SPARE)
    if free < needed:
        raise StagingDiskFull(f"the disk of {staging} has {free} bytes free, a checkpoint needs {needed}")
    if facts.f_files > 0 and facts.f_favail < _SPARE_FILES:
        raise StagingDiskFull(f"the disk of {staging} has room for {facts.f_favail} more files, not for {_SPARE_FILES}")


def _explain(error: CheckpointException, staging: Path) -> NoReturn:
    """Raise what the failure of a write means: torch tells of a full disk only in riddles."""
    causes = [failure[0] for failure in error.failures.values()]
    text = f"cannot write to the disk of {staging}: {'; '.join(f'{type(cause).__name__}: {cause}' for cause in causes)}"
    full = any(isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) for cause in causes)
    if full or "inline_container" in text or "PytorchStreamWriter" in text:
        raise StagingDiskFull(text) from error
    raise RuntimeError(text) from error


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in _PACKAGES}
