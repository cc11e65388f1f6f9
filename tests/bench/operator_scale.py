"""The operator on a real API server: a burst of runs, then a start among thousands that have ended.

Seconds are those of the API server's audit log and of one machine on which everything shares the cores: etcd, the API server, the
controller managers, JobSet, the operator and this client. The counts of writes depend on nothing.
"""

import asyncio
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import psutil
from kubernetes.aio import client, config
from pairs import Findings, Row, quantiles

from atelier_operator.cluster import Cluster as Client
from atelier_operator.times import format_time
from cluster.local import Cluster, why_not
from cluster.network import free_ports
from cluster_documents import PROFILE, run_document
from operator_process import OperatorProcess, install_crds, until

Object = dict[str, Any]
Measured = TypeVar("Measured")

BURST, SETTLED = 1000, 5000
PATIENCE_SECONDS = 1200.0
AT_ONCE = 32
NAMESPACE = "bench"
WRITES = ("POST", "PATCH", "PUT", "DELETE")


def run(*, quick: bool) -> Findings:
    """Both measurements; where this machine cannot have the cluster, the reason instead. When quick, one cluster has both."""
    reason = why_not(nodes=0)
    if reason is not None:
        return Findings([Row("O", "operator", f"not measured: {reason}")], {"why_not": reason})
    folder = Path(tempfile.mkdtemp(prefix="operator-"))
    try:
        if quick:
            start, burst = _in_a_cluster(lambda cluster: (_start(cluster, folder, 50), _burst(cluster, folder, 20)))
        else:
            burst = _in_a_cluster(lambda cluster: _burst(cluster, folder, BURST))
            start = _in_a_cluster(lambda cluster: _start(cluster, folder, SETTLED))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Findings([*_burst_rows(burst), *_start_rows(start)], {"burst": burst, "start": start})


def _in_a_cluster(measure: Callable[[Cluster], Measured]) -> Measured:
    with Cluster.start(kueue=False, report=print) as cluster:
        install_crds(cluster)
        cluster.apply(PROFILE)
        cluster.make_namespace(NAMESPACE)
        return measure(cluster)


async def _connect(cluster: Cluster) -> Client:
    await config.load_kube_config(config_file=str(cluster.kubeconfig))
    return Client(client.ApiClient())


# --- a burst ----------------------------------------------------------------------------------------------------------


def _burst(cluster: Cluster, folder: Path, number: int) -> Object:
    """Make runs as fast as the API server takes them."""
    operator = _Operator(cluster, folder / "burst.log")
    try:
        operator.wait_for("atelier_operator_leader", 1)
        idle, before = operator.memory(), _cpu(cluster, operator)
        names = [f"run-{each:05}" for each in range(number)]
        started = time.monotonic()
        asyncio.run(_make(cluster, names))
        submitted = time.monotonic() - started
        until(lambda: _times(cluster, "patch", "status").keys() >= set(names), "every status", PATIENCE_SECONDS)
        until(lambda: operator.metric("atelier_operator_queue_length") == 0, "an empty queue", PATIENCE_SECONDS)
        made, children, told = (
            _times(cluster, "create", ""),
            _times(cluster, "create", "jobsets"),
            _times(cluster, "patch", "status"),
        )
        return {
            "runs": number,
            "submit_seconds": submitted,
            "child_seconds": sorted(children[f"{name}-1"] - made[name] for name in names),
            "status_seconds": sorted(told[name] - made[name] for name in names),
            "all_seconds": max(told[name] for name in names) - min(made[name] for name in names),
            "writes": operator.writes(),
            "cpu_seconds": {name: used - before[name] for name, used in _cpu(cluster, operator).items()},
            "memory_idle": idle,
            "memory": operator.memory(),
        }
    finally:
        operator.process.stop()


def _cpu(cluster: Cluster, operator: "_Operator") -> dict[str, float]:
    """CPU seconds that each process has used."""
    pids = {name: cluster.pid(name) for name in cluster.processes()} | {"operator": operator.pid}
    return {name: sum(psutil.Process(pid).cpu_times()[:2]) for name, pid in pids.items()}


async def _make(cluster: Cluster, names: Iterable[str]) -> None:
    api = await _connect(cluster)
    try:
        await _each(names, lambda name: api.create(run_document(NAMESPACE, name, parallelism={"nodes": 1})))
    finally:
        await api.close()


def _times(cluster: Cluster, verb: str, what: str) -> dict[str, float]:
    """When the API server had done the first request of a kind, by the object's name. `what`: "" for runs, "status" for theirs."""
    resource, subresource = ("trainingruns", what) if what in ("", "status") else (what, "")
    found: dict[str, float] = {}
    for each in cluster.audit():
        place = each.get("objectRef") or {}
        if each["verb"] != verb or place.get("resource") != resource or place.get("subresource", "") != subresource:
            continue
        if each["responseStatus"]["code"] < 300:
            found.setdefault(place["name"], datetime.fromisoformat(each["stageTimestamp"]).timestamp())
    return found


def _burst_rows(found: Object) -> list[Row]:
    runs, writes = found["runs"], found["writes"]
    a_run = sum(writes.values()) / runs
    without_events = a_run - writes.get("POST Event", 0) / runs
    child, told = quantiles(found["child_seconds"]), quantiles(found["status_seconds"])
    mebibytes = f"{found['memory_idle'] / 2**20:.0f} → {found['memory'] / 2**20:.0f} MiB"
    return [
        Row("O", f"{runs} runs: made → JobSet made", f"p50 {child[0]:.2f} s, p99 {child[1]:.2f} s"),
        Row(
            "O",
            f"{runs} runs: made → status written",
            f"p50 {told[0]:.2f} s, p99 {told[1]:.2f} s",
            "p50 ≤ 1.5 s, p99 ≤ 4 s",
            "met" if told[0] <= 1.5 and told[1] <= 4 else "missed",
        ),
        Row("O", "handled", f"{runs / found['all_seconds']:.0f} runs/s; submitted in {found['submit_seconds']:.1f} s"),
        Row(
            "O",
            "writes a run, without events; with",
            f"{without_events:.2f}; {a_run:.2f}",
            "≤ 3",
            "met" if a_run <= 3 else "missed",
        ),
        Row("O", "CPU of each, of all that was used", _shares(found["cpu_seconds"])),
        Row("O", "memory, idle → with these runs", mebibytes, "130 → 170 MB"),
    ]


# --- a start among settled runs ---------------------------------------------------------------------------------------


def _start(cluster: Cluster, folder: Path, number: int) -> Object:
    """Start the operator where all runs have ended."""
    asyncio.run(_settle(cluster, [f"done-{each:05}" for each in range(number)]))
    started = time.monotonic()
    operator = _Operator(cluster, folder / "start.log")
    try:
        operator.wait_for("atelier_operator_leader", 1)
        leads = time.monotonic() - started
        operator.wait_for("atelier_operator_reconciles_total", number)
        looked = time.monotonic() - started
        time.sleep(5)
        return {
            "runs": number,
            "leads_seconds": leads,
            "looked_seconds": looked,
            "writes": operator.writes(),
            "memory": operator.memory(),
        }
    finally:
        operator.process.stop()


async def _settle(cluster: Cluster, names: Iterable[str]) -> None:
    api = await _connect(cluster)
    now = format_time(datetime.now().astimezone())
    status = {"phase": "Succeeded", "reason": "Completed", "attempt": 1, "observedGeneration": 1, "completionTime": now}

    async def one(name: str) -> None:
        made = await api.create(run_document(NAMESPACE, name))
        await api.apply_status(made["metadata"], status)

    try:
        await _each(names, one)
    finally:
        await api.close()


def _start_rows(found: Object) -> list[Row]:
    writes = sum(found["writes"].values())
    return [
        Row(
            "O",
            f"start with {found['runs']} ended runs: leads; all looked at",
            f"{found['leads_seconds']:.1f} s; {found['looked_seconds']:.1f} s",
            "≤ 8 s",
            "met" if found["looked_seconds"] <= 8 else "missed",
        ),
        Row("O", "writes", str(writes), "0", "met" if writes == 0 else "missed"),
        Row("O", "memory", f"{found['memory'] / 2**20:.0f} MiB"),
    ]


# --- helpers ----------------------------------------------------------------------------------------------------------


class _Operator:
    """The process, by its metrics."""

    def __init__(self, cluster: Cluster, log: Path) -> None:
        self._port = free_ports(1)[0]
        settings = {"ATELIER_METRICS_PORT": str(self._port), "ATELIER_PROGRESS_SECONDS": "10"}
        self.process = OperatorProcess(cluster, log, settings=settings).start()

    def metric(self, name: str) -> float:
        """The sum over all label sets; 0 while nobody answers."""
        return sum(value for series, value in self._samples() if series.partition("{")[0] == name)

    def wait_for(self, name: str, value: float) -> None:
        until(lambda: self.metric(name) >= value, f"{name} to be {value:g}", PATIENCE_SECONDS)

    def writes(self) -> dict[str, int]:
        """Requests that change something, by verb and kind, without those of the Lease."""
        found: dict[str, int] = {}
        for series, value in self._samples():
            name, _, rest = series.partition("{")
            if name != "atelier_operator_api_requests_total":
                continue
            labels = dict(pair.split("=", 1) for pair in rest.rstrip("}").replace('"', "").split(","))
            if labels["verb"] in WRITES and labels["kind"] != "Lease":
                key = f"{labels['verb']} {labels['kind']}"
                found[key] = found.get(key, 0) + int(value)
        return found

    @property
    def pid(self) -> int:
        assert self.process.process is not None
        return self.process.process.pid

    def memory(self) -> int:
        """Resident bytes."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def _samples(self) -> list[tuple[str, float]]:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://127.0.0.1:{self._port}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        except OSError:
            return []
        lines = (line for line in text.splitlines() if line and not line.startswith("#"))
        return [(series, float(value)) for series, value in (line.rsplit(" ", 1) for line in lines)]


async def _each(names: Iterable[str], work: Callable[[str], Awaitable[Any]]) -> None:
    """`work` for every name, some at once."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(name: str) -> None:
        async with gate:
            await work(name)

    await asyncio.gather(*(one(name) for name in names))


def _shares(seconds: dict[str, float]) -> str:
    whole = sum(seconds.values())
    largest = sorted(seconds.items(), key=lambda each: -each[1])[:3]
    return f"{whole:.0f} s: " + ", ".join(f"{name} {used / whole:.0%}" for name, used in largest)
