"""The default suite's budget: whatever changed, what is run of the plugins stays within it."""

from __future__ import annotations

import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffgraft import PluginNotFound
from diffgraft.testing import contract_sample, form_cells
from sampling import LEAST, LOOKED_AT, OWN_CONTRACT, Sample, level


def sample(*changed: str) -> Sample:
    options = {"--sample": "seed", "--changed": ",".join(changed)}
    config: Any = SimpleNamespace(getoption=options.__getitem__)
    return Sample(config)


SIZES = {"a": 100, "b": 40, "c": 200, "d": 10}


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ((), {"a": 75, "b": 40, "c": 75, "d": 10}),
        (("a",), {"a": 100, "b": 40, "c": 50, "d": 10}),  # what changed comes first, whole
        (("a", "b", "c", "d"), {"a": 75, "b": 40, "c": 75, "d": 10}),  # all did: as if none had
        (("a", "c"), {"a": 100, "b": LEAST, "c": 100, "d": LEAST}),
    ],
)
def test_what_changed_comes_first_and_the_whole_stays_within_the_budget(changed: tuple[str, ...], kept: dict[str, int]) -> None:
    most = sample(*changed).parts(200, SIZES)
    assert {name: min(size, most[name]) for name, size in SIZES.items()} == kept


def test_folders_that_changed_are_looked_at_first_and_no_more_than_the_budget() -> None:
    folders = [Path(f"p{i}") for i in range(3 * LOOKED_AT)]
    for changed in (("p3", "p5"), [folder.name for folder in folders[: 2 * LOOKED_AT]]):
        names = [folder.name for folder in sample(*changed).folders("some", folders)]
        assert len(names) == LOOKED_AT
        assert set(names) <= {*changed} or {*changed} <= set(names)


@pytest.mark.parametrize("count", [0, 1, 17, 74, 400])
def test_as_much_as_the_budget_allows(count: int) -> None:
    sizes = [(37 * i) % 150 for i in range(count)]
    n = level(sizes, 1200)
    assert n == LEAST or sum(min(size, n) for size in sizes) <= 1200
    assert sum(sizes) <= 1200 or sum(min(size, n + 1) for size in sizes) > 1200


def test_of_each_form_a_few_cells_and_none_that_takes_long() -> None:
    cells = form_cells(["time_shift", "deepcache", "nag", "usf_s3"])
    kept = sample().cells(cells)
    assert {cell.form.name for cell in kept} == {cell.form.name for cell in cells}
    assert len(kept) <= 2 * len({cell.form for cell in cells})
    assert not [cell for cell in kept if cell.form.compiled and cell.family.kind == "unet"]
    assert [str(cell) for cell in sample().cells(cells)] == [str(cell) for cell in kept]


def test_of_a_plugins_own_tests_the_contract_is_left_to_the_suites() -> None:
    function = "plugins/a/tests/test_a.py::test_contract"
    assert OWN_CONTRACT.match(function)
    assert not OWN_CONTRACT.match(f"{function}_in_parallel")
    assert not OWN_CONTRACT.match("tests/test_contract.py::test_contract")


def test_a_sample_collects_none_of_them(request) -> None:
    """In plugins' folders too: a hook in tests/conftest.py alone is not asked there."""
    copies = [item.nodeid for item in request.session.items if OWN_CONTRACT.match(item.nodeid.partition("[")[0])]
    assert not copies or not request.config.getoption("--sample")


def test_a_sample_of_a_contract_asks_nothing_before_it_is_read() -> None:
    cases = contract_sample("nobody", "seed")  # at the import of a test file, whose test may never be collected
    with pytest.raises(PluginNotFound):
        next(cases)


@pytest.fixture
def drawn():
    return torch.initial_seed()


def test_what_a_test_draws_is_a_matter_of_its_name(request, drawn):
    """Not of the tests before it, which a sample changes: ``-p diffgraft.testing.seeds``, for plugins' folders too."""
    assert torch.initial_seed() == drawn == zlib.crc32(request.node.nodeid.encode())
