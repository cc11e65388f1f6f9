"""A child process with everything below it."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from atelier_runtime.process_group import ProcessGroup

PATIENCE_SECONDS = 60.0
SLEEPING = "import time; time.sleep(600)"
WITH_CHILD = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {SLEEPING!r}], start_new_session=True)
time.sleep(600)
"""

# A child that leaves an orphan, which ends at once; the first process must be left with the group alone.
REAPER = """
import os, subprocess, sys, time
from atelier_runtime.process_group import ProcessGroup, adopt_orphans
adopt_orphans()
group = ProcessGroup([sys.executable, "-c", "import time; time.sleep(600)"], os.environ)
leaves_one = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'pass'])"
subprocess.Popen([sys.executable, "-c", leaves_one])
end = time.monotonic() + 60
children = []
while children != [str(group.pid)] and time.monotonic() < end:
    assert group.poll() is None
    children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
    time.sleep(0.05)
print(children == [str(group.pid)])
group.kill()
"""


@pytest.fixture
def groups() -> Iterator[list[ProcessGroup]]:
    started: list[ProcessGroup] = []
    yield started
    for group in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(group.pid).kill()


def _ended(group: ProcessGroup) -> int:
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        status = group.poll()
        if status is not None:
            return status
        time.sleep(0.02)
    raise AssertionError("the child goes on")


def test_the_exit_status_stays_known(groups: list[ProcessGroup]) -> None:
    groups.append(group := ProcessGroup([sys.executable, "-c", "raise SystemExit(3)"], os.environ))
    assert _ended(group) == 3
    assert group.poll() == 3
    group.terminate()
    group.kill()
    assert not group.has_children()


def test_a_stop_is_a_sigterm_to_the_child(groups: list[ProcessGroup]) -> None:
    groups.append(group := ProcessGroup([sys.executable, "-c", SLEEPING], os.environ))
    group.terminate()
    assert _ended(group) == -15


def test_a_kill_reaches_children_in_sessions_of_their_own(groups: list[ProcessGroup]) -> None:
    groups.append(group := ProcessGroup([sys.executable, "-c", WITH_CHILD], os.environ))
    end = time.monotonic() + PATIENCE_SECONDS
    while not group.has_children():
        assert time.monotonic() < end
        time.sleep(0.02)
    (below,) = psutil.Process(group.pid).children(recursive=True)
    group.kill()
    assert _ended(group) == -9
    _, alive = psutil.wait_procs([below], timeout=PATIENCE_SECONDS)
    assert not alive


def test_other_children_are_reaped_on_the_way(groups: list[ProcessGroup]) -> None:
    ended = subprocess.run([sys.executable, "-c", REAPER], capture_output=True, text=True, timeout=PATIENCE_SECONDS * 2)
    assert ended.stdout == "True\n", ended.stderr
