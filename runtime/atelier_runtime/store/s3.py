"""An S3-compatible store through boto's client and classic transfers, the only place that makes one.

What is set, and why:

* `preferred_transfer_client="classic"`: the CRT client ignores `endpoint_url` and would send the data to AWS (boto3#4839).
* checksums only where required: many servers refuse trailers over https; payload signing takes their place.
* own `sha256` in each object's metadata, and whole files tried up to five times: the client neither verifies multipart
  downloads nor repeats an upload that arrived damaged.
* the reply of CompleteMultipartUpload can be lost although the object is there: a HEAD answers before anything is repeated.
"""

import functools
import hashlib
import math
import mimetypes
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import botocore.session
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config
from botocore.exceptions import ClientError

from atelier_api.errors import ConfigError, CredentialsError, RunError, StoreError
from atelier_api.v1alpha1.storage import S3Settings
from atelier_runtime.store.byte_counter import ByteCounter
from atelier_runtime.store.protocol import CorruptObject, ObjectInfo, StoreObserver, check_key, sha256_of
from atelier_runtime.store.retry import RetryPolicy
from atelier_runtime.store.s3_errors import (
    CLIENT_ERRORS,
    RENEWABLE,
    Place,
    arrived_damaged,
    code_of,
    is_transient,
    no_credentials,
    translate,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MIB = 1 << 20
PART_BYTES = 16 * MIB
_MAX_PARTS = 9_000  # S3 allows 10,000
_DELETE_THREADS = 8
_ALREADY_THERE = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}

T = TypeVar("T")
Checksums = Literal["when_required", "when_supported"]
Conditional = Literal["enforced", "ignored", "refused"]


class S3Store:
    """Objects below `s3://bucket/prefix`."""

    def __init__(
        self,
        uri: str,
        settings: S3Settings,
        *,
        observer: StoreObserver | None = None,
        retry: RetryPolicy | None = None,
        conditional_writes: Conditional = "enforced",
        compare_etag: bool = False,
    ) -> None:
        """Find credentials; no request is sent. Raises ConfigError, CredentialsError.

        `conditional_writes` and `compare_etag` are what the probe found out: whether `If-None-Match` works, and whether the
        ETag must be compared because the server does not check what arrives.
        """
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise ConfigError(f"spec.storage.uri is {uri!r}; it must be s3://bucket/prefix")
        if settings.ca_bundle is not None and not Path(settings.ca_bundle).is_file():
            raise ConfigError(f"spec.storage.s3.caBundle is {settings.ca_bundle!r}; there is no such file")
        self._uri = uri.rstrip("/")
        self.bucket = bucket
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self.settings = settings
        self.place = Place(bucket, settings.endpoint, settings.region)
        self._observer = observer
        self._retry = retry or RetryPolicy()
        self.conditional_writes: Conditional = conditional_writes
        self.compare_etag = compare_etag
        self._lock = threading.Lock()
        self._client = self.make_client()

    @property
    def uri(self) -> str:
        return self._uri

    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        arguments: dict[str, Any] = {
            "Key": self.full_key(key),
            "Body": data,
            "ContentType": _content_type(key),
            "Metadata": {"sha256": sha256_of(data)},
        }
        if if_absent:
            if self.conditional_writes != "enforced" and self.head(key) is not None:
                return self.get_bytes(key) == data
            if self.conditional_writes != "refused":
                arguments["IfNoneMatch"] = "*"
        try:
            self._with_retries(
                lambda: self._call("PutObject", lambda client: client.put_object(Bucket=self.bucket, **arguments)),
                arrived_damaged,
            )
        except StoreError as error:
            # Either somebody else was first, or the reply to our own first try was lost: the bytes tell.
            if if_absent and code_of(error.__cause__ or error) in _ALREADY_THERE:
                return self.get_bytes(key) == data
            raise
        return True

    def put_file(self, key: str, path: Path, sha256: str, *, move: bool = False) -> None:
        size = path.stat().st_size
        etags = _etags(path, _part_bytes(size)) if self.compare_etag else None

        def upload() -> None:
            try:
                self._call("UploadFile", lambda client: self._upload(client, key, path, sha256))
            except StoreError as error:
                if is_transient(error.__cause__ or error) and self._is_there(key, size, sha256):
                    return
                raise
            if etags is not None and self._etag(key) not in etags:
                raise CorruptObject(f"{key} arrived damaged at {self.place}: its ETag is not the one of {path}")

        self._with_retries(upload)
        if move:
            path.unlink()

    def get_bytes(self, key: str) -> bytes:
        def read() -> bytes:
            reply = self._call("GetObject", lambda client: _read(client, self.bucket, self.full_key(key)))
            data, expected = reply
            if expected is not None and sha256_of(data) != expected:
                raise CorruptObject(f"{key} at {self.place} is damaged: its SHA-256 is not {expected}")
            return data

        return self._with_retries(read)

    def get_file(
        self,
        key: str,
        path: Path,
        *,
        sha256: str | None = None,
        link: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        del link  # nothing to link to
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        counter = None if progress is None else ByteCounter(progress)

        def download() -> None:
            if counter is not None:
                counter.start_over()
            self._call("DownloadFile", lambda client: self._download(client, key, temporary, counter))
            with temporary.open("rb") as file:
                if sha256 is not None and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise CorruptObject(f"{key} at {self.place} is damaged: its SHA-256 is not {sha256}")
            temporary.replace(path)

        try:
            self._with_retries(download)
        finally:
            temporary.unlink(missing_ok=True)

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        def pages(client: "S3Client") -> Sequence[ObjectInfo]:
            found = []
            paginator = client.get_paginator("list_objects_v2")
            for page in paginator.paginate(Bucket=self.bucket, Prefix=self._prefix + prefix):
                for item in page.get("Contents", []):
                    key = item["Key"].removeprefix(self._prefix)
                    if key and not key.endswith("/"):  # some tools make empty objects that stand for folders
                        found.append(ObjectInfo(key, item["Size"], item["LastModified"], item["ETag"].strip('"')))
            return sorted(found, key=lambda info: info.key)

        return self._call("ListObjects", pages)

    def delete(self, keys: Iterable[str]) -> None:
        # One by one: DeleteObjects needs a checksum header that older servers do not know.
        def delete_one(key: str) -> None:
            full = self.full_key(key)
            self._call("DeleteObject", lambda client: client.delete_object(Bucket=self.bucket, Key=full))

        with ThreadPoolExecutor(_DELETE_THREADS) as pool:
            for _ in pool.map(delete_one, keys):
                pass

    def head(self, key: str) -> ObjectInfo | None:
        reply = self._head(key)
        if reply is None:
            return None
        size, etag, sha256 = reply["ContentLength"], reply["ETag"].strip('"'), reply["Metadata"].get("sha256")
        return ObjectInfo(key, size, reply["LastModified"], etag, sha256)

    def now(self) -> datetime:
        reply = self._call("HeadBucket", lambda client: client.head_bucket(Bucket=self.bucket))
        return parsedate_to_datetime(reply["ResponseMetadata"]["HTTPHeaders"]["date"])

    def remove_unfinished(self, older_than_seconds: float) -> int:
        limit = self.now() - timedelta(seconds=older_than_seconds)

        def abort(client: "S3Client") -> int:
            removed = 0
            paginator = client.get_paginator("list_multipart_uploads")
            for page in paginator.paginate(Bucket=self.bucket, Prefix=self._prefix):
                for upload in page.get("Uploads", []):
                    if upload["Initiated"] < limit:
                        client.abort_multipart_upload(
                            Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                        )
                        removed += 1
            return removed

        return self._call("AbortUploads", abort)

    def full_key(self, key: str) -> str:
        """The key inside the bucket."""
        return self._prefix + check_key(key)

    def make_client(self, checksums: Checksums = "when_required") -> "S3Client":
        """A client with credentials read anew. Raises CredentialsError where there are none."""
        session = botocore.session.Session()
        session.register_component("data_loader", _service_models())
        session.set_config_variable("region", self.settings.region)
        if self.settings.endpoint is not None:
            # A private store's credentials are never those of an EC2 instance; asking for them costs seconds where there is none.
            session.get_component("credential_provider").remove("iam-role")
        config = Config(
            signature_version="s3v4",
            s3={"addressing_style": self.settings.addressing, "payload_signing_enabled": True},
            request_checksum_calculation=checksums,
            response_checksum_validation=checksums,
            retries={"mode": "standard", "max_attempts": 5},
            connect_timeout=5,
            read_timeout=30,
            max_pool_connections=10,
            # The run file says where the store is, whatever the environment of one process says.
            ignore_configured_endpoint_urls=True,  # type: ignore[call-arg]  # the stubs lack it
        )
        try:
            if session.get_credentials() is None:
                raise no_credentials(self.place)
            made = session.create_client(
                "s3", endpoint_url=self.settings.endpoint, verify=self.settings.ca_bundle, config=config
            )
        except CLIENT_ERRORS as error:
            raise translate(error, self.place, "CreateClient") from error
        except ValueError as error:  # botocore's answer to an endpoint that is no URL
            raise ConfigError(f"spec.storage.s3.endpoint is {self.settings.endpoint!r}: {error}") from error
        return cast("S3Client", made)

    def _call(self, operation: str, work: Callable[["S3Client"], T]) -> T:
        """Run `work` with the client, once more with new credentials where the old ones have expired."""
        started = time.monotonic()
        code = "ok"
        try:
            client = self._client
            try:
                return work(client)
            except ClientError as error:
                if code_of(error) not in RENEWABLE:
                    raise
                return work(self._renew(client))
        except CLIENT_ERRORS as error:
            code = code_of(error)
            raise translate(error, self.place, operation) from error
        finally:
            if self._observer is not None:
                self._observer.storage_request(operation, code, time.monotonic() - started)

    def _renew(self, refused: "S3Client") -> "S3Client":
        """A client with credentials read anew, made by the first of several threads that were refused."""
        with self._lock:
            if self._client is refused:
                self._client = self.make_client()
            return self._client

    def _with_retries(self, work: Callable[[], T], helps: Callable[[BaseException], bool] = is_transient) -> T:
        """The result of `work`, done again after errors whose cause `helps` says so of, and after damage."""

        def again(error: Exception) -> bool:
            if isinstance(error, CredentialsError) or not isinstance(error, RunError):
                return False
            return isinstance(error, CorruptObject) or helps(error.__cause__ or error)

        def on_retry(error: Exception) -> None:
            if self._observer is not None:
                self._observer.storage_retry(code_of(error.__cause__ or error))

        return self._retry.run(work, again=again, on_retry=on_retry)

    def _upload(self, client: "S3Client", key: str, path: Path, sha256: str) -> None:
        arguments = {"Metadata": {"sha256": sha256}, "ContentType": _content_type(key)}
        with create_transfer_manager(client, _transfer_config(path.stat().st_size)) as manager:
            manager.upload(os.fspath(path), self.bucket, self.full_key(key), extra_args=arguments).result()

    def _download(self, client: "S3Client", key: str, path: Path, counter: ByteCounter | None) -> None:
        subscribers = [] if counter is None else [counter]
        with create_transfer_manager(client, _transfer_config(0)) as manager:
            manager.download(self.bucket, self.full_key(key), os.fspath(path), subscribers=subscribers).result()

    def _head(self, key: str) -> Any:
        def head(client: "S3Client") -> Any:
            try:
                return client.head_object(Bucket=self.bucket, Key=self.full_key(key))
            except ClientError as error:
                if code_of(error) in ("404", "NoSuchKey", "NotFound"):
                    return None
                raise

        return self._call("HeadObject", head)

    def _is_there(self, key: str, size: int, sha256: str) -> bool:
        """Whether the object is complete although its upload seemed to fail."""
        try:
            reply = self._head(key)
        except RunError:
            return False
        return reply is not None and reply["ContentLength"] == size and reply["Metadata"].get("sha256") == sha256

    def _etag(self, key: str) -> str:
        reply = self._head(key)
        return "" if reply is None else reply["ETag"].strip('"')


@functools.cache
def _service_models() -> Any:
    """What botocore knows of S3 and its endpoints, read once for all clients of a process: six of seven parts of making one."""
    return botocore.session.Session().get_component("data_loader")


def _read(client: "S3Client", bucket: str, key: str) -> tuple[bytes, str | None]:
    reply = client.get_object(Bucket=bucket, Key=key)
    return reply["Body"].read(), reply["Metadata"].get("sha256")


def _content_type(key: str) -> str:
    return mimetypes.guess_type(key)[0] or "application/octet-stream"


def _part_bytes(size: int) -> int:
    """Size of the parts of a file of `size` bytes: whole MiB, and few enough of them."""
    return max(PART_BYTES, math.ceil(size / _MAX_PARTS / MIB) * MIB)


def _transfer_config(size: int) -> TransferConfig:
    return TransferConfig(
        multipart_threshold=PART_BYTES,
        multipart_chunksize=_part_bytes(size),
        max_concurrency=4,
        preferred_transfer_client="classic",
    )


def _etags(path: Path, part_bytes: int) -> set[str]:
    """What the ETag of the uploaded file may be: MD5, or the MD5 of the parts' MD5s with their number."""
    whole = hashlib.md5(usedforsecurity=False)
    parts: list[bytes] = []
    with path.open("rb") as file:
        while part := file.read(part_bytes):
            whole.update(part)
            parts.append(hashlib.md5(part, usedforsecurity=False).digest())
    composite = hashlib.md5(b"".join(parts), usedforsecurity=False).hexdigest()
    return {whole.hexdigest(), f"{composite}-{len(parts)}"}
