"""Building what the cache lacks: latents and text features, by all ranks together.

The work is split by position over the ranks that share the cache folder; each writes its own shards. The encoders are loaded
by the first rank-round that needs them and freed at the end. Batches shrink when the device runs out of memory.
"""

import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from atelier_runtime.data.buckets import Bucket, Placement
from atelier_runtime.data.cache import FRAMES, Cache, ShardWriter
from atelier_runtime.data.captions import EMPTY
from atelier_runtime.data.collective import Announcer, Ranks, Share, gather, in_rounds
from atelier_runtime.data.image import fit, read_picture
from atelier_runtime.data.keys import content_sha256, file_sha256
from atelier_runtime.data.prepare import Companion
from atelier_runtime.data.scan import Rule, SoundRule
from atelier_runtime.data.sound import read_sound
from atelier_runtime.data.video import read_clip
from atelier_runtime.family import Family, Frame, Latents, Song

log = logging.getLogger(__name__)

CHANGED = "it changed while the cache was built"

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class LatentJob:
    """A file to encode: `content` is the SHA-256 that it had when it was looked at."""

    key: bytes
    path: str
    content: str
    placement: Placement


@dataclass(frozen=True, slots=True)
class TextJob:
    """A caption to encode, with the references that its encoder looks at.

    `song` is what a sound's encoder is told; None where its caption is dropped.
    """

    key: bytes
    caption: str
    references: tuple[Companion, ...] = ()
    song: Song | None = None


@dataclass(frozen=True)
class Limits:
    """Sizes of work. Pixels are counted over all frames of a batch; of sounds, samples."""

    batch_pixels: int = 4 * 1024 * 1024
    batch_samples: int = 32
    batch_captions: int = 16
    round_pixels: int = 32 * 1024 * 1024
    round_samples: int = 256
    shard_bytes: int = 256 * 1024 * 1024
    commit_seconds: float = 60.0
    """A killed build loses at most this much work of each rank."""


J = TypeVar("J", LatentJob, TextJob)


class Encoders:
    """The stock pipeline without its denoisers, loaded when it is first used."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load
        self._pipe: Any = None

    @property
    def pipe(self) -> Any:
        if self._pipe is None:
            log.info("loading encoders")
            self._pipe = self._load()
        return self._pipe

    def free(self) -> None:
        """Give their memory back before the denoiser comes."""
        if self._pipe is not None:
            self._pipe = None
            _release_memory()


class Builder:
    """Builds missing entries. All methods are collective."""

    def __init__(
        self,
        family: Family,
        encoders: Encoders,
        cache: Cache,
        *,
        ranks: Ranks,
        share: Share,
        announcer: Announcer,
        dtype: torch.dtype,
        threads: int,
        limits: Limits,
        given: tuple[Frame, ...] = (),
    ) -> None:
        """`given`: the frames of a clip that the checkpoint is shown."""
        self._family = family
        self._encoders = encoders
        self._cache = cache
        self._ranks = ranks
        self._share = share
        self._dtype = dtype
        self._announcer = announcer
        self._threads = threads
        self._limits = limits
        self._given = given
        self._writer = ShardWriter(cache.folder)
        self._committed_at = time.monotonic()

    def captions(self, jobs: Sequence[TextJob]) -> dict[bytes, str]:
        """Encode the captions that are not in the cache. Gives keys whose references turned out unusable, with the reason."""
        budget = Budget(self._limits.batch_captions, self._limits.batch_captions)

        def work(chunk: Sequence[TextJob]) -> tuple[int, list[tuple[bytes, str]]]:
            read = [(job, _read_references(job)) for job in chunk]
            usable = [(job, pictures) for job, pictures in read if not isinstance(pictures, str)]
            for (job, _), features in zip(usable, budget.run(usable, 1, self._encode_captions), strict=True):
                self._writer.add(job.key, {name: self._stored(tensor) for name, tensor in features.items()})
            return len(chunk), [(job.key, pictures) for job, pictures in read if isinstance(pictures, str)]

        return self._run("encoding captions", self._missing(jobs), self._limits.batch_captions, work)

    def shared(self, key: bytes) -> None:
        """Encode what all samples are told, where that is not in the cache."""

        def work(chunk: Sequence[TextJob]) -> tuple[int, list[tuple[bytes, str]]]:
            with torch.no_grad():
                features = self._family.encode_shared(self._encoders.pipe)
            self._writer.add(key, {name: self._stored(tensor) for name, tensor in features.items()})
            return len(chunk), []

        self._run("encoding what all samples share", self._missing([TextJob(key, EMPTY)]), 1, work)

    def latents(self, jobs: Sequence[LatentJob], rule: Rule) -> dict[bytes, str]:
        """Encode the files that are not in the cache, bucket by bucket. Gives keys that turned out unusable, with the reason."""
        if isinstance(rule, SoundRule):
            return self._files("encoding sounds", jobs, rule, self._encode_waveforms)
        stage = "encoding pictures" if rule is None else "encoding clips"
        return self._files(stage, jobs, rule, self._encode_pixels)

    def references(self, jobs: Sequence[LatentJob]) -> dict[bytes, str]:
        """The same for reference pictures."""
        return self._files("encoding references", jobs, None, self._encode_references)

    def conditions(self, jobs: Sequence[LatentJob]) -> dict[bytes, str]:
        """The same for conditioning pictures: their pixels, or their latents."""
        control = self._family.control
        encode = self._encode_conditions if control and control.takes == "latents" else _as_pixels
        return self._files("encoding conditioning pictures", jobs, None, encode)

    def _files(
        self,
        stage: str,
        jobs: Sequence[LatentJob],
        rule: Rule,
        encode: Callable[[Sequence[tuple[LatentJob, Tensor]]], list[dict[str, Tensor]]],
    ) -> dict[bytes, str]:
        missing = self._missing(sorted(jobs, key=lambda job: (job.placement.bucket, job.key)))
        largest = max((_pixels(job.placement.bucket) for job in missing), default=1)
        size = max(1, min(self._limits.round_samples, self._limits.round_pixels // largest))
        budget = Budget(self._limits.batch_pixels, self._limits.batch_samples)
        with ThreadPoolExecutor(self._threads) as pool:
            # The next round is decoded while this one is on the device.
            contents = _read_ahead(pool, missing, rule, ahead=2 * size)

            def work(chunk: Sequence[LatentJob]) -> tuple[int, list[tuple[bytes, str]]]:
                rejected: list[tuple[bytes, str]] = []
                for bucket, group in groupby(chunk, key=lambda job: job.placement.bucket):
                    read = [(job, next(contents)) for job in group]
                    rejected += [(job.key, pixels) for job, pixels in read if isinstance(pixels, str)]
                    usable = [(job, pixels) for job, pixels in read if not isinstance(pixels, str)]
                    entries = budget.run(usable, _pixels(bucket), encode)
                    rejected += self._keep([job for job, _ in usable], entries)
                return len(chunk), rejected

            return self._run(stage, missing, size, work)

    def _missing(self, jobs: Sequence[J]) -> list[J]:
        """What is missing of this rank's part of the jobs.

        The part goes by position among all jobs, not among the missing ones: ranks may have seen different shards committed.
        """
        return [job for job in jobs[self._share.index :: self._share.count] if self._cache.row(job.key) is None]

    def _run(
        self,
        what: str,
        jobs: Sequence[T],
        size: int,
        work: Callable[[Sequence[T]], tuple[int, list[tuple[bytes, str]]]],
    ) -> dict[bytes, str]:
        total = sum(gather(self._ranks, len(jobs)))
        if total == 0:
            return {}
        done = 0
        rejected: dict[bytes, str] = {}
        self._announcer.tell(what, done, total)
        try:
            for answers in in_rounds(self._ranks, jobs, size, self._committing(work)):
                done += sum(count for count, _ in answers)
                rejected.update(pair for _, pairs in answers for pair in pairs)
                self._announcer.tell(what, done, total)
        finally:
            self._writer.commit()
        return rejected

    def _committing(self, work: Callable[[Sequence[T]], R]) -> Callable[[Sequence[T]], R]:
        def step(chunk: Sequence[T]) -> R:
            result = work(chunk)
            late = time.monotonic() - self._committed_at > self._limits.commit_seconds
            if late or self._writer.size_bytes >= self._limits.shard_bytes:
                self._writer.commit()
                self._committed_at = time.monotonic()
            return result

        return step

    def _encode_captions(self, batch: Sequence[tuple[TextJob, tuple[Image.Image, ...]]]) -> list[dict[str, Tensor]]:
        captions = [job.caption for job, _ in batch]
        with torch.no_grad():
            if self._family.text_sees_references:
                pictures = [pictures for _, pictures in batch]
                return self._family.encode_instructions(self._encoders.pipe, captions, pictures)
            if self._family.facts.modality == "audio":
                return self._family.encode_songs(self._encoders.pipe, [job.song for job, _ in batch])
            return self._family.encode_text(self._encoders.pipe, captions)

    def _encode_pixels(self, batch: Sequence[tuple[LatentJob, Tensor]]) -> list[dict[str, Tensor]]:
        pipe = self._encoders.pipe
        pixels = torch.stack([one for _, one in batch]).to(self._ranks.device)
        with torch.no_grad():
            latents = self._family.encode_pixels(pipe, pixels)
            frames = self._family.encode_frames(pipe, pixels, self._given) if self._given else {}
        return self._entries(latents, {FRAMES + name: tensor for name, tensor in frames.items()})

    def _encode_waveforms(self, batch: Sequence[tuple[LatentJob, Tensor]]) -> list[dict[str, Tensor]]:
        """One by one, each at its own length: beside a longer one a sound would end in what is not its own."""
        return [entry for one in batch for entry in self._encode_pixels([one])]

    def _encode_references(self, batch: Sequence[tuple[LatentJob, Tensor]]) -> list[dict[str, Tensor]]:
        pixels = torch.stack([pixels for _, pixels in batch]).to(self._ranks.device)
        with torch.no_grad():
            latents = self._family.encode_reference(self._encoders.pipe, pixels)
        return [{"mean": self._stored(one)} for one in latents]

    def _encode_conditions(self, batch: Sequence[tuple[LatentJob, Tensor]]) -> list[dict[str, Tensor]]:
        pixels = torch.stack([pixels for _, pixels in batch]).to(self._ranks.device)
        with torch.no_grad():
            return self._entries(self._family.encode_condition(self._encoders.pipe, pixels), {})

    def _entries(self, latents: Latents, others: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """For each of a batch its posterior, with `others` [B, ...] beside."""
        columns = {"mean": latents.mean} | ({} if latents.std is None else {"std": latents.std}) | others
        return [{name: self._stored(tensor[i]) for name, tensor in columns.items()} for i in range(len(latents.mean))]

    def _keep(self, jobs: Sequence[LatentJob], entries: Sequence[dict[str, Tensor]]) -> list[tuple[bytes, str]]:
        rejected = []
        for job, entry in zip(jobs, entries, strict=True):
            if all(bool(torch.isfinite(tensor).all()) for tensor in entry.values()):
                self._writer.add(job.key, entry)
            else:
                rejected.append((job.key, "the autoencoder made values of it that are not finite"))
        return rejected

    def _stored(self, tensor: Tensor) -> Tensor:
        """On the CPU, floating-point values in the run's precision."""
        return tensor.to("cpu", self._dtype if tensor.is_floating_point() else tensor.dtype)


class Budget:
    """How much fits on the device at once, found out by running out of memory."""

    def __init__(self, units: int, most: int) -> None:
        """`units` (pixels, captions) and `most` items in a batch to begin with."""
        self._units = units
        self._most = most

    def run(self, items: Sequence[T], cost: int, encode: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
        """`encode` over all items of `cost` units each, in batches. Raises torch's OutOfMemoryError when a single one does not fit."""
        results: list[R] = []
        while len(results) < len(items):
            size = max(1, min(self._most, self._units // cost))
            batch = items[len(results) : len(results) + size]
            try:
                results += encode(batch)
                continue
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
            # Outside the handler, whose traceback keeps the tensors of the failed batch alive.
            self._units = max(1, len(batch) // 2) * cost
            _release_memory()
            log.warning("out of memory while encoding, batch is halved", extra={"batch": len(batch)})
        return results


def _read_ahead(
    pool: ThreadPoolExecutor, jobs: Sequence[LatentJob], rule: Rule, *, ahead: int
) -> Iterator[Tensor | str]:
    """What `_read` gives for each job, in order, with up to `ahead` of them read or being read before they are asked for."""
    waiting: deque[Future[Tensor | str]] = deque()
    for job in jobs:
        waiting.append(pool.submit(_read, job, rule))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _read(job: LatentJob, rule: Rule) -> Tensor | str:
    """Pixels of a file, or the waveform of a sound, or why there are none: it was readable before, but may have changed since."""
    try:
        if rule is None:
            data = Path(job.path).read_bytes()
            return fit(read_picture(data), job.placement) if content_sha256(data) == job.content else CHANGED
        if file_sha256(Path(job.path)) != job.content:
            return CHANGED
        if isinstance(rule, SoundRule):
            return read_sound(Path(job.path), rule.rate, job.placement.length)
        return read_clip(Path(job.path), rule.frames, rule.fps, job.placement)
    except Exception as error:  # whatever a decoder raises, one bad file must not end the run
        return str(error) or type(error).__name__


def _read_references(job: TextJob) -> tuple[Image.Image, ...] | str:
    """The reference pictures of a caption, or why one of them cannot be used."""
    pictures = []
    for reference in job.references:
        try:
            data = Path(reference.path).read_bytes()
            if content_sha256(data) != reference.content:
                return CHANGED
            pictures.append(read_picture(data))
        except Exception as error:  # as in `_read`
            return str(error) or type(error).__name__
    return tuple(pictures)


def _as_pixels(batch: Sequence[tuple[LatentJob, Tensor]]) -> list[dict[str, Tensor]]:
    """The 256 values that pixels in [-1, 1] were made of: a byte for each, where a number in bf16 would take two and be rounded."""
    return [{"pixels": ((pixels + 1) * 127.5).round().to(torch.uint8)} for _, pixels in batch]


def _pixels(bucket: Bucket) -> int:
    return bucket.width * bucket.height * bucket.frames


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
