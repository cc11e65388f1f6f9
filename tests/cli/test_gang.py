"""The nodes of a run on this machine."""

import select
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torchx.specs import AppState

from atelier_api.exit_codes import MEANINGS, ExitCode
from atelier_api.result import AgentResult
from atelier_cli.gang import Gang, decisive, read_result
from atelier_runtime.observe.scratch import Scratch
from run_files import run_file

UNAWARE = """
import sys, time
from pathlib import Path
from atelier_runtime.node import hold_lock
with hold_lock(Path(sys.argv[1]), "node 0"):
    print(flush=True)
    time.sleep(60)
"""


def _result(code: ExitCode, at: float) -> AgentResult:
    return AgentResult(exit_code=code, reason=MEANINGS[code].reason, message="", attempt="1.0", time=at)


def test_the_earliest_own_failure_decides() -> None:
    lost, stopped, done = (
        _result(ExitCode.COLLECTIVE_TIMEOUT, 1),
        _result(ExitCode.STOPPED, 0),
        _result(ExitCode.DONE, 0),
    )
    data, memory = _result(ExitCode.DATA, 3), _result(ExitCode.OUT_OF_MEMORY, 2)
    assert decisive([lost, data, memory, stopped]) == memory
    assert decisive([stopped, lost, done]) == lost
    assert decisive([done, stopped]) == stopped
    assert decisive([done, done]) == done


def test_each_node_gets_the_command_of_a_pod(tmp_path: Path) -> None:
    (role,) = Gang(run_file(tmp_path, nodes=2), launch_module="x").app(Path("/a$b/run.json")).roles
    assert role.num_replicas == 2
    assert role.args[:6] == [
        "-m",
        "atelier_runtime.agent",
        "--run-file",
        "/a$$b/run.json",
        "--node-rank",
        "${replica_id}",
    ]
    assert role.args[role.args.index("--rendezvous") + 1].startswith("localhost:")


def test_an_agent_that_left_no_word_is_an_internal_error_with_the_place_of_its_log(tmp_path: Path) -> None:
    gang = Gang(run_file(tmp_path), launch_module="x")
    log = gang.log_folder / "atelier" / "demo-1" / "node" / "0" / "combined.log"
    log.parent.mkdir(parents=True)
    log.write_text("")
    (result,) = gang.results()
    assert result.exit_code is ExitCode.INTERNAL
    assert result.message == f"the agent of node 0 was killed or could not start; its log is {log}"
    assert read_result(tmp_path / "result-0.json") is None


@pytest.mark.parametrize(("patience", "is_ended"), [(0.0, True), (1000.0, False)], ids=["patience is over", "in time"])
def test_a_node_that_does_not_notice_that_its_peer_has_failed_is_ended(
    patience: float, is_ended: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gang = Gang(run_file(tmp_path, nodes=2), launch_module="x", lost_peer_seconds=patience)
    monkeypatch.setattr(gang._runner, "status", lambda _: SimpleNamespace(state=AppState.RUNNING))
    scratch = Scratch(tmp_path)
    scratch.result(1).write_text(_result(ExitCode.INTERNAL, 1).model_dump_json())
    with subprocess.Popen([sys.executable, "-c", UNAWARE, str(scratch.lock(0))], stdout=subprocess.PIPE) as unaware:
        try:
            assert unaware.stdout is not None
            assert unaware.stdout.readline()
            assert gang.running()
            assert gang.running()
            ended = select.select([unaware.stdout], [], [], 30 if is_ended else 0)[0]
            assert bool(ended) is is_ended
        finally:
            unaware.kill()
    assert (unaware.returncode == -signal.SIGTERM) is is_ended
