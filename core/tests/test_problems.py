"""Operators: adjoints by the dot test, inverses and proximal maps against dense linear algebra, problems as text, bad measurements."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffgraft import ConfigError, Unsupported
from diffgraft.installed import registry
from diffgraft.methods.measurements import Blur, Grey, Identity, Jpeg, Mask, Phase, Radon, TemporalMean, downsample, gaussian, motion_blur
from diffgraft.methods.operators import Operator, Physics, conjugate_gradients, dot_test
from diffgraft.methods.problems import OPERATORS, Problem, fetch_problem, read_operator, simulated
from PIL import Image

SIDE = 8
LINEAR = {
    "identity": (Identity(), (2, 3, SIDE, SIDE)),
    "mask": (Mask(0.5), (2, 3, SIDE, SIDE)),
    "area": (downsample(2), (2, 3, SIDE // 2, SIDE // 2)),
    "bicubic": (downsample(2, "bicubic"), (2, 3, SIDE // 2, SIDE // 2)),
    "blur": (Blur(0.7), (2, 3, SIDE, SIDE)),
    "motion": (motion_blur(3, 30), (2, 3, SIDE, SIDE)),
    "radon": (Radon(3), (2, 1, 3, SIDE)),
    "grey": (Radon(3) @ Grey(), (2, 1, 3, SIDE)),
    "temporal": (TemporalMean(2), (1, 2, 2, 4, 4)),
    "small and blurred": (downsample(2) @ Blur(0.7), (2, 3, SIDE // 2, SIDE // 2)),
    "seen of the small": (Mask(0.5, seed=3) @ downsample(2), (2, 3, SIDE // 2, SIDE // 2)),
    "video": (downsample(2), (1, 2, 3, 4, 4)),
}


def dense(operator: Operator, y: tuple[int, ...]) -> np.ndarray:
    """Its matrix for one sample."""
    shape = operator.domain((1, *y[1:]))
    units = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape[1:])
    return operator.to(torch.device("cpu"), torch.float64).A(units).flatten(1).T.numpy()


@pytest.fixture(params=LINEAR)
def case(request: pytest.FixtureRequest) -> tuple[Operator, tuple[int, ...], np.ndarray]:
    operator, y = LINEAR[request.param]
    return operator.to(torch.device("cpu"), torch.float64), y, dense(operator, y)


def drawn(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_adjoint(case) -> None:
    operator, y, M = case
    assert dot_test(operator, y) < 1e-12
    b = drawn(y, 0)
    np.testing.assert_allclose(operator.AT(b).flatten(1).numpy(), b.flatten(1).numpy() @ M, atol=1e-12)


def test_inverse_is_the_pseudo_inverse(case) -> None:
    operator, y, M = case
    b = operator.A(drawn(operator.domain(y), 1)) if isinstance(operator, Mask) else drawn(y, 1)
    tolerance = 1e-8 if not np.linalg.cond(M) < 1e3 else 1e-4
    found = operator.pinv(b).flatten(1).numpy()
    wanted = b.flatten(1).numpy() @ np.linalg.pinv(M).T
    np.testing.assert_allclose(found @ M.T, wanted @ M.T, atol=max(tolerance, 1e-4))  # what it explains of the measurement
    if np.linalg.cond(M @ M.T) < 1e6:
        np.testing.assert_allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize("gamma", [0.1, 10.0])
def test_proximal_map_solves_its_equation(case, gamma: float) -> None:
    operator, y, M = case
    x, b = drawn(operator.domain(y), 2), operator.A(drawn(operator.domain(y), 3))
    left = gamma * M.T @ M + np.eye(M.shape[1])
    wanted = np.linalg.solve(left, (x.flatten(1).numpy() + gamma * b.flatten(1).numpy() @ M).T).T
    np.testing.assert_allclose(operator.prox(x, b, gamma).flatten(1).numpy(), wanted, atol=1e-5)


def test_identity_goes_to_the_measurement() -> None:
    x, y = drawn((1, 3, 4, 4), 0), drawn((1, 3, 4, 4), 1)
    torch.testing.assert_close(Identity().prox(x, y, 1e9), y, atol=1e-6, rtol=0)


class Dense(Operator):
    """A matrix times the picture, in whatever unit."""

    def __init__(self, unit: float) -> None:
        self.M = unit * drawn((6, 3 * 4 * 4), 7)

    def A(self, x: torch.Tensor) -> torch.Tensor:
        return (x.flatten(1) @ self.M.T)[:, None, None]

    def domain(self, y: tuple[int, ...]) -> tuple[int, ...]:
        return (y[0], 3, 4, 4)


@pytest.mark.parametrize("unit", [1e-8, 1e-4, 1e-2, 1.0, 1e6])
def test_inverse_and_proximal_map_know_no_unit(unit: float) -> None:
    operator, x = Dense(unit), drawn((2, 3, 4, 4), 8)
    y = operator.A(x)
    single = operator.to(torch.device("cpu"), torch.float32)
    wanted = (np.linalg.pinv(operator.M.numpy()) @ y.flatten(1).T.numpy()).T
    np.testing.assert_allclose(single.pinv(y.float()).flatten(1).numpy(), wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    gamma, start = 3.0 / unit**2, drawn((2, 3, 4, 4), 9)
    G = operator.M.T @ operator.M * gamma + torch.eye(48, dtype=torch.float64)
    near = torch.linalg.solve(G, (start + gamma * operator.AT(y)).flatten(1).T).T
    found = single.prox(start.float(), y.float(), gamma)
    torch.testing.assert_close(found.flatten(1).double(), near, rtol=0, atol=2e-5 * float(near.abs().max()))
    assert Problem(operator, y).operator is operator


class Module(torch.nn.Module):
    """As deepinv's are: tensors of its own in float32, a measurement of another shape than the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor([0.25, 0.75, 1.0]).view(1, 3, 1, 1))
        self.register_buffer("turn", torch.tensor(1j))

    def A(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weights).sum(1, keepdim=True)

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:  # noqa: N802
        return y * self.weights


def test_a_module_is_an_operator_as_it_is() -> None:
    physics = Module()
    problem = Problem(physics, torch.zeros(2, 1, 4, 6))
    assert problem.shape == (2, 3, 4, 6), "of what its adjoint gives"
    moved = problem.to(torch.device("cpu"), torch.float64)
    assert moved.residual(torch.ones(2, 3, 4, 6, dtype=torch.float64)).tolist() == [2.0, 2.0]
    assert moved.operator.physics.turn == 1j  # type: ignore[attr-defined]
    assert (physics.weights.dtype, physics.turn.dtype) == (torch.float32, torch.complex64), "its own is not touched"


def test_a_module_of_the_wrong_shape_is_told() -> None:
    class Picky(Module):
        def A(self, x: torch.Tensor) -> torch.Tensor:
            return super().A(x.view(-1, 3, 4, 4))

    with pytest.raises(ConfigError, match=r"A fails on a white picture.*shape=\(channels, height, width\)"):
        Problem(Picky(), torch.zeros(1, 1, 4, 6))


def test_an_operator_that_keeps_no_constants_is_taken() -> None:
    class Edges(Operator):
        def A(self, x: torch.Tensor) -> torch.Tensor:
            return x[..., 1:] - x[..., :-1]

        def domain(self, y: tuple[int, ...]) -> tuple[int, ...]:
            return (*y[:-1], y[-1] + 1)

    assert Problem(Edges(), 2 * torch.ones(1, 3, 4, 3)).shape == (1, 3, 4, 4)


def test_noise_is_a_number() -> None:
    for noise in ("0.02", None, True):
        with pytest.raises(ConfigError, match="noise"):
            Problem(Identity(), torch.zeros(1, 3, 4, 4), noise)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="noise"):
        read_operator("identity + noise(True)")
    with pytest.raises(ConfigError, match="class Identity"):
        Problem(Identity, torch.zeros(1, 3, 4, 4))  # type: ignore[arg-type]


def test_conjugate_gradients_is_numpy() -> None:
    root = drawn((6, 6), 0)
    M, b = root @ root.T + torch.eye(6, dtype=torch.float64), drawn((3, 6), 1)
    torch.testing.assert_close(conjugate_gradients(lambda x: x @ M, b, tolerance=1e-10), torch.linalg.solve(M, b.T).T)
    assert conjugate_gradients(lambda x: x @ M, torch.zeros(2, 6, dtype=torch.float64)).abs().max() == 0


def test_half_precision_is_solved_in_float32() -> None:
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    blur = Blur(0.7)
    near = blur.to(torch.device("cpu"), torch.bfloat16).prox(x.bfloat16(), blur.A(x).bfloat16(), 1.0)
    assert near.dtype == torch.bfloat16
    assert float((near.float() - blur.prox(x, blur.A(x), 1.0)).abs().max()) < 0.1


def test_phase_is_the_fourier_amplitude() -> None:
    x = drawn((1, 1, 4, 4), 0)
    padded = np.pad((x[0, 0].numpy() + 1) / 2, ((0, 4), (0, 4)))
    np.testing.assert_allclose(Phase(2).A(x)[0, 0].numpy(), np.abs(np.fft.fft2(padded)) / 8, atol=1e-6)


def test_jpeg_keeps_flat_blocks_and_loses_detail_with_quality() -> None:
    flat = torch.full((1, 3, 16, 16), 0.25098039)  # 32 of 127.5: its cosine coefficient is 256
    torch.testing.assert_close(Jpeg(100).A(flat), flat, atol=0.005, rtol=0)
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    errors = [float((Jpeg(q).A(x) - x).square().mean()) for q in (5, 50, 95)]
    assert errors[0] > errors[1] > errors[2] > 0
    x.requires_grad_()
    Jpeg(50).A(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.abs().sum() > 0)


def test_radon_of_a_picture_at_rest_are_its_means() -> None:
    x = drawn((1, 1, 8, 8), 0)
    torch.testing.assert_close(Radon(4).A(x)[:, :, 0], x.mean(-2), atol=1e-9, rtol=0)
    torch.testing.assert_close(Radon(2).A(x)[:, :, 1].sum(), x.mean((-2, -1)).sum() * 8, atol=1e-6, rtol=0)


@pytest.mark.parametrize("operator", [Phase(), Jpeg(50), Blur(1.0) @ Jpeg(50)])
def test_what_is_not_linear_has_no_inverse(operator: Operator) -> None:
    for call in (operator.AT, operator.pinv):
        if isinstance(operator, (Phase, Jpeg)):
            with pytest.raises(Unsupported, match="is not linear and has no"):
                call(torch.zeros(1, 1, 8, 8))
    assert not operator.linear


class EveryOther(Operator):
    def A(self, x):
        return x[..., ::2]

    def domain(self, y):
        return (*y[:-1], 2 * y[-1])


class FalseAdjoint(EveryOther):
    def AT(self, y):
        return y.repeat_interleave(2, -1)


def test_an_operator_of_a_users_own() -> None:
    problem = simulated(EveryOther(), drawn((1, 1, 4, 4), 0))
    assert float(problem.residual(EveryOther().pinv(problem.y)).max()) < 1e-9
    assert problem.shape == (1, 1, 4, 4)


def test_somebody_elses_operator() -> None:
    physics = SimpleNamespace(A=lambda x: 2 * x, A_adjoint=lambda y: 2 * y)
    problem = Problem(physics, torch.ones(1, 3, 4, 4))  # type: ignore[arg-type]
    assert isinstance(problem.operator, Physics)
    torch.testing.assert_close(problem.operator.pinv(problem.y), problem.y / 2)


# text ------------------------------------------------------------------------------------------------------------------------------------


def test_a_problem_as_text() -> None:
    operator, noise = read_operator("downsample(2) @ blur(0.7) + noise(0.02)")
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert noise == 0.02
    torch.testing.assert_close(operator.A(x), downsample(2).A(Blur(0.7).A(x)))
    assert isinstance(read_operator("identity")[0], Identity)
    assert read_operator("downsample(2, kernel='bicubic')")[1] == 0


def test_every_operator_that_ships_is_registered() -> None:
    assert set(registry.by_name(OPERATORS)) >= {
        "identity", "mask", "downsample", "blur", "motion_blur", "radon", "temporal_mean", "phase", "jpeg",
    }  # fmt: skip


@pytest.mark.peer
@pytest.mark.parametrize("side", [33, 65])
def test_radon_is_scikit_images(side: int) -> None:
    """The same turns and sums, the other way round, on an odd side."""
    transform = pytest.importorskip("skimage.transform")
    y, x = (np.mgrid[:side, :side] - side // 2) * 33 / side
    picture = np.exp(-((x - 5) ** 2 / 18 + (y + 2) ** 2 / 32)) + 0.7 * np.exp(-((x + 4) ** 2 + (y - 6) ** 2) / 12)
    picture[x**2 + y**2 > 16**2] = 0
    theirs = transform.radon(picture, theta=-np.arange(12) * 180 / 12, circle=True) / side
    ours = Radon(12).A(torch.from_numpy(picture)[None, None])[0, 0]
    np.testing.assert_allclose(ours.numpy().T, theirs, rtol=0, atol=1e-12)
    assert theirs.max() > 0.3


@pytest.mark.parametrize(("h", "w"), [(33, 32), (32, 30), (7, 3)])
@pytest.mark.parametrize("kernel", ["area", "bicubic"])
def test_a_size_that_the_factor_does_not_divide_is_refused_at_the_measurement(h: int, w: int, kernel: str) -> None:
    """What is cut off at the edges could not be found again, and the picture would be of another size."""
    with pytest.raises(ConfigError, match=f"downsample: factor = 4: .*{h}x{w}"):
        simulated(downsample(4, kernel), torch.zeros(1, 3, h, w))


def test_the_nearest_size_is_told() -> None:
    with pytest.raises(ConfigError, match=r"or pictures of 32x28$"):
        simulated(downsample(4), torch.zeros(1, 3, 33, 31))


@pytest.mark.parametrize(("h", "w"), [(7, 5), (1, 1), (9, 16)])
def test_masks_of_odd_sizes(h: int, w: int) -> None:
    x = drawn((2, 3, h, w), 0).clamp(-1, 1)
    seen = (drawn((h, w), 1) > 0).double()
    for mask in (Mask(0.5), Mask(seen)):
        problem = simulated(mask, x)
        assert problem.shape == (2, 3, h, w)
        assert problem.operator.pinv(problem.y).equal(problem.y)
        assert dot_test(mask, (1, 3, h, w)) < 1e-12
    with pytest.raises(ConfigError, match=f"mask: it is {h}x{w}, and the pictures are {h}x{w + 1}"):
        Mask(seen).A(torch.zeros(1, 3, h, w + 1))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("downsampel(4)", "did you mean 'downsample'"),
        ("downsample(4", "was never closed"),
        ("downsample(4) + blur(1)", "behind \\+ comes noise"),
        ("downsample(four)", "is no operator with numbers"),
        ("downsample(4, size=3)", "unexpected keyword"),
        ("downsample(2.5)", "factor = 2.5: give a whole number"),
        ("mask(1.5)", "give a share above 0 and up to 1"),
        ("mask('none.png')", "no picture can be read there"),
        ("blur(-1)", "give a width in pixels"),
        ("radon(0)", "give a whole number of angles"),
        ("jpeg(0)", "whole number from 1 to 100"),
        ("__import__('os')", "is no operator"),
    ],
)
def test_text_that_is_no_problem(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_operator(text)


# bad measurements ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "y", "noise", "told"),
    [
        (downsample(2), torch.full((1, 3, 4, 4), float("nan")), 0.0, "48 values that are not finite"),
        (downsample(2), torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 0.0, "floating-point"),
        (downsample(2), torch.full((1, 3, 4, 4), 255.0), 0.0, "y / 127.5 - 1"),
        (Radon(4), torch.zeros(1, 1, 5, 8), 0.0, r"has the shape \[1, 1, 5, 8\], and Radon makes \[1, 1, 4, 8\]"),
        (Identity(), torch.zeros(1, 3, 4, 4), -1.0, "standard deviation, 0 or more"),
        (FalseAdjoint(), torch.zeros(1, 3, 4, 3), 0.0, "AT of FalseAdjoint is not the adjoint"),
        (TemporalMean(2), torch.zeros(1, 3, 4, 4), 0.0, "videos"),
        (Grey(), torch.zeros(1, 3, 4, 4), 0.0, "grey: y = 3 channels: give a grey measurement, of one"),
        (Radon(4) @ Grey(), torch.zeros(1, 3, 4, 4), 0.0, "grey: y = 3 channels"),
    ],
)
def test_a_measurement_that_is_none(operator: Operator, y: torch.Tensor, noise: float, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Problem(operator, y, noise)


def test_a_mask_of_a_file_and_of_another_size(tmp_path) -> None:
    Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).save(tmp_path / "mask.png")
    mask = Mask(str(tmp_path / "mask.png"))
    assert mask.A(torch.ones(1, 3, 2, 2))[0, 0].tolist() == [[0, 1], [1, 0]]
    with pytest.raises(ConfigError, match="it is 2x2, and the pictures are 4x4"):
        mask.A(torch.ones(1, 3, 4, 4))


def test_a_plugin_is_given_a_problem() -> None:
    plugin, need = SimpleNamespace(name="p"), SimpleNamespace(knob="problem")
    problem = Problem(Identity(), torch.zeros(1, 3, 4, 4))
    assert fetch_problem(plugin, need, problem, None) is problem
    made = fetch_problem(plugin, need, {"operator": "downsample(2) + noise(0.1)", "y": torch.zeros(1, 3, 4, 4)}, None)
    assert (made.shape, made.noise) == ((1, 3, 8, 8), 0.1)
    for wrong in ("downsample(2)", {"operator": Identity()}, {"operator": 3, "y": torch.zeros(1, 3, 4, 4)}):
        with pytest.raises(ConfigError, match="plugin 'p': problem"):
            fetch_problem(plugin, need, wrong, None)


def test_noise_is_of_the_generator() -> None:
    made = [simulated(Identity(), torch.zeros(1, 3, 64, 64), 0.5, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(made[0].y, made[1].y)
    assert not torch.equal(made[0].y, made[2].y)
    assert float(made[0].y.std()) == pytest.approx(0.5, rel=0.05)
    assert float(made[0].residual(torch.zeros(1, 3, 64, 64))) == pytest.approx(0.5, rel=0.05)


def test_gaussian_is_of_sum_one() -> None:
    assert float(gaussian(1.3).sum()) == pytest.approx(1)
    assert float(motion_blur(9, 45).kernel.sum()) == pytest.approx(1)


def test_an_adjoint_by_autograd_is_there_in_inference_mode_too():
    blur, y = Blur(1.0), torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = blur.AT(y)
    with torch.inference_mode():
        assert torch.equal(blur.AT(y), wanted)
        assert torch.equal(blur.AT(y + 0), wanted)
