"""The training set of a run, in the order things happen: look at the files, choose samples, encode what the cache lacks, open it."""

import hashlib
import logging
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from atelier_api.errors import ConfigError, StoreError
from atelier_api.run_file import RunFile
from atelier_runtime import components
from atelier_runtime.data.buckets import alignment
from atelier_runtime.data.cache import Cache, remove_leftovers
from atelier_runtime.data.captions import EMPTY
from atelier_runtime.data.collective import Announcer, Ranks, Report, Share, folder_share, on_rank_zero
from atelier_runtime.data.dataset import CaptionDraws, Columns, Dataset
from atelier_runtime.data.encode import Builder, Encoders, LatentJob, Limits, TextJob
from atelier_runtime.data.funnel import Fate, Funnel, refuse_empty
from atelier_runtime.data.keys import Encoding, FolderHashes, pipeline_flags, text_components
from atelier_runtime.data.order import SampleOrder
from atelier_runtime.data.prepare import Sample, Scan, clip_rule, extensions, reading_threads, select
from atelier_runtime.family import Family

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_VISIBLE_SECONDS = 60.0
"""How long a shared file system may take until it shows one node what another has written."""


def build_dataset(run_file: RunFile, family: Family, dist: Ranks, report: Report) -> Dataset:
    """The encoded training set. Collective; `report` is called on every rank.

    Encoders are loaded only where entries are missing, and freed before this returns. Raises DataError when no sample is left,
    ConfigError for settings that the family cannot take, StoreError when the cache cannot be written.
    """
    rule = clip_rule(run_file.spec.data, family.facts)
    alignment(run_file.spec.data, family.facts)  # a wrong one is refused before any file is read
    folder = _cache_folder(run_file)
    team = _Team(dist, folder_share(dist, folder), Announcer(dist, report))
    scanned = Scan(run_file, rule, ranks=dist, share=team.share, announcer=team.announcer).all_sources()
    funnel = Funnel(len(scanned))
    chosen = select(scanned, run_file, family.facts, funnel)
    kinds = ", ".join(extensions(rule))
    if not chosen:
        refuse_empty(funnel.report(), kinds)
    encoding = on_rank_zero(dist, partial(_encoding, run_file, family))
    cache = Cache(folder)
    keyed = [(sample, encoding.latent_key(sample.content, sample.placement)) for sample in chosen]
    rejected = _fill(run_file, family, team, _Work(keyed, encoding, cache))
    for sample, key in keyed:
        if key in rejected:
            funnel.reject(sample.name, Fate.UNREADABLE, rejected[key])
    kept = [(sample, key) for sample, key in keyed if key not in rejected]
    outcome = funnel.report()
    if not kept:
        refuse_empty(outcome, kinds)
    if dist.rank == 0:
        log.info("samples chosen", extra=outcome.model_dump(exclude={"rejected"}))
    columns, fingerprint = _columns(kept, encoding, cache)
    cache.forget_keys()
    return Dataset(
        columns,
        cache,
        _order([sample for sample, _ in kept], run_file, family),
        CaptionDraws(run_file.spec.data.captions.dropout, run_file.spec.hyperparameters.seed),
        funnel=outcome,
        fingerprint=fingerprint,
        frame_rate=rule.fps if rule else None,
        device=dist.device,
    )


@dataclass(frozen=True)
class _Team:
    """This rank among the others."""

    ranks: Ranks
    share: Share
    announcer: Announcer


@dataclass(frozen=True)
class _Work:
    """What is to be in the cache: samples with the keys of their latents."""

    keyed: Sequence[tuple[Sample, bytes]]
    encoding: Encoding
    cache: Cache


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
    others = text_components(config, family.denoisers)
    given = components.given_frames(family, root)
    # Frames that the network is shown lie beside the latents, and may have gone through an image encoder as well.
    autoencoder = hashes.of(root, ["vae", *others], given) if given else hashes.of(root, ["vae"])
    rule = clip_rule(run_file.spec.data, family.facts)
    encoding = Encoding(
        family=family.name,
        autoencoder=autoencoder,
        text_encoders=hashes.of(root, others, pipeline_flags(config)),
        precision=run_file.spec.hyperparameters.precision,
        fps=rule.fps if rule else None,
    )
    hashes.save()
    return encoding


def _fill(run_file: RunFile, family: Family, team: _Team, work: _Work) -> dict[bytes, str]:
    """Builds what is missing. Gives the latent keys that turned out unusable, with the reason."""
    dtype = DTYPES[run_file.spec.hyperparameters.precision]
    encoders = Encoders(partial(components.load_encoders, family, run_file.model_folder, dtype, team.ranks.device))
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
        given=components.given_frames(family, run_file.model_folder),
    )
    encoding = work.encoding
    captions = sorted({EMPTY, *(caption for sample, _ in work.keyed for caption in sample.captions)})
    texts = [TextJob(encoding.text_key(caption), caption) for caption in captions]
    files = {key: LatentJob(key, sample.path, sample.content, sample.placement) for sample, key in work.keyed}
    if team.share.index == 0:
        remove_leftovers(work.cache.folder)
    try:
        builder.captions(texts)
        rejected = builder.latents(list(files.values()), clip_rule(run_file.spec.data, family.facts))
    finally:
        encoders.free()
    _wait_for(work.cache, {job.key for job in texts} | (files.keys() - rejected.keys()))
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


def _columns(keyed: Sequence[tuple[Sample, bytes]], encoding: Encoding, cache: Cache) -> tuple[Columns, str]:
    """The samples as rows of the cache, and a digest over all of them."""
    digest = hashlib.sha256()
    text_keys = {caption: encoding.text_key(caption) for sample, _ in keyed for caption in sample.captions}
    latents, captions, first = [], [], [0]
    for sample, key in keyed:
        keys = [key, *(text_keys[caption] for caption in sample.captions)]
        digest.update(repr((keys, sample.repeats)).encode())
        latents.append(_row(cache, keys[0]))
        captions += [_row(cache, key) for key in keys[1:]]
        first.append(len(captions))
    columns = Columns(
        names=[sample.name for sample, _ in keyed],
        latents=np.array(latents, np.int64),
        sizes=np.array([sample.placement.sizes for sample, _ in keyed], np.int32),
        captions=np.array(captions, np.int64),
        first=np.array(first, np.int64),
        empty_caption=_row(cache, encoding.text_key(EMPTY)),
    )
    return columns, digest.hexdigest()


def _row(cache: Cache, key: bytes) -> int:
    row = cache.row(key)
    assert row is not None  # `_wait_for` has seen every key
    return row


def _order(samples: Sequence[Sample], run_file: RunFile, family: Family) -> SampleOrder:
    hyperparameters = run_file.spec.hyperparameters
    buckets = sorted({sample.placement.bucket for sample in samples})
    number = {bucket: i for i, bucket in enumerate(buckets)}
    order = SampleOrder(
        np.array([number[sample.placement.bucket] for sample in samples], np.int32),
        np.array([sample.repeats for sample in samples], np.int32),
        tokens=tuple(family.facts.latent_tokens(bucket.width, bucket.height, bucket.frames) for bucket in buckets),
        global_batch_size=hyperparameters.global_batch_size,
        seed=hyperparameters.seed,
    )
    places = order.steps_per_epoch * hyperparameters.global_batch_size
    log.info(
        "order of samples",
        extra={
            "buckets": len(buckets),
            "steps_per_epoch": order.steps_per_epoch,
            "samples": order.samples_per_epoch,
            "filled_up": places - order.samples_per_epoch,
        },
    )
    return order
