"""hspace_directions: its pure functions against singular value decompositions and DDIM written out, tiny pipelines, the contract."""

from __future__ import annotations

import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, Plugin, Unsupported, load_pipeline, unload
from diffgraft.methods.calibration import calibrate_call
from diffgraft.testing import Case, contract_sample
from diffgraft_hspace_directions import HSpaceDirections, __version__, difference
from diffgraft_hspace_directions.edit import random_unit
from diffgraft_hspace_directions.method import direction_level, orthonormal, pca, same_sense, singular_directions, stretch
from diffgraft_pipelines.tiny import make
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

NAME = "hspace_directions"
CASES = contract_sample(NAME, __version__)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case) -> None:
    case.run()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# principal components -------------------------------------------------------------------------------------------------------------


def test_pca_is_that_of_the_svd():
    h = normal(3, 9, 1, 4, 2, 2)
    found = pca(h, 5)
    assert found.unit.shape == (5, 3, 1, 4, 2, 2)
    for t in range(3):
        X = (h[t] - h[t].mean(0)).flatten(1)
        _, S, Vt = torch.linalg.svd(X, full_matrices=False)
        torch.testing.assert_close(found.std[:, t], S[:5] / 8**0.5, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.share[:, t], S[:5] ** 2 / (S**2).sum(), rtol=1e-9, atol=1e-9)
        along = (found.unit[:, t].flatten(1) * Vt[:5]).sum(1)
        torch.testing.assert_close(along.abs(), torch.ones(5, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert bool(((found.unit * found.unit[:, :1]).flatten(2).sum(2) >= 0).all()), "one sense at all steps"


def test_pca_of_trajectories_is_that_of_all_steps_together():
    h = normal(4, 7, 1, 3, 2, 2)
    found = pca(h, 3, together=True)
    X = (h - h.mean(1, keepdim=True)).movedim(1, 0).flatten(1)
    _, S, Vt = torch.linalg.svd(X, full_matrices=False)
    torch.testing.assert_close(found.std, (S[:3] / 6**0.5)[:, None].expand(-1, 4), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((found.unit.flatten(1) * Vt[:3]).sum(1).abs(), torch.ones(3, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("together", [False, True])
def test_pca_says_nothing_behind_the_rank(together):
    h = normal(2, 1, 1, 3, 2, 2).repeat(1, 4, 1, 1, 1, 1) + torch.tensor([0.0, 1, 2, 3]).view(1, 4, 1, 1, 1, 1)
    found = pca(h, 3, together)
    assert bool((found.std[0] > 1).all())
    assert float(found.std[1:].abs().max()) == float(found.unit[1:].abs().max()) == 0
    alone = pca(h[:, :1], 3, together)
    assert alone.unit.shape[0] == 1
    assert float(alone.unit.abs().max()) == float(alone.std.max()) == 0


# the Jacobian ---------------------------------------------------------------------------------------------------------------------


def test_subspace_iteration_is_the_svd():
    """A linear f, two samples with matrices of their own."""
    A = normal(2, 12, 8)
    V, sigma = singular_directions(
        lambda v: torch.einsum("noi,ni->no", A, v),
        lambda u: torch.einsum("noi,no->ni", A, u),
        normal(3, 2, 8, seed=1),
        200,
    )
    _, S, Vt = torch.linalg.svd(A)
    torch.testing.assert_close(sigma, S[:, :3].mT, rtol=1e-6, atol=1e-6)
    along = torch.einsum("kni,nki->kn", V, Vt[:, :3])
    torch.testing.assert_close(along.abs(), torch.ones(3, 2, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_one_direction_is_the_power_iteration():
    A, v = normal(6, 5), normal(1, 1, 5, seed=1)
    found, _ = singular_directions(lambda x: x @ A.mT, lambda u: u @ A, v, 3)
    by_hand = v[0, 0]
    for _ in range(3):
        by_hand = A.mT @ (A @ by_hand)
        by_hand = by_hand / by_hand.norm()
    torch.testing.assert_close(found[0, 0], by_hand, rtol=1e-12, atol=1e-12)


def test_signs():
    V = orthonormal(normal(2, 3, 6))
    torch.testing.assert_close(same_sense(-V, V), V)
    assert bool((same_sense(V, None).gather(2, V.abs().argmax(2, keepdim=True)) > 0).all())


# tiny pipelines -------------------------------------------------------------------------------------------------------------------

PIXEL = "DDIMPipeline"
SD = "StableDiffusionPipeline"


def plain(name: str = PIXEL, scheduler: type = DDIMScheduler, **config):
    made = make(name)
    made.pipe.scheduler = scheduler.from_config(made.pipe.scheduler.config, **{"clip_sample": False, **config})
    made.pipe.set_progress_bar_config(disable=True)
    return made


def run(made, plugin: Plugin | None = None, steps: int = 3, seed: int = 0, **more):
    if plugin is not None:
        load_pipeline(made.pipe, plugins=[plugin])
    given = {**made.kwargs, "num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed), **more}
    given["output_type"] = "np" if "Stable" not in type(made.pipe).__name__ else "latent"
    out = torch.as_tensor(made.pipe(**given)[0])
    report = made.pipe.plugins.report() if plugin is not None else None
    if plugin is not None:
        unload(made.pipe)
    return out, report


def artefact_of(made, number: int = 4, steps: int = 3, **knobs):
    return calibrate_call(made.pipe, HSpaceDirections(**knobs), lambda: run_plain(made, number, steps))


def run_plain(made, number, steps):
    batch = {"batch_size": number} if "prompt" not in made.kwargs else {"prompt": [f"picture {i}" for i in range(number)]}
    if "negative_prompt" in made.kwargs and "prompt" in batch:
        batch["negative_prompt"] = [""] * number
    given = {**made.kwargs, **batch, "num_inference_steps": steps, "generator": torch.Generator().manual_seed(5)}
    made.pipe(**given)


class Watched(Plugin):
    """Keeps what the mid block hands to the rest of the network, from outside of the plugin."""

    name = "watched"
    paper = HSpaceDirections.paper
    families = ("*",)
    neutral = {}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.h = []

    def select_blocks(self, blocks):
        return [block for block in blocks if block.kind == "mid"]

    def block(self, call, next):
        self.h.append(next(call))
        return self.h[-1]


def first_h(made, plugin=None, **more):
    watched = Watched()
    load_pipeline(made.pipe, plugins=[watched, *([plugin] if plugin else [])])
    made.pipe(**{**made.kwargs, "num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), **more})
    unload(made.pipe)
    return watched.h[0]


def test_the_calibration_sees_h_and_a_step_adds_gamma_std_u():
    made = plain()
    artefact = artefact_of(made, number=5)
    h = first_h(made, batch_size=5, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(artefact.tensors["mean"][0, 0], h.mean(0), rtol=1e-4, atol=1e-5)
    for source in ("pca", "random"):
        edited = first_h(made, HSpaceDirections(artefact=artefact, strength=2.5, component=1, source=source))
        delta = edited - first_h(made)
        std, u = artefact.tensors["std"][1, 0], artefact.tensors["components"][1, 0]
        torch.testing.assert_close(delta[0].norm(), 2.5 * std, rtol=1e-3, atol=1e-4)
        if source == "pca":
            torch.testing.assert_close(delta, 2.5 * std * u, rtol=1e-3, atol=1e-4)
        else:
            torch.testing.assert_close(delta[0] / delta.norm(), random_unit(delta.shape, 0)[0, 0], rtol=1e-3, atol=1e-4)


def test_plus_and_minus_are_opposite_in_h():
    made = plain()
    h = first_h(made)
    plus, minus = (first_h(made, HSpaceDirections(source="random", unit="norm", strength=s)) - h for s in (0.5, -0.5))
    torch.testing.assert_close(plus, -minus, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plus.norm(), 0.5 * h.norm())


@pytest.mark.parametrize("knobs", [{"source": "jacobian"}, {"source": "random", "unit": "norm", "mode": "asyrp"}, {}])
def test_strength_0_is_the_plain_pipeline(knobs):
    made = plain()
    assert torch.equal(run(made, HSpaceDirections(**knobs, strength=0))[0], run(made)[0])


def test_branches_and_the_part_of_the_run():
    made = plain(SD)
    h = first_h(made)
    both = first_h(made, HSpaceDirections(source="random", unit="norm")) - h
    assert bool((both.flatten(1).norm(dim=1) > 0.1).all())
    uncond, cond = (first_h(made, HSpaceDirections(source="random", unit="norm", branches="cond")) - h).chunk(2)
    assert float(uncond.abs().max()) == 0
    torch.testing.assert_close(cond, both.chunk(2)[1])
    late = HSpaceDirections(source="random", unit="norm", begin=0.5)
    assert torch.equal(first_h(made, late), h)
    _, report = run(made, late, steps=4)
    assert report.plugins[NAME].counts["edited"] == {"both": 2}


def test_given_directions_and_the_difference_of_two_groups():
    made = plain()
    one, other = artefact_of(made), artefact_of(made, number=2)
    n = difference(one, other)
    assert n.shape == one.tensors["mean"].shape
    delta = first_h(made, HSpaceDirections(source="given", direction=n, strength=2)) - first_h(made)
    torch.testing.assert_close(delta, 2 * n[0], rtol=1e-3, atol=1e-4)
    same = first_h(made, HSpaceDirections(source="given", direction=n[0, 0], strength=2)) - first_h(made)
    torch.testing.assert_close(same, delta)


def test_jacobian_of_a_pipeline():
    """The direction that comes out is the first right singular vector of d eps / d h, taken column by column."""
    made = plain()
    model = made.pipe.unet.double()
    kept = {}
    hook = model.mid_block.register_forward_hook(lambda m, args, out: kept.get("h", out) if kept.get("on") else kept.update(h=out))
    x, t = normal(1, 3, *[made.pipe.unet.config.sample_size] * 2), torch.tensor(600)
    with torch.no_grad():
        model(x, t)
    h = kept["h"].detach()
    kept["on"] = True

    def of(z):
        kept["h"] = z.view(h.shape)
        return model(x, t).sample.flatten()

    J = torch.autograd.functional.jacobian(of, h.flatten())
    hook.remove()
    _, S, Vt = torch.linalg.svd(J)
    found = []

    class AtPoint(Plugin):
        name, paper, families, neutral = "at_point", HSpaceDirections.paper, ("*",), {}

        def denoise(self, call, next):
            return next(call.replace(sample=x, timestep=t))

    plugin = HSpaceDirections(source="jacobian", iterations=60, strength=1e-6, component=1, end=0.4)
    load_pipeline(made.pipe, plugins=[AtPoint(), plugin])
    original = plugin.edit
    plugin.edit = lambda call, shared: found.append(original(call, shared)) or found[-1]
    made.pipe(**{**made.kwargs, "num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)})
    records = made.pipe.plugins.report()
    unload(made.pipe)
    edit = found[0]
    torch.testing.assert_close(edit.size.double(), S[1:2], rtol=1e-5, atol=1e-6)
    along = (edit.unit.double().flatten() * Vt[1]).sum().abs()
    torch.testing.assert_close(along, torch.ones((), dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert records.plugins[NAME].counts["Jacobians"] == {"cond": 2}


def test_what_it_costs():
    made = plain(SD)
    _, report = run(made, HSpaceDirections(source="random", unit="norm", mode="asyrp"))
    assert report.forwards == {"both": 6}, "asyrp: two forwards a step"
    _, report = run(made, HSpaceDirections(source="random", unit="norm"))
    assert report.forwards == {"both": 3}, "symmetric: none"
    _, report = run(made, HSpaceDirections(source="jacobian", component=1, iterations=2, every=2))
    fallbacks = "forward mode" in str(report.plugins[NAME].notes)
    assert report.forwards["cond"] == 2 * (1 + 2 * 2 * 2 + 2) or fallbacks, "1 + (2 iterations + 1)(k + 1), at 2 of 3 steps"


# Asyrp ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_asyrp_is_the_step_of_the_paper(eta):
    x, e1, e2 = (normal(5, seed=i) for i in range(3))
    a, a_next = (torch.tensor(v, dtype=torch.float64).sqrt() for v in (0.3, 0.6))
    s, s_next = (1 - a * a).sqrt(), (1 - a_next * a_next).sqrt()
    d = direction_level(a, s, a_next, s_next, eta)
    sigma = eta * ((1 - a_next**2) / (1 - a**2) * (1 - a**2 / a_next**2)).sqrt()  # DDIM, eq. 16
    torch.testing.assert_close(d, (1 - a_next**2 - sigma**2).sqrt())
    e = e2 + stretch(a, s, a_next, d) * (e1 - e2)
    paper = a_next * (x - s * e1) / a + d * e2
    torch.testing.assert_close(a_next * (x - s * e) / a + d * e, paper)


def clean_and_noise(x, out, a, s, kind):
    r = (a * a + s * s) ** 0.5
    x0 = {"epsilon": (x - s * out) / a, "v_prediction": (a * x / r - s * out) / r, "sample": out}[kind]
    return x0, (x - a * x0) / s


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("scheduler", "eta"), [(DDIMScheduler, 0.0), (DDIMScheduler, 0.6), (EulerDiscreteScheduler, 0.0)])
def test_asyrp_in_a_pipeline(kind, scheduler, eta):
    """Steps written out from the two predictions that the U-Net gave."""
    made = plain(SD, scheduler, prediction_type=kind, set_alpha_to_one=False)
    asked, steps = [], []

    class Steps(Plugin):
        name, paper, families, neutral = "steps", HSpaceDirections.paper, ("*",), {}

        def denoise(self, call, next):
            asked.append(next(call))
            return asked[-1]

        def step(self, call, next):
            out = next(call)
            steps.append((call.sample, call.step.t, call.step.sigma, out.sample))
            return out

    extra = {"eta": eta} if eta else {}
    load_pipeline(made.pipe, plugins=[HSpaceDirections(source="random", unit="norm", strength=3, mode="asyrp"), Steps()])
    made.pipe(**{**made.kwargs, "num_inference_steps": 3, "output_type": "latent", "generator": torch.Generator().manual_seed(0), **extra})
    unload(made.pipe)
    scale = made.kwargs.get("guidance_scale", 7.5)
    combined = [u + scale * (c - u) for u, c in (each.double().chunk(2) for each in asked)]
    assert len(asked) == 2 * len(steps)
    for i, (x, t, _, after) in enumerate(steps):
        if scheduler is EulerDiscreteScheduler:
            sigmas = made.pipe.scheduler.sigmas.double()
            a, a_next, s, s_next = 1.0, 1.0, sigmas[i], sigmas[i + 1]
        else:
            abar = made.pipe.scheduler.alphas_cumprod.double()
            now, then = abar[t], abar[steps[i + 1][1]] if i + 1 < len(steps) else made.pipe.scheduler.final_alpha_cumprod.double()
            a, a_next, s, s_next = now.sqrt(), then.sqrt(), (1 - now).sqrt(), (1 - then).sqrt()

        clean, _ = clean_and_noise(x.double(), combined[2 * i], a, s, kind)
        _, eps = clean_and_noise(x.double(), combined[2 * i + 1], a, s, kind)
        var = (s_next / s) ** 2 * (1 - (a / a_next) ** 2)
        mean = a_next * clean + (s_next**2 - eta**2 * var) ** 0.5 * eps
        if eta == 0:
            torch.testing.assert_close(after.double(), mean, rtol=2e-3, atol=2e-3 * float(mean.abs().max()))
        elif i + 1 < len(steps):
            z = (after.double() - mean) / (eta * var**0.5)
            assert 0.7 < float(z.std()) < 1.3, "what is left is the noise"


GRIDS = [("trailing", 6), ("trailing", 7), ("trailing", 30), ("linspace", 5), ("linspace", 7), ("linspace", 20), ("leading", 7)]


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize(("spacing", "n"), GRIDS)
def test_asyrp_goes_where_ddim_goes(spacing, n, to_one):
    """To t - T // n, which is not the schedule's next timestep on these grids: each step from two predictions, in float64."""
    made = plain(timestep_spacing=spacing, set_alpha_to_one=to_one)
    asked, steps = [], []

    class Steps(Plugin):
        name, paper, families, neutral = "steps", HSpaceDirections.paper, ("*",), {}

        def denoise(self, call, next):
            asked.append(normal(*next(call).shape, seed=len(asked)))  # far apart, so that rounding hides nothing
            return asked[-1].float()

        def step(self, call, next):
            out = next(call)
            steps.append((call.sample.double(), int(call.step.t), out.sample.double()))
            return out

    load_pipeline(made.pipe, plugins=[HSpaceDirections(source="random", unit="norm", strength=3, mode="asyrp"), Steps()])
    made.pipe(**{**made.kwargs, "num_inference_steps": n, "generator": torch.Generator().manual_seed(0)})
    unload(made.pipe)
    abar = made.pipe.scheduler.alphas_cumprod.double()
    end = torch.ones((), dtype=torch.float64) if to_one else abar[0]
    assert len(steps) == n
    for i, (x, t, after) in enumerate(steps):
        edited, e = asked[2 * i : 2 * i + 2]
        now, then = abar[t], abar[t - 1000 // n] if t >= 1000 // n else end
        (a, s), (a_next, s_next) = ((each.sqrt(), (1 - each).sqrt()) for each in (now, then))
        paper, plain_step = (a_next * (x - s * clean) / a + s_next * e for clean in (edited, e))
        if now == then:  # the step that stays where it is: the plain one
            torch.testing.assert_close(after, x, rtol=1e-6, atol=1e-6)
        else:
            assert float((after - paper).norm() / (paper - plain_step).norm()) < 2e-3


@pytest.mark.parametrize(
    ("scheduler", "config"),
    [
        (DDIMScheduler, {}),
        (DDIMScheduler, {"timestep_spacing": "linspace", "set_alpha_to_one": False}),
        (EulerDiscreteScheduler, {}),
        (EulerDiscreteScheduler, {"final_sigmas_type": "sigma_min"}),
    ],
)
def test_asyrp_with_equal_predictions_is_the_plain_run(scheduler, config):
    """Also where the last step stays at its noise level, and a random direction is finite there."""
    made = plain(SD, scheduler, **config)
    shape = first_h(made).shape[1:]
    nothing = HSpaceDirections(source="given", direction=torch.zeros(shape), mode="asyrp")
    without = run(made)[0]
    assert torch.equal(run(made, nothing)[0], without)
    moved = run(made, HSpaceDirections(source="random", unit="norm", mode="asyrp"))[0]
    assert bool(moved.isfinite().all())
    assert not torch.equal(moved, without)


# the forbidden toy ----------------------------------------------------------------------------------------------------------------


def test_a_random_direction_of_the_same_norm_is_at_hand_and_is_no_component():
    """The control that every claim needs: same norm at each step, and no part of what calibration found."""
    made = plain()
    artefact = artefact_of(made, number=4)
    h = first_h(made)
    found = [first_h(made, HSpaceDirections(artefact=artefact, source=source, strength=5, seed=3)) - h for source in ("pca", "random")]
    torch.testing.assert_close(found[0].norm(), found[1].norm(), rtol=1e-3, atol=1e-5)
    assert float(torch.nn.functional.cosine_similarity(found[0].flatten(), found[1].flatten(), dim=0).abs()) < 0.3


# bad input ------------------------------------------------------------------------------------------------------------------------


def test_a_unet_without_a_mid_block():
    made = plain()
    made.pipe.unet.mid_block = None
    with pytest.raises(Unsupported, match="no mid block"):
        load_pipeline(made.pipe, plugins=[HSpaceDirections(source="random", unit="norm")])
    made = make("DiTPipeline")
    with pytest.raises(Unsupported, match="hspace_directions"):
        load_pipeline(made.pipe, plugins=[HSpaceDirections()])


def test_asyrp_wants_a_first_order_step_without_clipping():
    with pytest.raises(Unsupported, match="PNDMScheduler"):
        load_pipeline(plain(SD, PNDMScheduler).pipe, plugins=[HSpaceDirections(source="jacobian", mode="asyrp")])
    with pytest.raises(Unsupported, match="clip_sample=False"):
        load_pipeline(plain(clip_sample=True).pipe, plugins=[HSpaceDirections(source="jacobian", mode="asyrp")])


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"begin": 0.6, "end": 0.2}, "begin"),
        ({"source": "given"}, "direction"),
        ({"direction": torch.zeros(2, 2, 2)}, "given"),
        ({"source": "given", "direction": torch.zeros(2)}, r"\[C, H, W\]"),
        ({"source": "given", "direction": torch.full((2, 2, 2), float("nan"))}, "finite"),
        ({"strength": float("nan")}, "strength"),
        ({"strenght": 1}, "strength"),
        ({"strength": True}, "strength"),
    ],
)
def test_knobs_that_make_no_sense(knobs, says):
    with pytest.raises(ConfigError, match=says):
        HSpaceDirections(**knobs)


def test_artefacts_that_do_not_do():
    made = plain()
    for knobs in ({}, {"source": "random"}):
        with pytest.raises(ConfigError, match="diffgraft calibrate hspace_directions"):
            load_pipeline(made.pipe, plugins=[HSpaceDirections(**knobs)])
    few, one = artefact_of(made, number=3), artefact_of(made, number=1)
    with pytest.raises(ConfigError, match="holds 0 to 1"):
        load_pipeline(made.pipe, plugins=[HSpaceDirections(artefact=few, component=2)])
    with pytest.raises(ConfigError, match="one sample"):
        load_pipeline(made.pipe, plugins=[HSpaceDirections(artefact=one)])
    with pytest.raises(ArtefactMismatch, match="steps: made for 3"):
        run(made, HSpaceDirections(artefact=few), steps=5)


def test_directions_of_another_size():
    made = plain()
    C, H, W = first_h(made).shape[1:]
    with pytest.raises(ConfigError, match=rf"direction of shape \[{C + 1}, {H}, {W}\]"):
        load_pipeline(made.pipe, plugins=[HSpaceDirections(source="given", direction=torch.zeros(C + 1, H, W))])
    for shape, says in (((2, C, H, W), "2 steps"), ((C, H + 1, W), rf"direction is for .*{H + 1}.* mid block gave \({C}, {H}, {W}\)")):
        with pytest.raises(ConfigError, match=says):
            run(made, HSpaceDirections(source="given", direction=torch.zeros(shape)))
        unload(made.pipe)


def test_a_jacobian_has_no_more_directions_than_h_has_numbers():
    made = plain(SD)
    most = first_h(made)[0].numel()
    assert most < 255
    with pytest.raises(ConfigError, match=f"component = 255: .* 0 to {most - 1}"):
        run(made, HSpaceDirections(source="jacobian", component=255, iterations=1))
    unload(made.pipe)


def test_what_does_nothing_is_said():
    made = plain()
    notes = run(made, HSpaceDirections(source="random", unit="norm", component=9, every=2, seed=1))[1].plugins[NAME].notes
    assert "without effect here: component, every (source = 'random', unit = 'norm')" in str(notes)
    _, report = run(made, HSpaceDirections(source="random", unit="norm", begin=0.4, end=0.5))
    assert "nothing is edited: no one of 3 steps" in str(report.plugins[NAME].notes)
    assert "edited" not in report.plugins[NAME].counts
    assert not run(made, HSpaceDirections(source="random", unit="norm", seed=1))[1].plugins[NAME].notes
