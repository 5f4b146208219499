"""One cache at work: diffusers' hooks for one denoiser and one guidance branch of one run, and what they did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffgraft import ConfigError, DenoiseCall, Family, Unsupported, root_of
from diffusers.hooks.hooks import CacheContext
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS, nearest_interp
from torch import Tensor, nn

from diffgraft_diffusers_cache.knobs import CONFIGS, SKIPS, STACK, DiffusersCacheConfig, knobs_of
from diffgraft_diffusers_cache.shadow import ModelHook, Place, hooks_for, let_agree, managers_of

LITE = "proj_out"
"""What TaylorSeer's lite mode extrapolates: the layer that makes the denoiser's output, but for the order of its values."""
FORMATS = {"bcfhw": "BCFHW", "bfchw": "BFCHW", "bchw": "BCHW"}
"""A family's layout of latents -> FasterCache's ``tensor_format``."""
INFINITE = float("inf")


@dataclass
class Cache:
    """The hooks by path, and where the run is as they are told it.

    ``time``      the scheduler's timestep of this call as a number; infinite, outside of every range, in the first one, which has
                  nothing to reuse (FasterCache would reuse it all the same)
    ``latents``   what SeaCache compares: per sample (C, T, H, W)
    """

    places: dict[str, Place] = field(default_factory=dict)
    root: ModelHook | None = None
    """The hook on the denoiser itself."""
    managers: list[Any] = field(default_factory=list)
    contexts: dict[str | None, CacheContext] = field(default_factory=dict)
    """The branches that it serves, as diffusers is told them."""
    time: float = INFINITE
    latents: Callable[[], list[Tensor]] | None = None
    turn: int = -1
    computed: int = 0
    skipped: int = 0
    halved: bool = False
    """Whether this denoiser call ran without its unconditional rows."""
    what: str = "layers"
    """What its hooks stand for, in the report."""
    measures: bool = False
    counts_calls: bool = False
    """Whether its state is where in the schedule it is (MagCache's)."""

    def enter(self, branch: str | None, late: int) -> None:
        """A branch begins, at call number ``late`` of the run."""
        self.contexts[branch] = context = CacheContext(branch or "cond")
        if self.counts_calls:
            self.tell(context)
            self.managers[0].get_state().step_index = late

    def begin(self, time: float) -> None:
        """Before a denoiser call."""
        self.turn += 1
        self.time = time if self.turn else INFINITE
        self.computed = self.skipped = 0
        self.halved = False

    def tell(self, context: CacheContext) -> None:
        """What ``cache_context`` would tell."""
        for manager in self.managers:
            manager.set_context(context)

    def through(self, path: str, call: Any, next: Callable[[Any], Any]) -> Any:
        """One module's forward, with its hooks around it where it has any. A module that is asked twice in one denoiser call (by a plugin
        further in, that asks the denoiser itself) is computed the second time: the hooks would take that for the next step."""
        place = self.places.get(path)
        if place is None or place.turn == self.turn:
            return next(call)
        out = place.through(call, next, self.turn)
        if place.ran:
            self.computed += 1
        else:
            self.skipped += 1
        return out

    def denoised(self, call: DenoiseCall, next: Callable[[Any], Any]) -> Tensor:
        """One denoiser forward, with the hook on the denoiser itself where the method has one."""
        root = self.root
        if root is None:
            return self.through(LITE, call, next)  # type: ignore[no-any-return]
        if not hasattr(root, "new_forward"):  # SeaCache's looks at the latents before, and cleans up behind
            root.pre_forward(call.model, *call.args, **call.kwargs)
            return root.post_forward(call.model, next(call))  # type: ignore[no-any-return]
        rows, asked = call.sample.shape[0], []

        def inner(hidden_states: Tensor) -> Tensor:
            asked.append(hidden_states.shape[0])
            return next(call if asked[0] == rows else call.only("cond"))  # type: ignore[no-any-return]

        # FasterCache's cuts off the unconditional rows where they are not needed: of the one argument that it is given
        root.fn_ref.original_forward = inner  # check: allow foreign_writes because this hook was made for this run
        out: Tensor = root.new_forward(call.model, hidden_states=call.sample)
        root.fn_ref.original_forward = None  # check: allow foreign_writes because this hook was made for this run
        self.halved = asked[0] != rows
        return out

    def report(self, call: DenoiseCall) -> None:
        """Into the run's report: what this denoiser call saved, and the ratios that MagCache has measured up to here."""
        reused = self.skipped > 0 or self.halved
        call.count("steps skipped" if reused else "steps computed")
        for key, n in (("skipped", self.skipped), ("computed", self.computed)):
            if n:
                call.count(f"{self.what} {key}", n)
        if self.halved:
            call.count("uncond skipped")
        if self.measures:
            state = self.managers[0].get_state()
            call.record({f"mag_ratios.{call.branch}": torch.tensor(state.calibration_ratios)})


def config_for(knobs: DiffusersCacheConfig, cache: Cache, family: Family, **told: Any) -> Any:
    """diffusers' config: the knobs, and what the run says.

    Args:
        told: ``branches`` of the denoiser call, ``ratios`` and ``calls`` of the run for MagCache.
    """
    options = dict(knobs.options)
    if knobs.method in ("pab", "faster"):
        options["current_timestep_callback"] = lambda: cache.time
    if knobs.method == "faster":
        options["is_guidance_distilled"] = told.get("branches", 1) == 1
        options["tensor_format"] = FORMATS.get(family.latents, "BCHW")
        options.setdefault("attention_weight_callback", half)
    if knobs.method == "mag":
        options["mag_ratios"] = told.get("ratios")
        # one more than there are, when measuring: at the last one diffusers prints the ratios and forgets them
        options |= {"num_inference_steps": told.get("calls", 1) + knobs.measures, "calibrate": knobs.measures or "ratios" not in told}
    if knobs.method == "sea" and knobs.raw_vision_callback is None:
        options["raw_vision_callback"] = lambda *_: cache.latents() if cache.latents is not None else None
    return CONFIGS[knobs.method](**options)


def half(module: nn.Module) -> float:
    """diffusers' default ``attention_weight_callback``, without its warning."""
    return 0.5


def volumes(call: DenoiseCall) -> list[Tensor]:
    """The latents of a denoiser call as SeaCache takes them: of each row (C, T, H, W)."""
    x = call.latents
    if call.family.latents == "bchw":
        x = x.unsqueeze(2)
    elif call.family.latents == "bfchw":
        x = x.transpose(1, 2)
    return list(torch.cat([x] * len(call.branches)).unbind(0))


def made(call: DenoiseCall, knobs: DiffusersCacheConfig, times: list[float], begin: int) -> Cache:
    """A cache, for a denoiser that is called for the first time in this branch.

    Args:
        times: the scheduler's timesteps; the run begins at number ``begin`` of them.

    Raises:
        ConfigError: MagCache has no ratios for this branch.
    """
    calls, late = call.step.calls, call.step.call  # a branch, or a second denoiser, may begin in mid-run
    cache = Cache(what="blocks" if knobs.method in STACK else "layers", measures=knobs.measures, counts_calls=knobs.method == "mag")
    told: dict[str, Any] = {"branches": len(call.branches), "calls": calls}
    if knobs.method == "mag" and not knobs.measures:
        told["ratios"] = ratios_for(knobs, call.branch or "cond", len(times), begin, calls)
    config = config_for(knobs, cache, call.family, **told)
    if knobs.method == "taylorseer" and knobs.disable_cache_after_step is not None:
        config.disable_cache_after_step = max(knobs.disable_cache_after_step - late, 1)
    hooks = hooks_for(knobs.method, call.model, config)
    let_agree(hooks, call.agree)
    cache.managers = managers_of(hooks)
    (cache.root,) = hooks.pop("", [None])
    model = root_of(call.model)
    cache.places = {path: Place(model.get_submodule(path), group) for path, group in hooks.items()}
    return cache


def ratios_for(knobs: DiffusersCacheConfig, branch: str, whole: int, begin: int, calls: int) -> Tensor:
    """gamma_t for the calls of a run: the given ratios, stretched over the whole schedule, and of that the part that is run.

    Raises:
        ConfigError: there are none for this branch.
    """
    ratios: Any = FLUX_MAG_RATIOS if knobs.mag_ratios == "flux" else knobs.mag_ratios
    if isinstance(ratios, dict):
        if branch not in ratios:
            raise ConfigError(
                f"plugin 'diffusers_cache': mag_ratios = {{{', '.join(map(repr, ratios))}: ...}}: this run has the branch {branch!r} too; "
                "give ratios for each branch, or one list for all"
            )
        ratios = ratios[branch]
    ratios = torch.as_tensor(ratios, dtype=torch.float32)
    ratios = ratios if len(ratios) == whole else nearest_interp(ratios, whole)
    return ratios[begin : begin + calls]


def ensure_serves(call: DenoiseCall, knobs: DiffusersCacheConfig, times: list[float]) -> None:
    """Before anything is computed.

    Raises:
        ConfigError: with these knobs nothing could be reused in a run of so many calls.
        Unsupported: guidance, or the latents, are not such as the method can take.
    """
    calls, value, method = call.step.calls, knobs.value, knobs.method

    def useless(name: str, why: str) -> ConfigError:
        return ConfigError(f"plugin 'diffusers_cache': {name} = {value(name)}: {why}; change it, or leave this run without the plugin")

    if method == "taylorseer" and calls <= (least := value("disable_cache_before_step")):
        raise useless(
            "disable_cache_before_step", f"this run calls the denoiser {calls} times a branch, and the first {least} are computed"
        )
    if method == "mag":
        if knobs.measures and call.step.begin:
            raise Unsupported("diffusers_cache: mag_ratios = 'measure' needs a run of the whole schedule; this one begins in the middle")
        if not knobs.measures and (kept := int(value("retention_ratio") * calls + 0.5)) >= calls:
            raise useless("retention_ratio", f"of the {calls} calls of this run the first {kept} are computed")
    if method == "sea" and (kept := max(value("retention_steps"), 1) + value("cache_end_steps")) >= calls:
        raise useless("retention_steps", f"with cache_end_steps = {value('cache_end_steps')} all {calls} calls of this run are computed")
    if method in ("pab", "faster"):
        ranges = [name for name in SKIPS if in_use(knobs, name)]
        if not any(low < t < high for low, high in map(value, ranges) for t in times[1:]):
            raise useless(ranges[0], f"no call of this run but its first has its timestep there ({', '.join(f'{t:g}' for t in times[:6])})")
    if method == "faster" and call.guided:
        order = call.family.guidance.order
        if call.branches != ("uncond", "cond"):
            raise Unsupported(
                "diffusers_cache: method 'faster' makes the unconditional half of a batch from the conditional one, and "
                f"{type(call.pipe).__name__} asks for its branches ({', '.join(order)}) in another way; switch guidance off, or use "
                "method 'pab', which reuses attention in every branch by itself"
            )
        if call.sample.ndim != (4 if call.family.latents == "bchw" else 5) or call.family.latents not in FORMATS:
            raise Unsupported(
                f"diffusers_cache: method 'faster' splits pictures into frequencies, and the latents of {type(call.pipe).__name__} are "
                "packed into tokens; switch guidance off, or use method 'pab'"
            )


def in_use(knobs: DiffusersCacheConfig, name: str) -> bool:
    """Whether a range of timesteps belongs to something that is reused at all."""
    kind = name.removesuffix("timestep_skip_range")
    skip = f"{kind}skip_range" if kind.startswith("unconditional") else f"{kind}block_skip_range"
    return name in knobs_of(knobs.method) and knobs.value(skip) is not None
