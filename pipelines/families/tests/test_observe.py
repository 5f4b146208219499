"""What is seen of a pipeline is what its family says: the records were read from sources, and are held against runs here."""

from __future__ import annotations

import subprocess
import sys

import diffusers
import pytest
import torch
from cannot import ALWAYS_GUIDED
from diffgraft import Family, Guidance, Tiny
from diffgraft.testing.tiny import as_run
from diffgraft_pipelines.families import FAMILIES
from diffgraft_pipelines.observe import observe, written
from diffgraft_pipelines.tiny import make
from diffgraft_pipelines.tiny._shrink import axes, small
from diffgraft_pipelines.tiny.pixel import make as make_pixel

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You have passed 2 text:FutureWarning"),
]

CASES = [(as_run(family, name), name) for family in FAMILIES if family.tiny for name in family.pipelines]

CONTROLS = {
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "block_controlnet_hidden_states",
}
"""Of a ControlNet or an adapter: conditioning that no plugin is to touch."""
CONTROL_BLOCKS = {"vace_blocks"}
"""That make what is added behind others, of a control video."""
SHARED = {"image_only_indicator", "additional_residuals"}
"""Taken by blocks: the same for all; an adapter's features."""


@pytest.mark.parametrize(("family", "name"), CASES, ids=lambda case: case if isinstance(case, str) else "")
def test_what_is_seen_is_what_the_family_says(family: Family, name: str) -> None:
    observed = observe(lambda: make(name, 0))
    seen, remarks = observed.family, observed.remarks
    assert set(seen.denoisers) <= set(family.denoisers)
    times = ("timestep", "timestep_scale", "timestep_offset")
    for fact in ("kind", "sample", *times, "prediction", "turned", "copied_scheduler", "companion", "latents"):
        assert getattr(seen, fact) == getattr(family, fact), fact
    assert seen.branch_prediction in (family.branch_prediction, *(("same",) if seen.appended != family.appended else ()))
    assert seen.appended in ("none", family.appended)
    assert set(seen.common) <= set(family.common)
    assert set(seen.listed) == set(family.listed)
    assert set(seen.layered) == set(family.layered)
    assert set(seen.emptied) <= set(family.emptied)
    assert bool(seen.emptied) == any(word in name for word in ("DiTControlNet", "Adapter"))
    assert set(seen.conditioning) - CONTROLS <= set(family.conditioning)
    if "condition" not in remarks.get("conditioning", ""):
        assert set(family.conditioning[:1]) <= set(seen.conditioning)
    for fact in ("layout", "order", "scale", "optional", "bound", "over", "active", "requires", "doubled"):
        if name not in ALWAYS_GUIDED and (family.guidance.layout != "none" or fact == "layout"):
            assert getattr(seen.guidance, fact) == getattr(family.guidance, fact), fact
    groups = [group for group in seen.blocks if group.path not in CONTROL_BLOCKS]
    assert [group.path for group in groups] == [group.path for group in family.blocks]
    for mine, said in zip(groups, family.blocks, strict=True):
        assert (mine.kind, mine.returns, mine.joined, mine.rows) == (said.kind, said.returns, said.joined, said.rows)
        assert set(mine.takes) - SHARED == set(said.takes)
        if family.kind == "unet":
            assert mine.layers == tuple(name for name in said.layers if name in mine.layers)


def test_the_second_denoiser_is_seen_where_there_is_one() -> None:
    observed = observe(lambda: make("WanPipeline@2.2", 0))
    assert observed.family.denoisers == ("transformer", "transformer_2")
    assert "denoisers" not in observed.remarks
    assert observed.family.guidance.second_scale == "guidance_scale_2"


def test_what_was_not_seen_is_said() -> None:
    remarks = observe(lambda: make("LTXImageToVideoPipeline", 0)).remarks
    assert "no input of the denoiser holds what is stepped" in remarks["sample"]
    assert "comes to the scheduler as" in remarks["branch_prediction"]
    assert "two conditions could not be tried" in observe(lambda: make("AnimateDiffControlNetPipeline", 0)).remarks["common"]
    assert "least, extra, packages, one_each, unit_start, companion_scale" in remarks


def test_nothing_is_left_on_what_was_watched() -> None:
    tiny: Tiny = make("FluxPipeline", 0)
    step, state = type(tiny.pipe.scheduler).step, torch.random.get_rng_state()  # type: ignore[attr-defined]
    observe(lambda: tiny)
    assert type(tiny.pipe.scheduler).step is step  # type: ignore[attr-defined]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.pipe.transformer.modules())  # type: ignore[attr-defined]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_pipeline_without_steps_is_refused() -> None:
    tiny = make_pixel("DDPMPipeline", 0)
    pipe = tiny.pipe

    class Still(diffusers.DDPMPipeline):
        def __call__(self, **_: object) -> None:  # type: ignore[override]
            return None

    with pytest.raises(RuntimeError, match=r"Still never calls scheduler\.step"):
        observe(lambda: Tiny(Still(pipe.unet, pipe.scheduler), tiny.kwargs))  # type: ignore[attr-defined]


def test_the_record_is_code() -> None:
    seen = observe(lambda: make("QwenImagePipeline", 0), "qwen_image").family
    from diffgraft import BlockGroup

    assert eval(written(seen), {"Family": Family, "Guidance": Guidance, "BlockGroup": BlockGroup}) == seen


def test_on_the_command_line() -> None:
    command = [sys.executable, "-m", "diffgraft_pipelines.observe", "DDIMPipeline", "--tiny", "diffgraft_pipelines.tiny.pixel:make"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "# look at conditioning: there is nothing to condition on" in told
    assert 'family = Family(\n    name="ddim",\n    pipelines=("DDIMPipeline",),' in told


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel", "CogView4Transformer2DModel"])
def test_a_models_own_configuration_is_shrunk(name: str) -> None:
    model = small(name, num_layers=1)
    assert sum(value.numel() for value in model.parameters()) < 2e6
    assert model.config["num_layers"] == 1
    assert sum(axes(3, 16)) == 16
    with pytest.raises(TypeError, match="depths"):
        small(name, depths=1)
