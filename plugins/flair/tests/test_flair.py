"""FLAIR against its equations, a loop of its own in plain torch, and a Gaussian prior whose mode is known."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import diffgraft_flair
import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, Schedule, Unsupported, load_pipeline
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.calibration import calibrate_call
from diffgraft.methods.measurements import Blur, Identity, Mask, Phase, TemporalMean, downsample
from diffgraft.methods.problems import Problem, simulated
from diffgraft.testing import run_contract
from diffgraft_flair import Flair, measured_on, size_of
from diffgraft_flair.method import adjusted, at, data_steps, prior_step, squared_norm, start_of, weights_of
from diffgraft_flair.schedules import even, times
from diffusers import DDIMScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

STEPS = 4


def tiny(name: str = "StableDiffusion3Pipeline", module: str = "sd3") -> Any:
    made = importlib.import_module(f"diffgraft_pipelines.tiny.{module}").make(name)
    made.kwargs.update(num_inference_steps=STEPS, output_type="latent")
    return made


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def restored(made: Any, problem: Problem, seed: int = 0, call: dict[str, Any] | None = None, **knobs: Any) -> torch.Tensor:
    """The latents that the run ends at."""
    pipe = load_pipeline(made.pipe, plugins={"flair": {"problem": problem, **knobs}})
    return pipe(**{**made.kwargs, **(call or {})}, generator=torch.Generator().manual_seed(seed))[0]


class Same(ModelMixin, ConfigMixin):
    """An autoencoder that changes nothing but the scale: pictures are z / scaling + shift."""

    @register_to_config
    def __init__(self, in_channels: int, scaling_factor: float = 1.5, shift_factor: float = 0.25) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1), requires_grad=False)  # where it is

    def encode(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: x))

    def decode(self, z: torch.Tensor, return_dict: bool = False) -> Any:
        return (z,)


def bare() -> Any:
    """Stable Diffusion 3 whose pictures are its latents, [16, 8, 8]."""
    made = tiny()
    made.pipe.vae = Same(16)
    return made


# the maths -------------------------------------------------------------------------------------------------------------------------------


def test_a_whole_step_is_the_models_sample_to_the_bit() -> None:
    mu, n, v = (drawn(2, 4, 8, 8, seed=i) for i in range(3))
    assert torch.equal(prior_step(mu, n, v, torch.tensor(1.0)), n - v)


@pytest.mark.parametrize("t", [0.99, 0.5, 0.2])
def test_the_step_is_the_officials(t: float) -> None:
    """w (v - u_t), with u_t = -x_t / (1 - t) - t lambda' n / 2 and lambda' = -2 (1 / (1 - t) + 1 / t); and n_hat = a mu + s n + a v."""
    mu, n, v = (drawn(2, 4, 8, 8, seed=i, dtype=torch.float64) for i in range(3))
    derivative = -2 * (1 / (1 - t) + 1 / t)
    u = -1 / (1 - t) * ((1 - t) * mu + t * n) - t * derivative / 2 * n
    torch.testing.assert_close(prior_step(mu, n, v, scalar(0.3)), mu - 0.3 * (v - u), rtol=0, atol=1e-12)
    torch.testing.assert_close(start_of(mu, n, v, scalar(t)), (1 - t) * mu + t * n + (1 - t) * v, rtol=0, atol=1e-12)


def test_a_straight_path_gives_its_own_beginning() -> None:
    """Of a perfect velocity n - x0 at mu = x0, n_hat is n, whatever t."""
    x0, n = drawn(1, 4, 8, 8, dtype=torch.float64), drawn(1, 4, 8, 8, seed=1, dtype=torch.float64)
    for t in (0.9, 0.3):
        torch.testing.assert_close(start_of(x0, n, n - x0, scalar(t)), n)


def test_adjusted_noise_stays_noise() -> None:
    n, z = drawn(1, 1, 300, 300), drawn(1, 1, 300, 300, seed=1)
    for alpha in (0.0, 0.4, 1.0):
        assert float(adjusted(n, z, torch.tensor(alpha)).std()) == pytest.approx(1, abs=0.02)
    assert torch.equal(adjusted(n, z, torch.tensor(1.0)), n)
    assert torch.equal(adjusted(n, z, torch.tensor(0.0)), z)


def test_the_fixed_point_is_the_mode_of_a_gaussian_prior() -> None:
    """N(m, s2 I) has the velocity E[n - x0 | x]; without a measurement mu ends at m. Everything is affine in (mu, n), so rows whose draws
    are each other's negatives have the exact expectation as their mean."""
    m, s2 = drawn(1, 1, 4, 4, seed=9, dtype=torch.float64), 0.3

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        spread = (1 - t) ** 2 * s2 + t * t
        return (t - (1 - t) * s2) / spread * (x - (1 - t) * m) - m

    def pair(seed: int) -> torch.Tensor:
        z = drawn(1, 1, 4, 4, seed=seed, dtype=torch.float64)
        return torch.cat([z, -z])

    def ends(mu: torch.Tensor, follow: float) -> torch.Tensor:
        mu, n = mu.expand(2, 1, 4, 4), pair(0)
        ts = times(60, 0.18).double()
        for i, t in enumerate(ts):
            v = velocity((1 - t) * mu + t * n, t)
            n_hat = start_of(mu, n, v, t)
            mu = prior_step(mu, n, v, scalar(0.5))
            n = adjusted(n_hat, pair(i + 1), follow * (1 - ts[min(i + 1, 59)]))
        return mu.mean(0, keepdim=True)

    for follow in (0.0, 1.0):
        torch.testing.assert_close(ends(m, follow), m, rtol=0, atol=1e-12)
        torch.testing.assert_close(ends(torch.full_like(m, 3.0), follow), m, rtol=0, atol=1e-6)


def test_the_curve_is_the_papers() -> None:
    loss = torch.tensor([0.6, 0.25, 0.3, 0.5, 1.0])
    inverse = 1 / (loss.double() + 1e-7)
    w = inverse / inverse.sum() * 5
    torch.testing.assert_close(weights_of(loss), w)
    torch.testing.assert_close(weights_of(loss, subtract=True), w - w[-1])
    assert float(weights_of(torch.tensor([2.0, 0.5, 1.0]), subtract=True)[0]) == 0
    torch.testing.assert_close(weights_of(torch.full((7,), 0.4)), torch.ones(7, dtype=torch.float64))


def test_the_nearest_t_is_looked_up() -> None:
    values = torch.arange(11.0)
    assert [float(at(values, torch.tensor(t))) for t in (1.0, 0.96, 0.94, 0.5, 0.04, 0.0)] == [0, 0, 1, 5, 10, 10]


def test_times_are_the_officials() -> None:
    torch.testing.assert_close(times(50, 0.18), torch.linspace(1, 0.18, 52)[1:-1])


def dense(rows: int, columns: int) -> torch.Tensor:
    """A matrix with singular values of 0.5 to 1."""
    u, _, v = torch.linalg.svd(drawn(rows, columns, dtype=torch.float64), full_matrices=False)
    return u @ torch.diag(torch.linspace(0.5, 1, rows, dtype=torch.float64)) @ v


def test_without_an_autoencoder_a_linear_measurement_is_met_before_the_steps_are_out() -> None:
    M = dense(12, 48)
    y = drawn(2, 12, dtype=torch.float64)

    def misfit(x: torch.Tensor) -> torch.Tensor:
        return (x.flatten(1) @ M.T - y).square().sum(1)

    mu, taken = data_steps(torch.zeros(2, 3, 4, 4, dtype=torch.float64), misfit, scalar(0.5), 100, 1e-4 * 12)
    assert 0 < taken < 100
    assert bool((misfit(mu) < 1e-4 * 12).all())


def test_each_sample_stops_by_itself() -> None:
    y = torch.stack([torch.full((1, 4, 4), 0.1), torch.full((1, 4, 4), 5.0)])

    def of(rows: slice) -> tuple[torch.Tensor, int]:
        return data_steps(torch.zeros_like(y[rows]), lambda x: (x - y[rows]).square().flatten(1).sum(1), torch.tensor(0.1), 15, 1e-2 * 16)

    both, taken = of(slice(0, 2))
    alone = [of(slice(i, i + 1)) for i in range(2)]
    assert torch.equal(both, torch.cat([x for x, _ in alone]))
    assert alone[0][1] < alone[1][1] == taken


def test_the_rate_follows_the_operator() -> None:
    """0.1 for a mask; that of 12 times smaller pictures is near the official 12."""
    assert size_of(Problem(Mask(torch.ones(24, 24)), torch.zeros(1, 3, 24, 24))) == 1
    assert 0.1 / size_of(Problem(downsample(12), torch.zeros(1, 3, 2, 2))) == pytest.approx(14.4, rel=1e-3)
    assert size_of(Problem(Blur(1.5), torch.zeros(1, 3, 24, 24))) == pytest.approx(1, rel=0.1)
    assert size_of(Problem(Phase(2), torch.zeros(1, 3, 16, 16))) == 1
    M = dense(12, 48)
    found = squared_norm(lambda x: x @ M.T, lambda y: y @ M, torch.zeros(1, 48, dtype=torch.float64))
    assert found == pytest.approx(1, rel=0.02)


# runs ------------------------------------------------------------------------------------------------------------------------------------


def watched(made: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(x_t, v) of each denoiser call."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    made.pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((kwargs["hidden_states"].clone(), out[0].clone())), with_kwargs=True
    )
    return seen


UNGUIDED = {"sd3": {"guidance_scale": 1.0}, "flux": {"true_cfg_scale": 1.0}}


@pytest.mark.parametrize(("name", "module"), [("StableDiffusion3Pipeline", "sd3"), ("FluxPipeline", "flux")])
@pytest.mark.parametrize("operator", [downsample(2), Mask(0.5), Blur(1.0)], ids=lambda o: type(o).__name__)
def test_a_run_is_the_officials_loop(name: str, module: str, operator) -> None:
    """The official loop, in its own terms (eps, SGD, sums of squares), of the velocities that the model gave."""
    made = tiny(name, module)
    pipe = made.pipe
    fits = calibrate_call(pipe, Flair(), lambda: pipe(**made.kwargs)).made_for
    seen = watched(made)
    picture = drawn(1, 3, 64, 64, seed=5).clamp(-1, 1)
    problem = simulated(operator, picture, 0.01, torch.Generator().manual_seed(3))
    curve = torch.tensor([0.6, 0.25, 0.3, 0.4, 0.5, 1.0])
    given = Artefact(fits, {"loss": curve}, {"pictures": 1})
    result = restored(made, problem, call=UNGUIDED[module], artefact=given, lr_data=0.01)
    # the same in plain torch
    vae, draws = pipe.vae, torch.Generator().manual_seed(0)
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    side = 64 // pipe.vae_scale_factor

    def packed(z: torch.Tensor) -> torch.Tensor:
        return pipe._pack_latents(z, *z.shape) if module == "flux" else z

    def decode(mu: torch.Tensor) -> torch.Tensor:
        z = pipe._unpack_latents(mu, 64, 64, pipe.vae_scale_factor) if module == "flux" else mu
        return vae.decode(z / scale + shift, return_dict=False)[0]

    with torch.no_grad():
        z = vae.encode(operator.pinv(problem.y)).latent_dist.mode()
    mu = packed((z - shift) * scale).clone().requires_grad_()
    noise = packed(torch.randn(1, vae.config.latent_channels, side, side, generator=draws))
    w = 1 / (curve + 1e-7)
    w = w / w.sum() * len(w) * 0.5
    prior, data = torch.optim.SGD([mu], lr=1), torch.optim.SGD([mu], lr=0.01)
    ts = torch.linspace(1, 0.18, STEPS + 2)[1:-1]
    for i, (t, (x, v)) in enumerate(zip(ts, seen, strict=True)):
        x_t = ((1 - t) * mu + t * noise).detach()
        if i:  # a hook of the module sees what the pipeline passes, which is its own noise at first
            torch.testing.assert_close(x, x_t, rtol=0, atol=2e-4)
        eps = x_t + (1 - t) * v
        weight = w[(torch.linspace(1, 0, len(w)) - t).abs().argmin()]
        u = -1 / (1 - t) * x_t + (1 / (1 - t) + 1 / t) * t * noise
        (-(u - v).detach() * weight * mu).sum().backward()
        prior.step()
        prior.zero_grad()
        for _ in range(15):
            loss = (operator.A(decode(mu)) - problem.y).square().sum()
            if loss < 1e-4 * problem.y.numel():
                break
            (weight * loss).backward()
            data.step()
            data.zero_grad()
        if i + 1 < STEPS:
            alpha = 1 - ts[i + 1]
            noise = alpha * eps + (1 - alpha**2) ** 0.5 * torch.randn(noise.shape, generator=draws)
    torch.testing.assert_close(result, mu.detach(), rtol=0, atol=1e-3)


def test_one_whole_step_without_a_measurement_is_n_minus_v() -> None:
    for name, module in (("StableDiffusion3Pipeline", "sd3"), ("FluxPipeline", "flux")):
        made = tiny(name, module)
        seen = watched(made)
        shape = made.pipe(**{**made.kwargs, **UNGUIDED[module], "num_inference_steps": 1})[0].shape
        noise = drawn(*shape)
        seen.clear()
        problem = Problem(Identity(), torch.zeros(1, 3, 64, 64))
        call = {**UNGUIDED[module], "num_inference_steps": 1, "latents": noise}
        result = restored(made, problem, call=call, weight=1.0, data_weight=0.0)
        assert torch.equal(result, noise - seen[-1][1])


def test_the_measurement_is_met_and_the_scale_of_the_autoencoder_is_not_forgotten() -> None:
    """Everything is seen: the pictures of mu are y, so mu is (y - shift) scale."""
    made = bare()
    shape = made.pipe(**made.kwargs)[0].shape
    y = drawn(*shape).clamp(-1, 1)
    result = restored(made, Problem(Mask(torch.ones(*shape[-2:])), y), data_steps=300, enough=1e-12)
    torch.testing.assert_close(result, (y - 0.25) * 1.5, rtol=0, atol=1e-5)
    assert float((result - y).abs().max()) > 0.1
    assert float(made.pipe.plugins.report().plugins["flair"].records["residual"]) < 1e-5


def test_an_early_stop_in_a_run() -> None:
    made = bare()
    shape = made.pipe(**made.kwargs)[0].shape
    problem = simulated(downsample(2), drawn(*shape).clamp(-1, 1), 0.05, torch.Generator().manual_seed(1))
    restored(made, problem, data_steps=200)
    entry = made.pipe.plugins.report().plugins["flair"]
    assert float(entry.records["residual"]) < 0.05
    assert 0 < sum(entry.counts["data steps"].values()) < 200 * STEPS


def test_mu_is_float32_under_a_bfloat16_model(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny()
    made.pipe.to(torch.bfloat16)
    kept = []
    real = diffgraft_flair.prior_step

    def seen(*tensors: torch.Tensor) -> torch.Tensor:
        kept.append([each.dtype for each in tensors[:3]])
        return real(*tensors)

    monkeypatch.setattr(diffgraft_flair, "prior_step", seen)
    result = restored(made, simulated(downsample(2), drawn(1, 3, 64, 64).clamp(-1, 1)))
    assert kept == [[torch.float32] * 3] * STEPS
    assert result.dtype == torch.bfloat16
    small = torch.full((1, 1, 4, 4), 1.0)
    moved, _ = data_steps(small, lambda x: (x * 1e-3).flatten(1).sum(1), torch.tensor(1e-2), 15, -1.0)
    assert 0 < float((small - moved).max()) < 1e-3  # lost in bfloat16, whose next number below 1 is 4e-3 away


@pytest.mark.parametrize(("name", "module"), [("StableDiffusion3Pipeline", "sd3"), ("FluxPipeline", "flux")])
def test_nothing_is_kept_for_gradients_through_the_denoiser(name: str, module: str) -> None:
    made = tiny(name, module)
    seen = []
    made.pipe.transformer.register_forward_hook(lambda module, args, out: seen.append((torch.is_grad_enabled(), out[0].requires_grad)))
    restored(made, simulated(downsample(2), torch.zeros(1, 3, 64, 64)))
    forwards = made.pipe.plugins.report().forwards
    assert set(seen) == {(False, False)}
    assert forwards == ({"both": STEPS} if module == "sd3" else {"cond": STEPS, "uncond": STEPS})
    assert all(weight.grad is None for part in (made.pipe.transformer, made.pipe.vae) for weight in part.parameters())


def test_the_pipelines_own_times() -> None:
    """t_min = None leaves the schedule, and so does a call that says its own."""
    made = tiny()
    asked: list[float] = []
    made.pipe.transformer.register_forward_hook(lambda m, args, kwargs, out: asked.append(float(kwargs["timestep"][0])), with_kwargs=True)
    problem = simulated(downsample(2), torch.zeros(1, 3, 64, 64))
    made.pipe(**made.kwargs)
    plain = asked.copy()
    for call, knobs in (({}, {"t_min": None}), ({"sigmas": [0.9, 0.5]}, {})):
        asked.clear()
        restored(made, problem, call=call, **knobs)
        assert asked == pytest.approx(plain) if not call else len(asked) == 2
        notes = made.pipe.plugins.report().plugins["flair"].notes
        assert bool(call) == any("t_min is not used" in note for note in notes)
        made.pipe.plugins.remove("flair")
    asked.clear()
    restored(made, problem)
    assert asked == pytest.approx((1000 * times(STEPS, 0.18)).tolist(), rel=1e-4)


def test_steps_that_went_astray_are_told() -> None:
    made = bare()
    shape = made.pipe(**made.kwargs)[0].shape
    restored(made, simulated(downsample(2), drawn(*shape).clamp(-1, 1)), lr_data=1e3)
    assert any("smaller lr_data" in note for note in made.pipe.plugins.report().plugins["flair"].notes)


# calibration -----------------------------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_velocity() -> None:
    """Of a given picture: mean((v - (n - x0))^2) at t = 1 ... 0, guidance off, by a look at the denoiser's own calls."""
    made = tiny()
    seen = watched(made)
    picture = drawn(3, 64, 64).clamp(-1, 1)
    call = {**made.kwargs, **UNGUIDED["sd3"], "num_inference_steps": 5, "generator": torch.Generator().manual_seed(4)}
    artefact = measured_on(made.pipe, [(picture, call)])
    vae = made.pipe.vae
    with torch.no_grad():
        x0 = (vae.encode(picture[None]).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    wanted = []
    for t, (x, v) in zip(torch.linspace(1, 0, 5), seen, strict=True):
        if t > 0:
            n = (x - (1 - t) * x0) / t
            wanted.append((v - (n - x0)).square().mean())
    torch.testing.assert_close(artefact.tensors["loss"][:4], torch.stack(wanted), rtol=1e-4, atol=1e-4)
    assert artefact.facts == {"pictures": 1}
    restored(tiny(), simulated(downsample(2), torch.zeros(1, 3, 64, 64)), artefact=artefact)


@pytest.mark.parametrize(("name", "module"), [("StableDiffusion3Pipeline", "sd3"), ("FluxPipeline", "flux")])
def test_calibration_of_the_pipelines_own_pictures(name: str, module: str) -> None:
    made = tiny(name, module)
    before = made.pipe(**made.kwargs, generator=torch.Generator().manual_seed(1))[0]
    kept = []

    def call() -> None:
        kept.append(made.pipe(**made.kwargs, generator=torch.Generator().manual_seed(1))[0])

    artefact = calibrate_call(made.pipe, Flair(), call)
    assert torch.equal(kept[0], before)  # what comes out is the picture
    assert artefact.tensors["loss"].shape == (STEPS,)
    assert bool((artefact.tensors["loss"] > 0).all())


# bad input -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (Problem(downsample(2), torch.zeros(1, 3, 4, 4)), "problem is of pictures of 8x8 with 3 channels"),
        (Problem(Identity(), torch.zeros(3, 3, 64, 64)), "3 measurements for 1 pictures"),
        (Problem(Identity(), torch.zeros(1, 1, 64, 64)), "pictures with 1 channel"),
    ],
)
def test_a_problem_of_other_pictures(problem: Problem, told: str) -> None:
    made = tiny()
    asked = []
    made.pipe.transformer.register_forward_hook(lambda *_: asked.append(1))
    with pytest.raises(ConfigError, match=told):
        restored(made, problem)
    assert not asked


def test_schedulers_that_are_refused() -> None:
    problem = simulated(downsample(2), torch.zeros(1, 3, 64, 64))
    for cls, told in ((FlowMatchHeunDiscreteScheduler, "asks more than once for a step"), (DDIMScheduler, "is for flow models")):
        made = tiny()
        made.pipe.scheduler = cls()
        with pytest.raises(Unsupported, match=told):
            restored(made, problem)


def test_models_that_are_no_flows_are_refused() -> None:
    made = importlib.import_module("diffgraft_pipelines.tiny.sd").make("StableDiffusionPipeline")
    with pytest.raises(Unsupported):
        load_pipeline(made.pipe, plugins={"flair": {"problem": simulated(downsample(2), torch.zeros(1, 3, 64, 64))}})


def test_a_curve_that_is_none() -> None:
    made = tiny()
    fits = calibrate_call(made.pipe, Flair(), lambda: made.pipe(**made.kwargs)).made_for
    problem = simulated(downsample(2), torch.zeros(1, 3, 64, 64))
    for loss, told in ((torch.ones(1), "two at least"), (torch.tensor([1.0, -1.0]), "outside of"), (torch.ones(3, 2), "has shape")):
        with pytest.raises(ArtefactMismatch, match=told):
            load_pipeline(made.pipe, plugins={"flair": {"problem": problem, "artefact": Artefact(fits, {"loss": loss}, {"pictures": 1})}})


def test_nothing_to_measure_on() -> None:
    with pytest.raises(ConfigError, match="one picture at least"):
        measured_on(tiny().pipe, [])
    made = tiny()
    with pytest.raises(ConfigError, match="give pictures of the size that the call says"):
        measured_on(made.pipe, [(torch.zeros(3, 32, 32), made.kwargs)])
    with pytest.raises(ConfigError, match="give all calls the same"):
        measured_on(made.pipe, [(torch.zeros(3, 64, 64), {**made.kwargs, "num_inference_steps": steps}) for steps in (3, 4)])


def test_what_is_no_problem() -> None:
    for value, told in (("downsample(2)", "problem = 'downsample"), ({"y": 1}, r"give a Problem\(operator, y, noise\)")):
        with pytest.raises(ConfigError, match=told):
            load_pipeline(tiny().pipe, plugins={"flair": {"problem": value}})


def test_the_defaults_are_the_officials() -> None:
    config = Flair().config
    assert (config.weight, config.lr, config.data_weight, config.data_steps, config.t_min, config.adjust) == (0.5, 1, 1, 15, 0.18, 1)


def test_contract() -> None:
    run_contract("flair", families=["sd3"])


def test_whole_timesteps_are_the_nearest() -> None:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(4)
    t = times(8, 0.18)
    made = even(scheduler, Schedule(scheduler.timesteps, scheduler.sigmas), t)
    assert float((made.timesteps - 1000 * t).abs().max()) <= 0.5


def test_a_problem_of_videos_is_refused() -> None:
    made = tiny()
    load_pipeline(made.pipe, plugins={"flair": {"problem": Problem(TemporalMean(3), torch.zeros(1, 3, 3, 64, 64))}})
    with pytest.raises(ConfigError, match="is of videos"):
        made.pipe(**made.kwargs)
