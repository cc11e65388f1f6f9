"""A tiny checkpoint, a few captioned pictures, and a count of how often encoders are loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from atelier_runtime import components
from family_models import save_tiny
from tiny_data import SAMPLE_SIZES, write_pictures


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("sd3", tmp_path_factory.mktemp("checkpoint") / "sd3")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """000.png to 003.png of SAMPLE_SIZES, captioned "a picture 0" to "a picture 3"."""
    write_pictures(tmp_path / "pictures", SAMPLE_SIZES)
    return tmp_path / "pictures"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that encoders have been loaded from."""
    folders: list[Path] = []
    load = components.load_encoders

    def counting(family: Any, folder: Any, dtype: torch.dtype, device: torch.device) -> Any:
        folders.append(Path(folder))
        return load(family, folder, dtype, device)

    monkeypatch.setattr(components, "load_encoders", counting)
    return folders
