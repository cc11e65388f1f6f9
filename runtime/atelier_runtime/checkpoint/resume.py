"""Finding the newest checkpoint that verifies, and loading it. Nothing is unpickled before its hash has been checked.

    1. list the manifests, newest first by (step, attempt)
    2. check the manifest: its own hash, its schema, whose it is; and that all its files are there with their sizes
    3. fetch `.metadata` and verify it: it says which files a rank needs
    4. fetch the files that the ranks of a node need, shared out among them, and verify each
    5. load; with another number of ranks torch.distributed.checkpoint cuts the tensors anew

Damage found in 2 to 4, by any rank, moves the manifest to `manifests/bad/`, and all ranks go on to the next older one. An
unreachable store or a full disk is no damage: it is raised.
"""

import logging
import pickle
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as read_state

from atelier_api.errors import ConfigError, StoreError
from atelier_api.run_file import RunFile
from atelier_runtime.checkpoint.manifest import (
    MANIFESTS,
    QUARANTINE,
    Manifest,
    ManifestError,
    ManifestName,
    NewerManifest,
)
from atelier_runtime.checkpoint.ranks import Group, Ranks
from atelier_runtime.store import CorruptObject, ObjectMissing, Store
from atelier_runtime.store.protocol import sha256_of

log = logging.getLogger(__name__)

_METADATA = ".metadata"
_NAMED_KEYS = 5


@dataclass(frozen=True)
class Refusal:
    """A checkpoint that did not verify."""

    manifest: str
    reason: str


@dataclass(frozen=True)
class ResumePoint:
    """Where training goes on. `manifest` is its key; `refused` are newer ones that did not verify."""

    step: int
    manifest: str
    manifest_sha256: str
    world_size: int
    refused: tuple[Refusal, ...]


class _Damaged(Exception):
    """The checkpoint cannot be used. The text names the file and the reason."""


def resume(run_file: RunFile, ranks: Ranks, store: Store, state: dict[str, Any], staging: Path) -> ResumePoint | None:
    """Load the newest checkpoint that verifies into `state`, in place; None where the run starts from step 0. Collective.

    `state` is shaped like the one that was saved: its tensors are filled, its plain values replaced. Raises ConfigError when
    there are checkpoints but none verifies, or when the newest good one does not fit `state`; StoreError when the store does
    not answer. With `spec.storage.resume.mode: Never` nothing is looked at.
    """
    if run_file.spec.storage.resume.mode == "Never":
        return None
    group = Group.open(ranks)
    try:
        return _Resume(run_file, ranks, store, staging / "resume", group).run(state)
    finally:
        group.close()


class _Resume:
    """One resume, on all ranks together."""

    def __init__(self, run_file: RunFile, ranks: Ranks, store: Store, staging: Path, group: Group) -> None:
        self._run_file = run_file
        self._ranks = ranks
        self._store = store
        self._staging = staging
        self._group = group

    def run(self, state: dict[str, Any]) -> ResumePoint | None:
        refused: list[Refusal] = []
        for name in self._group.on_rank_zero(self._candidates):
            try:
                manifest, digest = self._group.on_rank_zero(partial(self._check, name))
                folder = self._fetch(manifest, state)
            except _Damaged as damage:
                refused.append(self._refuse(name, damage))
                continue
            self._load(state, folder)
            self._group.gather(None)  # all ranks of the node have read
            shutil.rmtree(self._staging, ignore_errors=True)
            log.info("checkpoint verified and loaded", extra={"step": manifest.step, "manifest": name.key})
            return ResumePoint(manifest.step, name.key, digest, manifest.world_size, tuple(refused))
        self._group.on_rank_zero(partial(self._require_first_start, refused))
        return None

    def _candidates(self) -> list[ManifestName]:
        keys = [info.key for info in self._store.list(MANIFESTS)]
        names = {ManifestName.parse(key) for key in keys if not key.startswith(QUARANTINE)}
        return sorted((name for name in names if name is not None), reverse=True)

    def _check(self, name: ManifestName) -> tuple[Manifest, str]:
        """The manifest and its hash, if it can be believed and its files seem to be there."""
        try:
            data = self._store.get_bytes(name.key)
            manifest = Manifest.decode(data)
        except NewerManifest as error:
            raise ConfigError(
                f"{name.key} in {self._store.uri} cannot be read: {error}; use a newer version"
            ) from error
        except (ManifestError, CorruptObject, ObjectMissing) as error:
            raise _Damaged(f"the manifest cannot be used: {error}") from error
        identity = self._run_file.identity
        if manifest.run != identity:
            raise _Damaged(f"the manifest is of another run, {manifest.run.prefix}; this one is {identity.prefix}")
        if manifest.name != name:
            raise _Damaged(f"the manifest is of {manifest.name.file}")
        missing = manifest.missing(self._store.list(manifest.folder))
        if missing is not None:
            raise _Damaged(missing)
        if not any(file.path == _METADATA for file in manifest.files):
            raise _Damaged(f"{_METADATA} is not in the manifest")
        return manifest, sha256_of(data)

    def _fetch(self, manifest: Manifest, state: dict[str, Any]) -> Path:
        """A local folder with the verified files that the ranks of this node need."""
        folder = self._staging / manifest.folder.strip("/").rpartition("/")[2]
        leader = self._ranks.local_rank == 0
        self._group.together(lambda: self._fetch_files(manifest, folder, [_METADATA] if leader else []))
        needed = self._group.together(lambda: self._needed(folder, state))
        node = self._ranks.rank - self._ranks.local_rank
        nodes = self._group.gather(node)
        mine = [index for index, other in enumerate(nodes) if other == node]
        files = sorted(set().union(*(needed[index] for index in mine)))
        share = files[mine.index(self._ranks.rank) :: len(mine)]
        self._group.together(lambda: self._fetch_files(manifest, folder, share))
        return folder

    def _fetch_files(self, manifest: Manifest, folder: Path, paths: Sequence[str]) -> None:
        records = {file.path: file for file in manifest.files}
        for path in paths:
            if path not in records:
                raise _Damaged(f"{path} is not in the manifest")
            try:
                # `.metadata` is a pickle: it is copied, so that what was verified is what is read.
                self._store.get_file(
                    manifest.folder + path, folder / path, sha256=records[path].sha256, link=path != _METADATA
                )
            except (CorruptObject, ObjectMissing) as error:
                raise _Damaged(f"{path}: {error}") from error
            except OSError as error:
                if isinstance(error, StoreError):
                    raise
                raise StoreError(f"cannot write to the disk of {folder}: {error}") from error

    def _needed(self, folder: Path, state: dict[str, Any]) -> set[str]:
        """The files that hold what this rank's `state` asks for. Raises ConfigError where the checkpoint does not fit it."""
        with (folder / _METADATA).open("rb") as file:
            metadata: Metadata = pickle.load(file)  # its hash has been checked
        planner = DefaultLoadPlanner()
        planner.set_up_planner(state, metadata)
        _compare(metadata, planner.state_dict)
        try:
            plan = planner.create_local_plan()
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"the newest checkpoint does not fit the run: {error}; {_REMEDY}") from error
        return {metadata.storage_data[item.storage_index].relative_path for item in plan.items}

    def _load(self, state: dict[str, Any], folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            read_state(
                state,
                storage_reader=FileSystemReader(folder),
                process_group=self._group.process_group,
                no_dist=self._group.world_size == 1,
            )

    def _refuse(self, name: ManifestName, damage: _Damaged) -> Refusal:
        log.warning("checkpoint refused", extra={"step": name.step, "manifest": name.key, "reason": str(damage)})
        self._group.on_rank_zero(partial(self._quarantine, name))
        return Refusal(name.key, str(damage))

    def _quarantine(self, name: ManifestName) -> None:
        """Move the manifest away, so that nobody picks it again; its bytes stay for whoever wants to know."""
        try:
            data = self._store.get_bytes(name.key)
        except ObjectMissing:
            return
        except CorruptObject:
            data = b""
        self._store.put_bytes(name.quarantine_key, data)
        self._store.delete([name.key])

    def _require_first_start(self, refused: Sequence[Refusal]) -> None:
        """Start from step 0 only where the run never had a checkpoint."""
        if not self._store.list(QUARANTINE):
            return
        reasons = "; ".join(f"{refusal.manifest}: {refusal.reason}" for refusal in refused) or "see there"
        raise ConfigError(
            f"no checkpoint of the run in {self._store.uri} verifies, and {QUARANTINE} holds those that were refused ({reasons}); "
            f"to start from step 0, delete {QUARANTINE} or set spec.storage.resume.mode to Never"
        )


_REMEDY = (
    "train with the settings it was made with, give the run another name, or set spec.storage.resume.mode to Never"
)


def _compare(metadata: Metadata, state: dict[str, Any]) -> None:
    """Refuse a checkpoint with other entries than the run: what it lacks cannot be loaded, what it has more would be lost."""
    saved = metadata.state_dict_metadata
    for keys, what in ((state.keys() - saved.keys(), "has no"), (saved.keys() - state.keys(), "has also")):
        if keys:
            named = ", ".join(sorted(keys)[:_NAMED_KEYS])
            raise ConfigError(f"the newest checkpoint {what} {named} ({len(keys)} entries); {_REMEDY}")
    for key, facts in saved.items():
        wanted = state[key].dtype if isinstance(state[key], Tensor) else None
        kept = facts.properties.dtype if isinstance(facts, TensorStorageMetadata) else None
        if kept != wanted:
            raise ConfigError(f"the newest checkpoint holds {key} as {kept}, the run as {wanted}; {_REMEDY}")
