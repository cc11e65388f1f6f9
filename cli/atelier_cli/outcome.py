"""The end of a run, told: what was made and how to load it, or what went wrong."""

import json
from collections.abc import Iterator
from pathlib import Path

from atelier_api.errors import RunError
from atelier_api.exit_codes import ExitCode
from atelier_api.families import FAMILIES
from atelier_api.model_files import (
    FEW_STEPS,
    base_arguments,
    few_step_loading,
    inversion_loading,
    lora_loading,
    lycoris_loading,
    token_file,
)
from atelier_api.result import AgentResult
from atelier_api.run_file import RunFile
from atelier_api.sampler import sampler_loading
from atelier_api.v1alpha1.adapter import TextualInversionAdapter
from atelier_cli import terminal
from atelier_cli.follow import last_lines
from atelier_operator.planner.checkpoint_facts import DENOISERS
from atelier_runtime.observe.failure import Failure, read_failures
from atelier_runtime.observe.scratch import Scratch
from atelier_runtime.store import open_store

LOG_LINES = 15
LORA_FILE = "exports/diffusers/pytorch_lora_weights.safetensors"

# The message alone says what to do.
CLEAR = (ExitCode.CONFIG, ExitCode.DATA, ExitCode.CREDENTIALS, ExitCode.DIVERGED, ExitCode.STORE_UNREACHABLE)


def tell(run_file: RunFile, result: AgentResult, file: Path) -> None:
    """Print what the result means for the user."""
    if result.exit_code is ExitCode.DONE:
        for line in made(run_file):
            terminal.say(line)
    elif result.exit_code is ExitCode.STOPPED:
        for line in stopped(result, file):
            terminal.say(line)
    else:
        tell_failure(run_file, result)


def made(run_file: RunFile) -> Iterator[str]:
    """Where the results lie, and the lines that load them."""
    root = run_file.store_uri
    try:
        store = open_store(root, run_file.spec.storage.s3)
        exports = [info.key for info in store.list("exports/")]
        samples, report = bool(store.list("samples/")), store.head("report.html")
    except RunError as error:
        yield f"done; {root} cannot be listed just now: {error}"
        return
    for key in (key for key in exports if key.endswith(".safetensors")):
        yield f"weights  {root}/{key}"
    if samples:
        yield f"samples  {root}/samples"
    if report is not None:
        yield f"report   {root}/report.html"
    if exports:
        yield ""
        yield from loading(run_file, exports)


def loading(run_file: RunFile, exports: list[str]) -> Iterator[str]:
    """Python that loads the result, or the folder that it belongs into."""
    fetched = run_file.store_uri.startswith("s3://")
    root = "." if fetched else run_file.store_uri
    if fetched:
        yield f"aws s3 cp --recursive {run_file.store_uri}/exports exports"
    for line in _loading(run_file, exports, root):
        yield line
        if line.startswith("pipe = "):
            yield from sampler_loading(run_file.spec.objective)
            for key in (key for key in exports if key.startswith(FEW_STEPS)):
                yield from few_step_loading(f"{root}/{key}")


def _loading(run_file: RunFile, exports: list[str], root: str) -> Iterator[str]:
    base = base_arguments(run_file.spec.model, run_file.model_folder)
    facts = FAMILIES[run_file.spec.model.family]
    # diffusers finds its pipelines by the index of the checkpoint; others are called by name.
    pipeline = "DiffusionPipeline" if facts.library == "diffusers" else facts.pipelines[0]
    if LORA_FILE in exports:
        folder, _, name = LORA_FILE.rpartition("/")
        yield f"from {facts.library} import {pipeline}"
        yield f"pipe = {pipeline}.from_pretrained({base})"
        yield from lora_loading(facts, f"{root}/{folder}", name)
        return
    if lycoris := [key for key in exports if key.startswith("exports/lycoris/")]:
        yield f"from {facts.library} import {pipeline}"
        yield f"pipe = {pipeline}.from_pretrained({base})"
        # Of two experts, `_high_noise` is the first, also by the alphabet.
        denoisers = [name for name in DENOISERS if name in _classes(Path(run_file.model_folder))]
        for key, component in zip(sorted(lycoris), denoisers, strict=False):
            yield from lycoris_loading(component, f"{root}/{key}", run_file.spec.adapter.type)
        return
    if isinstance(run_file.spec.adapter, TextualInversionAdapter):
        yield f"from {facts.library} import {pipeline}"
        yield f"pipe = {pipeline}.from_pretrained({base})"
        for each in run_file.spec.adapter.tokens:
            yield from inversion_loading(facts, each.token, f"{root}/exports/diffusers/{token_file(each.token)}")
        return
    components = sorted(
        {key.split("/")[2] for key in exports if key.startswith("exports/diffusers/") and key.count("/") > 2}
    )
    classes = _classes(Path(run_file.model_folder))
    if components and all(name in classes for name in components):
        yield f"from {facts.library} import {', '.join(sorted({pipeline, *(classes[name] for name in components)}))}"
        for name in components:
            yield f'{name} = {classes[name]}.from_pretrained("{root}/exports/diffusers/{name}")'
        arguments = ", ".join(f"{name}={name}" for name in components)
        yield f"pipe = {pipeline}.from_pretrained({base}, {arguments})"
    elif not components:
        yield "ComfyUI: put the weights into models/loras"


def _classes(folder: Path) -> dict[str, str]:
    """Class of each component of a checkpoint."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError):
        return {}
    return {name: entry[1] for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2 and entry[1]}


def stopped(result: AgentResult, file: Path) -> Iterator[str]:
    """Where the run stands, and how it goes on."""
    step = "" if result.step is None else f" at step {result.step}"
    yield f"stopped{step}: {result.message}"
    if result.checkpoint_step is not None:
        yield f"checkpoint at step {result.checkpoint_step}; `atelier run {file}` goes on from there"


def tell_failure(run_file: RunFile, result: AgentResult) -> None:
    """The cause first; behind it, where the message alone does not tell enough, the failing rank's last lines."""
    rank = "" if result.rank is None else f"rank {result.rank}: "
    at = "" if not result.step or result.exit_code in (ExitCode.CONFIG, ExitCode.DATA) else f" (step {result.step})"
    scratch = Scratch(Path(run_file.scratch))
    failure = _failure(scratch, result)
    if result.exit_code not in CLEAR and result.rank is not None:
        _tell_log(run_file, scratch, result)
        if result.exit_code is ExitCode.INTERNAL and failure is not None and failure.traceback:
            terminal.console(stderr=True).print(failure.traceback, soft_wrap=True)
            terminal.say_errors(
                f"{rank}{result.message}{at}; this is a bug of atelier, please report it with the lines above"
            )
            return
    terminal.say_errors("\n".join(f"{rank}{line}" for line in f"{result.message}{at}".splitlines()))


def _failure(scratch: Scratch, result: AgentResult) -> Failure | None:
    failures = read_failures(scratch.failures(result.attempt)) if result.attempt else []
    return next((failure for failure in failures if failure.rank == result.rank), None)


def _tell_log(run_file: RunFile, scratch: Scratch, result: AgentResult) -> None:
    processes = run_file.plan.processes_per_node
    node, local_rank = divmod(result.rank or 0, processes)
    found = scratch.logs(result.attempt, node).glob(f"*/attempt_0/{local_rank}/stderr.log")
    logs = sorted(found, key=lambda path: path.stat().st_mtime)
    lines = last_lines(logs[-1], LOG_LINES) if logs else []
    if lines:
        stream = terminal.console(stderr=True)
        stream.print(f"last lines of rank {result.rank} ({logs[-1]}):", soft_wrap=True)
        for line in lines:
            stream.print(f"  {line}", style="dim", soft_wrap=True)
