"""The sampler of what a run has trained, where it predicts otherwise or has other betas than the checkpoint's sampler takes it for."""

from atelier_api.v1alpha1.objective import Objective

ZERO_TERMINAL_SAMPLER = "DDIMScheduler"
"""Class in diffusers that samples from the last step, where there is no signal (arXiv:2305.08891): not every sampler does."""


def sampler_settings(objective: Objective) -> dict[str, str | bool]:
    """What the sampler's config must say whatever the checkpoint's says; nothing where the checkpoint decides all."""
    settings: dict[str, str | bool] = {}
    if objective.prediction != "auto":
        settings["prediction_type"] = "v_prediction" if objective.prediction == "v" else "epsilon"
    if objective.noise.zero_terminal_snr:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    return settings


def sampler_loading(objective: Objective) -> list[str]:
    """Lines of Python that give `pipe`, the family's stock pipeline, that sampler."""
    settings = sampler_settings(objective)
    if not settings:
        return []
    arguments = "".join(
        f', {key}="{value}"' if isinstance(value, str) else f", {key}={value}" for key, value in settings.items()
    )
    if objective.noise.zero_terminal_snr:
        return [
            f"from diffusers import {ZERO_TERMINAL_SAMPLER}",
            f"pipe.scheduler = {ZERO_TERMINAL_SAMPLER}.from_config(pipe.scheduler.config{arguments})",
        ]
    return [f"pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config{arguments})"]
