"""Every fact of every family, held against what diffusers really does with the tiny pipeline of each class."""

from __future__ import annotations

import ast
import functools
import inspect
import subprocess
import sys
from importlib.metadata import entry_points
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffgraft import Family, Tiny
from diffgraft.installed.anatomy import layers_in
from diffgraft_pipelines.families import FAMILIES
from diffgraft_pipelines.observe import other_condition
from diffgraft_pipelines.tiny import make
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
)
from recording import LAYOUTS, Call, blocks, branches, changed, denoisers, equal, layout, record, run, seen, stepped_frames
from torch import nn

torch.set_num_threads(1)


pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You have passed 2 text prompts:FutureWarning"),
]


VARIANTS = {
    "StableDiffusionInpaintPipeline": ("9",),
    "Flux2KleinPipeline": ("image",),
    "WanPipeline": ("2.2",),
    "WanImageToVideoPipeline": ("2.2",),
}


CASES = [
    (family, name + variant)
    for family in FAMILIES
    if family.tiny
    for name in family.pipelines
    for variant in ("", *("@" + v for v in VARIANTS.get(name, ())))
]


every_class = pytest.mark.parametrize(("family", "name"), CASES, ids=[name for _, name in CASES])


# What diffusers 0.42 itself cannot do, with or without plugins.
ONE_PROMPT = (
    "AnimateDiffVideoToVideoPipeline",
    "AnimateDiffControlNetPipeline",
    "CogVideoXImageToVideoPipeline",
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
)


ONE_VIDEO = (
    "AnimateDiffPipeline",
    "AnimateDiffVideoToVideoPipeline",
    "AnimateDiffControlNetPipeline",
    "CogVideoXPipeline",
    "CogVideoXImageToVideoPipeline",
    "CogVideoXVideoToVideoPipeline",
    "WanVideoToVideoPipeline",
    "WanImageToVideoPipeline",
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
)


PICTURE_EACH = ("StableDiffusionUpscalePipeline",)


EDITS = ("StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline")


SCHEDULERS = {
    "StableDiffusionPipeline": (EulerDiscreteScheduler, DPMSolverMultistepScheduler, PNDMScheduler),
    "StableDiffusionXLPipeline": (DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler),
    "AnimateDiffPipeline": (EulerDiscreteScheduler,),
    "PixArtAlphaPipeline": (DDIMScheduler, EulerDiscreteScheduler),
    "StableDiffusionInstructPix2PixPipeline": (EulerDiscreteScheduler, DPMSolverMultistepScheduler),
    "SkyReelsV2DiffusionForcingPipeline": (DPMSolverMultistepScheduler,),
    "DiTPipeline": (DPMSolverMultistepScheduler,),
    "StableDiffusion3Pipeline": (FlowMatchHeunDiscreteScheduler,),
}


def test_entry_points_are_the_families() -> None:
    points = {point.name: point.load() for point in entry_points(group="diffgraft.families")}
    for family in FAMILIES:
        assert points[family.name] is family
    names = [name for family in FAMILIES for name in family.pipelines]
    assert len(names) == len(set(names)), "a class belongs to one family"


def test_families_import_no_torch() -> None:
    code = "import sys, diffgraft_pipelines.families; print({'torch', 'diffusers', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_unknown_class_is_named_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match=r"NoSuchPipeline.*FluxPipeline"):
        make("NoSuchPipeline")
    with pytest.raises(KeyError, match=r"WanPipeline@9.*WanPipeline@2\.2"):
        make("WanPipeline@9")


@every_class
def test_tiny_is_seeded_and_depends_on_its_inputs(family: Family, name: str) -> None:
    first = seen(family, name)
    assert type(first.tiny.pipe).__name__ == name.partition("@")[0] in family.pipelines
    state = torch.random.get_rng_state()
    again = make(name)
    assert torch.equal(state, torch.random.get_rng_state())
    assert np.array_equal(first.image, run(again)), "same seed twice"
    assert np.isfinite(first.image).all()
    assert first.image.std() > 0.01
    other = denoisers(family, make(name, seed=1).pipe)[0].state_dict()
    assert not all(equal(value, other[key]) for key, value in denoisers(family, again.pipe)[0].state_dict().items())
    if other_condition(first.tiny.kwargs):
        assert not np.array_equal(first.image, seen(family, name, "different").image), "another prompt"


@every_class
def test_names_exist(family: Family, name: str) -> None:
    pipe: Any = seen(family, name).tiny.pipe
    call = inspect.signature(pipe.__call__).parameters
    guidance = family.guidance
    if guidance.layout != "none":
        assert guidance.scale in call
    assert set(guidance.requires) <= set(call)
    assert guidance.second_scale is None or guidance.second_scale in call or "Video" in name
    if guidance.active is not None:
        assert isinstance(inspect.getattr_static(type(pipe), guidance.active), property)
    for denoiser in denoisers(family, pipe):
        forward = inspect.signature(denoiser.forward).parameters
        inputs = set(forward)
        optional = {"timestep_cond", "encoder_hidden_states_image"}
        assert {family.sample, family.timestep, *family.conditioning} - optional <= inputs
        for group in family.blocks:
            found = blocks(denoiser, group)
            assert len(found) >= (1 if group.path == "mid_block" else 2)
            for layer in group.layers:
                assert any(layers_in(block, layer) for block in found), layer
            if family.kind == "unet":
                lists = {key for b in found for key, value in b.named_children() if isinstance(value, nn.ModuleList)}
                assert lists == set(group.layers), "every list of layers is named"


@every_class
@pytest.mark.parametrize("how", ["on", "off"])
def test_denoiser_calls_match_guidance(family: Family, name: str, how: str) -> None:
    seen_run = seen(family, name, how)
    guided = how == "on" and family.guidance.layout != "none"
    rows = seen_run.steps[0]["sample"].shape[0]
    if guided and family.guidance.doubled:
        rows //= 2
    calls_a_step = 2 if guided and family.guidance.layout == "sequential" else 1
    rows_a_call = rows * (len(family.guidance.order) if guided and family.guidance.layout == "batched" else 1)
    for index, step in enumerate(seen_run.steps):
        calls = [call for call in seen_run.calls if call.step == index]
        assert len(calls) == calls_a_step
        for call in calls:
            check_call(family, seen_run.tiny.pipe, call, step, rows_a_call)
        check_combination(family, seen_run.tiny, calls, step, guided)
    assert len(seen_run.calls) == calls_a_step * len(seen_run.steps)
    if name.endswith("@2.2"):
        assert [call.denoiser for call in seen_run.calls] == sorted(call.denoiser for call in seen_run.calls)
        assert {call.denoiser for call in seen_run.calls} == {0, 1}, "both transformers"


def check_call(family: Family, pipe: Any, call: Call, step: dict[str, Any], rows: int) -> None:
    """Sample, timestep and layout of one denoiser call."""
    axes = LAYOUTS[family.latents]
    latents, sample = step["sample"], call.inputs[family.sample]
    assert sample.shape[0] == rows
    assert latents.ndim == len(axes)
    given = torch.as_tensor(call.inputs[family.timestep]).float()
    if family.copied_scheduler:
        assert given.shape == (rows, sample.shape[2]), "a time for each frame"
        sample = stepped_frames(family, sample, latents)
    torch.testing.assert_close(given.max(), torch.as_tensor(step["timestep"]).float().max() * family.timestep_scale)
    if family.branch_prediction == "unpacked_tail":
        sample = pipe._unpack_latents(sample, *(call.inputs[name] for name in ("num_frames", "height", "width")))
        sample = sample[:, :, 1:]
    axis = {"none": None, "channels": axes.index("c"), "tokens": 1}[family.appended]
    if axis is not None:
        assert sample.shape[axis] >= latents.shape[axis]
        sample = sample.narrow(axis, 0, latents.shape[axis])
    assert sample.shape[1:] == latents.shape[1:]
    if not isinstance(pipe.scheduler, (EulerDiscreteScheduler, CMStochasticIterativeScheduler)):  # which scale their input
        assert equal(sample[: len(latents)], latents[: len(sample)])


def check_combination(family: Family, tiny: Tiny, calls: list[Call], step: dict[str, Any], guided: bool) -> None:
    """The branches, brought to ``model_output``'s layout, combine to ``model_output``."""
    pipe: Any = tiny.pipe
    fix = functools.partial(layout, family, pipe, calls[0], sample=step["sample"])
    if not guided:
        assert calls[0].prediction is not None
        assert equal(fix(calls[0].prediction), step["model_output"])
        return
    parts = {branch: fix(prediction) for branch, prediction in branches(family, calls).items()}
    scale: Any = tiny.kwargs[family.guidance.scale]
    if family.guidance.second_scale in tiny.kwargs and calls[0].denoiser == 1:
        scale = tiny.kwargs[family.guidance.second_scale]
    if family.name == "svd":
        scale = pipe.guidance_scale
    expected = parts["uncond"] + scale * (parts["cond"] - parts.get("image", parts["uncond"]))
    if "image" in parts:
        expected = expected + tiny.kwargs["image_guidance_scale"] * (parts["image"] - parts["uncond"])  # type: ignore[operator]
    if family.name == "qwen_image":
        expected = expected * parts["cond"].norm(dim=-1, keepdim=True) / expected.norm(dim=-1, keepdim=True)
    if family.guidance.doubled:
        expected = torch.cat([expected, expected])
    torch.testing.assert_close(expected, step["model_output"], rtol=1e-4, atol=1e-5)


@every_class
def test_branch_order(family: Family, name: str) -> None:
    """Another prompt changes the conditional branch only."""
    if family.guidance.layout == "none":
        return
    which = family.conditioning[0]
    first, second = (seen(family, name, how).calls for how in ("on", "different"))
    if family.guidance.layout == "batched":
        n = len(family.guidance.order)
        pairs = list(zip(first[0].inputs[which].chunk(n), second[0].inputs[which].chunk(n), strict=True))
    else:
        pairs = [(first[i].inputs[which], second[i].inputs[which]) for i in range(2)]
    for branch, pair in zip(family.guidance.order, pairs, strict=True):
        assert equal(*pair) == (branch != "cond"), branch


@pytest.mark.parametrize("name", EDITS)
def test_the_image_branch_has_the_picture_and_the_negative_text(name: str) -> None:
    family = next(family for family in FAMILIES if name in family.pipelines)
    call = seen(family, name).calls[0]
    cond, image, uncond = (x[:, 4:] for x in call.inputs[family.sample].chunk(3))
    assert equal(cond, image)
    assert image.any()
    assert not uncond.any()
    _, image, uncond = call.inputs["encoder_hidden_states"].chunk(3)
    assert equal(image, uncond)


@pytest.mark.parametrize("name", EDITS)
def test_both_scales_say_whether_editing_is_guided(name: str) -> None:
    family = next(family for family in FAMILIES if name in family.pipelines)
    for scale, image_scale, rows in ((2.0, 1.0, 3), (1.0, 1.5, 1), (2.0, 0.9, 1)):
        tiny = make(name)
        how = {"guidance_scale": scale, "image_guidance_scale": image_scale, "num_inference_steps": 1}
        plain = record(family, tiny, **how)
        assert len(plain.calls[0].inputs["sample"]) == rows


@every_class
def test_blocks(family: Family, name: str) -> None:
    """Order, inputs and outputs of the blocks in the first denoiser call."""
    seen_run = seen(family, name)
    denoiser = denoisers(family, seen_run.tiny.pipe)[0]
    expected = [(group, block) for group in family.blocks for block in blocks(denoiser, group)]
    ran = seen_run.calls[0].blocks
    assert [block for _, block in expected] == [block for block, _, _ in ran]
    for group, block in expected:
        count = seen_run.layers.count
        for attribute in group.layers:
            for _, _, _, layer in layers_in(block, attribute):
                assert count(layer) == sum(call.denoiser == 0 for call in seen_run.calls), "each layer once a call"
    received: dict[str, set[str]] = {}
    for (group, block), (_, inputs, result) in zip(expected, ran, strict=True):
        present = {key for key, value in inputs.items() if isinstance(value, (torch.Tensor, tuple))}
        received.setdefault(group.kind, set()).update(present)
        results = result if isinstance(result, tuple) else (result,)
        assert len(results) == len(group.returns)
        for key, value in zip(group.returns, results, strict=True):
            if key == "res_samples":
                assert isinstance(value, tuple)
            elif value is None:
                assert (family.name, block, key) == ("sd3", expected[-1][1], "encoder_hidden_states")
            elif family.kind == "dit":
                assert value.shape == inputs[key].shape
    if len(expected[0][0].returns) == 2 and family.kind == "dit":
        text, image = ran[0][1]["encoder_hidden_states"], ran[0][1]["hidden_states"]
        assert text.shape != image.shape, "so that the order of the outputs shows"
    for group in family.blocks:
        assert set(group.takes) <= received[group.kind]


@every_class
def test_prediction_depends_on_every_block_and_condition(family: Family, name: str) -> None:
    seen_run = seen(family, name)
    pipe: Any = seen_run.tiny.pipe
    for index, denoiser in enumerate(denoisers(family, pipe)):
        call = next(call for call in seen_run.calls if call.denoiser == index)

        def predict(denoiser: nn.Module = denoiser, call: Call = call, **changes: Any) -> torch.Tensor:
            with torch.no_grad():
                return denoiser(**{**call.inputs, "return_dict": False, **changes})[0]

        base = predict()
        assert equal(base, call.prediction)
        for key in (family.sample, *family.conditioning):
            if call.inputs.get(key) is not None:
                assert not equal(base, predict(**{key: changed(call.inputs[key])})), key
        for group in family.blocks:
            for block in blocks(denoiser, group):
                weights = {key: value.clone() for key, value in block.state_dict().items()}
                block.load_state_dict({key: value * 1.1 for key, value in weights.items()})
                assert not equal(base, predict()), group.path
                block.load_state_dict(weights)


@every_class
def test_sizes_and_batches(family: Family, name: str) -> None:
    tiny = make(name)
    first = seen(family, name).image
    changes: dict[str, Any] = {"num_inference_steps": 2}
    if "strength" in tiny.kwargs:
        changes["strength"] = 1.0
    if "prompt" in tiny.kwargs and name not in ONE_PROMPT:
        each = ("prompt", "negative_prompt", *(("image",) if name in PICTURE_EACH else ()))
        prompts = {key: [tiny.kwargs[key]] * 2 for key in each if key in tiny.kwargs}
        assert len(run(tiny, **changes, **prompts)) == 2 * len(first), "batch"
    call = inspect.signature(tiny.pipe.__call__).parameters  # type: ignore[operator]
    many = {"num_images_per_prompt", "num_videos_per_prompt"} & set(call)
    if many and name not in ONE_VIDEO:
        changes[many.pop()] = 2
    size: Any = tiny.kwargs.get("width", 0)
    if size:
        changes["width"] = 2 * size
    if size and "max_area" in tiny.kwargs:
        changes["max_area"] = 2 * size * size
    images = run(tiny, **changes)
    assert len(images) == len(first) * (2 if {"num_images_per_prompt", "num_videos_per_prompt"} & set(changes) else 1)
    assert images.shape[-2] == (2 * size or first.shape[-2])
    assert np.isfinite(images).all()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_swap(name: str) -> None:
    tiny = make(name)
    pipe: Any = tiny.pipe
    for scheduler in SCHEDULERS[name]:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        assert np.isfinite(run(tiny)).all()


@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline"])
def test_true_guidance_requires_a_negative_prompt(name: str) -> None:
    family = next(family for family in FAMILIES if name in family.pipelines)
    without = record(family, make(name), negative_prompt=None)
    assert len(without.calls) == len(without.steps)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline", "WanPipeline"])
def test_active_is_read_live(name: str) -> None:
    """Guidance cut in mid-run, as diffusers' own callback documentation does it."""
    family = next(family for family in FAMILIES if name in family.pipelines)
    batched = family.guidance.layout == "batched"

    def cut(pipe: Any, index: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == 1:
            pipe._guidance_scale = 1.0
            return {key: value.chunk(2)[-1] for key, value in tensors.items()} if batched else tensors
        return tensors

    tiny = make(name)
    inputs = ["prompt_embeds", "pooled_prompt_embeds"] if name.endswith("3Pipeline") else ["prompt_embeds"]
    run_seen = record(family, tiny, callback_on_step_end=cut, callback_on_step_end_tensor_inputs=inputs)
    if batched:
        assert [len(call.inputs[family.sample]) for call in run_seen.calls] == [2, 2, 1, 1]
    else:
        assert [call.step for call in run_seen.calls] == [0, 0, 1, 1, 2, 3]


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline", "QwenImagePipeline", "WanPipeline@2.2"])
def test_save_and_reload(name: str, tmp_path: Any) -> None:
    tiny = make(name)
    pipe: Any = tiny.pipe
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    # Loaded weights are not aligned in memory, so the last bit may differ.
    np.testing.assert_allclose(run(tiny), run(Tiny(again, tiny.kwargs)), atol=1e-5)


def needed(cls: type) -> set[str]:
    """Packages that a pipeline's module imports only where they are installed, and uses without asking again."""
    tree = ast.parse(inspect.getsource(sys.modules[cls.__module__]))
    guarded: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.If) and "_available()" in ast.unparse(node.test):
            for line in node.body:
                if isinstance(line, (ast.Import, ast.ImportFrom)) and not getattr(line, "level", 0):
                    module = (getattr(line, "module", None) or line.names[0].name).partition(".")[0]
                    guarded |= {(alias.asname or alias.name).partition(".")[0]: module for alias in line.names}

    guarded = {name: module for name, module in guarded.items() if module != "diffusers"}  # its watermarker: only who asks gets it

    def used(node: ast.AST) -> set[str]:
        if isinstance(node, ast.If) and "available" in ast.unparse(node.test).lower():
            return set().union(*map(used, node.orelse))
        if isinstance(node, ast.FunctionDef) and node.name == "_clean_caption":  # its caller asks
            return set()
        here = {guarded[node.id]} if isinstance(node, ast.Name) and node.id in guarded else set()
        return here.union(*map(used, ast.iter_child_nodes(node)))

    return set().union(*map(used, tree.body))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_packages_are_what_diffusers_cannot_do_without(family: Family) -> None:
    found: dict[str, list[str]] = {}
    for name in family.pipelines:
        for package in needed(getattr(diffusers, name)):
            found.setdefault(package, []).append(name)
    assert {package: sorted(needy) for package, needy in family.packages.items()} == {p: sorted(names) for p, names in found.items()}
