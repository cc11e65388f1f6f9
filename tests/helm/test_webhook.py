"""The webhook in the chart: who calls it, with which certificate, and what is refused."""

import base64
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from atelier_operator.names import WEBHOOK

pytestmark = [pytest.mark.processes, pytest.mark.timeout(3600)]  # the first test on a machine builds helm
pytest_plugins = ("cluster_fixtures",)

Helm = Any  # the fixture of conftest.py
Object = dict[str, Any]
Values = Mapping[str, Any]

NAMESPACED = {"rbac": {"scope": "namespaced"}, "crds": {"install": False}}
CERTIFICATE = "cert-manager.io/v1/Certificate"
CERT_MANAGER = {"webhook": {"certificate": "certManager"}}
GIVEN = {"webhook": {"certificate": "secret", "secret": {"name": "mine", "caBundle": "QQ=="}}}
HOSTS = ["atelier-operator.atelier-system.svc", "atelier-operator.atelier-system.svc.cluster.local"]


def webhook(rendered: Any) -> Object:
    (found,) = rendered.one("ValidatingWebhookConfiguration")["webhooks"]
    return dict(found)


def mounted(rendered: Any) -> str:
    """The Secret behind the folder that the operator reads its certificate from."""
    pod = rendered.one("Deployment")["spec"]["template"]["spec"]
    (mount,) = [each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "webhook"]
    assert mount["mountPath"] == rendered.environment()["ATELIER_WEBHOOK_CERTIFICATES"]
    (volume,) = [each for each in pod["volumes"] if each["name"] == "webhook"]
    assert {each["key"] for each in volume["secret"]["items"]} == {"tls.crt", "tls.key"}
    assert volume["secret"]["optional"] is True
    return str(volume["secret"]["secretName"])


def test_it_is_asked_about_runs_and_nothing_waits_for_it_in_vain(helm: Helm) -> None:
    found = webhook(helm.template({}))
    assert (found["failurePolicy"], found["sideEffects"], found["matchPolicy"]) == ("Ignore", "None", "Equivalent")
    assert (found["name"], found["timeoutSeconds"]) == (WEBHOOK, 5)
    (rule,) = found["rules"]
    assert (rule["resources"], rule["operations"]) == (["trainingruns"], ["CREATE", "UPDATE"])
    assert webhook(helm.template({"webhook": {"timeoutSeconds": 2}}))["timeoutSeconds"] == 2


def test_the_call_ends_at_the_port_that_the_operator_serves(helm: Helm) -> None:
    rendered = helm.template({"webhook": {"port": 8443}})
    called = webhook(rendered)["clientConfig"]["service"]
    service = rendered.one("Service", called["name"])
    assert (called["namespace"], called["path"]) == (service["metadata"]["namespace"], "/validate")
    (port,) = [each for each in service["spec"]["ports"] if each["port"] == called["port"]]
    ports = rendered.one("Deployment")["spec"]["template"]["spec"]["containers"][0]["ports"]
    (served,) = [each["containerPort"] for each in ports if each["name"] == port["targetPort"]]
    assert served == 8443
    assert rendered.environment()["ATELIER_WEBHOOK_PORT"] == "8443"
    rules = rendered.one("NetworkPolicy")["spec"]["ingress"]
    assert {"ports": [{"port": port["targetPort"]}]} in rules


@pytest.mark.parametrize("values", [NAMESPACED, {"webhook": {"enabled": False}}], ids=["namespaced", "off"])
def test_without_it_nothing_is_left_of_it(helm: Helm, values: Values) -> None:
    rendered = helm.template(values, serves=(CERTIFICATE,))
    assert not [
        each for kind in ("ValidatingWebhookConfiguration", "Secret", "Certificate") for each in rendered.of(kind)
    ]
    assert "ATELIER_WEBHOOK_PORT" not in rendered.environment()
    assert "webhook" not in str(
        [each for each in rendered.objects if each["kind"] in ("Deployment", "Service", "NetworkPolicy")]
    )


# --- certificates -------------------------------------------------------------------------------------------------------


def test_the_chart_makes_a_certificate_for_the_service(helm: Helm, tmp_path: Path) -> None:
    rendered = helm.template({})
    secret = rendered.one("Secret")
    assert mounted(rendered) == secret["metadata"]["name"]
    data = {name: base64.b64decode(value) for name, value in secret["data"].items()}
    assert webhook(rendered)["clientConfig"]["caBundle"] == secret["data"]["ca.crt"]
    for name, text in data.items():
        (tmp_path / name).write_bytes(text)
    for host in HOSTS:
        checked = ["verify", "-CAfile", "ca.crt", "-verify_hostname", host, "-purpose", "sslserver", "tls.crt"]
        assert "OK" in openssl(tmp_path, *checked)
    nine_years = str(9 * 365 * 24 * 3600)
    openssl(tmp_path, "x509", "-in", "tls.crt", "-checkend", nine_years, "-noout")
    public = openssl(tmp_path, "x509", "-in", "tls.crt", "-pubkey", "-noout")
    assert openssl(tmp_path, "pkey", "-in", "tls.key", "-pubout") == public
    assert "PRIVATE" not in data["ca.crt"].decode()
    assert data.keys() == {"ca.crt", "tls.crt", "tls.key"}, "the authority's key is nowhere"


def openssl(folder: Path, *arguments: str) -> str:
    return subprocess.run(["openssl", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_cert_manager_makes_one_with_an_authority_that_stays(helm: Helm) -> None:
    rendered = helm.template(CERT_MANAGER, serves=(CERTIFICATE,))
    assert rendered.of("Secret") == []
    name = mounted(rendered)
    leaf = rendered.one("Certificate", name)
    assert leaf["spec"]["secretName"] == name
    assert leaf["spec"]["dnsNames"] == HOSTS
    configuration = rendered.one("ValidatingWebhookConfiguration")
    assert configuration["metadata"]["annotations"] == {"cert-manager.io/inject-ca-from": f"atelier-system/{name}"}
    assert "caBundle" not in webhook(rendered)["clientConfig"]
    issuer = rendered.one("Issuer", leaf["spec"]["issuerRef"]["name"])
    authority = next(each for each in rendered.of("Certificate") if each["spec"].get("isCA"))
    assert issuer["spec"]["ca"]["secretName"] == authority["spec"]["secretName"] != name
    assert rendered.one("Issuer", authority["spec"]["issuerRef"]["name"])["spec"] == {"selfSigned": {}}


def test_cert_manager_asks_the_issuer_that_is_named(helm: Helm) -> None:
    issuer = {"name": "company", "kind": "ClusterIssuer"}
    rendered = helm.template(CERT_MANAGER, {"webhook": {"issuer": issuer}}, serves=(CERTIFICATE,))
    assert rendered.of("Issuer") == []
    assert rendered.one("Certificate")["spec"]["issuerRef"] == issuer


def test_an_administrators_secret_is_taken_as_it_is(helm: Helm) -> None:
    rendered = helm.template(GIVEN)
    assert rendered.of("Secret") == []
    assert mounted(rendered) == "mine"
    assert webhook(rendered)["clientConfig"]["caBundle"] == "QQ=="


REFUSED: dict[str, tuple[Values, str]] = {
    "no cert-manager": (CERT_MANAGER, "does not serve cert-manager.io/v1 Certificate: install cert-manager first"),
    "a Secret without a name": (
        {"webhook": {"certificate": "secret", "secret": {"caBundle": "QQ=="}}},
        "webhook.secret.name or webhook.secret.caBundle is empty",
    ),
    "a Secret without its authority": (
        {"webhook": {"certificate": "secret", "secret": {"name": "mine"}}},
        "webhook.secret.name or webhook.secret.caBundle is empty",
    ),
    "a Secret that nobody reads": (
        {"webhook": {"secret": {"name": "mine"}}},
        "webhook.secret has values, but webhook.certificate is chart",
    ),
    "an issuer that nobody asks": (
        {"webhook": {"issuer": {"name": "company"}}},
        "webhook.issuer.name is company, but webhook.certificate is chart",
    ),
    "one port for two": ({"webhook": {"port": 8080}}, "webhook.port and operator.metricsPort are both 8080"),
}


@pytest.mark.parametrize(("values", "said"), REFUSED.values(), ids=REFUSED)
def test_refused(helm: Helm, values: Values, said: str) -> None:
    assert said in helm.refusal(values)
