"""Time-Shift: the paper's equations in closed form, the pipelines against hand-written loops, and what it says when it does nothing."""

from __future__ import annotations

from typing import Any, ClassVar

import diffusers
import numpy as np
import pytest
import torch
from diffgraft import ConfigError, Effects, Paper, Plugin, Unsupported, load_pipeline
from diffgraft_pipelines.tiny import make
from diffgraft_time_shift import TimeShift, method
from diffgraft_time_shift.method import Levels
from diffusers import ConfigMixin, DDIMPipeline, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch.utils._python_dispatch import TorchDispatchMode

ABAR = DDIMScheduler().alphas_cumprod
VP = Levels(ABAR, 1000)
FLOW = Levels(None, 1000)


class Probe(Plugin):
    """Keeps what reaches the denoiser and what leaves the step."""

    name = "probe"
    paper = Paper("", "", "")
    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}
    effects = Effects()

    def __init__(self) -> None:
        super().__init__()
        self.times: list[torch.Tensor] = []
        self.nominal: list[float] = []
        self.inputs: list[torch.Tensor] = []
        self.branches: list[str] = []
        self.samples: list[torch.Tensor] = []

    def denoise(self, call, next):
        self.times.append(call.timestep.clone().reshape(-1))
        self.nominal.append(float(call.step.t))
        self.inputs.append(call.sample.clone())
        self.branches.append(call.branch)
        return next(call)

    def step(self, call, next):
        out = next(call)
        self.samples.append(out.sample.clone())
        return out


class GaussianUNet(ModelMixin, ConfigMixin):
    """The exact noise prediction for white data N(0, variance), times ``factor``."""

    @register_to_config
    def __init__(self, sample_size: int = 32, in_channels: int = 3, variance: float = 0.25, factor: float = 1.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, sample, timestep, return_dict=True):
        a = ABAR[torch.as_tensor(timestep).expand(sample.shape[0])].reshape(-1, 1, 1, 1)
        eps = self.config.factor * (1 - a).sqrt() / (a * self.config.variance + 1 - a) * sample * self.weight
        return UNet2DOutput(sample=eps) if return_dict else (eps,)


def gaussian(**model: Any) -> DDIMPipeline:
    pipe = DDIMPipeline(GaussianUNet(**model).requires_grad_(False), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(tiny: Any, seed: int = 0, **kwargs: Any) -> np.ndarray:
    out = tiny.pipe(**{**tiny.kwargs, **kwargs, "generator": torch.Generator().manual_seed(seed)})
    return np.asarray(out[0] if isinstance(out, tuple) else getattr(out, "images", getattr(out, "frames", None)))


def attach(tiny: Any, *, outside: bool = False, **knobs: Any) -> Probe:
    """Time-Shift and a probe: inside of it (sees the shifted times), or outside (sees the shifted transfer)."""
    probe = Probe()
    plugins = [TimeShift(**knobs), probe]
    load_pipeline(tiny.pipe, plugins=plugins[::-1] if outside else plugins)
    return probe


def notes(pipe: Any) -> str:
    return "\n".join(pipe.plugins.report().plugins["time_shift"].notes)


def candidates(levels: Levels, t: float, half: int):
    offsets = torch.arange(-half, half + 1)
    return (*levels.at(torch.tensor(float(t)) + offsets), offsets)


def white(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers whose sample variance is exactly 1: the limit D -> infinity."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    flat = x.flatten(1)
    return ((flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)).view(shape).float()


# the equations ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [20, 300, 550, 800, 979])
@pytest.mark.parametrize("drawn", [20, 300, 550, 800, 979])
def test_a_sample_of_pure_noise_belongs_to_its_own_time_clipped_to_the_window(t, drawn):
    v = method.sample_variance((1 - ABAR[drawn]).sqrt() * white(2, 3, 64, 64))
    k = method.best_offset(v, *candidates(VP, t, 20), torch.zeros(2))
    assert (t + k).tolist() == [min(max(drawn, t - 20), t + 20)] * 2


@pytest.mark.parametrize("sigma2", [0.05, 0.25, 0.6])
@pytest.mark.parametrize(("levels", "t"), [(VP, 400), (VP, 700), (FLOW, 650), (FLOW, 900)])
def test_data_of_known_variance(levels, t, sigma2):
    a, b, _ = levels.at(torch.tensor(float(t)))
    v = method.sample_variance((a * sigma2 + b).sqrt() * white(1, 4, 32, 32))
    assert method.best_offset(v, *candidates(levels, t + 7, 15), torch.tensor([sigma2])).item() == -7


def test_the_window_ends_where_training_ended():
    large, small = torch.tensor([9.0]), torch.tensor([0.0])
    assert method.best_offset(large, *candidates(VP, 990, 50), torch.zeros(1)).item() == 9
    assert method.best_offset(small, *candidates(VP, 10, 50), torch.zeros(1)).item() == -10
    assert method.best_offset(large, *candidates(FLOW, 990, 50), torch.zeros(1)).item() == 10


def test_times_between_two_training_times_are_interpolated():
    a, b, valid = VP.at(torch.tensor([0.0, 500.0, 500.5, 999.0, 999.5, -0.5]))
    assert torch.equal(a[[0, 1, 3]], ABAR[[0, 500, 999]])
    assert torch.allclose(a[2], (ABAR[500] + ABAR[501]) / 2)
    assert torch.equal(b, 1 - a)
    assert valid.tolist() == [True, True, True, True, False, False]


@pytest.mark.parametrize("sigma2", [0.1, 0.25, 0.7])
@pytest.mark.parametrize("t", [50, 400, 800])
def test_the_upper_bound_is_the_variance_of_white_gaussian_data(t, sigma2):
    a, b, _ = VP.at(torch.tensor(float(t)))
    m = (a * sigma2**2 / (a * sigma2 + b)).reshape(1)
    lower, upper = method.data_variance_bounds(m, a, b)
    assert lower.item() < sigma2
    assert upper.item() == pytest.approx(sigma2, rel=1e-4)


@pytest.mark.parametrize("t", [50, 300, 600, 900])
def test_the_bounds_hold_for_data_that_is_not_gaussian(t):
    """x_0 = +-0.5 in every pixel: E[x_0 | x_t] = 0.5 tanh(sqrt(a) x / (2 b)), exactly."""
    a, b, _ = VP.at(torch.tensor(float(t)))
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, 2, (1, 200_000), generator=generator) - 0.5
    x = a.sqrt() * x0 + b.sqrt() * torch.randn(x0.shape, generator=generator)
    m = method.sample_variance(0.5 * torch.tanh(0.5 * a.sqrt() * x / b))
    lower, upper = method.data_variance_bounds(m, a, b)
    assert lower.item() <= 0.2501
    assert upper.item() >= 0.2499


def test_of_two_bounds_the_smaller_shift_counts_and_disagreement_is_none():
    lower, upper = torch.tensor([9, 5, 3, 0, -2]), torch.tensor([4, -5, 0, -3, -7])
    assert method.smaller_shift(lower, upper).tolist() == [4, 0, 0, 0, -2]


@pytest.mark.parametrize("sigma2", [0.0, 0.3, 0.8, 1.0])
def test_flow_variance_is_monotone_above_its_minimum_only(sigma2):
    s = sigma2 / (1 + sigma2)
    for edge, expected in ((s + 0.01, True), (s - 0.01, False)):
        if edge >= 0:
            a, b, _ = FLOW.at(torch.tensor(1000 * edge))
            assert bool(method.flow_rises(a, b, torch.tensor(sigma2))) is expected
            a, b, _ = FLOW.at(torch.tensor([1000 * edge, 1000 * edge + 1]))
            rises = (a * sigma2 + b).diff().item() > 0
            assert rises is expected


# knobs ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"data_variance": 1.0}, ("data_variance", "1.0", "0.8")),
        ({"window": -1}, ("window", "-1", "0")),
        ({"mode": "both"}, ("mode", "'both'", "'network' or 'target'")),
        ({"windw": 3}, ("windw", "window")),
    ],
)
def test_bad_knobs_are_refused_with_what_is_allowed(knobs, words):
    with pytest.raises(ConfigError) as caught:
        TimeShift(**knobs)
    assert all(word in str(caught.value) for word in words)


def test_auto_is_none():
    assert TimeShift(data_variance="auto").config.data_variance is None


# identities on pipelines ------------------------------------------------------------------------------------------------------------

CLASSES = ["DDPMPipeline", "StableDiffusionPipeline", "DiTPipeline", "FluxPipeline", "StableDiffusion3Pipeline"]


@pytest.mark.parametrize("name", CLASSES)
def test_no_window_and_high_cutoff_are_the_baseline_bit_for_bit(name):
    tiny = make(name)
    base = image(tiny)
    load_pipeline(tiny.pipe, plugins=["time_shift"])
    for knobs in ({"window": 0}, {"window": 1, "cutoff": 0}, {"window": 200, "cutoff": 1000, "data_variance": 0.0}):
        tiny.pipe.plugins.configure("time_shift", **{"cutoff": 300, **knobs})
        assert np.array_equal(image(tiny), base), knobs
    tiny.pipe.plugins.configure("time_shift", **TimeShift.active)
    assert not np.array_equal(image(tiny), base)
    tiny.pipe.plugins.clear()
    assert np.array_equal(image(tiny), base)


@pytest.mark.parametrize("name", ["DDIMPipeline", "StableDiffusionPipeline"])
def test_a_sample_in_a_batch_is_the_sample_alone(name):
    tiny = make(name)
    probe = attach(tiny, **TimeShift.active)
    size = {"batch_size": 2} if name == "DDIMPipeline" else {"num_images_per_prompt": 2}
    tiny.pipe(**tiny.kwargs, **size, generator=[torch.Generator().manual_seed(i) for i in (3, 4)])
    together, both = list(probe.times), list(probe.samples)
    for i in (0, 1):
        probe.times.clear()
        probe.samples.clear()
        tiny.pipe(**tiny.kwargs, generator=[torch.Generator().manual_seed(3 + i)])
        for whole, alone in zip(together[1:], probe.times[1:], strict=True):
            assert torch.equal(whole[i::2], alone)
        assert torch.allclose(both[-1][i], probe.samples[-1][0], atol=1e-3)  # a batch is summed in another order


# the network's time -----------------------------------------------------------------------------------------------------------------


def test_network_mode_is_ddim_with_the_denoisers_time_shifted():
    """Against a loop written by hand, for eps = network(x, t_s) and the scheduler at its nominal times."""
    pipe = gaussian(factor=0.97)
    load_pipeline(pipe, plugins=[TimeShift(window=40, cutoff=250, data_variance=0.1), probe := Probe()])
    pipe(batch_size=3, num_inference_steps=8, generator=torch.Generator().manual_seed(5))
    scheduler, unet = DDIMScheduler(clip_sample=False), pipe.unet
    scheduler.set_timesteps(8)
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    shifted = None
    for n, t in enumerate(scheduler.timesteps):
        now = t.expand(3) if shifted is None else shifted
        assert torch.equal(probe.times[n].expand(3), now)
        x = scheduler.step(unet(x, now).sample, t, x).prev_sample
        shifted = None
        if n + 1 < 8 and t > 250:
            after = int(scheduler.timesteps[n + 1])
            taus = torch.arange(max(after - 20, 0), min(after + 20, 999) + 1)
            model = ABAR[taus] * 0.1 + 1 - ABAR[taus]
            shifted = taus[(x.flatten(1).var(1)[:, None] - model).square().argmin(1)]
    assert torch.allclose(probe.samples[-1], x, atol=1e-6)
    assert any((times != int(t)).any() for times, t in zip(probe.times, probe.nominal, strict=True))


SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "EulerAncestral": ("EulerAncestralDiscreteScheduler", {}),
    "DPM++": ("DPMSolverMultistepScheduler", {}),
    "DPM++ Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("which", SCHEDULERS)
def test_every_scheduler_gives_the_vp_time_of_its_sample(which, prediction):
    """The shifted time is the window's best for Var(denoiser input), and that input is in VP scale under every scheduler."""
    tiny = make("StableDiffusionPipeline")
    probe = attach(tiny, window=60, cutoff=200, data_variance=0.2)
    name, options = SCHEDULERS[which]
    config = {**tiny.pipe.scheduler.config, "prediction_type": prediction, **options}
    tiny.pipe.scheduler = getattr(diffusers, name).from_config(config)  # swapped after attaching
    tiny.pipe(**{**tiny.kwargs, "num_inference_steps": 6}, generator=torch.Generator().manual_seed(0))
    abar = tiny.pipe.scheduler.alphas_cumprod
    assert len(probe.times) >= 6
    assert probe.times[0].tolist() == pytest.approx([probe.nominal[0]] * len(probe.times[0]))
    moved = 0
    for n in range(1, len(probe.times)):
        t = probe.nominal[n]
        times = probe.times[n].double()
        if probe.nominal[n - 1] <= 200:
            assert (times == t).all()
            continue
        assert times.shape == (2,)
        assert times[0] == times[1], "both guidance halves get one time"
        assert (times - t).abs().max() <= 30
        assert 0 <= times.min() <= times.max() <= 999
        k, a, b, valid = torch.arange(-30, 31), *Levels(abar, 1000).at(t + torch.arange(-30.0, 31.0))
        best = k[(probe.inputs[n][:1].var() - (0.2 * a + b)).square().masked_fill(~valid, torch.inf).argmin()]
        assert times[0] == pytest.approx(t + best.item(), abs=1e-3)
        moved += int(best != 0)
    assert moved


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_the_denoisers_input_has_the_variance_of_x_over_one_plus_sigma_squared(name):
    """What the sigma schedulers hold is x_0 + sigma eps; scale_model_input brings it to VP scale, at the intermediate stages too."""
    tiny = make("StableDiffusionPipeline")
    probe = attach(tiny, window=60, cutoff=200, data_variance=0.2)
    tiny.pipe.scheduler = getattr(diffusers, name).from_config(tiny.pipe.scheduler.config)
    tiny.pipe(**{**tiny.kwargs, "num_inference_steps": 5}, generator=torch.Generator().manual_seed(0))
    scheduler = tiny.pipe.scheduler
    grid = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    for n in range(1, len(probe.inputs) - 1):
        t = probe.nominal[n]
        sigma = np.interp(t, np.arange(1000), grid.numpy())  # of the stage's nominal time
        v = probe.samples[n - 1].var().item() / (1 + sigma**2)
        assert probe.inputs[n][:1].var().item() == pytest.approx(v, rel=0.02)


def test_image_to_image_shifts_the_tail_of_the_schedule():
    tiny = make("StableDiffusionImg2ImgPipeline")
    probe = attach(tiny, window=40, cutoff=0, data_variance=0.0)
    tiny.pipe(**{**tiny.kwargs, "num_inference_steps": 10, "strength": 0.4}, generator=torch.Generator().manual_seed(0))
    assert len(probe.times) == 4
    assert (probe.times[0] == probe.nominal[0]).all(), "the first step of the tail is never shifted"
    for times, t in zip(probe.times[1:], probe.nominal[1:], strict=True):
        assert (times - t).abs().max() <= 20
    assert "of 3 " in notes(tiny.pipe)


@pytest.mark.parametrize(
    ("name", "scale"), [("FluxPipeline", 1000), ("QwenImagePipeline", 1000), ("WanPipeline", 1), ("StableDiffusion3Pipeline", 1)]
)
def test_flow_and_every_branch_of_a_step_gets_the_same_time(name, scale):
    tiny = make(name)
    probe = attach(tiny, window=100, cutoff=0, data_variance=0.5)
    image(tiny)
    by_step: dict[float, set[float]] = {}
    for times, t in zip(probe.times, probe.nominal, strict=True):
        by_step.setdefault(t, set()).update((times.double() * scale).tolist())
    assert len(by_step) == 4
    for n, (t, times) in enumerate(by_step.items()):
        assert len(times) == 1
        shift = times.pop() - t
        assert abs(shift) <= (50.01 if n else 0.01)
    v = probe.inputs[-1].var(dim=tuple(range(1, probe.inputs[-1].ndim)))[:1]
    a, b, valid, k = candidates(FLOW, probe.nominal[-1], 50)
    expected = 0
    if method.flow_rises(a[0], b[0], torch.tensor(0.5)):
        expected = method.best_offset(v, a, b, valid, k, torch.tensor([0.5])).item()
    assert probe.times[-1].double()[0].item() * scale - probe.nominal[-1] == pytest.approx(expected, abs=0.01)
    if "sequential" in tiny.pipe.plugins.family.guidance.layout:
        assert set(probe.branches) == {"cond", "uncond"}


def test_dtype_is_kept():
    tiny = make("FluxPipeline")
    tiny.pipe.to(torch.bfloat16)
    probe = attach(tiny, **TimeShift.active)
    assert np.isfinite(image(tiny)).all()
    assert {times.dtype for times in probe.times} == {torch.bfloat16}
    tiny = make("DDPMPipeline")
    probe = attach(tiny, **TimeShift.active)
    image(tiny)
    assert {times.dtype for times in probe.times} == {torch.int64}


# the target of the transfer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_target_mode_is_the_official_ddim_sampler(prediction):
    """Nominal network times; the transfer goes to the time near t_next whose 1 - abar is nearest to Var(x_t)."""
    tiny = make("DDIMPipeline")
    tiny.pipe.scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    probe = attach(tiny, outside=True, mode="target", window=260, cutoff=300, data_variance=0.0)
    tiny.pipe(batch_size=2, num_inference_steps=5, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    moved = 0
    for n, t in enumerate(range(800, -1, -200)):
        after, at = t - 200, ABAR[t]
        with torch.no_grad():
            output = tiny.pipe.unet(x, t).sample
        if prediction == "epsilon":
            eps, x0 = output, (x - (1 - at).sqrt() * output) / at.sqrt()
        elif prediction == "v_prediction":
            eps, x0 = at.sqrt() * output + (1 - at).sqrt() * x, at.sqrt() * x - (1 - at).sqrt() * output
        else:
            eps, x0 = (x - at.sqrt() * output) / (1 - at).sqrt(), output
        a_next = (ABAR[after] if after >= 0 else torch.tensor(1.0)).expand(2)
        if n > 0 and after > 300:
            taus = torch.arange(max(after - 130, 0), min(after + 130, 999) + 1)
            best = taus[(x.flatten(1).var(1)[:, None] - (1 - ABAR[taus])).square().argmin(1)]
            moved += int((best != after).sum())
            a_next = ABAR[best]
        a_next = a_next.view(2, 1, 1, 1)
        x = a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps
        assert torch.allclose(probe.samples[n], x, rtol=1e-4, atol=1e-4 * float(x.abs().max())), n
    assert moved


def test_target_mode_leaves_the_networks_time_nominal():
    tiny = make("DDIMPipeline")
    probe = attach(tiny, mode="target", window=200, cutoff=0, data_variance=0.0)
    image(tiny)
    assert [times.tolist() for times in probe.times] == [[t] for t in probe.nominal]


@pytest.mark.parametrize("knobs", [{"window": 0}, {"window": 1}, {"cutoff": 1000}])
def test_target_mode_without_a_shift_is_the_baseline_bit_for_bit(knobs):
    tiny = make("DDIMPipeline")
    base = image(tiny)
    attach(tiny, **{"mode": "target", "window": 200, "cutoff": 0, "data_variance": 0.0, **knobs})
    assert np.array_equal(image(tiny), base)


def test_target_mode_with_both_guidance_halves_in_the_step():
    tiny = make("DiTPipeline")
    base = image(tiny)
    probe = attach(tiny, outside=True, mode="target", window=200, cutoff=0, data_variance=0.0)
    assert not np.array_equal(image(tiny), base)
    assert all(torch.equal(*x.chunk(2)) for x in probe.samples)


# refusals ---------------------------------------------------------------------------------------------------------------------------


def test_what_it_cannot_do_is_refused_with_the_reason():
    tiny = make("DDIMPipeline")
    tiny.pipe.scheduler = diffusers.IPNDMScheduler()
    with pytest.raises(Unsupported, match="IPNDMScheduler has no alphas_cumprod"):
        load_pipeline(tiny.pipe, plugins=["time_shift"])
    tiny.pipe.scheduler = diffusers.DPMSolverMultistepScheduler()
    with pytest.raises(Unsupported, match="DDIM transfer, which DPMSolverMultistepScheduler does not make"):
        load_pipeline(tiny.pipe, plugins=[("time_shift", {"mode": "target"})])
    with pytest.raises(Unsupported, match="use DDIMScheduler"):
        load_pipeline(make("FluxPipeline").pipe, plugins=[("time_shift", {"mode": "target"})])
    with pytest.raises(Unsupported):
        load_pipeline(make("StableVideoDiffusionPipeline").pipe, plugins=["time_shift"])
    assert not hasattr(tiny.pipe, "plugins")


def test_what_changed_after_attaching_is_refused_before_the_first_step():
    tiny = make("DDIMPipeline")
    probe = attach(tiny, mode="target")
    with pytest.raises(Unsupported, match=r"eta = 0\.5"):
        tiny.pipe(num_inference_steps=4, eta=0.5)
    tiny.pipe.scheduler = diffusers.PNDMScheduler()
    with pytest.raises(Unsupported, match="PNDMScheduler"):
        tiny.pipe(num_inference_steps=4)
    tiny.pipe.plugins.configure("time_shift", mode="network")
    tiny.pipe.scheduler = diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")
    with pytest.raises(Unsupported, match="continuous"):
        tiny.pipe(num_inference_steps=4)
    assert not probe.times


# self-calibration -------------------------------------------------------------------------------------------------------------------


def bounds_of(note: str) -> tuple[float, float]:
    low, high = note.split("between ")[1].split(" (")[0].split(" and ")
    return float(low), float(high)


@pytest.mark.parametrize("sigma2", [0.05, 0.25, 0.5])
@pytest.mark.parametrize(("steps", "rel"), [(20, 0.5), (200, 0.1)])
def test_the_data_variance_is_recovered_from_a_run(sigma2, steps, rel):
    """White Gaussian data and its exact denoiser: the bounds meet at the variance of the samples that came out, near the data's."""
    pipe = gaussian(variance=sigma2)
    load_pipeline(pipe, plugins=[TimeShift(), probe := Probe()])
    pipe(batch_size=4, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
    low, high = bounds_of(notes(pipe))
    assert low == pytest.approx(high, rel=0.01)
    made = probe.samples[-1].flatten(1).var(1).mean().item()
    assert low == pytest.approx(made, rel=0.01)
    assert low == pytest.approx(sigma2, rel=rel), "few DDIM steps themselves lose a part of the variance"


def test_an_exact_denoiser_is_not_shifted_by_much_and_a_biased_one_is_shifted_towards_its_drift():
    """Fine steps, so that DDIM itself does not drift; a large sample, so that Var(x_T) is 1."""
    shifts = {}
    for factor in (0.95, 1.0, 1.05):
        pipe = gaussian(variance=0.25, factor=factor, sample_size=128)
        load_pipeline(pipe, plugins=[TimeShift(window=60, cutoff=300), probe := Probe()])
        pipe(num_inference_steps=100, generator=torch.Generator().manual_seed(0))
        late = [float(times[0]) - t for times, t in zip(probe.times, probe.nominal, strict=True) if 300 < t < 500]
        shifts[factor] = sum(late) / len(late)
    assert abs(shifts[1.0]) <= 3
    assert shifts[0.95] > 5  # too little noise taken away: the sample is noisier than its nominal time says
    assert shifts[1.05] < -5


@pytest.mark.parametrize("sigma2", [1.0, 0.95])
def test_data_of_unit_variance_leaves_it_inactive_with_the_reason_in_the_report(sigma2):
    """As the latents of Stable Diffusion: Var(x_t) is 1 at every t."""
    pipe = gaussian(variance=sigma2)
    load_pipeline(pipe, plugins=[TimeShift(window=100, cutoff=0), probe := Probe()])
    pipe(num_inference_steps=100, generator=torch.Generator().manual_seed(0))
    assert all((times == t).all() for times, t in zip(probe.times, probe.nominal, strict=True))
    assert "inactive" in notes(pipe)
    assert "0.8" in notes(pipe)
    assert bounds_of(notes(pipe))[0] == pytest.approx(sigma2, rel=0.05)


def test_the_report_gives_numbers_also_when_no_step_was_above_the_cutoff():
    tiny = make("DDIMPipeline")
    attach(tiny, cutoff=1000)
    image(tiny)
    assert "inactive: no step at t > cutoff = 1000" in notes(tiny.pipe)
    image(tiny, num_inference_steps=1)
    assert "first step is never shifted" in notes(tiny.pipe)


def test_nothing_of_a_run_is_kept():
    tiny = make("StableDiffusionPipeline")
    attach(tiny, **TimeShift.active)
    first = image(tiny)
    image(tiny, seed=1, num_inference_steps=9)
    assert np.array_equal(image(tiny), first)
    assert set(vars(tiny.pipe.plugins["time_shift"])) == {"config"}


# no host sync -----------------------------------------------------------------------------------------------------------------------


class CountReads(TorchDispatchMode):
    """Counts the operations that would make the host wait for the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func in {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("knobs", [TimeShift.active, {"window": 30, "cutoff": 0}])
def test_no_value_is_read_on_the_host_in_a_step(knobs):
    tiny = make("StableDiffusionPipeline")

    def reads(steps: int) -> int:
        with CountReads() as count:
            tiny.pipe(**{**tiny.kwargs, "num_inference_steps": steps})
        return count.n

    image(tiny)
    before = reads(10) - reads(4)
    load_pipeline(tiny.pipe, plugins=[TimeShift(**knobs)])
    image(tiny)
    assert reads(10) - reads(4) == before
