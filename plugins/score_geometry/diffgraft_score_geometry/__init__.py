"""score_geometry: is the score a gradient, and how many directions do the data have? (Horvat, Pfister, arXiv 2402.03845)

A read-only probe of a run: Jacobian products of the denoiser at steps of the user's choice, past the other plugins. The picture is the one
that the pipeline makes without it, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Annotated, Any, ClassVar

import torch
from diffgraft import ConfigError, DenoiseCall, Effects, Paper, Plugin, PluginConfig, RunCall, Unsupported
from diffgraft.methods.decoding import ensure_decodes, to_latents
from diffgraft.methods.gradients import ensure_differentiable
from diffgraft.methods.predictions import known_kind, levels_after, levels_of
from diffusers.image_processor import VaeImageProcessor
from PIL.Image import Image
from pydantic import AfterValidator, Field
from torch import Tensor

from diffgraft_score_geometry.method import (
    asymmetry,
    inner,
    leading,
    parts,
    score_dimension,
    score_spectrum,
    singular_values,
    trace_dimension,
)
from diffgraft_score_geometry.score import Draw, ScoreField

__all__ = ["ScoreGeometry"]
__version__ = "0.1.0"

BY = {"score_dimension": "stacked scores", "flow_dimension": "the flow's Jacobian"}
"""Whole numbers of directions, by the name in the report."""


def ensure_pictures(given: Any) -> Any:
    """Raises ValueError for what is neither pixels nor PIL pictures."""
    pictures = given if isinstance(given, (list, tuple)) and given else [given]
    pixels = (
        isinstance(given, Tensor)
        and given.ndim == 4
        and given.shape[1] == 3
        and given.is_floating_point()
        and bool((given.abs() <= 1).all())
    )
    if given is None or pixels or all(isinstance(picture, Image) for picture in pictures):
        return given
    raise ValueError(
        "give a PIL picture, a list of them, or float pixels [n, 3, height, width] in -1 to 1 (in Python: not on the command line)"
    )


def none_or_from(least: int) -> AfterValidator:
    """A number for which little is no use."""

    def ensure(number: Any) -> Any:
        if 0 < number < least:
            raise ValueError(f"0 for none, or {least} and more")
        return number

    return AfterValidator(ensure)


class ScoreGeometryConfig(PluginConfig):
    """Knobs of score_geometry."""

    steps: tuple[int, ...] = Field((-1,), description="the steps of the run that are probed; negative ones count from the end. (): none")
    probes: int = Field(8, ge=0, le=4096, description="random vectors u for J u and J^T u at each of these steps; 0: none")
    points: Annotated[float, none_or_from(1)] = Field(
        0.0,
        ge=0,
        le=1000,
        description="K / d: noisy points around the sample whose scores are stacked, for each of its d numbers: 4 or more for a "
        "dimension to be read, 1 at least. 0: none",
    )
    picture: Annotated[Any, AfterValidator(ensure_pictures)] = Field(
        None,
        description="probe around this instead of around what the run makes: a PIL picture, a list of them, or pixels [n, 3, height, "
        "width] in -1 to 1; one, or one for each sample of the call",
    )
    directions: Annotated[int, none_or_from(2)] = Field(
        0,
        ge=0,
        le=4096,
        description="columns of Y = d x_0 / d x_T that are followed through the run: more than the dimension, 2 at least. 0: none",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of the random vectors; the run's own generators are not touched")


@dataclass
class Probe:
    """What was found at one step: tensors by the name that they have in the report."""

    step: int
    found: dict[str, Tensor]


@dataclass
class Followed:
    """What is kept in one run: the clean latents of the knob's pictures, what was found, and for the flow Y's columns [m, n, ...].

    ``before`` and ``expected`` are the latents before the last step and where the ODE takes them, ``drifts`` how far off that was.
    """

    centre: Tensor | None = None
    probes: list[Probe] = field(default_factory=list)
    columns: Tensor | None = None
    before: Tensor | None = None
    expected: Tensor | None = None
    drifts: list[Tensor] = field(default_factory=list)


class ScoreGeometry(Plugin):
    name = "score_geometry"
    paper = Paper(
        title="On gauge freedom, conservativity and intrinsic dimensionality estimation in diffusion models",
        arxiv="2402.03845",
        implemented="the asymmetry of the score's Jacobian; the intrinsic dimension from the Jacobian of the flow (the paper's), from that "
        "of the denoiser, and from stacked scores",
        omitted="training of conservative models; the gauge condition, which wants the true score",
        licence="no official code is known; written from the equations",
    )
    families = ("unets", "cogvideox", "dit", "flux", "flux_fill", "ltx", "pixart", "qwen_image", "sd3", "wan")
    not_on: ClassVar[dict[str, str]] = {
        "*ControlNet*": "a ControlNet sees the latents too, so that the denoiser's Jacobian is not the score's"
    }
    Config = ScoreGeometryConfig
    State = Followed
    neutral: ClassVar[dict[str, Any]] = {"steps": (), "directions": 0}
    active: ClassVar[dict[str, Any]] = {"steps": (1,), "probes": 1}
    effects = Effects(needs=frozenset({"extra_forwards", "plain_gradients"}))
    config: ScoreGeometryConfig

    def __init__(self, **knobs: Any) -> None:
        super().__init__(**knobs)
        if not (self.config.directions or (self.config.steps and self.config.probes)):
            self.effects = replace(self.effects, needs=self.effects.needs - {"plain_gradients"})

    def check(self, target: Any) -> None:
        if self.config.picture is not None:
            ensure_decodes(target.pipe, target.family)

    # a run --------------------------------------------------------------------------------------------------------------------------

    def run(self, call: RunCall, next: Callable[[RunCall], Any]) -> Any:
        if self.config.steps:
            known_kind(call.family, call.pipe.scheduler)
        if self.config.steps and self.config.picture is not None:
            call.shared.centre = self.encoded(call)
        result = next(call)
        found: Followed = call.shared
        if found.probes:
            names = found.probes[0].found
            call.record({"step": torch.tensor([probe.step for probe in found.probes])})
            call.record({name: torch.stack([probe.found[name] for probe in found.probes]) for name in names})
            for probe in found.probes:
                call.note(f"step {probe.step}: {in_words(probe.found)}")
        if found.columns is not None:
            values = singular_values(found.columns)
            drift = torch.stack(found.drifts).mean() if found.drifts else torch.zeros(())
            made = {"flow_values": values, "flow_dimension": leading(values), "flow_drift": drift}
            call.record(made)
            call.note(f"along the run: {in_words(made)}")
            if float(drift) > 0.5:
                call.note("the run's steps are not those of its ODE (noise in them, or another plugin's doing): use DDIM or Euler")
        return result

    def encoded(self, call: RunCall) -> Tensor:
        """The clean latents of the knob's pictures [n, ...]."""
        picture = self.config.picture
        if not isinstance(picture, Tensor):
            pictures = [each.convert("RGB") for each in (picture if isinstance(picture, (list, tuple)) else [picture])]
            picture = VaeImageProcessor().preprocess(pictures).contiguous()  # channels-last, layers would have no forward mode
        vae = getattr(call.pipe, "vae", None)
        with torch.no_grad():
            return to_latents(call.pipe, call.family, picture.to(call.pipe.device, None if vae is None else vae.dtype))

    # the denoiser's calls -----------------------------------------------------------------------------------------------------------

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Tensor]) -> Tensor:
        config = self.config
        if call.extra or "cond" not in call.branches or not (config.steps or config.directions):
            return next(call)
        if call.step.call == 0:
            self.ensure_fits(call)
        step = call.step
        if step.stage == 0 and {step.index, step.index - step.total} & set(config.steps):
            call.shared.probes.append(Probe(step.index, self.probe(ScoreField(call.only("cond")), call.shared)))
        if config.directions:
            self.follow(ScoreField(call.only("cond")), call.shared)
        return next(call)

    def ensure_fits(self, call: DenoiseCall) -> None:
        """Raises where these knobs cannot be had in this run, at its first call."""
        config, total = self.config, call.step.total
        for step in config.steps:
            if not -total <= step < total:
                raise Unsupported(f"score_geometry: steps has {step}, of a run with {total} steps: 0 to {total - 1}, or -{total} to -1")
        levels_of(call)
        if "plain_gradients" in self.effects.needs:
            ensure_differentiable(call)
        centre, x = call.shared.centre, call.latents
        if centre is not None and (centre.shape[1:] != x.shape[1:] or len(centre) not in (1, len(x))):
            raise ConfigError(
                f"plugin 'score_geometry': picture gives latents {tuple(centre.shape)}, the run's are {tuple(x.shape)}: give pictures of "
                "the call's size, one or one for each sample"
            )
        if config.directions and call.guided:
            raise ConfigError(
                "plugin 'score_geometry': directions follow the flow of the model's score, and guidance makes another one: turn it off "
                f"({call.family.guidance.scale}=1)"
            )
        if config.directions and call.step.stages > 1:
            raise Unsupported(f"score_geometry: {type(call.pipe.scheduler).__name__} makes a step in several stages; use DDIM or Euler")

    def probe(self, score: ScoreField, shared: Followed) -> dict[str, Tensor]:
        """All that is asked for at one step. Of it only the spectra wait for the device, as their solvers do."""
        config, step = self.config, score.call.step.index
        found = {"level": score.levels.s / score.levels.a}
        draws = [Draw(config.seed, step, use) for use in range(3)]
        centre, x, own = shared.centre, score.call.latents, 1
        if centre is not None:
            centre = centre.to(x)
            own = len(x) // len(centre)  # around one picture each row has a point, and vectors, of its own
            x = score.noisy(centre, draws[1].like(x, own)).to(x.dtype).expand_as(x)
        if config.probes:
            found |= self.jacobian(score, x, draws[0], own)
        if config.points:
            found |= self.stacked(score, score.clean(x, score.output(x)) if centre is None else centre, draws[2])
        return found

    def jacobian(self, score: ScoreField, x: Tensor, draw: Draw, own: int) -> dict[str, Tensor]:
        """From J u and J^T u of random u."""
        squares, pairs, us, projected = [], [], [], []
        for _ in range(self.config.probes):
            u, w = draw.like(x, own).expand_as(x), draw.like(x, own).expand_as(x)
            ju, jtu = score.products(x, u)
            squares.append(torch.stack(parts(ju, jtu)))
            pairs.append(torch.stack([inner(w, ju), inner(w, jtu)]))
            us.append(u)
            projected.append(u - score.levels.s * ju)
        anti, sym = torch.stack(squares, 1)
        ratio, error = asymmetry(anti, sym)
        trace, trace_error = trace_dimension(torch.stack(us), torch.stack(projected))
        return {
            "asymmetry": ratio,
            "asymmetry_error": error,
            "antisymmetric": anti,
            "symmetric": sym,
            "pairs": torch.stack(pairs),
            "trace_dimension": trace,
            "trace_error": trace_error,
            "tangent_values": singular_values(torch.stack(projected)) / self.config.probes**0.5,
        }

    def stacked(self, score: ScoreField, centre: Tensor, draw: Draw) -> dict[str, Tensor]:
        """From the scores of noisy points around the centre; the rows of the call share the points of a single one."""
        centres, d = len(centre), centre[0].numel()
        together = len(score.call.latents) // centres
        forwards = -(-round(self.config.points * d) // together)
        gram = torch.zeros(centres, d, d, dtype=torch.float64, device=centre.device)
        for _ in range(forwards):
            z = draw.like(centre, together).repeat_interleave(centres, 0)
            x = score.noisy(centre.repeat(together, *[1] * (centre.ndim - 1)), z)
            eps = score.noise(x, score.output(x)).double().flatten(1).unflatten(0, (together, centres)).movedim(1, 0)
            gram.baddbmm_(eps.mT, eps)
        values = score_spectrum(gram, forwards * together)
        return {"score_values": values, "score_dimension": score_dimension(values, forwards * together)}

    def follow(self, score: ScoreField, shared: Followed) -> None:
        """Y through one step of the flow: that of the ODE from this level to the next, differentiated."""
        x, after = score.call.latents, levels_after(score.call)
        if shared.columns is None:
            draw = Draw(self.config.seed, 0, 3)
            drawn = draw.like(x, self.config.directions).unsqueeze(1).expand(-1, len(x), *x.shape[1:])
            shared.columns = drawn / self.config.directions**0.5
        else:
            shared.drifts.append((x - shared.expected).norm() / (x - shared.before).norm())
        shared.before, shared.expected = x, score.moved(x, score.output(x), after)
        shared.columns = torch.stack([score.moved(y, score.tangent(x, y), after) for y in shared.columns])


def in_words(found: dict[str, Tensor]) -> str:
    """The findings of the first samples, for people."""
    words = []
    if "asymmetry" in found:
        words.append(f"asymmetry {few(found['asymmetry'], found['asymmetry_error'])}")
        words.append(f"dimension by the trace {few(found['trace_dimension'], found['trace_error'])}")
    words += [f"dimension by {name} {few(found[key])}" for key, name in BY.items() if key in found]
    return "; ".join(words) or "nothing was asked for"


def few(values: Tensor, errors: Tensor | None = None) -> str:
    """The first numbers of [n], with their standard errors."""
    texts = [f"{value:.3g}" for value in values[:4].tolist()]
    if errors is not None:
        texts = [f"{text} ± {error:.1g}" if isfinite(error) else text for text, error in zip(texts, errors.tolist(), strict=False)]
    return ", ".join(texts) + (", ..." if len(values) > 4 else "")
