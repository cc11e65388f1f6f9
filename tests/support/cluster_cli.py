"""`atelier` against a real API server: in the test's own process, since most of a start is imports, or as a user has it.

A test module takes the fixtures with `pytest_plugins = ("cluster_fixtures", "cluster_kinds", "cluster_cli")`: an operator, and a
place with a file.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from kubernetes.config import kube_config
from typer.testing import CliRunner

from atelier_api.exit_codes import ExitCode
from atelier_cli.main import app
from cluster.local import Cluster
from cluster_documents import run_document
from fake_pods import end, end_well
from operator_process import ClusterRun, OperatorProcess, forget_namespace

Object = dict[str, Any]
Ended = subprocess.CompletedProcess[str]


def command(environment: Mapping[str, str], *arguments: str) -> tuple[list[str], dict[str, str]]:
    kept = {name: value for name, value in os.environ.items() if name not in ("KUBECONFIG",)}
    return [sys.executable, "-m", "atelier_cli.main", *arguments], {**kept, **environment}


def atelier(cluster: Cluster, *arguments: str, answer: str = "", kubeconfig: Path | None = None) -> Ended:
    """The command with the administrator's kubeconfig or another one, in this process."""
    environment = cluster.environment | ({"KUBECONFIG": str(kubeconfig)} if kubeconfig else {})
    # The client reads KUBECONFIG when it is imported.
    with mock.patch.object(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", environment["KUBECONFIG"]):
        ended = CliRunner().invoke(app, arguments, input=answer, env=environment)
    if ended.exception is not None and not isinstance(ended.exception, SystemExit):
        raise ended.exception
    return Ended(arguments, ended.exit_code, ended.stdout, ended.stderr)


def run_with(environment: Mapping[str, str], *arguments: str, answer: str = "") -> Ended:
    """The command as a process of its own."""
    line, variables = command(environment, *arguments)
    return subprocess.run(line, env=variables, input=answer, capture_output=True, text=True, timeout=120)


def errors(ended: Ended) -> list[str]:
    """What it says on stderr, which must be errors and nothing else."""
    lines = ended.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines), ended.stderr
    return [line.removeprefix("error: ") for line in lines]


class Place:
    """A namespace, a file, and the command for both."""

    def __init__(self, cluster: Cluster, namespace: str, folder: Path) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.file = folder / "run.yaml"
        self.run = ClusterRun(cluster, namespace, "run")

    def write(self, text: str | None = None, **spec: Any) -> None:
        """The file: a run with parts of its spec changed, without a namespace."""
        document = run_document(self.namespace, "run", **spec)
        del document["metadata"]["namespace"]
        self.file.write_text(text if text is not None else yaml.safe_dump(document))

    def atelier(self, *arguments: str, answer: str = "", kubeconfig: Path | None = None) -> Ended:
        return atelier(self.cluster, *arguments, "-n", self.namespace, answer=answer, kubeconfig=kubeconfig)

    def started(self, *arguments: str) -> Ended:
        """The command as a user starts it."""
        return run_with(self.cluster.environment, *arguments, "-n", self.namespace)

    def submit(self, **spec: Any) -> None:
        self.write(**spec)
        ended = self.atelier("submit", str(self.file))
        assert ended.returncode == 0, ended.stderr

    def end(self, code: ExitCode, message: str = "") -> None:
        """Let the gang end."""
        end_well(self.run) if code is ExitCode.DONE else end(self.run, code, message)


@pytest.fixture
def place(operator: OperatorProcess, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    namespace = f"c{abs(hash(request.node.nodeid)) % 10**8}"
    operator.cluster.make_namespace(namespace)
    yield Place(operator.cluster, namespace, tmp_path)
    forget_namespace(operator.cluster, namespace)
