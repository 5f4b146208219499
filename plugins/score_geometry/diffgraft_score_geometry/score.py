"""The denoiser at one call of a run, as a vector field of the latents: what it says, and what its Jacobian does to a vector."""

from __future__ import annotations

import torch
from diffgraft import DenoiseCall
from diffgraft.methods.gradients import alone, jvp_alone, predict_alone, vjp_alone
from diffgraft.methods.predictions import SignalNoise, clean_estimate, levels_of, noise_estimate, prediction_kind
from diffgraft.methods.solvers import at_least_float32
from torch import Tensor


class Draw:
    """Standard normal vectors of a generator of their own: those of the run are not touched.

    Args:
        step: of the run.
        use: 0 for the vectors of Jacobian products, 1 for the points where these are taken, 2 for those of stacked scores, 3 for what is
            followed along the run.
    """

    def __init__(self, seed: int, step: int, use: int) -> None:
        self.generator = torch.Generator().manual_seed((4 * (seed * 1_000_003 + step) + use) % 2**63)

    def like(self, x: Tensor, number: int = 1) -> Tensor:
        """[number, ...] for samples like ``x`` [n, ...]; a single one is for all of them, so that a sample alone has that of a batch."""
        drawn = [torch.randn(x.shape[1:], generator=self.generator, dtype=at_least_float32(x.dtype)) for _ in range(number)]
        return torch.stack(drawn).to(x.device)


class ScoreField:
    """eps(x), D(x) and their Jacobians at the noise level of one denoiser call, past the other plugins of the run.

    Args:
        call: of the conditional rows alone.
    """

    def __init__(self, call: DenoiseCall) -> None:
        self.call = call
        self.kind = prediction_kind(call.family, call.pipe.scheduler)
        self.dtype = at_least_float32(call.latents.dtype)
        levels = levels_of(call)
        self.levels = SignalNoise(levels.a.to(self.dtype), levels.s.to(self.dtype))

    def output(self, x: Tensor) -> Tensor:
        """The denoiser's output at ``x``, without gradients."""
        with alone(self.call), torch.no_grad():
            out = predict_alone(self.call.with_input(x.to(self.call.latents.dtype)))
        return self._of_sample(out, x)

    def tangent(self, x: Tensor, u: Tensor) -> Tensor:
        """The output's Jacobian at ``x`` times ``u``."""
        return self._of_sample(jvp_alone(self.call, u, at=x), x)

    def products(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """J u and J^T u, J being the Jacobian of eps at ``x``."""
        whole = jvp_alone(self.call, u, at=x)
        back = torch.zeros_like(whole)  # a learned variance is no part of eps
        back[:, : x.shape[1]] = u
        return self.noise(u, self._of_sample(whole, x)), self.noise(u, vjp_alone(self.call, back, at=x))

    def noise(self, x: Tensor, output: Tensor) -> Tensor:
        """eps of a sample and an output, or J u of a vector and the output's Jacobian times it."""
        return noise_estimate(x.to(self.dtype), output.to(self.dtype), self.levels, self.kind)

    def clean(self, x: Tensor, output: Tensor) -> Tensor:
        """D(x), or dD/dx u, likewise."""
        return clean_estimate(x.to(self.dtype), output.to(self.dtype), self.levels, self.kind)

    def noisy(self, x0: Tensor, z: Tensor) -> Tensor:
        """a x0 + s z."""
        return self.levels.a * x0.to(self.dtype) + self.levels.s * z

    def moved(self, x: Tensor, output: Tensor, after: SignalNoise) -> Tensor:
        """x, or a vector of its tangent space, at the next level of the ODE: a' D + s' eps (DDIM's step)."""
        return after.a.to(self.dtype) * self.clean(x, output) + after.s.to(self.dtype) * self.noise(x, output)

    @staticmethod
    def _of_sample(output: Tensor, x: Tensor) -> Tensor:
        """The part of the output that is for the sample, without a learned variance behind it."""
        return output[:, : x.shape[1]]
