"""Which failure decides, and what an error means for the run."""

import errno
import signal
import time
from pathlib import Path

import pytest

from atelier_api.errors import ConfigError, CredentialsError, DataError, DivergedError, StoreError
from atelier_api.exit_codes import ExitCode
from atelier_runtime.observe.failure import (
    Ending,
    Failure,
    cause,
    exit_code_of,
    read_endings,
    read_failures,
    reason_of,
    record_failure,
    write_endings,
)


class OutOfMemoryError(RuntimeError):
    """Named as torch's, whose module is not imported here."""


class DistBackendError(RuntimeError):
    """Named as torch's."""


def _caused(outer: BaseException, inner: BaseException) -> BaseException:
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "code"),
    [
        pytest.param(ConfigError("x"), ExitCode.CONFIG, id="config"),
        pytest.param(DataError("x"), ExitCode.DATA, id="data"),
        pytest.param(CredentialsError("x"), ExitCode.CREDENTIALS, id="credentials"),
        pytest.param(DivergedError("x"), ExitCode.DIVERGED, id="diverged"),
        pytest.param(StoreError("x"), ExitCode.STORE_UNREACHABLE, id="store"),
        pytest.param(OutOfMemoryError("CUDA out of memory"), ExitCode.OUT_OF_MEMORY, id="torch-oom"),
        pytest.param(MemoryError(), ExitCode.OUT_OF_MEMORY, id="host-oom"),
        pytest.param(
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
            ExitCode.OUT_OF_MEMORY,
            id="cpu-allocator",
        ),
        pytest.param(DistBackendError("broken"), ExitCode.COLLECTIVE_TIMEOUT, id="backend-class"),
        pytest.param(
            RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3456"),
            ExitCode.COLLECTIVE_TIMEOUT,
            id="gloo",
        ),
        pytest.param(
            DistBackendError("NCCL error: uncorrectable ECC error encountered"),
            ExitCode.GPU_FAULT,
            id="ecc-inside-nccl",
        ),
        pytest.param(RuntimeError("CUDA error: unspecified launch failure"), ExitCode.GPU_FAULT, id="launch-failure"),
        pytest.param(RuntimeError("CUDA error: device-side assert triggered"), ExitCode.INTERNAL, id="assert-is-a-bug"),
        pytest.param(ValueError("Connection reset by peer"), ExitCode.INTERNAL, id="text-of-another-class"),
        pytest.param(ZeroDivisionError("x"), ExitCode.INTERNAL, id="bug"),
        pytest.param(
            _caused(RuntimeError("step failed"), OutOfMemoryError("x")), ExitCode.OUT_OF_MEMORY, id="cause-inside"
        ),
        pytest.param(
            _caused(ConfigError("too big"), OutOfMemoryError("x")), ExitCode.CONFIG, id="outermost-known-wins"
        ),
    ],
)
def test_exit_code_of_an_error(error: BaseException, code: ExitCode) -> None:
    assert exit_code_of(error) is code


def test_a_failure_reads_back_with_its_traceback(tmp_path: Path) -> None:
    try:
        raise DataError("the file a.png is empty")
    except DataError as error:
        record_failure(tmp_path / "failures", 3, error, step=12, files=["a.png"])
    (failure,) = read_failures(tmp_path / "failures")
    assert (failure.rank, failure.exit_code, failure.error) == (3, ExitCode.DATA, "DataError")
    assert (failure.message, failure.step, failure.files) == ("the file a.png is empty", 12, ["a.png"])
    assert 'raise DataError("the file a.png is empty")' in failure.traceback
    assert abs(failure.time - time.time()) < 60


def test_the_first_error_of_a_rank_stays(tmp_path: Path) -> None:
    record_failure(tmp_path, 0, ConfigError("first"))
    record_failure(tmp_path, 0, RuntimeError("from cleaning up"))
    assert [failure.message for failure in read_failures(tmp_path)] == ["first"]


def test_recording_never_raises(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    assert record_failure(in_the_way, 0, ConfigError("x")).exit_code is ExitCode.CONFIG


def test_a_damaged_failure_file_is_left_out(tmp_path: Path) -> None:
    record_failure(tmp_path, 0, ConfigError("x"))
    (tmp_path / "rank-1.json").write_text('{"rank": 1, ')
    assert [failure.rank for failure in read_failures(tmp_path)] == [0]


def test_endings_of_all_nodes_read_back(tmp_path: Path) -> None:
    first, second = Ending(rank=0, status=-9, time=1.0), Ending(rank=2, status=1, time=2.0)
    write_endings(tmp_path, 0, [first])
    write_endings(tmp_path, 1, [second])
    assert sorted(read_endings(tmp_path), key=lambda ending: ending.rank) == [first, second]


def _failure(rank: int, at: float, code: ExitCode) -> Failure:
    return Failure(rank=rank, time=at, exit_code=code, error="x", message=f"rank {rank}")


LOST = ExitCode.COLLECTIVE_TIMEOUT


@pytest.mark.parametrize(
    ("failures", "endings", "rank"),
    [
        pytest.param([_failure(1, 5, ExitCode.DATA), _failure(0, 4, ExitCode.CONFIG)], [], 0, id="earliest"),
        pytest.param([_failure(0, 1, LOST), _failure(1, 2, ExitCode.OUT_OF_MEMORY)], [], 1, id="lost-peer-was-quicker"),
        pytest.param([_failure(0, 3, LOST), _failure(1, 2, LOST)], [], 1, id="only-lost-peers"),
        pytest.param([_failure(0, 3, LOST)], [Ending(rank=1, status=-9, time=4)], 1, id="killed-peer-left-no-file"),
        pytest.param([_failure(0, 3, LOST)], [Ending(rank=1, status=-6, time=4)], 0, id="aborted-peer-is-lost-too"),
        pytest.param([_failure(0, 3, ExitCode.DATA)], [Ending(rank=0, status=-9, time=1)], 0, id="file-beats-ending"),
        pytest.param([_failure(0, 3, LOST)], [Ending(rank=1, status=-15, time=1)], 0, id="stopped-by-torchrun"),
        pytest.param([_failure(0, 3, LOST)], [Ending(rank=1, status=75, time=1)], 0, id="left-as-asked-by-torchrun"),
    ],
)
def test_the_cause_is_found_among_the_ranks(failures: list[Failure], endings: list[Ending], rank: int) -> None:
    decided = cause(failures, endings)
    assert decided is not None
    assert decided.rank == rank


@pytest.mark.parametrize(
    ("status", "code", "text"),
    [
        (-signal.SIGKILL, ExitCode.INTERNAL, "killed by SIGKILL (out of memory killer?)"),
        (-signal.SIGSEGV, ExitCode.INTERNAL, "killed by SIGSEGV"),
        (-signal.SIGABRT, ExitCode.COLLECTIVE_TIMEOUT, "killed by SIGABRT"),
        (3, ExitCode.INTERNAL, "left with exit status 3 without saying why"),
        (64, ExitCode.CONFIG, "left with exit status 64 without saying why"),
    ],
)
def test_a_rank_without_a_file_is_judged_by_its_ending(status: int, code: ExitCode, text: str) -> None:
    decided = cause([], [Ending(rank=1, status=status, time=1)])
    assert decided is not None
    assert (decided.exit_code, decided.rank) == (code, 1)
    assert decided.message.startswith(text)


def test_nothing_failed_when_all_ranks_left_as_asked() -> None:
    assert cause([], [Ending(rank=0, status=75, time=1), Ending(rank=1, status=0, time=1)]) is None


def test_peers_that_lose_each_other_after_a_stop_are_no_failure() -> None:
    assert cause([_failure(0, 11, LOST)], stopped_at=10) is None
    assert cause([_failure(0, 9, LOST)], stopped_at=10) is not None
    assert cause([_failure(0, 11, ExitCode.STORE_UNREACHABLE)], stopped_at=10) is not None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "DiskFull"),
        (_caused(RuntimeError("write failed"), OSError(errno.ENOSPC, "x")), "DiskFull"),
        (StoreError("x"), "StoreUnreachable"),
        (CredentialsError("x"), "CredentialsRejected"),
        (ZeroDivisionError(), "BackendError"),
    ],
)
def test_reasons_come_from_a_closed_set(error: BaseException, reason: str) -> None:
    assert reason_of(error) == reason
