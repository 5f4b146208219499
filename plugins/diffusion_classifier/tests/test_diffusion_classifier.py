from __future__ import annotations

import pytest
from diffgraft.testing import Case, contract_cases, cover
from diffgraft_diffusion_classifier import __version__

CASES = cover(contract_cases("diffusion_classifier"), seed=__version__)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case) -> None:
    case.run()
