"""The mathematics of Bottleneck Sampling, without diffusers. Symbols as in arXiv 2503.18940.

K stages; stage i has the resolution (h_i, w_i), N_i steps, the strength w_i and the timestep shift s_i. Each begins at the noise level
that its strength names and ends in a clean sample, which is resized and noised again for the next one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def stage_steps(T: int, shares: Sequence[float]) -> tuple[int, ...]:
    """N_1 ... N_K of T steps: ``shares`` is how they are to each other.

    Sums are rounded, not the single N_i, so that no rounding error adds up; every stage has one step at least.

    Raises:
        ValueError: fewer steps than stages.
    """
    K = len(shares)
    if T < K:
        raise ValueError(f"{K} stages need at least {K} steps, not {T}")
    steps: list[int] = []
    total, so_far = math.fsum(shares), 0
    for i in range(K):
        end = math.floor(T * math.fsum(shares[: i + 1]) / total + 0.5)
        end = min(max(end, so_far + 1), T - (K - 1 - i))
        steps.append(end - so_far)
        so_far = end
    return tuple(steps)


def rounded(n: float) -> int:
    """The nearest whole number of steps, 1 at least."""
    return max(1, math.floor(n + 0.5))


def shifted(t: Tensor, s: float) -> Tensor:
    """Scheduler re-shifting: sigma = s t / (1 + (s - 1) t), for times t in [0, 1]; the noise-to-signal ratio times s."""
    return s * t / (1 + (s - 1) * t)


def time_of(sigma: float, s: float) -> float:
    """The time t that a shift s takes to the level sigma, the inverse of :func:`shifted`."""
    return sigma / (s - (s - 1) * sigma)


def stage_sigmas(t: float, s: float, n: int) -> Tensor:
    """[n + 1] levels of a stage of n steps: evenly spaced times from t to 0, shifted by s. float64."""
    return shifted(t * torch.linspace(1, 0, n + 1, dtype=torch.float64), s)


def renoised(x0: Tensor, eps: Tensor, a: Tensor, sigma: Tensor) -> Tensor:
    """Noise re-introduction: x = a x0 + sigma eps, with the levels a, sigma (0-dim) of the next stage's first step; float32 inside."""
    return (a * x0.float() + sigma * eps.float()).to(x0.dtype)


def work(steps: Sequence[int], areas: Sequence[float], T: int, power: float = 1.0) -> float:
    """Sum of n_i (A_i / A_K)^power over T: the share of a plain run's cost, if a step's cost goes with its tokens to that power.

    power = 1 is the part of a network that treats tokens one by one, power = 2 attention between all of them.
    """
    return math.fsum(n * (area / areas[-1]) ** power for n, area in zip(steps, areas, strict=True)) / T


# sizes ------------------------------------------------------------------------------------------------------------------------------


def stage_side(side: int, scale: float, multiple: int) -> int:
    """``scale * side`` rounded to the nearest multiple; 0 where half a multiple is more than there is."""
    return math.floor(scale * side / multiple + 0.5) * multiple


# latents --------------------------------------------------------------------------------------------------------------------------


def unpack(x: Tensor, h: int, w: int, p: int) -> Tensor:
    """Tokens [B, F (h/p) (w/p), C p p] -> [B, F, C, h, w]: p x p latent pixels make a token, channels first in it."""
    y = x.unflatten(2, (-1, p, p)).unflatten(1, (-1, h // p, w // p))  # B, F, h/p, w/p, C, p, p
    return y.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


def pack(x: Tensor, p: int) -> Tensor:
    """The inverse of :func:`unpack`."""
    y = x.unflatten(4, (-1, p)).unflatten(3, (-1, p))  # B, F, C, h/p, p, w/p, p
    return y.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 6).flatten(1, 3)


def resize(x: Tensor, h: int, w: int, kernel: str) -> Tensor:
    """``x`` [..., H, W] at h x w, separably; a constant stays that constant. float32 inside."""
    rows = resize_matrix(x.shape[-2], h, kernel).to(x.device)
    columns = resize_matrix(x.shape[-1], w, kernel).to(x.device)
    return (rows @ x.float() @ columns.T).to(x.dtype)


def resize_matrix(n: int, m: int, kernel: str) -> Tensor:
    """[m, n] weights that resample n points to m, float32; every row sums to 1.

    When reducing, the kernel is widened by n / m, so that nothing aliases.
    """
    width = max(n / m, 1.0)
    centres = (torch.arange(m, dtype=torch.float64) + 0.5) * (n / m)
    distance = (torch.arange(n, dtype=torch.float64) + 0.5 - centres[:, None]) / width
    weights = KERNELS[kernel](distance)
    return (weights / weights.sum(dim=1, keepdim=True)).float()


def lanczos(x: Tensor) -> Tensor:
    """sinc(x) sinc(x / 3) for |x| < 3."""
    return torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)


def bicubic(x: Tensor, a: float = -0.5) -> Tensor:
    """Keys' cubic convolution kernel."""
    x = x.abs()
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def bilinear(x: Tensor) -> Tensor:
    """A triangle over |x| < 1."""
    return (1 - x.abs()).clamp(min=0)


def box(x: Tensor) -> Tensor:
    """1 for -1/2 < x <= 1/2: means when reducing, the nearest point when enlarging."""
    return ((x > -0.5) & (x <= 0.5)).to(x.dtype)


KERNELS = {"lanczos": lanczos, "bicubic": bicubic, "bilinear": bilinear, "box": box}
