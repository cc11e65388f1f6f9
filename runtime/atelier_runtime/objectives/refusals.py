"""Options that do not fit the kind of the family, or each other: refused by name, never ignored. Pure: needs no torch."""

from atelier_api.errors import ConfigError
from atelier_api.families import FamilyFacts
from atelier_api.v1alpha1.objective import Objective, Timesteps


def check_objective(spec: Objective, facts: FamilyFacts) -> None:
    """Raise ConfigError for the first option of `spec.objective` that would do nothing for this family.

    An option at its default counts as not given: a resolved run spells out every default.
    """
    if facts.objective == "flow":
        _refuse_changed(_diffusion_options(spec), facts, "diffusion")
        _check_sampling(spec.timesteps)
    else:
        _refuse_changed(_flow_options(spec), facts, "flow")
    if spec.loss != "huber" and spec.huber_c != Objective().huber_c:
        raise ConfigError(
            f"spec.objective.huberC is {spec.huber_c:g} and the loss is {spec.loss}; it is the c of the pseudo-Huber loss: "
            "remove it, or set spec.objective.loss to huber"
        )


def _diffusion_options(spec: Objective) -> dict[str, tuple[object, object]]:
    default = Objective()
    return {
        "prediction": (spec.prediction, default.prediction),
        "minSnrGamma": (spec.min_snr_gamma, default.min_snr_gamma),
        "noise.offset": (spec.noise.offset, default.noise.offset),
        "noise.zeroTerminalSnr": (spec.noise.zero_terminal_snr, default.noise.zero_terminal_snr),
    }


def _flow_options(spec: Objective) -> dict[str, tuple[object, object]]:
    given, default = spec.timesteps, Timesteps()
    return {
        "timesteps.sampling": (given.sampling, default.sampling),
        "timesteps.logitMean": (given.logit_mean, default.logit_mean),
        "timesteps.logitScale": (given.logit_scale, default.logit_scale),
        "timesteps.betaA": (given.beta_a, default.beta_a),
        "timesteps.betaB": (given.beta_b, default.beta_b),
        "timesteps.shift": (given.shift, default.shift),
    }


def _refuse_changed(options: dict[str, tuple[object, object]], facts: FamilyFacts, kind: str) -> None:
    for option, (value, default) in options.items():
        if value != default:
            raise ConfigError(
                f"spec.objective.{option} is {value}; it is an option of {kind} families, and {facts.name} is a {facts.objective} "
                f"family; remove it (its default is {default})"
            )


def _check_sampling(timesteps: Timesteps) -> None:
    default = Timesteps()
    owners = {
        "logitMean": ("logit-normal", timesteps.logit_mean, default.logit_mean),
        "logitScale": ("logit-normal", timesteps.logit_scale, default.logit_scale),
        "betaA": ("beta", timesteps.beta_a, default.beta_a),
        "betaB": ("beta", timesteps.beta_b, default.beta_b),
    }
    for option, (sampling, value, standard) in owners.items():
        if timesteps.sampling != sampling and value != standard:
            raise ConfigError(
                f"spec.objective.timesteps.{option} is {value:g} and the sampling is {timesteps.sampling}; it belongs to the "
                f"{sampling} density: remove it, or set spec.objective.timesteps.sampling to {sampling}"
            )
