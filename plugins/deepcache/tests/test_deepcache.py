"""DeepCache against its equations, against what the issues of its PyPI package report, and against that package's numbers."""

from __future__ import annotations

import ast
import gc
import importlib
import importlib.util
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffgraft import ConfigError, Effects, Paper, Plugin, StepOutput, Unsupported, load_pipeline
from diffgraft.installed import registry
from diffgraft.methods.skips import connections_made, connections_taken
from diffgraft_deepcache.schedule import nonuniform_keys
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

PIPELINES = {
    "sd": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "svd": "StableVideoDiffusionPipeline",
    "animatediff": "AnimateDiffPipeline",
    "pixel": "DDIMPipeline",
    "latent_consistency": "LatentConsistencyModelPipeline",
}


def tiny(family="sd", name=None):
    module, function = registry.families()[family].tiny.split(":")
    made = getattr(importlib.import_module(module), function)(name or PIPELINES[family], 0)
    if family != "pixel":
        made.kwargs["output_type"] = "latent"
    return made


def grafted(made, **knobs):
    return load_pipeline(made.pipe, plugins=[("deepcache", knobs)])


def picture(pipe, made, **kwargs):
    return call(pipe, **{**made.kwargs, **kwargs})


def call(pipe, **kwargs):
    """The result as an array, from equal noise."""
    return np.asarray(pipe(generator=torch.Generator().manual_seed(0), **kwargs)[0])


def branches_of(made):
    """All branches that this U-Net has."""
    unet = made.pipe.unet
    return range(1 + sum(len(b.resnets) + len(b.downsamplers or []) for b in unet.down_blocks))


def recorded_calls(unet, module):
    """A list that gets, for each U-Net call, whether ``module`` really ran in it (its innermost layers did)."""
    calls = []
    unet.register_forward_pre_hook(lambda *_: calls.append(False))
    leaf = next(m for m in module.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)))
    leaf.register_forward_hook(lambda *_: calls.__setitem__(-1, True))
    return calls


class Frozen(Plugin):
    """Asks the U-Net the same at every step: x never changes, t is always the same. Remembers what it answers."""

    name = "frozen"
    paper = Paper("a test", "0000.00000", "nothing")
    families = ("*",)
    neutral = {}  # noqa: RUF012
    effects = Effects(edits=frozenset({"latents", "timestep"}))

    def __init__(self, change=None):
        super().__init__()
        self.answers = []
        self.sample = None
        self.change = change or (lambda call: call)

    def denoise(self, call, next):
        self.sample = call.sample if self.sample is None else self.sample  # x never changes, but its scaling by sigma does
        call = call.replace(**{call.family.sample: self.sample, call.family.timestep: torch.tensor(500)})
        out = next(self.change(call))
        self.answers.append(out.clone())
        return out

    def step(self, call, next):
        next(call)
        return StepOutput(call.sample)


class Probe(Frozen):
    """Only what ``change(call, next)`` does."""

    name = "probe"
    effects = Effects()
    step = None

    def denoise(self, call, next):
        return self.change(call, next)


# the schedule: eqs. 6 and 7 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("N", "expected"),
    [
        (3, "0 3 6 8 11 13 15 17 20 22 25 28 32 35 38 42 46"),
        (5, "0 5 9 13 17 21 26 31 37 43"),
        (10, "0 9 17 26 37"),
    ],
)
def test_nonuniform_keys_are_those_of_the_paper(N, expected):
    assert " ".join(map(str, nonuniform_keys(50, N, 1.4, 15))) == expected


@pytest.mark.parametrize("N", [2, 3, 5, 10, 20])
@pytest.mark.parametrize("c", [0, 10, 15, 25, 60])
def test_nonuniform_keys_are_in_order_and_as_many_as_uniform_ones(N, c):
    for T in range(2, 101):
        keys = nonuniform_keys(T, N, 1.4, c)
        if keys is not None:
            assert keys[0] == 0
            assert list(keys) == sorted(set(keys))
            assert keys[-1] < T
            assert len(keys) == -(-T // N)


def test_no_power_gives_enough_steps():
    assert nonuniform_keys(30, 2, 1.4, 15) is None
    made = tiny("pixel")
    pipe = grafted(made, interval=2, skip_mode="nonuniform")
    with pytest.raises(ConfigError, match=r"30 steps at interval 2.*uniform"):
        picture(pipe, made, num_inference_steps=30)
    picture(pipe, made, num_inference_steps=6)


@pytest.mark.parametrize(("mode", "keys"), [("uniform", range(0, 20, 5)), ("nonuniform", nonuniform_keys(20, 5, 1.4, 8))])
def test_the_deep_part_runs_at_the_key_steps_only(mode, keys):
    made = tiny("pixel")
    calls = recorded_calls(made.pipe.unet, made.pipe.unet.mid_block)
    pipe = grafted(made, interval=5, skip_mode=mode, center=8)
    picture(pipe, made, num_inference_steps=20)
    assert [i for i, ran in enumerate(calls) if ran] == list(keys)
    part = pipe.plugins.report().plugins["deepcache"]
    assert (part.total("computed"), part.total("skipped")) == (4, 16)


# what a skip step runs --------------------------------------------------------------------------------------------------------------


def test_connections_are_numbered_like_the_package():
    made, taken = connections_made([(2, True), (2, True), (2, True), (2, False)]), connections_taken([3, 3, 3, 3])
    for b in range(4):
        assert [made[b][j] for j in range(2)] == [3 * b + j + 1 for j in range(2)]
        assert [taken[3 - b][2 - layer] for layer in range(3)] == [3 * b + layer for layer in range(3)]


def expected_resnets(levels, branch):
    """The authors' rule for what a skip step runs, up blocks and their layers counted from the output."""
    b, layer = divmod(branch, 3)
    down = {f"down_blocks.{i}.resnets.{j}" for i in range(levels) for j in range(2) if i < b or (i == b and j < layer)}
    up = {f"up_blocks.{levels - 1 - i}.resnets.{2 - j}" for i in range(levels) for j in range(3) if i < b or (i == b and j <= layer)}
    return down | up


@pytest.mark.parametrize("family", ["sd", "sdxl", "svd", "animatediff", "pixel"])
def test_a_skip_step_runs_the_modules_of_its_branch(family):
    made = tiny(family)
    unet = made.pipe.unet
    ran = []
    for path, module in unet.named_modules():
        if path.count(".") == 3 and ".resnets." in path and not path.startswith("mid"):
            leaf = next(m for m in module.modules() if isinstance(m, torch.nn.Conv2d))
            leaf.register_forward_hook(lambda *_, path=path: ran.append(path))
    pipe = grafted(made, interval=2)
    for branch in branches_of(made):
        pipe.plugins.configure("deepcache", branch=branch)
        unet_calls = []
        handle = unet.register_forward_pre_hook(lambda *_, calls=unet_calls: calls.append(ran.clear()))
        picture(pipe, made, num_inference_steps=2)
        handle.remove()
        assert set(ran) == expected_resnets(len(unet.down_blocks), branch), branch


def test_macs_of_a_skip_step_grow_with_the_branch():
    made = tiny("pixel")
    pipe = grafted(made, interval=2)

    def macs():
        with FlopCounterMode(display=False) as counter:
            picture(pipe, made, num_inference_steps=2)
        return counter.get_total_flops()

    costs = []
    for branch in branches_of(made):
        pipe.plugins.configure("deepcache", branch=branch)
        costs.append(macs())
    pipe.plugins.configure("deepcache", interval=1)
    costs.append(macs())
    assert costs == sorted(set(costs))


def test_only_what_is_skipped_carries_a_hook():
    made = tiny("sd")
    pipe = grafted(made, interval=2, branch=1)
    found = []
    made.pipe.unet.register_forward_pre_hook(
        lambda unet, _: found.append({path for path, m in unet.named_modules() if "forward" in m.__dict__ and path})
    )
    picture(pipe, made)
    assert found[-1] == {
        "down_blocks.0.resnets.1",
        "down_blocks.0.attentions.1",
        "down_blocks.0.downsamplers.0",
        "down_blocks.1",
        "down_blocks.2",
        "mid_block",
        "up_blocks.0",
        "up_blocks.1",
        "up_blocks.2.resnets.0",
        "up_blocks.2.attentions.0",
    }
    pipe.plugins.configure("deepcache", interval=1)
    picture(pipe, made)
    assert found[-1] == set()


# identities -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PIPELINES)
def test_interval_one_is_bit_equal(family):
    made = tiny(family)
    baseline = picture(made.pipe, made)
    pipe = grafted(made, interval=1)
    assert np.array_equal(picture(pipe, made), baseline)
    pipe.plugins.configure("deepcache", interval=2)
    assert not np.array_equal(picture(pipe, made), baseline)
    pipe.plugins.clear()
    assert np.array_equal(picture(made.pipe, made), baseline)
    assert not any("forward" in m.__dict__ for m in made.pipe.unet.modules())


@pytest.mark.parametrize("family", PIPELINES)
def test_a_skip_step_with_unchanged_inputs_equals_the_key_step(family):
    made = tiny(family)
    for branch in branches_of(made):
        frozen = Frozen()
        pipe = load_pipeline(made.pipe, plugins=[frozen, ("deepcache", {"interval": 4, "branch": branch})])
        picture(pipe, made, num_inference_steps=3)
        assert pipe.plugins.report().plugins["deepcache"].total("skipped") == 2
        first, *others = frozen.answers
        assert all(torch.equal(first, other) for other in others), branch
        pipe.plugins.clear()


def test_freeu_and_adapters_write_in_place_but_not_into_the_cache():
    made = tiny("sd")
    shapes = [(2, 16, 8, 8), (2, 32, 4, 4), (2, 32, 2, 2), (2, 32, 2, 2)]  # the last one goes behind the mid block
    residuals = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes]

    def adapt(call):
        return call.replace(down_intrablock_additional_residuals=[r.clone() for r in residuals])

    for change in (adapt, None):
        if change is None:
            made.pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
        for branch in branches_of(made):
            frozen = Frozen(change)
            pipe = load_pipeline(made.pipe, plugins=[frozen, ("deepcache", {"interval": 4, "branch": branch})])
            picture(pipe, made, num_inference_steps=3)
            assert all(torch.equal(frozen.answers[0], answer) for answer in frozen.answers), (change, branch)
            pipe.plugins.clear()


# schedulers, sizes, guidance --------------------------------------------------------------------------------------------------------

ONE_A_STEP = (10, [0, 3, 6, 9])
SCHEDULERS = [  # U-Net calls of 10 steps, and those that begin step 0, 3, 6 and 9
    ("DDIMScheduler", {}, *ONE_A_STEP),
    ("PNDMScheduler", {"skip_prk_steps": True}, 11, [0, 4, 7, 10]),
    ("PNDMScheduler", {"skip_prk_steps": False}, 19, [0, 12, 15, 18]),
    ("HeunDiscreteScheduler", {}, 19, [0, 6, 12, 18]),
    ("KDPM2DiscreteScheduler", {}, 19, [0, 6, 12, 18]),
    ("EulerDiscreteScheduler", {}, *ONE_A_STEP),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, *ONE_A_STEP),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "timestep_spacing": "leading", "num_train_timesteps": 12}, *ONE_A_STEP),
]


@pytest.mark.parametrize(("name", "options", "whole", "keys"), SCHEDULERS)
def test_key_steps_are_those_of_the_solver_with_every_scheduler(name, options, whole, keys):
    made = tiny("sd")
    pipe = grafted(made, interval=3)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)  # after attaching
    if options.get("num_train_timesteps"):  # so few that neighbours round to one timestep
        pipe.scheduler = getattr(diffusers, name)(**options)
    calls = recorded_calls(pipe.unet, pipe.unet.mid_block)
    first = picture(pipe, made, num_inference_steps=10)
    assert [i for i, ran in enumerate(calls) if ran] == keys
    assert len(calls) == whole
    assert pipe.plugins.report().steps == 10
    assert np.array_equal(picture(pipe, made, num_inference_steps=10), first)


def test_image_to_image_keeps_nothing_of_the_previous_picture():
    made = tiny("sd", "StableDiffusionImg2ImgPipeline")
    pipe = grafted(made, interval=3)
    calls = recorded_calls(pipe.unet, pipe.unet.mid_block)
    picture(pipe, made, num_inference_steps=10, strength=0.9)
    assert [i for i, ran in enumerate(calls) if ran] == [0, 3, 6]
    calls.clear()
    second = picture(pipe, made, num_inference_steps=10, strength=0.6)
    assert [i for i, ran in enumerate(calls) if ran] == [0, 3]
    other = tiny("sd", "StableDiffusionImg2ImgPipeline")
    assert np.array_equal(picture(grafted(other, interval=3), other, num_inference_steps=10, strength=0.6), second)


def test_guidance_cut_in_mid_run_starts_the_cache_again():
    made = tiny("sd")
    pipe = grafted(made, interval=4)
    calls = recorded_calls(pipe.unet, pipe.unet.mid_block)
    cut = diffusers.callbacks.SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    picture(pipe, made, num_inference_steps=8, callback_on_step_end=cut)
    assert [i for i, ran in enumerate(calls) if ran] == [0, 2, 6]
    counts = pipe.plugins.report().plugins["deepcache"].counts
    assert counts == {"computed": {"both": 1, "cond": 2}, "skipped": {"both": 1, "cond": 4}}


def test_size_steps_and_batch_change_between_calls():
    made = tiny("sd")
    pipe = grafted(made, interval=3)
    first = picture(pipe, made, num_inference_steps=5)
    for other in ({"height": 32, "width": 96}, {"num_inference_steps": 9}, {"num_images_per_prompt": 2}, {"guidance_scale": 1.0}):
        assert len(picture(pipe, made, **other))
    assert np.array_equal(picture(pipe, made, num_inference_steps=5), first)


def test_odd_sizes_keep_the_upsample_size():
    made = tiny("sd")
    assert picture(grafted(made, interval=2, branch=2), made, height=72, width=40).shape[2:] == (9, 5)


# other plugins further out ----------------------------------------------------------------------------------------------------------


def test_two_unet_calls_in_one_step_have_a_cache_each():
    made = tiny("sd")
    alone = picture(grafted(made, interval=2), made)
    made.pipe.plugins.clear()

    def twice(call, next):
        out = next(call)
        next(call.replace(encoder_hidden_states=call["encoder_hidden_states"] * 0))
        return out

    pipe = load_pipeline(made.pipe, plugins=[Probe(twice), ("deepcache", {"interval": 2})])
    assert np.array_equal(picture(pipe, made), alone)
    assert pipe.plugins.report().plugins["deepcache"].total("computed") == 4


def test_no_feature_grows_older_than_the_interval_when_a_key_step_is_swallowed():
    made = tiny("sd")
    calls = recorded_calls(made.pipe.unet, made.pipe.unet.mid_block)
    probe = Probe(lambda call, next: call.sample * 0 if call.step.index in (0, 3) else next(call))
    pipe = load_pipeline(made.pipe, plugins=[probe, ("deepcache", {"interval": 2})])
    picture(pipe, made, num_inference_steps=7)
    assert [i for i, ran in enumerate(calls) if ran] == [1, 4, 6]


# ControlNet -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", [0, 1, 2, 4, 8])
def test_controlnet_residuals_of_the_kept_part_are_fresh_and_the_deeper_ones_are_those_of_the_key_step(branch):
    made = tiny("sd", "StableDiffusionControlNetPipeline")
    names = ("down_block_additional_residuals", "mid_block_additional_residual")

    def answers(which):
        residuals = []

        def change(call):
            if call.step.index == 0:
                residuals.extend(call[name] for name in names)
                return call
            call = call.replace(**dict(zip(names, residuals, strict=True)))  # those of the key step, but one
            down, mid = list(residuals[0]), residuals[1]
            if which == "mid":
                return call.replace(mid_block_additional_residual=mid + 1)
            down[which] = down[which] + 1
            return call.replace(down_block_additional_residuals=down)

        frozen = Frozen(change)
        pipe = load_pipeline(made.pipe, plugins=[frozen, ("deepcache", {"interval": 2, "branch": branch})])
        picture(pipe, made, num_inference_steps=2)
        pipe.plugins.clear()
        return frozen.answers

    for which in range(9):
        key, skip = answers(which)
        assert torch.equal(key, skip) == (which > branch)
    key, skip = answers("mid")
    assert torch.equal(key, skip) == (branch < 8)  # at the deepest branch it is the mid block's own output that is kept


# memory -----------------------------------------------------------------------------------------------------------------------------


def test_a_run_keeps_one_feature_and_frees_it():
    made = tiny("sd")
    pipe = grafted(made, interval=2)

    def alive():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    picture(pipe, made)
    before = alive()
    picture(pipe, made)
    assert alive() == before
    feature = 2 * 16 * 8 * 8 * 4  # rows, channels and side of up_blocks.2.attentions.1's output, fp32
    assert feature <= pipe.plugins.report().plugins["deepcache"].state_bytes <= feature + 64 * 4


# refusals ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "sdxl", "pixel"])
def test_a_branch_that_the_unet_does_not_have_is_refused(family):
    made = tiny(family)
    with pytest.raises(ConfigError, match=r"branch = 9.*unet allows 0 to 8"):
        grafted(made, branch=9)
    assert not hasattr(made.pipe, "plugins")
    pipe = grafted(made, branch=8)
    with pytest.raises(ConfigError, match="0 to 8"):
        pipe.plugins.configure("deepcache", branch=9)
    assert pipe.plugins["deepcache"].config.branch == 8


def pixel_pipeline(**config):
    made = tiny("pixel")
    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(sample_size=16, block_out_channels=(32, 32), norm_num_groups=8, **{**blocks, **config})
    made.pipe.register_modules(unet=unet.eval())
    return made


def test_a_unet_without_mid_block_has_one_branch_less():
    made = pixel_pipeline(mid_block_type=None)
    with pytest.raises(ConfigError, match="0 to 4"):
        grafted(made, branch=5)
    baseline = picture(made.pipe, made)
    assert not np.array_equal(picture(grafted(made, interval=2, branch=4), made), baseline)


def test_unets_with_a_second_path_are_refused():
    made = pixel_pipeline(
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"), up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D")
    )
    with pytest.raises(Unsupported, match="skip_conv"):
        grafted(made)
    assert not hasattr(made.pipe, "plugins")


def test_a_family_that_does_not_list_the_layers_is_refused(monkeypatch):
    sd = registry.families()["sd"]
    blocks = tuple(replace(group, layers=()) for group in sd.blocks)
    monkeypatch.setattr(registry, "load_families", lambda **_: ({"sd": replace(sd, blocks=blocks)}, {}))
    made = tiny("sd")
    with pytest.raises(Unsupported, match="resnets"):
        grafted(made)


def test_a_dit_is_refused():
    made = tiny("pixart", "PixArtSigmaPipeline")
    with pytest.raises(Unsupported, match="deepcache does not work on"):
        grafted(made)


@pytest.mark.parametrize("layers", [1, 3, (1, 2)])
def test_any_number_of_layers_a_block(layers):
    made = pixel_pipeline(layers_per_block=layers) if isinstance(layers, int) else tiny("sd")
    if not isinstance(layers, int):
        config = {**made.pipe.unet.config, "layers_per_block": (1, 2, 1), "reverse_transformer_layers_per_block": None}
        made.pipe.register_modules(unet=type(made.pipe.unet).from_config(config).eval())
    total = len(branches_of(made))
    for branch in range(total):
        frozen = Frozen()
        pipe = load_pipeline(made.pipe, plugins=[frozen, ("deepcache", {"interval": 2, "branch": branch})])
        picture(pipe, made, num_inference_steps=2)
        assert torch.equal(*frozen.answers)
        pipe.plugins.clear()
    with pytest.raises(ConfigError, match=f"0 to {total - 1}"):
        grafted(made, branch=total)


# parity with DeepCache==0.1.1 -------------------------------------------------------------------------------------------------------

PARITY = 1e-5


def peer_helper(pipe, interval, branch, keys=None):
    """The package's helper; with ``keys``, full steps at those (the package has the non-uniform schedule in its old pipelines only)."""
    package = pytest.importorskip("DeepCache")

    class Helper(package.DeepCacheSDHelper):
        def is_skip_step(self, *args, **kwargs):
            if keys is None:
                return super().is_skip_step(*args, **kwargs)
            self.params["skip_mode"] = "keys"  # its predicate alone
            return self.cur_timestep not in keys and super().is_skip_step(*args, **kwargs)

    helper = Helper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    return helper


def peer_keys(T, N, p, c):
    """The package's own non-uniform steps, from its source: its pipelines do not import on today's diffusers."""
    source = Path(importlib.util.find_spec("DeepCache").submodule_search_locations[0], "sd", "pipeline_stable_diffusion.py").read_text()
    wanted = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "sample_from_quad_center"]
    scope = {"np": np}
    exec(compile(ast.Module(wanted, []), "DeepCache", "exec"), scope)
    return [int(i) for i in scope["sample_from_quad_center"](T, -(-T // N), c, p)[0]]


def assert_parity(made, branches, intervals, steps, keys=None, **knobs):
    """Ours and the package's on two equal pipelines; returns the largest difference."""
    kwargs = {**made.kwargs, "num_inference_steps": steps, "output_type": "latent"}
    worst = 0.0
    for interval in intervals:
        for branch in branches:
            pipe = grafted(made, interval=interval, branch=branch, **knobs)
            ours = call(pipe, **kwargs)
            assert pipe.plugins.report().plugins["deepcache"].total("skipped") > 0
            pipe.plugins.clear()
            helper = peer_helper(made.pipe, interval, branch, keys)
            helper.enable()
            try:
                theirs = call(made.pipe, **kwargs)
            finally:
                helper.disable()
            worst = max(worst, float(np.abs(ours - theirs).max()))
            assert worst <= PARITY, (interval, branch)
    return worst


@pytest.mark.peer
@pytest.mark.parametrize("interval", [2, 3, 5])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_parity_on_every_branch(family, interval):
    made = tiny(family)
    assert_parity(made, branches_of(made), [interval], 6)


@pytest.mark.peer
@pytest.mark.parametrize("interval", [2, 3, 5])
def test_parity_on_four_levels(interval):
    made = tiny("sd")
    config = {
        **made.pipe.unet.config,
        "block_out_channels": (32, 64, 96, 96),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made.pipe.register_modules(unet=type(made.pipe.unet).from_config(config).eval().requires_grad_(False))
    assert_parity(made, range(12), [interval], 6)


@pytest.mark.peer
@pytest.mark.parametrize("N", [2, 3, 5])
def test_parity_of_the_nonuniform_schedule(N):
    pytest.importorskip("DeepCache")
    keys = peer_keys(12, N, 1.4, 5)
    assert tuple(keys) == nonuniform_keys(12, N, 1.4, 5)
    made = tiny("sd")
    assert_parity(made, branches_of(made), [N], 12, keys, skip_mode="nonuniform", center=5)


@pytest.mark.peer
def test_parity_of_the_nonuniform_steps_at_every_length():
    pytest.importorskip("DeepCache")
    for T in (4, 20, 28, 50, 100):
        for N in (2, 3, 5, 10):
            for c in (0, 10, 15, 60):
                ours = nonuniform_keys(T, N, 1.4, c)
                if ours is None:
                    with pytest.raises(ValueError, match="Cannot find"):
                        peer_keys(T, N, 1.4, c)
                else:
                    assert list(ours) == peer_keys(T, N, 1.4, c)


@pytest.mark.peer
def test_parity_in_image_to_image():
    made = tiny("sd", "StableDiffusionImg2ImgPipeline")
    made.kwargs["strength"] = 0.7
    assert_parity(made, [0, 4], [2, 3], 9)


@pytest.mark.peer
def test_parity_on_the_bundled_checkpoint():
    path = Path(registry.find_bundled("emoji-sd").path)
    if not list(path.glob("unet/*.safetensors")):
        pytest.skip("the bundled emoji-sd has no U-Net weights yet")
    pipe = load_pipeline("emoji-sd")
    pipe.set_progress_bar_config(disable=True)
    made = replace_tiny(pipe)
    layers = len(pipe.unet.down_blocks[0].resnets)
    assert layers == 2, "the package numbers branches for two layers a block"
    for interval in (2, 3, 5):
        assert_parity(made, branches_of(made), [interval], 6)


def replace_tiny(pipe):
    made = tiny("sd")
    made.pipe, made.kwargs = pipe, {"prompt": "a small dog face on the left on a blue background", "guidance_scale": 5.0}
    return made
