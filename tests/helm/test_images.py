"""The Dockerfiles, as far as they can be checked without a container engine."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ("operator", "runtime")


@pytest.fixture(params=IMAGES)
def dockerfile(request: pytest.FixtureRequest) -> str:
    text = (ROOT / "images" / request.param / "Dockerfile").read_text()
    return re.sub(r"^ *#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")


def instructions(dockerfile: str, name: str) -> list[list[str]]:
    """Arguments of every instruction of the name."""
    return [line.split()[1:] for line in dockerfile.splitlines() if line.startswith(f"{name} ")]


def copied(dockerfile: str) -> set[str]:
    """What comes from the repository."""
    return {
        source
        for sources in instructions(dockerfile, "COPY")
        if not sources[0].startswith("--from")
        for source in sources[:-1]
    }


def project() -> dict[str, dict[str, object]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_copied_file_exists_and_is_not_ignored(dockerfile: str) -> None:
    sources = copied(dockerfile)
    assert all((ROOT / source).exists() for source in sources)
    for image in IMAGES:
        ignored = (ROOT / "images" / image / "Dockerfile.dockerignore").read_text().splitlines()
        assert {line[1:] for line in ignored if line.startswith("!")} == sources


def test_the_distribution_is_copied_whole(dockerfile: str) -> None:
    packages = re.findall(r"^packages = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0]
    names = re.findall(r'"([^"]+)"', packages)
    assert len(names) == 4
    assert set(names) | {"pyproject.toml", "constraints.txt"} <= copied(dockerfile)
    assert project()["project"]["readme"] in copied(dockerfile)


def test_both_stages_use_the_base_that_is_given(dockerfile: str) -> None:
    assert [stage[0] for stage in instructions(dockerfile, "FROM")] == ["${BASE}", "${BASE}"]
    assert dockerfile.index("ARG BASE=") < dockerfile.index("FROM")


def test_what_is_installed_is_pinned(dockerfile: str) -> None:
    installs = re.findall(r"/pip [^&\n]*install [^&\n]*", dockerfile)
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in install or "--no-deps" in install for install in installs)


def test_the_user_is_the_one_that_pods_are_given(dockerfile: str) -> None:
    from atelier_api.v1alpha1.profile import PodSecurity

    security = PodSecurity()
    assert instructions(dockerfile, "USER") == [[f"{security.run_as_user}:{security.run_as_group}"]]
    template = (ROOT / "helm" / "atelier" / "templates" / "_names.tpl").read_text()
    assert f"runAsUser: {security.run_as_user}" in template


def test_extras_that_are_installed_exist() -> None:
    extras = project()["project"]["optional-dependencies"]
    for image in IMAGES:
        text = (ROOT / "images" / image / "Dockerfile").read_text()
        wanted = {"operator": ["operator"], "runtime": ["runtime", "deepspeed"]}[image]
        assert re.findall(r'"optional-dependencies"]\["(\w+)"]', text) == wanted
    assert {"operator", "runtime", "deepspeed"} <= set(extras)
    assert not any(str(each).startswith("torch") for each in extras["operator"])


def test_labels_say_what_the_image_is(dockerfile: str) -> None:
    labels = set(re.findall(r"org\.opencontainers\.image\.(\w+)=", dockerfile))
    assert labels == {"title", "description", "licenses", "version", "revision"}
