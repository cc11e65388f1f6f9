"""What an error of the S3 client means: whose fault it is, whether trying again helps, and one sentence for the user."""

from dataclasses import dataclass

from botocore import exceptions as boto
from s3transfer.exceptions import RetriesExceededError

from atelier_api.errors import ConfigError, CredentialsError, RunError, StoreError
from atelier_runtime.store.protocol import ObjectMissing

RENEWABLE = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "TokenRefreshRequired",
    "XAdminUserNotFound",  # versitygw's InvalidAccessKeyId
}
"""Codes after which credentials are read again once: they may have been rotated since this process read them."""

_REFUSED = RENEWABLE | {
    "AccessDenied",
    "SignatureDoesNotMatch",
    "AllAccessDisabled",
    "AccountProblem",
    "403",
    "Forbidden",
}
_MISSING = {"NoSuchKey", "404", "NotFound"}
_WRONG_REGION = {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException", "301"}
_DAMAGED_ON_THE_WAY = {"XAmzContentSHA256Mismatch", "BadDigest", "InvalidDigest", "IncompleteBody"}
_NO_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.TokenRetrievalError,
    boto.UnauthorizedSSOTokenError,
    boto.ProfileNotFound,
    boto.InvalidConfigError,
)
_NO_ANSWER = (boto.HTTPClientError, boto.ConnectionError)
# The client retries requests; a body that breaks off is seen only by whoever reads it, and is not retried there.
_BROKEN_BODY = (
    boto.ResponseStreamingError,
    boto.IncompleteReadError,
    boto.ReadTimeoutError,
    boto.FlexibleChecksumError,
    RetriesExceededError,
)
CLIENT_ERRORS = (boto.BotoCoreError, boto.ClientError, RetriesExceededError)
"""Everything that the client raises for a request."""


@dataclass(frozen=True)
class Place:
    """Where a request went, for messages."""

    bucket: str
    endpoint: str | None
    region: str

    def __str__(self) -> str:
        return f"s3://{self.bucket} at {self.endpoint or 'AWS, region ' + self.region}"


def code_of(error: BaseException) -> str:
    """The store's error code, or the name of the error's class."""
    if isinstance(error, boto.ClientError):
        return str(error.response.get("Error", {}).get("Code", "Unknown"))
    return type(error).__name__


def arrived_damaged(error: BaseException) -> bool:
    """Whether the store refused a body that was changed on the way. The client does not send it again."""
    return code_of(error) in _DAMAGED_ON_THE_WAY


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later, though the client has already retried what it knows how to."""
    if isinstance(error, boto.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = code_of(error)
        # NoSuchUpload: the upload was completed, or aborted, by a request whose reply was lost.
        return (
            status >= 500
            or status == 429
            or code in _DAMAGED_ON_THE_WAY | {"NoSuchUpload", "RequestTimeout", "SlowDown"}
        )
    if isinstance(error, boto.SSLError):
        return "EOF" in str(error)  # the connection was cut, not distrusted
    return isinstance(error, (*_BROKEN_BODY, *_NO_ANSWER))


def translate(error: Exception, place: Place, operation: str) -> RunError:
    """The error that stops the run, or that a caller reacts to."""
    code = code_of(error)
    if isinstance(error, _NO_CREDENTIALS):
        return no_credentials(place, error)
    if isinstance(error, boto.ClientError):
        return _translate_reply(error, code, place, operation)
    if isinstance(error, boto.ParamValidationError):
        return ConfigError(f"spec.storage.uri is s3://{place.bucket}/…; the client refuses it: {error}")
    if isinstance(error, boto.SSLError):
        return StoreError(
            f"cannot trust {place}: {error}; a private certificate authority goes into spec.storage.s3.caBundle"
        )
    if isinstance(error, _NO_ANSWER):
        return StoreError(f"cannot reach {place}: {error}; spec.storage.s3.endpoint says where the store is")
    return StoreError(f"{operation} failed on {place}: {error}")


def no_credentials(place: Place, error: Exception | None = None) -> CredentialsError:
    """Nothing to sign requests with."""
    cause = f": {error}" if error else ""
    return CredentialsError(
        f"no usable credentials for {place}{cause}; give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile in "
        "AWS_SHARED_CREDENTIALS_FILE, or the pod an identity"
    )


def _translate_reply(error: boto.ClientError, code: str, place: Place, operation: str) -> RunError:
    said = error.response.get("Error", {}).get("Message") or code
    if code == "NoSuchBucket":
        return StoreError(f"there is no bucket {place.bucket!r} at {place.endpoint or 'AWS'}")
    if code in _MISSING:
        return ObjectMissing(f"{operation} failed on {place}: there is no such object")
    if code == "RequestTimeTooSkewed":
        return StoreError(f"{place} refuses requests because the clocks differ ({said}); set the clock of this machine")
    if code in _WRONG_REGION:
        return StoreError(f"{place} is not in region {place.region} ({said}); set spec.storage.s3.region")
    if code in _REFUSED:
        return CredentialsError(
            f"{place} refused {operation} ({code}: {said}); check the credentials and what they may do"
        )
    return StoreError(f"{operation} failed on {place}: {code}: {said}")
