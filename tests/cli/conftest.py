"""A run whose checkpoint is real and tiny, for all tests of the command line."""

from pathlib import Path

import pytest

from runs import LocalRun, demo_run, tiny_run


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny checkpoint and pictures, made once."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_run(folder)
    return folder


@pytest.fixture
def local_run(base_folder: Path, tmp_path: Path) -> LocalRun:
    """A run in a folder of its own."""
    return demo_run(base_folder, tmp_path)
