"""x0 and noise from epsilon, v and flow predictions, on every kind of scheduler."""

from __future__ import annotations

import pytest
import torch
from diffgraft import Unsupported
from diffgraft.installed.registry import families
from diffgraft.methods.predictions import KINDS, SignalNoise, clean_estimate, levels_at, noise_estimate, prediction_kind
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

LEVELS = {
    "preserving": SignalNoise(torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)),
    "exploding": SignalNoise(torch.tensor(1.0, dtype=torch.float64), torch.tensor(4.0 / 3, dtype=torch.float64)),
    "flow": SignalNoise(torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)),
}


def exact(kind: str, levels: SignalNoise, x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """What a perfect denoiser says of x = a x0 + s eps."""
    a, s = levels
    r = (a**2 + s**2).sqrt()
    return {"epsilon": eps, "v_prediction": (a * eps - s * x0) / r, "sample": x0, "flow": eps - x0}[kind]


@pytest.mark.parametrize(("kind", "scale"), [(k, s) for s in LEVELS for k in KINDS if k != "flow" or s == "flow"])  # flow: a + s = 1
def test_a_perfect_prediction_gives_the_sample_and_the_noise_back(kind, scale):
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    levels = LEVELS[scale]
    x = levels.a * x0 + levels.s * eps
    output = exact(kind, levels, x0, eps)
    torch.testing.assert_close(clean_estimate(x, output, levels, kind), x0)
    torch.testing.assert_close(noise_estimate(x, output, levels, kind), eps)


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_what_edm_schedulers_call_epsilon_is_not_epsilon(scheduler):
    kind = prediction_kind(families()["sd"], scheduler())
    assert kind == "EDM's epsilon"
    for estimate in (clean_estimate, noise_estimate):
        with pytest.raises(Unsupported, match="EDM's epsilon"):
            estimate(torch.ones(1), torch.ones(1), LEVELS["exploding"], kind)


def test_an_unknown_kind_is_refused():
    x = torch.ones(1)
    with pytest.raises(Unsupported, match="'score' is not known; known: epsilon"):
        clean_estimate(x, x, LEVELS["flow"], "score")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler,
     DPMSolverMultistepScheduler, UniPCMultistepScheduler],
)  # fmt: skip
def test_levels_are_those_of_the_schedulers_own_add_noise(scheduler, prediction):
    made = scheduler(num_train_timesteps=1000, prediction_type=prediction)
    made.set_timesteps(10)
    x0, noise = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    for i in (0, 3, 7):
        t = made.timesteps[i]
        sigma = made.sigmas[i] if hasattr(made, "sigmas") else None
        a, s = levels_at(families()["sd"], made, t, sigma, torch.device("cpu"))
        torch.testing.assert_close(made.add_noise(x0, noise, t[None]).mean(), s.float(), rtol=2e-3, atol=1e-4)
        torch.testing.assert_close(made.add_noise(noise, x0, t[None]).mean(), a.float(), rtol=2e-3, atol=1e-4)


def test_levels_of_a_flow():
    made = FlowMatchEulerDiscreteScheduler()
    made.set_timesteps(4)
    a, s = levels_at(families()["flux"], made, made.timesteps[1], made.sigmas[1], torch.device("cpu"))
    assert float(a + s) == 1
    assert float(s) == float(made.sigmas[1])


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler])
def test_levels_of_a_schedule_that_is_told_to_be_a_flows(scheduler):
    """``use_flow_sigmas`` on a pipeline whose denoiser was trained otherwise: what `step` takes the sample to be is what counts."""
    made = scheduler(num_train_timesteps=1000, use_flow_sigmas=True)
    made.set_timesteps(4)
    x0, noise = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    a, s = levels_at(families()["sd"], made, made.timesteps[1], made.sigmas[1], torch.device("cpu"))
    torch.testing.assert_close(made.add_noise(x0, noise, made.timesteps[1:2]).mean(), s.float())
    torch.testing.assert_close(made.add_noise(noise, x0, made.timesteps[1:2]).mean(), a.float())
