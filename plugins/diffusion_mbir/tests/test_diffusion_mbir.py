"""DiffusionMBIR against its equations, an exact solution of the problem that ADMM converges to, and loops of its own in plain torch."""

from __future__ import annotations

import importlib
import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffgraft import ConfigError, Effects, Unsupported, load_pipeline
from diffgraft.installed.planner import Part, judge
from diffgraft.methods.measurements import Grey, Identity, Mask, Phase, Radon, TemporalMean, downsample
from diffgraft.methods.operators import Operator
from diffgraft.methods.problems import Problem, simulated
from diffgraft.testing import run_contract
from diffgraft_diffusion_mbir import DiffusionMBIR
from diffgraft_diffusion_mbir.method import Boundary, admm, consistent, descend, dz, dz_back, largest, soft
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from scipy.optimize import lsq_linear

STEPS, DEPTH, SIDE = 6, 5, 16
BOUNDARIES: tuple[Boundary, ...] = ("open", "circular")
KNOBS: dict[str, Any] = {"weight": 0.05, "rho": 0.5, "chunk": 0}


class Nothing(Operator):
    """A = 0."""

    def A(self, x: torch.Tensor) -> torch.Tensor:
        return 0 * x


def tiny(name: str = "DDIMPipeline", module: str = "pixel") -> Any:
    made = importlib.import_module(f"diffgraft_pipelines.tiny.{module}").make(name)
    made.kwargs.update(num_inference_steps=STEPS)
    if module == "pixel":
        made.kwargs.update(batch_size=DEPTH)
    return made


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pictures(n: int = DEPTH, channels: int = 3, side: int = SIDE, seed: int = 5) -> torch.Tensor:
    return drawn(n, channels, side, side, seed=seed, dtype=torch.float32).clamp(-1, 1)


def run(made: Any, knobs: dict[str, Any] | None, seeds: range = range(DEPTH)) -> torch.Tensor:
    """What the run ends at, in the pipeline's range; each slice has a generator of its own."""
    pipe = load_pipeline(made.pipe, plugins={"diffusion_mbir": knobs} if knobs is not None else {})
    output = "latent" if hasattr(pipe, "vae") else "np"
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    try:
        result = pipe(**{**made.kwargs, "output_type": output}, generator=generators)[0]
    finally:
        if knobs is not None:
            pipe.plugins.remove("diffusion_mbir")
    return result if output == "latent" else torch.from_numpy(result).permute(0, 3, 1, 2).float() * 2 - 1


# the maths -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("depth", [1, 2, 7])
def test_the_adjoint_of_dz(boundary: Boundary, depth: int) -> None:
    x, v = drawn(depth, 2, 3, 3), drawn(depth, 2, 3, 3, seed=1)
    torch.testing.assert_close((dz(x, boundary) * v).sum(), (x * dz_back(v, boundary)).sum(), rtol=1e-12, atol=1e-12)
    told = dz(x, boundary)[-1]
    torch.testing.assert_close(told, x[0] - x[-1] if boundary == "circular" else torch.zeros_like(told), rtol=0, atol=0)


def test_soft_is_the_proximal_map_of_the_l1_norm() -> None:
    v = drawn(200)
    grid = torch.linspace(-5, 5, 20001, dtype=torch.float64)
    found = torch.stack([grid[(0.7 * grid.abs() + (grid - each) ** 2 / 2).argmin()] for each in v])
    torch.testing.assert_close(soft(v, 0.7), found, rtol=0, atol=6e-4)


def test_conjugate_gradients_end_at_the_solution() -> None:
    """n steps solve n unknowns, with one step length for the volume as with one a slice; one step is that of steepest descent."""
    mats = drawn(3, 4, 4)
    mats = mats @ mats.transpose(1, 2) + torch.eye(4, dtype=torch.float64)
    b, x = drawn(3, 4, 1), drawn(3, 4, 1, seed=2)
    wanted = torch.from_numpy(np.linalg.solve(mats.numpy(), b.numpy()))
    torch.testing.assert_close(descend(lambda v: mats @ v, b, x, 4, apart=True), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(descend(lambda v: mats @ v, b, x, 14), wanted, rtol=1e-8, atol=1e-8)
    r = b - mats @ x
    torch.testing.assert_close(descend(lambda v: mats @ v, b, x, 1), x + (r * r).sum() / (r * (mats @ r)).sum() * r)
    torch.testing.assert_close(descend(lambda v: mats @ v, mats @ x, x, 3), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("apart", [False, True])
def test_conjugate_gradients_rest_where_only_rounding_is_left(apart: bool) -> None:
    """Of a singular M in float32: steps along rounding errors would leave for ever."""
    a = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(1))
    M = lambda v: a.transpose(1, 2) @ (a @ v)  # noqa: E731
    x = drawn(3, 40, 1, dtype=torch.float32)
    b = M(drawn(3, 40, 1, seed=2, dtype=torch.float32))
    near, far = (descend(M, b, x, steps, apart) for steps in (12, 300))
    torch.testing.assert_close(far, near, rtol=0, atol=1e-4)
    torch.testing.assert_close(M(far), b, rtol=1e-4, atol=1e-3)


def exact(matrix: np.ndarray, y: np.ndarray, lam: float, difference: np.ndarray) -> np.ndarray:
    """min_x  || A x - y ||^2 / 2 + lam || D x ||_1  of a square A, by its dual: least squares over the box | p | <= lam. (scipy)

    x = (AT A)^-1 (AT y - DT p), and p minimises || A^-T (AT y - DT p) ||.
    """
    back = np.linalg.inv(matrix.T)
    p = lsq_linear(back @ difference.T, back @ matrix.T @ y, bounds=(-lam, lam), tol=1e-14).x
    return np.linalg.solve(matrix.T @ matrix, matrix.T @ y - difference.T @ p)


def along_z(boundary: Boundary) -> tuple[Any, Any]:
    return partial(dz, boundary=boundary), partial(dz_back, boundary=boundary)


def line(depth: int, boundary: Boundary) -> np.ndarray:
    """Dz as a matrix, written down by itself."""
    D = np.diff(np.eye(depth), axis=0)
    return D if boundary == "open" else np.vstack([D, np.eye(depth)[0] - np.eye(depth)[-1]])


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("steps", [1, 3])
def test_without_a_denoiser_it_converges_to_least_squares_with_total_variation(boundary: Boundary, steps: int) -> None:
    depth, pixels, lam = 6, 4, 0.4
    a = np.eye(pixels) + 0.3 * np.random.default_rng(0).standard_normal((pixels, pixels))
    y = np.random.default_rng(1).standard_normal((depth, pixels))
    A = torch.from_numpy(a)
    wanted = exact(np.kron(np.eye(depth), a), y.ravel(), lam, np.kron(line(depth, boundary), np.eye(pixels))).reshape(depth, pixels)
    seen = torch.from_numpy(y)
    x = torch.zeros(depth, pixels, dtype=torch.float64)
    d, u = torch.zeros_like(x), torch.zeros_like(x)
    for _ in range(3000):
        x, d, u = admm(x, d, u, lambda v: v @ A.T @ A, seen @ A, *along_z(boundary), lam, 0.8, steps)
    assert np.count_nonzero(np.abs(np.diff(wanted, axis=0)) < 1e-7) >= 3  # slices that total variation has made equal
    np.testing.assert_allclose(x.numpy(), wanted, rtol=0, atol=1e-7)


def test_the_duals_are_what_makes_one_iteration_a_step_enough() -> None:
    """From zero each time, x stays away from the solution that the same number of iterations reaches with them."""
    y = drawn(6, 4)
    wanted = exact(np.eye(24), y.numpy().ravel(), 0.4, np.kron(line(6, "open"), np.eye(4))).reshape(6, 4)
    ends = {}
    for warm in (True, False):
        x, d, u = torch.zeros_like(y), torch.zeros_like(y), torch.zeros_like(y)
        for _ in range(400):
            d, u = (d, u) if warm else (torch.zeros_like(y), torch.zeros_like(y))
            x, d, u = admm(x, d, u, lambda v: v, y, *along_z("open"), 0.4, 0.8, 1)
        ends[warm] = float(np.abs(x.numpy() - wanted).max())
    assert ends[True] < 1e-6
    assert ends[False] > 0.05


def test_the_last_step_explains_what_rows_of_one_pixel_each_have_seen() -> None:
    x, seen = drawn(3, 2, 4, 4), (drawn(4, 4, seed=1) > 0).double()
    mask = Mask(seen).to(torch.device("cpu"), torch.float64)
    y = mask.A(drawn(3, 2, 4, 4, seed=2))
    found = consistent(x, lambda v: mask.AT(mask.A(v)), mask.AT(y))
    torch.testing.assert_close(mask.A(found), y, rtol=0, atol=1e-15)
    torch.testing.assert_close(found * (1 - seen), x * (1 - seen), rtol=0, atol=0)


@pytest.mark.parametrize("operator", [downsample(2), Grey(), Identity()], ids=lambda o: type(o).__name__)
def test_the_last_step_is_exact_where_each_pixel_is_seen_once(operator) -> None:
    x, truth = drawn(2, 3, 4, 4), drawn(2, 3, 4, 4, seed=1)
    y = operator.A(truth)
    found = consistent(x, lambda v: operator.AT(operator.A(v)), operator.AT(y))
    torch.testing.assert_close(operator.A(found), y, rtol=0, atol=1e-14)


def test_the_size_of_an_operator() -> None:
    matrix = torch.randn(6, 6, generator=torch.Generator().manual_seed(3))
    found = largest(lambda v: v @ matrix.T @ matrix, (1, 6), torch.device("cpu"), rounds=300)
    assert float(found) == pytest.approx(float(torch.linalg.svdvals(matrix)[0]) ** 2, rel=1e-3)
    assert float(largest(torch.zeros_like, (1, 6), torch.device("cpu"))) == 1


# runs ------------------------------------------------------------------------------------------------------------------------------------


def in_plain_torch(made: Any, problem: Problem, on: str, k: dict[str, Any], boundary: Boundary = "open", steps: int = 1) -> torch.Tensor:
    """DDIM in its formulas and ADMM on dense matrices along z; every slice's noise from its own generator."""
    pipe = made.pipe
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    draws = [torch.Generator().manual_seed(i) for i in range(DEPTH)]
    x = torch.cat([torch.randn(1, 3, SIDE, SIDE, generator=each) for each in draws])
    D = torch.from_numpy(line(DEPTH, boundary)).float()
    op, y = problem.operator, problem.y

    def along(M: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (M @ v.flatten(1)).reshape(len(M), *v.shape[1:])

    size = largest(lambda v: op.AT(op.A(v)), (1, 3, SIDE, SIDE), torch.device("cpu"))
    lam, rho = k["weight"] * size, k["rho"] * size
    d, u = (torch.zeros(len(D), 3, SIDE, SIDE) for _ in range(2))

    def iteration(v: torch.Tensor) -> torch.Tensor:
        nonlocal d, u
        M = lambda w: op.AT(op.A(w)) + rho * along(D.T @ D, w)  # noqa: E731
        r = op.AT(y) + rho * along(D.T, d - u) - M(v)
        p = r
        for _ in range(steps):
            Mp = M(p)
            alpha = (r * r).sum() / (p * Mp).sum()
            v, new = v + alpha * p, r - alpha * Mp
            p, r = new + (new * new).sum() / (r * r).sum() * p, new
        w = along(D, v) + u
        d = w.sign() * (w.abs() - lam / rho).clamp(min=0)
        u = w - d
        return v

    for i, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            e = pipe.unet(x, t).sample
        abar = scheduler.alphas_cumprod[t]
        last = i == STEPS - 1
        after = scheduler.alphas_cumprod[scheduler.timesteps[i + 1]] if not last else torch.tensor(1.0)
        x0 = ((x - (1 - abar).sqrt() * e) / abar.sqrt()).clamp(-1, 1)
        if on == "x0":
            x = after.sqrt() * iteration(x0) + (1 - after).sqrt() * e
        else:
            x = after.sqrt() * iteration((after.sqrt() * x0 + (1 - after).sqrt() * e) / after.sqrt())
    ones = op.AT(op.A(torch.ones_like(x)))
    x = torch.where(ones > 0, x + op.AT(y - op.A(x)) / ones.clamp(min=1e-9), x)
    return x.clamp(-1, 1)


@pytest.mark.parametrize("on", ["x0", "xt"])
@pytest.mark.parametrize(
    ("operator", "boundary", "steps"),
    [(downsample(2), "open", 1), (Mask(0.5), "circular", 1), (Radon(3), "open", 3)],
    ids=["downsample", "mask", "radon"],
)
def test_a_run_is_the_loop(operator, boundary: Boundary, steps: int, on: str) -> None:
    made = tiny()
    problem = simulated(operator, pictures())
    wanted = in_plain_torch(made, problem, on, KNOBS, boundary, steps)
    found = run(made, {**KNOBS, "problem": problem, "on": on, "boundary": boundary, "cg_steps": steps})
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("on", ["x0", "xt"])
@pytest.mark.parametrize("name", ["DDIMPipeline", "DDPMPipeline"])
def test_nothing_measured_and_no_total_variation_is_the_plain_run(name: str, on: str) -> None:
    made = tiny(name)
    problem = Problem(Nothing(), torch.zeros(DEPTH, 3, SIDE, SIDE))
    assert torch.equal(run(made, {"problem": problem, "weight": 0.0, "on": on}), run(made, None))


@pytest.mark.parametrize(("name", "module"), [("StableDiffusionPipeline", "sd"), ("FluxPipeline", "flux")])
def test_the_same_through_an_autoencoder(name: str, module: str) -> None:
    made = tiny(name, module)
    problem = Problem(Nothing(), torch.zeros(1, 3, 64, 64))
    assert torch.equal(run(made, {"problem": problem, "weight": 0.0}, range(1)), run(made, None, range(1)))


def test_with_a_denoiser_that_changes_nothing_a_run_ends_at_least_squares_with_total_variation() -> None:
    """A U-Net that finds no noise anywhere: DDIM then only rescales, and what is left of the run is ADMM."""
    made = tiny()
    made.pipe.scheduler = DDIMScheduler.from_config(made.pipe.scheduler.config, clip_sample=False)
    made.kwargs["num_inference_steps"] = 500
    made.pipe.unet.forward = lambda sample, *args, **kwargs: (torch.zeros_like(sample),)
    y = pictures(seed=7)[:, :, :1, :1].expand(-1, -1, SIDE, SIDE) * 0.5
    wanted = exact(np.eye(3 * DEPTH), y[:, :, 0, 0].double().numpy().ravel(), 0.1, np.kron(line(DEPTH, "open"), np.eye(3)))
    found = run(made, {"problem": Problem(Identity(), y.clone()), "weight": 0.1, "rho": 0.5, "consistency": False})
    np.testing.assert_allclose(found[:, :, 3, 4].numpy().ravel(), wanted, rtol=0, atol=1e-4)


def test_one_iteration_a_step_with_duals_of_the_run(monkeypatch) -> None:
    seen: list[tuple[Any, Any]] = []

    def counted(x, d, u, *args):
        out = admm(x, d, u, *args)
        seen.append(((d, u), out[1:]))
        return out

    monkeypatch.setattr("diffgraft_diffusion_mbir.admm", counted)
    made = tiny()
    problem = simulated(downsample(2), pictures())
    for _ in range(2):  # the second run begins with zeros again
        seen.clear()
        run(made, {**KNOBS, "problem": problem})
        assert len(seen) == STEPS
        assert not any(bool(each.any()) for each in seen[0][0])
        assert all(given is kept for (_, out), (d, _) in itertools.pairwise(seen) for given, kept in zip(d, out, strict=True))
        assert bool(seen[-1][1][0].any())


def test_slices_alone_are_what_a_volume_of_one_gives_and_coupled_ones_are_not() -> None:
    made = tiny()
    truth = pictures()
    alone = []
    for i in range(DEPTH):
        made.kwargs["batch_size"] = 1
        alone.append(run(made, {"problem": simulated(downsample(2), truth[i : i + 1]), "weight": 0.0}, range(i, i + 1)))
    made.kwargs["batch_size"] = DEPTH
    problem = simulated(downsample(2), truth)
    torch.testing.assert_close(run(made, {"problem": problem, "weight": 0.0}), torch.cat(alone), rtol=0, atol=1e-4)
    assert float((run(made, {**KNOBS, "problem": problem}) - torch.cat(alone)).abs().max()) > 0.01
    assert DiffusionMBIR(**KNOBS, problem=problem).effects.couples_batch
    assert not DiffusionMBIR(problem=problem, weight=0.0).effects.couples_batch
    assert DiffusionMBIR.effects.couples_batch


def test_the_order_of_the_slices_counts_and_its_direction_does_not() -> None:
    made = tiny()
    truth = pictures()
    found = run(made, {**KNOBS, "problem": simulated(downsample(2), truth)})
    back = run(made, {**KNOBS, "problem": simulated(downsample(2), truth.flip(0))}, range(DEPTH - 1, -1, -1))
    torch.testing.assert_close(back.flip(0), found, rtol=0, atol=1e-4)
    order = [2, 0, 4, 1, 3]
    mixed = run(made, {**KNOBS, "problem": simulated(downsample(2), truth[order])}, order)
    assert float((mixed - found[order]).abs().max()) > 0.01


@pytest.mark.parametrize("chunk", [1, 2, 4, 9])
def test_any_chunk_gives_the_same_volume(chunk: int) -> None:
    made = tiny()
    problem = simulated(Radon(3), pictures())
    wanted = run(made, {**KNOBS, "problem": problem})
    seen: list[int] = []
    hook = made.pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    found = run(made, {**KNOBS, "problem": problem, "chunk": chunk})
    hook.remove()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert max(seen) == min(chunk, DEPTH)
    assert sum(seen) == STEPS * DEPTH


@pytest.mark.parametrize(
    ("depth", "weight", "told"), [(3, 0.0, ["weight is 0"]), (1, 0.1, ["one slice has no neighbour"]), (3, 0.1, [])], ids=str
)
def test_what_is_two_dimensional_is_called_so(depth: int, weight: float, told: list[str]) -> None:
    made = tiny()
    made.kwargs["batch_size"] = depth
    problem = simulated(downsample(2), pictures(depth))
    pipe = load_pipeline(made.pipe, plugins={"diffusion_mbir": {"problem": problem, "weight": weight}})
    pipe(**made.kwargs)
    assert pipe.plugins.report().plugins["diffusion_mbir"].notes == [f"2-D, each slice by itself: {each}" for each in told]


def test_forwards_are_one_a_step_and_part() -> None:
    made = tiny()
    for chunk, each in ((0, 1), (2, 3)):
        pipe = load_pipeline(made.pipe, plugins={"diffusion_mbir": {"problem": simulated(downsample(2), pictures()), "chunk": chunk}})
        pipe(**made.kwargs)
        report = pipe.plugins.report()
        assert report.forwards == {"cond": STEPS * each}
        assert report.plugins["diffusion_mbir"].records["residual"].shape == (DEPTH,)
        pipe.plugins.remove("diffusion_mbir")


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("StableDiffusionPipeline", "sd"),
        ("StableDiffusionXLPipeline", "sdxl"),
        ("StableDiffusion3Pipeline", "sd3"),
        ("FluxPipeline", "flux"),
    ],
)
def test_parts_hold_every_branchs_rows(name: str, module: str) -> None:
    """With guidance, prompts that differ, and added conditions: slice by slice as all at once; the measurement comes nearer."""
    made = tiny(name, module)
    made.kwargs.update(prompt=["a cat", "a dog on a chair", "x"])
    if made.kwargs.get("negative_prompt") is not None:
        made.kwargs["negative_prompt"] = ["", "b", "c"]
    problem = simulated(downsample(2), pictures(3, side=64))
    whole = run(made, {**KNOBS, "problem": problem}, range(3))
    torch.testing.assert_close(run(made, {**KNOBS, "problem": problem, "chunk": 2}, range(3)), whole, rtol=0, atol=2e-3)


def test_a_mask_for_each_slice_is_measured_whole() -> None:
    made = tiny()
    problem = simulated(Mask((drawn(DEPTH, 1, SIDE, SIDE) > 0).float()), pictures())
    found = [run(made, {**KNOBS, "problem": problem, "chunk": chunk}) for chunk in (0, 2)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)
    torch.testing.assert_close(problem.operator.A(found[0]), problem.y, rtol=0, atol=1e-5)


def test_a_volume_that_is_measured_together() -> None:
    """Thick slices: an operator of videos [1, c, depth, h, w] on the slices as its frames."""
    made = tiny()
    made.kwargs["batch_size"] = 6
    truth = 0.2 * pictures(6).movedim(0, 1)[None]
    problem = simulated(TemporalMean(2), truth)
    pipe = load_pipeline(made.pipe, plugins={"diffusion_mbir": {**KNOBS, "problem": problem, "cg_steps": 3}})
    pipe(**made.kwargs)
    residual = pipe.plugins.report().plugins["diffusion_mbir"].records["residual"]
    assert residual.shape == (1,)
    assert float(residual) < 1e-6
    assert DiffusionMBIR(problem=problem, weight=0.0).effects.couples_batch


def test_a_grey_measurement_of_a_colour_model() -> None:
    made = tiny()
    problem = simulated(Radon(8) @ Grey(), pictures())
    assert problem.y.shape == (DEPTH, 1, 8, SIDE)
    run(made, {**KNOBS, "problem": problem})


def test_a_stopped_run_is_left_as_it_is() -> None:
    made = tiny("StableDiffusionPipeline", "sd")
    pipe = load_pipeline(made.pipe, plugins={"diffusion_mbir": {"problem": simulated(downsample(2), pictures(1, side=64))}})

    def stop(pipe: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index == 2
        return kwargs

    pipe(**made.kwargs, callback_on_step_end=stop)
    assert pipe.plugins.report().plugins["diffusion_mbir"].records == {}
    pipe(**made.kwargs)
    assert pipe.plugins.report().plugins["diffusion_mbir"].records["residual"].shape == (1,)


def test_in_bfloat16_admm_is_float32(monkeypatch) -> None:
    seen = set()

    def watched(x, d, u, ata, aty, *rest):
        out = admm(x, d, u, ata, aty, *rest)
        seen.update(each.dtype for each in (x, aty, *out))
        return out

    monkeypatch.setattr("diffgraft_diffusion_mbir.admm", watched)
    made = tiny("StableDiffusionPipeline", "sd")
    made.pipe.to(torch.bfloat16)
    found = run(made, {**KNOBS, "problem": simulated(downsample(2), pictures(1, side=64))}, range(1))
    assert seen == {torch.float32}
    assert found.dtype == torch.bfloat16
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("cls", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, DDIMScheduler])
def test_schedulers_of_latents_work_on_the_clean_estimate(cls: Any) -> None:
    """Also one of the unit x0 + sigma eps: what ADMM may see of latents is a picture, and noisy ones are none."""
    made = tiny("StableDiffusionPipeline", "sd")
    made.pipe.scheduler = cls.from_config(made.pipe.scheduler.config)
    problem = simulated(downsample(2), pictures(1, side=64))
    assert bool(run(made, {"problem": problem}, range(1)).isfinite().all())


# bad input -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (Problem(downsample(2), torch.zeros(1, 3, 4, 4)), "problem is of pictures of 8x8 with 3 channels"),
        (Problem(Identity(), torch.zeros(3, 3, SIDE, SIDE)), f"3 measurements for {DEPTH} pictures"),
        (Problem(Identity(), torch.zeros(1, 1, SIDE, SIDE)), "pictures with 1 channel"),
        (Problem(TemporalMean(2), torch.zeros(1, 3, 2, SIDE, SIDE)), f"of 4 slices, and the run makes {DEPTH} pictures"),
    ],
)
def test_a_problem_of_another_volume(problem: Problem, told: str) -> None:
    made = tiny()
    asked: list[int] = []
    made.pipe.unet.register_forward_hook(lambda *_: asked.append(1))
    with pytest.raises(ConfigError, match=told):
        run(made, {"problem": problem})
    assert not asked


def test_what_is_refused_when_the_plugin_is_put_on() -> None:
    for value, told in (("radon(2)", "problem = 'radon"), ({"y": 1}, r"give a Problem\(operator, y, noise\)")):
        with pytest.raises(ConfigError, match=told):
            load_pipeline(tiny().pipe, plugins={"diffusion_mbir": {"problem": value}})
    with pytest.raises(Unsupported, match="Phase is not linear"):
        load_pipeline(tiny().pipe, plugins={"diffusion_mbir": {"problem": simulated(Phase(2), pictures())}})
    problem = simulated(downsample(2), pictures(1, side=64))
    with pytest.raises(Unsupported, match="noisy latents of StableDiffusionPipeline are no picture"):
        load_pipeline(tiny("StableDiffusionPipeline", "sd").pipe, plugins={"diffusion_mbir": {"problem": problem, "on": "xt"}})
    for knobs in ({"rho": 0}, {"weight": -1}, {"cg_steps": 0}, {"chunk": -1}, {"boundary": "mirror"}, {"on": "x1"}):
        with pytest.raises(ConfigError, match=next(iter(knobs))):
            DiffusionMBIR(**knobs)


@pytest.mark.parametrize(
    ("cls", "told", "options"),
    [
        (HeunDiscreteScheduler, "asks more than once for a step", {}),
        (PNDMScheduler, r"a sample of its own \(cur_sample\)", {"skip_prk_steps": True}),
        (UniPCMultistepScheduler, r"a sample of its own \(last_sample\)", {}),
        (DDIMInverseScheduler, "from the picture to noise", {}),
    ],
)
def test_schedulers_that_are_refused(cls: Any, told: str, options: dict[str, Any]) -> None:
    made = tiny("StableDiffusionPipeline", "sd")
    made.pipe.scheduler = cls.from_config(made.pipe.scheduler.config, **options)
    with pytest.raises(Unsupported, match=told):
        run(made, {"problem": simulated(downsample(2), pictures(1, side=64))}, range(1))


def test_beside_a_cache_of_blocks() -> None:
    """All slices at once a cache may stand beside it; in parts one's features would serve the next."""
    cache = Part("cache", Effects(skips=frozenset({"blocks"})))
    problem = Problem(Identity(), torch.zeros(1, 3, SIDE, SIDE))
    assert judge(Part.of(DiffusionMBIR(problem=problem)), cache)[0] == []
    (conflict,), _ = judge(Part.of(DiffusionMBIR(problem=problem, chunk=2)), cache)
    assert conflict == "diffusion_mbir needs every block computed, but cache skips blocks; disable one"


def test_contract() -> None:
    run_contract("diffusion_mbir", families=["pixel"])
