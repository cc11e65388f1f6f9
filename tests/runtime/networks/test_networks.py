"""The package of networks: all that it names is there, and nothing is read before it is asked for."""

import subprocess
import sys

import pytest

from atelier_runtime import components, networks

UNREAD = """
import sys
from atelier_runtime import networks
found = [name for name in sys.modules if name.startswith("atelier_runtime.networks.") or name in ("torch", "diffusers")]
sys.exit(f"read: {found}" if found else 0)
"""


def test_importing_the_package_reads_no_network() -> None:
    done = subprocess.run([sys.executable, "-c", UNREAD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", networks.__all__)
def test_every_name_is_a_class_of_that_name(name: str) -> None:
    assert getattr(networks, name).__name__ == name
    assert components.class_named(name) is getattr(networks, name)


def test_another_name_is_refused_as_of_any_module() -> None:
    with pytest.raises(AttributeError, match=r"module 'atelier_runtime\.networks' has no attribute 'Unknown'"):
        _ = networks.Unknown
    assert not hasattr(networks, "_nothing")
