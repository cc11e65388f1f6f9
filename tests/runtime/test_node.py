"""One attempt on one node: what torchrun is told, and the lock of a run."""

import subprocess
import sys
from pathlib import Path

import pytest

from atelier_api.errors import ConfigError
from atelier_runtime.node import Attempt, hold_lock, holder
from atelier_runtime.observe.metrics import RECOVER_UNTIL
from run_files import run_file


def test_a_single_node_meets_itself_on_a_free_port(tmp_path: Path) -> None:
    command = Attempt(run_file(tmp_path, processes=4), 0, "localhost:1", "launch.module").command()
    assert {"--nnodes=1", "--nproc-per-node=4", "--standalone", "--max-restarts=0"} <= set(command)
    assert command[-4:-1] == ["-m", "launch.module", "--run-file"]


def test_torchrun_waits_longer_for_its_ranks_than_the_agent_does(tmp_path: Path) -> None:
    command = Attempt(run_file(tmp_path, schedule={"terminationGraceSeconds": 300}), 0, "", "m").command()
    (timeout,) = [int(part.partition("=")[2]) for part in command if part.startswith("--shutdown-timeout")]
    assert timeout > 300


def test_global_ranks_follow_the_ranks_of_the_nodes(tmp_path: Path) -> None:
    command = Attempt(run_file(tmp_path, nodes=2, processes=4), 1, "10.0.0.1:29400", "m").command()
    assert {"--node-rank=1", "--master-addr=10.0.0.1", "--master-port=29400", "--nnodes=2"} <= set(command)
    assert command[command.index("--first-rank") + 1] == "4"


def test_a_model_that_must_still_be_fetched_may_be_fetched(tmp_path: Path) -> None:
    fetched = Attempt(run_file(tmp_path), 0, "", "m").environment({"A": "b"}, recover_until=7)
    assert (fetched["A"], fetched["HF_HUB_OFFLINE"], fetched["OMP_NUM_THREADS"], fetched[RECOVER_UNTIL]) == (
        "b",
        "1",
        "3",
        "7",
    )
    elsewhere = run_file(tmp_path).model_copy(update={"model_folder": "owner/name"})
    assert "HF_HUB_OFFLINE" not in Attempt(elsewhere, 0, "", "m").environment({}, recover_until=0)


def test_a_lock_names_its_holder_and_is_free_after_it(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    code = "import sys, time; from pathlib import Path; from atelier_runtime.node import hold_lock\n"
    code += "with hold_lock(Path(sys.argv[1]), 'x'): print('held', flush=True); time.sleep(600)"
    assert holder(path) is None
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert holder(path) == process.pid
        with (
            pytest.raises(ConfigError, match=f"run demo is being trained by process {process.pid}"),
            hold_lock(path, "run demo"),
        ):
            pass
    finally:
        process.kill()
        process.communicate()
    assert holder(path) is None
    with hold_lock(path, "run demo"):
        pass
