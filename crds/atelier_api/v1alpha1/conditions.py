"""The conditions of a run: the contract for programs, as `phase` is for people."""

from enum import StrEnum
from typing import Literal

from pydantic import Field

from atelier_api.v1alpha1.base import Block


class ConditionType(StrEnum):
    """What is said of a run, each in its own condition."""

    ACCEPTED = "Accepted"
    FITS = "Fits"
    ADMITTED = "Admitted"
    SCHEDULED = "Scheduled"
    RUNNING = "Running"
    CHECKPOINTED = "Checkpointed"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class Reason(StrEnum):
    """Every reason that a condition can have. Reasons of failed runs are those of the exit codes as well."""

    VALID = "Valid"
    INVALID_SPEC = "InvalidSpec"
    PROFILE_NOT_FOUND = "ProfileNotFound"
    NOT_PERMITTED = "NotPermitted"
    NAME_TAKEN = "NameTaken"
    SPEC_DRIFT = "SpecDrift"

    PREDICTED = "Predicted"
    DOES_NOT_FIT = "DoesNotFit"
    UNKNOWN = "Unknown"

    QUOTA_RESERVED = "QuotaReserved"
    WAITING_FOR_QUOTA = "WaitingForQuota"
    EXCEEDS_MAX_QUOTA = "ExceedsMaxQuota"
    NO_QUEUE = "NoQueue"
    NOT_QUEUED = "NotQueued"
    PENDING = "Pending"

    BOUND = "Bound"
    GANG_PENDING = "GangPending"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL = "ImagePull"
    CONTAINER_NOT_CREATED = "ContainerNotCreated"

    TRAINING = "Training"
    STARTING = "Starting"
    RESTARTING = "Restarting"
    ENDED = "Ended"

    COMMITTED = "Committed"
    NONE = "None"

    REQUESTED = "Requested"
    PREEMPTED = "Preempted"
    STOPPING = "Stopping"
    ACTIVE = "Active"

    COMPLETED = "Completed"
    MAX_RESTARTS = "MaxRestarts"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    START_TIMEOUT = "StartTimeout"
    INVALID_CONFIG = "InvalidConfig"
    DATA_ERROR = "DataError"
    CREDENTIALS_REJECTED = "CredentialsRejected"
    OUT_OF_MEMORY = "OutOfMemory"
    DIVERGED = "Diverged"
    BACKEND_ERROR = "BackendError"
    STORE_UNREACHABLE = "StoreUnreachable"
    COLLECTIVE_TIMEOUT = "CollectiveTimeout"
    GPU_FAULT = "GpuFault"
    STOPPED = "Stopped"
    DELETED = "Deleted"
    NODE_LOST = "NodeLost"
    GANG_TORN = "GangTorn"


class Condition(Block):
    """One condition, as in metav1."""

    type: str = Field(max_length=63, description="What is said.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: str = Field(max_length=63, description="Why, one word.")
    message: str = Field(default="", max_length=4096, description="Why, for people.")
    observed_generation: int = Field(default=0, ge=0, description="Generation of the spec that it is about.")
    last_transition_time: str = Field(max_length=63, description="When its status changed.")
