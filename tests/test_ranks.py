"""Two ranks of one denoiser, on gloo: what depends on data is decided once (vllm-omni #6180: their caches disagreed, and both waited).

Ring attention is not here: no attention of diffusers that runs on a CPU gives the sums that it needs.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import ranks_at_work
import torch

TOGETHER = [name for name in ranks_at_work.TOGETHER if name != "nothing"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    words = [sys.executable, ranks_at_work.__file__]
    running = [
        subprocess.Popen([*words, str(rank), str(folder)], stderr=subprocess.STDOUT, stdout=(folder / f"{rank}.log").open("w"))
        for rank in (0, 1)
    ]
    try:
        codes = [one.wait(timeout=240) for one in running]
    finally:
        for one in running:
            one.kill()
    logs = "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in (0, 1))
    assert codes == [0, 0], f"a rank ended with {codes}:\n{logs}"
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", TOGETHER)
def test_both_do_the_same(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank["together"][name] for rank in ranks)
    assert first["counts"] == second["counts"]
    assert torch.equal(first["output"], second["output"])


@pytest.mark.parametrize("name", ["nothing", "dpm_solver", "time_shift"])
def test_together_is_what_one_alone_makes(ranks: list[dict[str, Any]], name: str) -> None:
    first = ranks[0]
    assert first["together"][name]["counts"] == first["alone"][name]["counts"]
    torch.testing.assert_close(first["together"][name]["output"], first["alone"][name]["output"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["of_one_rank", "of_one_rank, sharded"])
def test_the_first_rank_decides_for_both(ranks: list[dict[str, Any]], name: str) -> None:
    assert [rank["together"][name]["counts"]["of_one_rank"]["skipped"] for rank in ranks] == [{"cond": 3, "uncond": 3}] * 2


@pytest.mark.parametrize("name", ["diffusers_cache", "diffusers_cache, late"])
def test_a_cache_skips_on_both_or_on_none(ranks: list[dict[str, Any]], name: str) -> None:
    """Its threshold lies between what the two ranks measure."""
    counts = ranks[1]["together"][name]["counts"]["diffusers_cache"]
    assert counts["steps skipped"]["cond"] >= 1
    assert counts["steps skipped"] != ranks[1]["alone"]["diffusers_cache"]["counts"]["diffusers_cache"].get("steps skipped")


def test_ranks_with_a_denoiser_each_decide_alone(ranks: list[dict[str, Any]]) -> None:
    """Data parallel: nobody waits for a rank that has fewer pictures to make."""
    assert [len(rank["apart"]) for rank in ranks] == [1, 2]
    for rank in ranks:
        assert torch.equal(rank["apart"][0]["output"], rank["alone"]["diffusers_cache"]["output"])
