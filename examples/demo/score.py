"""Scores pictures of handwritten digits: is the digit readable, and is the ink the one that the caption asked for?

The digit is read by a support vector machine fitted on the training digits of scikit-learn's `load_digits`; the ink is
the mean colour of the strokes. As a program it draws digits with the base model, draws them again with a LoRA, and
shows what the LoRA changed:

    python examples/demo/score.py --lora runs/red-ink --grid before-after.png
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from digits import INKS, MARGIN, PICTURE_SIZE, WORDS, Floats, caption, draw, parse_caption, read_digits
from PIL import Image, ImageDraw
from sklearn.svm import SVC

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

BASE = Path(__file__).parent / "base"
LORA_FILE = "pytorch_lora_weights.safetensors"
STEPS = 20
GUIDANCE = 3.0
MAX_TOKENS = 16
ZOOM = 2


class InkScore(TypedDict):
    """What the pictures of one prompted ink look like; fractions in [0, 1], colour in [0, 1] RGB."""

    pictures: int
    readable: float
    right_ink: float
    red: float
    mean_colour: list[float]


class Score(TypedDict):
    """The result of `score`: over all pictures, and for each ink that the captions name."""

    pictures: int
    readable: float
    right_ink: float
    inks: dict[str, InkScore]


def ink_amounts(picture: Image.Image) -> Floats:
    """How much ink each pixel holds, [32, 32] in [0, 1], whatever the colour; the darkest stroke counts as 1."""
    amount = 1 - np.asarray(picture.convert("RGB"), np.float32).min(axis=-1) / 255
    return amount / max(float(amount.max()), 0.2)  # an empty picture stays empty


def mean_ink(picture: Image.Image) -> Floats:
    """The mean colour of the strokes, [3] in [0, 1], without their soft edges."""
    pixels = np.asarray(picture.convert("RGB"), np.float32) / 255
    return pixels[ink_amounts(picture) > 0.8].mean(axis=0)


def nearest_ink(colour: Floats) -> str:
    """The name of the known ink nearest to an RGB colour."""
    return min(INKS, key=lambda name: float(np.square(colour - np.asarray(INKS[name])).sum()))


def read_cells(picture: Image.Image) -> Floats:
    """The picture as the data set stores a digit: [64] ink amounts in [0, 16]."""
    inner = ink_amounts(picture)[MARGIN : PICTURE_SIZE - MARGIN, MARGIN : PICTURE_SIZE - MARGIN]
    return np.asarray(Image.fromarray(inner).resize((8, 8), Image.Resampling.BOX)).ravel() * 16


def fit_classifier() -> SVC:
    """A classifier of `read_cells`, fitted on the training digits drawn three times each."""
    source = read_digits("train")
    generator = np.random.default_rng(0)
    drawn = [read_cells(draw(cells, INKS["black"], generator)) for _ in range(3) for cells in source.cells]
    return SVC(gamma=0.001).fit(np.stack(drawn), np.tile(source.labels, 3))


def score(pictures: list[Image.Image], captions: list[str]) -> Score:
    """Scores 32 x 32 pictures against their captions; raises ValueError for a caption of another form."""
    prompted = [parse_caption(text) for text in captions]
    read = fit_classifier().predict(np.stack([read_cells(picture) for picture in pictures]))
    readable = np.asarray([digit == seen for (_, digit), seen in zip(prompted, read, strict=True)])
    colours = np.stack([mean_ink(picture) for picture in pictures])
    seen_inks = np.asarray([nearest_ink(colour) for colour in colours])
    wanted_inks = np.asarray([ink for ink, _ in prompted])
    right_ink = seen_inks == wanted_inks
    inks: dict[str, InkScore] = {}
    for ink in dict.fromkeys(wanted_inks.tolist()):
        rows = wanted_inks == ink
        inks[ink] = {
            "pictures": int(rows.sum()),
            "readable": round(float(readable[rows].mean()), 3),
            "right_ink": round(float(right_ink[rows].mean()), 3),
            "red": round(float((seen_inks[rows] == "red").mean()), 3),
            "mean_colour": [round(float(value), 2) for value in colours[rows].mean(axis=0)],
        }
    return {
        "pictures": len(pictures),
        "readable": round(float(readable.mean()), 3),
        "right_ink": round(float(right_ink.mean()), 3),
        "inks": inks,
    }


def score_real_digits(ink: str) -> Score:
    """The score of the held-out real digits in one ink: what a perfect model would reach."""
    source = read_digits("heldout")
    generator = np.random.default_rng(0)
    pictures = [draw(cells, INKS[ink], generator) for cells in source.cells]
    return score(pictures, [caption(ink, int(label)) for label in source.labels])


def load_pipeline(folder: Path) -> "StableDiffusion3Pipeline":
    """The base model as the stock pipeline loads it, without a network and without chatter."""
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(1)  # the model is too small for more to pay
    # Before the pipeline's import, which would warn about a missing torchvision that nothing here uses.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_with(pipeline: "StableDiffusion3Pipeline", captions: list[str], seed: int) -> list[Image.Image]:
    """One picture per caption. Picture i starts from the same noise whenever the seed is the same."""
    import torch

    pictures: list[Image.Image] = []
    for first in range(0, len(captions), 100):
        part = captions[first : first + 100]
        result = pipeline(
            part,
            height=PICTURE_SIZE,
            width=PICTURE_SIZE,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            max_sequence_length=MAX_TOKENS,
            generator=[torch.Generator().manual_seed(seed + first + index) for index in range(len(part))],
        )
        pictures.extend(result.images)
    return pictures


def picture_grid(rows: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """The rows of pictures below each other, each with its title above it, twice as large as they are."""
    side, title_height = PICTURE_SIZE * ZOOM, 18
    width = max(len(pictures) for _, pictures in rows) * side
    grid = Image.new("RGB", (width, len(rows) * (side + title_height)), "white")
    canvas = ImageDraw.Draw(grid)
    for row, (title, pictures) in enumerate(rows):
        top = row * (side + title_height)
        canvas.rectangle((0, top, width, top + title_height - 1), fill=(235, 235, 235))
        canvas.text((6, top + 3), title, fill="black")
        for column, picture in enumerate(pictures):
            grid.paste(picture.resize((side, side), Image.Resampling.NEAREST), (column * side, top + title_height))
    return grid


def score_table(scores: dict[str, Score]) -> str:
    """The scores as lines of text, one per model and ink."""
    lines = [f"{'model':<8} {'prompt':<7} {'pictures':>8} {'readable':>9} {'right ink':>10} {'red':>6}   mean colour"]
    for model, result in scores.items():
        for ink, part in result["inks"].items():
            colour = " ".join(f"{value:.2f}" for value in part["mean_colour"])
            lines.append(
                f"{model:<8} {ink:<7} {part['pictures']:>8} {part['readable']:>9.0%} {part['right_ink']:>10.0%} "
                f"{part['red']:>6.0%}   {colour}"
            )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Draws with the base and with the LoRA, writes the grid and prints the scores."""
    parser = argparse.ArgumentParser(description="Score the base model of the demo, and a LoRA trained on it.")
    parser.add_argument("--base", type=Path, default=BASE, help="folder of the base model")
    parser.add_argument("--lora", type=Path, help=f"folder that holds {LORA_FILE}")
    parser.add_argument("--inks", default="red,blue", help="inks to ask for, comma-separated")
    parser.add_argument("--per-digit", type=int, default=4, help="pictures of every digit in every ink")
    parser.add_argument("--grid", type=Path, help="PNG file to write: the first picture of every digit")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    inks = options.inks.split(",")
    captions = [caption(ink, digit) for ink in inks for _ in range(options.per_digit) for digit in range(len(WORDS))]
    pipeline = load_pipeline(options.base)
    drawn = {"base": draw_with(pipeline, captions, options.seed)}
    if options.lora:
        pipeline.load_lora_weights(options.lora, weight_name=LORA_FILE)
        drawn["LoRA"] = draw_with(pipeline, captions, options.seed)

    scores = {model: score(pictures, captions) for model, pictures in drawn.items()}
    scores["real"] = score_real_digits(inks[0])
    print(json.dumps(scores, indent=2) if options.json else score_table(scores))
    if options.grid:
        rows: list[tuple[str, list[Image.Image]]] = []
        for position, ink in enumerate(inks):
            first = position * options.per_digit * len(WORDS)
            title = f'"{caption(ink, 0)}" ... "{WORDS[-1]}"'
            rows += [(f"{model}: {title}", pictures[first : first + len(WORDS)]) for model, pictures in drawn.items()]
        picture_grid(rows).save(options.grid)


if __name__ == "__main__":
    main(sys.argv[1:])
