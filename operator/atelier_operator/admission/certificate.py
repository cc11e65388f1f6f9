"""The server's certificate, as files that may be replaced at any time: by the kubelet, for a Secret that has changed.

A new pair is tried in a context of its own and handed to new connections only when it works, so one that is half written changes
nothing. Connections that are open keep theirs.
"""

import asyncio
import hashlib
import logging
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

log = logging.getLogger(__name__)

CERTIFICATE, KEY = "tls.crt", "tls.key"  # the names that a Secret of type kubernetes.io/tls has
LOOK_SECONDS = 5.0


class ServerCertificate:
    """`context` is the server's for as long as it lives; `taken` is told when each certificate that is taken ends."""

    def __init__(self, folder: Path, taken: Callable[[float], None]) -> None:
        self._folder = folder
        self._taken = taken
        self._current: ssl.SSLContext | None = None
        self._digest = b""
        self._said = ""
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.sni_callback = self._choose  # also called for clients that send no name

    def look(self) -> bool:
        """Take the files if they are new and fit together; whether that was so."""
        paths = self._folder / CERTIFICATE, self._folder / KEY
        try:
            digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).digest()
            if digest == self._digest:
                return False
            fresh = _loaded(*paths)
            expiry = expires(paths[0].read_text("ascii"))
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            self._say(f"{error}")
            return False
        self._digest, self._current, self._said = digest, fresh, ""
        self._taken(expiry.timestamp())
        log.info("the webhook's certificate is taken; it ends %s", expiry.isoformat())
        return True

    async def follow(self) -> None:
        """Look for ever."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_SECONDS)

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> int | None:
        if self._current is None:
            return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR
        connection.context = self._current
        return None

    def _say(self, problem: str) -> None:
        """Once for each problem."""
        if problem != self._said:
            self._said = problem
            kept = "the one before is served" if self._current else "until there is one, runs are let in unchecked"
            log.warning("no certificate for the webhook in %s (%s); %s", self._folder, problem, kept)


def _loaded(certificate: Path, key: Path) -> ssl.SSLContext:
    """Raises ssl.SSLError for a pair that does not fit together. The password: an encrypted key would ask for one on the terminal."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key, password="")
    return context


def expires(pem: str) -> datetime:
    """The end of the first certificate's validity (RFC 5280, 4.1). Raises ValueError where there is none."""
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    body = pem.partition(begin)[2].partition(end)[0]
    try:
        fields = _parts(_parts(_parts(ssl.PEM_cert_to_DER_cert(f"{begin}{body}{end}"))[0][1])[0][1])
        version = 1 if fields[0][0] == 0xA0 else 0  # optional, before serial number, algorithm, issuer, validity
        tag, text = _parts(fields[version + 3][1])[1]
    except IndexError:
        raise ValueError("the certificate has no validity") from None
    digits = text.decode("ascii")
    if tag == 0x17:  # UTCTime, of the years 1950 to 2049
        digits = f"{'19' if digits[:2] >= '50' else '20'}{digits}"
    return datetime.strptime(digits, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


def _parts(der: bytes) -> list[tuple[int, bytes]]:
    """Tags and contents of the values in a DER sequence."""
    found, place = [], 0
    while place + 2 <= len(der):
        tag, length, place = der[place], der[place + 1], place + 2
        if length & 0x80:
            size = length & 0x7F
            length, place = int.from_bytes(der[place : place + size], "big"), place + size
        found.append((tag, der[place : place + length]))
        place += length
    return found
