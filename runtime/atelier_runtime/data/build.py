"""The training set of a run, in the order things happen: look at the files, choose samples, encode what the cache lacks, open it."""

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
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
from atelier_runtime.data.collective import Ranks, Share, folder_share, on_rank_zero
from atelier_runtime.data.dataset import CaptionDraws, Columns, Dataset
from atelier_runtime.data.encode import Builder, Encoders, LatentJob, Limits, Report, TextJob
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
    """The encoded training set. Collective; `report` takes fields of `Progress` by name and is called on rank 0 only.

    Encoders are loaded only where entries are missing, and freed before this returns. Raises DataError when no sample is left,
    ConfigError for settings that the family cannot take, StoreError when the cache cannot be written.
    """
    data = run_file.spec.data
    rule = clip_rule(data, family.facts)
    alignment(data, family.facts)  # a wrong one is refused before any file is read
    share = folder_share(dist, _cache_folder(run_file))
    scanned = Scan(run_file, rule, dist, share, report).all_sources()
    funnel = Funnel(len(scanned))
    samples = select(scanned, run_file, family.facts, funnel)
    if not samples:
        refuse_empty(funnel.report(), ", ".join(extensions(rule)))
    encoding = on_rank_zero(dist, partial(_encoding, run_file, family))
    cache = Cache(Path(run_file.cache_uri))
    rejected = _fill(run_file, family, (dist, share, report), cache, (samples, encoding))
    samples = _without(samples, rejected, encoding, funnel)
    outcome = funnel.report()
    if dist.rank == 0:
        report(funnel=outcome)
        log.info("samples chosen", extra=outcome.model_dump(exclude={"rejected"}))
    if not samples:
        refuse_empty(outcome, ", ".join(extensions(rule)))
    columns, fingerprint = _columns(samples, encoding, cache)
    cache.forget_keys()
    return Dataset(
        columns,
        cache,
        _order(samples, run_file, family),
        CaptionDraws(data.captions.dropout, run_file.spec.hyperparameters.seed),
        funnel=outcome,
        fingerprint=fingerprint,
        frame_rate=rule.fps if rule else None,
        device=dist.device,
    )
