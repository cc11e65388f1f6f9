"""The report: everything in one file, whatever the run's texts hold."""

import io
import re

import pytest
from PIL import Image

from atelier_api.progress import FunnelReport
from atelier_runtime.observe.curve import loss_curve
from atelier_runtime.observe.report import Picture, ReportData, Sound, render_report


def picture(colour: str) -> Picture:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(buffer, "PNG")
    return Picture(buffer.getvalue(), "image/png", 32)


def data(**changes: object) -> ReportData:
    fields = {
        "title": "pixel-knight",
        "subtitle": "a run",
        "facts": [("steps", "10")],
        "rows": [(step, 1.0 / (step + 1)) for step in range(100)],
        "prompts": ["a knight", "a dog"],
        "samples": {0: [picture("red"), None], 50: [picture("blue"), picture("green")]},
        "funnel": FunnelReport(found=3, unreadable=1, kept=2, rejected={"broken.png": "truncated"}),
        "seconds": {"training": 12.0, "sampling": 3.0},
        "settings": "model: {family: x}",
        "plan": [("strategy", "ddp")],
        "exports": [("diffusers", "exports/diffusers/pytorch_lora_weights.safetensors", "ab" * 32)],
        "usage": "pipe.load_lora_weights(...)",
    }
    return ReportData(**(fields | changes))  # type: ignore[arg-type]


def test_nothing_is_loaded_from_elsewhere() -> None:
    text = render_report(data())
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "<script" not in text


def test_hostile_texts_are_shown_as_text() -> None:
    hostile = '"><script>alert(1)</script>'
    text = render_report(data(title=hostile, prompts=[hostile, hostile], settings=hostile, events=[hostile]))
    assert "<script" not in text
    assert 'alt=""><' not in text


def test_all_sample_rounds_stand_side_by_side_and_a_missing_picture_says_so() -> None:
    text = render_report(data())
    assert text.count("data:image/png;base64,") == 3
    assert "before" in text
    assert "step 50" in text
    assert "missing" in text


def test_sounds_are_embedded_with_something_to_play_them() -> None:
    played = render_report(data(samples={0: [Sound(b"abc", "audio/flac"), None]}, prompts=['a "waltz"', "a march"]))
    assert (
        '<audio controls preload=metadata aria-label="a &quot;waltz&quot;" src="data:audio/flac;base64,YWJj">' in played
    )
    assert "<img" not in played
    assert "missing" in played


def test_rejected_files_are_named_with_their_reason() -> None:
    assert "broken.png</td><td>truncated" in render_report(data())


@pytest.mark.parametrize(
    "rows", [[], [(0, 1.0)], [(0, float("nan")), (1, float("inf"))]], ids=["none", "one", "not finite"]
)
def test_too_few_steps_give_a_sentence_instead_of_a_curve(rows: list[tuple[int, float]]) -> None:
    assert "<svg" not in loss_curve(rows)


def test_the_curve_covers_all_steps_and_survives_equal_losses() -> None:
    flat = loss_curve([(step, 0.5) for step in range(5000)])
    points = re.findall(r'class="mean"[^>]*points="([^"]*)"', flat)[0].split()
    assert 500 < len(points) <= 1001
    assert float(points[0].split(",")[0]) < 70
    assert float(points[-1].split(",")[0]) > 1000
