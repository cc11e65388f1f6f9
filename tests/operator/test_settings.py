"""Settings from the environment."""

import pytest

from atelier_operator.settings import Settings


def test_without_environment_the_defaults_hold() -> None:
    assert Settings.of({}) == Settings()
    assert Settings().namespaces == ()


def test_every_setting_is_read() -> None:
    environment = {
        "ATELIER_NAMESPACES": "art, lab,,",
        "ATELIER_LEASE_NAMESPACE": "system",
        "ATELIER_LEASE_NAME": "lease",
        "ATELIER_IDENTITY": "replica-1",
        "ATELIER_METRICS_PORT": "9000",
        "ATELIER_WEBHOOK_PORT": "9443",
        "ATELIER_WEBHOOK_CERTIFICATES": "/certificates",
        "ATELIER_RESYNC_SECONDS": "60",
        "ATELIER_PROGRESS_SECONDS": "2.5",
        "ATELIER_LEASE_SECONDS": "9",
        "ATELIER_SILENCE_SECONDS": "80",
    }
    settings = Settings.of(environment)
    assert settings.namespaces == ("art", "lab")
    assert (settings.lease_namespace, settings.lease_name, settings.identity) == ("system", "lease", "replica-1")
    assert (settings.webhook_port, settings.webhook_certificates) == (9443, "/certificates")
    assert (settings.metrics_port, settings.resync_seconds, settings.progress_seconds) == (9000, 60.0, 2.5)
    assert (settings.lease_seconds, settings.silence_seconds) == (9.0, 80.0)


IDENTITIES = {
    "given": ({"ATELIER_IDENTITY": "a", "HOSTNAME": "b"}, "a"),
    "the pod's": ({"ATELIER_IDENTITY": "", "HOSTNAME": "b"}, "b"),
}


@pytest.mark.parametrize(("environment", "identity"), IDENTITIES.values(), ids=IDENTITIES)
def test_a_replica_is_named_by_its_pod(environment: dict[str, str], identity: str) -> None:
    assert Settings.of(environment).identity == identity


@pytest.mark.parametrize("text", ["http", "-1", "80.5", "65536"])
def test_a_port_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"ATELIER_METRICS_PORT is '{text}'; must be a whole number from 0 to 65535"):
        Settings.of({"ATELIER_METRICS_PORT": text})


def test_without_a_port_there_is_no_webhook() -> None:
    assert Settings.of({}).webhook_port == 0
    with pytest.raises(ValueError, match="ATELIER_WEBHOOK_PORT is 'https'; must be a whole number from 0 to 65535"):
        Settings.of({"ATELIER_WEBHOOK_PORT": "https"})


def test_port_0_is_any_that_is_free() -> None:
    assert Settings.of({"ATELIER_METRICS_PORT": "0"}).metrics_port == 0


@pytest.mark.parametrize("name", ["ATELIER_RESYNC_SECONDS", "ATELIER_PROGRESS_SECONDS"])
def test_a_number_that_is_none_is_refused(name: str) -> None:
    for text in ("soon", "0", "-1", "nan"):
        with pytest.raises(ValueError, match=f"{name} is '{text}'; must be"):
            Settings.of({name: text})
