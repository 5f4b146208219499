"""AccVideo: key points and their levels, the jump, collection, fit, the few-step run, published LoRA, refusals, and the contract."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, Unsupported, load_pipeline, unload
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.calibration import calibrate
from diffgraft.methods.examples import Example
from diffgraft.methods.fitting import FitPlan, fit
from diffgraft.methods.inputs import CallSettings, make_samples
from diffgraft.testing import Case, contract_sample
from diffgraft_accvideo import AccVideo, __version__
from diffgraft_accvideo.collection import HOLDS
from diffgraft_accvideo.method import jump, key_points, linear, trajectory_loss, union
from diffgraft_pipelines.tiny import make
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file, save_file

CASES = contract_sample("accvideo", __version__)
"""Each check once and each family once; which meet changes with the version. All of them: ``diffgraft check``, or ``contract_cases``."""
PROMPTS = ["a red apple", "two green dogs"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case) -> None:
    case.run()


# helpers ------------------------------------------------------------------------------------------------------------------------------


def euler(shift: float = 3.0, **config) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=shift, **config)


def unipc(shift: float = 3.0, **config) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, **config)


def tiny(name: str = "WanPipeline", scheduler=None):
    made = make(name)
    made.pipe.scheduler = scheduler or euler()
    made.pipe.set_progress_bar_config(disable=True)
    return made


def run(made, knobs=None, seed=0, **call):
    """(latents, report, sigmas) of a call without guidance or steps of its own; nothing is left on the pipeline."""
    arguments = {key: value for key, value in made.kwargs.items() if key not in ("guidance_scale", "num_inference_steps")}
    load_pipeline(made.pipe, plugins=[] if knobs is None else [AccVideo(**knobs)])
    try:
        arguments = {**arguments, "generator": torch.Generator().manual_seed(seed), "output_type": "latent", **call}
        return made.pipe(**arguments)[0], made.pipe.plugins.report(), made.pipe.scheduler.sigmas.clone()
    finally:
        unload(made.pipe)


def collected(made, out, prompts=PROMPTS, steps=10, points=(5,), **extra):
    call = {key: made.kwargs[key] for key in ("max_sequence_length", "num_frames") if key in made.kwargs} | extra
    settings = CallSettings(steps=steps, guidance_scale=2.0, height=made.kwargs["height"], width=made.kwargs["width"], extra=call)
    return calibrate(made.pipe, AccVideo(points=points), make_samples(made.pipe, range(len(prompts)), prompts), settings, out)


def fitted(made, out, trajectories, steps=5, plan=None, prompts=PROMPTS, **knobs):
    call = {key: made.kwargs[key] for key in ("max_sequence_length", "num_frames") if key in made.kwargs}
    settings = CallSettings(steps=steps, height=made.kwargs["height"], width=made.kwargs["width"], extra=call)
    plugin = AccVideo(**{"steps": steps, "grid": 10, "trajectories": trajectories, **knobs})
    return fit(made.pipe, plugin, [Example(each) for each in prompts], settings, out, plan or FitPlan(steps=3, batch=2), knobs={"rank": 4})


def as_published(model, rank=2, without=(), seed=0) -> dict[str, torch.Tensor]:
    """Random numbers under the names of the extracted LoRA that circulates for Wan: low-rank parts and differences of the biases."""
    draw, state = torch.Generator().manual_seed(seed), {}
    layers = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
    names = {f"attn{n}.{ours}": f"{kind}_attn.{theirs}" for n, kind in ((1, "self"), (2, "cross")) for ours, theirs in layers.items()}
    names |= {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}
    places = [(f"blocks.{i}.{ours}", f"blocks.{i}.{theirs}") for i in range(len(model.blocks)) for ours, theirs in names.items()]
    places += [(f"condition_embedder.{what}_embedder.linear_{n}", f"{what}_embedding.{k}")
               for what in ("text", "time") for n, k in ((1, 0), (2, 2))]  # fmt: skip
    for ours, theirs in [*places, ("proj_out", "head.head")]:
        out, width = model.get_submodule(ours).weight.flatten(1).shape
        parts = {"lora_down.weight": (rank, width), "lora_up.weight": (out, rank), "diff_b": (out,)}
        for part, shape in parts.items():
            if (theirs.split(".", 2)[-1], part) not in without:
                state[f"diffusion_model.{theirs}.{part}"] = 0.2 * torch.randn(shape, generator=draw)
    width = model.config.num_attention_heads * model.config.attention_head_dim
    for i in range(len(model.blocks)):  # zeros, which diffusers leaves out, as it does the last
        state |= {f"diffusion_model.blocks.{i}.norm3.{part}": torch.zeros(width) for part in ("diff", "diff_b")}
    return {**state, "diffusion_model.time_projection.1.diff_b": torch.randn(6 * width, generator=draw)}


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory) -> Artefact:
    return collected(tiny(), tmp_path_factory.mktemp("trajectories") / "t.safetensors", points=(2, 5, 10), num_videos_per_prompt=2)


@pytest.fixture(scope="module")
def lora(tmp_path_factory, trajectories):
    out = tmp_path_factory.mktemp("lora") / "l.safetensors"
    fitted(tiny(), out, trajectories, plan=FitPlan(steps=4, batch=4))
    return out


# key points and levels ----------------------------------------------------------------------------------------------------------------


def test_key_points_are_every_k_over_nth():
    assert key_points(50, 10) == list(range(0, 51, 5))
    assert key_points(50, 5) == list(range(0, 51, 10))
    assert key_points(50, 4) == [0, 12, 25, 37, 50]
    assert key_points(7, 7) == list(range(8))
    assert union(10, [5, 2]) == [0, 2, 4, 5, 6, 8, 10]
    for n in range(1, 51):
        found = key_points(50, n)
        assert len(found) == n + 1
        assert found[0] == 0
        assert found[-1] == 50
        assert all(a < b for a, b in pairwise(found))
    for wrong in (0, 51):
        with pytest.raises(ValueError, match="of 50"):
            key_points(50, wrong)


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("n", [5, 10])
def test_where_n_divides_k_the_levels_are_those_of_n_steps(shift, n):
    """P10: of UniPC's flow levels bit for bit, of FlowMatchEuler's where it is told the line; not where it is told the number."""
    index = key_points(50, n)
    both = [unipc(shift), unipc(shift)]
    both[0].set_timesteps(50)
    both[1].set_timesteps(n)
    assert torch.equal(both[0].sigmas[index], both[1].sigmas)
    whole, native, counted = euler(shift), euler(shift), euler(shift)
    whole.set_timesteps(sigmas=linear(50).tolist())
    native.set_timesteps(sigmas=[1 - i / n for i in range(n)])
    counted.set_timesteps(50)
    torch.testing.assert_close(whole.sigmas[index], native.sigmas, rtol=0, atol=1e-7)
    assert float((counted.sigmas[index] - native.sigmas).abs().max()) > 2e-3


@pytest.mark.parametrize("n", [4, 5, 10])
def test_a_run_goes_along_these_levels(n):
    s = torch.tensor([1 - t / 50 for t in key_points(50, n)])
    _, _, sigmas = run(tiny(), {"steps": n})
    torch.testing.assert_close(sigmas, 3 * s / (1 + 2 * s), rtol=0, atol=1e-6)
    _, _, sigmas = run(tiny(), {"steps": n, "shift": 7.0})
    torch.testing.assert_close(sigmas, 7 * s / (1 + 6 * s), rtol=0, atol=1e-6)
    moved = tiny()
    moved.pipe.scheduler.set_shift(5.0)
    torch.testing.assert_close(run(moved, {"steps": n})[2], 5 * s / (1 + 4 * s), rtol=0, atol=1e-6)


def test_unipc_and_dpm_have_their_own_line():
    native = unipc(5.0)
    native.set_timesteps(10)
    assert torch.equal(run(tiny(scheduler=unipc(3.0)), {"steps": 10, "shift": 5.0})[2], native.sigmas)
    dpm = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    _, report, sigmas = run(tiny(scheduler=dpm), {"steps": 5})
    assert len(sigmas) == 6
    assert sum(report.forwards.values()) == 5


def test_the_official_scripts_euler_levels_are_an_option():
    """It has the scheduler make 50 levels of the number 50, and takes every fifth."""
    official = euler(5.0)
    official.set_timesteps(50)
    found = run(tiny(scheduler=euler(5.0)), {"steps": 10, "levels": "official"})[2]
    assert torch.equal(found, official.sigmas[torch.arange(0, 51, 5)])
    assert float(found[1]) == pytest.approx(0.9779, abs=5e-5), "not 0.9783, the second of ten on the line, nor 0.9757, of the number 10"
    _, report, sigmas = run(tiny(scheduler=unipc(5.0)), {"steps": 10, "levels": "official"})
    assert torch.equal(sigmas, run(tiny(scheduler=unipc(5.0)), {"steps": 10})[2])
    assert "levels = 'official' changes nothing: UniPC" in str(report)


def test_the_schedulers_config_stays_as_it_was():
    made = tiny()
    before = dict(made.pipe.scheduler.config)
    run(made, {"steps": 5, "shift": 7.0})
    assert dict(made.pipe.scheduler.config) == before
    assert made.pipe.scheduler.shift == 3.0
    plain = run(made, None, num_inference_steps=4)[0]
    assert torch.equal(plain, run(tiny(), None, num_inference_steps=4)[0])


def test_a_shift_that_would_do_nothing_is_refused():
    """A scheduler that shifts by the size of the video takes no number."""
    made = make("LTXPipeline")
    assert made.pipe.scheduler.config.use_dynamic_shifting
    with pytest.raises(Unsupported, match=r"shift = 3, .*use_dynamic_shifting.*leave shift out"):
        run(made, {"steps": 5, "shift": 3.0})
    made.pipe.scheduler = euler(5.0)
    _, _, sigmas = run(made, {"steps": 5, "shift": 3.0})
    s = 1 - torch.arange(6) / 5
    torch.testing.assert_close(sigmas, 3 * s / (1 + 2 * s), rtol=0, atol=1e-6)


def test_schedulers_that_end_above_nothing_or_draw_noise_are_refused_before_the_denoiser():
    asked, flow = [], {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    for scheduler, match in (
        (unipc(final_sigmas_type="sigma_min"), "final_sigmas_type = 'zero'"),
        (DPMSolverMultistepScheduler(**flow, final_sigmas_type="sigma_min"), "final_sigmas_type = 'zero'"),
        (DPMSolverMultistepScheduler(**flow, algorithm_type="sde-dpmsolver++"), "algorithm_type = 'dpmsolver[+][+]'"),
        (SASolverScheduler(**flow), r"SASolverScheduler ends at the level 0\.0"),
    ):
        made = tiny(scheduler=scheduler)
        made.pipe.transformer.register_forward_pre_hook(lambda *_: asked.append(1))
        with pytest.raises(Unsupported, match=match):
            run(made, {"steps": 5})
    assert not asked


@pytest.mark.parametrize("n", [4, 5, 10])
@pytest.mark.parametrize("several", [False, True])
def test_a_run_is_the_loop_that_anybody_writes(n, several, lora):
    """Euler's steps in a few lines, without diffgraft: the levels in closed form, the LoRA merged into the weights."""
    made, said = tiny(scheduler=euler(5.0)), PROMPTS if several else PROMPTS[0]
    rows = 4 if several else 1
    x = torch.randn(rows, *run(tiny(), {"steps": 1})[0].shape[1:], generator=torch.Generator().manual_seed(7))
    call = {"prompt": said, "negative_prompt": None, "num_videos_per_prompt": 2 if several else 1, "latents": x}
    found = run(made, {"steps": n, "lora": lora, "strength": 0.5}, **call)[0]
    state = load_file(lora)
    for name in (key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")):
        weight = made.pipe.transformer.get_submodule(name.removeprefix("transformer.")).weight
        weight.data += 0.5 * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
    s = [1 - math.ceil(i * 50 / n - 0.5) / 50 for i in range(n + 1)]
    s = [5 * each / (1 + 4 * each) for each in s]
    text = made.pipe.encode_prompt(said, None, False, call["num_videos_per_prompt"], max_sequence_length=32)[0]
    with torch.no_grad():
        for here, there in pairwise(s):
            t = torch.full((rows,), 1000 * here)
            x = x + (there - here) * made.pipe.transformer(x, t, text, return_dict=False)[0]
    torch.testing.assert_close(found, x, rtol=0, atol=2e-5)


# the jump -----------------------------------------------------------------------------------------------------------------------------


def test_a_student_that_jumps_exactly_has_no_loss_on_a_gaussians_trajectories():
    """Data N(m, r^2): the flow's ODE keeps z in x = (1 - s) m + sqrt((1 - s)^2 r^2 + s^2) z, so both jump and velocity are known."""
    m, r = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    z = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def deviation(s):
        return ((1 - s) ** 2 * r**2 + s**2).sqrt()

    def at(s):
        return (1 - s) * m + deviation(s) * z

    def velocity(x, s):
        return -m + (s - (1 - s) * r**2) / deviation(s) ** 2 * (x - (1 - s) * m)

    levels = torch.cat([linear(50), torch.zeros(1, dtype=torch.float64)])
    for n in (5, 10):
        exact = euler_error = 0.0
        for a, b in pairwise(levels[key_points(50, n)]):
            here, there = torch.full((64,), float(a)), torch.full((64,), float(b))
            slope = (at(b) - at(a)) / (b - a)
            exact = max(exact, float(trajectory_loss(jump(at(a), slope, here, there), at(b)).max()))
            euler_error = max(euler_error, float(trajectory_loss(jump(at(a), velocity(at(a), a), here, there), at(b)).max()))
        assert exact < 1e-12
        assert euler_error > 1e-4, "the base model's own velocity is no jump: there is something to learn"


def test_the_loss_is_the_mean_square_of_each_sample():
    x, v, wanted = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    here, there = torch.tensor([1.0, 0.8, 0.5]), torch.tensor([0.8, 0.5, 0.0])
    for i in range(3):
        found = trajectory_loss(jump(x, v, here, there), wanted)[i]
        torch.testing.assert_close(found, ((x[i] + (there[i] - here[i]) * v[i] - wanted[i]) ** 2).mean())


# collection ---------------------------------------------------------------------------------------------------------------------------


def test_what_is_kept_are_the_states_of_the_teachers_own_run(trajectories):
    points, facts = trajectories.tensors["points"], trajectories.facts
    assert facts["index"] == list(range(11))
    assert facts["texts"] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert facts["guidance"] == 2.0
    assert HOLDS.fault(trajectories.tensors, facts) is None
    s = torch.cat([linear(10), torch.zeros(1, dtype=torch.float64)])
    torch.testing.assert_close(trajectories.tensors["sigmas"], 3 * s / (1 + 2 * s), rtol=0, atol=1e-6)
    made, seen = tiny(), []
    kwargs = {**made.kwargs, "prompt": PROMPTS[1], "negative_prompt": None, "guidance_scale": 2.0, "num_videos_per_prompt": 2}
    load_pipeline(made.pipe, plugins=[AccVideo(steps=10, grid=10, guidance="keep")])
    kept = lambda pipe, i, t, tensors: seen.append(tensors["latents"]) or tensors  # noqa: E731
    made.pipe(**{**kwargs, "generator": torch.Generator().manual_seed(1), "output_type": "latent", "num_inference_steps": 10},
              callback_on_step_end=kept)  # fmt: skip
    assert torch.equal(points[2:, 1:], torch.stack(seen, 1))
    noise = torch.randn(points[2:, 0].shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(points[2:, 0], noise)


def test_only_the_key_points_are_kept(tmp_path, trajectories):
    few = collected(tiny(), tmp_path / "t.safetensors", points=(2,), num_videos_per_prompt=2)
    assert few.facts["index"] == [0, 5, 10]
    assert torch.equal(few.tensors["points"], trajectories.tensors["points"][:, [0, 5, 10]])


def test_an_interrupted_collection_goes_on(tmp_path):
    class Enough(Exception):
        pass

    def stop(what, done, of):
        if done == 1:
            raise Enough

    made, out = tiny(), tmp_path / "t.safetensors"
    settings = CallSettings(steps=4, height=32, width=32, extra={"max_sequence_length": 32, "num_frames": 5})
    samples = make_samples(made.pipe, [0, 1], PROMPTS)
    with pytest.raises(Enough):
        calibrate(made.pipe, AccVideo(points=(2,)), samples, settings, out, on_progress=stop)
    again = calibrate(made.pipe, AccVideo(points=(2,)), samples, settings, out)
    whole = calibrate(tiny().pipe, AccVideo(points=(2,)), samples, settings, tmp_path / "whole.safetensors")
    assert torch.equal(again.tensors["points"], whole.tensors["points"])
    assert again.facts == whole.facts


def test_what_cannot_teach_is_refused(tmp_path):
    with pytest.raises(Unsupported, match="makes Euler's steps, and UniPC"):
        collected(tiny(scheduler=unipc()), tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"points = 20 of a trajectory of 10 steps"):
        collected(tiny(), tmp_path / "b.safetensors", points=(20,))
    image = make("WanImageToVideoPipeline")
    image.pipe.scheduler = euler()
    with pytest.raises(Unsupported, match="told a picture too"):
        load_pipeline(image.pipe, plugins=[AccVideo.calibration()])
    two = make("WanPipeline@2.2")
    two.pipe.scheduler = euler()
    with pytest.raises(Unsupported, match="two denoisers"):
        load_pipeline(two.pipe, plugins=[AccVideo.calibration()])


# the fit ------------------------------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_fit_is_the_jump_of_the_base_by_hand(tmp_path):
    """One trajectory and one jump: the first loss is known by hand, with a plain call of the denoiser."""
    made = tiny()
    held = collected(made, tmp_path / "t.safetensors", PROMPTS[:1], points=(1,))
    found = fitted(made, tmp_path / "l.safetensors", held, steps=1, plan=FitPlan(steps=1, batch=1), prompts=PROMPTS[:1])
    start, end = held.tensors["points"][0]
    text = made.pipe.encode_prompt(PROMPTS[0], None, False, 1, max_sequence_length=32)[0]
    with torch.no_grad():
        v = made.pipe.transformer(start[None], torch.tensor([1000.0]), text, return_dict=False)[0][0]
    assert found.facts["fit"]["losses"][0] == pytest.approx(float((start - v - end).square().mean()), rel=1e-5)


def test_a_fit_brings_the_student_nearer_to_its_teachers_end(tmp_path, trajectories):
    made = tiny()
    out = tmp_path / "l.safetensors"
    found = fitted(made, out, trajectories, steps=2, plan=FitPlan(steps=120, batch=8))
    losses = found.facts["fit"]["losses"]
    assert losses[-1] < losses[0]
    far = []
    for knobs in ({"strength": 0.0}, {}):
        call = {"negative_prompt": None, "num_videos_per_prompt": 2}
        student = {"steps": 2, "grid": 10, "lora": out, **knobs}
        ends = [run(made, student, seed=i, prompt=prompt, **call)[0] for i, prompt in enumerate(PROMPTS)]
        far.append(float((torch.cat(ends) - trajectories.tensors["points"][:, -1]).square().mean()))
    assert far[1] < 0.9 * far[0]


def test_a_fit_that_was_interrupted_ends_where_an_uninterrupted_one_does(tmp_path, trajectories):
    class Enough(Exception):
        pass

    def stop(what, done, of):
        if done == 2:
            raise Enough

    settings = CallSettings(steps=5, height=32, width=32, extra={"max_sequence_length": 32, "num_frames": 5})
    plan, examples = FitPlan(steps=4, batch=2, keep_every=0), [Example(each) for each in PROMPTS]
    plugin, knobs = AccVideo(steps=5, grid=10, trajectories=trajectories), {"rank": 2}
    with pytest.raises(Enough):
        fit(tiny().pipe, plugin, examples, settings, tmp_path / "a.safetensors", plan, knobs=knobs, on_progress=stop)
    for name in "ab":
        fit(tiny().pipe, plugin, examples, settings, tmp_path / f"{name}.safetensors", plan, knobs=knobs)
    a, b = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_trajectories_of_something_else_are_refused_before_anything_is_learned(tmp_path, trajectories):
    out = tmp_path / "l.safetensors"

    def refused(kind, match, made=None, **knobs):
        with pytest.raises(kind, match=match):
            fitted(made or tiny(), out, **{"trajectories": trajectories, **knobs})
        assert not out.exists()

    refused(ConfigError, "calibrate accvideo", trajectories=None)
    refused(ConfigError, "there is no such file", trajectories=tmp_path / "none.safetensors")
    refused(ArtefactMismatch, r"scheduler.shift: made for 3.0, found 5.0", tiny(scheduler=euler(5.0)))
    refused(Unsupported, "makes Euler's steps", tiny(scheduler=unipc()))
    refused(ArtefactMismatch, r"of 10 steps, and grid = 50", grid=50)
    refused(ArtefactMismatch, r"3 steps need 3 too", trajectories=without(trajectories, 3), steps=3)
    refused(ArtefactMismatch, "would be at other levels", shift=5.0)
    refused(ArtefactMismatch, "would be at other levels", levels="official")
    refused(ConfigError, "steps = 0", steps=0)
    refused(ConfigError, "none of 'a blue moon'", prompts=["a blue moon"])
    other = tiny()
    with torch.no_grad():
        other.pipe.transformer.proj_out.weight.add_(1.0)
        for parameter in other.pipe.transformer.parameters():
            parameter.mul_(1.5)
    refused(ArtefactMismatch, "with other weights", other)


def test_a_fit_and_a_collection_refuse_what_they_would_not_use(tmp_path, trajectories):
    def refused(match, settings=None, **knobs):
        plugin = AccVideo(**{"steps": 5, "grid": 10, "trajectories": trajectories, **knobs})
        call = CallSettings(height=32, width=32, extra={"max_sequence_length": 32, "num_frames": 5}, **(settings or {}))
        with pytest.raises(ConfigError, match=match):
            fit(tiny().pipe, plugin, [Example(PROMPTS[0])], call, tmp_path / "l.safetensors", FitPlan(steps=1, batch=1))
        assert not list(tmp_path.iterdir())

    refused(r"lora = .*a fit begins anew.*leave lora out", lora="student.safetensors")
    refused(r"strength = 0.5 is for a run", strength=0.5)
    refused(r"guidance = 'keep' is for a run", guidance="keep")
    refused(r"--inference-steps 10, and steps = 5", {"steps": 10})
    refused(r"--guidance-scale 3.0: .*leave --guidance-scale out", {"guidance_scale": 3.0})
    refused(r"--negative-prompt 'blurry'", {"negative_prompt": "blurry"})
    for knobs, match in (
        ({"lora": "x.safetensors"}, "the teacher is the pipeline as it is"),
        ({"grid": 20}, "grid = 20, and this trajectory has 10"),
    ):
        plugin = AccVideo(points=(5,), steps=5, **knobs)
        call = CallSettings(steps=10, height=32, width=32, extra={"max_sequence_length": 32, "num_frames": 5})
        made = tiny()
        with pytest.raises(ConfigError, match=match):
            calibrate(made.pipe, plugin, make_samples(made.pipe, range(1), PROMPTS[:1]), call, tmp_path / "t.safetensors")
        assert not (tmp_path / "t.safetensors").exists()


def test_a_fitted_student_is_for_calls_of_its_own_steps(tmp_path, trajectories):
    plugin = AccVideo(steps=5, grid=10, trajectories=trajectories)
    call = CallSettings(height=32, width=32, extra={"max_sequence_length": 32, "num_frames": 5})
    found = fit(tiny().pipe, plugin, [Example(PROMPTS[0])], call, tmp_path / "l.safetensors", FitPlan(steps=1, batch=1))
    assert found.made_for.steps == 5


def test_trajectories_of_another_size_are_refused(tmp_path, trajectories):
    made = tiny()
    made.kwargs["width"] *= 2
    with pytest.raises(ArtefactMismatch, match=r"latents of \(8, 2, 4, 4\), and this call \(8, 2, 4, 8\)"):
        fitted(made, tmp_path / "l.safetensors", trajectories)
    assert not (tmp_path / "l.safetensors").exists()


def test_packed_latents_and_a_dynamic_shift_are_learned_from_too(tmp_path):
    """LTX: the pipeline says the shift by the size, and the denoiser is told frames, height and width."""
    made = make("LTXPipeline")
    made.pipe.set_progress_bar_config(disable=True)
    made.kwargs["max_sequence_length"] = 32
    held = collected(made, tmp_path / "t.safetensors")
    fitted(made, tmp_path / "l.safetensors", held)
    latents, report, sigmas = run(made, {"steps": 5, "grid": 10, "lora": tmp_path / "l.safetensors"})
    assert latents.shape[1:] == held.tensors["points"].shape[2:]
    torch.testing.assert_close(sigmas.double(), held.tensors["sigmas"])
    assert sum(report.forwards.values()) == 5


def without(artefact: Artefact, point: int) -> Artefact:
    """The same without a point."""
    kept = [i for i in range(len(artefact.facts["index"])) if i != point]
    tensors = {"points": artefact.tensors["points"][:, kept], "sigmas": artefact.tensors["sigmas"][kept]}
    return Artefact(artefact.made_for, tensors, {**artefact.facts, "index": kept})


@pytest.mark.parametrize("bend", ["texts", "index", "levels"])
def test_a_file_that_does_not_go_together_is_refused(trajectories, bend):
    tensors, facts = dict(trajectories.tensors), dict(trajectories.facts)
    if bend == "texts":
        facts["texts"] = facts["texts"][1:]
    elif bend == "index":
        facts["index"] = facts["index"][::-1]
    else:
        tensors["sigmas"] = tensors["sigmas"].flip(0)
    assert HOLDS.fault(tensors, facts) is not None


# the run ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [5, 10])
def test_it_costs_n_forwards_without_guidance(n, lora):
    """X: the pipeline's own guidance of 5 would cost twice that, silently."""
    _, report, _ = run(tiny(), {"steps": n, "lora": lora})
    assert report.forwards == {"cond": n}
    assert any("guidance is off" in note for note in report.plugins["accvideo"].notes)
    _, report, _ = run(tiny(), {"steps": n, "guidance": "keep"}, guidance_scale=5.0)
    assert report.forwards == {"cond": n, "uncond": n}


def test_a_lora_of_strength_nothing_is_the_base_on_the_same_levels(lora):
    made = tiny()
    base, with_it = run(made, {"steps": 5})[0], run(made, {"steps": 5, "lora": lora})[0]
    assert torch.equal(run(made, {"steps": 5, "lora": lora, "strength": 0.0})[0], base)
    assert not torch.equal(with_it, base)
    plain = run(made, None, num_inference_steps=5)[0]
    assert torch.equal(run(made, {"steps": 0, "lora": lora}, num_inference_steps=5)[0], plain)


def test_strength_is_that_of_diffusers_own(lora):
    made = tiny()
    ours = run(made, {"steps": 5, "lora": lora, "strength": 0.5})[0]
    made.pipe.load_lora_weights(str(lora), adapter_name="user")
    made.pipe.set_adapters(["user"], [0.5])
    torch.testing.assert_close(run(made, {"steps": 5})[0], ours, rtol=0, atol=1e-6)


def test_the_users_own_lora_stays(lora, tmp_path):
    made = tiny()
    save_file(as_published(made.pipe.transformer, seed=3), tmp_path / "own.safetensors")
    alone = run(made, {"steps": 5, "lora": lora})[0]
    made.pipe.load_lora_weights(str(tmp_path / "own.safetensors"), adapter_name="user")
    beside = run(made, {"steps": 5, "lora": lora})[0]
    made.pipe.load_lora_weights(str(lora), adapter_name="student")
    made.pipe.set_adapters(["user", "student"])
    torch.testing.assert_close(beside, run(made, {"steps": 5})[0], rtol=0, atol=1e-5)
    assert not torch.allclose(beside, alone)
    made.pipe.set_adapters(["user"])
    made.pipe.disable_lora()
    torch.testing.assert_close(run(made, {"steps": 5, "lora": lora})[0], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("without", [(), (("ffn.0", "diff_b"),)])
def test_a_published_file_is_what_diffusers_makes_of_it(tmp_path, without):
    made = tiny()
    state = as_published(made.pipe.transformer, without=without)
    save_file(state, tmp_path / "published.safetensors")
    base, ours = (run(made, {"steps": 5, "lora": file})[0] for file in (None, tmp_path / "published.safetensors"))
    assert not torch.allclose(ours, base)
    whole = {**as_published(made.pipe.transformer), **state}
    if without:  # diffusers reads no file in which some layer has no bias: zeros say the same
        whole |= {key: torch.zeros_like(value) for key, value in whole.items() if key not in state}
    save_file(whole, tmp_path / "whole.safetensors")
    made.pipe.load_lora_weights(str(tmp_path / "whole.safetensors"))
    assert torch.equal(run(made, {"steps": 5})[0], ours)


def test_several_prompts_and_videos_and_half_precision(lora):
    made = tiny()
    both = {"prompt": PROMPTS, "negative_prompt": None, "num_videos_per_prompt": 2}
    latents, report, _ = run(made, {"steps": 5, "lora": lora}, **both)
    assert len(latents) == 4
    assert report.forwards == {"cond": 5}
    made.pipe.to(torch.bfloat16)
    latents, _, _ = run(made, {"steps": 5, "lora": lora}, **both)
    assert latents.isfinite().all()


def test_each_of_two_denoisers_has_a_lora_of_its_own(lora):
    made = tiny("WanPipeline@2.2")
    with pytest.raises(Unsupported, match=r"a student replaces transformer_2 too"):
        run(made, {"steps": 5, "lora": lora})
    call = {"guidance_scale_2": None}
    latents, report, _ = run(made, {"steps": 5, "lora": {"transformer": lora, "transformer_2": lora}}, **call)
    assert sum(report.forwards.values()) == 5
    assert not torch.equal(latents, run(made, {"steps": 5}, **call)[0])
    with pytest.raises(ConfigError, match=r"guidance_scale_2 = 3"):
        run(made, {"steps": 5})


# bad input ----------------------------------------------------------------------------------------------------------------------------


def test_bad_calls_are_refused_before_the_denoiser(lora):
    made, asked = tiny(), []
    made.pipe.transformer.register_forward_pre_hook(lambda *_: asked.append(1))
    for match, knobs, call in (
        (r"guidance_scale = 3.*guidance='keep'", {"steps": 5}, {"guidance_scale": 3.0}),
        (r"num_inference_steps = 8, and what was distilled knows 5.*steps=None", {"steps": 5}, {"num_inference_steps": 8}),
        (r"num_inference_steps = 60 of a grid of 50", {"steps": None}, {"num_inference_steps": 60}),
    ):
        with pytest.raises(ConfigError, match=match):
            run(made, {**knobs, "lora": lora}, **call)
    assert not asked
    for call in ({"guidance_scale": 1.0}, {"num_inference_steps": 5}, {"guidance_scale": None}):
        assert sum(run(made, {"steps": 5}, **call)[1].forwards.values()) == 5
    asked.clear()
    for scheduler, match in (
        (FlowMatchHeunDiscreteScheduler(), "FlowMatchHeunDiscreteScheduler does not step along"),
        (euler(use_karras_sigmas=True), "use_karras_sigmas = False"),
        (unipc(use_karras_sigmas=True), "use_karras_sigmas = False"),
    ):
        with pytest.raises(Unsupported, match=match):
            run(tiny(scheduler=scheduler), {"steps": 5})
        changed = tiny()
        load_pipeline(changed.pipe, plugins=[AccVideo(steps=5)])
        changed.pipe.scheduler = scheduler
        changed.pipe.transformer.register_forward_pre_hook(lambda *_: asked.append(1))
        with pytest.raises(Unsupported, match=match):
            changed.pipe(prompt=PROMPTS[0], height=32, width=32, num_frames=5)
    assert not asked


def test_bad_files_and_knobs_are_refused(lora, tmp_path):
    other = make("LTXPipeline")
    with pytest.raises(ArtefactMismatch, match="is no LoRA of this"):
        load_pipeline(other.pipe, plugins=[AccVideo(lora=lora)])
    state = load_file(lora)
    save_file({key: value for key, value in state.items() if "blocks.0" in key} | {
        "transformer.blocks.0.attn1.to_q.lora_B.bias": torch.zeros(7)}, tmp_path / "bent.safetensors")  # fmt: skip
    with pytest.raises(ArtefactMismatch, match="bias has shape"):
        load_pipeline(tiny().pipe, plugins=[AccVideo(lora=tmp_path / "bent.safetensors")])
    with pytest.raises(ConfigError, match="there is no such file"):
        load_pipeline(tiny().pipe, plugins=[AccVideo(lora=tmp_path / "none.safetensors")])
    with pytest.raises(ConfigError, match="names no denoiser"):
        load_pipeline(tiny().pipe, plugins=[AccVideo(lora={})])
    fused = tiny()
    fused.pipe.load_lora_weights(str(lora))
    fused.pipe.fuse_lora()
    with pytest.raises(Unsupported, match="unfuse_lora"):
        load_pipeline(fused.pipe, plugins=[AccVideo(lora=lora)])
    for knobs, match in (({"steps": 60}, "steps = 60 of a grid of 50"), ({"points": ()}, "points"), ({"points": (0,)}, "points = 0"),
                         ({"strength": -1}, "strength"), ({"guidance": "on"}, "guidance"), ({"shift": 0}, "shift")):  # fmt: skip
        with pytest.raises(ConfigError, match=match):
            AccVideo(**knobs)
    with pytest.raises(Unsupported, match="begins in mid-schedule"):
        load_pipeline(make("WanVideoToVideoPipeline").pipe, plugins=[AccVideo()])
