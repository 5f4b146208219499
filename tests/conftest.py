"""One thread (tiny tensors do not profit from more), an option of the contract, and a guard over what is set for the whole process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="the contract on every class of every family, not on a fifth of them")


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
