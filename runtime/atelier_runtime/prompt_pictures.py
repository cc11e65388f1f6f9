"""The pictures that prompts name: what samples are drawn from beside the text."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile

from PIL import Image

from atelier_api.errors import ConfigError
from atelier_api.run_file import RunFile
from atelier_api.v1alpha1.validation import PICTURE_FIELDS
from atelier_runtime import components
from atelier_runtime.data.buckets import Bucket, place
from atelier_runtime.data.image import UnreadableError, fitted, read_picture
from atelier_runtime.data.prepare import cutting_rule
from atelier_runtime.data.scan import ClipRule
from atelier_runtime.data.video import read_frames
from atelier_runtime.family import Family, Frame
from atelier_runtime.store import ObjectMissing, open_store

Reader = Callable[[bytes], list[Image.Image]]
"""The pictures in the bytes of a file. Raises UnreadableError."""


@dataclass(frozen=True)
class PromptPictures:
    """Upright RGB pictures of one prompt: the `frames` that the checkpoint is shown and the `condition` of a control network, in the
    size of the samples, and `references`, which are edited, in the size of their files."""

    frames: tuple[Image.Image, ...]
    references: tuple[Image.Image, ...]
    condition: Image.Image | None = None


def prompt_pictures(run_file: RunFile, family: Family) -> list[PromptPictures]:
    """The pictures of every prompt.

    Raises ConfigError where a prompt lacks the picture of a frame that the checkpoint is shown, has one that would do nothing, or
    names one that cannot be read.
    """
    validation, data = run_file.spec.validation, run_file.spec.data
    bucket = Bucket(validation.width or data.resolution, validation.height or data.resolution)
    given = components.given_frames(family, run_file.model_folder, data.clip.shown_frames)
    frames_in = _reader_of_frames(run_file, family)
    pictures = []
    for index, prompt in enumerate(validation.prompts):
        frames = [
            frame for field in _shown(run_file, index, given) for frame in _read(run_file, index, field, frames_in)
        ]
        names = [f"references[{number}]" for number in range(len(prompt.references))]
        references = [picture for name in names for picture in _read(run_file, index, name, _picture_in)]
        condition = [] if prompt.conditioning is None else _read(run_file, index, "conditioning", _picture_in)
        fitting = [fitted(each, place(each.width, each.height, bucket)) for each in (*frames, *condition)]
        pictures.append(
            PromptPictures(tuple(fitting[: len(frames)]), tuple(references), next(iter(fitting[len(frames) :]), None))
        )
    return pictures


def _shown(run_file: RunFile, index: int, given: Sequence[Frame]) -> Iterator[str]:
    """The fields of a prompt that name the `given` frames."""
    for frame, uri in run_file.spec.validation.prompts[index].shown.items():
        path = f"spec.validation.prompts[{index}].{PICTURE_FIELDS[frame]}"
        if frame in given and uri is None:
            raise ConfigError(
                f"{path} is empty; the checkpoint of spec.model.source draws from its {frame} frame: name a picture"
            )
        if frame not in given and uri is not None:
            raise ConfigError(
                f"{path} is {uri!r}; the checkpoint of spec.model.source is not shown the {frame} frame of a clip: remove it"
            )
        if frame in given:
            yield PICTURE_FIELDS[frame]


def _reader_of_frames(run_file: RunFile, family: Family) -> Reader:
    """For the files of frames that are shown: pictures, or where several first frames are shown a clip at the training's rate."""
    rule, count = cutting_rule(run_file, family), run_file.spec.data.clip.shown_frames
    if not isinstance(rule, ClipRule) or count == 1:
        return _picture_in
    return partial(_first_frames, count=count, fps=rule.fps)


def _picture_in(content: bytes) -> list[Image.Image]:
    return [read_picture(content)]


def _first_frames(content: bytes, count: int, fps: float) -> list[Image.Image]:
    with NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return list(read_frames(Path(file.name), count, fps))


def _read(run_file: RunFile, index: int, field: str, read: Reader) -> list[Image.Image]:
    spec = run_file.spec
    uri = spec.validation.prompts[index].pictures[field]
    folder, _, name = uri.rpartition("/")
    try:
        return read(open_store(folder or "/", spec.storage.s3).get_bytes(name))
    except (ObjectMissing, UnreadableError, OSError) as error:
        kind = "picture" if read is _picture_in else "clip"
        reason = "is not there" if isinstance(error, ObjectMissing) else f"cannot be read as a {kind} ({error})"
        raise ConfigError(
            f"spec.validation.prompts[{index}].{field} is {uri!r}, which {reason}; name another"
        ) from error
