"""The commands that train nothing."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from atelier_api.families import FAMILIES
from atelier_cli import report
from atelier_cli.main import app
from runs import LocalRun


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], {"torch", "pydantic", "torchx", "prometheus_client", "boto3", "psutil"}),
        (["models"], {"torch", "torchx", "prometheus_client", "boto3", "psutil"}),
        (["models", "--proved"], {"torch", "torchx", "prometheus_client", "boto3", "psutil"}),
        (["validate", "RUN"], {"torch", "torchx", "prometheus_client", "boto3", "psutil"}),
        (["plan", "RUN"], {"torch", "torchx", "prometheus_client", "boto3", "psutil"}),
        (["report", "RUN"], {"torch", "torchx", "boto3"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_nothing_heavy_is_imported_for_a_quick_answer(
    local_run: LocalRun, arguments: list[str], absent: set[str]
) -> None:
    command = "import sys; from atelier_cli.main import app; app(sys.argv[1:], standalone_mode=False)"
    code = f"{command}; print({absent!r} & set(sys.modules))"
    (local_run.folder).mkdir(parents=True)
    (local_run.folder / "report.html").write_text("")
    given = [str(local_run.path) if argument == "RUN" else argument for argument in arguments]
    ended = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True)
    assert ended.stdout.splitlines()[-1] == "set()", ended.stderr


def test_the_run_command_imports_no_torch() -> None:
    code = "import sys, atelier_cli.session, atelier_cli.machine; print({'torch', 'diffusers', 'boto3'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["run", "x.yaml", "--frsh"], "error: No such option: --frsh"),
        (["trian"], "error: No such command 'trian'"),
        (["plan"], "error: Missing argument 'file'"),
        (["plan", "nowhere.yaml"], "error: nowhere.yaml does not exist"),
        (["run", "nowhere.yaml"], "error: nowhere.yaml does not exist"),
    ],
)
def test_wrong_usage_is_one_line_and_64(arguments: list[str], text: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 64
    assert result.stderr.startswith(text)
    assert len(result.stderr.splitlines()) == 1


def test_a_bug_shows_where_and_asks_for_a_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(_folder: Path) -> Path:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(report, "_in_folder", broken)
    result = invoke("report", str(tmp_path))
    assert result.exit_code == 70
    assert "in broken" in result.stderr
    assert result.stderr.splitlines()[-1].startswith(
        "error: this is a bug of atelier (ZeroDivisionError: oops); please report"
    )


def test_validate_tells_every_mistake_of_every_file(local_run: LocalRun, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(local_run.path.read_text().replace("rank: 4", "rank: 0").replace("steps: 10", "steps: 0"))
    result = invoke("validate", str(local_run.path), str(bad), str(tmp_path / "none.yaml"))
    assert result.exit_code == 64
    assert result.stdout == f"{local_run.path}: ok\n"
    errors = result.stderr.splitlines()
    assert len(errors) == 3
    assert all(line.startswith("error: ") for line in errors)
    assert "spec.adapter.rank is 0; must be 1–1024" in errors[0]


def test_validate_notes_what_a_run_will_not_get(local_run: LocalRun) -> None:
    full = local_run.path.read_text().replace("type: lora", "type: full").replace("rank: 4", "").replace("alpha: 8", "")
    local_run.path.write_text(full)
    result = invoke("validate", str(local_run.path))
    assert result.exit_code == 0
    assert "note: spec.publish.formats: kohya is left out" in result.stdout


def test_models_lists_every_family() -> None:
    lines = invoke("models").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(FAMILIES)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_family_shows_its_checkpoints(name: str) -> None:
    text = invoke("models", name).stdout
    for flavour in FAMILIES[name].flavours:
        assert flavour.source in text


def test_an_unknown_family_names_the_nearest() -> None:
    result = invoke("models", "sdx")
    assert result.exit_code == 64
    assert result.stderr.startswith("error: there is no family sdx; did you mean sdxl?")


def test_plan_shows_the_strategy_and_the_memory_by_part(local_run: LocalRun) -> None:
    result = invoke("plan", str(local_run.path))
    assert result.exit_code == 0
    for text in (
        "LoRA of rank 4, alpha 8, on attention, about 0.0 million parameters",
        "frozen, fp32",
        "DDP, 2 processes on the CPU",
        "base weights",
        "optimizer",
        "activations",
        "peak of a process",
        "\nfits\n",
    ):
        assert text in result.stdout


@pytest.mark.parametrize(
    ("adapter", "text"),
    [
        ('{"type": "lokr", "rank": 4}', "LoKr of factor 16, rank 4, alpha 4, on attention, about"),
        ('{"type": "loha", "dora": true}', "LoHa of rank 32, alpha 16, weight-decomposed, on attention, about"),
        ('{"type": "dylora", "rankBlock": 8}', "DyLoRA of rank 128 in blocks of 8, alpha 64, on attention, about"),
        ('{"type": "ia3"}', "(IA)³ on attention, about"),
        ('{"type": "ia3", "targets": ["all"], "inputTargets": ["mlp"]}', "(IA)³ on all, of mlp on inputs, about"),
        ('{"type": "boft"}', "BOFT of blocks up to 64, on attention, about"),
        ('{"type": "full"}', "none, full rank, about"),
    ],
)
def test_plan_shows_the_adapter(local_run: LocalRun, adapter: str, text: str) -> None:
    assert text in invoke("plan", str(local_run.path), "--set", f"adapter={adapter}").stdout


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ([], "frozen, fp32"),
        (["model.quantization=int8"], "frozen, int8"),
        (["model.quantization=nf4"], "frozen, nf4"),
        (["adapter={type: full}"], "trained"),
    ],
)
def test_plan_shows_how_the_base_is_kept(local_run: LocalRun, changes: list[str], text: str) -> None:
    arguments = [argument for change in changes for argument in ("--set", change)]
    shown = invoke("plan", str(local_run.path), *arguments).stdout
    assert re.findall(r"^ *base {2,}(.+?) *$", shown, re.MULTILINE) == [text]


def test_a_quantised_base_is_in_the_plan_as_json_and_takes_less(local_run: LocalRun) -> None:
    whole, packed = _plan(local_run), _plan(local_run, "model.quantization=nf4")
    assert (whole["quantization"], packed["quantization"]) == (None, "nf4")
    assert packed["memory"]["train"]["base_weights"] < whole["memory"]["train"]["base_weights"]


@pytest.mark.parametrize(("tiling", "text"), [("auto", "none"), ("always", "of what is trained on and what is drawn")])
def test_plan_shows_what_goes_through_the_autoencoder_in_tiles(local_run: LocalRun, tiling: str, text: str) -> None:
    change = f"model.autoencoderTiling={tiling}"
    shown = invoke("plan", str(local_run.path), "--set", change).stdout
    assert re.findall(r"^ *tiles {2,}(.+?) *$", shown, re.MULTILINE) == [text]
    plan = _plan(local_run, change)
    assert plan["tiledEncoding"] == plan["tiledSamples"] == (tiling == "always")


def test_plan_shows_a_control_network(local_run: LocalRun) -> None:
    changes = ("--set", 'adapter={"type": "controlnet"}', "--set", "data.sources[0].conditioning=pictures")
    assert "control network, about" in invoke("plan", str(local_run.path), *changes).stdout


def _plan(local_run: LocalRun, *changes: str) -> dict[str, Any]:
    arguments = [argument for change in changes for argument in ("--set", change)]
    result = invoke("plan", str(local_run.path), "--json", *arguments)
    document = json.loads(result.stdout)
    assert (result.exit_code == 0) == document["fits"]
    return dict(document)


def test_plan_as_json_adds_up(local_run: LocalRun) -> None:
    plan = _plan(local_run)
    assert (plan["strategy"], plan["processes"]) == ("ddp", 2)
    assert plan["adapter"] == "lora"
    assert plan["trainedParameters"] > 0
    assert plan["microBatchSize"] * plan["gradientAccumulation"] * plan["processes"] == 4
    train = plan["memory"]["train"]
    assert sum(size for part, size in train.items() if part != "total") == train["total"]
    assert plan["memory"]["peak"] >= train["total"]


def test_a_run_that_does_not_fit_is_64_and_says_what_it_needs(local_run: LocalRun) -> None:
    changes = ["parallelism.deviceMemory=64Mi"]
    plan = _plan(local_run, *changes)
    assert not plan["fits"]
    assert "does not fit: needs" in plan["refusal"]
    result = invoke("plan", str(local_run.path), "--set", changes[0])
    assert result.exit_code == 64
    assert result.stderr == f"error: {plan['refusal']}\n"
    assert "peak of a process" in result.stdout


def test_a_plan_for_gpus_that_are_not_here_is_made_all_the_same(
    local_run: LocalRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    changes = ["parallelism.gpusPerNode=2", "parallelism.processesPerNode=null"]
    plan = _plan(local_run, *changes, "parallelism.deviceMemory=80Gi")
    assert (plan["device"], plan["processes"], plan["fits"]) == ("cuda", 2, True)
    assert plan["memory"]["usable"] > 70 << 30
    assert plan["notes"][0].startswith("not for this machine: spec.parallelism.gpusPerNode is 2")
    unchecked = _plan(local_run, *changes)
    assert "the fit is not checked" in unchecked["notes"][1]


def test_report_prints_the_path_for_a_file_and_a_folder(local_run: LocalRun) -> None:
    local_run.folder.mkdir(parents=True)
    path = local_run.folder / "report.html"
    path.write_text("<html></html>")
    assert invoke("report", str(local_run.path)).stdout == f"{path}\n"
    assert invoke("report", str(local_run.folder)).stdout == f"{path}\n"


def test_report_opens_the_browser_when_asked(local_run: LocalRun, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("typer.launch", opened.append)
    local_run.folder.mkdir(parents=True)
    (local_run.folder / "report.html").write_text("")
    invoke("report", str(local_run.folder), "--open")
    assert opened == [(local_run.folder / "report.html").as_uri()]


def test_a_run_without_a_report_says_when_there_will_be_one(local_run: LocalRun) -> None:
    result = invoke("report", str(local_run.path))
    assert result.exit_code == 65
    assert result.stderr.endswith("has no report.html; a run writes it when it is done or stopped\n")
