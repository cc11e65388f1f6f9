"""A snapshot of a hub repository, in the cache that huggingface_hub and diffusers share.

Only the files that a run reads are fetched (`atelier_api.model_files`). huggingface_hub asks the hub and lays the cache out. The bytes
of a file go through its `http_get` into a file of ours that outlives a kill: the library itself begins a file anew after one, and
a shard has up to 10 GB. Each file is compared with the hash that the hub lists before it gets its name in the cache.

`model_index.json` is linked last, so a snapshot that has it was fetched whole. Such a snapshot is used without asking the hub, and
a branch that moves on is not noticed: a run that is continued keeps its base.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, disable_progress_bars  # type: ignore[attr-defined]  # not said to be exported

from atelier_api.errors import ConfigError, StoreError
from atelier_api.families import FamilyFacts
from atelier_api.model_files import INDEX, hub_folder, hub_snapshot, lacking, needed
from atelier_runtime.fetching.hub_errors import Repository, hub_errors
from atelier_runtime.fetching.index import check_index, parse_index
from atelier_runtime.fetching.transfer import Meter, Transfer, Watch, alone, check_space, gigabytes, run
from atelier_runtime.store.retry import RetryPolicy

log = logging.getLogger(__name__)

ANSWER_SECONDS = 15.0
RETRY = RetryPolicy(attempts=5, base_seconds=1.0)
PART = ".atelier-part"
"""Ending of a file that is being fetched, beside the cache's own blobs."""

T = TypeVar("T")


@dataclass(frozen=True)
class Blob:
    """One file of a commit, and where the cache keeps its bytes: by SHA-256 for large files, by git's hash for small ones."""

    file: RepoFile
    path: Path

    @property
    def part(self) -> Path:
        return self.path.with_name(self.path.name + PART)

    @property
    def here(self) -> int:
        """Bytes on the disk."""
        for path in (self.path, self.part):
            if path.exists():
                return min(path.stat().st_size, self.file.size)
        return 0


def fetch_snapshot(what: Repository, family: FamilyFacts, cache: Path, watch: Watch) -> Path:
    """The folder of the whole snapshot, fetched where it is not there. Raises ConfigError, CredentialsError, StoreError."""
    found = hub_snapshot(cache, what.name, what.revision)
    if found is not None:
        return found
    lock = cache / ".locks" / hub_folder(cache, what.name).name / "atelier.lock"
    with hub_errors(what, cache), alone(lock, watch):
        found = hub_snapshot(cache, what.name, what.revision)  # by whoever was waited for
        return found or _fetch(what, family, cache, watch)


def _fetch(what: Repository, family: FamilyFacts, cache: Path, watch: Watch) -> Path:
    disable_progress_bars()
    commit, files = _retried(partial(_listing, what))
    index = _read_index(what, commit, files)
    check_index(what.source, index, family)
    chosen = needed([file.path for file in files], index)
    missing = lacking(chosen, index)
    if missing:
        raise ConfigError(
            f"{what} lacks {', '.join(missing[:5])}; spec.model.source must be a whole diffusers checkpoint"
        )
    folder = hub_folder(cache, what.name)
    # Files with the same content are one blob.
    blobs = list(
        {blob.path: blob for file in files if file.path in set(chosen) for blob in [_blob(file, folder)]}.values()
    )
    size, here = sum(blob.file.size for blob in blobs), sum(blob.here for blob in blobs)
    check_space(size - here, folder, remedy="set HF_HOME or HF_HUB_CACHE to a larger one")
    rest = f", {gigabytes(here)} of them are here" if here else ""
    watch.note(f"fetching {what.source} at {commit[:12]}: {len(chosen)} files, {gigabytes(size)}{rest}")
    run([Transfer(blob.file.size, blob.here, partial(_fetch_blob, what, commit, blob)) for blob in blobs], watch)
    link = partial(hf_hub_download, what.name, revision=commit, cache_dir=cache)
    for path in sorted(chosen, key=lambda path: path == INDEX):
        _retried(partial(link, path))
    _point(folder / "refs" / what.revision, commit)
    return folder / "snapshots" / commit


def _listing(what: Repository) -> tuple[str, list[RepoFile]]:
    """The commit of the revision, and its files."""
    api = HfApi()
    commit = api.model_info(what.name, revision=what.revision, timeout=ANSWER_SECONDS).sha
    if commit is None:
        raise StoreError(f"the hub at {constants.ENDPOINT} did not tell the commit of {what}")
    tree = api.list_repo_tree(what.name, recursive=True, revision=commit)
    return commit, [entry for entry in tree if isinstance(entry, RepoFile)]


def _read_index(what: Repository, commit: str, files: Sequence[RepoFile]) -> dict[str, Any]:
    if INDEX not in {file.path for file in files}:
        raise ConfigError(f"{what} has no {INDEX}; spec.model.source must be laid out as a diffusers pipeline")
    buffer = BytesIO()
    http_get(
        hf_hub_url(what.name, INDEX, revision=commit), buffer, headers=build_hf_headers(), tqdm_class=_counting(None)
    )
    return parse_index(what.source, buffer.getvalue())


def _blob(file: RepoFile, folder: Path) -> Blob:
    return Blob(file, folder / "blobs" / (file.lfs.sha256 if file.lfs else file.blob_id))


def _fetch_blob(what: Repository, commit: str, blob: Blob, meter: Meter) -> None:
    """Make the blob be there, from where an earlier try has left it."""
    if blob.path.exists():
        return
    blob.path.parent.mkdir(parents=True, exist_ok=True)
    if blob.file.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        # Files this large are served in another way, which only the library knows. Their bytes are counted at the end.
        hf_hub_download(what.name, blob.file.path, revision=commit, cache_dir=_cache_of(blob))
        meter.add(blob.file.size)
        return
    _retried(partial(_fetch_part, what, commit, blob, meter))
    if _digest(blob) != blob.path.name:
        blob.part.unlink()
        raise StoreError(f"{blob.file.path} of {what} arrived damaged: its hash is not {blob.path.name}; run again")
    blob.part.replace(blob.path)


def _fetch_part(what: Repository, commit: str, blob: Blob, meter: Meter) -> None:
    here = blob.part.stat().st_size if blob.part.exists() else 0
    if here > blob.file.size:
        blob.part.unlink()
        here = 0
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    with blob.part.open("ab") as file:
        http_get(
            hf_hub_url(what.name, blob.file.path, revision=commit),
            file,
            resume_size=here,
            headers=headers,
            expected_size=blob.file.size,
            tqdm_class=_counting(meter),
        )


def _digest(blob: Blob) -> str:
    """The hash by which the hub names the bytes of the part."""
    with blob.part.open("rb") as file:
        if blob.file.lfs:
            return hashlib.file_digest(file, "sha256").hexdigest()
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _cache_of(blob: Blob) -> Path:
    return blob.path.parents[2]


def _point(reference: Path, commit: str) -> None:
    """Let a branch or tag name the commit in the cache. A commit needs no reference."""
    if reference.name == commit:
        return
    reference.parent.mkdir(parents=True, exist_ok=True)
    temporary = reference.with_name(f".{reference.name}.atelier")
    temporary.write_text(commit)
    temporary.replace(reference)


def _retried(work: Callable[[], T]) -> T:
    """The result of `work`, done again while the network or the hub fails."""

    def again(error: Exception) -> bool:
        if isinstance(error, HfHubHTTPError):
            return error.response.status_code == 429 or error.response.status_code >= 500
        return isinstance(error, httpx2.TransportError) and not isinstance(error, httpx2.ConnectError)

    def on_retry(error: Exception) -> None:
        log.info("asking the hub again", extra={"cause": str(error)})

    return RETRY.run(work, again=again, on_retry=on_retry)


class _Bar:
    """As much of a tqdm bar as the library uses for the bytes of one file."""

    def __init__(self, meter: Meter | None) -> None:
        self._meter = meter

    def update(self, count: float | None = 1) -> None:
        if self._meter is not None:
            self._meter.add(int(count or 0))

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def close(self) -> None:
        """Nothing to take down."""

    def set_postfix_str(self, *_: object, **__: object) -> None:
        """The library's text about its rate is not shown."""


def _counting(meter: Meter | None) -> Any:
    """What the library calls to make a bar."""
    return lambda **_: _Bar(meter)
