"""Prompt mixing by the Black-Scholes price (arXiv 2405.13685), in the paper's symbols; free of diffusers.

Each prompt is an asset. Its spot price S is how well the picture in the making shows it; the run's end is the option's maturity. The prompt
whose call option is worth less is denoised with next. All tensors are float64.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

STRIKE = 100.0
"""K: a certain picture, where spots are percent. CLIP's logits are 100 times a cosine."""
LEAST_VOLATILITY = 1e-3
"""Of a step in which next to no noise is removed, where d1 would be infinite. That of Stable Diffusion's last step is .02."""


def d1_d2(spot: Tensor, rate: float, volatility: float, left: float, strike: float = STRIKE) -> tuple[Tensor, Tensor]:
    """d1 = (ln(S / K) + (r + s^2 / 2) tau) / (s sqrt(tau)) and d2 = d1 - s sqrt(tau).

    Args:
        spot: S > 0, of any shape.
        rate: r, without risk, per step.
        volatility: s > 0, per square root of a step.
        left: tau > 0, steps to maturity.
    """
    spread = volatility * left**0.5
    d1 = (torch.log(spot / strike) + (rate + volatility**2 / 2) * left) / spread
    return d1, d1 - spread


def log_call(spot: Tensor, rate: float, volatility: float, left: float, strike: float = STRIKE) -> Tensor:
    """Logarithm of the price of a European call, C = S N(d1) - K exp(-r tau) N(d2), with N the normal distribution function.

    Far out of the money, which late steps are, C itself is below the smallest float64; its logarithm still tells two prices apart.
    Arguments as in :func:`d1_d2`.
    """
    d1, d2 = d1_d2(spot, rate, volatility, left, strike)
    share = torch.special.log_ndtr(d1)
    owed = torch.log(strike / spot) - rate * left + torch.special.log_ndtr(d2) - share  # of the second term in the first, below 0
    return torch.log(spot) + share + torch.log(-torch.expm1(owed))


def call_price(spot: Tensor, rate: float, volatility: float, left: float, strike: float = STRIKE) -> Tensor:
    """C itself, see :func:`log_call`."""
    return log_call(spot, rate, volatility, left, strike).exp()


def official_value(spot: Tensor, rate: float, volatility: float, left: float, strike: float = STRIKE) -> Tensor:
    """What the official code takes for the price: exp(-d1^2 / 2) S - K exp(-r tau) exp(-d2^2 / 2). Arguments as in :func:`d1_d2`.

    With N's density in the place of N both terms are the same number (which is why an option's delta is N(d1)). So this is 0, and what is
    not 0 is rounding; it is done in the types of the official code, with numpy as there.
    """
    S = spot.numpy().astype(np.float32)  # check: allow host_sync because spots are on the CPU
    s = np.float32(volatility)
    d1 = (np.log(S / strike) + (rate + (s**2) / 2) * left) / (s * left**0.5)
    d2 = d1 - s * left**0.5
    return torch.as_tensor(np.exp(-0.5 * d1 * d1) * S - np.exp(-0.5 * d2 * d2) * strike * np.exp(-left * rate))


def volatility(abar: Tensor, abar_before: Tensor) -> Tensor:
    """s = sqrt((1 - abar') / (1 - abar) (1 - abar / abar')), DDPM's standard deviation of a step from abar to abar' > abar (all 0-dim)."""
    variance = (1 - abar_before) / (1 - abar) * (1 - abar / abar_before)
    return variance.abs().sqrt().clamp(min=LEAST_VOLATILITY)


def takes_second(first: Tensor, second: Tensor) -> Tensor:
    """Which samples go on with the second prompt: those where the first one's price is not the smaller."""
    return ~(first < second)
