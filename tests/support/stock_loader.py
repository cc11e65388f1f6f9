"""What another person does with a result: the stock pipeline in a process of its own that knows nothing of ours.

python stock_loader.py jobs.json    draws one picture or clip per job and writes it as .npy
"""

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch


def draw(pipe: Any, arguments: dict[str, Any]) -> np.ndarray:
    """The picture or clip for fixed arguments, [..., C] in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    output = pipe(**arguments, generator=torch.Generator().manual_seed(7), output_type="np")
    return np.asarray(output.frames if hasattr(output, "frames") else output.images)


def run(job: dict[str, Any]) -> None:
    """`components` are model folders that replace the base's, `loras` arguments of `load_lora_weights`, `lycoris`
    lines of Python for `pipe`, as users are shown them."""
    base = diffusers.DiffusionPipeline.from_pretrained(job["base"])
    replaced = {
        name: type(getattr(base, name)).from_pretrained(folder, torch_dtype=torch.float32)
        for name, folder in job["components"].items()
    }
    pipe = type(base).from_pretrained(job["base"], **replaced)
    for lora in job["loras"]:
        pipe.load_lora_weights(lora.pop("folder"), **lora)
    exec("\n".join(job.get("lycoris", [])), {"pipe": pipe})
    np.save(job["out"], draw(pipe, job["arguments"]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        run(entry)
