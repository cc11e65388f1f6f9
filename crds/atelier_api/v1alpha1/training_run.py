"""`TrainingRun`: one fine-tune."""

from typing import Literal

from pydantic import Field

from atelier_api.v1alpha1.adapter import Adapter, LoraAdapter
from atelier_api.v1alpha1.base import Block
from atelier_api.v1alpha1.data import Data
from atelier_api.v1alpha1.hyperparameters import Hyperparameters
from atelier_api.v1alpha1.model import ModelSpec
from atelier_api.v1alpha1.objective import Objective
from atelier_api.v1alpha1.parallelism import Parallelism
from atelier_api.v1alpha1.references import ProfileRef
from atelier_api.v1alpha1.schedule import Retry, Schedule
from atelier_api.v1alpha1.storage import Storage
from atelier_api.v1alpha1.techniques import Techniques
from atelier_api.v1alpha1.validation import Publish, Validation


class Metadata(Block):
    """Name and namespace. Other Kubernetes metadata is accepted by the API server, not by the command line."""

    name: str = Field(
        min_length=1,
        max_length=40,
        pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$",
        description="Name of the run (DNS-1035, at most 40 characters).",
    )
    namespace: str = Field(
        default="default",
        min_length=1,
        max_length=63,
        pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
        description="Namespace.",
    )
    labels: dict[str, str] = Field(default={}, description="Labels.")
    annotations: dict[str, str] = Field(default={}, description="Annotations.")


class TrainingRunSpec(Block):
    """What to train, on what, how, and where the result goes."""

    profile_ref: ProfileRef = Field(
        default_factory=ProfileRef, description="On a cluster: the profile that says how runs are executed."
    )
    model: ModelSpec = Field(description="Base model.")
    adapter: Adapter = Field(default_factory=LoraAdapter, description="What is trained.")
    data: Data = Field(description="Training data.")
    objective: Objective = Field(default_factory=Objective, description="Objective and loss.")
    techniques: Techniques = Field(default_factory=Techniques, description="What is trained beside the objective.")
    hyperparameters: Hyperparameters = Field(description="Numbers of the training loop.")
    parallelism: Parallelism = Field(default_factory=Parallelism, description="Processes and strategy.")
    storage: Storage = Field(default_factory=Storage, description="Store of the run.")
    validation: Validation = Field(default_factory=Validation, description="Samples while training.")
    publish: Publish = Field(default_factory=Publish, description="Exports.")
    schedule: Schedule = Field(default_factory=Schedule, description="Time limits.")
    retry: Retry = Field(default_factory=Retry, description="Restarts.")


class TrainingRun(Block):
    """One fine-tune."""

    api_version: Literal["atelier.dev/v1alpha1"] = Field(description="Version of this API.")
    kind: Literal["TrainingRun"] = Field(description="Kind.")
    metadata: Metadata = Field(description="Name and namespace.")
    spec: TrainingRunSpec = Field(description="What to train.")
