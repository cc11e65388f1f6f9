"""What the command line finds of the machine."""

from pathlib import Path

import pytest

from atelier_cli.machine import gpu_memory, host, memory_bytes, surroundings

DRIVER = """#!/bin/sh
echo "0, GPU-aaaa, 81559"
echo "1, GPU-bbbb, [N/A]"
echo "2, GPU-cccc, 24576"
"""
MIB = 1 << 20


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    """A folder whose `nvidia-smi` tells of three GPUs."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(DRIVER)
    tool.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("visible", "memory"),
    [
        (None, (81559 * MIB, None, 24576 * MIB)),
        ("2,0", (24576 * MIB, 81559 * MIB)),
        ("GPU-cccc", (24576 * MIB,)),
        ("", ()),
        ("7", ()),
    ],
)
def test_gpus_are_those_that_the_user_lets_us_see(
    driver: Path, visible: str | None, memory: tuple[int | None, ...]
) -> None:
    environment = {"PATH": str(driver)} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert gpu_memory(environment) == memory


def test_a_machine_without_a_driver_has_no_gpus(tmp_path: Path) -> None:
    assert gpu_memory({"PATH": str(tmp_path)}) == ()


def test_a_driver_that_fails_means_no_gpus(driver: Path) -> None:
    (driver / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert gpu_memory({"PATH": str(driver)}) == ()


def test_a_container_has_the_memory_of_its_limit(tmp_path: Path) -> None:
    whole = memory_bytes(tmp_path / "none")
    assert whole is not None
    limit = tmp_path / "memory.max"
    limit.write_text("1048576\n")
    assert memory_bytes(limit) == 1048576
    limit.write_text("max\n")
    assert memory_bytes(limit) == whole


def test_this_machine_has_cores_and_relative_paths_start_at_the_file(tmp_path: Path) -> None:
    assert host().cores >= 1
    assert surroundings(tmp_path / "run.yaml").absolute("pictures") == tmp_path / "pictures"
