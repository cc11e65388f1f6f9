"""Options of the other kind of family: refused by name, never ignored.

`atelier_api.rules` refuses them before a run is queued; this is the same law for whoever builds an objective without a whole run.
"""

from atelier_api.errors import ConfigError
from atelier_api.families import FamilyFacts
from atelier_api.v1alpha1.objective import Objective, Timesteps


def check_objective(spec: Objective, facts: FamilyFacts) -> None:
    """Raise ConfigError for the first option of `spec.objective` that means nothing to a family of this kind.

    An option at its default counts as not given: a resolved run spells out every default.
    """
    kind, options = (
        ("diffusion", _diffusion_options(spec)) if facts.objective == "flow" else ("flow", _flow_options(spec))
    )
    for option, (value, default) in options.items():
        if value != default:
            raise ConfigError(
                f"spec.objective.{option} is {value}; it is an option of {kind} families, and {facts.name} is a "
                f"{facts.objective} family; remove it (its default is {default})"
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
