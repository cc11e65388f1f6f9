"""The node's HTTP endpoint: `/metrics` for Prometheus, `/progress` for operator and command line, `/healthz` for the kubelet."""

import logging
import shutil
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from atelier_api.progress import Progress
from atelier_runtime.observe.metric_table import METRICS, PREFIX
from atelier_runtime.observe.progress import read_progress

log = logging.getLogger(__name__)

# A file read while its rank makes it longer can end in the middle of an entry; the next reading is whole.
_TRIES = 3


class NodeCollector(Collector):
    """The numbers of all ranks of a node, merged from their files, and the node's own. `labels` are put on every series."""

    def __init__(self, folder: Path, labels: Mapping[str, str]) -> None:
        self._folder = folder
        self._labels = dict(labels)

    def describe(self) -> list[Metric]:
        """Nothing is known before the first scrape; an empty list keeps the registry from asking."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One pass over the files."""
        self._folder.mkdir(parents=True, exist_ok=True)
        ranks = MultiProcessCollector(None, path=str(self._folder))  # type: ignore[no-untyped-call]
        for metric in [*ranks.collect(), self._free_space()]:  # type: ignore[no-untyped-call]
            metric.samples = [sample._replace(labels={**sample.labels, **self._labels}) for sample in metric.samples]
            yield metric

    def _free_space(self) -> Metric:
        name = "staging_free_bytes"
        return GaugeMetricFamily(PREFIX + name, METRICS[name].help, value=shutil.disk_usage(self._folder).free)


class Endpoint:
    """Serves in threads of its own. Port 0: a free one, on the loopback address only."""

    def __init__(self, port: int, *, metrics: Path, labels: Mapping[str, str], progress: Path) -> None:
        registry = CollectorRegistry()
        registry.register(NodeCollector(metrics, labels))

        class Handler(_Handler):
            collectors = registry
            progress_path = progress

        self._server = ThreadingHTTPServer(("127.0.0.1" if port == 0 else "", port), Handler)
        self._server.daemon_threads = True
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="endpoint", daemon=True
        ).start()

    @property
    def port(self) -> int:
        """The port that is served."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    collectors: CollectorRegistry
    progress_path: Path
    timeout = 10  # seconds that a slow client may hold a thread

    def do_GET(self) -> None:
        match self.path.partition("?")[0]:
            case "/metrics":
                self._metrics()
            case "/progress":
                progress = read_progress(self.progress_path) or Progress()
                self._answer(200, "application/json", progress.model_dump_json(by_alias=True).encode())
            case "/healthz":
                self._answer(200, "text/plain", b"ok\n")
            case _:
                self._answer(404, "text/plain", b"there are /metrics, /progress and /healthz\n")

    def _metrics(self) -> None:
        for tries_left in reversed(range(_TRIES)):
            try:
                self._answer(200, CONTENT_TYPE_LATEST, generate_latest(self.collectors))
                return
            except Exception as problem:  # whatever a torn file makes prometheus_client raise
                if tries_left == 0:
                    log.warning("metrics cannot be read", extra={"error": str(problem)})
                    self._answer(500, "text/plain", b"the files of the ranks cannot be read\n")

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """A scrape every 15 s is no news."""
