"""The report in a real browser: what a person sees, by the pixels of a screenshot."""

import io
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from atelier_api.progress import FunnelReport
from atelier_runtime.observe.report import Picture, ReportData, render_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
)

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)"),
]


def picture(colour: str) -> Picture:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(buffer, "PNG")
    return Picture(buffer.getvalue(), "image/png", 32)


def screenshot(page: Path, folder: Path) -> np.ndarray:
    target = folder / "page.png"
    subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            *QUIET,
            f"--user-data-dir={folder / 'profile'}",
            "--window-size=1100,1400",
            f"--screenshot={target}",
            page.as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return np.asarray(Image.open(target).convert("RGB")).astype(int)


def count(pixels: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(pixels - np.array(colour)).max(axis=2) <= 6).sum())


def test_the_loss_curve_and_every_sample_are_on_the_page(tmp_path: Path) -> None:
    data = ReportData(
        title="run",
        subtitle="",
        facts=[("steps", "100")],
        rows=[(step, 1.0 / (1 + step)) for step in range(100)],
        prompts=["one", "two"],
        samples={0: [picture("#ff0000"), picture("#00ff00")], 100: [picture("#ff00ff"), picture("#ffff00")]},
        funnel=FunnelReport(found=2, kept=2),
        seconds={"training": 1.0},
        settings="",
        plan=[],
        exports=[],
        usage="",
    )
    page = tmp_path / "report.html"
    page.write_text(render_report(data))
    pixels = screenshot(page, tmp_path)
    for colour in ((255, 0, 0), (0, 255, 0), (255, 0, 255), (255, 255, 0)):
        assert count(pixels, colour) > 96 * 96 * 0.9
    accents = ((37, 99, 235), (122, 162, 255))  # the curve's colour on a light and on a dark page
    assert max(count(pixels, accent) for accent in accents) > 500
