"""From the run file to an encoded training set: list, look at, choose, encode, open. Every rank takes part."""

import logging
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from atelier_api.errors import ConfigError, DataError
from atelier_api.run_file import RunFile
from atelier_api.v1alpha1.data import Captions, Data, DataSource
from atelier_runtime import components
from atelier_runtime.data.buckets import (
    Bucket,
    Placement,
    alignment,
    bucket_for,
    enlargement,
    place,
    place_sound,
    place_whole,
)
from atelier_runtime.data.captions import alternatives
from atelier_runtime.data.collective import Announcer, Ranks, Share, gather, in_rounds, on_rank_zero
from atelier_runtime.data.funnel import Fate, Funnel
from atelier_runtime.data.keys import crop_draw
from atelier_runtime.data.scan import (
    CaptionText,
    ClipRule,
    Probe,
    Rule,
    ScanMemory,
    SoundRule,
    in_threads,
    probe,
    read_caption,
)
from atelier_runtime.data.source import (
    CLIPS,
    PICTURES,
    SOUNDS,
    FileFacts,
    Found,
    RemoteCopy,
    folder_paths,
    is_remote,
    list_folder,
    list_objects,
    with_pictures,
)
from atelier_runtime.family import Family, Song

log = logging.getLogger(__name__)

_SAVE_SECONDS = 30.0
_ROUND_FILES_PER_THREAD = 8

CONDITIONING = "conditioning"
"""The field of a source with the place of its conditioning pictures."""

MOST_STRETCHED = 1.02
"""What tools make of a picture has sides rounded to a few pixels: its aspect may be off by as much."""


@dataclass(frozen=True, slots=True)
class Scanned:
    """A file and what is in it. `caption` is None without a caption file, `lyrics` without one of lyrics.

    `beside` are the pictures beside it, by the field that names their place. One that is not there is told like a broken one.
    """

    found: Found
    probe: Probe
    caption: CaptionText | None
    beside: Mapping[str, Probe] = field(default_factory=dict)
    lyrics: CaptionText | None = None


@dataclass(frozen=True, slots=True)
class Companion:
    """A picture beside a sample, a reference or for conditioning: `content` is the file's SHA-256."""

    path: str
    content: str
    placement: Placement


@dataclass(frozen=True, slots=True)
class Sample:
    """A kept sample of a source: `content` is the file's SHA-256, `captions` the alternatives it trains on.

    `songs` are what a sound's text encoder is told instead of each caption alone.
    """

    name: str
    path: str
    content: str
    placement: Placement
    captions: tuple[str, ...]
    source: DataSource
    references: tuple[Companion, ...] = ()
    songs: tuple[Song, ...] = ()
    condition: Companion | None = None


def cutting_rule(run_file: RunFile, family: Family) -> Rule:
    """How samples are cut; None for families of pictures. Raises ConfigError where no rate is known."""
    data, facts = run_file.spec.data, family.facts
    if facts.modality == "image":
        return None
    if facts.modality == "audio":
        cut, rate = data.audio, components.sample_rate(family, run_file.model_folder)
        unit = int(facts.latent_factor)  # a fraction only of pictures
        return SoundRule.of_seconds(rate, unit, least=cut.min_seconds, most=cut.max_seconds, step=cut.bucket_seconds)
    fps = data.clip.fps or facts.frame_rate
    if fps is None:
        raise ConfigError(
            f"spec.data.clip.fps is not set and {facts.name} has no frame rate of its own; set it to the rate of your clips"
        )
    return ClipRule(data.clip.frames, fps)


def extensions(rule: Rule) -> tuple[str, ...]:
    """The kinds of file that are samples."""
    if isinstance(rule, SoundRule):
        return SOUNDS
    return PICTURES if rule is None else CLIPS


def reading_threads(run_file: RunFile) -> int:
    """Threads of one process for decoding and hashing."""
    plan = run_file.plan
    fair = len(os.sched_getaffinity(0)) // plan.processes_per_node
    return max(1, min(plan.threads_per_process or fair, 16))


@dataclass(frozen=True, slots=True)
class _Known:
    """A file, and what an earlier scan saw in it, and in the texts and pictures beside it."""

    found: Found
    probe: Probe | None
    caption: CaptionText | None
    lyrics: CaptionText | None
    beside: Mapping[str, Probe | None]

    @classmethod
    def of(cls, found: Found, memory: ScanMemory) -> "_Known":
        beside = {
            name: _companion_probe(file) if isinstance(file, str) else memory.probe_of(file)
            for name, file in found.beside.items()
        }
        caption, lyrics = (memory.caption_of(file) if file else None for file in (found.caption, found.lyrics))
        return cls(found, memory.probe_of(found.file), caption, lyrics, beside)

    @property
    def is_complete(self) -> bool:
        is_captioned = self.caption is not None or self.found.caption is None
        is_sung = self.lyrics is not None or self.found.lyrics is None
        return self.probe is not None and is_captioned and is_sung and None not in self.beside.values()

    def scanned(self) -> Scanned:
        """Only for a complete one."""
        assert self.probe is not None
        beside = {name: each for name, each in self.beside.items() if each is not None}
        return Scanned(self.found, self.probe, self.caption, beside, self.lyrics)

    def looked_at(self, rule: Rule) -> Scanned:
        """Reads what is not known yet."""
        caption = self.caption or _text_of(self.found.caption, "caption")
        lyrics = self.lyrics or _text_of(self.found.lyrics, "lyrics")
        beside = {name: self.beside[name] or _companion_probe(file) for name, file in self.found.beside.items()}
        return Scanned(self.found, self.probe or probe(self.found.file, rule), caption, beside, lyrics)


def _text_of(file: FileFacts | None, what: str) -> CaptionText | None:
    return None if file is None else read_caption(file, what)


def _companion_probe(file: FileFacts | str) -> Probe:
    """What is in a picture beside a sample. One that is not there is like a broken one: its reason says so."""
    return Probe("", 0, 0, 0, file) if isinstance(file, str) else probe(file, None)


class Scan:
    """Looks at all sources, with what is remembered from earlier scans. Collective."""

    def __init__(self, run_file: RunFile, rule: Rule, *, ranks: Ranks, share: Share, announcer: Announcer) -> None:
        self._run_file = run_file
        self._rule = rule
        self._ranks = ranks
        self._share = share
        self._announcer = announcer
        self._cache = Path(run_file.cache_uri)
        self._threads = reading_threads(run_file)

    def all_sources(self) -> list[Scanned]:
        """Every sample found, by source and name: the same list on every rank."""
        sources = self._run_file.spec.data.sources
        return [scanned for number, source in enumerate(sources) for scanned in self._source(number, source)]

    def _source(self, number: int, source: DataSource) -> list[Scanned]:
        uri, kinds = source.uri, extensions(self._rule)
        remote = self._fetched(uri, kinds) if is_remote(uri) else None
        copies = {name: self._fetched(each, PICTURES) for name, each in source.beside.items() if is_remote(each)}
        memory = ScanMemory(self._cache, uri, self._rule) if self._ranks.rank == 0 else None

        def known_to_rank_zero() -> list[_Known]:
            assert memory is not None
            found = list_folder(number, uri, kinds) if remote is None else remote.found(number, kinds)
            places = {
                name: copies[name].paths
                if name in copies
                else folder_paths(f"spec.data.sources[{number}].{name}", each)
                for name, each in source.beside.items()
            }
            return [_Known.of(item, memory) for item in with_pictures(found, places)]

        known = on_rank_zero(self._ranks, known_to_rank_zero)
        scanned = {index: item.scanned() for index, item in enumerate(known) if item.is_complete}
        remembered = len(scanned)
        todo = [index for index in range(len(known)) if index not in scanned]
        own = todo[self._ranks.rank :: self._ranks.world_size]
        work = partial(in_threads, lambda index: (index, known[index].looked_at(self._rule)), threads=self._threads)
        saved_at = time.monotonic()
        for answers in in_rounds(self._ranks, own, self._threads * _ROUND_FILES_PER_THREAD, work):
            scanned.update(pair for answer in answers for pair in answer)
            self._announcer.tell("reading files", len(scanned) - remembered, len(todo))
            if memory is not None and time.monotonic() - saved_at > _SAVE_SECONDS:
                _remember(memory, scanned.values())
                saved_at = time.monotonic()
        if memory is not None:
            _remember(memory, scanned.values())
        return [scanned[index] for index in range(len(known))]

    def _fetched(self, uri: str, kinds: Sequence[str]) -> RemoteCopy:
        s3 = self._run_file.spec.storage.s3
        objects = on_rank_zero(self._ranks, lambda: list_objects(uri, s3, kinds))
        copy = RemoteCopy(uri, s3, objects, self._cache)
        missing = copy.missing(self._share)
        total, done = sum(gather(self._ranks, len(missing))), 0
        for answers in in_rounds(self._ranks, missing, 64, copy.fetch):
            done += sum(answers)
            self._announcer.tell(f"fetching {uri}", done, total)
        return copy


def select(scanned: Sequence[Scanned], run_file: RunFile, family: Family, funnel: Funnel) -> list[Sample]:
    """The samples to train on, placed in their buckets; the others go to the funnel with a reason."""
    data, seed = run_file.spec.data, run_file.spec.hyperparameters.seed
    rule = cutting_rule(run_file, family)
    align = alignment(data, family.facts)
    samples = []
    for item in scanned:
        name, seen = _display_name(item.found, data), item.probe
        if seen.reason:
            funnel.reject(name, Fate.UNREADABLE, seen.reason)
            continue
        if reason := _too_short(seen, rule):
            funnel.reject(name, Fate.TOO_SHORT, reason)
            continue
        if isinstance(rule, SoundRule):
            placement = place_sound(seen.frames, rule.unit, rule.step, rule.most)
        else:
            bucket = bucket_for(seen.width, seen.height, data.resolution, align, frames=seen.frames)
            if reason := _too_small(seen, bucket, data):
                funnel.reject(name, Fate.TOO_SMALL, reason)
                continue
            draw = crop_draw(seed, seen.content) if data.crop == "random" else None
            placement = place(seen.width, seen.height, bucket, draw)
        captions, reason = _captions(item, data.captions)
        if not captions:
            funnel.reject(name, Fate.NO_CAPTION, reason)
            continue
        references, reason = _references(item, family, data)
        if reason:
            funnel.reject(name, Fate.NO_REFERENCE, reason)
            continue
        condition, reason = _condition(item, placement)
        if reason:
            funnel.reject(name, Fate.NO_CONDITIONING, reason)
            continue
        songs: tuple[Song, ...] = ()
        if isinstance(rule, SoundRule):
            lyrics = (item.lyrics.text or "").strip() if item.lyrics else ""
            songs = tuple(Song(caption, lyrics, placement.length / rule.rate) for caption in captions)
        source = data.sources[item.found.source]
        path = item.found.file.path
        samples.append(Sample(name, path, seen.content, placement, captions, source, references, songs, condition))
    return samples


def require_words(samples: Sequence[Sample], words: Sequence[str]) -> None:
    """Raise DataError where a caption has none of the words that are learnt, or a word is in no caption: that would train nothing."""
    way = "write it into the captions, or set spec.data.captions.trigger to it"
    for sample in samples:
        for caption in sample.captions:
            if not any(word in caption for word in words):
                raise DataError(
                    f"a caption of {sample.name} has none of spec.adapter.tokens ({', '.join(words)}): {caption!r}; {way}"
                )
    for word in words:
        if not any(word in caption for sample in samples for caption in sample.captions):
            raise DataError(f"spec.adapter.tokens has {word}, which is in no caption; {way}, or remove it")


def _too_short(seen: Probe, rule: Rule) -> str:
    """Why there is not enough of a clip or sound; empty where there is."""
    if isinstance(rule, SoundRule) and seen.frames < rule.least:
        asked = rule.least / rule.rate
        return f"{seen.frames / rule.rate:.2f} seconds; spec.data.audio.minSeconds asks for {asked:.2f}"
    if isinstance(rule, ClipRule) and seen.frames < rule.frames:
        return f"{seen.frames} frames at {rule.fps:g} per second; spec.data.clip.frames asks for {rule.frames}"
    return ""


def _too_small(seen: Probe, bucket: Bucket, data: Data) -> str:
    """Why a picture cannot fill its bucket; empty where it can."""
    factor = enlargement(seen.width, seen.height, bucket)
    if factor <= data.max_upscale:
        return ""
    return (
        f"{seen.width} x {seen.height} would be enlarged {factor:.2f} times to cover {bucket.width} x {bucket.height}; "
        f"spec.data.maxUpscale is {data.max_upscale:g}"
    )


def _captions(item: Scanned, spec: Captions) -> tuple[tuple[str, ...], str]:
    """The texts of a sample, or none and why. A file of a caption or of lyrics that cannot be read is not covered up."""
    caption = item.caption
    for written in (caption, item.lyrics):
        if written is not None and written.text is None:
            return (), written.reason
    texts = alternatives(caption.text if caption else None, spec)
    return texts, "no caption file with text, and spec.data.captions.fallback is not set"


def _references(item: Scanned, family: Family, data: Data) -> tuple[tuple[Companion, ...], str]:
    """The reference pictures of a sample, and why one of them cannot be used; empty where all can."""
    resolution = family.facts.reference_resolution(data.resolution)
    references = []
    for name, seen in item.beside.items():
        if name == CONDITIONING:
            continue
        file = item.found.beside[name]
        if isinstance(file, str):
            return (), file
        if seen.reason:
            return (), f"its reference {PurePosixPath(file.path).name} cannot be read: {seen.reason}"
        size = family.reference_size(seen.width, seen.height, resolution)
        references.append(Companion(file.path, seen.content, place_whole(*size)))
    return tuple(references), ""


def _condition(item: Scanned, placement: Placement) -> tuple[Companion | None, str]:
    """The conditioning picture of a sample, cut as the sample is, and why it cannot be used; None and empty where there is none to be.

    It may have another size: the aspect has to be the same, or it would show other places than the sample.
    """
    file = item.found.beside.get(CONDITIONING)
    if file is None:
        return None, ""
    if isinstance(file, str):
        return None, file
    seen, name = item.beside[CONDITIONING], PurePosixPath(file.path).name
    if seen.reason:
        return None, f"its conditioning picture {name} cannot be read: {seen.reason}"
    stretched = seen.width * item.probe.height / (seen.height * item.probe.width)
    if not 1 / MOST_STRETCHED <= stretched <= MOST_STRETCHED:
        sizes = f"{seen.width} x {seen.height} and the sample {item.probe.width} x {item.probe.height}"
        return None, f"its conditioning picture {name} is {sizes}; their aspects must be the same"
    return Companion(file.path, seen.content, placement), ""


def _display_name(found: Found, data: Data) -> str:
    """How a file is called in messages: its name below the source, behind the source's own where there are several."""
    if len(data.sources) == 1:
        return found.name
    return f"{PurePosixPath(data.sources[found.source].uri).name}/{found.name}"


def _remember(memory: ScanMemory, scanned: Collection[Scanned]) -> None:
    probes = {item.found.file: item.probe for item in scanned}
    for item in scanned:
        for name, file in item.found.beside.items():
            if isinstance(file, FileFacts):
                probes[file] = item.beside[name]
    texts = {
        file: text
        for item in scanned
        for file, text in ((item.found.caption, item.caption), (item.found.lyrics, item.lyrics))
        if file is not None and text is not None
    }
    memory.replace(probes, texts)
