"""What a file holds is held against what its plugin declares."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffgraft import ArtefactMismatch, Need, load_pipeline
from diffgraft.methods.artefacts import Artefact, MadeFor
from diffgraft.methods.schema import Holds, Values
from diffgraft.testing import contract_cases
from diffgraft.testing.crafted import bent_facts, bent_tensors
from probes import PluginConfig, Probe, tiny, trace
from pydantic import Field
from typing_extensions import TypedDict


class Facts(TypedDict):
    scale: float
    names: list[str]


HOLDS = Holds(
    {
        "a": Values(("T", "W"), low=0, high=1),
        "b": Values(("T", ...), infinite=True),
        "c.*": Values((...,), dtypes=(torch.int64,)),
        "d": Values(("W",), optional=True),
    },
    Facts,
    lambda tensors, facts: None if len(facts["names"]) == len(tensors["a"]) else "names are not as many as steps",
)
GOOD = {"a": torch.rand(3, 2), "b": torch.full((3, 4, 5), torch.inf), "c.x": torch.zeros(4, 5, dtype=torch.int64)}
FACTS: dict[str, Any] = {"scale": 1, "names": ["x", "y", "z"], "more": object()}


def test_what_is_declared_is_accepted():
    assert HOLDS.fault(GOOD, FACTS) is None
    assert HOLDS.fault({**GOOD, "d": torch.ones(2)}, FACTS) is None
    assert Holds().fault({}, {"anything": 1}) is None


@pytest.mark.parametrize(
    ("tensors", "facts", "why"),
    [
        ({"a": None}, {}, "the tensor 'a' is missing"),
        ({"e": torch.ones(1)}, {}, "the tensor 'e' has no place in it"),
        ({"a": torch.rand(2, 2)}, {}, r"'b' has shape \(3, 4, 5\), not \[T, ...\] with T = 2, W = 2"),
        ({"a": torch.rand(3)}, {}, r"'a' has shape \(3,\)"),
        ({"a": torch.rand(3, 0)}, {}, r"'a' has shape \(3, 0\)"),
        ({"a": torch.rand(3, 2).half()}, {}, "'a' is float16, not float32 or float64"),
        ({"a": torch.full((3, 2), 2.0)}, {}, "'a' holds 2 to 2, outside of 0 to 1"),
        ({"a": torch.full((3, 2), torch.inf)}, {}, "'a' holds infinite values"),
        ({"b": torch.full((3, 4, 5), torch.nan)}, {}, "'b' holds NaN"),
        ({"c.x": torch.zeros(5, 4, dtype=torch.int64)}, {}, "'c.x' has shape"),
        ({"d": torch.ones(3)}, {}, "'d' has shape"),
        ({}, {"scale": "1"}, "its fact scale = '1': Input should be a valid number"),
        ({}, {"scale": None}, "its fact scale = None"),
        ({}, {"names": ["x", 1, "z"]}, "its fact names.1 = 1"),
        ({}, {"names": []}, "names are not as many as steps"),
    ],
)
def test_what_is_not_is_named(tensors, facts, why):
    tensors = {name: value for name, value in {**GOOD, **tensors}.items() if value is not None}
    found = HOLDS.fault(tensors, {**FACTS, **facts})
    assert found is not None
    assert re.search(why, found), found


class Knobs(PluginConfig):
    artefact: Any = Field(None, description="one number")


class Declared(Probe):
    name = "declared"
    Config = Knobs
    needs = (Need("artefact", "artefact", holds=Holds({"gain": Values(("T",), low=0)}, Facts)),)

    def denoise(self, call, next):
        return next(call)


class Undeclared(Declared):
    name = "undeclared"
    needs = (Need("artefact", "artefact"),)


def test_wrong_content_is_refused_before_anything_is_touched():
    pipe = tiny("StableDiffusionPipeline")[0]
    before = trace(pipe)
    made = Artefact(MadeFor.describe("declared", pipe, pipe.scheduler, {"unet": pipe.unet}, 1, (4, 8, 8)), {"gain": torch.ones(1)}, FACTS)
    for what, artefact in [*bent_tensors(made), ("", replace(made, facts={}))]:
        with pytest.raises(ArtefactMismatch, match=r"declared: the artefact \(in memory\): .*; make one with `diffgraft calibrate"):
            load_pipeline(pipe, plugins=[Declared(artefact=artefact)])
        assert trace(pipe) == before, what
    load_pipeline(pipe, plugins=[Declared(artefact=made)])
    assert len(list(bent_facts(made, Facts))) > 10


def test_the_contract_asks_for_the_declaration():
    [case] = [case for case in contract_cases(Undeclared, ["dit"]) if case.check.name == "crafted_files"]
    with pytest.raises(AssertionError, match="says no holds="):
        case.run()
