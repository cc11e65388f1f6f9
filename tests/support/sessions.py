"""A rank's session within the process of a test."""

from pathlib import Path

from atelier_api.run_file import RunFile
from atelier_runtime import launch, parallel
from atelier_runtime.checkpoint import WriterProcess


def opened(file: RunFile) -> launch.Session:
    """The session of a run of one process, as `launch.main` opens it, in place of another one. The caller stops the process group."""
    parallel.stop()  # a writer must find none
    writer = WriterProcess(Path(file.scratch))
    return launch.open_session(file, parallel.start(file.plan), writer, launch.StopFlag())
