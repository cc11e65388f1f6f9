"""What the tests have shown of each family, cell by cell.

`make conformance` runs the tests and writes conformance.json; nobody writes it by hand. A test compares its rows and columns with the
families and the tests of today.
"""

import json
from functools import cache
from pathlib import Path

PATH = Path(__file__).with_name("conformance.json")

PROVED = "proved"
NOT_APPLICABLE = "not applicable: "
"""What a cell says before the reason why there is nothing to prove."""

CELLS = {
    "sampling": "Steps with the family's text encoding and prediction give the stock pipeline's latents, with guidance and without.",
    "latents": "The pipeline decodes the latents that are trained on to what its autoencoder makes of its own.",
    "batch": "Two prompts of unequal length in one batch give the predictions and the loss of the two alone.",
    "conditions": "The prompt, and every frame or reference that is shown, change the prediction.",
    "shift": "The levels that are trained are those of the run's shift, whatever the checkpoint says; diffusion: with Diff2Flow.",
    "lora": "Every matrix of a LoRA gets a gradient and nothing else does.",
    "export": "An exported LoRA, loaded as the report says, gives the stock pipeline the prediction of training.",
    "lycoris": "A LoKr changes nothing at its start and trains on every target.",
    "slider": "At strength 0 a LoRA and a LoKr leave the base and get no gradient; at -1.5 they are networks of that scale.",
    "full": "Full-rank training reaches every parameter, but for those that are dead by design and named.",
    "recompute": "Gradient checkpointing changes neither loss nor gradients.",
    "bf16": "A bf16 forward pass is close to the fp32 one.",
    "overfits": "The loss falls on four real samples, with LoRA and full-rank.",
    "quantized": "On each kind of quantised base a LoRA gets the gradients that plain weights give it, and goes on the whole base.",
    "ddp": "Two processes under DDP train the weights that one trains, LoRA and full-rank.",
    "fsdp2": "Two processes under FSDP2 train the weights that one trains, LoRA and full-rank.",
    "zero3": "Two processes under DeepSpeed's ZeRO-3 train the weights that one trains, LoRA and full-rank.",
    "controlnet": "A control network changes nothing at its start, trains alone, and is what the stock pipeline samples with.",
    "layersync": "LayerSync compares tokens of what is drawn alone, and no gradient of it goes behind its student.",
    "twinflow": "A few-step generator is the base at its start, and is told the end of a step as the network is told its time.",
    "sizes": "Parameters, layers and widths of the published configs are those that the planner counts with.",
}
"""What the tests of each cell show."""


@cache
def table() -> dict[str, dict[str, str]]:
    """By family and cell: `proved`, or `not applicable: ` and the reason."""
    document: dict[str, dict[str, str]] = json.loads(PATH.read_text(encoding="utf-8"))
    return document
