"""`spec.objective.twinFlow`: what the fields of a run must be to it. Pure; the same as CEL is in `cel_few_steps`."""

from collections.abc import Iterator

from atelier_api.families import FamilyFacts
from atelier_api.problem import Problem, refused, shown
from atelier_api.v1alpha1 import TrainingRunSpec
from atelier_api.v1alpha1.adapter import is_slider
from atelier_api.v1alpha1.parallelism import DEEPSPEED

ON = "spec.objective.twinFlow"
AVERAGE = f"{ON} needs it, as the moving average is the teacher; set it, {{}} is enough"
OWN_LOSS = f"must be l2: {ON} has a loss of its own"
ONE_STRENGTH = f"not with {ON}, whose teacher is the same adapter at one strength; set one of them off"
WHOLE_AVERAGE = f"keeps the moving average where a pass cannot take it, and {ON} learns from that; set ddp or fsdp2"
NO_TWIN = "must be 0 without adversarial: it compares with what the network has learnt at negative times, which is then nothing"
OWN_STEPS = f"samples of {ON} are drawn in its sampleSteps steps without guidance; remove it"

ONE_NETWORK = f"{ON} trains one network that knows all noise levels, as a step goes from noise to the picture"


def few_step_rules(spec: TrainingRunSpec) -> Iterator[Problem]:
    """The rules between `twinFlow` and other fields that the run breaks."""
    if spec.objective.twin_flow is None:
        return
    twin = spec.objective.twin_flow
    if twin.rectify_weight and not twin.adversarial:
        yield refused(f"{ON}.rectifyWeight", twin.rectify_weight, NO_TWIN)
    if spec.hyperparameters.ema is None:
        yield refused("spec.hyperparameters.ema", None, AVERAGE)
    if spec.objective.loss != "l2":
        yield refused("spec.objective.loss", spec.objective.loss, OWN_LOSS)
    if is_slider(spec.adapter):
        yield refused("spec.adapter.slider", True, ONE_STRENGTH)
    if spec.parallelism.strategy in DEEPSPEED:
        yield refused("spec.parallelism.strategy", spec.parallelism.strategy, WHOLE_AVERAGE)
    for name, value in (("steps", spec.validation.steps), ("guidance", spec.validation.guidance)):
        if value is not None:
            yield refused(f"spec.validation.{name}", value, OWN_STEPS)
    for index, prompt in enumerate(spec.validation.prompts):
        if prompt.negative:
            yield refused(f"spec.validation.prompts[{index}].negative", prompt.negative, OWN_STEPS)


def few_step_family_rules(spec: TrainingRunSpec, facts: FamilyFacts) -> Iterator[Problem]:
    """The problem of a flavour that is not trained to draw in few steps."""
    if spec.objective.twin_flow is None:
        return
    experts = {flavour.name: flavour.experts for flavour in facts.flavours}
    if spec.model.flavour is not None and experts.get(spec.model.flavour, 1) > 1:
        others = ", ".join(name for name, count in experts.items() if count == 1)
        allowed = f"has {experts[spec.model.flavour]} networks, and {ONE_NETWORK}; name one of {others}, or remove {ON}"
        yield refused("spec.model.flavour", spec.model.flavour, allowed)


def checkpoint_refusal(source: str, networks: int) -> str:
    """What is wrong with a checkpoint whose `networks` share the noise levels, for who has seen it."""
    allowed = f"has {networks} networks, and {ONE_NETWORK}; name a checkpoint of one, or remove {ON}"
    return f"spec.model.source is {shown(source)}; {allowed}"
