"""Errors that stop a run, by whose they are.

    RunError                 carries the agent's exit code
    ├── UserError            the user's mistake: what, the value, what is allowed, where to change it
    │   ├── ConfigError      64
    │   ├── DataError        65
    │   ├── CredentialsError 77
    │   └── DivergedError    81
    └── StoreError           69: the world's weather, another attempt may succeed

Anything else is a bug of ours and exits with 70.
"""

from collections.abc import Sequence

from atelier_api.exit_codes import ExitCode


class RunError(Exception):
    """An error with an exit code. `str(error)` is one clear sentence for the user."""

    exit_code = ExitCode.INTERNAL


class UserError(RunError):
    """The user can mend it."""


class ConfigError(UserError):
    exit_code = ExitCode.CONFIG


class DataError(UserError):
    exit_code = ExitCode.DATA


class CredentialsError(UserError):
    exit_code = ExitCode.CREDENTIALS


class DivergedError(UserError):
    """The loss is not finite. `step` is the one whose loss it was, `files` are this process's samples in it."""

    exit_code = ExitCode.DIVERGED

    def __init__(self, message: str, *, step: int | None = None, files: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.step = step
        self.files = tuple(files)


class StoreError(RunError):
    exit_code = ExitCode.STORE_UNREACHABLE
