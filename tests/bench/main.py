"""`make bench`: the speed of the loop, data path, checkpoints, webhook and operator, as ratios of interleaved runs and as counts.

    python tests/bench/main.py [--quick] [--only C1 …] [--state-mib 256] [--out build/bench.json]

Prints a table and writes everything measured, with the machine and the versions, as JSON. Seconds are only compared with seconds of
the same minute of the same process; counts are what a test may rest on. A ratio is a median of pairs, with its quartiles.
"""

import argparse
import atexit
import ctypes
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests" / "support")]
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error")
_numbers = tempfile.mkdtemp(prefix="atelier-bench-")
atexit.register(shutil.rmtree, _numbers, ignore_errors=True)
os.environ["PROMETHEUS_MULTIPROC_DIR"] = _numbers  # ranks count into mapped files, as under the agent; read at import

# What follows reads the path and the environment as it is imported.
import checkpoint_stall  # noqa: E402
import data_path  # noqa: E402
import loop_overhead  # noqa: E402
import operator_scale  # noqa: E402
import torch  # noqa: E402
import webhook_latency  # noqa: E402
from outcome import machine, show  # noqa: E402

from atelier_runtime.launch import quiet_libraries  # noqa: E402

ALL = ("C1", "C2", "C4", "W", "O")


def keep_memory() -> None:
    """Have glibc's allocator give no memory back to the system (`<malloc.h>`: M_TRIM_THRESHOLD -1, M_MMAP_THRESHOLD -3).

    Whether a contestant's heap happens to be trimmed and faulted in again in every step makes a difference of 5 %, by luck.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-1, 1 << 30)
        mallopt(-3, 32 << 20)


def heading(facts: dict[str, Any], load_after: float) -> str:
    """The machine's line, and a warning where it was busy."""
    versions = facts["versions"]
    line = (
        f"{facts['cores']} cores of {facts['cpu']}, load {facts['load'][0]:.1f} before and {load_after:.1f} after, "
        f"{facts['threads']} thread, python {facts['python']}, torch {versions['torch']}, diffusers {versions['diffusers']}, "
        f"accelerate {versions['accelerate']}"
    )
    busy = "\nThe machine was busy with other work: trust the CPU figures and the counts, not wall time."
    return line + (busy if load_after > facts["cores"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="few pairs and small sizes: the counts are true, the seconds are not"
    )
    parser.add_argument("--only", nargs="+", choices=ALL, default=ALL)
    parser.add_argument("--state-mib", type=int, default=256, help="size of the checkpointed state")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench.json")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(options.out.parent.resolve())  # on a disk, not in the memory that /tmp may be
    torch.set_num_threads(1)
    keep_memory()
    quiet_libraries()
    benchmarks = {
        "C1": lambda: loop_overhead.run(quick=options.quick),
        "C2": lambda: data_path.run(quick=options.quick),
        "C4": lambda: checkpoint_stall.run(quick=options.quick, mebibytes=options.state_mib),
        "W": lambda: webhook_latency.run(quick=options.quick),
        "O": lambda: operator_scale.run(quick=options.quick),
    }
    facts, started = machine(), time.monotonic()
    findings = {name: run() for name, run in benchmarks.items() if name in options.only}
    load_after = os.getloadavg()[0]
    show(heading(facts, load_after), [one.rows for one in findings.values()])
    document = {
        "machine": {**facts, "load_after": load_after},
        "quick": options.quick,
        "seconds": round(time.monotonic() - started),
        "benchmarks": {name: {"rows": [asdict(row) for row in one.rows], **one.raw} for name, one in findings.items()},
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"raw figures: {options.out}")


if __name__ == "__main__":
    main()
