"""Late start and Analytic-Init (Zhao, Zhu, Xiang, Zheng, Li, Zhu, arXiv 2406.15735): a run begins at M < T, where the data are.

At the noisiest times an image-to-video model copies its picture instead of reading the motion off the noise. So the same number of steps
is spread over [0, M), and the first latents are drawn from the Gaussian N(m, v I) that is nearest to the data's marginal at M.
"""

from __future__ import annotations

from typing import Any, ClassVar

from diffgraft import (
    ArtefactMismatch,
    ConfigError,
    DenoiseCall,
    Effects,
    Need,
    Plugin,
    RunCall,
    Schedule,
    ScheduleCall,
    Target,
    Unsupported,
)
from diffgraft.methods.artefacts import make_again
from diffgraft.methods.late import ensure_steps, kind_of, late
from diffgraft.methods.predictions import is_exploding, levels_of
from diffgraft.methods.starts import is_first, unit_noise
from torch import Tensor

from diffgraft_cil_start.calibration import FEW, HOLDS, PUBLISHED, Measure, measured_on, moments_of
from diffgraft_cil_start.knobs import PAPER, CilStartConfig
from diffgraft_cil_start.method import UNIT, Moments, begin, official_svd, optimum
from diffgraft_cil_start.schedules import share_of

__all__ = ["CilStart", "measured_on"]
__version__ = "0.1.0"


class CilStart(Plugin):
    name = "cil_start"
    paper = PAPER
    families = ("sd", "sdxl", "animatediff", "svd", "cogvideox", "wan", "ltx")
    not_on: ClassVar[dict[str, str]] = dict.fromkeys(
        ("*Img2Img*", "*Depth2Img*", "*Inpaint*", "*VideoToVideo*"),
        "it begins in mid-schedule with a noised picture, which is where the data are already",
    )
    Config = CilStartConfig
    neutral: ClassVar[dict[str, Any]] = {"start": 1.0, "init": "plain"}
    active: ClassVar[dict[str, Any]] = {"start": 0.8, "init": "analytic"}
    effects = Effects(edits=frozenset({"latents", "schedule"}))
    needs = (
        Need("artefact", "artefact", fits=frozenset({"shape"}), holds=HOLDS),
        Need("weights", "published", holds=PUBLISHED),
    )
    calibration = Measure
    tune: ClassVar[dict[str, Any]] = {"start": (0.98, 0.94, 0.9, 0.86, 0.82)}
    config: CilStartConfig

    def __init__(self, **knobs: Any) -> None:
        super().__init__(**knobs)
        edits = {"latents": self.config.init == "analytic", "schedule": self.config.start != 1}
        self.effects = Effects(edits=frozenset(name for name, does in edits.items() if does))

    def check(self, target: Target) -> None:
        if self.config.start != 1:
            kind_of(self.name, target.family, target.pipe.scheduler)
        in_latents = target.pipe.config.get("expand_timesteps") and "ImageToVideo" in type(target.pipe).__name__
        if in_latents and self.config.init == "analytic":
            raise Unsupported(
                "cil_start: this pipeline puts its picture into the latents themselves, which Analytic-Init would draw over; take "
                "init = 'plain'"
            )

    def run(self, call: RunCall, next: Any) -> Any:
        knobs = self.config
        if knobs.start != 1 and (own := [name for name in ("timesteps", "sigmas") if call.get(name) is not None]):
            raise ConfigError(
                f"plugin 'cil_start': the call says {' and '.join(own)} itself, and a start below 1 writes another schedule; leave them "
                "out, or set start = 1"
            )
        if knobs.start != 1:
            kind = kind_of(self.name, call.family, call.pipe.scheduler)
            ensure_steps(self.name, call.pipe.scheduler, kind, share_of(knobs.start, kind), call.get("num_inference_steps"), "start")
        artefact = call.given("artefact")
        moments = moments_of(artefact, call.given("published"))
        if knobs.formula == "official" and knobs.init == "analytic" and not self.takes_official(moments, call.pipe.scheduler):
            call.note("formula = 'official' is of a measured mean and variance on schedulers of SVD's and Euler's kind: eq. 5 is taken")
        if knobs.init == "plain" and moments is not None:
            call.note("inactive: mean and variance are given and not used, for init is 'plain'")
        elif knobs.init == "analytic" and moments is None:
            call.note(f"mean 0 and variance 1 are taken for the data; measure them ({make_again(self.name)})")
        elif artefact is not None and artefact.facts["clips"] < FEW:
            call.note(f"mean and variance were measured on {artefact.facts['clips']} clips; a few hundred are worth something")
        return next(call)

    def schedule(self, call: ScheduleCall, next: Any) -> Schedule:
        own: Schedule = next(call)
        if self.config.start == 1:
            return own
        kind = kind_of(self.name, call.family, call.scheduler)
        share = share_of(self.config.start, kind)
        return own if share == 1 else late(call, own, kind, share, "start")

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        if call.step.call == 0 and self.config.init == "analytic":
            call = call.with_latents(self.start(call) if is_first(call) else call.latents)
        return next(call)  # type: ignore[no-any-return]

    def takes_official(self, given: Moments | None, scheduler: Any) -> bool:
        """Whether the start is that of the authors' SVD code, which is of measured moments on such schedulers."""
        return self.config.formula == "official" and given is not None and is_exploding(scheduler)

    def start(self, call: DenoiseCall) -> Tensor:
        """x_M, in the pipeline's layout and dtype."""
        noise, scheduler = unit_noise(call), call.pipe.scheduler
        given = moments_of(call.given("artefact"), call.given("published"))
        if given is not None and given.mean.shape != noise.shape[1:]:
            other = make_again(self.name) if call.given("published") is None else "take the authors' file of the other size"
            raise ArtefactMismatch(
                f"cil_start: mean and variance were measured on latents of {tuple(given.mean.shape)}, these have "
                f"{tuple(noise.shape[1:])}: call the pipeline with that size and number of frames, or {other}"
            )
        moments = Moments(*(value.to(noise.device, non_blocking=True) for value in given or UNIT))
        call.count("analytic starts")
        if self.takes_official(given, scheduler):
            return official_svd(noise, scheduler.init_noise_sigma, moments).to(call.latents.dtype)
        return begin(noise, *optimum(moments, *levels_of(call))).to(call.latents.dtype)
