"""Which attempt of a run may write: each one puts its number under `attempts/`, and one that sees a newer number stops.

An attempt is `<n>.<k>`: n made by the operator, k counts restarts inside it. A restart that was given a number which is taken
already (the agent restarts processes without telling the operator) takes the next free k.
"""

import json
import re
import secrets
import socket

from atelier_api.errors import ConfigError
from atelier_runtime.store import Store

ATTEMPTS = "attempts/"
_NAME = re.compile(r"attempts/(\d+)\.(\d+)\.json")

Number = tuple[int, int]


def parse_attempt(attempt: str) -> Number:
    """`2.1` as (2, 1)."""
    number, _, restart = attempt.partition(".")
    return int(number), int(restart)


def known_attempts(store: Store) -> list[Number]:
    """Numbers of all attempts that ever wrote to this run, ascending."""
    matches = (_NAME.fullmatch(info.key) for info in store.list(ATTEMPTS))
    return sorted((int(match[1]), int(match[2])) for match in matches if match)


def claim_attempt(store: Store, wanted: str) -> str:
    """The number under which this process group writes: `wanted`, or the next free restart of it.

    Raises ConfigError when a newer attempt of the run has written already.
    """
    number, restart = parse_attempt(wanted)
    taken = known_attempts(store)
    if taken and taken[-1][0] > number:
        raise ConfigError(
            f"attempt {wanted} of the run starts although attempt {taken[-1][0]}.{taken[-1][1]} has written to {store.uri}; "
            "only the newest attempt may write"
        )
    restart = max([restart, *(k + 1 for n, k in taken if n == number)])
    note = json.dumps({"host": socket.gethostname(), "token": secrets.token_hex(8)}).encode()
    while not store.put_bytes(f"{ATTEMPTS}{number}.{restart}.json", note, if_absent=True):
        restart += 1
    return f"{number}.{restart}"


def is_newest(store: Store, attempt: str) -> bool:
    """Whether no newer attempt has claimed the run."""
    taken = known_attempts(store)
    return not taken or taken[-1] <= parse_attempt(attempt)
