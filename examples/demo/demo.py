"""The demo: a LoRA on real pictures, trained by two processes that are killed half-way, and what it learned.

    python examples/demo/demo.py

It runs the same command on the same kind of file that your own run would use (`run.yaml` beside this script), and shows every
step. Results lie in `runs/default/demo-local/`.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import digits
import psutil
import score
from rich.console import Console

from atelier_runtime.observe.progress import read_progress
from atelier_runtime.observe.scratch import Scratch

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent.parent / "runs"
PICTURES = RUNS / "demo-pictures"
RESULT = RUNS / "default" / "demo-local"
SCRATCH = Scratch(RUNS / ".scratch" / "default-demo")
KILL_AFTER_STEP = 70

console = Console(highlight=False)


def main() -> int:
    """Run the demo; the exit code is that of the step that failed, else 0."""
    started = time.monotonic()
    say("1. Real handwritten digits, in red ink and in the three inks that the base model knows")
    if not PICTURES.exists():
        digits.main([str(PICTURES), "--inks", "red", "--count", "200", "--mix", "black,blue,green", "--with-bad-files"])
    console.print(f"   {PICTURES}")

    say(f"2. Train a LoRA with two processes, and kill them without warning after step {KILL_AFTER_STEP}")
    process = subprocess.Popen([*train_command(), "--fresh"])
    if not kill_after(process, KILL_AFTER_STEP):
        return process.returncode or 1
    console.print("\n   [bold red]killed[/] (SIGKILL to every process of the run)")

    say("3. The same command again: it goes on from the newest checkpoint")
    code = subprocess.run(train_command(), check=False).returncode
    if code:
        return code

    say("4. What the LoRA learned: the stock diffusers pipeline in this process, without and with the exported file")
    score.main(["--lora", str(RESULT / "exports" / "diffusers"), "--grid", str(RESULT / "before-after.png")])
    say(f"Done in {time.monotonic() - started:.0f} s. Open these:")
    console.print(f"   report         {RESULT / 'report.html'}")
    console.print(f"   before, after  {RESULT / 'before-after.png'}")
    console.print(f"   the LoRA       {RESULT / 'exports' / 'diffusers' / 'pytorch_lora_weights.safetensors'}")
    return 0


def say(text: str) -> None:
    console.print(f"\n[bold]{text}[/]")


def train_command() -> list[str]:
    """What a user would type: `atelier run examples/demo/run.yaml`."""
    return [sys.executable, "-m", "atelier_cli.main", "run", os.path.relpath(HERE / "run.yaml")]


def kill_after(process: "subprocess.Popen[bytes]", step: int) -> bool:
    """SIGKILL to the run with all its processes once it has done `step` steps. False: it ended before."""
    begun = time.time()
    while process.poll() is None:
        progress = read_progress(SCRATCH.progress) if is_newer(SCRATCH.progress, begun) else None
        if progress is not None and progress.step >= step and progress.checkpoint is not None:
            family = psutil.Process(process.pid)
            victims = [*family.children(recursive=True), family]
            for victim in victims:
                victim.kill()
            psutil.wait_procs(victims, timeout=30)
            process.wait()
            return True
        time.sleep(0.05)
    console.print(f"[red]The run ended by itself, with exit code {process.returncode}, before it could be killed.[/]")
    return False


def is_newer(path: Path, time_seconds: float) -> bool:
    """Whether a file was written after a moment; False where there is none."""
    try:
        return path.stat().st_mtime >= time_seconds
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(main())
