"""The result of an attempt: terminal facts that the agent leaves for the operator (termination message) and the command line."""

from pydantic import Field

from atelier_api.exit_codes import ExitCode
from atelier_api.progress import ArtifactReport
from atelier_api.v1alpha1.base import Block

LARGEST_MESSAGE_BYTES = 4096
"""The kubelet cuts a termination message there."""


class AgentResult(Block):
    """Why one node's agent left. Fits into the 4096 bytes of a container's termination message."""

    exit_code: ExitCode
    reason: str = Field(description="From the closed set of reasons: the exit code's, or DeadlineExceeded.")
    message: str = Field(description="One sentence for people, at most 2000 bytes.")
    attempt: str
    time: float = Field(
        description="Unix time of the cause, or of the end where nothing failed. Orders the results of several nodes."
    )
    step: int | None = None
    rank: int | None = Field(default=None, description="The rank whose failure decided; none when nothing failed.")
    checkpoint_step: int | None = Field(
        default=None, description="Step of the newest committed checkpoint that is known."
    )
    artifacts: list[ArtifactReport] = Field(default=[], description="Published files, as many as find room.")

    def message_bytes(self) -> bytes:
        """The termination message: without the last of the artifacts where there are too many for its size."""
        text = self.model_dump_json(by_alias=True).encode()
        if len(text) <= LARGEST_MESSAGE_BYTES or not self.artifacts:
            return text
        return self.model_copy(update={"artifacts": self.artifacts[:-1]}).message_bytes()


def shorten(text: str, limit_bytes: int = 2000) -> str:
    """The text, cut at a character so that it takes at most `limit_bytes` in UTF-8."""
    data = text.encode()
    if len(data) <= limit_bytes:
        return text
    return data[: limit_bytes - 3].decode(errors="ignore") + "…"
