"""A rank's session within the process of a test."""

from pathlib import Path

from atelier_api.run_file import ExecutionPlan, RunFile
from atelier_runtime import launch, parallel
from atelier_runtime.checkpoint import WriterProcess


def opened(file: RunFile) -> launch.Session:
    """The session of a run of one process, as `launch.main` opens it, in place of another one. The caller stops the process group."""
    distributed, writer = alone(file.plan, Path(file.scratch))
    return launch.open_session(file, distributed, writer, launch.StopFlag())


def alone(plan: ExecutionPlan, folder: Path) -> tuple[parallel.Distributed, WriterProcess]:
    """A process group of this process in place of an earlier one, and a writer, which is forked where there is none."""
    parallel.stop()
    writer = WriterProcess(folder)
    return parallel.start(plan), writer
