"""What an error of the hub means: whose it is, and one sentence that says where to change what."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from atelier_api.errors import ConfigError, CredentialsError, RunError, StoreError
from atelier_runtime.fetching.transfer import disk_error


@dataclass(frozen=True)
class Repository:
    """An `hf://` source."""

    source: str
    name: str
    revision: str

    def __str__(self) -> str:
        return f"spec.model.source {self.source!r}, revision {self.revision!r},"

    @property
    def revision_field(self) -> str:
        """The field that names the revision."""
        return "spec.model.source" if "@" in self.source else "spec.model.revision"


@contextmanager
def hub_errors(what: Repository, cache: Path) -> Iterator[None]:
    """Turn errors of the hub, the network and the disk into ours."""
    try:
        yield
    except RunError:
        raise
    except (HfHubHTTPError, OfflineModeIsEnabled, HFValidationError, httpx2.HTTPError) as error:
        raise translate(error, what) from error
    except OSError as error:
        if error.errno is None:  # the library's own, about what arrived
            raise StoreError(f"fetching {what.source} failed: {error}; run again to go on") from error
        raise disk_error(error, cache) from error


def translate(error: Exception, what: Repository) -> RunError:
    """The error that the user sees."""
    hub, given = constants.ENDPOINT, f"spec.model.source is {what.source!r}"
    token = "the token in use" if get_token() else "HF_TOKEN is not set; without it the hub"
    match error:
        case GatedRepoError():
            return CredentialsError(
                f"{given}, which is gated: accept the licence on {hub}/{what.name} and set HF_TOKEN to a token of that account "
                f"({'HF_TOKEN has no access' if os.environ.get('HF_TOKEN') else 'HF_TOKEN is not set'})"
            )
        case RepositoryNotFoundError():
            return ConfigError(f"{given}; {hub} has no such model, or it is private: {token} does not see it")
        case RevisionNotFoundError():
            return ConfigError(
                f"{what.revision_field} names the revision {what.revision!r}; {what.name} has no such branch, tag or commit"
            )
        case HFValidationError():
            return ConfigError(f"{given}, which the hub refuses: {error}")
        case OfflineModeIsEnabled():
            return ConfigError(
                f"{given}, revision {what.revision!r}, which is not whole on this machine, and HF_HUB_OFFLINE forbids to fetch it; "
                f"unset it, or run `hf download {what.name} --revision {what.revision}` where there is a network"
            )
        case HfHubHTTPError():
            return _refused(error, what)
    return StoreError(
        f"cannot reach the hub at {hub} for {what.source}: {str(error) or type(error).__name__}; what has been fetched stays, "
        "run again to go on"
    )


def _refused(error: HfHubHTTPError, what: Repository) -> RunError:
    status = error.response.status_code
    if status in (401, 403):
        return CredentialsError(
            f"the hub at {constants.ENDPOINT} refused {what.source} ({status}); check HF_TOKEN and what its account may read"
        )
    return StoreError(f"the hub at {constants.ENDPOINT} failed on {what.source} ({status}); run again to go on")
