"""What is trained beside the objective: one module for each technique, none of which the trainer knows by name."""

from collections.abc import Iterator, Mapping

from torch import nn

from atelier_api.v1alpha1.techniques import Techniques
from atelier_runtime.family import Family
from atelier_runtime.techniques.layer_sync import LayerSync
from atelier_runtime.techniques.technique import Pass, Technique

__all__ = ["Pass", "Technique", "build_techniques"]


def build_techniques(spec: Techniques, family: Family, denoisers: Mapping[str, nn.Module]) -> tuple[Technique, ...]:
    """The techniques of a run, looking at its `denoisers` as diffusers has them, in the order of the spec.

    Raises ConfigError for what does not fit the checkpoint.
    """
    return tuple(_built(spec, family, denoisers))


def _built(spec: Techniques, family: Family, denoisers: Mapping[str, nn.Module]) -> Iterator[Technique]:
    if spec.layer_sync is not None:
        yield LayerSync(spec.layer_sync, family, denoisers)
