"""The rules of `spec.objective.twinFlow` as CEL, for the CRD. Their twins are in `few_steps`."""

from collections.abc import Iterator

from atelier_api.cel_rule import CelRule, literal
from atelier_api.families import FAMILIES
from atelier_api.few_steps import (
    AVERAGE,
    NO_TWIN,
    ONE_NETWORK,
    ONE_STRENGTH,
    OWN_LOSS,
    OWN_STEPS,
    WHOLE_AVERAGE,
)
from atelier_api.v1alpha1.parallelism import DEEPSPEED


def few_step_rules() -> Iterator[CelRule]:
    """Rules between `twinFlow` and other fields, and to the family."""
    off = "!has(self.objective.twinFlow)"
    unnegated = "self.validation.prompts.all(prompt, !has(prompt.negative) || prompt.negative == '')"
    twin = "self.objective.twinFlow"
    for field, rule, message in (
        ("objective.twinFlow.rectifyWeight", f"{twin}.adversarial || double({twin}.rectifyWeight) == 0.0", NO_TWIN),
        ("hyperparameters.ema", "has(self.hyperparameters.ema)", AVERAGE),
        ("objective.loss", "self.objective.loss == 'l2'", OWN_LOSS),
        ("adapter.slider", "!has(self.adapter.slider) || !self.adapter.slider", ONE_STRENGTH),
        ("parallelism.strategy", f"!(self.parallelism.strategy in {literal(list(DEEPSPEED))})", WHOLE_AVERAGE),
        ("validation.steps", "!has(self.validation.steps)", OWN_STEPS),
        ("validation.guidance", "!has(self.validation.guidance)", OWN_STEPS),
        ("validation.prompts", unnegated, OWN_STEPS),
    ):
        yield CelRule(field, f"{off} || {rule}", message)
    for name, facts in FAMILIES.items():
        several = [flavour.name for flavour in facts.flavours if flavour.experts > 1]
        if several:
            named = (
                f"self.model.family == '{name}' && has(self.model.flavour) && self.model.flavour in {literal(several)}"
            )
            yield CelRule("model.flavour", f"{off} || !({named})", f"has several networks, and {ONE_NETWORK}")
