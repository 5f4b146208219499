"""DPM-Solver as a diffusers scheduler; it works without diffgraft.

Lu, Zhou, Bao, Chen, Li, Zhu, "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps", arXiv
2206.00927; the data-prediction form is that of "DPM-Solver++", arXiv 2211.01095.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from diffgraft.methods.noise_schedule import Array, DeviceSchedule, NoiseSchedule, clean, spaced
from diffgraft.methods.own_scheduler import ODEScheduler, OwnOutput
from diffgraft.methods.solvers import at_least_float32, falling, unrounded
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffgraft_dpm_solver.adaptive import Seen, Walk
from diffgraft_dpm_solver.method import Point, R, Weights, changes, combine, fast, fixed, weights

CHOICES = {
    "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction"),
    "form": ("data", "noise"),
    "mode": ("fast", "fixed", "adaptive"),
    "spacing": ("logsnr", "time", "quadratic"),
}
FARTHEST = 27.0
"""|lambda| of a flow model's pure noise, for first order, which can start there (sigma = 1 - 2e-12)."""
CLEAN = Point(1.0, 0.0, math.inf)


@dataclass(frozen=True)
class Part:
    """What one denoiser call does: the state at the next point from the sample that its step began with."""

    here: Point
    begins: bool
    moved: float
    """S at this point over S where the step began: what an edit here is divided by to be one there."""
    weights: Weights


class DPMSolverScheduler(ODEScheduler):
    """DPM-Solver of orders 1 to 3, singlestep; ``num_inference_steps`` are denoiser calls, as in ``DPMSolverSinglestepScheduler``.

    A step of order p is p calls at falling times. Where the schedule is cut in the middle of a step (image to image), what is left of it
    is a step of lower order.

    Args:
        num_train_timesteps ... rescale_betas_zero_snr: as in ``DDIMScheduler``.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow_prediction".
        shift ... time_shift_type: as in ``FlowMatchEulerDiscreteScheduler``, whose sigmas ``spacing = "time"`` takes.
        solver_order: 1 to 3.
        form: "data" (x0 is held, DPM-Solver++) or "noise" (eps is held, DPM-Solver).
        mode: "fast" (as many steps of that order as go into the calls, then lower ones), "fixed" (of that order only) or "adaptive"
            (DPM-Solver-12 or -23: at most so many calls; timesteps that were not used yet are rewritten).
        spacing: of the steps, "logsnr" (uniform lambda), "time" or "quadratic" (uniform sqrt t); adaptive: of the budget only.
        denoise_to_zero: the last of the calls goes from the least noise of training to none.
        atol, rtol, h_init, theta: of "adaptive": tolerances, first step in lambda, safety.
        together: adaptive: one step size for the batch, by its largest error, as official code does. Without it every sample has its own
            time (:meth:`times`), and somebody must tell the denoiser.
        exploding: states outside are x0 + sigma eps, as Euler's schedulers have them.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int | None = 256,
        max_image_seq_len: int | None = 4096,
        shift_terminal: float | None = None,
        time_shift_type: str = "exponential",
        solver_order: int = 3,
        form: str = "data",
        mode: str = "fast",
        spacing: str = "logsnr",
        denoise_to_zero: bool = False,
        atol: float = 0.0078,
        rtol: float = 0.05,
        h_init: float = 0.05,
        theta: float = 0.9,
        together: bool = True,
        exploding: bool = False,
    ) -> None:
        self._p = solver_order
        for key, allowed in CHOICES.items():
            if (value := self.config[key]) not in allowed:
                raise ValueError(f"{key} = {value!r}: one of {', '.join(map(repr, allowed))}")
        if solver_order not in R or (mode == "adaptive" and solver_order == 1):
            raise ValueError(f"solver_order = {solver_order}: 1, 2 or 3, and 2 or 3 where mode = 'adaptive', which compares two orders")
        if prediction_type == "flow_prediction" and exploding:
            raise ValueError("exploding: latents of flow models are (1 - sigma) x0 + sigma eps")
        self._take_levels()
        flow = self._euler is not None
        self.schedule = NoiseSchedule(num_train_timesteps) if flow else NoiseSchedule.of_alphas(self.alphas_cumprod)
        self._there: tuple[torch.device, DeviceSchedule] | None = None
        self.set_timesteps(12 + denoise_to_zero, mu=base_shift if flow and use_dynamic_shifting else None)

    # schedule ---------------------------------------------------------------------------------------------------------------------

    @property
    def timesteps(self) -> Tensor:
        """What the denoiser is told at each call [n], float32; ahead of an adaptive run's next call, that one's."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, value: Tensor) -> None:
        own = self._timesteps
        shares = value.untyped_storage().data_ptr() == own.untyped_storage().data_ptr() and value.stride() == own.stride()
        if shares and (at := self._index_of(value)) + len(value) <= len(own):  # a part of this very schedule keeps its steps
            part = slice(at, at + len(value))
            self._end = float(self._lam[part.stop]) if part.stop < len(own) else self._end
            self._lam, self._begins, self._timesteps = self._lam[part], self._begins[part], value
            self._sigmas = self._sigmas[at : part.stop + 1]
            self._begin_run()
        else:
            to_zero = float(self._sigmas[-1]) == 0
            self._take_up(self._lam_of(value.double().cpu().numpy()), to_zero, value.device, fast(len(value) - to_zero, self._p))
            self._timesteps = value

    @property
    def sigmas(self) -> Tensor:
        """sigma / alpha (flow models: sigma) at the calls and at the end [n + 1]; they follow the timesteps, only the last can be set."""
        return self._sigmas

    @sigmas.setter
    def sigmas(self, value: Tensor) -> None:
        levels = [self.schedule.level(float(lam)) for lam in self._lam]
        found = [at.sigma if self._euler is not None else at.sigma / at.alpha for at in levels]
        end = float(value[-1])
        if end != float(self._sigmas[-1]):  # else it is known more exactly
            self._end = self._lam_of_sigma(end)
        self._sigmas = torch.tensor([*found, end], dtype=torch.float32, device=value.device)
        self._begin_run()

    @property
    def shift(self) -> float:
        """The resolution shift in force (flow models)."""
        return 1.0 if self._euler is None else self._euler.shift  # type: ignore[no-any-return]

    @property
    def init_noise_sigma(self) -> float:
        """Of the first latents."""
        return 1 / self.schedule.level(float(self._lam[0])).alpha if self.config.exploding else 1.0

    def _lam_of(self, t: Array) -> Array:
        """lambda at timesteps; first order in the data form may start from pure noise."""
        if self._euler is not None and self.config.solver_order == 1 and self.config.form == "data":
            sigma = np.clip(t / self.schedule.steps, 1e-12, 1 - 2e-12)
            return np.log1p(-sigma) - np.log(sigma)
        return self.schedule.lam(t)

    def _lam_of_sigma(self, sigma: float) -> float:
        if sigma <= 0:
            return math.inf
        return math.log1p(-sigma) - math.log(sigma) if self._euler is not None else -math.log(sigma)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """Make the schedule.

        Args:
            num_inference_steps: denoiser calls, ``denoise_to_zero``'s among them; adaptive: at most.
            sigmas: own ones, falling. Of flow models as in ``FlowMatchEulerDiscreteScheduler`` (with ``spacing = "time"``); of others the
                noise-to-signal ratios, the last one where the run ends, as in ``EulerDiscreteScheduler``.
            mu: flow models only, as in ``FlowMatchEulerDiscreteScheduler`` (with ``spacing = "time"``).
            timesteps: own times of the calls, falling.

        Raises:
            ValueError: no call, calls that make no whole steps ("fixed") or not one ("adaptive"), own times that do not fall or lie
                outside of the training's, or arguments that the model's kind does not take.
        """
        T, flow, zero = self.config.num_train_timesteps, self._euler is not None, self.config.denoise_to_zero
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"num_inference_steps = {num_inference_steps}: give 1 or more")
        self._ensure_kind(sigmas, mu, timesteps)
        if timesteps is not None:
            return self._take_up(self._lam_of(falling(timesteps, "timesteps", 0, T if flow else T - 1).numpy()), zero, device)
        if sigmas is not None and not flow:
            own = falling(sigmas, "sigmas", 0, math.inf).numpy()
            if len(own) < 2:
                raise ValueError(f"sigmas = {list(sigmas)}: give two or more, the last one where the run ends")
            self._take_up(-np.log(own[:-1]).clip(*self.schedule.ends), bool(own[-1] == 0), device)
            if own[-1]:
                self._sigmas[-1], self._end = float(own[-1]), -math.log(own[-1])
            return None
        if self._euler is not None and self.config.spacing == "time":
            self._euler.set_timesteps(num_inference_steps, sigmas=sigmas, mu=mu)
            return self._take_up(self._lam_of(self._euler.sigmas[:-1].double().numpy() * T), zero, device)
        n = len(sigmas) if num_inference_steps is None else int(num_inference_steps)
        steps = n - zero
        if steps < 1:
            return self._take_up(np.array(self.schedule.ends[:1]), zero, device)
        if self.config.spacing == "logsnr" and self.config.mode != "adaptive":  # steps are even, whatever their orders
            orders = self._orders(steps)
            outer = np.linspace(*self.schedule.ends, len(orders) + 1)
            h = outer[1] - outer[0]
            lam = np.array([at + r * h for at, order in zip(outer, orders, strict=False) for r in R[order]])
        else:
            lam = spaced(self.schedule, steps, self.config.spacing)[:-1]
        return self._take_up(np.append(lam, self.schedule.ends[1:]) if zero else lam, zero, device)

    def _orders(self, calls: int) -> list[int]:
        return (fixed if self.config.mode == "fixed" else fast)(calls, self.config.solver_order)

    def _take_up(self, lam: Array, to_zero: bool, device: Any, orders: list[int] | None = None) -> None:
        """The schedule with calls at ``lam`` [n], the last one of which goes to no noise, or to the least of training; ``orders`` of the
        steps before that: the mode's own, but what was cut or edited may not make whole steps."""
        n, least = len(lam), self.config.solver_order + self.config.denoise_to_zero
        if self.config.mode == "adaptive" and n < least and orders is None:
            raise ValueError(f"{n} calls are no trial of order {self.config.solver_order} (mode='adaptive'): give {least} or more")
        if self.config.mode == "adaptive":
            orders = [1] * (n - to_zero)
        orders = [*(self._orders(n - to_zero) if orders is None else orders), *[1] * to_zero]
        starts = {0, *accumulate(orders)}
        self._begins = [i in starts for i in range(n)]
        self._lam, self._end = lam, math.inf if to_zero else self.schedule.ends[1]
        self.num_inference_steps = n
        levels = [self._point(each) for each in (*lam, self._end)]
        self._timesteps = torch.from_numpy(self.schedule.t(lam)).to(device, torch.float32)
        sigmas = torch.tensor([at.sigma if self._euler is not None else at.sigma / at.alpha for at in levels], dtype=torch.float32)
        self._sigmas = sigmas.to(device) if self.config.mode == "adaptive" else sigmas  # rewritten there; elsewhere read without waiting
        self._begin_run()

    def _begin_run(self) -> None:
        self._begin_index: int | None = None
        self._index: int | None = None
        self.counts: dict[str, Tensor] = {}
        """Of the last adaptive run, per sample [batch]: denoiser calls; trials accepted, rejected, and forced at the end of the budget."""
        self._release()

    def _release(self) -> None:
        """Forget the run's tensors."""
        self._parts: list[Part] = []
        self._walk: Walk | None = None
        self._arrival = Seen()
        self._x: Tensor | None = None
        self._m: Tensor | None = None
        self._kept: Tensor | None = None

    def _index_of(self, view: Tensor) -> int:
        return int(view.storage_offset() - self._timesteps.storage_offset()) // max(self._timesteps.stride(0), 1)

    def _here(self, timestep: Any) -> int:
        """Which call this is."""
        if self._index is None:
            self._index = self._first = self._place(timestep)
        return min(self._index, len(self._lam) - 1)

    def _point(self, lam: float) -> Point:
        return CLEAN if lam == math.inf else Point(*self.schedule.level(float(lam)))

    def _planned(self, begin: int) -> list[Part]:
        """What each call from ``begin`` on does; a step that was cut at its beginning is one of lower order."""
        lam = [*self._lam, self._end]
        n, form = len(self._lam), self.config.form
        starts = [i for i in range(begin, n) if self._begins[i] or i == begin]
        parts: list[Part] = []
        for start, stop in zip(starts, [*starts[1:], n], strict=True):
            points = [self._point(each) for each in lam[start : stop + 1]]
            if stop - start > 1 and points[-1] is CLEAN:
                raise ValueError("a step to no noise is of first order")
            h = points[-1].lam - points[0].lam
            c = changes(form, h, [(at.lam - points[0].lam) / h for at in points[:-1]] if stop - start > 1 else R[1])
            for j, at in enumerate(points[:-1]):
                moved = weights(form, points[0], at).x
                parts.append(Part(at, j == 0, moved, weights(form, points[0], points[j + 1], c[j])))
        return parts

    # steps ------------------------------------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample at the denoiser's scale."""
        return sample * self._alpha(self._here(timestep), sample) if self.config.exploding else sample

    def _alpha(self, k: int, sample: Tensor) -> Any:
        """alpha at call ``k``, or behind the last one."""
        if self._walk is not None:
            walk = self._walk
            alpha = torch.where(walk.done, 1.0, walk.now.alpha) if self.config.denoise_to_zero else walk.now.alpha
            return walk.wide(alpha).to(sample.dtype).repeat(len(sample) // len(alpha), *[1] * (sample.ndim - 1))
        return self._point(self._lam[k] if k < len(self._lam) else self._end).alpha

    def times(self) -> Tensor | None:
        """What the denoiser is to be told of each sample [batch] in an adaptive run where each goes its own way; None: the timestep."""
        if self._walk is None or self.config.together:
            return None
        return self._walk.schedule.t(self._walk.now.lam)

    @property
    def done(self) -> bool:
        """Whether all samples of an adaptive run are known to be at the end: what the denoiser would say is of no use any more."""
        return self._arrival.arrived() and self._arrival.value

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        """One denoiser call further.

        Args:
            model_output: the prediction for ``sample`` at ``timestep`` [batch, ...], guidance done.
            sample: the present state [batch, ...].
        """
        k = self._here(timestep)
        if self.done and self._kept is not None:  # nothing is left to do
            self._index = k + 1
            if k == len(self._lam) - 1:
                self._release()
            return OwnOutput(sample, None) if return_dict else (sample, None)
        dtype = at_least_float32(sample.dtype)
        held, _ = unrounded(sample, self._kept, dtype)
        scale = self._alpha(k, held) if self.config.exploding else 1.0
        x = held * scale
        if self.config.mode == "adaptive" and self._walk is None:
            self._walk = self._begin_walk(x, k)
        change = (held - self._kept) * scale if self._kept is not None else None
        raw, kind = model_output.to(dtype), self.config.prediction_type
        out, x0 = self._adapt(x, raw, change, kind) if self._walk is not None else self._go(k, x, raw, change, kind)
        self._index = k + 1
        if self._walk is not None:
            self._rewrite(k + 1)
        self._kept = out / self._alpha(k + 1, out) if self.config.exploding else out
        result = OwnOutput(self._kept.to(sample.dtype, copy=True), x0.to(sample.dtype))  # others may edit it in place
        if self._walk is not None:
            self.counts = self._walk.counts()
        if k == len(self._lam) - 1:
            self._release()
        return result if return_dict else (result.prev_sample, result.pred_original_sample)

    def _in_form(self, x: Tensor, raw: Tensor, at: Any, kind: str) -> tuple[Tensor, Tensor]:
        """(m, x0) of a prediction."""
        x0 = clean(x, raw, at, kind)
        if self.config.form == "data":
            return x0, x0
        return raw if kind == "epsilon" else (x - at.alpha * x0) / at.sigma, x0

    def _go(self, k: int, x: Tensor, raw: Tensor, change: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
        """A call of a planned run: (next state, x0)."""
        if not self._parts:
            self._parts = self._planned(self._first)
        part = self._parts[k - self._first]
        m, x0 = self._in_form(x, raw, part.here, kind)
        if part.begins:
            self._x, self._m = x, m
            return combine(part.weights, x, m, None), x0
        assert self._x is not None
        assert self._m is not None
        if change is not None:
            self._x = self._x + change / part.moved
        return combine(part.weights, self._x, self._m, m), x0

    def _begin_walk(self, x: Tensor, k: int) -> Walk:
        end = self.schedule.ends[1] if self._end == math.inf else self._end
        c, schedule = self.config, self._on(x.device)
        return Walk(
            x, float(self._lam[k]), end, schedule, c.form, c.solver_order, len(self._lam) - k, self._end == math.inf, c.together,
            c.h_init, c.atol, c.rtol, c.theta,
        )  # fmt: skip

    def _on(self, device: torch.device) -> DeviceSchedule:
        """The noise schedule on a device."""
        if self._there is None or self._there[0] != device:
            self._there = device, DeviceSchedule.of(self.schedule, device)
        return self._there[1]

    def _adapt(self, x: Tensor, raw: Tensor, change: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
        """A call of an adaptive run: (next state, x0)."""
        walk = self._walk
        assert walk is not None
        if change is not None:
            walk.edit(change)
        now = walk.now
        at = Point(walk.wide(now.alpha).to(x.dtype), walk.wide(now.sigma).to(x.dtype), None)
        m, x0 = self._in_form(x, raw, at, kind)
        out = walk.take(m, x0)
        if walk.stage == 0 or walk.clean_end:
            self._arrival.send(walk.done.all())
        return out, x0

    def _rewrite(self, k: int) -> None:
        """Say from call ``k`` on what is known: the time of the next one (of the sample with the most noise)."""
        assert self._walk is not None
        if k < len(self._lam):
            lam = self._walk.now.lam.amin()
            alpha, sigma = self._walk.schedule.levels(lam)
            self._timesteps[k:] = self._walk.schedule.t(lam[None])[0].to(self._timesteps.dtype)
            self._sigmas[k:-1] = (sigma if self._euler is not None else sigma / alpha).to(self._sigmas)

    # noising (image to image) -----------------------------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma eps (``exploding``: over alpha) at timesteps [batch], which need not be whole numbers."""
        x = original_samples
        alpha, sigma = self._on(x.device).at(timesteps.to(x.device).reshape(-1))
        if self.config.exploding:
            alpha, sigma = torch.ones_like(alpha), sigma / alpha
        a, s = (each.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype) for each in (alpha, sigma))
        return a * x + s * noise
