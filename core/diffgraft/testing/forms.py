"""Each plugin under each form in which diffusers runs a denoiser: compiled, quantised, offloaded, cast layer by layer."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from diffgraft.installed import registry
from diffgraft.installed.errors import ArtefactMismatch, Conflict, Unsupported
from diffgraft.installed.family import Family
from diffgraft.installed.plugin import Plugin
from diffgraft.kernel.loading import load_pipeline, unload
from diffgraft.lab.machine import threads
from diffgraft.testing.case import one_of_each_kind
from diffgraft.testing.compiling import Tracing, tracing
from diffgraft.testing.runs import MADE_BY, Work, artefacts, calibrated, call, counting, new_partner
from diffgraft.testing.setting import USUAL
from diffgraft.testing.subject import Subject, distance
from diffgraft.testing.tiny import denoisers, quiet

Order = Literal["before", "after"]
Put = Callable[[Any, Family, Tracing], None]
OWN_ARTEFACT = "works with an artefact made under it"
"""The verdict where one that was made of plain weights is refused."""
REFUSALS = (Conflict, Unsupported, ArtefactMismatch)


@dataclass(frozen=True)
class Form:
    """One way to run a denoiser.

    put       puts it on a pipeline, as diffusers' guides do
    near      how far a plugin's output may be from the one without the form; None where the weights are others, so that it is another one
    orders    on before the plugin, on after it
    compiled  whether dynamo traces it
    packages  what it needs beside diffusers
    """

    name: str
    put: Put
    near: float | None
    orders: tuple[Order, ...] = ("before", "after")
    compiled: bool = False
    packages: tuple[str, ...] = ()

    @property
    def available(self) -> bool:
        """Whether its packages are installed."""
        return all(importlib.util.find_spec(name) is not None for name in self.packages)


def compiled_in_place(pipe: Any, family: Family, tracing: Tracing) -> None:
    for model in denoisers(pipe, family):
        model.compile(backend=tracing.backend)


def repeated_blocks(pipe: Any, family: Family, tracing: Tracing) -> None:
    for model in denoisers(pipe, family):
        model.compile_repeated_blocks(backend=tracing.backend)  # type: ignore[operator]


def loaded(quantised: Callable[[], Any]) -> Put:
    """Load the denoisers again with a ``quantization_config``."""

    def put(pipe: Any, family: Family, tracing: Tracing) -> None:
        for name in family.denoisers:
            if (model := getattr(pipe, name, None)) is not None:
                with tempfile.TemporaryDirectory() as folder, quiet():
                    model.save_pretrained(folder)
                    setattr(pipe, name, type(model).from_pretrained(folder, quantization_config=quantised(), torch_dtype=model.dtype))

    return put


def torchao_int8() -> Any:
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def quanto_int8() -> Any:
    from diffusers import QuantoConfig

    return QuantoConfig(weights_dtype="int8")


def offloaded(kind: str, **options: Any) -> Put:
    """Group offload; without a GPU from the CPU to the CPU, so that the hooks are there and nothing moves."""

    def put(pipe: Any, family: Family, tracing: Tracing) -> None:
        cpu = torch.device("cpu")
        for model in denoisers(pipe, family):
            model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **options)  # type: ignore[operator]

    return put


def layerwise(pipe: Any, family: Family, tracing: Tracing) -> None:
    with quiet():
        pipe.to(torch.bfloat16)
        for model in denoisers(pipe, family):
            model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)  # type: ignore[operator]


FORMS = (
    Form("compile", compiled_in_place, 1e-4, ("before",), compiled=True),
    Form("compile_repeated_blocks", repeated_blocks, 1e-4, compiled=True),
    Form("torchao int8", loaded(torchao_int8), None, ("before",), packages=("torchao",)),
    Form("quanto int8", loaded(quanto_int8), None, ("before",), packages=("optimum",)),
    Form("group offload, blocks", offloaded("block_level", num_blocks_per_group=1), 0.0),
    Form("group offload, leaves", offloaded("leaf_level"), 0.0),
    Form("layerwise casting", layerwise, None),
)


@dataclass(frozen=True)
class Alone:
    """What the pipeline without plugins gives under a form, and what that compiles."""

    output: Tensor | None
    graphs: int = 0
    breaks: int = 0
    error: str = ""


@dataclass
class Found:
    """The verdict on a cell in words, and by order (on before the plugin, on after it) what was seen."""

    verdict: str
    seen: dict[str, dict[str, Any]] = field(default_factory=dict)


@functools.cache
def alone(family: Family, class_name: str, form: Form) -> Alone:
    """The pipeline under a form without plugins; its error where diffusers does not do that."""
    subject = Subject(Plugin, family, class_name)
    with tracing() as made:
        pipe = subject.make()
        try:
            form.put(pipe, family, made)
            output = call(pipe, family, class_name, USUAL)
        except Exception as error:  # whatever plain diffusers raises is its way of saying that it does not do this
            return Alone(None, error=f"{type(error).__name__}: {error}")
        return Alone(output, made.graphs, made.breaks)


@dataclass(frozen=True)
class Cell:
    """A plugin under a form on the first pipeline class of a family."""

    plugin: type[Plugin]
    family: Family
    form: Form

    def __str__(self) -> str:
        return f"{self.plugin.name}-{self.family.name}-{self.form.name}"

    @property
    def subject(self) -> Subject:
        return Subject(self.plugin, self.family, self.family.pipelines[0])

    @threads(1)  # tiny tensors: more threads would wait for each other
    def run(self) -> Found:
        """What happens; raises AssertionError where the plugin neither works nor is refused by us."""
        without = alone(self.family, self.family.pipelines[0], self.form)
        if without.output is None:
            return Found("not in diffusers", {"alone": {"error": without.error}})
        try:
            if not self.form.compiled:  # neutral, nothing of ours is there to be traced; taken off, it is held against the form alone below
                self._neutral(without)
            outputs: list[Tensor] = []
            seen: dict[str, dict[str, Any]] = {order: self._tried(order, without, outputs) for order in self.form.orders}
            for first, second in pairwise(outputs):
                self.subject.expect_near(second, first, self.form.near or 0.0, "on after the plugin, against on before it")
        except REFUSALS as error:  # at neutral settings even
            return Found(f"refused: {error}")
        except AssertionError as error:
            raise AssertionError(f"{self}: {error}") from error
        except Exception as error:  # whatever escapes from a plugin is the finding
            raise AssertionError(f"{self}: {type(error).__name__}: {error}") from error
        verdicts = [each["verdict"] for each in seen.values()]
        same = len(set(verdicts)) == 1
        return Found(verdicts[0] if same else "; ".join(f"{order}: {each['verdict']}" for order, each in seen.items()), seen)

    def _neutral(self, without: Alone) -> None:
        """At neutral settings it is the form alone, bit for bit."""
        assert without.output is not None
        with tracing() as made:
            pipe = self.subject.make()
            self.form.put(pipe, self.family, made)
            load_pipeline(pipe, plugins=[self._made(pipe, **self.plugin.neutral)])
            self.subject.expect(self._call(pipe), without.output, "neutral, against the form alone")

    def _tried(self, order: Order, without: Alone, outputs: list[Tensor]) -> dict[str, Any]:
        """Attached before or after the form: runs, acts, repeats itself, and is gone when it is taken off."""
        assert without.output is not None
        s = self.subject
        seen: dict[str, Any] = {"verdict": "works"}
        work = Work()
        with tracing() as made:
            pipe = s.make()
            try:
                if order == "before":
                    self.form.put(pipe, self.family, made)
                seen |= self._attach(pipe)
                if order == "after":
                    self.form.put(pipe, self.family, made)
                watched = [] if self.form.compiled else denoisers(pipe, self.family)  # dynamo would trace the hooks
                with counting(watched) as work:
                    first = self._call(pipe)
                graphs, breaks, report = made.graphs, made.breaks, s.report(pipe)
                again = self._call(pipe)
                if self.form.compiled:
                    seen |= {"graphs": graphs - without.graphs, "breaks": breaks - without.breaks, "again": made.graphs - graphs}
            except REFUSALS as error:
                seen["verdict"] = f"refused: {error}"
            else:
                s.expect(again, first, f"{order}: the second run with the same seed")
                outputs.append(first)
                self._acts(first, report, without.output, seen)
                if seen.get("inactive"):
                    seen["verdict"] = "inactive"
                elif self.form.compiled:
                    seen["verdict"] = costs(seen)
            if seen["verdict"].startswith("refused"):
                assert len(seen["verdict"]) > 30, f"without a reason: {seen['verdict']!r}"
                assert work.calls == 0, f"{order}: refused after the denoiser has run: {seen['verdict']}"
            unload(pipe)
            if order == self.form.orders[0] or not self.form.compiled:  # tracing takes long
                s.expect(self._call(pipe), without.output, f"{order}: after detaching, against the form alone")
        return seen

    def _attach(self, pipe: Any) -> dict[str, Any]:
        """Put the plugin on at settings at which it shows; where an artefact of plain weights is refused, with one made under the form."""
        s = self.subject
        given = artefacts(self.plugin, self.family, s.class_name, USUAL)
        try:
            load_pipeline(pipe, plugins=[self._made(pipe, **{**self.plugin.active, **given})])
        except ArtefactMismatch as error:
            made = calibrated(self.plugin, self.family, s.class_name, USUAL, pipe)
            made_by = {need.knob for need in self.plugin.needs if getattr(self.plugin, MADE_BY.get(need.kind, ""), None) is not None}
            own = {key: made if key in made_by else value for key, value in given.items()}
            load_pipeline(pipe, plugins=[self._made(pipe, **{**self.plugin.active, **own})])
            return {"own artefact": str(error), "verdict": OWN_ARTEFACT}
        return {}

    def _made(self, pipe: Any, **knobs: Any) -> Plugin:
        """The plugin with what it needs; a second pipeline in the dtype of the first."""
        s = self.subject
        for need in self.plugin.needs:
            if need.kind == "pipeline" and not need.families:
                second = new_partner(self.family, s.class_name)
                with quiet():
                    knobs[need.knob] = second.to(denoisers(pipe, self.family)[0].dtype) if self.form.near is None else second
        return s.instance(**knobs)

    def _acts(self, output: Tensor, report: Any, without: Tensor, seen: dict[str, Any]) -> None:
        """It fires where it does without the form; its picture is the one without it, or at least not that of the form alone."""
        s = self.subject
        eager = s.fresh()
        if self.form.near is not None:
            seen["from eager"] = short(distance(output, eager.output))
            s.expect_near(output, eager.output, self.form.near, "against the plugin without the form")
            assert report.fired == eager.report.fired, f"fired {report.fired}, without the form {eager.report.fired}"
        else:
            assert report.fired.keys() == eager.report.fired.keys(), f"fired {report.fired}, without the form {eager.report.fired}"
        seen["from the form alone"] = short(distance(output, without)) if output.shape == without.shape else None
        if self.plugin.effects.reads_only:
            s.expect_near(output, without, self.form.near or 0.0, "it declares no effect on the run, but against the form alone")
        elif seen["from the form alone"] == 0:
            seen["inactive"] = "; ".join(s.excuses(report))
            assert seen["inactive"], "the output is that of the form alone, and no note says 'inactive'"

    def _call(self, pipe: Any) -> Tensor:
        return call(pipe, self.family, self.family.pipelines[0], USUAL)


def short(value: float) -> float:
    """Three digits of a figure: the others are the machine's."""
    return float(f"{value:.3g}")


def costs(seen: dict[str, Any]) -> str:
    """Breaks and graphs beyond those of the pipeline alone, in words."""
    more = f", {seen['graphs']} more graph{'s' * (seen['graphs'] != 1)}" if seen["graphs"] > 0 else ""
    return f"{'breaks' if seen['breaks'] > 0 else 'works'}{more}" + (f", {seen['again']} again in the next run" if seen["again"] else "")


def form_cells(plugins: Iterable[str | type[Plugin]] | None = None, forms: Iterable[Form] = FORMS) -> list[Cell]:
    """All cells of ``plugins`` (default: all installed, unbroken and allowed ones) whose form's packages are installed.

    Each on the cheapest U-Net and DiT family that it claims.
    """
    if plugins is None:
        plugins = [name for name, info in registry.installed().items() if info.allowed and not info.broken]
    classes = [registry.find(item) if isinstance(item, str) else item for item in plugins]
    return [
        Cell(cls, family, form)
        for cls in classes
        for family in reversed(one_of_each_kind(family for family in registry.families().values() if cls.claims(family)))
        for form in forms
        if form.available
    ]
