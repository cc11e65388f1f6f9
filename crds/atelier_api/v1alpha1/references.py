"""References to other objects of the cluster. `atelier run` on one machine takes credentials from its environment instead."""

from typing import Literal

from pydantic import Field

from atelier_api.v1alpha1.base import Block

OBJECT_NAME = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
"""Name of a Kubernetes object (DNS-1123 subdomain)."""


class SecretRef(Block):
    """A Secret of the run's namespace. It is only named in the pods: the operator never reads it."""

    name: str = Field(min_length=1, max_length=253, pattern=OBJECT_NAME, description="Name of the Secret.")


class ProfileRef(Block):
    """The profile that says how runs are executed on the cluster."""

    kind: Literal["ClusterTrainingProfile", "TrainingProfile"] = Field(
        default="ClusterTrainingProfile", description="`TrainingProfile`: one of the run's own namespace."
    )
    name: str = Field(
        default="default", min_length=1, max_length=63, pattern=OBJECT_NAME, description="Name of the profile."
    )
