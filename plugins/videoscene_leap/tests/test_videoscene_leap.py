from __future__ import annotations
import pytest
from diffgraft.testing import Case, contract_cases, cover
from diffgraft_videoscene_leap import __version__
CASES = cover(contract_cases("videoscene_leap"), seed=__version__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case) -> None:
    case.run()
