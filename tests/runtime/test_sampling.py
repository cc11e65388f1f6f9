"""Samples are drawn by the sampler of what the run trains."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from atelier_runtime import components, sampling
from atelier_runtime.families import FAMILIES
from atelier_runtime.family import Stage
from atelier_runtime.objectives import build_objective
from atelier_runtime.parallel import Distributed
from atelier_runtime.usage import usage
from export_runs import run_file
from family_cases import make_case
from family_models import FAMILY_OF, save_tiny

V = {"prediction": "v"}
ZERO_TERMINAL = {"prediction": "v", "noise": {"zeroTerminalSnr": True}}
LORA = "exports/diffusers/pytorch_lora_weights.safetensors"


def recovered(sampler: Any, made: Any) -> torch.Tensor:
    """The clean pictures that the sampler's betas and kind of prediction find in the targets of training."""
    ddim = DDIMScheduler.from_config(sampler.config, clip_sample=False)
    ddim.set_timesteps(ddim.config.num_train_timesteps)
    steps = zip(made.target, made.time, made.noisy, strict=True)
    return torch.stack([ddim.step(target, int(time), noisy).pred_original_sample for target, time, noisy in steps])


@pytest.mark.parametrize(
    ("checkpoint", "objective"),
    [
        ("sdxl", {}),
        ("sdxl", V),
        ("sdxl", ZERO_TERMINAL),
        ("sd15", V),
        ("sd15", ZERO_TERMINAL),
        ("sd21", {"prediction": "epsilon"}),
        ("kolors", ZERO_TERMINAL),
        ("pixart_sigma", ZERO_TERMINAL),
    ],
    ids=str,
)
def test_what_a_run_predicts_is_what_its_samples_are_drawn_by(
    checkpoint: str, objective: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the checkpoint's own sampler takes it for; and so does the program of the report."""
    case, base = make_case(checkpoint), save_tiny(checkpoint, tmp_path)
    family = FAMILIES[FAMILY_OF[checkpoint]]
    spec = {"objective": objective, "validation": {"prompts": [{"text": "a fox"}]}}
    file = run_file(family.name, base, {"type": "lora"}, **spec)
    samplers: list[Any] = []
    monkeypatch.setattr(sampling, "_draw", lambda pipe, *_: samplers.append(pipe.scheduler) or b"")
    sampling.draw_samples(file, family, case.denoisers, Distributed(0, 0, 1, torch.device("cpu")))
    own = type(case.pipe.scheduler).from_pretrained(base, subfolder="scheduler")
    pipe = SimpleNamespace(scheduler=own)
    lines = usage(file, family, [LORA]).splitlines()
    exec("\n".join(line for line in lines if "cheduler" in line), {"pipe": pipe})
    assert pipe.scheduler.config == samplers[0].config
    assert (pipe.scheduler is own) is (objective == {})

    config = components.scheduler_config(base)
    clean = torch.randn(3, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(clean))]
    last = Stage(family.denoisers[0], low=0.99)
    made = build_objective(file.spec.objective, family.facts, config).prepare(clean, generators, stage=last, tokens=1)
    torch.testing.assert_close(recovered(samplers[0], made), clean, atol=2e-3, rtol=1e-3)
    if objective == ZERO_TERMINAL:  # it begins where there is no signal
        [sampler] = samplers
        sampler.set_timesteps(2)
        assert float(sampler.alphas_cumprod[sampler.timesteps[0]]) == 0
