"""What every run leaves that has come to its end, whoever started it."""

import json
import math
from hashlib import sha256
from pathlib import Path

from safetensors.torch import load_file

from atelier_runtime.reporter import History


def assert_finished(root: Path, steps: int) -> None:
    """The run in the folder `root` has kept finite losses of all its steps, and says what it has published, with hashes."""
    rows = History.from_bytes((root / "logs/history.jsonl").read_bytes(), before_step=steps).rows
    assert [row[0] for row in rows] == list(range(steps))
    assert all(math.isfinite(row[1]) and row[2] > 0 for row in rows)
    result = json.loads((root / "result.json").read_text())
    assert (result["outcome"], result["step"]) == ("Succeeded", steps)
    assert result["exports"]
    for export in result["exports"]:
        assert sha256((root / export["key"]).read_bytes()).hexdigest() == export["sha256"]
    assert (root / "report.html").stat().st_size > 5000


def assert_lora_trained(file: Path) -> None:
    """The second matrices, which start at zero, have moved."""
    names = ("lora_B", "lora_up", "lora.up")
    ups = [tensor for name, tensor in load_file(file).items() if any(part in name for part in names)]
    assert ups
    assert any(tensor.abs().max() > 0 for tensor in ups)
