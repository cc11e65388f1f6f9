"""What a loop costs on a GPU: time per step, memory, launches, waits of the host. On a CPU the same code runs and the counts are 0."""

import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
GIB = 1 << 30


@dataclass(frozen=True)
class Reading:
    """Figures of one loop. Times in seconds per step, memory in bytes; `busy` is the part of the step that kernels ran.

    `host` is the CPU time of the thread that trains, `launches` and `waits` are counts per step, `kernels` the time of all kernels.
    `allocated` is the peak of live tensors, `reserved` that of the caching allocator, `device` what is taken of the card in all.
    """

    median: float
    p95: float
    steps: int
    host: float
    allocated: int
    reserved: int
    device: int
    launches: float
    waits: float
    kernels: float
    slowest: dict[str, float]

    @property
    def busy(self) -> float:
        return self.kernels / self.median if self.median else 0.0

    def columns(self) -> dict[str, Any]:
        return {**asdict(self), "busy": self.busy}


class Gauge:
    """Asked once per step, as the trainer asks whether to stop: warm-up, timed steps, then some under the profiler."""

    def __init__(self, device: torch.device, *, warm: int = 10, timed: int = 30, profiled: int = 3) -> None:
        self._cuda = device.type == "cuda"
        self._warm, self._timed, self._profiled = warm, timed, profiled
        self._steps = 0
        self._marks: list[Any] = []
        self._host: list[float] = []
        self._peaks = (0, 0, 0)
        self._profiler: profile | None = None
        self._ended = False

    def stop_requested(self) -> bool:
        """True from the last step on: the trainer hears of its own stop a step later, and asks once more."""
        if self._ended:
            return True
        self._steps += 1
        timed_until = self._warm + self._timed
        if self._steps == self._warm:
            self._synchronize()
            if self._cuda:
                torch.cuda.reset_peak_memory_stats()
        if self._warm <= self._steps <= timed_until:
            self._mark()
        if self._steps == timed_until:
            self._synchronize()
            self._read_memory()
            if self._profiled:
                self._start_profiler()
        self._ended = self._steps >= timed_until + self._profiled
        if self._ended and self._profiler is not None:
            self._synchronize()
            self._profiler.__exit__(None, None, None)
        return self._ended

    def reading(self) -> Reading:
        """Call it after the loop has stopped."""
        self._synchronize()
        seconds = [self._between(a, b) for a, b in zip(self._marks, self._marks[1:], strict=False)]
        host = [b - a for a, b in zip(self._host, self._host[1:], strict=False)]
        launches, waits, kernels, slowest = self._profile()
        allocated, reserved, device = self._peaks
        return Reading(
            median=statistics.median(seconds),
            p95=statistics.quantiles(seconds, n=20, method="inclusive")[-1],
            steps=len(seconds),
            host=statistics.median(host),
            allocated=allocated,
            reserved=reserved,
            device=device,
            launches=launches,
            waits=waits,
            kernels=kernels,
            slowest=slowest,
        )

    def _mark(self) -> None:
        self._host.append(time.thread_time())
        if not self._cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self._cuda else end - start

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def _read_memory(self) -> None:
        if self._cuda:
            free, total = torch.cuda.mem_get_info()
            self._peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), total - free)

    def _start_profiler(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._profiler = profile(activities=activities, acc_events=True).__enter__()

    def _profile(self) -> tuple[float, float, float, dict[str, float]]:
        """(launches, waits, seconds of kernels, seconds of the slowest kernels by name), each per step."""
        counts: Counter[str] = Counter()
        seconds: Counter[str] = Counter()
        for event in self._profiler.events() if self._profiler is not None else ():
            if getattr(event, "is_user_annotation", False):
                continue  # spans of kernels that are counted already
            if event.device_type == torch.autograd.DeviceType.CUDA:
                seconds[event.name] += event.time_range.elapsed_us() / 1e6
            else:
                counts[event.name] += 1
        steps = max(1, self._profiled)
        slowest = {name[:120]: value / steps for name, value in seconds.most_common(12)}
        launches, waits = (sum(counts[name] for name in names) / steps for names in (LAUNCHES, WAITS))
        return launches, waits, sum(seconds.values()) / steps, slowest
