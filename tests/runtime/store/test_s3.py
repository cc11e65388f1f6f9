"""The S3 store against a real server, with a network that breaks."""

import secrets
import shutil
import socket
import ssl
from pathlib import Path

import boto3.s3.transfer
import pytest

from atelier_api.errors import ConfigError, CredentialsError, StoreError
from atelier_api.v1alpha1.storage import S3Settings
from atelier_runtime.store import CorruptObject, open_store, probe
from atelier_runtime.store.protocol import sha256_of
from atelier_runtime.store.s3 import S3Store
from s3_fault_proxy import FaultProxy, fault_proxy
from s3_server import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server
from s3_settings import FAST, s3_settings

pytest_plugins = ("store_fixtures",)
pytestmark = pytest.mark.processes

MIB = 1 << 20
File = tuple[Path, str]
"""A path and the SHA-256 of what lies there."""


@pytest.fixture
def big(tmp_path: Path) -> File:
    """A file of three parts, and its hash."""
    data = secrets.token_bytes(40 * MIB)
    (tmp_path / "big").write_bytes(data)
    return tmp_path / "big", sha256_of(data)


def assert_stored(store: S3Store, key: str, digest: str, folder: Path) -> None:
    store.get_file(key, folder / "back", sha256=digest)


def test_busy_answers_on_parts_are_waited_out(
    proxied_store: S3Store, s3_proxy: FaultProxy, big: File, tmp_path: Path
) -> None:
    s3_proxy.fault("status", method="PUT", match="partNumber", times=3)
    proxied_store.put_file("a", *big)
    assert s3_proxy.broken == 3
    assert_stored(proxied_store, "a", big[1], tmp_path)


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_a_store_that_fails_some_of_the_time_is_used_to_the_end(
    proxied_store: S3Store, s3_proxy: FaultProxy, big: File, tmp_path: Path, share: float
) -> None:
    s3_proxy.fault("status", times=10_000, share=share)
    for index in range(3):
        proxied_store.put_file(f"{index}", *big)
        assert_stored(proxied_store, f"{index}", big[1], tmp_path)


def test_a_lost_reply_of_the_completed_upload_is_no_failure(
    proxied_store: S3Store, s3_proxy: FaultProxy, big: File, tmp_path: Path
) -> None:
    s3_proxy.fault("lost_reply", method="POST", match="uploadId")
    proxied_store.put_file("a", *big)
    assert s3_proxy.broken == 1
    assert_stored(proxied_store, "a", big[1], tmp_path)


def test_no_such_upload_after_a_lost_reply_is_answered_by_looking(
    proxied_store: S3Store, s3_proxy: FaultProxy, big: File, tmp_path: Path
) -> None:
    s3_proxy.fault("lost_reply", method="POST", match="uploadId")
    s3_proxy.fault("status", method="POST", match="uploadId", status=404, code="NoSuchUpload")
    proxied_store.put_file("a", *big)
    assert s3_proxy.broken == 2
    assert s3_proxy.count("PUT", "partNumber") == 3  # nothing was sent twice
    assert_stored(proxied_store, "a", big[1], tmp_path)


def test_no_such_upload_without_an_object_is_uploaded_again(
    proxied_store: S3Store, s3_proxy: FaultProxy, big: File, tmp_path: Path
) -> None:
    s3_proxy.fault("status", method="POST", match="uploadId", status=404, code="NoSuchUpload")
    proxied_store.put_file("a", *big)
    assert s3_proxy.count("PUT", "partNumber") == 6
    assert_stored(proxied_store, "a", big[1], tmp_path)


def test_a_lost_reply_of_a_conditional_write_is_our_own_write(proxied_store: S3Store, s3_proxy: FaultProxy) -> None:
    s3_proxy.fault("lost_reply", method="PUT", match="manifest")
    assert proxied_store.put_bytes("manifest", b"ours", if_absent=True)
    assert s3_proxy.count("PUT", "manifest") == 2
    assert not proxied_store.put_bytes("manifest", b"theirs", if_absent=True)


@pytest.mark.parametrize("match", ["partNumber=1", "partNumber=2", "partNumber=3"])
def test_a_bit_flipped_on_the_way_to_the_store_is_sent_again(
    proxied_store: S3Store, s3_proxy: FaultProxy, big: File, tmp_path: Path, match: str
) -> None:
    s3_proxy.fault("flip_req", method="PUT", match=match)
    proxied_store.put_file("a", *big)
    assert s3_proxy.broken == 1
    assert_stored(proxied_store, "a", big[1], tmp_path)


def test_a_bit_flipped_behind_the_tls_end_is_refused_too(
    s3_environment: S3Server, s3_tls_server: S3Server, big: File, tmp_path: Path
) -> None:
    certificate = s3_tls_server.certificate
    assert certificate is not None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate.certificate, certificate.key)
    with fault_proxy(s3_environment.url, tls=context) as proxy:
        settings = S3Settings(endpoint=proxy.url, ca_bundle=str(certificate.authority))
        store = S3Store(f"s3://{BUCKET}/behind-tls", settings, retry=FAST)
        proxy.fault("flip_req", method="PUT", match="partNumber=2")
        store.put_file("a", *big)
        assert proxy.broken == 1
        assert_stored(store, "a", big[1], tmp_path)


def test_bits_flipped_on_the_way_back_are_noticed_and_read_again(
    proxied_store: S3Store, s3_proxy: FaultProxy, big: File, tmp_path: Path
) -> None:
    proxied_store.put_file("a", *big)
    proxied_store.put_bytes("b", b"manifest")
    s3_proxy.fault("flip_resp", method="GET", times=2)
    assert_stored(proxied_store, "a", big[1], tmp_path)
    s3_proxy.fault("flip_resp", method="GET", match="/b")
    assert proxied_store.get_bytes("b") == b"manifest"


def test_bits_flipped_at_rest_are_refused(
    proxied_store: S3Store, s3_environment: S3Server, s3_proxy: FaultProxy, big: File, tmp_path: Path
) -> None:
    proxied_store.put_file("a", *big)
    path = s3_environment.folder / proxied_store.full_key("a")
    with path.open("r+b") as file:
        file.seek(20 * MIB)
        byte = file.read(1)[0]
        file.seek(20 * MIB)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(CorruptObject, match="is damaged"):
        assert_stored(proxied_store, "a", big[1], tmp_path)
    assert not (tmp_path / "back").exists()


def test_a_reply_cut_short_is_read_again(
    proxied_store: S3Store, s3_proxy: FaultProxy, big: File, tmp_path: Path
) -> None:
    proxied_store.put_file("a", *big)
    proxied_store.put_bytes("b", b"manifest")
    s3_proxy.fault("truncate", method="GET", times=2)
    assert_stored(proxied_store, "a", big[1], tmp_path)
    s3_proxy.fault("truncate", method="GET", match="/b")
    assert proxied_store.get_bytes("b") == b"manifest"


def test_the_bytes_told_are_those_of_the_file_however_often_they_came(
    proxied_store: S3Store, s3_proxy: FaultProxy, big: File, tmp_path: Path
) -> None:
    proxied_store.put_file("a", *big)
    s3_proxy.fault("truncate", method="GET", times=2)
    told: list[int] = []
    proxied_store.get_file("a", tmp_path / "back", sha256=big[1], progress=told.append)
    assert s3_proxy.broken == 2
    assert sum(told) == big[0].stat().st_size
    assert len(told) > 3


def test_an_object_is_listed_with_its_mark_and_known_by_its_hash(proxied_store: S3Store, tmp_path: Path) -> None:
    proxied_store.put_bytes("a", b"one")
    (listed,) = proxied_store.list("")
    head = proxied_store.head("a")
    assert head is not None
    assert head.sha256 == sha256_of(b"one")
    assert listed.etag == head.etag != ""
    proxied_store.put_bytes("a", b"two")
    assert proxied_store.list("")[0].etag != listed.etag


def test_cut_connections_are_tried_again(
    proxied_store: S3Store, s3_proxy: FaultProxy, big: File, tmp_path: Path
) -> None:
    s3_proxy.fault("drop_req", method="PUT", match="partNumber", times=2)
    s3_proxy.fault("stall", method="PUT", match="partNumber", seconds=0.5)
    proxied_store.put_file("a", *big)
    assert_stored(proxied_store, "a", big[1], tmp_path)


def test_credentials_that_expire_during_an_upload_are_read_again(
    proxied_store: S3Store, s3_proxy: FaultProxy, big: File, tmp_path: Path
) -> None:
    s3_proxy.fault("status", method="PUT", match="partNumber=2", status=400, code="ExpiredToken")
    proxied_store.put_file("a", *big)
    assert s3_proxy.broken == 1
    assert_stored(proxied_store, "a", big[1], tmp_path)


def test_a_rotated_key_is_picked_up_from_its_file(
    s3_environment: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content of a mounted Secret is replaced, and the old key is not valid any more."""
    file = tmp_path / "credentials"
    file.write_text(f"[default]\naws_access_key_id = old\naws_secret_access_key = {SECRET_KEY}\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    store = S3Store(f"s3://{BUCKET}/rotated", s3_settings(s3_environment), retry=FAST)
    file.write_text(f"[default]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n")
    store.put_bytes("a", b"x")
    assert store.get_bytes("a") == b"x"


def test_credentials_that_stay_expired_stop_at_once(proxied_store: S3Store, s3_proxy: FaultProxy) -> None:
    s3_proxy.fault("status", status=400, code="ExpiredToken", times=100)
    with pytest.raises(CredentialsError, match=r"refused PutObject .ExpiredToken"):
        proxied_store.put_bytes("a", b"x")
    assert s3_proxy.count("PUT") == 2


def test_wrong_clocks_are_named_and_not_tried_again(proxied_store: S3Store, s3_proxy: FaultProxy, big: File) -> None:
    s3_proxy.fault("status", status=403, code="RequestTimeTooSkewed", times=100)
    with pytest.raises(StoreError, match="the clocks differ"):
        proxied_store.put_file("a", *big)
    assert len(s3_proxy.seen) <= 2  # the request that starts the upload, and its look after it


def test_an_outage_fails_the_file_and_leaves_no_object(proxied_store: S3Store, s3_proxy: FaultProxy, big: File) -> None:
    store = S3Store(proxied_store.uri, proxied_store.settings, retry=type(FAST)(attempts=1))
    s3_proxy.fault("status", method="PUT", match="partNumber=3", times=100)
    with pytest.raises(StoreError, match="SlowDown"):
        store.put_file("a", *big)
    assert store.list("") == []
    assert store.remove_unfinished(0) == 0  # the upload was aborted


def test_open_uploads_of_killed_writers_are_aborted_by_age(proxied_store: S3Store) -> None:
    client = proxied_store.make_client()
    client.create_multipart_upload(Bucket=BUCKET, Key=proxied_store.full_key("half"))
    assert proxied_store.remove_unfinished(3600) == 0
    assert proxied_store.remove_unfinished(-2) == 1
    assert proxied_store.remove_unfinished(-2) == 0


def test_a_missing_bucket_is_named(s3_environment: S3Server) -> None:
    store = open_store("s3://no-such-bucket/x", s3_settings(s3_environment))
    for use in (lambda: store.put_bytes("a", b"x"), lambda: store.list("")):
        with pytest.raises(StoreError, match="there is no bucket 'no-such-bucket' at http"):
            use()


def test_wrong_keys_are_refused_as_credentials(s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(CredentialsError, match="SignatureDoesNotMatch"):
        open_store(f"s3://{BUCKET}/x", s3_settings(s3_environment)).put_bytes("a", b"x")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(CredentialsError, match="access key"):
        open_store(f"s3://{BUCKET}/x", s3_settings(s3_environment)).put_bytes("a", b"x")


def test_no_credentials_are_noticed_before_any_request(
    s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(CredentialsError, match="no usable credentials"):
        open_store(f"s3://{BUCKET}/x", s3_settings(s3_environment))


def test_an_endpoint_where_nobody_listens_is_named(s3_environment: S3Server) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        store = S3Store(f"s3://{BUCKET}/x", S3Settings(endpoint=endpoint))
        store._client.meta.config.retries["total_max_attempts"] = 1  # type: ignore[attr-defined]
        with pytest.raises(StoreError, match=rf"cannot reach s3://{BUCKET} at {endpoint}"):
            store.list("")


def test_a_certificate_nobody_vouches_for_is_refused(s3_tls_server: S3Server, s3_environment: S3Server) -> None:
    store = open_store(f"s3://{BUCKET}/x", S3Settings(endpoint=s3_tls_server.url))
    with pytest.raises(StoreError, match=r"spec\.storage\.s3\.caBundle"):
        store.put_bytes("a", b"x")


def test_a_missing_ca_bundle_is_named(s3_environment: S3Server) -> None:
    with pytest.raises(ConfigError, match=r"spec\.storage\.s3\.caBundle is '/no/such/file'"):
        open_store(f"s3://{BUCKET}/x", S3Settings(endpoint="https://127.0.0.1:1", ca_bundle="/no/such/file"))


def test_no_request_leaves_for_another_host(
    s3_environment: S3Server, big: File, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CRT client would ignore the endpoint: it must not be used even where the machine offers it."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def watch(host: str, *arguments: object, **settings: object) -> object:
        asked.append(host)
        return real(host, *arguments, **settings)  # type: ignore[arg-type]

    def crt(*_: object, **__: object) -> None:
        raise AssertionError("the CRT client was made")

    monkeypatch.setattr(socket, "getaddrinfo", watch)
    monkeypatch.setattr(boto3.s3.transfer, "HAS_CRT", True)
    monkeypatch.setattr(boto3.s3.transfer, "has_minimum_crt_version", lambda _: True)
    monkeypatch.setattr(
        boto3.s3.transfer,
        "awscrt",
        type("Fast", (), {"s3": type("S", (), {"is_optimized_for_system": lambda: True})}),
        False,
    )
    monkeypatch.setattr(boto3.s3.transfer, "create_crt_transfer_manager", crt, False)
    store = open_store(f"s3://{BUCKET}/hosts", s3_settings(s3_environment))
    probe(store)
    store.put_file("a", *big)
    store.get_file("a", tmp_path / "back", sha256=big[1])
    store.delete(info.key for info in store.list(""))
    assert set(asked) == {"127.0.0.1"}


def test_the_environment_does_not_move_the_store(s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run file says where the store is; one process with another environment must not write elsewhere."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://192.0.2.1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://192.0.2.1")
    for settings in (S3Settings(), s3_settings(s3_environment)):
        client = S3Store(f"s3://{BUCKET}/x", settings).make_client()
        assert "192.0.2.1" not in client.meta.endpoint_url


def test_a_store_that_ignores_conditions_is_asked_before_writing(proxied_store: S3Store, s3_proxy: FaultProxy) -> None:
    proxied_store.conditional_writes = "refused"
    assert proxied_store.put_bytes("a", b"mine", if_absent=True)
    assert not proxied_store.put_bytes("a", b"other", if_absent=True)
    assert all("If-None-Match" not in seen.headers for seen in s3_proxy.seen)


def test_where_the_server_does_not_check_the_etag_is_compared(
    proxied_store: S3Store, s3_environment: S3Server, big: File, tmp_path: Path
) -> None:
    proxied_store.compare_etag = True
    proxied_store.put_file("big", *big)
    (tmp_path / "small").write_bytes(b"small")
    proxied_store.put_file("small", tmp_path / "small", sha256_of(b"small"))
    real = proxied_store._etag
    answers = iter(["0" * 32])
    proxied_store._etag = lambda key: next(answers, None) or real(key)  # type: ignore[method-assign]
    proxied_store.put_file("small", tmp_path / "small", sha256_of(b"small"))
    assert next(answers, None) is None  # the wrong answer was seen, and the file sent again


def test_requests_and_retries_are_counted(s3_environment: S3Server, s3_proxy: FaultProxy, big: File) -> None:
    seen: list[tuple[str, str]] = []
    retries: list[str] = []

    class Observer:
        def storage_request(self, operation: str, code: str, seconds: float) -> None:
            seen.append((operation, code))

        def storage_retry(self, reason: str) -> None:
            retries.append(reason)

    settings = s3_settings(s3_environment, s3_proxy.url)
    store = S3Store(f"s3://{BUCKET}/counted", settings, retry=FAST, observer=Observer())
    s3_proxy.fault("status", method="POST", match="uploadId", status=404, code="NoSuchUpload")
    store.put_file("a", *big)
    assert seen[0] == ("UploadFile", "NoSuchUpload")
    assert seen[-1] == ("UploadFile", "ok")
    assert retries == ["NoSuchUpload"]


def test_a_listing_of_several_pages_is_whole(proxied_store: S3Store, s3_environment: S3Server) -> None:
    folder = s3_environment.folder / proxied_store.full_key("manifests")
    folder.mkdir(parents=True)
    for index in range(2_500):
        (folder / f"{index:08d}-1.0.json").touch()
    try:
        assert len(proxied_store.list("manifests/")) == 2_500
    finally:
        shutil.rmtree(folder)
