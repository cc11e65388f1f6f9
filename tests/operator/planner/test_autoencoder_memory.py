"""What the planner counts for a sample on its way through the autoencoder, and when it has it work on tiles.

The counts are compared with the published networks on the meta device.
"""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2

from atelier_api.errors import ConfigError
from atelier_api.families import FAMILIES
from atelier_api.families.facts import Passage
from atelier_api.v1alpha1 import TrainingRun
from atelier_operator.planner import Machine, plan, table_facts
from atelier_operator.planner.execution import plan_below
from atelier_operator.planner.extents import Extent
from atelier_operator.planner.passages import JOINED_VALUES, passage_values, tilings
from atelier_runtime.families import FAMILIES as RUNTIME
from atelier_runtime.tiles import work_on_tiles
from family_models import PUBLISHED
from family_models.published_parts import without_memory
from peak_bytes import peak_bytes
from planned_runs import gpu, run

PROMPT = {"prompts": [{"text": "a cat"}]}

FRAMES = {"sdxl": 1, "flux2": 1, "sana": 1, "qwen_image": 1, "wan": 5, "wan_ti2v": 5}
FRAMES |= {"kandinsky5_video": 17, "hunyuan_video15": 5, "ltx": 17}
"""Of the sample that is measured, by family: one for each class, and both sizes of Wan's."""


class Pipe:
    """All that is asked of a pipeline here."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae


def held_values(family: str, extent: Extent, *, tiled: bool) -> dict[str, int]:
    """What the published autoencoder holds in bf16 of a sample of this size, by direction."""
    vae: Any = without_memory(PUBLISHED[family].autoencoder).to(torch.bfloat16).eval()
    if tiled:
        work_on_tiles(Pipe(vae), RUNTIME[family])
    frames = () if type(vae) in (AutoencoderKL, AutoencoderKLFlux2, AutoencoderDC) else (extent.frames,)
    pixels = torch.empty(1, 3, *frames, extent.height, extent.width, dtype=torch.bfloat16, device="meta")
    made: list[Any] = []
    encoding = peak_bytes(lambda: made.append(vae.encode(pixels)))
    latents = made[0].latent if hasattr(made[0], "latent") else made[0].latent_dist.mode()
    return {"encoding": encoding // 2, "decoding": peak_bytes(lambda: vae.decode(latents)) // 2}


@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiles"])
@pytest.mark.parametrize("family", FRAMES)
def test_what_an_autoencoder_holds_is_what_the_planner_counts_and_hardly_more(family: str, tiled: bool) -> None:
    passages = FAMILIES[family].passages
    extent = Extent(passages.encoding.tile * 5 // 4, passages.largest_whole, FRAMES[family])
    for direction, held in held_values(family, extent, tiled=tiled).items():
        counted = passage_values(getattr(passages, direction), extent, tiled=tiled)
        assert 0.99 * held <= counted <= 1.45 * held, direction


def tiles(of: TrainingRun, machine: Machine) -> tuple[bool, bool]:
    """Whether the plan has tiles for what is encoded, and for what is drawn."""
    execution = plan(of, table_facts(of.spec.model), machine)
    return execution.tiled_encoding, execution.tiled_samples


def small(**changes: Any) -> TrainingRun:
    """Fits into 11 GiB but for the picture that is encoded, which takes 1.5 as a whole, and 0.4 in tiles."""
    return run(model__quantization="nf4", data__resolution=1024, **changes)


def large_samples(**changes: Any) -> TrainingRun:
    """Draws pictures that take 6 GiB to decode as a whole."""
    return run("sdxl", validation=PROMPT | {"width": 2048, "height": 2048}, **changes)


PLANS: dict[str, tuple[TrainingRun, Machine, tuple[bool, bool]]] = {
    "whole where that fits": (large_samples(), gpu(80), (False, False)),
    "whole where the memory is not known": (large_samples(), gpu(), (False, False)),
    "what is drawn, where only that does not fit": (large_samples(), gpu(12), (False, True)),
    "what is trained on, where nothing fits otherwise": (small(), gpu(12), (True, False)),
    "always": (run(model__autoencoderTiling="always"), gpu(80), (True, True)),
    "always, whatever the memory": (run(model__autoencoderTiling="always"), gpu(), (True, True)),
    "never": (large_samples(model__autoencoderTiling="never"), gpu(24), (False, False)),
}


@pytest.mark.parametrize(("of", "machine", "expected"), PLANS.values(), ids=PLANS)
def test_tiles_are_planned_where_they_are_asked_for_or_nothing_else_fits(
    of: TrainingRun, machine: Machine, expected: tuple[bool, bool]
) -> None:
    assert tiles(of, machine) == expected


def test_a_run_that_fits_in_tiles_alone_is_refused_where_it_may_have_none() -> None:
    with pytest.raises(ConfigError, match=r"would fit: .*spec\.model\.autoencoderTiling auto \("):
        tiles(small(model__autoencoderTiling="never"), gpu(12))


def test_tiles_for_what_is_drawn_leave_the_training_as_it_is_planned_without_prompts() -> None:
    drawing, quiet = (plan(of, table_facts(of.spec.model), gpu(12)) for of in (large_samples(), run("sdxl")))
    assert drawing.tiled_samples
    assert drawing.model_copy(update={"tiled_samples": False, "predicted_peak_memory_bytes": 0}) == quiet.model_copy(
        update={"predicted_peak_memory_bytes": 0}
    )


def test_after_running_out_of_memory_while_drawing_what_is_drawn_is_tiled_first() -> None:
    of = large_samples()
    before = plan(of, table_facts(of.spec.model), gpu(24))
    after = plan_below(of, table_facts(of.spec.model), gpu(24), before.predicted_peak_memory_bytes)
    assert after is not None
    assert (before.tiled_samples, after.tiled_samples) == (False, True)
    assert after.predicted_peak_memory_bytes < before.predicted_peak_memory_bytes


def test_tiles_bound_what_is_held_and_cost_nothing_where_there_are_none() -> None:
    passage = Passage(100, frames=4, tile=64)
    for extent in (Extent(64, 64, 3), Extent(32, 48, 3)):
        assert passage_values(passage, extent, tiled=True) == passage_values(passage, extent, tiled=False)
        assert passage_values(passage, extent, tiled=False) == extent.width * extent.height * 3 * 100
    large = Extent(256, 32, 9)
    assert passage_values(passage, large, tiled=True) == 64 * 32 * 4 * 100 + 256 * 32 * 9 * JOINED_VALUES
    sound = Extent(1, 1, 1000)
    assert passage_values(Passage(100, tile=64), sound, tiled=True) == 64 * 100 + 1000 * JOINED_VALUES
    assert passage_values(Passage(100, frames=0, tile=64), large, tiled=False) == 256 * 32 * 9 * 100


@pytest.mark.parametrize("tiling", ["auto", "never"])
@pytest.mark.parametrize("family", [name for name, facts in FAMILIES.items() if facts.passages.untiled])
def test_an_autoencoder_without_tiles_is_planned_without_any(family: str, tiling: str) -> None:
    precision = {"precision": "fp32"} if FAMILIES[family].needs_fp32 else {}
    of = run(family, model__autoencoderTiling=tiling, hyperparameters={"steps": 1} | precision, validation=PROMPT)
    assert tilings(of.spec, FAMILIES[family]) == [(False, False)]
