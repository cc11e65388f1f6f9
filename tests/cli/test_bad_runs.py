"""Runs that cannot work, as users write them: one line per mistake, the right exit code, and nothing started."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from atelier_cli import machine
from atelier_cli.main import app
from atelier_operator.planner.local import Host, Surroundings
from header_checkpoints import write_checkpoint

GOOD = """\
apiVersion: atelier.dev/v1alpha1
kind: TrainingRun
metadata: {name: knight}
spec:
  model: {family: sd3, source: base}
  adapter: {type: lora, rank: 8}
  data:
    sources: [{uri: pictures}]
    resolution: 64
  hyperparameters:
    steps: 10
  parallelism: {gpusPerNode: 0}
"""

BAD: dict[str, tuple[str, str, int, str]] = {
    "a typo": (
        "steps: 10",
        "stepz: 10",
        64,
        "run.yaml:11: spec.hyperparameters.stepz is not a field; did you mean steps?",
    ),
    "an unknown family": (
        "family: sd3",
        "family: sd33",
        64,
        "run.yaml:5: spec.model.family is 'sd33'; did you mean sd3? allowed: ",
    ),
    "a checkpoint of another family": (
        "family: sd3",
        "family: flux",
        64,
        "spec.model.family is flux, but the checkpoint in ",
    ),
    "few steps without a teacher": (
        "adapter: {type: lora, rank: 8}",
        "adapter: {type: lora, rank: 8}\n  objective: {twinFlow: {}}",
        64,
        "spec.hyperparameters.ema is empty; spec.objective.twinFlow needs it",
    ),
    "rank 0": ("rank: 8", "rank: 0", 64, "run.yaml:6: spec.adapter.rank is 0; must be 1–1024"),
    "48 frames": (
        "{family: sd3, source: base}",
        "{family: wan, source: base}\n  validation: {prompts: [{text: a}], frames: 48}",
        64,
        "run.yaml:6: spec.validation.frames is 48; must be 4n+1 for wan, for example 45 or 49",
    ),
    "a key of nowhere": (
        "resolution: 64",
        "resolution: 64\n    shuffle: true",
        64,
        "run.yaml:10: spec.data.shuffle is not a field; spec.data has sources, resolution",
    ),
    "a key in the wrong block": (
        "rank: 8}",
        "rank: 8, seed: 3}",
        64,
        "run.yaml:6: spec.adapter.seed is not a field; did you mean spec.hyperparameters.seed",
    ),
    "what does not fit": ("{gpusPerNode: 0}", "{gpusPerNode: 0, deviceMemory: 256Mi}", 64, "does not fit: needs "),
    "a GPU that is not there": (
        "{gpusPerNode: 0}",
        "{}",
        64,
        "spec.parallelism.gpusPerNode is 1; this machine has no GPUs; 0 trains on the CPU",
    ),
    "S3 without credentials": (
        "gpusPerNode: 0}",
        "gpusPerNode: 0}\n  storage: {uri: s3://runs/art}",
        77,
        "spec.storage.uri is 's3://runs/art', and there are no credentials for S3; set AWS_ACCESS_KEY_ID",
    ),
    "no pictures": (
        "{uri: pictures}",
        "{uri: picture}",
        64,
        "spec.data.sources[0].uri is 'picture'; there is no folder ",
    ),
    "a model that is not fetched": (
        "source: base",
        "source: hf://owner/name",
        64,
        "which is not whole on this machine, and HF_HUB_OFFLINE forbids to fetch it; unset it, or run `hf download owner/name",
    ),
    "a batch that cannot be dealt out": (
        "{gpusPerNode: 0}",
        "{gpusPerNode: 0, processesPerNode: 2}",
        64,
        "run.yaml:10: spec.hyperparameters.globalBatchSize is 1; must be a multiple of 2 (1 node × 2 processes), for example 2",
    ),
    "broken YAML": (
        "[{uri: pictures}]",
        "[{uri: pictures}",
        64,
        "run.yaml:9: not valid YAML: while parsing a flow sequence",
    ),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint and pictures, on a machine without GPUs and credentials."""
    write_checkpoint(tmp_path / "base")
    (tmp_path / "pictures").mkdir()
    bare = Surroundings(tmp_path, home=tmp_path / "home", machine_vendor=tmp_path / "vendor")
    monkeypatch.setattr(machine, "surroundings", lambda path: bare)
    monkeypatch.setattr(machine, "host", lambda: Host(cores=2, memory_bytes=8 << 30))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("good", "bad", "code", "sentence"), BAD.values(), ids=BAD)
def test_a_bad_run_is_refused_in_one_line_before_anything_starts(
    good: str, bad: str, code: int, sentence: str, place: Path
) -> None:
    text = GOOD.replace(good, bad)
    assert text != GOOD
    (place / "run.yaml").write_text(text)
    result = CliRunner().invoke(app, ["run", "run.yaml"])
    lines = [line for line in result.stderr.splitlines() if sentence in line]
    assert len(lines) == 1, result.output
    assert result.exit_code == code
    assert not (place / "runs").exists()


def test_the_run_that_the_bad_ones_are_made_from_is_good(place: Path) -> None:
    (place / "run.yaml").write_text(GOOD)
    result = CliRunner().invoke(app, ["plan", "run.yaml"])
    assert result.exit_code == 0, result.output
    assert "fits" in result.output
