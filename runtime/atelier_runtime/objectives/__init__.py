"""What the network is asked to predict, at which noise levels, with which loss."""

from collections.abc import Mapping
from typing import Any

from atelier_api.errors import ConfigError
from atelier_api.families import FamilyFacts
from atelier_api.options import unused_objective
from atelier_api.v1alpha1.objective import Objective as ObjectiveSpec
from atelier_runtime.objectives.diffusion import DiffusionObjective
from atelier_runtime.objectives.flow import FlowObjective
from atelier_runtime.objectives.objective import Objective, Prepared
from atelier_runtime.objectives.timesteps import resolve_shift
from atelier_runtime.objectives.twin_flow import TwinFlowObjective

__all__ = ["Objective", "Prepared", "build_objective"]


def build_objective(spec: ObjectiveSpec, facts: FamilyFacts, scheduler_config: Mapping[str, Any]) -> Objective:
    """The objective of a run. `scheduler_config` is the checkpoint's `scheduler/scheduler_config.json`.

    Raises ConfigError for an option that does not fit the family's kind or the checkpoint.
    """
    for problem in unused_objective(spec, facts):
        raise ConfigError(problem.message)
    if facts.objective == "flow":
        config = {} if facts.own_shift else scheduler_config
        kind = FlowObjective if spec.twin_flow is None else TwinFlowObjective
        return kind(spec, resolve_shift(spec.timesteps.shift, config, facts.shift))
    return DiffusionObjective(spec, facts, scheduler_config)
