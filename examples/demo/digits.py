"""Pictures of real handwritten digits in coloured ink, and the folders of them that a run trains on.

The digits are the 1,797 of scikit-learn's `load_digits`: bitmaps of 8 x 8 cells written by people. Each is drawn as a
32 x 32 picture on white, captioned "a <ink> handwritten <word>". Digits of the split "heldout" (the last fifth) are
never drawn for training, so they can be used to evaluate.

    python examples/demo/digits.py OUT --inks red --count 200 --mix black,blue,green
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

Floats = NDArray[np.float32]
Split = Literal["train", "heldout"]
Colour = tuple[float, float, float]

PICTURE_SIZE = 32
MARGIN = 2  # white border in pixels: without it a shifted digit would be cut off
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS: dict[str, Colour] = {
    "black": (0.10, 0.10, 0.13),
    "blue": (0.13, 0.30, 0.88),
    "green": (0.08, 0.58, 0.25),
    "red": (0.88, 0.12, 0.14),
    "orange": (0.96, 0.52, 0.08),
    "purple": (0.52, 0.18, 0.72),
    "pink": (0.95, 0.42, 0.68),
    "brown": (0.46, 0.28, 0.14),
}
HELDOUT_FRACTION = 0.2


@dataclass(frozen=True)
class Digits:
    """The digits of one split: `cells` [N, 8, 8] ink amounts in [0, 1], `labels` [N] in 0..9."""

    cells: Floats
    labels: NDArray[np.int64]


def read_digits(split: Split) -> Digits:
    """The digits of a split, in the data set's own order (its last digits come from other writers)."""
    bunch = load_digits()
    cells = (bunch.images / 16).astype(np.float32)
    first_heldout = round(len(cells) * (1 - HELDOUT_FRACTION))
    part = slice(0, first_heldout) if split == "train" else slice(first_heldout, None)
    return Digits(cells[part], bunch.target[part].astype(np.int64))


def caption(ink: str, digit: int) -> str:
    """The caption of a digit, for example "a blue handwritten three"."""
    return f"a {ink} handwritten {WORDS[digit]}"


def parse_caption(text: str) -> tuple[str, int]:
    """The ink and the digit that `caption` was given; raises ValueError for any other text."""
    words = text.split()
    if len(words) != 4 or words[0] != "a" or words[2] != "handwritten" or words[3] not in WORDS:
        raise ValueError(f"caption {text!r} is not of the form 'a <ink> handwritten <word>'")
    return words[1], WORDS.index(words[3])


def draw(cells: Floats, ink: Colour, generator: np.random.Generator) -> Image.Image:
    """One digit as a 32 x 32 RGB picture: smooth strokes on white, moved by up to a pixel, the ink slightly varied."""
    inner = PICTURE_SIZE - 2 * MARGIN
    smooth = Image.fromarray(cells).resize((inner, inner), Image.Resampling.BICUBIC)
    # The enlarged picture is blurred by its 8 x 8 cells; a steep smooth step gives back the edge of a pen stroke.
    amount = np.clip((np.asarray(smooth) - 0.2) / 0.6, 0, 1)
    amount = amount * amount * (3 - 2 * amount)
    canvas = np.zeros((PICTURE_SIZE, PICTURE_SIZE), np.float32)
    down, right = generator.integers(-1, 2, size=2) + MARGIN
    canvas[down : down + inner, right : right + inner] = amount
    colour = np.clip(np.asarray(ink) + generator.normal(0, 0.03, size=3), 0, 1)
    pixels = 1 - canvas[..., None] * (1 - colour)
    return Image.fromarray(np.round(pixels * 255).astype(np.uint8))


def write_folder(
    out: Path,
    inks: list[str],
    count: int,
    mix: list[str],
    *,
    digits: list[int],
    split: Split,
    generator: np.random.Generator,
) -> int:
    """Writes `count` pictures in `inks` and, when `mix` names inks, `count` more in those; returns how many.

    Every picture is a PNG with its caption in a .txt of the same name. Digits and inks take turns, so that each comes
    equally often.
    """
    source = read_digits(split)
    out.mkdir(parents=True, exist_ok=True)
    written = 0
    for palette in (inks, mix):
        for number in range(count if palette else 0):
            digit = digits[number % len(digits)]
            ink = palette[(number // len(digits)) % len(palette)]
            chosen = generator.choice(np.flatnonzero(source.labels == digit))
            stem = out / f"{written:04d}-{ink}-{WORDS[digit]}"
            draw(source.cells[chosen], INKS[ink], generator).save(stem.with_suffix(".png"))
            stem.with_suffix(".txt").write_text(caption(ink, digit) + "\n", encoding="utf-8")
            written += 1
    return written


def write_bad_files(out: Path, generator: np.random.Generator) -> None:
    """Adds three files that no run should train on: a PNG cut in half, a 4 x 4 picture, and one without a caption."""
    source = read_digits("train")
    picture = draw(source.cells[0], INKS["red"], generator)
    words = caption("red", int(source.labels[0])) + "\n"

    truncated = out / "bad-truncated.png"
    picture.save(truncated)
    data = truncated.read_bytes()
    truncated.write_bytes(data[: len(data) // 2])
    truncated.with_suffix(".txt").write_text(words, encoding="utf-8")

    tiny = out / "bad-tiny.png"
    picture.resize((4, 4)).save(tiny)
    tiny.with_suffix(".txt").write_text(words, encoding="utf-8")

    picture.save(out / "bad-without-caption.png")


def _inks(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    unknown = sorted(set(names) - set(INKS))
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown ink {', '.join(unknown)}; known: {', '.join(INKS)}")
    return names


def _digits(text: str) -> list[int]:
    if not text or not set(text) <= set("0123456789"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a row of digits such as 0123456789")
    return sorted({int(character) for character in text})


def main(arguments: list[str]) -> None:
    """Writes the folder that the command line asks for."""
    parser = argparse.ArgumentParser(description="Write a folder of captioned pictures of handwritten digits.")
    parser.add_argument("out", type=Path, help="folder to write: new or empty")
    parser.add_argument("--inks", type=_inks, default=["red"], help="inks to teach, comma-separated")
    parser.add_argument("--count", type=int, default=200, help="pictures in these inks")
    parser.add_argument("--mix", type=_inks, default=[], help="inks of as many more pictures, against forgetting")
    parser.add_argument("--digits", type=_digits, default=list(range(10)), help="digits to draw, for example 01234567")
    parser.add_argument("--split", choices=["train", "heldout"], default="train", help="which of the digits to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--with-bad-files", action="store_true", help="add files that a run has to reject")
    options = parser.parse_args(arguments)
    if not options.inks:
        parser.error("--inks names no ink")
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"{options.out} is not empty")

    generator = np.random.default_rng(options.seed)
    written = write_folder(
        options.out,
        options.inks,
        options.count,
        options.mix,
        digits=options.digits,
        split=options.split,
        generator=generator,
    )
    print(f"{written} captioned pictures in {options.out}")
    if options.with_bad_files:
        write_bad_files(options.out, generator)
        print("3 bad files added: bad-truncated.png, bad-tiny.png, bad-without-caption.png")


if __name__ == "__main__":
    main(sys.argv[1:])
