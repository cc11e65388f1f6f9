"""The operator's image as `images/operator/Dockerfile` makes it: what is in it, who it runs as, and what must not be in it."""

import json
import shutil
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from cluster import buildah
from cluster.buildah import BuiltImage
from go_build import ROOT

pytestmark = [pytest.mark.processes, pytest.mark.timeout(3600)]
pytest_plugins = ("cluster_fixtures",)

PACKAGES = PurePosixPath("opt/atelier/lib")


@pytest.fixture(scope="module")
def config(operator_image: BuiltImage) -> dict[str, Any]:
    with tarfile.open(operator_image.archive) as archive:
        (manifest,) = read_json(archive, "manifest.json")
        assert manifest["RepoTags"] == [operator_image.name]
        return dict(read_json(archive, manifest["Config"]))


@pytest.fixture(scope="module")
def files(operator_image: BuiltImage) -> set[PurePosixPath]:
    """Every file that the Dockerfile adds to its base, which is the first layer."""
    found: set[PurePosixPath] = set()
    with tarfile.open(operator_image.archive) as archive:
        (manifest,) = read_json(archive, "manifest.json")
        for layer in manifest["Layers"][1:]:
            with tarfile.open(fileobj=archive.extractfile(layer)) as tar:
                found |= {PurePosixPath(member.name) for member in tar if not member.isdir()}
    return found


def read_json(archive: tarfile.TarFile, name: str) -> Any:
    file = archive.extractfile(name)
    assert file is not None
    return json.load(file)


def test_it_runs_the_operator_and_not_as_root(config: dict[str, Any]) -> None:
    settings = config["config"]
    assert settings["User"] == "1000:1000"
    assert settings["Entrypoint"] == ["python", "-m", "atelier_operator"]
    assert settings["Labels"]["org.opencontainers.image.version"] == "0.1.0"


def test_the_operator_is_in_it_and_nothing_that_it_does_not_need(files: set[PurePosixPath]) -> None:
    code = {path.parts[2] for path in files if path.is_relative_to("opt/atelier-code")}
    assert {"atelier_api", "atelier_operator"} <= code
    assert not code & {"atelier_runtime", "atelier_cli"}
    packages = {path.parts[5] for path in files if path.is_relative_to(PACKAGES) and len(path.parts) > 5}
    assert {"kopf", "kubernetes", "pydantic"} <= packages
    assert not packages & {"torch", "pip", "setuptools", "hatchling"}


def test_nothing_of_the_machine_that_builds_is_in_it(files: set[PurePosixPath], config: dict[str, Any]) -> None:
    assert {path.parts[:2] for path in files} == {("opt", "atelier"), ("opt", "atelier-code")}
    assert "PIP_" not in json.dumps(config)


def test_it_is_built_once_and_again_when_its_sources_change(operator_image: BuiltImage, tmp_path: Path) -> None:
    def no_build(line: str) -> None:
        raise AssertionError(f"built again: {line}")

    assert buildah.built(buildah.OPERATOR, no_build) == operator_image
    for path in buildah.sources(buildah.OPERATOR):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    base = Path("base.tar")
    before = buildah.digest(buildah.OPERATOR, base, tmp_path)
    assert before == buildah.digest(buildah.OPERATOR, base)
    (tmp_path / "operator" / "atelier_operator" / "main.py").write_text("changed")
    assert buildah.digest(buildah.OPERATOR, base, tmp_path) != before
