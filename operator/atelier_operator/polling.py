"""Progress of live runs, asked from the agent of node 0. A pod's answer is not trusted: short, checked, and never followed."""

import asyncio
import logging
import random
from collections.abc import Callable

import aiohttp
from pydantic import ValidationError

from atelier_api.progress import Progress
from atelier_operator.inventory import Key
from atelier_operator.names import AGENT_PORT

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 3.0
LARGEST_BYTES = 64 * 1024
AT_ONCE = 32


class Poller:
    """Asks each watched run about every `seconds`, and tells `changed` when there is an answer."""

    def __init__(self, seconds: float, changed: Callable[[Key], None], port: int = AGENT_PORT) -> None:
        self._seconds = seconds
        self._changed = changed
        self._port = port
        self._addresses: dict[Key, tuple[str, str]] = {}
        self._latest: dict[Key, tuple[str, Progress]] = {}
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._session: aiohttp.ClientSession | None = None

    def watch(self, key: Key, life: str, address: str | None) -> None:
        """Ask the run at an address; None: it has no node 0 now. `life` tells one life of the pods from another."""
        if address is None:
            self.forget(key, keep_answer=True)
            return
        self._addresses[key] = (life, address)
        if key not in self._tasks:
            self._tasks[key] = asyncio.create_task(self._follow(key))

    def forget(self, key: Key, *, keep_answer: bool = False) -> None:
        """Ask the run no more."""
        self._addresses.pop(key, None)
        task = self._tasks.pop(key, None)
        if task is not None:
            task.cancel()
        if not keep_answer:
            self._latest.pop(key, None)

    def latest(self, key: Key, life: str) -> Progress | None:
        """The newest answer of that life of the run."""
        found = self._latest.get(key)
        return found[1] if found is not None and found[0] == life else None

    async def close(self) -> None:
        for key in list(self._tasks):
            self.forget(key)
        if self._session is not None:
            await self._session.close()

    async def _follow(self, key: Key) -> None:
        while key in self._addresses:
            life, address = self._addresses[key]
            async with self._slots:
                answer = await self._ask(address)
            if answer is not None and self._addresses.get(key) == (life, address):
                self._latest[key] = (life, answer)
                self._changed(key)
            await asyncio.sleep(self._seconds * random.uniform(0.9, 1.1) if answer else 1.0)

    async def _ask(self, address: str) -> Progress | None:
        if self._session is None:
            # A compressed answer may unfold to any size, and what one pod sets as a cookie is not for another.
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        host = f"[{address}]" if ":" in address else address
        try:
            async with self._session.get(f"http://{host}:{self._port}/progress", allow_redirects=False) as response:
                if response.status != 200:
                    return None
                data = await response.content.read(LARGEST_BYTES + 1)
                while len(data) <= LARGEST_BYTES and (
                    more := await response.content.read(LARGEST_BYTES + 1 - len(data))
                ):
                    data += more
            if len(data) > LARGEST_BYTES:
                raise ValueError(f"more than {LARGEST_BYTES} bytes")
            return Progress.model_validate_json(data)
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None
        except (ValidationError, ValueError) as error:
            log.warning("a pod's progress is refused", extra={"address": address, "error": str(error)[:200]})
            return None
