"""Sliders, and adapters at a strength: what the fields of a run must be to each other. Pure; the same as CEL is in `cel`."""

from collections.abc import Iterator

from atelier_api.problem import Problem, refused
from atelier_api.v1alpha1 import TrainingRunSpec
from atelier_api.v1alpha1.adapter import Adapter, LayerAdapter, has_strength, is_slider
from atelier_api.v1alpha1.data import DataSource

NEEDED = "needs a source with spec.data.sources[].sliderStrength above or below 0, best one of each"
NORMS = "not with spec.adapter.dora, whose trained norms stay as they are at any strength, also at 0; set one to false"


def strength_of(source: DataSource, adapter: Adapter) -> float:
    """What the adapter's update is multiplied by for the samples of a source: 1 where the adapter is no slider."""
    return (source.slider_strength or 0.0) if is_slider(adapter) else 1.0


def slider_rules(spec: TrainingRunSpec) -> Iterator[Problem]:
    """The rules of sliders and strengths that the run breaks."""
    adapter, sources = spec.adapter, spec.data.sources
    if is_slider(adapter) and not has_strength(adapter):
        yield refused("spec.adapter.slider", True, NORMS)
    if is_slider(adapter) and not any(strength_of(source, adapter) for source in sources):
        yield refused("spec.adapter.slider", True, NEEDED)
    for index, source in enumerate(sources):
        if source.slider_strength is not None and not is_slider(adapter):
            way = "; set spec.adapter.slider to true, or remove it"
            if not isinstance(adapter, LayerAdapter):
                way = f", which adapter type {adapter.type} cannot be; remove it"
            path = f"spec.data.sources[{index}].sliderStrength"
            yield refused(path, source.slider_strength, f"only for a slider{way}")
    for index, prompt in enumerate(spec.validation.prompts):
        if prompt.adapter_strength is not None and not has_strength(adapter):
            dora = " with dora" if isinstance(adapter, LayerAdapter) else ""
            allowed = f"the update of adapter type {adapter.type}{dora} is multiplied by no number; remove it"
            yield refused(f"spec.validation.prompts[{index}].adapterStrength", prompt.adapter_strength, allowed)


def slider_notes(spec: TrainingRunSpec) -> list[str]:
    """What had better be otherwise in the sources of a slider."""
    if not is_slider(spec.adapter):
        return []
    strengths = [strength_of(source, spec.adapter) for source in spec.data.sources]
    found = []
    for side, missing in (("below", min(strengths) >= 0), ("above", max(strengths) <= 0)):
        if missing:
            found.append(
                f"spec.data.sources: none has a sliderStrength {side} 0; the slider learns one end, and is only hoped to do "
                "the opposite at the other"
            )
    return found + [
        f"spec.data.sources[{index}]: without a sliderStrength, or with 0, its steps see the base alone and train nothing"
        for index, strength in enumerate(strengths)
        if strength == 0
    ]
