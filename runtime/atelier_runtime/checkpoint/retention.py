"""Which checkpoints stay, and the removal of everything else that no manifest speaks for.

A manifest is deleted before its files, so that a kill between the two leaves files without a manifest, never the reverse. Ages are
by the store's clock. Only the writer of the newest attempt collects, after a commit of its own: never during a resume.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta

from atelier_runtime.checkpoint.attempts import is_newest, parse_attempt
from atelier_runtime.checkpoint.manifest import (
    CHECKPOINTS,
    MANIFESTS,
    QUARANTINE,
    Manifest,
    ManifestError,
    ManifestName,
)
from atelier_runtime.store import ObjectInfo, Store

log = logging.getLogger(__name__)

ORPHAN_AGE = timedelta(hours=24)


def superfluous(names: Iterable[ManifestName], *, keep_last: int, keep_every: int) -> list[ManifestName]:
    """Those of `names` that go: all but the newest `keep_last` and the multiples of `keep_every` (0: none), oldest first."""
    ordered = sorted(names)
    older = ordered[:-keep_last] if keep_last else ordered
    return [name for name in older if not (keep_every and name.step and name.step % keep_every == 0)]


class Collector:
    """Garbage collection of one run by one attempt. `own_only`: other attempts' checkpoints are left alone."""

    def __init__(self, store: Store, attempt: str, *, keep_last: int, keep_every: int, own_only: bool) -> None:
        self._store = store
        self._attempt = attempt
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._own_only = own_only

    def collect(self) -> int:
        """Delete what is superfluous, what killed writers left, and open uploads. Gives the number of objects deleted."""
        if not is_newest(self._store, self._attempt):
            log.warning("no collection: a newer attempt writes to this run", extra={"attempt": self._attempt})
            return 0
        listing = self._store.list(MANIFESTS)
        committed = {name for info in listing if (name := _committed(info.key)) and self._is_ours(name)}
        bad = {name for info in listing if info.key.startswith(QUARANTINE) and (name := ManifestName.parse(info.key))}
        doomed = superfluous(committed, keep_last=self._keep_last, keep_every=self._keep_every)
        self._store.delete([name.key for name in doomed])
        files = self._orphans(committed - set(doomed), bad)
        self._store.delete(files)
        self._store.remove_unfinished(ORPHAN_AGE.total_seconds())
        return len(doomed) + len(files)

    def _orphans(self, committed: set[ManifestName], bad: set[ManifestName]) -> Sequence[str]:
        """Keys of the files that no manifest speaks for and that nobody writes any more.

        All attempts but this one are dead, and this one writes nothing while it collects: their files go at once. Those of a
        quarantined manifest, and what we do not know, get a day.
        """
        folders = _by_folder(self._store.list(CHECKPOINTS))
        limit = self._store.now() - ORPHAN_AGE
        tries = Counter(ManifestName.of_folder(folder) for folder in folders)
        keys: list[str] = []
        for folder, infos in folders.items():
            name = ManifestName.of_folder(folder)
            if name is not None and not self._is_ours(name):
                continue
            if name in committed and (tries[name] == 1 or self._is_meant(name, folder)):
                continue
            if (name is not None and name not in bad) or all(info.modified < limit for info in infos):
                keys += [info.key for info in infos]
        return keys

    def _is_meant(self, name: ManifestName, folder: str) -> bool:
        """Whether the manifest means this folder, and not another try at the same save."""
        try:
            return Manifest.decode(self._store.get_bytes(name.key)).folder == f"{CHECKPOINTS}{folder}/"
        except ManifestError:
            return True  # the next resume judges it

    def _is_ours(self, name: ManifestName) -> bool:
        return not self._own_only or (name.attempt, name.restart) == parse_attempt(self._attempt)


def _committed(key: str) -> ManifestName | None:
    return None if key.startswith(QUARANTINE) else ManifestName.parse(key)


def _by_folder(infos: Iterable[ObjectInfo]) -> Mapping[str, list[ObjectInfo]]:
    folders: dict[str, list[ObjectInfo]] = defaultdict(list)
    for info in infos:
        folders[info.key.removeprefix(CHECKPOINTS).partition("/")[0]].append(info)
    return folders
