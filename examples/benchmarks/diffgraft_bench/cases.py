"""What is measured, as data: bouts of methods on pipelines.

A bout is one process. Its methods are measured in turn, round by round, and every one of them against the plain pipeline of the same
process; what is to be compared closely (our plugin and the package of the same method) stands in one bout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal["plain", "diffgraft", "scheduler", "cache", "peer"]


@dataclass(frozen=True)
class Method:
    """One way to run a pipeline.

    label   what the report calls it: methods of one label and different settings are one line of a plot
    kind    who provides it: the plain pipeline with so many steps, our plugins, diffusers' schedulers, diffusers' caches, a peer package
    name    the scheduler's or cache configuration's class, or the peer; empty for the others
    knobs   the setting: plugins with their knobs, or arguments of the scheduler, the cache, the peer
    steps   None: the pipeline's
    ours    our method for the same thing at the same setting, by label: the two are held against each other
    """

    label: str
    kind: Kind
    name: str = ""
    knobs: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    ours: str = ""

    @property
    def setting(self) -> str:
        """The setting in words."""
        parts = [f"{self.steps} steps"] if self.steps else []
        for key, value in self.knobs.items():
            inner = value.items() if isinstance(value, Mapping) else [(key, value)]
            parts += [f"{k}={v}" for k, v in inner if k not in HIDDEN]
        return ", ".join(parts) or "default"


HIDDEN = frozenset({"artefact", "model"})
"""Knobs that name a file: no setting."""


@dataclass(frozen=True)
class Bout:
    """Methods on one pipeline in one process.

    arm        "quality" (bundled checkpoint: time, fidelity, judge) or "speed" (real layout with random weights: time, work, memory)
    pipeline   bundled name, or a layout of ``models``
    env        the environment that it needs: "" for the project's own, else a peer's name
    steps      steps of the plain pipeline and of every method that names none
    distilled  a model that jumps: its many-step pictures are nothing to be near to
    """

    arm: Literal["quality", "speed"]
    pipeline: str
    steps: int
    methods: tuple[Method, ...]
    env: str = ""
    distilled: bool = False

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Bout:
        return cls(**{**data, "methods": tuple(Method(**each) for each in data["methods"])})


def plain(*steps: int) -> tuple[Method, ...]:
    """The pipeline itself in fewer steps: what every method must beat."""
    return tuple(Method("fewer steps", "plain", steps=k) for k in steps)


def plugin(label: str, steps: int | None = None, **stack: Mapping[str, Any]) -> Method:
    """Our plugins, outermost first."""
    return Method(label, "diffgraft", knobs=stack, steps=steps)


def scheduler(label: str, name: str, *steps: int, **options: Any) -> tuple[Method, ...]:
    """A scheduler of diffusers on the pipeline's noise schedule."""
    return tuple(Method(label, "scheduler", name, options, k) for k in steps)


def cache(label: str, name: str, ours: str = "", **options: Any) -> Method:
    """A cache of diffusers."""
    return Method(label, "cache", name, options, ours=ours)


def peer(name: str, ours: str = "", **knobs: Any) -> Method:
    """Another package."""
    return Method(name, "peer", name, knobs, ours=ours)


# environments --------------------------------------------------------------------------------------------------------------------------

PEERS = ("DeepCache", "tomesd", "tgate", "cache-dit", "para-attn", "pruna")
"""Packages as pip knows them. Each gets an environment of its own, so that one cannot break another."""

# the cases -----------------------------------------------------------------------------------------------------------------------------

STITCH = {"model": "emoji-sd-small"}
AUTO = {"artefact": "autodiffusion"}
V3 = {"artefact": "calibrate", "corrector": "off"}
DPM = {"algorithm_type": "dpmsolver++", "timestep_spacing": "linspace"}


def deepcache_duel(*intervals: int) -> tuple[Method, ...]:
    """Ours and the package, the same settings."""
    ours = [plugin("deepcache", deepcache={"interval": n}) for n in intervals]
    return (*ours, *(peer("DeepCache", "deepcache", interval=n) for n in intervals))


def emoji_sd(quick: bool) -> list[Bout]:
    """A U-Net, 50 DDIM steps, guidance."""
    few = (5, 10) if quick else (4, 5, 6, 8, 10, 15, 20)
    intervals = (3,) if quick else (2, 3, 5, 10)
    ladder = (20, 14, 10, 7, 5, 4) if quick else (33, 25, 20, 17, 14, 12, 10, 8, 7, 6, 5, 4, 3)
    solvers = (
        *scheduler("DPM++ 2M", "DPMSolverMultistepScheduler", *few, **DPM),
        *scheduler("UniPC", "UniPCMultistepScheduler", *few, timestep_spacing="linspace"),
        *scheduler("Euler", "EulerDiscreteScheduler", *few, timestep_spacing="linspace"),
        *(plugin("dpm_solver_v3", k, dpm_solver_v3=V3) for k in few),
        *(plugin("t_stitch + dpm_solver_v3", k, t_stitch={**STITCH, "fraction": 1 / k}, dpm_solver_v3=V3) for k in few),
        plugin("autodiffusion", 4, autodiffusion=AUTO),
        plugin("t_stitch + autodiffusion", 4, t_stitch={**STITCH, "fraction": 0.5}, autodiffusion=AUTO),
    )
    caches = (
        plugin("faster_diffusion", faster_diffusion={}),
        *(plugin("t_stitch", t_stitch={**STITCH, "fraction": f}) for f in ((0.4,) if quick else (0.2, 0.4, 0.6, 0.8))),
        *(plugin("deepcache + dpm_solver_v3", k, deepcache={"interval": 2}, dpm_solver_v3=V3) for k in ((10,) if quick else (10, 15, 20))),
    )
    bouts = [
        Bout("quality", "emoji-sd", 50, plain(*ladder)),
        Bout("quality", "emoji-sd", 50, solvers),
        Bout("quality", "emoji-sd", 50, caches),
        Bout("quality", "emoji-sd", 50, deepcache_duel(*intervals), "DeepCache"),
        Bout("quality", "emoji-sd", 50, tuple(peer("tomesd", ratio=r) for r in ((0.5,) if quick else (0.25, 0.5, 0.75))), "tomesd"),
        Bout("quality", "emoji-sd", 50, tuple(peer("tgate", gate_step=k) for k in ((25,) if quick else (10, 25))), "tgate"),
        Bout("quality", "emoji-sd", 50, (peer("pruna", interval=3),), "pruna"),
    ]
    lcm = (*plain(3, 2), plugin("t_stitch", t_stitch={**STITCH, "fraction": 0.5}), plugin("deepcache", deepcache={"interval": 2}))
    return [*bouts, Bout("quality", "emoji-sd-lcm", 4, lcm, distilled=True)]


def transformer(pipeline: str, steps: int, quick: bool) -> list[Bout]:
    """A flow transformer: caches of residuals and of attention."""
    ladder = [max(2, round(steps * share)) for share in ((0.5, 0.3, 0.2) if quick else (0.75, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15))]
    levels = (0.1,) if quick else (0.05, 0.1, 0.2, 0.3)
    few = (10,) if quick else (6, 8, 10, 15)
    own = (
        *(plugin("ertacache", ertacache={"artefact": "calibrate", "threshold": t}) for t in levels),
        *(plugin("dpm_solver_v3", k, dpm_solver_v3=V3) for k in few),
        *scheduler("UniPC", "UniPCMultistepScheduler", *few, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift="shift"),
        *(cache("FirstBlockCache", "FirstBlockCacheConfig", threshold=t) for t in levels),
        *(cache("TaylorSeer", "TaylorSeerCacheConfig", cache_interval=n) for n in ((3,) if quick else (2, 3, 5))),
        *(cache("MagCache", "MagCacheConfig", threshold=t, num_inference_steps=steps) for t in ((0.06,) if quick else (0.03, 0.06, 0.12))),
        *(cache("PAB", "PyramidAttentionBroadcastConfig", spatial_attention_block_skip_range=n) for n in ((2,) if quick else (2, 4))),
        cache("FasterCache", "FasterCacheConfig", is_guidance_distilled=True),  # these pipelines call once a branch, which it cannot join
    )
    return [
        Bout("quality", pipeline, steps, plain(*ladder)),
        Bout("quality", pipeline, steps, own),
        Bout("quality", pipeline, steps, tuple(peer("cache-dit", threshold=t) for t in (*levels, 0.3 if quick else 0.5)), "cache-dit"),
        *(Bout("quality", pipeline, steps, (peer("para-attn", threshold=t),), "para-attn") for t in levels),  # it patches the class
    ]


def speed(quick: bool) -> list[Bout]:
    """Layouts of real models, random weights."""
    steps = 6 if quick else 12
    unet = (plugin("deepcache", deepcache={"interval": 3}), peer("DeepCache", "deepcache", interval=3))
    more = (plugin("faster_diffusion", faster_diffusion={}), plugin("t_stitch", t_stitch={"model": "half", "fraction": 0.4}))
    erta = plugin("ertacache", ertacache={"artefact": "calibrate", "threshold": 0.3})
    dit = (erta, cache("FirstBlockCache", "FirstBlockCacheConfig", threshold=0.3))
    bouts = [Bout("speed", "sd15", steps, unet, "DeepCache"), Bout("speed", "sd15", steps, more)]
    bouts += [Bout("speed", "sd15", steps, (peer("tomesd", ratio=0.5),), "tomesd")]
    bouts += [Bout("speed", "flux", steps, dit), Bout("speed", "wan", steps, dit)]
    bouts += [Bout("speed", "flux", steps, (peer("cache-dit", threshold=0.3),), "cache-dit")]
    if not quick:
        bouts += [Bout("speed", "sdxl", steps, unet, "DeepCache"), Bout("speed", "sdxl", steps, more)]
        bouts += [Bout("speed", "pixart", steps, more[1:])]
        bouts += [Bout("speed", name, steps, (peer("para-attn", threshold=0.3),), "para-attn") for name in ("flux", "wan")]
    return bouts


def all_bouts(quick: bool) -> list[Bout]:
    """Everything, in the order in which it is run."""
    wan = 20 if quick else 50
    return [*emoji_sd(quick), *transformer("emoji-flux", 28, quick), *transformer("emoji-wan", wan, quick), *speed(quick)]
