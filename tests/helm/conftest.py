"""The chart as helm renders it. Siblings cannot import this; what tests need comes through the fixture `helm`."""

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import programs
from go_build import NoGo

CHART = Path(__file__).resolve().parents[2] / "helm" / "atelier"
IMAGE = {"operator": {"image": {"repository": "registry.example.org/atelier-operator"}}}

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the CRDs are long

Values = Mapping[str, Any]
Object = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """What `helm template` made of the chart."""

    objects: list[Object]

    def of(self, kind: str) -> list[Object]:
        return [each for each in self.objects if each["kind"] == kind]

    def one(self, kind: str, name: str = "") -> Object:
        """The only object of the kind, or of that name."""
        found = [each for each in self.of(kind) if name in ("", each["metadata"]["name"])]
        assert len(found) == 1, f"{len(found)} of {kind} {name}"
        return found[0]

    def environment(self) -> dict[str, str]:
        """The operator's variables; of those that Kubernetes fills in, the field."""
        container = self.one("Deployment")["spec"]["template"]["spec"]["containers"][0]
        values = ((each["name"], each.get("value"), each.get("valueFrom")) for each in container["env"])
        return {name: value or source["fieldRef"]["fieldPath"] for name, value, source in values}


class Helm:
    """Calls helm on the chart, with values as a dictionary. The operator's image is always given."""

    def __init__(self, program: Path, values: Path) -> None:
        self._program = program
        self._values = values
        self._templates: dict[str, subprocess.CompletedProcess[str]] = {}

    def template(self, *values: Values, serves: tuple[str, ...] = (), upgrade: bool = False) -> Rendered:
        """Release `atelier` in namespace `atelier-system` of a cluster that serves these APIs besides its own.

        Of several values the later ones win.
        """
        result = self._template(values, serves, ["--is-upgrade"] if upgrade else [])
        assert result.returncode == 0, result.stderr
        return Rendered([each for each in yaml.load_all(result.stdout, LOADER) if each])

    def refusal(self, *values: Values, serves: tuple[str, ...] = ()) -> str:
        """What helm says of values that it refuses."""
        result = self._template(values, serves, [])
        assert result.returncode != 0, "helm accepts the values"
        return result.stderr

    def lint(self, values: Values) -> str:
        """What `helm lint` says of values; nothing when it is content."""
        result = self._run("lint", str(CHART), "--strict", "-f", str(self._write([values])))
        return result.stdout + result.stderr if result.returncode else ""

    def _template(
        self, values: Sequence[Values], serves: tuple[str, ...], more: list[str]
    ) -> subprocess.CompletedProcess[str]:
        """Rendered once for the same values: a dozen tests look at the chart's defaults."""
        apis = [f"--api-versions={api}" for api in serves]
        given = ["-f", str(self._write(values)), "--namespace=atelier-system", *apis, *more]
        key = " ".join([self._values.read_text(), *given])
        if key not in self._templates:
            self._templates[key] = self._run("template", "atelier", str(CHART), *given)
        return self._templates[key]

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(self._program), *arguments], capture_output=True, text=True, check=False)

    def _write(self, values: Sequence[Values]) -> Path:
        self._values.write_text(json.dumps(reduce(merged, values, IMAGE)))
        return self._values


def merged(one: Values, other: Values) -> dict[str, Any]:
    """`other` over `one`, as helm merges values."""
    result = dict(one)
    for key, value in other.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


@pytest.fixture(scope="session")
def helm(cluster_report: Callable[[str], None], tmp_path_factory: pytest.TempPathFactory) -> Helm:
    try:
        program = programs.program("helm", cluster_report)
    except NoGo as error:
        pytest.skip(str(error))
    return Helm(program, tmp_path_factory.mktemp("helm") / "values.json")
