"""The profile that a run names. Pure."""

from collections.abc import Callable, Mapping
from typing import Any

from atelier_api.v1alpha1.profile import TrainingProfileSpec
from atelier_operator.observed import Raw, Run, read_profile

KINDS = ("ClusterTrainingProfile", "TrainingProfile")

Find = Callable[[str, str, str], Raw | None]
"""The profile of a kind, seen from a namespace, by its name; None when there is none."""


def profile_reference(spec: Any) -> tuple[str, str]:
    """Kind and name of the profile that a spec names, however broken the spec is; no name that exists where it names none."""
    named = spec.get("profileRef") if isinstance(spec, Mapping) else None
    fields = named if isinstance(named, Mapping) else {}
    kind, name = fields.get("kind", KINDS[0]), fields.get("name", "default")
    return (kind, name) if kind in KINDS and isinstance(name, str) else (KINDS[0], "")


def profile_of(run: Run, find: Find) -> tuple[TrainingProfileSpec | None, str]:
    """The profile of a run, or why one that exists cannot be used."""
    kind, name = profile_reference(run.document.get("spec"))
    raw = find(kind, run.namespace, name)
    return (None, "") if raw is None else read_profile(raw)
