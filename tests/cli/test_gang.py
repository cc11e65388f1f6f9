"""The nodes of a run on this machine."""

from pathlib import Path

from atelier_api.exit_codes import MEANINGS, ExitCode
from atelier_api.result import AgentResult
from atelier_cli.gang import Gang, decisive, read_result
from run_files import run_file


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
