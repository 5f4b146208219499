"""A pytest plugin (``-p diffgraft.testing.seeds``): what a test draws does not depend on the tests that ran before it.

A layer made without a generator takes its weights from torch's global state. In a sample of a suite, or on another worker, other tests
come first, and a bound that held there is missed here. So each test starts at a seed of its own name.
"""

from __future__ import annotations

import random
import zlib
from typing import Any

import numpy as np
import torch


def seed(item: Any) -> None:
    start = zlib.crc32(item.nodeid.encode())
    torch.manual_seed(start)
    np.random.seed(start)
    random.seed(start)


def pytest_runtest_setup(item: Any) -> None:
    """Before its fixtures are made."""
    seed(item)


def pytest_runtest_call(item: Any) -> None:
    """Again: a fixture that several tests share is drawn by the first of them only."""
    seed(item)
