"""Settings of the whole suite: one thread per process, no network, no chatter of the libraries, the long files first."""

import gc
import os
import sys

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for processes that tests start

gc.disable()  # until the tests are collected: the libraries and the tests are no garbage

pytest_plugins = ("conformance", "suite_times", "waiting_tests")

try:
    import torch
except ImportError:  # the API, planner and command line are tested without torch as well
    pass
else:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes goes first: a file of it that is left for the end keeps one worker busy and the other idle."""
    items.sort(key=lambda item: not {"processes", "sweep"} & {mark.name for mark in item.iter_markers()})


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test draws the same numbers, whichever came before it and made what they share."""
    if "torch" in sys.modules:
        torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """Looks for garbage among what tests make: a look through all libraries takes half a second, and there were hundreds."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Names what failed when it fails: the summary comes an hour later."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        sys.stderr.write(f"\n{report.outcome} in {report.when}: {report.nodeid}\n")
