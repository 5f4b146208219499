"""AutoDiffusion: time steps land in every scheduler, skipped layers are what they should be, and the evolution finds better ones."""

from __future__ import annotations

import copy
import json
import random

import diffusers
import numpy as np
import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, Unsupported, blocks_of, denoisers_of, load_pipeline
from diffgraft.cli import app
from diffgraft.installed.registry import find_family
from diffgraft.methods.findings import Finding
from diffgraft.methods.fitness import RewardFitness, TrajectoryFitness
from diffgraft.methods.inputs import CallSettings, Sample
from diffgraft.methods.search import Plan, evolve, search
from diffgraft_autodiffusion import AutoDiffusion, AutoDiffusionSearcher, method
from diffgraft_autodiffusion.layers import shortcut, skippable
from diffgraft_autodiffusion.method import PRESETS, Space
from diffgraft_autodiffusion.schedule import sigmas_at
from diffgraft_pipelines.tiny import make
from torch import nn
from typer.testing import CliRunner


def tiny(name: str = "StableDiffusionPipeline", scheduler: str | None = None, **options):
    made = make(name)
    if scheduler is not None:
        made.pipe.scheduler = getattr(diffusers, scheduler).from_config(made.pipe.scheduler.config, **options)
    made.pipe.set_progress_bar_config(disable=True)
    return made.pipe, made.kwargs


def latents(pipe, kwargs, steps=4, **more):
    more = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(0), **more}
    if type(pipe).__name__ != "DiTPipeline":
        more["output_type"] = "latent"
    out = pipe(**{**kwargs, **more})[0]
    return out if isinstance(out, torch.Tensor) else torch.as_tensor(np.asarray(out))


def attached(pipe, **knobs):
    return load_pipeline(pipe, plugins=[("autodiffusion", knobs)])


def layers_of(pipe):
    family = find_family(type(pipe).__mro__[1] if hasattr(pipe, "plugins") else type(pipe))
    return skippable(blocks_of(family, denoisers_of(pipe, family)))


# time steps --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"]
)
def test_time_steps_of_one_spacing_on_a_scheduler_of_another(scheduler):
    """Not the shortcut for equal time steps: everything that belongs to them is written, and gives the other scheduler's bits."""
    pipe, kwargs = tiny(scheduler=scheduler, timestep_spacing="leading")
    wanted = latents(pipe, kwargs)
    timesteps = pipe.scheduler.timesteps.tolist()
    pipe, kwargs = tiny(scheduler=scheduler, timestep_spacing="trailing")
    assert not torch.equal(latents(pipe, kwargs), wanted)
    assert torch.equal(latents(attached(pipe, timesteps=timesteps), kwargs), wanted)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "LMSDiscreteScheduler"])
def test_time_steps_decide_how_noisy_the_start_is(name):
    """Schedulers that scale the first noise by their largest sigma."""
    pipe, kwargs = tiny(scheduler=name, timestep_spacing="linspace")
    wanted = latents(pipe, kwargs)
    timesteps = pipe.scheduler.timesteps.tolist()
    pipe, kwargs = tiny(scheduler=name, timestep_spacing="trailing")
    assert torch.equal(latents(attached(pipe, timesteps=timesteps), kwargs), wanted)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [("StableDiffusionPipeline", None), ("StableDiffusionPipeline", "DPMSolverMultistepScheduler"), ("FluxPipeline", None)],
)
def test_the_uniform_genome_is_the_stock_scheduler_bit_for_bit(name, scheduler):
    pipe, kwargs = tiny(name, scheduler)
    wanted = latents(pipe, kwargs)
    uniform = pipe.scheduler.timesteps.tolist()
    empty = [[] for _ in uniform]
    off = {"timesteps": (4, 3), "parts": "none"}
    for knobs in ({}, {"timesteps": uniform}, {"timesteps": uniform, "skips": empty}, {"skips": empty}, off):
        attached(pipe, **knobs)
        assert torch.equal(latents(pipe, kwargs), wanted), knobs
        pipe.plugins.clear()


def test_sigmas_are_those_that_schedulers_interpolate():
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"):
        scheduler = getattr(diffusers, name)(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        scheduler.set_timesteps(7)
        family = find_family(diffusers.StableDiffusionPipeline)
        assert torch.equal(sigmas_at(scheduler.timesteps.tolist(), scheduler, family), scheduler.sigmas[:-1])


def test_flow_models_go_from_sigma_to_sigma():
    pipe, kwargs = tiny("FluxPipeline")
    latents(attached(pipe, timesteps=(1000, 812.5, 300)), kwargs, 3)
    assert pipe.scheduler.sigmas.tolist() == pytest.approx([1, 0.8125, 0.3, 0])
    assert pipe.scheduler.timesteps.tolist() == [1000, 812.5, 300]


def test_the_published_stable_diffusion_schedule():
    """Continuous t of DPM-Solver: index 1000 t - 1; the fifth is where the fourth step ends, at noise."""
    pipe, kwargs = tiny(scheduler="DPMSolverMultistepScheduler")
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(float(args[1])))
    latents(attached(pipe, preset="sd14_dpm_4"), kwargs)
    points = [1000 * t - 1 for t in (0.9261, 0.7183, 0.5005, 0.2857, 0.0150)]
    assert seen == pytest.approx(points[:4], abs=1e-3)
    abar = pipe.scheduler.alphas_cumprod.double().numpy()
    table = ((1 - abar) / abar) ** 0.5
    assert pipe.scheduler.sigmas.tolist() == pytest.approx(list(np.interp(points, np.arange(1000), table)), rel=1e-5)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(Unsupported, match=r"moves between whole training timesteps.*need a scheduler with sigmas"):
        latents(pipe, kwargs)
    for preset, (timesteps, end) in PRESETS.items():
        assert method.falls([*timesteps, *([] if end is None else [end])]), preset
    latents(attached(tiny(scheduler="DDIMScheduler")[0], preset="adm64_6"), kwargs, 6)


def test_image_to_image_runs_the_tail():
    pipe, kwargs = tiny("StableDiffusionImg2ImgPipeline")
    attached(pipe, timesteps=(900, 600, 300, 40), skips=((), (), (0, 1), (2,)))
    latents(pipe, {**kwargs, "strength": 0.5})
    assert pipe.plugins.report().steps == 2
    assert pipe.plugins.report().plugins["autodiffusion"].total("skipped") == 3


# skipped layers ----------------------------------------------------------------------------------------------------------------------


class Shortcut(nn.Module):
    """What stays of a ResBlock."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, temb):
        return (x if self.block.conv_shortcut is None else self.block.conv_shortcut(x)) / self.block.output_scale_factor


class Identity(nn.Module):
    """What stays of an attention layer."""

    def forward(self, x, *args, **kwargs):
        return (x,)


@pytest.mark.parametrize("what", ["resnets", "attentions"])
def test_all_resblocks_or_all_attention_left_out_equals_the_network_built_without(what):
    pipe, kwargs = tiny()
    by_hand = copy.deepcopy(pipe)
    for block in (*by_hand.unet.down_blocks, by_hand.unet.mid_block, *by_hand.unet.up_blocks):
        for layers in [getattr(block, what, None) or []]:
            for i, layer in enumerate(layers):
                layers[i] = Shortcut(layer) if what == "resnets" else Identity()
    names = [block.path for block in layers_of(pipe) if f".{what}." in block.path]
    assert len(names) > 4
    attached(pipe, skips=[names] * 4)
    assert torch.equal(latents(pipe, kwargs), latents(by_hand, kwargs))
    assert pipe.plugins.report().plugins["autodiffusion"].counts["skipped"] == {"both": 4 * len(names)}


def test_resblocks_that_resample_do_so_when_left_out():
    sizes = {"in_channels": 32, "out_channels": 64, "temb_channels": 8, "groups": 4}
    block = diffusers.models.resnet.ResnetBlock2D(**sizes, down=True, output_scale_factor=2.0)
    x = torch.randn(1, 32, 6, 6)
    with torch.no_grad():
        for p in block.conv2.parameters():
            p.zero_()  # then the branch adds nothing
        assert torch.equal(shortcut(block, x), block(x, torch.randn(1, 8)))
        assert shortcut(block, x).shape == (1, 64, 3, 3)


def test_a_pixel_unets_attention_and_a_transformers_blocks():
    pipe, kwargs = tiny("DDIMPipeline")
    plain = latents(pipe, {**kwargs, "output_type": "np"})
    attached(pipe, skips=[[block.path for block in layers_of(pipe) if block.kind.endswith("attention")]] * 4)
    assert not torch.equal(latents(pipe, kwargs), plain)
    for name, blocks in (("DiTPipeline", "transformer_blocks"), ("FluxPipeline", "single_transformer_blocks")):
        pipe, kwargs = tiny(name)
        by_hand = copy.deepcopy(pipe)
        last = len(getattr(by_hand.transformer, blocks)) - 1  # a DiT borrows the first one's embedding
        del getattr(by_hand.transformer, blocks)[last]
        attached(pipe, skips=[[f"{blocks}.{last}"]] * 4)
        assert torch.equal(latents(pipe, kwargs), latents(by_hand, kwargs)), name


def test_each_step_leaves_out_its_own_layers_by_number_or_path():
    pipe, kwargs = tiny()
    paths = [block.path for block in layers_of(pipe)]
    ran: list[list[str]] = [[]]
    for block in layers_of(pipe):
        inside = next(iter(block.module.children()))  # the block's own hooks fire around what stands for it
        inside.register_forward_hook(lambda *_, path=block.path: ran[-1].append(path))
    pipe.unet.register_forward_pre_hook(lambda *_: ran.append([]))
    attached(pipe, skips=((0, paths[5]), (), (len(paths) - 1,), (1, 2, 3)))
    latents(pipe, kwargs)
    missing = [sorted(set(paths) - set(step), key=paths.index) for step in ran[1:]]
    assert missing == [[paths[0], paths[5]], [], [paths[-1]], paths[1:4]]


# the space ---------------------------------------------------------------------------------------------------------------------------

SPACE = Space((751, 501, 251, 1), range(1000), tuple(f"layer{i}" for i in range(20)), 80)


def some(rng, space=SPACE, ratio=0.5):
    genome = method.drawn(rng, space, ratio)
    assert genome is not None
    return genome


def test_candidates_are_legal_whatever_is_done_to_them():
    rng = random.Random(0)
    seen = {"drawn": 0, "mutated": 0, "crossed": 0}
    lengths = set()
    for end in (False, True):
        space = Space(SPACE.start, SPACE.points, SPACE.layers, SPACE.budget, end)
        for _ in range(300):
            one, other = some(rng, space), some(rng, space)
            made = {
                "drawn": one,
                "mutated": method.mutated(rng, one, space, 0.25, 0.5),
                "crossed": method.crossed(rng, one, other, space),
            }
            for name, genome in made.items():
                if genome is None:
                    continue
                seen[name] += 1
                lengths.add(len(genome["timesteps"]))
                assert method.fits(genome, space), (name, genome)
                assert len(genome["skips"]) == len(genome["timesteps"])
                assert (genome["end"] is not None) == end
                assert all(len(set(names)) == len(names) for names in genome["skips"])
                assert json.loads(json.dumps(genome)) == genome
    assert min(seen.values()) > 200
    assert lengths >= {4, 5}, "layers that are left out buy more time steps"


def test_without_skipping_candidates_have_the_steps_of_the_budget():
    rng = random.Random(0)
    for layers, budget in ((SPACE.layers, 80), ((), 0)):
        space = Space(SPACE.start, SPACE.points, layers, budget)
        for genome in (method.uniform(space), some(rng, space, 0), method.mutated(rng, method.uniform(space), space, 0.5, 0)):
            assert len(genome["timesteps"]) == 4
            assert genome["skips"] == [[]] * 4
    assert method.uniform(SPACE)["timesteps"] == [751, 501, 251, 1]
    assert not method.fits(method.uniform(SPACE), Space(SPACE.start, SPACE.points, SPACE.layers, 79))


def test_skip_lists_really_mutate_and_stay_with_their_time_step():
    """In the official code the assignment is a comparison, so that a list once drawn never changes."""
    rng = random.Random(1)
    parent = method.candidate([900, 600, 300, 10], [["layer1", "layer2"], ["layer3"], ["layer4", "layer5"], ["layer6"]], SPACE)
    changed = kept = 0
    for _ in range(200):
        child = method.mutated(rng, parent, SPACE, 0.25, 0.1)
        if child is None:
            continue
        changed += child["skips"] != parent["skips"]
        assert sorted(map(len, child["skips"])) == [1, 1, 2, 2], "entries are replaced, not added"
        if child["timesteps"] == parent["timesteps"]:
            kept += child["skips"] == parent["skips"]
    assert changed > 100
    moved = method.candidate([5, 600, 300, 10], parent["skips"], SPACE)  # 900 -> 5: its list goes with it to the end
    assert moved["skips"][-1] == ["layer1", "layer2"]
    empty = method.candidate([900, 600, 300, 10], [[]] * 4, SPACE)
    assert all(method.mutated(random.Random(i), empty, SPACE, 0.25, 0.0)["skips"] == [[]] * 4 for i in range(20))
    assert any(any(method.mutated(random.Random(i), empty, SPACE, 0.25, 0.5)["skips"]) for i in range(20))


def test_a_radius_keeps_mutations_near():
    parent = method.candidate([900, 600, 300, 3], [[]] * 4, SPACE)
    children = [method.mutated(random.Random(i), parent, SPACE, 0.5, 0.0, radius=20) for i in range(100)]
    moves = [abs(a - b) for child in children if child for a, b in zip(child["timesteps"], parent["timesteps"], strict=True)]
    assert max(moves) == 20
    assert len(set(moves)) > 15
    assert list(method.around(2.5, 2, SPACE)) == [1, 2, 3, 4]
    assert method.around(2, 10, SPACE)[0] == SPACE.points[0]
    assert method.around(SPACE.points[-1], 10, SPACE)[-1] == SPACE.points[-1]


@pytest.mark.parametrize("radius", [None, 5])
def test_with_a_radius_the_first_generation_is_near_the_uniform_one(radius):
    searcher = AutoDiffusionSearcher(radius=radius, first_mutation=0.9)
    searcher.space = SPACE
    rng = random.Random(0)
    genomes = [genome for n in range(1, 10) if (genome := searcher.first(rng, n, 10))]
    moves = [abs(a - b) for genome in genomes for a, b in zip(genome["timesteps"], SPACE.start, strict=True)]
    assert (max(moves) <= 5) is (radius == 5)
    assert max(moves) > 0


def test_the_share_of_skipped_layers_rises_after_the_time_steps_have_settled():
    got = [method.skip_ratio(epoch, 0.1) for epoch in range(12)]
    assert got == pytest.approx([0] * 5 + [0.02, 0.04, 0.06, 0.08, 0.1, 0.1, 0.1])


# the search --------------------------------------------------------------------------------------------------------------------------


def mixture_solver():
    """DDIM on the exact score of a two-dimensional Gaussian mixture, from fixed noises; returns x_0 of the given time steps."""
    means = torch.tensor([[2.0, 0.5], [-1.0, 2.0], [0.0, -2.0]], dtype=torch.float64)
    spread, weights = 0.15, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    beta = torch.linspace(0.00085**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - beta, 0)
    noise = torch.randn(256, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def eps(x, a):
        variance = a * spread**2 + 1 - a
        offsets = x[:, None] - a.sqrt() * means
        share = (weights.log() - offsets.square().sum(-1) / (2 * variance)).softmax(1)
        return (1 - a).sqrt() * (share[..., None] * offsets).sum(1) / variance

    def solve(timesteps):
        x = noise
        for t, after in zip(timesteps, [*timesteps[1:], None], strict=True):
            a, b = abar[int(t)], torch.ones((), dtype=torch.float64) if after is None else abar[int(after)]
            e = eps(x, a)
            x = b.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e
        return x

    return solve


def test_on_a_gaussian_mixture_the_found_schedule_beats_the_uniform_one():
    solve = mixture_solver()
    reference = solve(range(999, 0, -2))

    def error(genome):
        return float((solve(genome["timesteps"]) - reference).square().mean())

    for seed in range(3):
        searcher = AutoDiffusionSearcher()
        searcher.space = Space((751, 501, 251, 1), range(1000))
        found = evolve(searcher, error, Plan.of(20, epochs=6, seed=seed))
        assert found.start == error({"timesteps": [751, 501, 251, 1]})
        assert found.loss == error(found.best) <= found.start  # never worse: the uniform schedule is in the first generation
        assert found.loss < 0.75 * found.start
        assert [len(found.best["timesteps"]), found.best["skips"]] == [4, [[]] * 4]


def sized(pipe, steps=2) -> CallSettings:
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return CallSettings(steps=steps, guidance_scale=2.0, height=side, width=side)


SAMPLES = [Sample(seed=3, prompt="a red apple")]
KNOBS = {"max_skip": 0.4, "begin_skip": 0}


def found_on(pipe, path, seed=0, **more):
    plan = Plan.of(3, mutations=1, crossovers=1, epochs=3, seed=seed)
    return search(pipe, AutoDiffusion(), SAMPLES, sized(pipe), path, more.pop("fitness", TrajectoryFitness(4)), plan=plan, knobs=KNOBS)


def test_a_search_repeats_itself_and_can_be_interrupted_anywhere(tmp_path):
    pipe, _ = tiny()
    whole = found_on(pipe, tmp_path / "whole.json")
    assert whole.facts["fitness"]["loss"] <= whole.facts["fitness"]["loss_of_start"]
    assert found_on(pipe, tmp_path / "again.json").facts == whole.facts
    assert found_on(pipe, tmp_path / "other.json", seed=1).facts["history"] != whole.facts["history"]

    class Stop(BaseException):
        pass

    class Stopping(TrajectoryFitness):
        left = 0

        def loss(self, outputs, prompts):
            self.left -= 1
            if self.left < 0:
                raise Stop
            return super().loss(outputs, prompts)

    path, attempts = tmp_path / "broken.json", 0
    while True:
        fitness = Stopping(4)
        fitness.left = attempts % 3
        attempts += 1
        try:
            found_on(pipe, path, fitness=fitness)
            break
        except Stop:
            assert not hasattr(pipe, "plugins")
            fitness.left = 99
    assert attempts > 3
    assert path.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_what_was_found_is_what_runs(tmp_path):
    pipe, kwargs = tiny()
    kwargs |= {"guidance_scale": 2.0}
    path = tmp_path / "found.json"
    genome = found_on(pipe, path).genome
    K = len(genome["timesteps"])
    direct = latents(attached(pipe, timesteps=genome["timesteps"], skips=genome["skips"]), kwargs, K)
    pipe.plugins.configure("autodiffusion", timesteps=None, skips=None, artefact=path)
    assert torch.equal(latents(pipe, kwargs, K), direct)
    pipe.plugins.configure("autodiffusion", parts="timesteps")
    latents(pipe, kwargs, K)
    assert pipe.plugins.report().plugins["autodiffusion"].total("skipped") == 0
    pipe.plugins.configure("autodiffusion", parts="all")
    with pytest.raises(ArtefactMismatch, match=r"guidance scale: made for 2.0, found 7.5"):
        latents(pipe, {**kwargs, "guidance_scale": 7.5}, K)
    with pytest.raises(ArtefactMismatch, match=rf"artefact is for {K} steps, and this call makes 9.*steps={K}, or make one with"):
        latents(pipe, kwargs, 9)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ArtefactMismatch, match="scheduler: made for"):
        latents(pipe, kwargs, K)
    pipe.plugins.clear()
    assert torch.isfinite(latents(pipe, kwargs, K)).all()


def test_a_budget_of_layers_is_kept_and_buys_steps(tmp_path):
    pipe, _ = tiny()
    L = len(layers_of(pipe))
    plan = Plan.of(6, epochs=2, seed=0)
    knobs = {"max_skip": 0.6, "begin_skip": 0}
    made = search(pipe, AutoDiffusion(), SAMPLES, sized(pipe), tmp_path / "a.json", TrajectoryFitness(4), plan=plan, knobs=knobs)
    assert made.made_for.steps == len(made.genome["timesteps"])
    assert sum(L - len(names) for names in made.genome["skips"]) <= 2 * L
    with pytest.raises(ConfigError, match="max_layers = 3: the start itself executes"):
        search(pipe, AutoDiffusion(), SAMPLES, sized(pipe), tmp_path / "b.json", TrajectoryFitness(4), knobs={"max_layers": 3})


def test_the_end_can_be_searched_where_the_scheduler_has_sigmas(tmp_path):
    pipe, kwargs = tiny(scheduler="DPMSolverMultistepScheduler")
    plan = Plan.of(4, epochs=2, seed=0)
    made = search(pipe, AutoDiffusion(), SAMPLES, sized(pipe), tmp_path / "a.json", TrajectoryFitness(4), plan=plan, knobs={"end": True})
    assert made.genome["end"] < made.genome["timesteps"][-1]
    latents(attached(pipe, artefact=made), {**kwargs, "guidance_scale": 2.0}, 2)
    pipe, _ = tiny(scheduler="DDIMScheduler")
    with pytest.raises(ConfigError, match="end = True: DDIMScheduler ends at the clean sample"):
        search(pipe, AutoDiffusion(), SAMPLES, sized(pipe), tmp_path / "b.json", TrajectoryFitness(4), knobs={"end": True})


def test_the_command(tmp_path):
    pipe, _ = tiny()
    pipe.save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("a red apple\na green tree\n")
    done = CliRunner().invoke(
        app,
        [
            *("evolve", "autodiffusion", "--pipeline", str(tmp_path / "pipe"), "--prompts", str(tmp_path / "prompts.txt"), "--steps", "3"),
            *("--population", "3", "--epochs", "2", "--guidance-scale", "2", "--set", "mutation=0.5", "--reference-steps", "5"),
            *("--out", str(tmp_path / "found.json"), "--device", "cpu"),
        ],
    )
    assert done.exit_code == 0, done.output
    assert "6 candidates: loss (trajectory)" in done.output
    made = Finding.load(tmp_path / "found.json", "autodiffusion")
    assert made.facts["searcher"]["mutation"] == 0.5
    assert len(made.genome["timesteps"]) == made.made_for.steps == 3


def test_the_command_for_a_pipeline_without_prompts(tmp_path):
    pipe, _ = tiny("DDPMPipeline")
    pipe.save_pretrained(tmp_path / "pipe")
    words = ("evolve", "autodiffusion", "--pipeline", str(tmp_path / "pipe"), "--steps", "3", "--population", "2", "--epochs", "1")
    words = (*words, "--samples", "2", "--reference-steps", "4", "--out", str(tmp_path / "found.json"), "--device", "cpu")
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert Finding.load(tmp_path / "found.json", "autodiffusion").facts["prompts"]["number"] == 2


# bad input ---------------------------------------------------------------------------------------------------------------------------

BAD = [
    ({"timesteps": (1, 500)}, "each must be smaller"),
    ({"timesteps": (500, 500, 1)}, "none twice"),
    ({"timesteps": ()}, "timesteps"),
    ({"timesteps": (500, float("nan"))}, "timesteps"),
    ({"timesteps": (500, 20), "end": 20}, "end = 20"),
    ({"end": 20}, "goes with timesteps"),
    ({"timesteps": (500, 20), "skips": ((),)}, "1 lists for 2 timesteps"),
    ({"preset": "sd14_dpm_4", "skips": ((),) * 3}, "3 lists for 4"),
    ({"skips": ((1, 1),)}, "none twice in a step"),
    ({"skips": ((-1,),)}, "numbers from 0"),
    ({"preset": "sd15"}, "preset"),
    ({"timesteps": (5,), "preset": "adm64_6"}, "exclude each other"),
    ({"artefact": "a.json", "skips": ((),)}, "exclude each other"),
    ({"parts": "some"}, "parts"),
]


@pytest.mark.parametrize(("knobs", "why"), BAD)
def test_bad_knobs_are_refused_before_anything_is_loaded(knobs, why):
    with pytest.raises(ConfigError, match=why):
        load_pipeline("no-such-pipeline", plugins=[("autodiffusion", knobs)])


def test_what_does_not_fit_the_pipeline_is_refused_and_leaves_it_alone(tmp_path):
    pipe, kwargs = tiny()
    for knobs, why in [
        ({"timesteps": (1000, 3)}, r"\[1000.0\] outside the model's 0 to 999"),
        ({"skips": (("down_blocks.0.resnets.7",),)}, "did you mean 'down_blocks.0.resnets"),
        ({"skips": (("down_blocks.0",),)}, "no layer that can be left out"),
        ({"skips": ((400,),)}, "400 is no layer.*There are"),
        ({"artefact": tmp_path / "none.json"}, "make one with `diffgraft evolve autodiffusion"),
    ]:
        with pytest.raises(ConfigError, match=why):
            attached(pipe, **knobs)
        assert not hasattr(pipe, "plugins")
    flux, _ = tiny("FluxPipeline")
    with pytest.raises(ConfigError, match=r"\[0.0\] outside"):
        attached(flux, timesteps=(500, 0))
    attached(pipe, timesteps=(900, 500.5, 20, 3))
    with pytest.raises(ConfigError, match="timesteps is for 4 steps, and this call makes 5: call it with num_inference_steps=4"):
        latents(pipe, kwargs, 5)
    with pytest.raises(Unsupported, match="moves between whole training timesteps"):
        latents(pipe, kwargs)
    pipe.plugins.configure("autodiffusion", timesteps=(900, 500, 20, 3))
    assert torch.isfinite(latents(pipe, kwargs)).all()
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(Unsupported, match="HeunDiscreteScheduler: its steps are not one denoiser call each"):
        latents(pipe, kwargs)


@pytest.mark.parametrize("name", ["PNDMScheduler", "KDPM2DiscreteScheduler", "DPMSolverSinglestepScheduler", "EDMEulerScheduler"])
def test_schedulers_that_cannot_do_it_are_refused(name):
    pipe, _ = tiny(scheduler=name)
    with pytest.raises(Unsupported, match=rf"{name}.*use DDIM"):
        attached(pipe, timesteps=(900, 500, 20, 3))
    assert not hasattr(pipe, "plugins")


def test_a_fitness_that_is_no_number_is_refused_and_the_pipeline_stays_usable(tmp_path):
    pipe, kwargs = tiny()
    before = latents(pipe, kwargs)
    with pytest.raises(Exception, match=r"gave nan for picture 0 .'a red apple'.: it must give finite numbers"):
        found_on(pipe, tmp_path / "a.json", fitness=RewardFitness(lambda images, prompts: [float("nan")] * len(images)))
    assert not hasattr(pipe, "plugins")
    assert torch.equal(latents(pipe, kwargs), before)


def test_the_callers_own_schedule_is_not_overridden_without_a_word():
    pipe, kwargs = tiny(scheduler="EulerDiscreteScheduler")
    attached(pipe, timesteps=(900, 500, 100))
    for name, value in (("timesteps", [800, 400, 50]), ("sigmas", [10.0, 2.0, 0.5, 0.0])):
        with pytest.raises(ConfigError, match=f"the call gives {name} = .*leave one of them out"):
            latents(pipe, kwargs, 3, **{name: value})
    pipe, kwargs = tiny("StableDiffusionXLPipeline", "EulerDiscreteScheduler")
    attached(pipe, timesteps=(900, 500, 100))
    latents(pipe, kwargs, 3, denoising_end=0.6)
    assert "denoising_end = 0.6 cuts the plugin's time steps" in pipe.plugins.report().plugins["autodiffusion"].notes[0]


@pytest.mark.filterwarnings("error::UserWarning")
def test_time_steps_alone_are_not_called_inactive():
    pipe, kwargs = tiny()
    latents(attached(pipe, timesteps=(800, 500, 200)), kwargs, 3)
    assert not any("inactive" in note for note in pipe.plugins.report().plugins["autodiffusion"].notes)


@pytest.mark.parametrize("solver", ["bdia", "dpm_solver_v3"])
def test_a_solver_in_the_schedulers_place_walks_along_the_found_steps(solver):
    pipe, kwargs = tiny()
    load_pipeline(pipe, plugins=[AutoDiffusion(timesteps=(900, 500, 100)), solver])
    told = []
    latents(pipe, kwargs, 3, callback_on_step_end=lambda pipe, i, t, kwargs: told.append(float(t)) or {})
    assert told == pytest.approx([900, 500, 100], abs=8)
