"""One thread (tiny tensors do not profit from more), which tests are run, and a guard over what is set for the whole process."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from sampling import OWN_CONTRACT, sample_of

torch.set_num_threads(1)
LONG = ("test_ecosystem.py", "test_docs_first_plugin.py")
"""Tests of up to two minutes each come first: at the end one worker would have nothing to do beside the other's last one."""
LEFT_OUT: dict[str, tuple[int, int]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample", metavar="SEED", help="a sample of what did not change (default: everything); see tests/sampling.py")
    parser.addoption("--changed", metavar="A,B", default="", help="plugins and families' files that changed, which come first")


class NoCopies:
    """A plugin's own copy of the contract is for who works on it alone: in a sample it is not even collected, which takes seconds."""

    def pytest_pycollect_makeitem(self, collector: pytest.Collector, name: str) -> list[pytest.Item] | None:
        return [] if OWN_CONTRACT.match(f"{collector.nodeid}::{name}") else None


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--sample"):
        config.pluginmanager.register(NoCopies())  # a hook of this file itself is called for what lies beside it only


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if unnamed := [item.nodeid for item in items if " object at 0x" in item.nodeid]:
        raise pytest.UsageError(f"{unnamed[0]}: an address is no name, and each worker has its own; give the parameters ids=")
    dropped = sample_of(config).beyond(items)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in dropped])
    items[:] = sorted((item for item in items if item.nodeid not in dropped), key=lambda item: item.path.name not in LONG)


def pytest_collection_finish() -> None:
    """What is there by now stays: without it each full garbage collection walks through all of it, a fifth of the suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # a tiny pipeline has thousands of objects


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """On CI nothing skips itself but for want of a GPU: the set-up brings what the tests need."""
    outcome: Any = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("CI") and not item.get_closest_marker("cuda") and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"skipped on CI: {report.longrepr}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    LEFT_OUT.update(sample_of(session.config).left_out)
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist tells the one that prints
        session.config.workeroutput["left_out"] = LEFT_OUT


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    LEFT_OUT.update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What was left out, and how to run it."""
    parts = [f"{kept} of {total} {part}" for part, (kept, total) in LEFT_OUT.items() if kept < total]
    if parts:
        seed = config.getoption("--sample")
        terminalreporter.write_line(f"a sample was run (seed {seed}): {', '.join(parts)}; all of it: bash tests/run.sh --thorough")


def process_state() -> dict[str, Any]:
    """What decides the last bits of every picture made in this process."""
    return {
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "attention backend": _AttentionBackendRegistry._active_backend,
    }


AT_START = process_state()


@pytest.fixture(autouse=True, scope="module")
def _process_state_is_kept() -> Iterator[None]:
    """A baseline is computed once a process: a test that changes the process makes others fail, on the worker that happens to run both."""
    assert process_state() == AT_START, "a test before this module changed the process"
    yield
    assert process_state() == AT_START, "a test of this module changed the process"
