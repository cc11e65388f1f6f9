"""`make bench-gpu`: training steps on a GPU against diffusers' example trainers, and predicted memory against the real one.

    python tests/bench/gpu/main.py [--only G1 …] [--out build/bench-gpu.json] [--try-on-cpu]

Networks of published sizes with random weights; nothing is downloaded. The raw figures are written after every workload, with the card
and the versions. `--try-on-cpu` runs the same code on tiny networks without a GPU; its figures mean nothing.
"""

import argparse
import atexit
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests" / "bench"), str(ROOT / "tests" / "support")]
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error")
_numbers = tempfile.mkdtemp(prefix="atelier-bench-")
atexit.register(shutil.rmtree, _numbers, ignore_errors=True)
os.environ["PROMETHEUS_MULTIPROC_DIR"] = _numbers  # as under the agent; read at import

# What follows reads the path and the environment as it is imported.
import memory  # noqa: E402
import torch  # noqa: E402
import training  # noqa: E402
from gpu_run import run_file  # noqa: E402
from outcome import machine, show  # noqa: E402
from pairs import Row  # noqa: E402
from workloads import MEMORY, SPEED, TINY  # noqa: E402

from atelier_runtime import parallel  # noqa: E402
from atelier_runtime.kernels import choose_attention  # noqa: E402
from atelier_runtime.launch import quiet_libraries  # noqa: E402

ALL = ("G1", "G1b", "G3", "G11")
STEPS = (10, 30, 3)
"""To warm up, timed, under the profiler."""
TRY_STEPS = (2, 3, 1)


def card() -> dict[str, Any]:
    """The GPU, as torch knows it."""
    if not torch.cuda.is_available():
        return {"name": "none"}
    facts = torch.cuda.get_device_properties(0)
    return {
        "name": facts.name,
        "memory_bytes": facts.total_memory,
        "multiprocessors": facts.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


class Record:
    """Rows and raw figures, kept in a file from the first on: a benchmark that is cut off has said what it knew."""

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.facts = {**machine(), "card": card()}
        self.rows: list[Row] = []
        self._out, self._settings, self._started = out, settings, time.monotonic()
        self._raw: dict[str, list[Any]] = {}

    def tell(self, row: Row) -> None:
        self.rows.append(row)
        print(f"{row.id}  {row.what}: {row.measured}", flush=True)

    def keep(self, id: str, raw: list[dict[str, Any]]) -> None:
        self._raw.setdefault(id, []).extend(raw)
        document = {
            "machine": self.facts,
            **self._settings,
            "seconds": round(time.monotonic() - self._started),
            "benchmarks": self._raw,
            "rows": [asdict(row) for row in self.rows],
        }
        self._out.write_text(json.dumps(document, indent=1) + "\n")

    def show(self) -> None:
        versions = self.facts["versions"]
        heading = (
            f"{self.facts['card']['name']}, torch {versions['torch']}, diffusers {versions['diffusers']}, "
            f"peft {versions['peft']}"
        )
        show(heading, [self.rows], width=200)
        print(f"raw figures: {self._out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ALL, default=ALL)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench-gpu.json")
    parser.add_argument("--eager", action="store_true", help="without the contestants whose blocks are compiled")
    parser.add_argument("--try-on-cpu", action="store_true", help="tiny networks without a GPU, to try the code")
    parser.add_argument(
        "--cudnn-attention", action="store_true", help="leave the kernel of attention to torch, as runs do not"
    )
    options = parser.parse_args()
    if not options.cudnn_attention:
        choose_attention()
    tried = options.try_on_cpu
    if not tried and not torch.cuda.is_available():
        sys.exit("there is no GPU that torch can use; --try-on-cpu runs the same code on tiny networks")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    if tried:
        torch.set_num_threads(1)
    device = torch.device("cpu") if tried else torch.device("cuda", 0)
    with tempfile.TemporaryDirectory(prefix="atelier-bench-") as folder:
        distributed = parallel.start(run_file(TINY[0], Path(folder), device).plan)
    record = Record(options.out, {"tried_on_cpu": tried, "cudnn_attention": options.cudnn_attention})
    steps, compiled = TRY_STEPS if tried else STEPS, not options.eager
    for work in TINY if tried else SPEED:
        if work.id in options.only:
            raw = training.run(work, distributed, steps=steps, compiled=compiled, tell=record.tell)
            record.keep(work.id, raw)
    if "G11" in options.only:
        record.keep("G11", memory.run(TINY if tried else MEMORY, distributed, record.tell))
    parallel.stop()
    record.show()


if __name__ == "__main__":
    main()
