"""Knobs: pydantic would take some values for others."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from diffgraft import ConfigError, PluginConfig
from diffgraft.installed.config import build_config
from pydantic import create_model


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        (int | None, [3, None], [True, "3"]),
        (tuple[float, ...], [(0.5, 1), [2]], [(0.5, True), ["1"], "0.5"]),
        (tuple[tuple[int, float], ...] | None, [((1, 0.5),), None], [((True, 0.5),), ((1, "0.5"),)]),
        (bool, [True, False], ["x"]),
        (Literal["auto"] | tuple[float, ...] | None, [(0.5, 1), "auto", None], [(0.5, True), ["1"], True]),
        (str | list[str] | None, [["1"], "1"], [[True]]),
        (float | Literal["auto"], [0.5, "auto"], ["automatic"]),
        (Any, [True, "3", 3], []),
    ],
)
def test_numbers_are_numbers(annotation, good, bad):
    model = create_model("Knobs", __base__=PluginConfig, knob=(annotation, ...))
    for value in good:
        assert build_config("p", model, {"knob": value}) is not None
    for value in bad:
        with pytest.raises(ConfigError, match="knob"):
            build_config("p", model, {"knob": value})
