"""score_geometry: fields whose Jacobian is known (mixtures, rotations, Gaussians of few dimensions), real pipelines, the contract."""

from __future__ import annotations

import pytest
import torch
from diffgraft import ConfigError, Unsupported, load_pipeline
from diffgraft.methods.predictions import SignalNoise, levels_at
from diffgraft.testing import Case, contract_sample
from diffgraft_pipelines.tiny import make
from diffgraft_score_geometry import ScoreGeometry, __version__
from diffgraft_score_geometry.method import asymmetry, leading, parts, score_dimension, score_spectrum, singular_values, trace_dimension
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from PIL import Image

CASES = contract_sample("score_geometry", __version__)
NAME = "score_geometry"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case) -> None:
    case.run()


# fields whose Jacobian is known ---------------------------------------------------------------------------------------------------


class Gaussian:
    """eps of data N(0, v P), P the projection onto k directions (all of them by default), on samples with levels a and s."""

    def __init__(self, d, k=None, v=1.0, seed=100):
        self.v = v
        draw = torch.randn(d, d if k is None else k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.basis = torch.linalg.qr(draw).Q

    def gain(self, levels):
        a, s = levels
        return a * a * self.v / (a * a * self.v + s * s)

    def eps(self, x, levels):
        flat = x.flatten(1)
        basis = self.basis.to(flat)
        return ((flat - flat @ basis @ basis.T * self.gain(levels)) / levels.s).view_as(x)


class Mixture:
    """eps of an equal mixture of N(mean, v I)."""

    def __init__(self, d, number=3, v=0.3):
        self.means, self.v = torch.randn(number, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / d**0.5, v

    def eps(self, x, levels):
        (a, s), flat, means = levels, x.flatten(1), self.means.to(x)
        total = a * a * self.v + s * s
        apart = flat[:, None] - a * means
        weights = (-apart.square().sum(-1) / (2 * total)).softmax(1)
        return (s * (weights[..., None] * apart).sum(1) / total).view_as(x)


def rotated(x):
    """R x, R orthogonal and antisymmetric: the halves of the flattened sample exchanged, one with a minus."""
    first, second = x.flatten(1).chunk(2, 1)
    return torch.cat([-second, first], 1).view_as(x)


def as_output(x, eps, levels, kind):
    """What a network of this kind would have to say."""
    a, s = levels
    x0 = (x - s * eps) / a
    if kind == "v_prediction":
        return (a * eps - s * x0) / (a * a + s * s).sqrt()
    return {"epsilon": eps, "sample": x0, "flow": eps - x0}[kind]


def with_field(name, eps, kind="epsilon", scheduler=None, dtype=torch.float64):
    """A tiny pipeline whose denoiser is ``eps(x, levels)``, wherever its scheduler keeps its samples."""
    made = make(name)
    pipe = made.pipe
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(
            pipe.scheduler.config, prediction_type=kind, timestep_spacing="leading", steps_offset=0, clip_sample=False
        )
    model = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    model.to(dtype)
    if hasattr(model.config, "sample_size") and type(pipe).__name__.startswith("DD"):
        model.register_to_config(sample_size=SIDE)
    own = levels_of_timesteps(made)

    def forward(*args, **kwargs):
        x = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        levels, scale = own(t)
        x = x * scale
        return (as_output(x, eps(x, levels), levels, kind),)

    model.forward = forward
    return made


def levels_of_timesteps(made):
    """timestep -> levels of the samples and what the denoiser's input was divided by."""
    from diffgraft.installed import registry

    family = next(f for f in registry.families().values() if type(made.pipe).__name__ in f.pipelines)

    def levels(t):
        scheduler, t = made.pipe.scheduler, t.flatten()[0] if isinstance(t, torch.Tensor) else torch.tensor(t)
        if family.prediction == "flow":
            s = t * (1 if family.timestep_scale != 1 else 1e-3)
            return SignalNoise(1 - s.double(), s.double()), 1.0
        sigmas = getattr(scheduler, "sigmas", None)
        sigma = None if sigmas is None else sigmas[(scheduler.timesteps == t).nonzero()[0, 0]]
        found = levels_at(family, scheduler, t, sigma, torch.device("cpu"))
        found = SignalNoise(found.a.double(), found.s.double())
        return found, (1 + found.s**2).sqrt() if sigma is not None else 1.0

    return levels


def records(made, steps=4, plugin=None, **more):
    """The plugin's records of one run without guidance."""
    pipe = made.pipe
    if plugin is not None:
        load_pipeline(pipe, plugins=[plugin])
    scale = {} if type(pipe).__name__ in ("DDIMPipeline", "DDPMPipeline") else {"guidance_scale": 1.0}
    given = {**made.kwargs, "num_inference_steps": steps, "generator": torch.Generator().manual_seed(0), **scale, **more}
    if type(pipe).__name__ not in ("DDIMPipeline", "DDPMPipeline", "DiTPipeline"):
        given["output_type"] = "latent"
    pipe(**given)
    return pipe.plugins.report().plugins[NAME].records


PIXEL, SIDE = "DDIMPipeline", 4
SIZE = 3 * SIDE**2


# conservativity -------------------------------------------------------------------------------------------------------------------


def test_a_mixture_of_gaussians_is_conservative():
    made = with_field(PIXEL, Mixture(SIZE).eps)
    found = records(made, plugin=ScoreGeometry(steps=(0, 1, -1), probes=3), batch_size=2)
    assert found["asymmetry"].shape == (3, 2)
    assert float(found["asymmetry"].max()) < 1e-6
    forwards, backwards = found["pairs"].unbind(2)
    torch.testing.assert_close(forwards, backwards, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strength", [0.01, 0.5, 3.0])
def test_a_rotation_gives_its_known_value(strength):
    """eps = x s / (a^2 + s^2) + c R x: |J - J^T| / |J + J^T| = c (a^2 + s^2) / s, for every probe."""
    made = with_field(PIXEL, lambda x, levels: Gaussian(SIZE).eps(x, levels) + strength * rotated(x))
    found = records(made, plugin=ScoreGeometry(steps=(0, 2), probes=2))
    a = made.pipe.scheduler.alphas_cumprod[made.pipe.scheduler.timesteps[[0, 2]]].sqrt()
    torch.testing.assert_close(found["asymmetry"][:, 0], strength / (1 - a * a).sqrt().double(), rtol=1e-6, atol=0)
    assert float(found["asymmetry_error"].max()) < 1e-9


def test_a_rotated_mixture_against_its_whole_jacobian():
    """The ratio of the Frobenius norms, within the error that is told, and with an error of the size of 1 / sqrt(2 probes d)."""
    d, levels = 24, SignalNoise(torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64))
    mixture, mix = Mixture(d, v=0.05), torch.randn(d, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / d

    def eps(x):
        return mixture.eps(x, levels) + x @ mix.T

    x = torch.randn(1, d, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda z: eps(z)[0], x)[:, 0]
    exact = float((jacobian - jacobian.T).norm() / (jacobian + jacobian.T).norm())
    u = torch.randn(4000, d, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    squares = torch.stack([torch.stack(parts(v[None] @ jacobian.T, v[None] @ jacobian)) for v in u])
    anti, sym = squares.unbind(1)
    ratio, error = asymmetry(anti, sym)
    assert abs(float(ratio) - exact) < 3 * float(error)
    assert float(error) < 0.01 * exact


KINDS = [
    (PIXEL, "epsilon", DDIMScheduler), (PIXEL, "v_prediction", DDIMScheduler), (PIXEL, "sample", DDIMScheduler),
    ("StableDiffusionPipeline", "epsilon", EulerDiscreteScheduler), ("StableDiffusionPipeline", "v_prediction", EulerDiscreteScheduler),
    ("FluxPipeline", "flow", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "scheduler"), KINDS)
def test_every_prediction_says_the_same(name, kind, scheduler):
    """epsilon, v, x0 and flow outputs of one field, on samples of every scale: one asymmetry."""

    def eps(x, levels):
        a, s = levels
        return x * s / (a * a + s * s) + 0.1 * rotated(x) / s

    made = with_field(name, eps, kind, scheduler)
    found = records(made, plugin=ScoreGeometry(steps=(1, 2), probes=2))
    wanted = 0.1 * (1 + 1 / found["level"].double() ** 2)  # c (a^2 + s^2) / s^2
    torch.testing.assert_close(found["asymmetry"][:, 0], wanted, rtol=1e-4, atol=0)


# dimension ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 7])
def test_a_gaussian_of_k_dimensions(k):
    """By all three ways, at the last steps of a run; the trace is a^2 v / (a^2 v + s^2) for each direction."""
    field = Gaussian(SIZE, k)
    made = with_field(PIXEL, field.eps, scheduler=DDIMScheduler)
    found = records(made, 20, ScoreGeometry(steps=(-1,), probes=100, points=4, directions=12), batch_size=2)
    gain = 1 / (1 + found["level"].double() ** 2)
    assert abs(float(found["trace_dimension"][0, 0]) - k * float(gain)) < 4 * (2 * k / 100) ** 0.5
    assert float(found["trace_error"][0, 0]) == pytest.approx((2 * k / 100) ** 0.5, rel=0.4)
    assert found["score_dimension"].tolist() == [[k, k]]
    assert found["flow_dimension"].tolist() == [k, k]
    assert (found["tangent_values"] > 0.5).sum(-1).tolist() == [[k, k]]
    assert float(found["flow_drift"]) < 1e-3
    notes = " ".join(made.pipe.plugins.report().plugins[NAME].notes)
    assert f"dimension by stacked scores {k}, {k}" in notes
    assert f"dimension by the flow's Jacobian {k}, {k}" in notes


def test_the_flow_is_the_product_of_its_steps():
    """A direction of variance v is multiplied by a' a v / n + s' s / n, n = a^2 v + s^2, in each step, one across by s' / s."""
    field, k, steps = Gaussian(SIZE, 2, v=0.5), 2, 9
    made = with_field(PIXEL, field.eps, scheduler=DDIMScheduler)
    found = records(made, steps, ScoreGeometry(steps=(), directions=5, seed=3))
    scheduler = made.pipe.scheduler
    abar = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod[None]]).double()
    a, s = abar.sqrt(), (1 - abar).sqrt()
    n = a * a * 0.5 + s * s
    along = ((a[1:] * a[:-1] * 0.5 + s[1:] * s[:-1]) / n[:-1]).prod()
    draw = torch.Generator().manual_seed(4 * 3 * 1_000_003 + 3)
    columns = torch.stack([torch.randn(3, SIDE, SIDE, generator=draw, dtype=torch.float64).flatten() for _ in range(5)], 1)
    columns /= 5**0.5
    inside = field.basis @ (field.basis.T @ columns)
    wanted = torch.linalg.svdvals(inside * along + (columns - inside) * (s[-1] / s[0]))
    torch.testing.assert_close(found["flow_values"][0], wanted, rtol=1e-4, atol=1e-6)
    assert found["flow_dimension"].tolist() == [k]


def test_singular_values_and_dimension_of_stacked_scores():
    """Gram's eigenvalues are the stack's singular values; the dimension is that of the published rule, len - argmax(fall) - 1."""
    scores = torch.randn(64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.tensor([1.0] * 11 + [0.02] * 5)
    values = score_spectrum((scores.T @ scores)[None], 64)
    torch.testing.assert_close(values[0], torch.linalg.svdvals(scores) / 8, rtol=1e-9, atol=1e-9)
    assert int(score_dimension(values, 64)) == 16 - int((values[0, :-1] - values[0, 1:]).argmax()) - 1 == 5


def test_a_mistake_that_a_network_makes_everywhere_is_no_dimension():
    """One large singular value of the scores' mean: the published rule would say d - 1."""
    normal = torch.tensor([1.0] * 13 + [0.1] * 3)
    scores = (torch.randn(64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + normal.floor()) * normal
    values = score_spectrum((scores.T @ scores)[None], 64)
    assert 16 - int((values[0, :-1] - values[0, 1:]).argmax()) - 1 == 15
    assert int(score_dimension(values, 64)) == 3


def test_where_there_is_nothing_to_count():
    """Every value above the edge, or an overflow in the denoiser: no dimension, and no error of a solver."""
    assert score_dimension(torch.tensor([[9.0, 8.0, 7.0, 6.9], [1.0, 0.9, 0.1, 0.1]]), 64).tolist() == [0, 2]
    columns = torch.ones(3, 2, 4)
    columns[0, 1, 2] = torch.inf
    assert singular_values(columns).isnan().all(1).tolist() == [False, True]
    assert int(leading(singular_values(columns))[1]) == 0
    grams = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    grams[1, 0, 0] = torch.nan
    assert score_dimension(score_spectrum(grams, 1), 1).tolist()[1] == 0


def test_traces_and_leading_values():
    u = torch.randn(500, 2, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pu = u.clone()
    pu[..., 4:] = 0
    trace, error = trace_dimension(u, pu)
    assert (trace - 4).abs().max() < 4 * error.max()
    assert torch.allclose(error, torch.tensor((8 / 500) ** 0.5, dtype=torch.float64), rtol=0.2)
    assert leading(singular_values(pu[:8])).tolist() == [4, 4]
    assert trace_dimension(u[:1], pu[:1])[1].isnan().all(), "one probe knows nothing of its error"
    assert asymmetry(*[torch.ones(1, 2)] * 2)[1].isnan().all()


def test_the_scores_of_a_picture_are_shared_among_the_rows():
    """K points around one picture: as many forwards less as the call has rows, and the same points."""
    field = Gaussian(SIZE, 3)
    picture = (field.basis @ torch.ones(3, dtype=torch.float64)).view(1, 3, SIDE, SIDE)
    seen = {}
    for rows in (1, 4):
        made = with_field(PIXEL, field.eps, scheduler=DDIMScheduler)
        seen[rows] = records(made, 10, ScoreGeometry(probes=0, points=2, picture=picture), batch_size=rows)["score_values"]
        forwards = made.pipe.plugins.report().forwards["cond"] - 10
        assert forwards == 2 * SIZE // rows
    assert seen[1].shape == (1, 1, SIZE)
    torch.testing.assert_close(seen[1], seen[4], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_a_pil_picture_of_any_mode_costs_what_pixels_cost(mode):
    made = make("StableDiffusionPipeline")
    side = made.pipe.unet.config.sample_size * made.pipe.vae_scale_factor
    forwards = []
    for picture in (torch.zeros(1, 3, side, side), Image.new(mode, (side, side))):
        records(made, 2, ScoreGeometry(probes=1, picture=picture))
        report = made.pipe.plugins.report()
        forwards.append(report.forwards)
        assert "no forward mode" not in str(report)
        assert "nan" not in str(report), "one probe has no error"
        made.pipe.plugins.clear()
    assert forwards[0] == forwards[1]


def test_what_is_found_at_a_picture_is_of_the_picture():
    """A mixture of two far Gaussians of 2 and 5 dimensions: around each picture its own."""
    few, many = Gaussian(SIZE, 2), Gaussian(SIZE, 5, seed=101)
    far = torch.ones(1, SIZE, dtype=torch.float64)

    def eps(x, levels):
        shifted = x - levels.a * far.view(1, 3, SIDE, SIDE)
        near = x.flatten(1).mean(1) < 0.5 * levels.a
        return torch.where(near.view(-1, 1, 1, 1), few.eps(x, levels), many.eps(shifted, levels))

    pictures = torch.cat([torch.zeros(1, SIZE, dtype=torch.float64), far]).view(2, 3, SIDE, SIDE)
    made = with_field(PIXEL, eps, scheduler=DDIMScheduler)
    found = records(made, 20, ScoreGeometry(probes=60, points=4, picture=pictures), batch_size=2)
    assert found["score_dimension"].tolist() == [[2, 5]]
    assert (found["tangent_values"] > 0.5).sum(-1).tolist() == [[2, 5]]


# runs -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DDPMPipeline", "StableDiffusionPipeline", "DiTPipeline", "WanPipeline"])
def test_a_sample_alone_has_the_findings_of_a_batch(name):
    """Everybody is asked along the same vectors. A learned variance (DiT) has no say."""
    found = {}
    for rows in (1, 2):
        made = make(name)
        asked = {"DDPMPipeline": {"batch_size": rows}, "DiTPipeline": {"class_labels": [1] * rows}}
        made.kwargs |= asked.get(name, {"prompt": ["a cat"] * rows, "negative_prompt": None})
        generators = [torch.Generator().manual_seed(i) for i in range(rows)]
        found[rows] = records(made, 3, ScoreGeometry(steps=(1,), probes=2), generator=generators)
    torch.testing.assert_close(found[2]["asymmetry"][:, 0], found[1]["asymmetry"][:, 0], rtol=1e-3, atol=1e-4)
    assert found[2]["asymmetry"].shape == (1, 2)


def test_what_it_costs():
    """2 forwards a probe, K a stack (and one for the centre), one more and m a step along the flow; the run's own stay."""
    made = make("StableDiffusionPipeline")
    load_pipeline(made.pipe, plugins=[ScoreGeometry(steps=(0, -1), probes=3)])
    records(made, 4)
    assert made.pipe.plugins.report().forwards == {"cond": 4 + 2 * 2 * 3}
    made.pipe.plugins.configure(NAME, steps=(), directions=2)
    records(made, 4)
    assert made.pipe.plugins.report().forwards == {"cond": 4 + 4 * 3}
    made = with_field(PIXEL, Gaussian(SIZE).eps)
    records(made, 4, ScoreGeometry(probes=0, points=1.5))
    assert made.pipe.plugins.report().forwards == {"cond": 4 + 1 + round(1.5 * SIZE)}


def test_a_run_with_noise_is_told_from_its_flow():
    made = with_field("DDPMPipeline", Gaussian(SIZE, 2).eps)
    found = records(made, 20, ScoreGeometry(steps=(), directions=4))
    assert float(found["flow_drift"]) > 0.5
    assert "not those of its ODE" in str(made.pipe.plugins.report())


def test_another_seed_other_vectors():
    values = [records(make("DDPMPipeline"), 2, ScoreGeometry(probes=1, seed=seed))["antisymmetric"] for seed in (0, 0, 1)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_bad_input():
    made = make("StableDiffusionPipeline")
    for knobs, why in (
        ({"steps": (4,)}, "steps has 4, of a run with 4 steps: 0 to 3"),
        ({"steps": (-5,)}, "steps has -5"),
        ({"picture": torch.zeros(1, 3, 32, 32)}, "give pictures of the call's size"),
        ({"directions": 2}, r"guidance makes another one: turn it off \(guidance_scale=1\)"),
    ):
        load_pipeline(made.pipe, plugins=[ScoreGeometry(**knobs)])
        with pytest.raises((ConfigError, Unsupported), match=why):
            made.pipe(**{**made.kwargs, "num_inference_steps": 4, "output_type": "latent"})
        assert not made.pipe.plugins.report().forwards, "nothing ran before it"
        made.pipe.plugins.clear()
    made.pipe.scheduler = HeunDiscreteScheduler.from_config(made.pipe.scheduler.config)
    load_pipeline(made.pipe, plugins=[ScoreGeometry(directions=2)])
    with pytest.raises(Unsupported, match="several stages"):
        records(made, 4)
    for knobs, key in (
        ({"probes": -1}, "probes"),
        ({"points": -1}, "points"),
        ({"points": 0.5}, "0 for none, or 1 and more"),
        ({"directions": 1}, "0 for none, or 2 and more"),
        ({"steps": 1.5}, "steps"),
        ({"picture": torch.zeros(3, 32, 32)}, "picture"),
        ({"picture": torch.full((1, 3, 32, 32), 255.0)}, "in -1 to 1"),
        ({"picture": torch.zeros(1, 4, 32, 32)}, "picture"),
    ):
        with pytest.raises(ConfigError, match=key):
            ScoreGeometry(**knobs)


def test_gradients_are_needed_only_where_they_are_taken():
    assert "plain_gradients" in ScoreGeometry().effects.needs
    assert "plain_gradients" in ScoreGeometry(steps=(), directions=2).effects.needs
    assert "plain_gradients" not in ScoreGeometry(probes=0, points=4).effects.needs
    assert ScoreGeometry().effects.reads_only
