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
from cannot import EDITS, FOUR_STEPS, GUIDED, ONE_AREA, ONE_PROMPT, ONE_VIDEO, PICTURE_EACH
from diffgraft import Family, Tiny
from diffgraft.installed.anatomy import layers_in
from diffgraft.methods.conditioning import ask, number_of_pictures
from diffgraft.methods.inputs import parameters
from diffgraft.testing.tiny import as_run
from diffgraft_pipelines.families import FAMILIES
from diffgraft_pipelines.observe import doubled, other_condition
from diffgraft_pipelines.runs import parts_of, same_start
from diffgraft_pipelines.tiny import make
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
)
from recording import LAYOUTS, Call, blocks, branches, changed, denoisers, equal, layout, record, run, running, seen, stepped_frames
from torch import nn

torch.set_num_threads(1)


pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You have passed 2 text prompts:FutureWarning"),
]

VARIANTS = {
    "StableDiffusionInpaintPipeline": ("9",),
    "Flux2Pipeline": ("image",),
    "Flux2KleinPipeline": ("image",),
    "WanPipeline": ("2.2",),
    "WanImageToVideoPipeline": ("2.2",),
}

CASES = [
    (as_run(family, name), name + variant)
    for family in FAMILIES
    if family.tiny
    for name in family.pipelines
    for variant in ("", *("@" + v for v in VARIANTS.get(name, ())))
]

every_class = pytest.mark.parametrize(("family", "name"), CASES, ids=[name for _, name in CASES])


# What diffusers 0.42 itself cannot do, with or without plugins.
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
    call = parameters(pipe)
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
    if how == "off" and name in GUIDED:
        return
    seen_run = seen(family, name, how)
    guided = how == "on" and family.guidance.layout != "none"
    rows = seen_run.steps[0]["sample"].shape[0]
    if guided and family.guidance.doubled:
        rows //= 2
    calls_a_step = 2 if guided and family.guidance.layout == "sequential" else 1
    rows_a_call = rows * (len(running(family, guided)) if family.guidance.layout == "batched" else 1)
    for index, step in enumerate(seen_run.steps):
        calls = [call for call in seen_run.calls if call.step == index]
        assert len(calls) == calls_a_step
        for call in calls:
            check_call(family, seen_run.tiny.pipe, call, step, rows_a_call)
        check_combination(family, seen_run.tiny, calls, step, guided)
    assert len(seen_run.calls) == calls_a_step * len(seen_run.steps)
    assert number_of_pictures(seen_run.tiny.kwargs, family) == rows
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
    torch.testing.assert_close(given.max(), family.told(torch.as_tensor(step["timestep"]).float().max()))
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
    stepped = step["model_output"]
    if family.branch_prediction == "drop_sigma" and stepped.shape[1] == 2 * step["sample"].shape[1]:  # the scheduler takes the variance
        stepped, variance = stepped.chunk(2, dim=1)
        assert equal(variance, branches(family, calls, guided)["cond"].chunk(2, dim=1)[1])
    if not guided and not family.guidance.optional:
        assert calls[0].prediction is not None
        torch.testing.assert_close(fix(calls[0].prediction), stepped, rtol=0, atol=1e-5 if family.companion else 0)  # by way of x_0
        return
    parts = {branch: fix(prediction) for branch, prediction in branches(family, calls, guided).items()}
    scale: Any = tiny.kwargs[family.guidance.scale] + 1 - family.guidance.off  # type: ignore[operator]
    if family.guidance.second_scale in tiny.kwargs and calls[0].denoiser == 1:
        scale = tiny.kwargs[family.guidance.second_scale]
    if family.name == "svd":
        scale = pipe.guidance_scale
    base = parts["uncond"] if guided else parts["cond"]
    expected = base + scale * (parts["cond"] - parts.get("image", base))
    if "perturbed" in parts:
        expected = expected + tiny.kwargs["pag_scale"] * (parts["cond"] - parts["perturbed"])  # type: ignore[operator]
    if "image" in parts:
        expected = expected + tiny.kwargs["image_guidance_scale"] * (parts["image"] - parts["uncond"])  # type: ignore[operator]
    if family.name == "lumina":  # guides three channels of four
        expected[:, 3:] = parts["cond"][:, 3:]
    if family.name in ("qwen_image", "qwen_image_edit", "lumina2", "nucleus_moe") and tiny.kwargs.get("cfg_normalize", True):
        expected = expected * parts["cond"].norm(dim=-1, keepdim=True) / expected.norm(dim=-1, keepdim=True)
    if family.guidance.doubled:
        expected = torch.cat([expected, expected])
    torch.testing.assert_close(expected, stepped, rtol=1e-4, atol=1e-5)


@every_class
def test_branch_order(family: Family, name: str) -> None:
    """Another prompt changes the conditional branch only."""
    if family.guidance.layout == "none":
        return
    which = family.conditioning[0]
    first, second = (seen(family, name, how).calls for how in ("on", "different"))
    if family.guidance.layout == "batched":
        n = len(family.guidance.order)
        pairs = list(zip(*(parts_of(calls[0].inputs[which], n) or () for calls in (first, second)), strict=True))
    else:
        pairs = [(first[i].inputs[which], second[i].inputs[which]) for i in range(2)]
    for branch, pair in zip(family.guidance.order, pairs, strict=True):
        assert same_start(*pair) == (branch not in ("cond", "perturbed")), branch


@pytest.mark.parametrize(("family", "name"), [case for case in CASES if case[0].companion], ids=lambda case: str(case)[:15])
def test_a_companion_is_stepped_beside_the_sample(family: Family, name: str) -> None:
    assert family.companion
    assert family.companion_scale
    tiny = make(name)
    run_seen = record(family, tiny, **{family.companion_scale: 5.0})
    assert len(run_seen.steps) == len(run_seen.beside) == len(run_seen.calls) == 4
    for call, step, beside in zip(run_seen.calls, run_seen.steps, run_seen.beside, strict=True):
        assert call.companion is not None
        assert torch.equal(torch.as_tensor(step["timestep"]), torch.as_tensor(beside["timestep"]))
        assert equal(call.inputs[family.companion].chunk(2)[0], beside["sample"])
        uncond, cond = call.companion.chunk(2)
        torch.testing.assert_close(uncond + 5.0 * (cond - uncond), beside["model_output"], rtol=1e-4, atol=1e-4)
    assert not np.array_equal(run_seen.image, seen(family, name).image), "the sound is heard in the picture"


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
                assert (family.name[:3], block, key) == ("sd3", expected[-1][1], "encoder_hidden_states")
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
                return ask(family, denoiser, {**call.inputs, **changes})

        base = predict()
        if not family.guidance.bound:  # else the pipeline has perturbed some layers
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
    changes: dict[str, Any] = {} if name in FOUR_STEPS else {"num_inference_steps": 2}
    if "strength" in tiny.kwargs:
        changes["strength"] = 1.0
    if {"prompt", "image_embeds"} & set(tiny.kwargs) and name not in ONE_PROMPT:
        pictures = ("image", "original_image", "mask_image") if name in PICTURE_EACH else ()
        prompts = doubled(tiny.kwargs) | {key: [tiny.kwargs[key]] * 2 for key in pictures if key in tiny.kwargs}
        assert len(run(tiny, **changes, **prompts)) == 2 * len(first), "batch"
    call = parameters(tiny.pipe)
    many = {"num_images_per_prompt", "num_videos_per_prompt"} & set(call)
    if many and name not in ONE_VIDEO:
        changes[many.pop()] = 2
    size: Any = 0 if name in ONE_AREA else tiny.kwargs.get("width", 0)
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
        modular = "Modular" in name  # whose blocks' modules ask, also for those that a run may do without: a prompt is cleaned in each
        for package in ["ftfy"] * (family.name == "wan_modular") if modular else needed(getattr(diffusers, name)):
            found.setdefault(package, []).append(name)
    assert {package: sorted(needy) for package, needy in family.packages.items()} == {p: sorted(names) for p, names in found.items()}
