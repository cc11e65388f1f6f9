"""Exit codes of the agent, and what each means for the run. One table, read by the agent, the command line and the operator."""

from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit code of the agent (PID 1 of a node). Never 0 after SIGTERM."""

    DONE = 0
    CONFIG = 64
    DATA = 65
    STORE_UNREACHABLE = 69
    INTERNAL = 70
    STOPPED = 75
    CREDENTIALS = 77
    OUT_OF_MEMORY = 80
    DIVERGED = 81
    COLLECTIVE_TIMEOUT = 82
    GPU_FAULT = 83


@dataclass(frozen=True)
class Meaning:
    """What an exit code says. `restart`: another attempt from the newest checkpoint may succeed."""

    reason: str
    restart: bool
    text: str


MEANINGS: dict[ExitCode, Meaning] = {
    ExitCode.DONE: Meaning("Completed", False, "the run is done"),
    ExitCode.CONFIG: Meaning("InvalidConfig", False, "the run's settings cannot work"),
    ExitCode.DATA: Meaning("DataError", False, "the training data cannot be used"),
    ExitCode.STORE_UNREACHABLE: Meaning(
        "StoreUnreachable", True, "the store, or the hub, did not answer within the budget"
    ),
    ExitCode.INTERNAL: Meaning("BackendError", True, "a process failed or was lost"),
    ExitCode.STOPPED: Meaning("Stopped", False, "stopped on request, with a checkpoint"),
    ExitCode.CREDENTIALS: Meaning(
        "CredentialsRejected", False, "the store, or the hub, refused the credentials, or there are none"
    ),
    ExitCode.OUT_OF_MEMORY: Meaning("OutOfMemory", False, "the device ran out of memory"),
    ExitCode.DIVERGED: Meaning("Diverged", False, "the loss is not finite"),
    ExitCode.COLLECTIVE_TIMEOUT: Meaning("CollectiveTimeout", True, "processes lost each other"),
    ExitCode.GPU_FAULT: Meaning("GpuFault", True, "a GPU failed"),
}
