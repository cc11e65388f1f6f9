"""How tests connect to an S3 server."""

from atelier_api.v1alpha1.storage import S3Settings
from atelier_runtime.store.retry import RetryPolicy
from s3_server import S3Server

FAST = RetryPolicy(base_seconds=0.01, cap_seconds=0.05)


def s3_settings(server: S3Server, endpoint: str | None = None) -> S3Settings:
    """Connection to a server, or to a proxy before it."""
    return S3Settings(endpoint=endpoint or server.url, ca_bundle=server.ca_bundle)
