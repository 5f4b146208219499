"""One thread (tiny tensors do not profit from more), and an option of the contract."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="the contract on every class of every family, not on a fifth of them")
