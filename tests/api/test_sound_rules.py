"""What fields must be to each other where sounds are trained on, and where they are not."""

from typing import Any

import pytest

from atelier_api.read import problems
from run_documents import document

ACE_STEP = {"family": "ace_step", "source": "base"}
PROMPTS = [{"text": "a cat"}]

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sounds of a family of pictures": (
        {"data__audio__maxSeconds": 30},
        "spec.data.audio.maxSeconds is 30; only for audio families, and flux is of image",
    ),
    "a sample's length in a family of pictures": (
        {"validation": {"prompts": PROMPTS, "seconds": 30}},
        "spec.validation.seconds is 30; only for audio families, and flux is of image",
    ),
    "words to sing in a family of pictures": (
        {"validation__prompts": [{"text": "a cat", "lyrics": "meow"}]},
        "spec.validation.prompts[0].lyrics is 'meow'; only for audio families, and flux is of image",
    ),
    "pixels of sounds": (
        {"model": ACE_STEP, "data__resolution": 512},
        "spec.data.resolution is 512; only for image and video families, and ace_step is of audio",
    ),
    "a sound's width": (
        {"model": ACE_STEP, "validation": {"prompts": PROMPTS, "width": 512}},
        "spec.validation.width is 512; only for image and video families, and ace_step is of audio",
    ),
    "sounds that are too short and too long at once": (
        {"model": ACE_STEP, "data__audio": {"minSeconds": 20, "maxSeconds": 10}},
        "spec.data.audio.minSeconds is 20; must be at most spec.data.audio.maxSeconds, which is 10",
    ),
    "a negative prompt where what is contrasted with is learnt": (
        {"model": ACE_STEP, "validation__prompts": [{"text": "a cat", "negative": "b"}]},
        "spec.validation.prompts[0].negative is 'b'; samples of ace_step know no negative prompt; remove it",
    ),
}


@pytest.mark.parametrize(("changes", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_would_do_nothing_is_refused_in_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    found = [str(problem) for problem in problems(document(**changes))]
    assert len(found) == 1
    assert found[0].startswith(sentence)


def test_sounds_are_cut_and_drawn_by_seconds_and_sung() -> None:
    prompts = [{"text": "a waltz", "lyrics": "one\ntwo"}, {"text": "a march"}]
    audio = {"minSeconds": 10, "maxSeconds": 240, "bucketSeconds": 30}
    sounds = document(model=ACE_STEP, data__audio=audio, validation={"prompts": prompts, "seconds": 30})
    assert problems(sounds) == []
