"""What a plugin is: one class for one paper's method.

A plugin implements the hook points it needs, each a method in the *around* form ``(self, call, next)``: look at or change ``call``
(``call.replace(name=value)`` gives a changed copy), call ``next(call)`` zero, one or several times, look at or change the result.

    run(call, next)        one ``pipe(...)`` call            -> what the pipeline returns
    schedule(call, next)   ``scheduler.set_timesteps``       -> Schedule(timesteps, sigmas)
    denoise(call, next)    one denoiser forward              -> the prediction, a tensor
    block(call, next)      one block's forward               -> what the block returns
    attention(call, next)  one attention layer's processor   -> what the processor returns
    control(call, next)    one ControlNet forward            -> what the ControlNet returns
    guide(call, next)      branches -> one prediction        -> a tensor shaped like the pipeline's own combination
    step(call, next)       ``scheduler.step``                -> StepOutput(sample, x0)
    modules(call, next)    surgery at attach time            -> None; ``call.swap(name, module)``, undone by the core

A plugin keeps nothing of a run on itself: ``call.state`` is fresh for every run and branch, ``call.shared`` for every run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar

from diffgraft.installed.config import PluginConfig, build_config, is_at
from diffgraft.installed.errors import BrokenPlugin
from diffgraft.installed.offers import API

if TYPE_CHECKING:  # plugins are declared without torch
    from diffgraft.installed.anatomy import AttentionInfo, BlockInfo, Target
    from diffgraft.installed.family import Family

RUN_FACTS = frozenset({"scheduler", "steps", "shape"})
"""What of a run a file may be made for, beside the model."""
LOOP = frozenset({"run", "schedule", "guide", "step"})
"""Points around the pipeline's loop, which a session (``pipe.plugins.session``) has not."""
INSIDE = frozenset({"denoise", "block", "attention"})
"""Points of the denoiser, which it has."""
POINTS = ("run", "schedule", "control", "denoise", "block", "attention", "guide", "step", "modules")


@dataclass(frozen=True)
class Paper:
    """Where a method comes from, and what of it is here.

    title, arxiv   the paper ("2312.00858"), authors' wording
    implemented    what the plugin does, in a sentence
    omitted        what of the paper or its code is left out, and why
    licence        licence note of the official code ("Apache-2.0; written from the paper")
    """

    title: str
    arxiv: str
    implemented: str
    omitted: str = ""
    licence: str = ""


@dataclass(frozen=True)
class Effects:
    """What a plugin does to a run, in the words the planner reasons with.

    replaces   "scheduler", "denoiser", "noise" (which noise the pipeline draws: the call's generator)
    skips      "denoiser" (whole calls), "blocks", "branches"
    edits      "timestep", "schedule", "latents", "prediction", "attention", "conditioning", "resolution", "weights"
    needs      "gradients", "determinism", "all_blocks", "extra_forwards", "calibrated_run" (the steps and size of its artefact),
               "own_steps" (its calls are no successive steps of one path, so that nothing may be edited from one to the next),
               "one_size" (what it was given, a measurement, mask or start, is of the call's own size),
               "plain_gradients" (of the denoiser itself, taken past all other plugins: `latent_gradient`; "gradients": through them)
    stochastic  draws noise of its own
    couples_batch  sample i in a batch may differ from sample i alone
    """

    replaces: frozenset[str] = frozenset()
    skips: frozenset[str] = frozenset()
    edits: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    stochastic: bool = False
    couples_batch: bool = False

    VOCABULARY: ClassVar[dict[str, frozenset[str]]] = {
        "replaces": frozenset({"scheduler", "denoiser", "noise"}),
        "skips": frozenset({"denoiser", "blocks", "branches"}),
        "edits": frozenset({"timestep", "schedule", "latents", "prediction", "attention", "conditioning", "resolution", "weights"}),
        "needs": frozenset({"gradients", "plain_gradients", "determinism", "all_blocks", "extra_forwards"})
        | {"calibrated_run", "one_size", "own_steps"},
    }

    def __post_init__(self) -> None:
        for name, words in self.VOCABULARY.items():
            given = frozenset(getattr(self, name))
            object.__setattr__(self, name, given)
            if unknown := given - words:
                raise BrokenPlugin(f"Effects({name}=...): unknown {sorted(unknown)}; known: {sorted(words)}")

    @property
    def reads_only(self) -> bool:
        """Whether the run is what it is without the plugin, which only looks at it; noise that it draws for that stays outside the run."""
        return not (self.replaces or self.skips or self.edits or self.stochastic)

    @property
    def asks_at_latents(self) -> bool:
        """Whether the plugin may have the denoiser asked at latents that are not the pipeline's: edited ones, or a forward's of its own."""
        return bool("latents" in self.edits or self.needs & {"extra_forwards", "gradients", "plain_gradients"})

    def words(self) -> str:
        """One line for people: ``"skips blocks; edits timestep"``."""
        parts = [f"{name} {', '.join(sorted(getattr(self, name)))}" for name in self.VOCABULARY if getattr(self, name)]
        parts += ["draws noise"] if self.stochastic else []
        parts += ["couples the samples of a batch"] if self.couples_batch else []
        return "; ".join(parts) or "changes nothing"


@dataclass(frozen=True)
class Need:
    """One thing that a plugin needs beside its knobs; the core fetches and checks it before anything is touched (``call.given``).

    kind   a name in the entry-point group ``diffgraft.needs``; those that come with diffgraft:
           "artefact": what `calibrate` made, a file (path or Hub id) or an ``Artefact``; "inversion": what `invert` made, likewise;
           "pipeline": a second pipeline of the same latent space (bundled name, folder, Hub id or a live one), or a list of them;
           "reward": how good a picture is, any callable or registered name; "search": what `search` found, a file or a ``Finding``;
           "fit": what `fit` learned, likewise; "adapter": a LoRA file (path or Hub id), or a list of them, there while the plugin is on;
           "weights": what somebody else published, a file (path or Hub id), several, or a state dict -> ``methods.published.Weights``;
           "encoder": a transformers text encoder with its tokenizer (folder, Hub id or the two) -> ``methods.encoders.Encoder``
    knob   the knob that names it; where the knob is None the plugin does without
    families  for "pipeline": the families that it may be of, named as a plugin names its own, where it need not be a stand-in for the first
           one: the two meet as pixels (``methods.decoding``). By default it is of the first one's family and latent space
    fits   what of a run a file is held against beside the model; of what was found by a search also "guidance"
    holds  what an artefact, an inversion or a finding holds (``diffgraft.methods.schema.Holds``), or published weights
           (``diffgraft.methods.layouts.Layout``): checked before anything is touched; of an adapter a kind of
           ``diffgraft.methods.adapters.Adapter``, where its file holds more than a LoRA
    crosses  how large the error is that such a file makes on a model whose weights are kept in another way than those it was made for
           (quantised, or in 8 bits), in words; None: not known, and refused
    """

    kind: str
    knob: str
    fits: frozenset[str] = RUN_FACTS
    holds: Any = None
    crosses: str | None = None
    families: tuple[str, ...] = ()


@dataclass
class NoState:
    """The state of a plugin that keeps none."""


class Plugin:
    """Base of every plugin; see the module's docstring for the hook points.

    name      short snake_case name, the same as folder and entry point
    paper     :class:`Paper`
    api       contract number the plugin was written for (:data:`API`)
    families  names of families it works on, or their kinds ("unets", "dits"), or "*" for all; one of consistency models only by name
    not_on    pipeline classes of these families that it does not work on: a pattern of their names ("*Img2Img*") -> why
    Config    knobs, a :class:`~diffgraft.installed.config.PluginConfig`
    State     what is kept in a run; built without arguments
    neutral   settings at which the output equals the baseline bit for bit
    active    settings at which the method shows on a tiny pipeline in a few steps (used by the contract suite)
    effects   :class:`Effects` at any settings; a plugin may give itself fewer in ``__init__``, by its knobs
    scheduler  a ``SchedulerMixin`` subclass that replaces the pipeline's for a run, or None
    needs     what it needs beside its knobs, see :class:`Need`
    calibration  the ``Calibrator`` that makes its artefact, or None
    inversion    the ``Inverter`` that makes the code of a picture, or None
    search       the ``Searcher`` that finds its settings, or None
    fitting      the ``Fitter`` that learns what it needs, or None
    sessions     whether its hooks of the denoiser do in a session what they do in a run, though it has hooks around the loop too
    tune         knob -> the values worth trying for time against fidelity, gentlest first, each valid with the other knobs' defaults;
                 one value alone sets the knob for tuning. Read by ``diffgraft tune``
    """

    name: ClassVar[str]
    paper: ClassVar[Paper]
    api: ClassVar[int] = API
    families: ClassVar[tuple[str, ...]]
    not_on: ClassVar[Mapping[str, str]] = {}
    Config: ClassVar[type[PluginConfig]] = PluginConfig
    State: ClassVar[type[Any]] = NoState
    neutral: ClassVar[dict[str, Any]]
    active: ClassVar[dict[str, Any]] = {}
    effects: Effects = Effects()
    scheduler: ClassVar[type[Any] | None] = None
    needs: ClassVar[tuple[Need, ...]] = ()
    calibration: ClassVar[type[Any] | None] = None
    inversion: ClassVar[type[Any] | None] = None
    search: ClassVar[type[Any] | None] = None
    fitting: ClassVar[type[Any] | None] = None
    sessions: ClassVar[bool] = False
    tune: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def __init__(self, **knobs: Any) -> None:
        self.config = build_config(self.name, self.Config, knobs)

    @property
    def is_neutral(self) -> bool:
        """Whether it stands at its neutral settings, with nothing given beside them."""
        nothing_given = all(need.knob in self.neutral or getattr(self.config, need.knob) is None for need in self.needs)
        return bool(self.neutral) and nothing_given and is_at(self.config, self.neutral)

    @property
    def own_knobs(self) -> dict[str, Any]:
        """The knobs that were set, as given (live objects stay the same objects), in the order of `Config`."""
        return {name: getattr(self.config, name) for name in self.Config.model_fields if name in self.config.model_fields_set}

    @classmethod
    def why_not_on(cls, pipeline_class: str) -> str | None:
        """Why it does not work on a pipeline class of its families; None where it does, as far as is known without the pipeline."""
        return next((why for pattern, why in cls.not_on.items() if fnmatchcase(pipeline_class, pattern)), None)

    def check(self, target: Target) -> None:
        """Refuse a pipeline that the families alone do not rule out. Raise ``Unsupported`` or ``ConfigError``; touch nothing."""

    def select_blocks(self, blocks: Sequence[BlockInfo]) -> Sequence[BlockInfo]:
        """The blocks that ``block`` wants to wrap; by default the top-level ones, not the layers inside them."""
        return [block for block in blocks if not block.is_layer]

    def select_attention(self, layers: Sequence[AttentionInfo]) -> Sequence[AttentionInfo]:
        """The attention layers that ``attention`` wants to wrap; by default all."""
        return layers

    def make_scheduler(self, old: Any, family: Family) -> Any | None:
        """The scheduler that takes the place of the pipeline's ``old`` one for a run; None leaves it (at neutral settings).

        Raise ``Unsupported`` for a scheduler that the method is not valid for: nothing has begun yet.
        """
        return None if self.scheduler is None else self.scheduler.from_config(old.config)

    @classmethod
    def needs_loop(cls) -> bool:
        """Whether what it does in the denoiser rests on hooks that only a whole run has."""
        points = set(cls.points())
        return bool(points & INSIDE and points & LOOP) and not cls.sessions

    @classmethod
    def claims(cls, family: Family) -> bool:
        """Whether its ``families`` name this one, and what it does reaches the steps there."""
        bound = family.binds(cls.effects.needs, cls.effects.replaces)
        return family.is_among(cls.families) and not bound and not family.lost(cls.effects.edits, cls.points())

    @classmethod
    def points(cls) -> tuple[str, ...]:
        """The hook points that this class implements; an object may give itself fewer in ``__init__``, by its knobs."""
        return tuple(point for point in POINTS if callable(getattr(cls, point, None)))
