"""The terminal facts: they fit into what a kubelet keeps of them."""

import pytest

from atelier_api.exit_codes import ExitCode
from atelier_api.progress import ArtifactReport
from atelier_api.result import LARGEST_MESSAGE_BYTES, AgentResult, shorten


def result(artifacts: int, message: str = "") -> AgentResult:
    made = [
        ArtifactReport(
            format="diffusers",
            key=f"exports/diffusers/transformer/{n:05d}.safetensors",
            size_bytes=1 << 33,
            sha256="ab" * 32,
        )
        for n in range(artifacts)
    ]
    done = ExitCode.DONE
    return AgentResult(exit_code=done, reason="Completed", message=message, attempt="1.0", time=1.0, artifacts=made)


@pytest.mark.parametrize("artifacts", [0, 1, 2, 300])
@pytest.mark.parametrize("message", ["", "é" * 2000], ids=["short", "long"])
def test_a_termination_message_fits_and_loses_nothing_but_artifacts(artifacts: int, message: str) -> None:
    whole = result(artifacts, shorten(message))
    text = whole.message_bytes()
    assert len(text) <= LARGEST_MESSAGE_BYTES
    read = AgentResult.model_validate_json(text)
    assert read.model_copy(update={"artifacts": []}) == whole.model_copy(update={"artifacts": []})
    assert read.artifacts == whole.artifacts[: len(read.artifacts)]
    assert len(read.artifacts) >= min(artifacts, 6)
