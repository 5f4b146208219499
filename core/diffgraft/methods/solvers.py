"""For plugins that bring a solver of the diffusion ODE: what it takes over from the pipeline's scheduler."""

from __future__ import annotations

from typing import Any

from diffgraft.kernel.errors import Unsupported
from diffgraft.kernel.family import Family


def ode_settings(plugin: str, old: Any, family: Family) -> dict[str, Any]:
    """The settings of the pipeline's scheduler ``old``, for ``from_config`` of one that solves the same ODE.

    A flow model's shift is called ``shift``, whatever ``old`` calls it.

    Raises:
        Unsupported: ``old`` belongs to a distilled model, clips its x0, or has a noise schedule that its settings do not tell.
    """
    config, name = dict(old.config), type(old).__name__
    if "original_inference_steps" in config or name.startswith(("LCM", "TCD")):
        raise Unsupported(f"{plugin}: {name} is made for a distilled model, which jumps and does not follow the diffusion ODE")
    for key in ("clip_sample", "thresholding"):
        if config.get(key):
            raise Unsupported(f"{plugin}: {name}.{key} = True: a clipped x0 leaves the diffusion ODE; set pipe.scheduler with {key}=False")
    if family.prediction == "flow":
        return {**config, "shift": config["flow_shift"]} if "flow_shift" in config else config  # as DPM-Solver and UniPC call it
    if config.get("snr_shift_scale", 1.0) != 1.0 or config.get("timestep_type") == "continuous":
        raise Unsupported(f"{plugin}: {name} has a noise schedule of its own, which its settings do not tell")
    return config
