"""consissr: the contract that every plugin is held to, one test a case, and the method's own equations."""

from __future__ import annotations

import pytest
import torch
from diffgraft.testing import Case, contract_cases, cover
from diffgraft_consissr import __version__, placeholder

CASES = cover(contract_cases("consissr"), seed=__version__)
"""Each check once and each family once; which meet changes with the version. All of them: ``diffgraft check``, or without ``cover``."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case) -> None:
    case.run()


def test_placeholder() -> None:
    """REPLACE THIS by tests of the paper's equations: against the formula written out, a closed form, values of the official code."""
    x = torch.tensor([1.0, -2.0])
    assert placeholder(x, 0.0).equal(x)
    assert placeholder(x, 0.5).equal(torch.tensor([1.5, -3.0]))
