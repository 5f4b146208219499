"""Bases of the schedulers that plugins bring: what diffusers asks of every one, and what solvers of the diffusion ODE share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers import ConfigMixin, DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from diffgraft.kernel.units import begin_of


@dataclass
class OwnOutput(BaseOutput):  # type: ignore[misc]
    """``prev_sample`` the next state; ``pred_original_sample`` x0 as the denoiser sees it."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class OwnScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """What pipelines ask of a scheduler beside its schedule and steps. Whoever begins a run sets ``_begin_index`` to None."""

    order = 1
    config: Any
    _begin_index: int | None = None

    @property
    def begin_index(self) -> int | None:
        """Where in the schedule the run begins (image to image)."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Called by image-to-image pipelines after ``set_timesteps``."""
        self._begin_index = begin_index

    def _place(self, timestep: Any) -> int:
        """Where in the schedule the first step of a run is: ``begin_index``, or the place of ``timestep`` in ``timesteps``, a view of which
        pipelines hand in (video to video cuts the front off and says nothing)."""
        return begin_of(self, timestep)

    def __len__(self) -> int:
        return self.config.num_train_timesteps  # type: ignore[no-any-return]


class ODEScheduler(OwnScheduler):
    """A solver of the ODE of models that are trained at the noise levels of ``DDIMScheduler`` or of ``FlowMatchEulerDiscreteScheduler``.

    Its settings are called as theirs, from ``num_train_timesteps`` to ``time_shift_type``, and ``prediction_type`` may be
    "flow_prediction". ``_timesteps`` are those of the run.
    """

    _timesteps: Tensor
    _euler: FlowMatchEulerDiscreteScheduler | None = None
    """Of a flow model, whose sigmas its steps get."""
    alphas_cumprod: Tensor
    """Of the others."""

    def _take_levels(self) -> None:
        """The training's noise levels, by the settings."""
        c = self.config
        if c.prediction_type == "flow_prediction":
            self._euler = FlowMatchEulerDiscreteScheduler(
                c.num_train_timesteps, c.shift, c.use_dynamic_shifting, c.base_shift, c.max_shift, c.base_image_seq_len,
                c.max_image_seq_len, shift_terminal=c.shift_terminal, time_shift_type=c.time_shift_type,
            )  # fmt: skip
            return
        self.alphas_cumprod = DDIMScheduler(
            c.num_train_timesteps, c.beta_start, c.beta_end, c.beta_schedule, c.trained_betas,
            rescale_betas_zero_snr=c.rescale_betas_zero_snr,
        ).alphas_cumprod  # fmt: skip

    def _ensure_kind(self, sigmas: Any, mu: float | None, timesteps: Any) -> None:
        """Raises ValueError for arguments of ``set_timesteps`` that the model's kind does not take, or that exclude each other."""
        if self._euler is None and mu is not None:
            raise ValueError("mu is for flow models")
        if timesteps is not None and sigmas is not None:
            raise ValueError("give one of timesteps and sigmas")

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """``add_noise`` under the name that flow-matching pipelines call."""
        return self.add_noise(sample, noise, timestep)  # type: ignore[no-any-return]
