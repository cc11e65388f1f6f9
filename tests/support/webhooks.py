"""The operator's webhook beside a test's cluster: the chart's own configuration, called by URL since the operator is no pod."""

import base64
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cluster.local import LOADER, Cluster
from operator_process import free_port
from tls import Pair, make_pair

Object = dict[str, Any]

CHART = Path(__file__).resolve().parents[2] / "helm" / "atelier"


class BesideWebhook:
    """A port, a folder with a certificate, and the registration of both. `settings` are those of the operator's process."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster = cluster
        self._folder = folder
        self._rendered: Object | None = None
        self.port = free_port()
        self.pair = self.new_pair()
        self.pair.write(folder)

    @property
    def settings(self) -> Mapping[str, str]:
        return {"ATELIER_WEBHOOK_PORT": str(self.port), "ATELIER_WEBHOOK_CERTIFICATES": str(self._folder)}

    def new_pair(self) -> Pair:
        return make_pair(self._folder.parent)

    def register(self, trusted: Pair | None = None, timeout_seconds: int = 5) -> None:
        """Have the API server call it, and trust a certificate; by default that which is served."""
        configuration = self._configuration()
        bundle = base64.b64encode((trusted or self.pair).certificate).decode()
        for each in configuration["webhooks"]:
            each["clientConfig"] = {"url": f"https://127.0.0.1:{self.port}/validate", "caBundle": bundle}
            each["timeoutSeconds"] = timeout_seconds
        self._cluster.apply(configuration)

    def _configuration(self) -> Object:
        """As the chart has it, rendered once."""
        if self._rendered is None:
            text = self._cluster.helm("template", "atelier", str(CHART), "--set=operator.image.repository=x")
            rendered = yaml.load_all(text, LOADER)
            self._rendered = next(
                each for each in rendered if each and each["kind"] == "ValidatingWebhookConfiguration"
            )
        return copy.deepcopy(self._rendered)
