"""A plugin does on a modular pipeline what it does on the standard one of the same parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffgraft import load_pipeline
from diffgraft.methods.inputs import pictures_in
from diffgraft_pipelines.tiny import make

PLUGINS: dict[str, dict[str, Any]] = {
    "time_shift": {},
    "dpm_solver": {},
    "diffusers_cache": {"threshold": 10.0},
    "diffusers_guider": {"guider": "AdaptiveProjectedGuidance", "options": {"eta": 0.0}},
    "deepcache": {"interval": 2},
}
SAME = {"WanModularPipeline": "WanPipeline", "Wan22ModularPipeline": "WanPipeline@2.2", "FluxModularPipeline": "FluxPipeline"}
NEAR = {"StableDiffusionXLModularPipeline": "StableDiffusionXLPipeline"}
"""Which ask for the branches one by one, where the standard one asks for both in a batch."""
CASES = [
    *((name, plugin) for name in SAME for plugin in ("time_shift", "dpm_solver", "diffusers_cache", "diffusers_guider")),
    *((name, plugin) for name in NEAR for plugin in ("time_shift", "dpm_solver", "diffusers_guider", "deepcache")),
]
UNGUIDED = ("FluxModularPipeline",)


@pytest.mark.parametrize(("name", "plugin"), [case for case in CASES if case[0] not in UNGUIDED or case[1] != "diffusers_guider"])
def test_the_same_as_on_the_standard_pipeline(name: str, plugin: str) -> None:
    modular, standard = make(name), make((SAME | NEAR)[name])
    kwargs = dict(standard.kwargs)
    if name in UNGUIDED:  # it has no true guidance, and another default of the scale that its transformer is told
        kwargs = {**kwargs, "negative_prompt": None, "true_cfg_scale": 1.0, "guidance_scale": modular.kwargs.get("guidance_scale", 3.5)}
    pictures, reports = [], []
    for pipe, call in ((modular.pipe, modular.kwargs), (standard.pipe, kwargs)):
        load_pipeline(pipe, plugins={plugin: PLUGINS[plugin]})  # type: ignore[arg-type]
        pictures.append(np.asarray(pictures_in(pipe(**call, generator=torch.Generator().manual_seed(0)))))  # type: ignore[operator]
        reports.append(pipe.plugins.report())  # type: ignore[attr-defined]
    ours, theirs = pictures
    assert reports[0].steps == reports[1].steps
    if name in NEAR:
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
        assert sum(reports[0].forwards.values()) in (sum(reports[1].forwards.values()), 2 * sum(reports[1].forwards.values()))
    else:
        assert np.array_equal(ours, theirs)
        assert reports[0].forwards == reports[1].forwards
        assert reports[0].plugins[plugin].fired == reports[1].plugins[plugin].fired
