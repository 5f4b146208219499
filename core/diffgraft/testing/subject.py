"""What a check works with: one plugin on one tiny pipeline, run under a :class:`Setting` and compared.

Baselines and reference outputs are kept for the process, keyed by what determines them, so that a check pays only for the history it makes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffgraft.kernel.errors import ConfigError
from diffgraft.kernel.family import Family
from diffgraft.kernel.loading import load_pipeline
from diffgraft.kernel.plugin import Plugin
from diffgraft.kernel.report import PluginReport
from diffgraft.kernel.stack import stack_of
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.calibration import calibrate_call
from diffgraft.methods.search import search_call

STEPS = 4
PROMPTS = ("a red apple on the left", "two green dogs")
NEGATIVES = ("blurry", "a drawing")
SCHEDULERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM++Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "FlowMatchEuler": ("FlowMatchEulerDiscreteScheduler", {}),
    "FlowMatchHeun": ("FlowMatchHeunDiscreteScheduler", {}),
}
"""Short name -> class and options. They are asked for only where the plain pipeline runs with them."""
BATCHED_INPUTS = ("prompt_embeds", "pooled_prompt_embeds", "add_text_embeds", "add_time_ids")
"""Callback tensors that hold both guidance halves while guidance is on."""


@dataclass(frozen=True)
class Setting:
    """How one call is made; hashable, so that its baseline is computed once.

    changes    call arguments on top of the tiny pipeline's own
    samples    which samples the batch holds: sample i has its own prompt and its own seed
    scheduler  short name from :data:`SCHEDULERS`, or None for the pipeline's own
    distinct   make repeated timesteps differ by one rounding unit
    cut        step after which guidance is cut off, or None
    processors whether every attention processor is wrapped by a foreign one
    ip_adapter whether an IP-Adapter with random weights is loaded and used
    lora       whether a LoRA with random weights is on the denoiser
    """

    changes: tuple[tuple[str, Any], ...] = ()
    samples: tuple[int, ...] = (0,)
    scheduler: str | None = None
    distinct: bool = False
    cut: int | None = None
    processors: bool = False
    ip_adapter: bool = False
    lora: bool = False

    def but(self, **changes: Any) -> Setting:
        """The same with these call arguments."""
        return replace(self, changes=tuple(sorted({**dict(self.changes), **changes}.items())))


USUAL = Setting()


def under(scheduler: str) -> Setting:
    """A shorter call under another scheduler: three steps, which a second-order one makes in five."""
    return Setting(changes=(("num_inference_steps", 3),), scheduler=scheduler)


ANOTHER = Setting(samples=(1,))
"""Another prompt and seed: what a run before leaves behind must not look like what the next run computes."""


@dataclass(frozen=True)
class Outcome:
    """An attached plugin's run: what came out, its report, and how much the denoiser really computed."""

    output: Tensor
    report: PluginReport
    work: int
    leaves: int


@dataclass
class Subject:
    """One plugin on one pipeline class of one family."""

    plugin: type[Plugin]
    family: Family
    class_name: str
    notes: list[str] = field(default_factory=list)

    # facts ------------------------------------------------------------------------------------------------------------------------

    @property
    def facts(self) -> Facts:
        return facts(self.family, self.class_name)

    @property
    def is_main(self) -> bool:
        """Whether this is the family's first pipeline class, which gets every check."""
        return self.class_name.partition("@")[0] == self.family.pipelines[0] or "@" in self.class_name

    @property
    def couples(self) -> bool:
        """Whether the plugin declares that a sample's picture may depend on the rest of the batch."""
        return self.plugin.effects.couples_batch or self.plugin.effects.stochastic

    @property
    def has_guidance(self) -> bool:
        """Whether the family has guidance that can be off."""
        return self.family.guidance.layout != "none"

    @property
    def unguided(self) -> Setting:
        """A call without guidance."""
        return USUAL.but(**{self.family.guidance.scale: 1.0})

    @property
    def keeps_branches(self) -> bool:
        """Whether one branch may not influence the other, except through the pipeline's own formula."""
        effects = self.plugin.effects
        return not (self.couples or "guide" in self.plugin.points() or "branches" in effects.skips)

    @property
    def several_a_prompt(self) -> Setting:
        """Two outputs a prompt; an argument that no pipeline has where this one offers none."""
        offered = [name for name in ("num_images_per_prompt", "num_videos_per_prompt") if name in self.facts.arguments]
        return USUAL.but(**{(*offered, "not_offered")[0]: 2})

    def note(self, text: str) -> None:
        """Put something into the case's record."""
        self.notes.append(text)

    # making and running -----------------------------------------------------------------------------------------------------------

    def make(self, setting: Setting = USUAL) -> Any:
        """A fresh plain pipeline, prepared as ``setting`` says."""
        return prepared(tiny(self.family, self.class_name).pipe, self.family, setting)

    def attach(self, pipe: Any, **knobs: Any) -> Any:
        """Put the plugin on ``pipe``, with the settings at which it shows (and ``knobs``)."""
        return load_pipeline(pipe, plugins=[self.instance(**{**self.plugin.active, **knobs})])

    def instance(self, **knobs: Any) -> Plugin:
        """The plugin with these knobs, and a second pipeline in every knob that wants one."""
        for need in self.plugin.needs:
            if need.kind == "pipeline" and need.knob not in knobs:
                knobs[need.knob] = partner(self.family, self.class_name)
        return self.plugin(**knobs)

    def seconds(self, pipe: Any) -> list[Any]:
        """The second pipelines that the plugin on ``pipe`` was given."""
        knobs = pipe.plugins[self.plugin.name].config
        return [getattr(knobs, need.knob) for need in self.plugin.needs if need.kind == "pipeline"]

    def run(self, pipe: Any, setting: Setting = USUAL, **extra: Any) -> Tensor:
        """One call; the latents (or pixels) that come out. A plugin with an artefact gets the one for this setting, as a user gives it."""
        if has_plugin(pipe, self.plugin) and (knobs := artefacts(self.plugin, self.family, self.class_name, setting)):
            pipe.plugins.configure(self.plugin.name, **knobs)
        return call(pipe, self.family, self.class_name, setting, **extra)

    def baseline(self, setting: Setting = USUAL) -> Tensor:
        """What the plain pipeline gives."""
        return plain(self.family, self.class_name, setting)

    def supports(self, setting: Setting) -> bool:
        """Whether plain diffusers can do it: what it cannot is not asked of a plugin."""
        if setting.scheduler is None:
            setting = replace(setting.but(num_inference_steps=2), cut=None if setting.cut is None else 0)
        return works(self.family, self.class_name, setting)

    def supports_scheduler(self, name: str) -> bool:
        """Whether plain diffusers runs this pipeline under that scheduler."""
        return self.supports(under(name))

    def fresh(self, setting: Setting = USUAL) -> Outcome:
        """What a fresh pipeline with a fresh plugin gives in its first run: the reference for every other history."""
        return reference(self.plugin, self.family, self.class_name, setting)

    @property
    def other_size(self) -> Setting | None:
        """Another size of the picture, where the call sets it."""
        kwargs = self.facts.kwargs
        if not isinstance(kwargs.get("width"), int):
            return None
        height, width = int(kwargs["height"]), int(kwargs["width"])
        sizes = [{"height": height, "width": width // 2}, {"height": height, "width": 2 * width}]
        for size in reversed(sizes) if "resolution" in self.plugin.effects.edits else sizes:  # stages are smaller still
            setting = USUAL.but(**size, **({"max_area": size["height"] * size["width"]} if "max_area" in kwargs else {}))
            if self.supports(setting):
                return setting
        return None

    def work_of_baseline(self) -> int:
        """Elements that the denoiser's layers get without the plugin."""
        pipe = self.make()
        with counting(denoisers(pipe, self.family)) as work:
            self.run(pipe)
        return work.size

    def report(self, pipe: Any) -> PluginReport:
        found: PluginReport = pipe.plugins.report().plugins[self.plugin.name]
        return found

    def neutral_settings(self) -> list[dict[str, Any]]:
        """The neutral settings alone, and on top of the active ones where the two go together."""
        neutral = self.plugin.neutral
        settings = [dict(neutral)]
        merged = {**self.plugin.active, **neutral}
        if merged != neutral and valid(self.plugin, merged):
            settings.append(merged)
        return settings

    # comparing --------------------------------------------------------------------------------------------------------------------

    def expect(self, output: Tensor, wanted: Tensor, what: str) -> None:
        """Bit for bit."""
        assert output.shape == wanted.shape, f"{what}: shape {tuple(output.shape)}, expected {tuple(wanted.shape)}"
        if not torch.equal(output, wanted):
            raise AssertionError(f"{what}: not equal, largest difference {distance(output, wanted):.3g}")

    def expect_near(self, output: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
        """Up to ``tolerance``: batched matrix products differ in the last bits."""
        assert output.shape == wanted.shape, f"{what}: shape {tuple(output.shape)}, expected {tuple(wanted.shape)}"
        if not distance(output, wanted) <= tolerance:
            raise AssertionError(f"{what}: differs by {distance(output, wanted):.3g}, allowed {tolerance:.3g}")

    def expect_neutral(self, setting: Setting, what: str) -> None:
        """At neutral settings it is the baseline here too."""
        pipe = load_pipeline(self.make(setting), plugins=[self.instance(**self.plugin.neutral)])
        self.expect(self.run(pipe, setting), self.baseline(setting), f"neutral, {what}, against the baseline")

    def expect_effect(self, setting: Setting, base: Setting, what: str) -> None:
        """What ``setting`` changes on the plain pipeline, it changes with the plugin too."""
        alone = distance(self.baseline(setting), self.baseline(base))
        together = distance(self.fresh(setting).output, self.fresh(base).output)
        share = 0.0 if "denoiser" in self.plugin.effects.replaces else 0.05  # another denoiser, which does not have it, ran some steps
        assert together > share * alone, f"{what} changes the plain output by {alone:.3g}, with the plugin by {together:.3g}"

    def expect_fresh(self, pipe: Any, setting: Setting = USUAL, what: str = "this run") -> None:
        """The next run of ``pipe`` equals that of a fresh pipeline, and the plugin did as much in it."""
        wanted = self.fresh(setting)
        self.expect(self.run(pipe, setting), wanted.output, f"{what} against a fresh pipeline's")
        fired = self.report(pipe).fired
        assert fired == wanted.report.fired, f"{what}: fired {fired}, on a fresh pipeline {wanted.report.fired}"


@contextlib.contextmanager
def refused(kind: type[BaseException], otherwise: str, names: Iterable[str] = ()) -> Iterator[None]:
    """What is inside must raise ``kind`` with all ``names`` in its text; ``otherwise`` says what happened instead."""
    try:
        yield
    except kind as error:
        missing = [name for name in names if name not in str(error)]
        if missing:
            raise AssertionError(f"the {kind.__name__} does not name {', '.join(missing)}: {error}") from error
    else:
        raise AssertionError(otherwise)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    return float((a.double() - b.double()).abs().max())


def valid(plugin: type[Plugin], knobs: Mapping[str, Any]) -> bool:
    """Whether these knobs go together."""
    try:
        plugin(**knobs)
    except ConfigError:
        return False
    return True


# pipelines ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What a tiny pipeline offers, read once."""

    arguments: frozenset[str]
    kwargs: Mapping[str, Any]
    callback_inputs: tuple[str, ...]
    has_lora: bool
    has_processors: bool
    has_ip_adapter: bool
    has_offload: bool
    components: tuple[str, ...]


@functools.cache
def facts(family: Family, class_name: str) -> Facts:
    """Facts of one tiny pipeline."""
    made = tiny(family, class_name)
    pipe: Any = made.pipe
    return Facts(
        arguments=frozenset(inspect.signature(type(pipe).__call__).parameters),
        kwargs=dict(made.kwargs),
        callback_inputs=tuple(getattr(pipe, "_callback_tensor_inputs", ())),
        has_lora=has_peft() and all(hasattr(model, "add_adapter") for model in denoisers(pipe, family)),
        has_processors=bool(attention_layers(pipe, family)),
        has_ip_adapter=all(type(model).__name__ == "UNet2DConditionModel" for model in denoisers(pipe, family))
        and "ip_adapter_image_embeds" in inspect.signature(type(pipe).__call__).parameters,
        has_offload=getattr(pipe, "model_cpu_offload_seq", None) is not None,
        components=tuple(pipe.components),
    )


def tiny(family: Family, class_name: str, seed: int = 0) -> Any:
    """A fresh tiny pipeline from the family's factory."""
    assert family.tiny is not None, f"family {family.name} has no tiny pipeline"
    module, _, function = family.tiny.partition(":")
    with quiet():
        return getattr(importlib.import_module(module), function)(class_name, seed)


def denoisers(pipe: Any, family: Family) -> list[nn.Module]:
    """The denoisers that the pipeline has."""
    return [model for name in family.denoisers if (model := getattr(pipe, name, None)) is not None]


def attention_layers(pipe: Any, family: Family) -> list[Any]:
    """All attention modules of the denoisers."""
    return [m for model in denoisers(pipe, family) for m in model.modules() if callable(getattr(m, "processor", None))]


def prepared(pipe: Any, family: Family, setting: Setting) -> Any:
    """Put on a plain pipeline what ``setting`` says."""
    if setting.scheduler is not None:
        pipe.scheduler = make_scheduler(setting.scheduler, pipe.scheduler)
    if setting.distinct:
        make_distinct(pipe.scheduler)
    if setting.processors:
        wrap_processors(pipe, family)
    if setting.ip_adapter:
        add_ip_adapter(pipe, family)
    if setting.lora:
        add_lora(pipe, family)
    return pipe


def make_scheduler(name: str, old: Any) -> Any:
    """A scheduler by its short name, from the old one's config."""
    import diffusers

    class_name, options = SCHEDULERS[name]
    with quiet():
        return getattr(diffusers, class_name).from_config(old.config, **options)


def make_distinct(scheduler: Any) -> None:
    """Let repeated timesteps differ by rounding units: what is read from them hardly changes, what looks them up finds other places."""
    original = scheduler.set_timesteps

    @functools.wraps(original)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        t = scheduler.timesteps
        for i in range(1, len(t)):
            while (t[:i] == t[i]).any():
                t[i] = torch.nextafter(t[i], -torch.ones_like(t[i]))

    scheduler.set_timesteps = set_timesteps


class ForeignProcessor:
    """An attention processor of somebody else: calls the one that was there and changes its result (as an IP-Adapter's does)."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner
        self.calls = 0

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        result = self.inner(attn, hidden_states, *args, **kwargs)
        return tuple(x * 1.25 for x in result) if isinstance(result, tuple) else result * 1.25


def wrap_processors(pipe: Any, family: Family) -> None:
    """Give every attention layer a foreign processor. Its signature is the old one's: diffusers reads it to decide what to pass."""
    for layer in attention_layers(pipe, family):
        signature = inspect.signature(type(layer.processor).__call__)
        own = type("ForeignProcessor", (ForeignProcessor,), {"__call__": copy_of(ForeignProcessor.__call__, signature)})
        layer.processor = own(layer.processor)


def copy_of(function: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    """``function`` under another signature."""

    def same(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    same.__signature__ = signature  # type: ignore[attr-defined]
    return same


EMBED = 16
"""Size of an IP-Adapter's picture embedding here."""


def add_ip_adapter(pipe: Any, family: Family) -> None:
    """Load an IP-Adapter with random weights through diffusers' own loader."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor
    from diffusers.models.embeddings import ImageProjection

    for unet in denoisers(pipe, family):
        width: Any = unet.config.cross_attention_dim  # type: ignore[union-attr]
        weights: dict[str, Tensor] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            for number, name in enumerate(unet.attn_processors):  # type: ignore[arg-type]
                if name.endswith("attn2.processor"):
                    query = unet.get_submodule(name.removesuffix(".processor")).to_q
                    own = IPAdapterAttnProcessor(hidden_size=query.out_features, cross_attention_dim=width).state_dict()  # type: ignore[union-attr]
                    weights |= {f"{number}.to_{x}_ip.weight": own[f"to_{x}_ip.0.weight"] for x in "kv"}
            picture = ImageProjection(cross_attention_dim=width, image_embed_dim=EMBED, num_image_text_embeds=4).state_dict()
        projection = {key.replace("image_embeds", "proj"): value for key, value in picture.items()}
        with quiet():
            unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])  # type: ignore[operator]
        unet.eval().requires_grad_(False)


def has_peft() -> bool:
    """Whether peft is installed."""
    return importlib.util.find_spec("peft") is not None


def add_lora(pipe: Any, family: Family) -> None:
    """A LoRA with random weights on the attention projections of every denoiser."""
    from peft import LoraConfig

    for model in denoisers(pipe, family):
        names = {path.rpartition(".")[2] for path, _ in model.named_modules()} & {"to_q", "to_k", "to_v"}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model.add_adapter(LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=sorted(names)))  # type: ignore[operator]
        model.eval().requires_grad_(False)


# calls ----------------------------------------------------------------------------------------------------------------------------


def arguments(family: Family, class_name: str, setting: Setting) -> dict[str, Any]:
    """The call's arguments."""
    known = facts(family, class_name)
    kwargs = {**known.kwargs, "num_inference_steps": STEPS, "output_type": "latent"}
    kwargs.update(of_samples(known, setting.samples))
    kwargs.update(dict(setting.changes))
    seeds = [torch.Generator().manual_seed(100 + i) for i in setting.samples]
    kwargs["generator"] = seeds if len(seeds) > 1 else seeds[0]
    if setting.ip_adapter:
        kwargs["ip_adapter_image_embeds"] = [torch.randn(2, 1, EMBED, generator=torch.Generator().manual_seed(9))]
    if setting.cut is not None:
        kwargs["callback_on_step_end"] = cutter(family, setting.cut)
        kwargs["callback_on_step_end_tensor_inputs"] = [name for name in known.callback_inputs if name in BATCHED_INPUTS]
    return kwargs


def of_samples(known: Facts, samples: tuple[int, ...]) -> dict[str, Any]:
    """Conditions of the samples: a prompt, a class or a picture each."""
    kwargs = known.kwargs

    def each(values: tuple[Any, ...]) -> Any:
        chosen = [values[i % len(values)] for i in samples]
        return chosen if len(chosen) > 1 else chosen[0]

    if "prompt" in kwargs:
        negative = {"negative_prompt": each(NEGATIVES)} if "negative_prompt" in kwargs else {}
        return {"prompt": each(PROMPTS), **negative}
    if "class_labels" in kwargs:
        return {"class_labels": [(207, 3)[i % 2] for i in samples]}
    if "image" in kwargs:
        return {"image": each((kwargs["image"], kwargs["image"].rotate(180)))}
    return {"batch_size": len(samples)}


def cutter(family: Family, last: int) -> Callable[..., dict[str, Any]]:
    """Cuts guidance off after step ``last``, as diffusers' ``SDCFGCutoffCallback`` does."""

    def cut(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == last:
            pipe._guidance_scale = 0.0
            if family.guidance.layout == "batched":
                return {name: value.chunk(2)[-1] for name, value in tensors.items()}
        return tensors

    return cut


def call(pipe: Any, family: Family, class_name: str, setting: Setting, **extra: Any) -> Tensor:
    """One ``pipe(...)`` call; its first output as a tensor."""
    if not hasattr(pipe, "_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    with quiet():
        output = pipe(**arguments(family, class_name, setting), **extra)[0]
    if isinstance(output, Tensor):
        result = output.detach().clone()
    else:
        result = torch.as_tensor(np.asarray(output)).clone()
    assert torch.isfinite(result).all(), "the output has NaN or infinite values"
    return result


@functools.cache
def partner(family: Family, class_name: str) -> Any:
    """A second tiny pipeline of the same latent space and text encoders, whose denoisers have other weights; the same for all cases."""
    first, second = tiny(family, class_name).pipe, tiny(family, class_name, seed=1).pipe
    for name, part in first.components.items():
        if name not in family.denoisers and name != "controlnet":
            setattr(second, name, part)
    return second


def has_plugin(pipe: Any, plugin: type[Plugin]) -> bool:
    """Whether ``plugin`` is on ``pipe`` and enabled."""
    stack = stack_of(pipe)
    return stack is not None and plugin.name in stack and type(stack[plugin.name]) is plugin


def artefacts(plugin: type[Plugin], family: Family, class_name: str, setting: Setting) -> dict[str, Any]:
    """The artefacts that the plugin needs under ``setting``, by knob."""
    if plugin.calibration is None and plugin.search is None:
        return {}
    needs = [need for need in plugin.needs if need.kind in ("artefact", "search")]
    if any(need.fits for need in needs):
        made_under = replace(setting, samples=(0,), cut=None)
    else:  # it is of the model alone, so one serves every run
        made_under = Setting(processors=setting.processors, ip_adapter=setting.ip_adapter, lora=setting.lora)
    key = (plugin, family, class_name, made_under)
    if key not in _artefacts:
        _artefacts[key] = calibrated(*key)
    return {need.knob: _artefacts[key] for need in needs}


_artefacts: dict[tuple[Any, ...], Artefact] = {}


def calibrated(plugin: type[Plugin], family: Family, class_name: str, setting: Setting) -> Artefact:
    """What the plugin's calibrator makes of one run under ``setting``, or an example of what its search would find."""
    pipe = prepared(tiny(family, class_name).pipe, family, setting)
    if plugin.search is not None:
        return search_call(pipe, plugin(**plugin.active), lambda: call(pipe, family, class_name, setting))
    return calibrate_call(pipe, plugin(**plugin.active), lambda: call(pipe, family, class_name, setting))


@functools.cache
def plain(family: Family, class_name: str, setting: Setting) -> Tensor:
    """The plain pipeline's output."""
    return call(prepared(tiny(family, class_name).pipe, family, setting), family, class_name, setting)


@functools.cache
def works(family: Family, class_name: str, setting: Setting) -> bool:
    """Whether the plain pipeline runs under ``setting``."""
    if setting.scheduler is not None and setting.scheduler.startswith("FlowMatch") != (family.prediction == "flow"):
        return False  # a flow scheduler builds happily from a diffusion scheduler's config, but the two mean different things
    try:
        plain(family, class_name, setting)
    except Exception:  # whatever plain diffusers raises here is its way of saying that it does not do this
        return False
    return True


_references: dict[tuple[Any, ...], Outcome] = {}


def reference(plugin: type[Plugin], family: Family, class_name: str, setting: Setting) -> Outcome:
    """First run of a fresh plugin on a fresh pipeline."""
    key = (plugin, family, class_name, setting)
    if key not in _references:
        subject = Subject(plugin, family, class_name)
        pipe = subject.attach(subject.make(setting))
        with counting(denoisers(pipe, family)) as work:
            output = subject.run(pipe, setting)
        _references[key] = Outcome(output, subject.report(pipe), work.size, work.calls)
    return _references[key]


@dataclass
class Work:
    """What the leaf modules of the denoisers computed: calls, and elements that went in."""

    calls: int = 0
    size: int = 0


@contextlib.contextmanager
def counting(models: list[nn.Module], stop_at: int | None = None, error: BaseException | None = None) -> Iterator[Work]:
    """Count the work of the denoisers; raise ``error`` from inside at the leaf call ``stop_at``."""
    work = Work()

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        work.calls += 1
        work.size += sum(x.numel() for x in args if isinstance(x, Tensor))
        if error is not None and work.calls == stop_at:
            raise error

    leaves = [m for model in models for m in model.modules() if not list(m.children())]
    handles = [leaf.register_forward_pre_hook(before) for leaf in leaves]
    try:
        yield work
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and progress bars that diffusers and transformers give about tiny models."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: list[Any] = [diffusers_logging, transformers_logging]
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for library in libraries:
                library.set_verbosity_error()
                library.disable_progress_bar()
            yield
        finally:
            for library, (level, bars) in zip(libraries, before, strict=True):
                library.set_verbosity(level)
                if bars:
                    library.enable_progress_bar()
