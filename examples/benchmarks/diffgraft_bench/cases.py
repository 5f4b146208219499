"""What is measured, as data: bouts of methods on pipelines.

A bout is one process. Its methods are measured in turn, round by round, and every one of them against the plain pipeline of the same
process; what is to be compared closely (our plugin and the package of the same method) stands in one bout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Kind = Literal["plain", "diffgraft", "scheduler", "cache", "peer", "bundled", "fitted"]


@dataclass(frozen=True)
class Method:
    """One way to run a pipeline.

    label   what the report calls it: methods of one label and different settings are one line of a plot
    kind    who provides it: the plain pipeline with so many steps, our plugins, diffusers' schedulers, diffusers' caches, a peer package,
            another bundled model as diffusers runs it, and one that `diffgraft fit` made or that our plugins are on ("fitted")
    name    the scheduler's or cache configuration's class, or the peer, or the bundled model; empty for the others
    knobs   the setting: plugins with their knobs (of a fitted model, too), or arguments of the scheduler, the cache, the peer
    steps   None: the pipeline's
    on      a scheduler of diffusers that our plugins run over: a label of SCHEDULERS; empty: the pipeline's own
    ours    our method for the same thing at the same setting, by label: the two are held against each other
    """

    label: str
    kind: Kind
    name: str = ""
    knobs: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    on: str = ""
    ours: str = ""

    @property
    def setting(self) -> str:
        """The setting in words; a scheduler's options go with its label."""
        parts = [f"{self.steps} steps"] if self.steps else []
        for key, value in () if self.kind == "scheduler" else self.knobs.items():
            inner = value.items() if isinstance(value, Mapping) else [(key, value)]
            parts += [f"{k}={v}" for k, v in inner if k not in HIDDEN]
        return ", ".join(parts) or "default"


HIDDEN = frozenset({"artefact", "model", "method", "warmup"})
"""No setting: knobs that name a file or what the label names, and the one that makes cache-dit's setting the same as others'."""


@dataclass(frozen=True)
class Bout:
    """Methods on one pipeline in one process.

    arm        "quality" (bundled checkpoint: time, fidelity, judge), "speed" (real layout with random weights: time, work, memory) or
               "device" (bundled checkpoint: its pictures on a device against those on the CPU)
    pipeline   bundled name, or a layout of ``models``
    env        the environment that it needs: "" for the project's own, else a peer's name
    steps      steps of the plain pipeline and of every method that names none
    distilled  a model that jumps: its many-step pictures are nothing to be near to
    shape      what is different about a layout: "channels" (a share of them), and arguments of its call
    """

    arm: Literal["quality", "speed", "device"]
    pipeline: str
    steps: int
    methods: tuple[Method, ...]
    env: str = ""
    distilled: bool = False
    shape: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Bout:
        return cls(**{**data, "methods": tuple(Method(**each) for each in data["methods"])})


def plain(*steps: int) -> tuple[Method, ...]:
    """The pipeline itself in fewer steps: what every method must beat."""
    return tuple(Method("fewer steps", "plain", steps=k) for k in steps)


def plugin(label: str, steps: int | None = None, on: str = "", **stack: Mapping[str, Any]) -> Method:
    """Our plugins, outermost first."""
    return Method(label, "diffgraft", knobs=stack, steps=steps, on=on)


def scheduler(label: str, kind: str, *steps: int) -> tuple[Method, ...]:
    """A scheduler of diffusers on the pipeline's noise schedule (``kind``: "diffusion" or "flow")."""
    name, options = SCHEDULERS[kind, label]
    return tuple(Method(label, "scheduler", name, options, k) for k in steps)


def cache(label: str, name: str, ours: str = "", **options: Any) -> Method:
    """A cache of diffusers."""
    return Method(label, "cache", name, options, ours=ours)


def peer(name: str, ours: str = "", **knobs: Any) -> Method:
    """Another package."""
    return Method(name, "peer", name, knobs, ours=ours)


def on_lcm(label: str, steps: int, **stack: Mapping[str, Any]) -> Method:
    """Our plugins on emoji-sd-lcm."""
    return Method(f"{label} on emoji-sd-lcm", "fitted", "emoji-sd-lcm", stack, steps)


FEW_STEPS = {
    "emoji-sd": (
        *(Method("emoji-sd-lcm", "bundled", "emoji-sd-lcm", steps=k) for k in (4, 2)),
        on_lcm("t_stitch", 4, t_stitch={"model": "emoji-sd-small", "fraction": 0.5}),
        on_lcm("t_stitch", 2, t_stitch={"model": "emoji-sd-small", "fraction": 0.5}),
        on_lcm("deepcache", 4, deepcache={"interval": 2}),
    ),
    "emoji-flux": (Method("emoji-flux-4step", "fitted", "emoji-flux-4step", steps=4),),
    "emoji-wan": (Method("accvideo on emoji-wan-4step", "fitted", "emoji-wan-4step", {"accvideo": {"steps": 4}}, 4),),
}
"""Distilled models of the same subjects, by pipeline: emoji-sd-lcm is diffusers' LCM, the others are fits of phased_dmd and accvideo."""

# environments --------------------------------------------------------------------------------------------------------------------------

PEERS = ("DeepCache", "tomesd", "tgate", "cache-dit", "para-attn", "pruna")
"""Packages as pip knows them. Each gets an environment of its own, so that one cannot break another."""

# the cases -----------------------------------------------------------------------------------------------------------------------------

SPACED = {"timestep_spacing": "linspace"}  # "leading", which DDIM's settings bring along, starts below pure noise in short runs
TO_SIGMA_MIN = {"final_sigmas_type": "sigma_min"}  # the best that these two were seen to do on emoji-sd in short runs
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": "shift"}
SCHEDULERS: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("diffusion", "DPM++ 2M"): ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", **SPACED}),
    ("diffusion", "UniPC"): ("UniPCMultistepScheduler", SPACED),
    ("diffusion", "DPM++ 2M to sigma_min"): ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", **SPACED, **TO_SIGMA_MIN}),
    ("diffusion", "UniPC to sigma_min"): ("UniPCMultistepScheduler", {**SPACED, **TO_SIGMA_MIN}),
    ("diffusion", "Euler"): ("EulerDiscreteScheduler", SPACED),
    ("flow", "DPM++ 2M"): ("DPMSolverMultistepScheduler", FLOW),
    ("flow", "UniPC"): ("UniPCMultistepScheduler", FLOW),
}
"""By label: the class and its options beside the pipeline's own ("shift" stands for the pipeline's)."""

FOUND = "examples/benchmarks/found/{pipeline}-{on}-{steps}.json"
"""Time steps that `python -m diffgraft_bench find` searches for."""
SEARCHED = {name: ("UniPC", (5, 8)) for name in ("emoji-sd", "emoji-flux", "emoji-wan")}
"""By pipeline: over which scheduler, for how many steps."""

STITCH = {"model": "emoji-sd-small"}
AUTO = {"artefact": "plugins/autodiffusion/benchmarks/{pipeline}-{steps}-steps.json"}
V3 = {"artefact": "calibrate", "corrector": "off"}


def searched(pipeline: str, first: int = 0) -> tuple[Method, ...]:
    """AutoDiffusion's time steps over a scheduler of diffusers; the small model in the ``first`` steps."""
    on, numbers = SEARCHED[pipeline]
    label = f"{'t_stitch + ' if first else ''}autodiffusion over {on}"
    made = []
    for k in numbers:
        stitch = {"t_stitch": {**STITCH, "fraction": first / k}} if first else {}
        made.append(plugin(label, k, on, **stitch, autodiffusion={"artefact": FOUND}))
    return tuple(made)


def deepcache_duel(*intervals: int) -> tuple[Method, ...]:
    """Ours and the package, the same settings."""
    ours = [plugin("deepcache", deepcache={"interval": n}) for n in intervals]
    return (*ours, *(peer("DeepCache", "deepcache", interval=n) for n in intervals))


def emoji_sd(quick: bool) -> list[Bout]:
    """A U-Net, 50 DDIM steps, guidance."""
    few = (5, 8, 10) if quick else (4, 5, 6, 8, 10, 15)
    intervals = (3,) if quick else (2, 3, 5, 10)
    ladder = (20, 14, 10, 7, 5, 4) if quick else (33, 25, 20, 14, 12, 10, 8, 7, 6, 5, 4, 3)
    corrected = {**V3, "corrector": "pseudo"}
    solvers = (
        *(method for kind, label in SCHEDULERS if kind == "diffusion" for method in scheduler(label, kind, *few)),
        *(plugin("dpm_solver_v3", k, dpm_solver_v3=corrected if k >= 8 else V3) for k in few),
        *(plugin("t_stitch + dpm_solver_v3", k, t_stitch={**STITCH, "fraction": 1 / k}, dpm_solver_v3=corrected) for k in few if k >= 8),
        *searched("emoji-sd"),
        *searched("emoji-sd", first=1),
        plugin("autodiffusion", 4, autodiffusion=AUTO),
        plugin("t_stitch + autodiffusion", 4, t_stitch={**STITCH, "fraction": 0.5}, autodiffusion=AUTO),
    )
    caches = (
        plugin("faster_diffusion", faster_diffusion={}),
        *(plugin("t_stitch", t_stitch={**STITCH, "fraction": f}) for f in ((0.4,) if quick else (0.2, 0.4, 0.6, 0.8))),
        *(plugin("deepcache + dpm_solver_v3", k, deepcache={"interval": 2}, dpm_solver_v3=V3) for k in few if k >= 8),
    )
    bouts = [
        Bout("quality", "emoji-sd", 50, (*plain(*ladder), *solvers, *caches)),
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
    few = (5, 8) if quick else (5, 6, 8, 10, 15)
    own = (
        *(plugin("ertacache", ertacache={"artefact": "calibrate", "threshold": t}) for t in levels),
        *(plugin("dpm_solver_v3", k, dpm_solver_v3={**V3, "corrector": "pseudo" if k >= 8 else "off"}) for k in few),
        *(method for kind, label in SCHEDULERS if kind == "flow" for method in scheduler(label, kind, *few)),
        *searched(pipeline),
        *(cache("FirstBlockCache", "FirstBlockCacheConfig", threshold=t) for t in levels),
        *(cache("TaylorSeer", "TaylorSeerCacheConfig", cache_interval=n) for n in ((3,) if quick else (2, 3, 5))),
        *(cache("MagCache", "MagCacheConfig", threshold=t, num_inference_steps=steps) for t in ((0.06,) if quick else (0.03, 0.06, 0.12))),
        *(cache("PAB", "PyramidAttentionBroadcastConfig", spatial_attention_block_skip_range=n) for n in ((2,) if quick else (2, 4))),
        cache("FasterCache", "FasterCacheConfig", is_guidance_distilled=True),  # these pipelines call once a branch, which it cannot join
    )
    return [
        Bout("quality", pipeline, steps, (*plain(*ladder), *own)),
        Bout("quality", pipeline, steps, tuple(peer("cache-dit", threshold=t) for t in (*levels, 0.3 if quick else 0.5)), "cache-dit"),
        *(Bout("quality", pipeline, steps, (peer("para-attn", threshold=t),), "para-attn") for t in levels),  # it patches the class
    ]


FAR = {"flux": 10.0, "wan": 0.3}
"""Thresholds by layout: with random weights they say nothing about a trained model; each makes it skip some steps, and not all."""


def speed(quick: bool) -> list[Bout]:
    """Layouts of real models, random weights."""
    steps, interval, few = (2, 2, 4) if quick else (6, 3, 8)
    unet = (plugin("deepcache", deepcache={"interval": interval}), peer("DeepCache", "deepcache", interval=interval))
    stitch = plugin("t_stitch", t_stitch={"model": "half", "fraction": 0.5})
    faster = () if quick else (plugin("faster_diffusion", faster_diffusion={}),)  # its key steps need a longer run

    def dit(name: str) -> tuple[Method, ...]:
        erta = plugin("ertacache", ertacache={"artefact": "calibrate", "threshold": FAR[name]})
        return erta, cache("FirstBlockCache", "FirstBlockCacheConfig", threshold=FAR[name])

    bouts = [Bout("speed", "sd15", steps, (*unet, stitch, *faster), "DeepCache")]
    bouts += [Bout("speed", "flux", few, (*dit("flux"), peer("cache-dit", threshold=FAR["flux"])), "cache-dit")]
    bouts += [Bout("speed", "wan", few, dit("wan"))]
    if not quick:
        bouts += [Bout("speed", "sdxl", steps, (*unet, stitch, *faster), "DeepCache")]
        bouts += [Bout("speed", "sd15", steps, (peer("tomesd", ratio=0.5),), "tomesd")]
        bouts += [Bout("speed", "pixart", steps, (stitch,))]
        bouts += [Bout("speed", name, few, (peer("para-attn", threshold=t),), "para-attn") for name, t in FAR.items()]
    return bouts


PART = 24
"""Most methods of a bout of the full run: what an interruption loses is one bout."""


def in_parts(bout: Bout) -> list[Bout]:
    """A bout of many methods as several."""
    return [replace(bout, methods=bout.methods[start : start + PART]) for start in range(0, len(bout.methods), PART)]


def all_bouts(quick: bool) -> list[Bout]:
    """Everything, in the order in which it is run."""
    wan = 20 if quick else 50
    bouts = [*emoji_sd(quick), *transformer("emoji-flux", 28, quick), *transformer("emoji-wan", wan, quick), *speed(quick)]
    return bouts if quick else [part for bout in bouts for part in in_parts(bout)]
