"""What a solver takes over from a scheduler: each one of diffusers is known by what it does; states between steps."""

from __future__ import annotations

import diffusers.schedulers
import pytest
import torch
from diffgraft import Unsupported
from diffgraft.installed import registry
from diffgraft.methods.solvers import falling, ode_settings, unrounded
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    HeunDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)

SD = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False)
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)
SOLVES = {
    "diffusion": {
        "DDIM", "DDIMParallel", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "EulerDiscrete", "HeunDiscrete",
        "KDPM2Discrete", "LMSDiscrete", "PNDM", "UniPCMultistep",
    },
    "flow": {"FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"},
}  # fmt: skip
"""Schedulers of diffusers that solve the ODE of Stable Diffusion's, or of a flow model's, noise schedule."""
NAMES = sorted(name for name in dir(diffusers.schedulers) if name.endswith("Scheduler"))


def family(kind):
    return registry.find_family(StableDiffusionPipeline if kind == "diffusion" else FluxPipeline)


@pytest.mark.parametrize("kind", SOLVES)
@pytest.mark.parametrize("name", NAMES)
def test_every_scheduler_of_diffusers_is_known_by_what_it_does(name, kind):
    """Those that draw noise, jump, or have another noise schedule are refused by us; none fails in another way."""
    try:
        scheduler = getattr(diffusers.schedulers, name).from_config((SD if kind == "diffusion" else FLOW).config)
    except Exception:  # not to be made of these settings, or its library is not there
        assert name.removesuffix("Scheduler") not in SOLVES[kind]
        return
    if name.removesuffix("Scheduler") in SOLVES[kind]:
        ode_settings("x", scheduler, family(kind))
        return
    with pytest.raises(Unsupported, match=f"x: {name} "):
        ode_settings("x", scheduler, family(kind))


@pytest.mark.parametrize(("cls", "options", "why"), [
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, "draws noise"),
    (EulerDiscreteScheduler, {"timestep_type": "continuous"}, "noise schedule of its own"),
    (DPMSolverMultistepScheduler, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, "noise schedule of its own"),
    (DDPMScheduler, {"clip_sample": True}, "draws noise"),
    (DDIMScheduler, {"clip_sample": True}, "clip_sample=False"), (DDIMScheduler, {"thresholding": True}, "thresholding=False"),
])  # fmt: skip
def test_settings_decide_too(cls, options, why):
    with pytest.raises(Unsupported, match=why):
        ode_settings("x", cls.from_config(SD.config, **options), family("diffusion"))


@pytest.mark.parametrize(("cls", "options"), [
    (EulerDiscreteScheduler, {"use_karras_sigmas": True}), (DPMSolverMultistepScheduler, {"use_lu_lambdas": True}),
    (EulerDiscreteScheduler, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
    (DDIMScheduler, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
    (DPMSolverMultistepScheduler, {"euler_at_final": True, "final_sigmas_type": "sigma_min"}), (DDIMScheduler, {"beta_schedule": "linear"}),
])  # fmt: skip
def test_usual_settings_are_taken(cls, options):
    settings = ode_settings("x", cls.from_config(SD.config, **options), family("diffusion"))
    assert settings["beta_start"] == 0.00085


@pytest.mark.parametrize(("cls", "options", "why"), [
    (FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True}, None),
    (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}, "draws noise"),
    (UniPCMultistepScheduler, {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 5.0}, None),
    (UniPCMultistepScheduler, {}, "does not follow the ODE of this model"),
])  # fmt: skip
def test_flow_models(cls, options, why):
    if why is None:
        settings = ode_settings("x", cls(**options), family("flow"))
        assert settings["shift"] == options.get("flow_shift", 1.0)
        return
    with pytest.raises(Unsupported, match=why):
        ode_settings("x", cls(**options), family("flow"))


def test_settings_that_a_scheduler_has_by_default_are_taken_over():
    """Heun's own betas are not DDIM's."""
    heun = HeunDiscreteScheduler()
    new = DDIMScheduler.from_config(ode_settings("x", heun, family("diffusion")))
    assert torch.equal(new.alphas_cumprod, heun.alphas_cumprod)


def test_a_class_is_not_known_by_its_name():
    class LCMLikeNothing(DDIMScheduler):
        """Solves the ODE, whatever it is called."""

    class Plain(DDPMScheduler):
        """Draws noise, whatever it is called."""

    ode_settings("x", LCMLikeNothing.from_config(SD.config), family("diffusion"))
    with pytest.raises(Unsupported, match="draws noise"):
        ode_settings("x", Plain.from_config(SD.config), family("diffusion"))


def test_a_scheduler_is_tried_once_and_changes_nothing():
    scheduler = DDIMScheduler.from_config(SD.config)
    scheduler.set_timesteps(7)
    before, state = {**scheduler.__dict__}, torch.random.get_rng_state()
    ode_settings("x", scheduler, family("diffusion"))
    assert scheduler.__dict__.keys() == before.keys()
    assert len(scheduler.timesteps) == 7
    assert torch.equal(torch.random.get_rng_state(), state), "the user's random numbers"


def test_settings_that_change_are_seen():
    scheduler = DPMSolverMultistepScheduler.from_config(SD.config)
    ode_settings("x", scheduler, family("diffusion"))
    scheduler.register_to_config(algorithm_type="sde-dpmsolver++")
    with pytest.raises(Unsupported, match="draws noise"):
        ode_settings("x", scheduler, family("diffusion"))


@pytest.mark.parametrize("values", [[], [5, 5], [1, 2], [float("nan")], [float("inf"), 1], [3, -1], [2000, 1]])
def test_own_schedules_without_meaning_are_refused(values):
    with pytest.raises(ValueError, match=r"timesteps = \["):
        falling(values, "timesteps", 0, 999)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edits_are_seen_element_by_element(dtype):
    kept = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    handed = kept.to(dtype, copy=True)
    for same in (handed, handed.clone()):  # a clone that nobody edited is no edit
        state, edited = unrounded(same, kept, torch.float32)
        assert torch.equal(state, kept)
        assert not edited.any()
    handed[0, 1] = 7.0  # in place: the same tensor
    state, edited = unrounded(handed, kept, torch.float32)
    assert edited.nonzero().tolist() == [[0, 1]]
    assert torch.equal(state, torch.where(edited, torch.tensor(7.0), kept))
