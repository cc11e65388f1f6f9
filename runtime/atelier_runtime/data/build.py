"""The training set of a run, in the order things happen: look at the files, choose samples, encode what the cache lacks, open it."""

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atelier_api.errors import ConfigError, StoreError
from atelier_api.run_file import RunFile
from atelier_api.sliders import strength_of
from atelier_api.v1alpha1.adapter import Adapter, TextualInversionAdapter, is_slider
from atelier_runtime import components
from atelier_runtime.data.buckets import alignment
from atelier_runtime.data.cache import Cache, remove_leftovers
from atelier_runtime.data.captions import EMPTY
from atelier_runtime.data.collective import Announcer, Ranks, Report, Share, folder_share, on_rank_zero
from atelier_runtime.data.dataset import CaptionDraws, Columns, Dataset
from atelier_runtime.data.encode import Builder, Encoders, LatentJob, Limits, TextJob
from atelier_runtime.data.funnel import Fate, Funnel, refuse_empty
from atelier_runtime.data.keys import Encoding, FolderHashes, pipeline_flags, text_components
from atelier_runtime.data.prepare import (
    Companion,
    Sample,
    Scan,
    cutting_rule,
    extensions,
    reading_threads,
    require_words,
    select,
)
from atelier_runtime.data.run_order import order_of
from atelier_runtime.data.scan import ClipRule, SoundRule
from atelier_runtime.family import Family, Song
from atelier_runtime.tiles import work_on_tiles

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_VISIBLE_SECONDS = 60.0
"""How long a shared file system may take until it shows one node what another has written."""


def build_dataset(run_file: RunFile, family: Family, dist: Ranks, report: Report) -> Dataset:
    """The encoded training set. Collective; `report` is called on every rank.

    Encoders are loaded only where entries are missing, and freed before this returns. Raises DataError when no sample is left,
    ConfigError for settings that the family cannot take, StoreError when the cache cannot be written.
    """
    rule = cutting_rule(run_file, family)
    alignment(run_file.spec.data, family.facts)  # a wrong one is refused before any file is read
    folder = _cache_folder(run_file)
    team = _Team(dist, folder_share(dist, folder), Announcer(dist, report))
    scanned = Scan(run_file, rule, ranks=dist, share=team.share, announcer=team.announcer).all_sources()
    funnel = Funnel(len(scanned))
    chosen = select(scanned, run_file, family, funnel)
    kinds = ", ".join(extensions(rule))
    if not chosen:
        refuse_empty(funnel.report(), kinds)
    words = _learnt_words(run_file)
    in_step = bool(words)  # it trains what reads captions: their features change with each step
    if in_step:
        require_words(chosen, words)
    encoding = on_rank_zero(dist, partial(_encoding, run_file, family))
    cache = Cache(folder)
    keyed = _keyed(chosen, encoding, family, in_step=in_step)
    shared = encoding.shared_key() if family.shares else None
    rejected = _fill(run_file, family, team, _Work(keyed, cache, shared))
    kept = _kept(keyed, rejected, funnel)
    outcome = funnel.report()
    if not kept:
        refuse_empty(outcome, kinds)
    if dist.rank == 0:
        log.info("samples chosen", extra=outcome.model_dump(exclude={"rejected"}))
    columns, fingerprint = _columns(kept, cache, rule.unit if isinstance(rule, SoundRule) else 0, run_file.spec.adapter)
    if in_step:
        columns = _with_texts(columns, kept)
    told = cache.read(_row(cache, shared)) if shared else {}
    cache.forget_keys()
    twin = run_file.spec.objective.twin_flow
    return Dataset(
        columns,
        cache,
        order_of([item.sample for item in kept], run_file, family),
        CaptionDraws(
            0.0 if in_step else run_file.spec.data.captions.dropout,
            run_file.spec.hyperparameters.seed,
            contrast=twin is not None and twin.enhanced_ratio > 0,
        ),
        funnel=outcome,
        fingerprint=fingerprint,
        frame_rate=rule.fps if isinstance(rule, ClipRule) else None,
        shared={name: tensor.clone() for name, tensor in told.items()},
        device=dist.device,
    )


@dataclass(frozen=True)
class _Team:
    """This rank among the others."""

    ranks: Ranks
    share: Share
    announcer: Announcer


@dataclass(frozen=True, slots=True)
class _Keyed:
    """A sample with the keys of what it needs in the cache, its text among it unless that is encoded `in_step`."""

    sample: Sample
    latents: bytes
    references: tuple[bytes, ...]
    captions: tuple[bytes, ...]
    empty: bytes
    in_step: bool
    condition: bytes | None = None

    @property
    def needed(self) -> tuple[bytes, ...]:
        text = () if self.in_step else (*self.captions, self.empty)
        condition = () if self.condition is None else (self.condition,)
        return (self.latents, *self.references, *text, *condition)


@dataclass(frozen=True)
class _Work:
    """What is to be in the cache, and where that is. `shared` is the key of what all samples are told."""

    keyed: Sequence[_Keyed]
    cache: Cache
    shared: bytes | None


def _cache_folder(run_file: RunFile) -> Path:
    folder = Path(run_file.cache_uri)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the cache folder {folder} cannot be made ({error.strerror}); it must be writable; choose another folder for the cache"
        ) from error
    return folder


def _encoding(run_file: RunFile, family: Family) -> Encoding:
    """Identities of the checkpoint's encoders."""
    root = Path(run_file.model_folder)
    config = components.read_pipeline_config(root)
    hashes = FolderHashes(Path(run_file.cache_uri) / "hashes.json")
    others = text_components(config, (*family.denoisers, *family.facts.autoencoder))
    given = components.given_frames(family, root, run_file.spec.data.clip.shown_frames)
    encoder = family.facts.autoencoder[0]
    # Frames that the network is shown lie beside the latents, and may have gone through an image encoder as well.
    autoencoder = hashes.of(root, [encoder, *others], given) if given else hashes.of(root, [encoder])
    rule = cutting_rule(run_file, family)
    # Two pipelines of a family may put a caption into different templates, and read it with the same encoder.
    text = pipeline_flags(config) | {"pipeline": family.pipeline_of(config)}
    encoding = Encoding(
        family=family.name,
        autoencoder=autoencoder,
        text_encoders=hashes.of(root, others, text),
        precision=run_file.spec.hyperparameters.precision,
        rate=rule.rate if isinstance(rule, SoundRule) else rule.fps if rule else None,
        largest_whole=family.facts.passages.largest_whole if run_file.plan.tiled_encoding else None,
    )
    hashes.save()
    return encoding


def _keyed(samples: Sequence[Sample], encoding: Encoding, family: Family, *, in_step: bool) -> list[_Keyed]:
    """The samples with their keys."""
    known: dict[tuple[str, ...], bytes] = {}

    def text_key(caption: str, sample: Sample) -> bytes:
        seen = tuple(reference.content for reference in sample.references) if family.text_sees_references else ()
        if (caption, *seen) not in known:
            known[caption, *seen] = encoding.text_key(caption, seen)
        return known[caption, *seen]

    def condition_key(condition: Companion | None) -> bytes | None:
        if condition is None or family.control is None:
            return None
        latents = family.control.takes == "latents"
        return encoding.condition_key(condition.content, condition.placement, latents=latents)

    return [
        _Keyed(
            sample,
            encoding.latent_key(sample.content, sample.placement),
            tuple(encoding.reference_key(each.content, each.placement) for each in sample.references),
            tuple(encoding.song_key(song) for song in sample.songs)
            or tuple(text_key(caption, sample) for caption in sample.captions),
            text_key(EMPTY, sample),
            in_step,
            condition_key(sample.condition),
        )
        for sample in samples
    ]


@dataclass(frozen=True)
class _Jobs:
    """What there is to encode, each thing once, by its key."""

    texts: dict[bytes, TextJob] = field(default_factory=dict)
    files: dict[bytes, LatentJob] = field(default_factory=dict)
    references: dict[bytes, LatentJob] = field(default_factory=dict)
    conditions: dict[bytes, LatentJob] = field(default_factory=dict)

    @property
    def keys(self) -> set[bytes]:
        return {*self.texts, *self.files, *self.references, *self.conditions}


def _jobs(keyed: Sequence[_Keyed], family: Family) -> _Jobs:
    jobs = _Jobs()
    for item in keyed:
        sample, seen = item.sample, item.sample.references if family.text_sees_references else ()
        if not item.in_step:
            jobs.texts[item.empty] = TextJob(item.empty, EMPTY, seen)
            songs: Sequence[Song | None] = sample.songs or [None] * len(sample.captions)
            for key, caption, song in zip(item.captions, sample.captions, songs, strict=True):
                jobs.texts[key] = TextJob(key, caption, seen, song)
        jobs.files[item.latents] = LatentJob(item.latents, sample.path, sample.content, sample.placement)
        for key, each in zip(item.references, sample.references, strict=True):
            jobs.references[key] = LatentJob(key, each.path, each.content, each.placement)
        if item.condition is not None and sample.condition is not None:
            shown = sample.condition
            jobs.conditions[item.condition] = LatentJob(item.condition, shown.path, shown.content, shown.placement)
    return jobs


def _load_encoders(run_file: RunFile, family: Family, dtype: torch.dtype, device: torch.device) -> Any:
    """The stock pipeline without its denoisers, as the plan says on whole samples or on tiles."""
    pipe = components.load_encoders(family, run_file.model_folder, dtype, device)
    if run_file.plan.tiled_encoding:
        work_on_tiles(pipe, family)
    return pipe


def _fill(run_file: RunFile, family: Family, team: _Team, work: _Work) -> dict[bytes, str]:
    """Builds what is missing. Gives the keys that turned out unusable, with the reason."""
    dtype = DTYPES[run_file.spec.hyperparameters.precision]
    encoders = Encoders(partial(_load_encoders, run_file, family, dtype, team.ranks.device))
    builder = Builder(
        family,
        encoders,
        work.cache,
        ranks=team.ranks,
        share=team.share,
        announcer=team.announcer,
        dtype=dtype,
        threads=reading_threads(run_file),
        limits=Limits(),
        given=components.given_frames(family, run_file.model_folder, run_file.spec.data.clip.shown_frames),
    )
    jobs = _jobs(work.keyed, family)
    if team.share.index == 0:
        remove_leftovers(work.cache.folder)
    try:
        if work.shared:
            builder.shared(work.shared)
        rejected = builder.captions(sorted(jobs.texts.values(), key=lambda job: (job.caption, job.key)))
        rejected |= builder.latents(list(jobs.files.values()), cutting_rule(run_file, family))
        rejected |= builder.references(list(jobs.references.values()))
        rejected |= builder.conditions(list(jobs.conditions.values()))
    finally:
        encoders.free()
    _wait_for(work.cache, (jobs.keys | ({work.shared} if work.shared else set())) - rejected.keys())
    return rejected


def _wait_for(cache: Cache, keys: Set[bytes]) -> None:
    """Until the entries that other ranks wrote are visible here. Raises StoreError where they never are."""
    started = time.monotonic()
    while True:
        cache.refresh()
        missing = sum(cache.row(key) is None for key in keys)
        if missing == 0:
            return
        if time.monotonic() - started > _VISIBLE_SECONDS:
            raise StoreError(
                f"{missing} entries of the cache in {cache.folder} are missing right after they were built; "
                "the folder was changed by others, or its file system does not show what other nodes write"
            )
        time.sleep(1.0)


def _learnt_words(run_file: RunFile) -> list[str]:
    """The words that a run of textual inversion learns; none otherwise."""
    adapter = run_file.spec.adapter
    return [each.token for each in adapter.tokens] if isinstance(adapter, TextualInversionAdapter) else []


def _kept(keyed: Sequence[_Keyed], rejected: Mapping[bytes, str], funnel: Funnel) -> list[_Keyed]:
    """The samples that have all they need; the funnel learns of the others, `rejected` says by key why."""
    for item in keyed:
        if item.latents in rejected:
            funnel.reject(item.sample.name, Fate.UNREADABLE, rejected[item.latents])
        elif item.condition is not None and item.condition in rejected:
            reason = f"of its conditioning picture: {rejected[item.condition]}"
            funnel.reject(item.sample.name, Fate.NO_CONDITIONING, reason)
        elif reasons := [rejected[key] for key in item.needed if key in rejected]:
            funnel.reject(item.sample.name, Fate.NO_REFERENCE, f"of its reference: {reasons[0]}")
    return [item for item in keyed if rejected.keys().isdisjoint(item.needed)]


def _columns(keyed: Sequence[_Keyed], cache: Cache, unit: int, adapter: Adapter) -> tuple[Columns, str]:
    """The samples as rows of the cache, and a digest over all of them. `unit`: samples of a sound that make a latent; else 0."""
    digest = hashlib.sha256()
    captions, first = [], [0]
    references = np.full((len(keyed), max(len(item.references) for item in keyed)), -1, np.int64)
    for number, item in enumerate(keyed):
        pictures = [item.latents, *item.references, *([] if item.condition is None else [item.condition])]
        source = item.sample.source
        strength = [strength_of(source, adapter)] if is_slider(adapter) else []
        digest.update(repr(([*pictures, *item.captions], source.repeats, *strength)).encode())
        references[number, : len(item.references)] = [_row(cache, key) for key in item.references]
        captions += [-1 if item.in_step else _row(cache, key) for key in item.captions]
        first.append(len(captions))
    columns = Columns(
        names=[item.sample.name for item in keyed],
        latents=np.array([_row(cache, item.latents) for item in keyed], np.int64),
        sizes=np.array([item.sample.placement.sizes for item in keyed], np.int32),
        captions=np.array(captions, np.int64),
        first=np.array(first, np.int64),
        empty=np.array([-1 if item.in_step else _row(cache, item.empty) for item in keyed], np.int64),
        references=references,
        conditions=np.array(
            [-1 if item.condition is None else _row(cache, item.condition) for item in keyed], np.int64
        ),
        padded=np.array([item.sample.placement.bucket.frames // unit if unit else 0 for item in keyed], np.int32),
    )
    return columns, digest.hexdigest()


def _with_texts(columns: Columns, keyed: Sequence[_Keyed]) -> Columns:
    """The columns of captions that are encoded in the step: the texts themselves, and their places."""
    texts = [caption for item in keyed for caption in item.sample.captions]
    return replace(columns, texts=texts, captions=np.arange(len(texts), dtype=np.int64))


def _row(cache: Cache, key: bytes) -> int:
    row = cache.row(key)
    assert row is not None  # `_wait_for` has seen every key
    return row
