"""The pictures that prompts name: what samples are drawn from beside the text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from atelier_api.errors import ConfigError
from atelier_api.run_file import RunFile
from atelier_api.v1alpha1.validation import PICTURE_FIELDS
from atelier_runtime import components
from atelier_runtime.data.buckets import Bucket, place
from atelier_runtime.data.image import UnreadableError, fitted, read_picture
from atelier_runtime.family import Family, Frame
from atelier_runtime.store import ObjectMissing, open_store


@dataclass(frozen=True)
class PromptPictures:
    """Upright RGB pictures of one prompt: the `frames` that the checkpoint is shown, in the size of the samples, and `references`,
    which are edited, in the size of their files."""

    frames: tuple[Image.Image, ...]
    references: tuple[Image.Image, ...]


def prompt_pictures(run_file: RunFile, family: Family) -> list[PromptPictures]:
    """The pictures of every prompt.

    Raises ConfigError where a prompt lacks the picture of a frame that the checkpoint is shown, has one that would do nothing, or
    names one that cannot be read.
    """
    validation, data = run_file.spec.validation, run_file.spec.data
    bucket = Bucket(validation.width or data.resolution, validation.height or data.resolution)
    given = components.given_frames(family, run_file.model_folder)
    pictures = []
    for index, prompt in enumerate(validation.prompts):
        frames = [_read(run_file, index, field) for field in _shown(run_file, index, given)]
        references = [_read(run_file, index, f"references[{number}]") for number in range(len(prompt.references))]
        fitting = (fitted(frame, place(frame.width, frame.height, bucket)) for frame in frames)
        pictures.append(PromptPictures(tuple(fitting), tuple(references)))
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


def _read(run_file: RunFile, index: int, field: str) -> Image.Image:
    spec = run_file.spec
    uri = spec.validation.prompts[index].pictures[field]
    folder, _, name = uri.rpartition("/")
    try:
        return read_picture(open_store(folder or "/", spec.storage.s3).get_bytes(name))
    except (ObjectMissing, UnreadableError, OSError) as error:
        reason = "is not there" if isinstance(error, ObjectMissing) else f"cannot be read as a picture ({error})"
        raise ConfigError(
            f"spec.validation.prompts[{index}].{field} is {uri!r}, which {reason}; name another"
        ) from error
