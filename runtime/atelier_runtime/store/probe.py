"""What a store can do, found out with a few small objects under `probe/` at the start of every attempt.

Nothing rests on the answers but the checks that a store leaves to us: see `S3Store`.
"""

import hashlib
import logging
import secrets
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from atelier_api.errors import RunError, StoreError
from atelier_runtime.store.protocol import Store

if TYPE_CHECKING:
    from atelier_runtime.store.s3 import S3Store

log = logging.getLogger(__name__)

_TEXT = b"nine byte"


@dataclass(frozen=True)
class Capabilities:
    """What was found. A folder on disk needs no checksums: `none`."""

    checksums: Literal["auto", "required-only", "none"]
    """`auto`: the client's default checksums are accepted too."""
    conditional_write: Literal["enforced", "ignored", "refused"]
    """`If-None-Match: *` on a key that exists."""
    payload_check: Literal["yes", "no"]
    """Whether a body that does not match its signed SHA-256 is refused."""
    etag: Literal["md5", "other"]
    list_after_write: Literal["yes", "no"]

    def as_dict(self) -> dict[str, str]:
        """For the manifest and for metrics labels."""
        return asdict(self)


def probe(store: Store) -> Capabilities:
    """Write, read, list and delete small objects, and give what the store can do; an S3 store is told what it must do itself.

    Raises CredentialsError or StoreError where the store cannot be used at all.
    """
    from atelier_runtime.store.local import LocalStore

    folder = f"probe/{secrets.token_hex(8)}"
    plain = f"{folder}/plain"
    try:
        store.put_bytes(plain, _TEXT)
        if store.get_bytes(plain) != _TEXT:
            raise StoreError(f"{store.uri} gave back other bytes than were written to it")
        listed = any(info.key == plain and info.size == len(_TEXT) for info in store.list(folder))
        listing: Literal["yes", "no"] = "yes" if listed else "no"
        if isinstance(store, LocalStore):
            found = Capabilities("none", "enforced", "yes", "other", listing)
        else:
            found = _probe_s3(_as_s3(store), folder, listing)
    finally:
        _clean_up(store, folder)
    log.info("store probed", extra={"store": store.uri, **found.as_dict()})
    return found


def _as_s3(store: Store) -> "S3Store":
    from atelier_runtime.store.s3 import S3Store

    if not isinstance(store, S3Store):
        raise TypeError(f"cannot probe a {type(store).__name__}")
    return store


def _probe_s3(store: "S3Store", folder: str, listing: Literal["yes", "no"]) -> Capabilities:
    checksums: Literal["auto", "required-only"] = "auto" if _default_checksums_work(store, folder) else "required-only"
    conditional = _conditional_write(store, folder)
    checked: Literal["yes", "no"] = "yes" if _damaged_payload_is_refused(store, folder) else "no"
    etag: Literal["md5", "other"] = "md5" if _etag_is_md5(store, folder) else "other"
    store.conditional_writes = conditional
    store.compare_etag = checked == "no" and etag == "md5"
    return Capabilities(checksums, conditional, checked, etag, listing)


def _default_checksums_work(store: "S3Store", folder: str) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError

    client = store.make_client("when_supported")
    key = store.full_key(f"{folder}/checksums")
    try:
        client.put_object(Bucket=store.bucket, Key=key, Body=_TEXT)
        return client.get_object(Bucket=store.bucket, Key=key)["Body"].read() == _TEXT
    except (BotoCoreError, ClientError):
        return False


def _conditional_write(store: "S3Store", folder: str) -> Literal["enforced", "ignored", "refused"]:
    from botocore.exceptions import ClientError

    client = store.make_client()
    key = store.full_key(f"{folder}/conditional")
    try:
        client.put_object(Bucket=store.bucket, Key=key, Body=_TEXT, IfNoneMatch="*")
    except ClientError:
        return "refused"
    try:
        client.put_object(Bucket=store.bucket, Key=key, Body=b"other", IfNoneMatch="*")
    except ClientError as error:
        return "enforced" if error.response["ResponseMetadata"]["HTTPStatusCode"] in (409, 412) else "refused"
    return "ignored"


def _damaged_payload_is_refused(store: "S3Store", folder: str) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError

    client = store.make_client()

    def damage(request: Any, **_: object) -> None:
        request.body = bytes(reversed(_TEXT))  # after signing

    client.meta.events.register("before-send.s3.PutObject", damage)
    try:
        client.put_object(Bucket=store.bucket, Key=store.full_key(f"{folder}/damaged"), Body=_TEXT)
    except (BotoCoreError, ClientError):
        return True
    return False


def _etag_is_md5(store: "S3Store", folder: str) -> bool:
    reply = store.make_client().head_object(Bucket=store.bucket, Key=store.full_key(f"{folder}/plain"))
    return reply["ETag"].strip('"') == hashlib.md5(_TEXT, usedforsecurity=False).hexdigest()


def _clean_up(store: Store, folder: str) -> None:
    try:
        store.delete([info.key for info in store.list(folder)])
    except RunError:
        log.warning("probe objects left behind", extra={"store": store.uri, "folder": folder})
