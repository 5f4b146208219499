"""Calibration artefacts: what a plugin measured on one model, kept in one safetensors file that fits only there.

The file's header says what it was made for: plugin, pipeline class, a fingerprint of each denoiser, the scheduler with its settings, the
number of steps and the shape of the latents; and it carries a checksum. Whatever does not fit is refused before anything runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shlex
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from typing_extensions import Self, TypedDict

from diffgraft.installed.anatomy import root_of
from diffgraft.installed.errors import ArtefactMismatch, ConfigError, DiffgraftError
from diffgraft.installed.foreign import brief, plain, said
from diffgraft.installed.plugin import RUN_FACTS
from diffgraft.installed.registry import find
from diffgraft.installed.unread import PICKLES, why_not_loaded
from diffgraft.kernel.weights import kept_by
from diffgraft.methods.files import write_atomic
from diffgraft.methods.schema import Holds
from diffgraft.methods.weights import middle_value, shape_of

_log = logging.getLogger(__name__)

FORMAT = 1
"""Number of the file layout."""
PROBES = 1024
"""Parameters of which a fingerprint remembers a weight: of nearly all models each."""
LARGEST = 8 * 2**30
"""Bytes that a file may have; a sparse one has them on no disk, but takes them in memory."""
TOLERANCE = 0.005
"""Relative difference of a remembered weight that another dtype explains (bfloat16 keeps 8 bits, and may have been rounded to twice)."""
CROSSING = 0.3
"""How far weights that are kept in another way (quantised, in 8 bits) may be from the remembered ones, all together."""


@dataclass(frozen=True)
class Fingerprint:
    """What tells one model from another: its class, a hash of all parameter names and shapes, a few weights, and how weights are kept.

    Two checkpoints of one architecture differ in the weights; one checkpoint in another dtype or on another device does not.
    Quantised weights are remembered dequantised; of a class that does not say what it holds there is NaN, and names and shapes decide.
    """

    kind: str
    layout: str
    weights: tuple[float, ...]
    kept: str = ""
    """"" for plain weights of 16 bits and more, else a dtype of 8 bits or the class of a quantiser ("float8_e4m3fn", "Params4bit")."""

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        """The fingerprint of a model; LoRA layers on it are not part of it."""
        model = root_of(model)
        named = sorted((name.replace(".base_layer", ""), name) for name, _ in model.named_parameters() if ".lora_" not in name)
        lines = (f"{clean} {shape_of(model.get_parameter(name))}" for clean, name in named)
        layout = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
        probes = min(PROBES, len(named))
        weights = tuple(middle(model, named[i * len(named) // probes][1]) for i in range(probes))
        return cls(type(model).__name__, layout, weights, kept_by(model))

    def difference(self, other: Fingerprint, crosses: bool = False) -> str | None:
        """Why ``other`` is another model, or None when it is this one.

        Args:
            crosses: whether the same model with weights that are kept in another way counts as this one.
        """
        if self.kind != other.kind:
            return f"{other.kind} instead of {self.kind}"
        if self.layout != other.layout:
            return f"{self.kind} with other layers or sizes"
        if self.kept != other.kept and not crosses:
            return f"{self.kind} with weights kept as {other.kept or 'plain numbers'} instead of {self.kept or 'plain numbers'}"
        count = min(len(self.weights), len(other.weights))  # earlier files remember fewer, of the same parameters
        both = zip(*(spread(each.weights, count) for each in (self, other)), strict=True)
        pairs = [(a, b) for a, b in both if not (other.kept + self.kept and math.isnan(a + b))]
        if self.kept == other.kept:
            close = all(math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1e-6) for a, b in pairs)
        else:
            close = sum(abs(a - b) for a, b in pairs) <= CROSSING * sum(abs(a) for a, _ in pairs)
        return None if close else f"{self.kind} with other weights"


def spread(values: tuple[float, ...], count: int) -> list[float]:
    """So many of them, evenly."""
    return [values[i * len(values) // count] for i in range(count)]


def middle(model: nn.Module, name: str) -> float:
    """The middle value of a parameter; sequential offload leaves an empty one in its place and keeps the values."""
    module, _, own_name = name.rpartition(".")
    owner = model.get_submodule(module)
    with contextlib.ExitStack() as held:
        if getattr(owner, own_name).is_meta:
            from accelerate.utils import align_module_device

            held.enter_context(align_module_device(owner, "cpu"))
        return middle_value(getattr(owner, own_name))


@dataclass(frozen=True)
class MadeFor:
    """What an artefact fits: ``shape`` is that of one sample as the denoiser gets it, without the batch."""

    plugin: str
    pipeline: str
    denoisers: dict[str, Fingerprint]
    scheduler: str
    scheduler_config: dict[str, Any]
    steps: int
    shape: tuple[int, ...]

    @classmethod
    def describe(
        cls, plugin: str, pipe: Any, scheduler: Any, denoisers: Mapping[str, nn.Module], steps: int, shape: tuple[int, ...]
    ) -> MadeFor:
        """The facts of a live pipeline and the scheduler that runs in it."""
        return cls(
            plugin=plugin,
            pipeline=type(pipe).__name__,
            denoisers={name: Fingerprint.of(model) for name, model in denoisers.items()},
            scheduler=type(scheduler).__name__,
            scheduler_config=scheduler_facts(scheduler),
            steps=steps,
            shape=shape,
        )


def scheduler_facts(scheduler: Any) -> dict[str, Any]:
    """The scheduler's settings as JSON knows them, without what diffusers notes for itself."""
    plain = {key: value for key, value in scheduler.config.items() if not key.startswith("_") and key != "trained_betas"}
    return json.loads(json.dumps(plain, sort_keys=True, default=str))  # type: ignore[no-any-return]


class Header(TypedDict):
    """What a file says about itself, without its checksum."""

    format: int
    made_for: MadeFor
    facts: dict[str, Any]


HEADER = TypeAdapter(Header)


@dataclass(frozen=True, eq=False)
class Artefact:
    """Tensors and facts that a calibration found. ``facts`` are plain JSON values."""

    made_for: MadeFor
    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    path: str = ""
    kind: str = "artefact"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file: the whole of it, or nothing."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.tensors.items()}
        header = {"format": FORMAT, "made_for": asdict(self.made_for), "facts": self.facts}
        header["checksum"] = checksum(header, tensors)
        content = save(tensors or {"none": torch.zeros(1)}, metadata={"diffgraft": json.dumps(header, sort_keys=True)})
        write_atomic(Path(path), content)

    @classmethod
    def load(cls, source: str | os.PathLike[str], plugin: str, kind: str = "artefact") -> Self:
        """The artefact at a path, or at ``owner/name/file.safetensors`` on the Hub; ``kind`` as in ``Need``.

        Raises:
            ConfigError: there is no such file.
            ArtefactMismatch: it is no artefact, is damaged, or was made for another plugin.
        """
        path = find_file(source, plugin, kind)
        check_size(path, plugin, kind)
        try:
            with safe_open(path, framework="pt") as file:
                written = (file.metadata() or {}).get("diffgraft")
                if written is None:
                    raise ArtefactMismatch(f"{source} is a safetensors file, but no diffgraft artefact; {make_again(plugin, kind)}")
                cls.header(written, source, plugin, kind)  # what can be refused by the header is refused before any tensor is read
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        except (SafetensorError, OSError, MemoryError) as error:
            raise ArtefactMismatch(f"{source} cannot be read ({said(error)}); {make_again(plugin, kind)}") from error
        return cls.checked(written, tensors, source, plugin, kind)

    @classmethod
    def checked(cls, written: str, tensors: dict[str, Tensor], source: Any, plugin: str, kind: str) -> Self:
        """What a file's header (JSON) and tensors say.

        Raises:
            ArtefactMismatch: no JSON, another layout, a wrong checksum, or made for another plugin.
        """
        header, read = cls.header(written, source, plugin, kind)
        expected = header.pop("checksum", None)
        tensors.pop("none", None)
        if checksum(header, tensors) != expected:
            raise ArtefactMismatch(f"{source} is damaged: its checksum is wrong; {make_again(plugin, kind)}")
        _log.info("%s: %s from %s", plugin, kind, source)
        return cls(read["made_for"], tensors, read["facts"], os.fspath(source), kind)

    @classmethod
    def header(cls, written: str, source: Any, plugin: str, kind: str) -> tuple[dict[str, Any], Header]:
        """(the JSON of a header, the same read).

        Raises:
            ArtefactMismatch: no JSON, another layout, or made for another plugin.
        """
        try:
            header = json.loads(written)
        except (ValueError, RecursionError) as error:
            raise ArtefactMismatch(f"{source} cannot be read as JSON ({said(error)}); {make_again(plugin, kind)}") from error
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            found = header.get("format") if isinstance(header, dict) else header
            raise ArtefactMismatch(f"{source} has layout {brief(found)}, this diffgraft reads {FORMAT}; {make_again(plugin, kind)}")
        try:
            read: Header = HEADER.validate_python({key: value for key, value in header.items() if key != "checksum"})
        except (ValidationError, RecursionError) as error:
            raise ArtefactMismatch(f"{source} is not what diffgraft writes: {said(error)}; {make_again(plugin, kind)}") from error
        if (maker := read["made_for"].plugin) != plugin:
            raise ArtefactMismatch(f"{source} was made for the plugin {plain(maker)!r}, not for {plugin!r}; {make_again(plugin, kind)}")
        return header, read

    def ensure_model(self, pipe: Any, denoisers: Mapping[str, nn.Module], crosses: str | None = None) -> None:
        """Raises ArtefactMismatch when it was made for another model; all that can be said before a run. ``crosses`` as in ``Need``."""
        differing = []
        if self.made_for.pipeline != type(pipe).__name__:
            differing.append(f"pipeline: made for {self.made_for.pipeline}, found {type(pipe).__name__}")
        for name, expected in self.made_for.denoisers.items():
            if name not in denoisers:
                differing.append(f"{name}: this pipeline has none")
            elif why := expected.difference(found := Fingerprint.of(denoisers[name]), crosses is not None):
                differing.append(f"{name}: found {why}")
            elif found.kept != expected.kept:
                kept, made = found.kept or "plain numbers", expected.kept or "plain numbers"
                _log.warning("%s: made for weights kept as %s, used with %s: %s", self.made_for.plugin, made, kept, crosses)
        self._refuse(differing)

    def ensure_holds(self, holds: Holds) -> None:
        """Raises ArtefactMismatch when its content is not what ``holds`` says."""
        if why := holds.fault(self.tensors, self.facts):
            plugin = self.made_for.plugin
            raise ArtefactMismatch(f"{plugin}: the {self.kind} {self.path or '(in memory)'}: {why}; {make_again(plugin, self.kind)}")

    def ensure_run(
        self,
        scheduler: Any,
        steps: int,
        shape: tuple[int, ...],
        fits: Collection[str] = RUN_FACTS,
        guidance: float | None = None,
    ) -> None:
        """Raises ArtefactMismatch when scheduler, number of steps, size or guidance scale are others, as far as ``fits`` names them."""
        differing = []
        if "scheduler" in fits and self.made_for.scheduler != type(scheduler).__name__:
            differing.append(f"scheduler: made for {self.made_for.scheduler}, found {type(scheduler).__name__}")
        elif "scheduler" in fits:
            found, expected = scheduler_facts(scheduler), self.made_for.scheduler_config
            keys = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
            differing += [f"scheduler.{key}: made for {expected.get(key)}, found {found.get(key)}" for key in keys]
        if "steps" in fits and self.made_for.steps != steps:
            differing.append(f"steps: made for {self.made_for.steps}, found {steps} (num_inference_steps={self.made_for.steps} fits)")
        if "shape" in fits and self.made_for.shape != tuple(shape):
            differing.append(f"shape of the latents: made for {self.made_for.shape}, found {tuple(shape)}")
        if "guidance" in fits and self.facts.get("guidance_scale") != guidance:
            differing.append(f"guidance scale: made for {self.facts.get('guidance_scale')}, found {guidance}")
        if differing:
            said = {"--steps": steps if "steps" in fits else None, "--guidance-scale": guidance if "guidance" in fits else None}
            words = [f"{option} {value}" for option, value in said.items() if value is not None]
            words += ["--height H --width W"] if "shape" in fits and self.made_for.shape != tuple(shape) else []
            other = type(scheduler) if any(each.startswith("scheduler") for each in differing) else None
            self._refuse(differing, self._another(words, other))

    def _another(self, words: list[str], scheduler: type | None) -> str:
        """How one is made that fits a run: with the knobs of this one, and these words; of a pipeline with another scheduler."""
        if self.kind != "artefact":
            return make_again(self.made_for.plugin, self.kind)
        plugin = self.made_for.plugin
        more = " ".join([*words, as_options(plugin, knobs_of(plugin, self.facts))])
        if scheduler is None:
            return make_again(plugin, more=more.strip())
        if not scheduler.__module__.startswith("diffusers."):
            return f"a calibration takes the scheduler that a model is loaded with: take off the plugin that brings {scheduler.__name__}"
        return (
            f"a calibration takes the scheduler that a model is loaded with: save yours (pipe.scheduler = "
            f"{scheduler.__name__}.from_config(pipe.scheduler.config); pipe.save_pretrained('model')) and "
            f"{make_again(plugin, more=more.strip(), pipeline='model')}"
        )

    def _refuse(self, differing: list[str], again: str | None = None) -> None:
        if differing:
            raise ArtefactMismatch(
                f"{self.made_for.plugin}: the artefact {self.path or '(in memory)'} does not fit: {'; '.join(differing)}; "
                f"{again or make_again(self.made_for.plugin, self.kind)}"
            )


def checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the header (without its checksum) and all tensors."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())  # the tensor's own memory, no copy
    return digest.hexdigest()


def make_again(plugin: str, kind: str = "artefact", more: str = "", pipeline: str = "NAME") -> str:
    """How to get an artefact that fits; ``more`` what is known of its calibration, as a shell takes it."""
    if kind == "weights":
        return "give the published file: a path, or 'owner/name/file' on the Hub"
    if kind == "inversion":
        return f"make one with `diffgraft invert {plugin} --pipeline NAME --image FILE`"
    if kind == "search":
        return f"make one with `diffgraft evolve {plugin} --pipeline NAME --prompts FILE --steps K`"
    if kind == "fit":
        return f"make one with `diffgraft fit {plugin} --pipeline NAME --steps N` and --inference-steps, --guidance-scale of your calls"
    words = " ".join(filter(None, [f"diffgraft calibrate {plugin} --pipeline {pipeline}", more]))
    return f"make one with `{words}` (--prompts FILE where it takes some)"


def make_again_with(plugin: str, knobs: Mapping[str, Any]) -> str:
    """The same, of an artefact that depends on these knobs, as a shell takes them."""
    return make_again(plugin, more=as_options(plugin, knobs))


def as_options(plugin: str, knobs: Mapping[str, Any]) -> str:
    """Knobs as a command line takes them: "-o deepcache.interval=3"."""
    return " ".join(f"-o {shlex.quote(each)}" for each in assignments(plugin, knobs))


def assignments(plugin: str, knobs: Mapping[str, Any]) -> list[str]:
    """The same without a shell: "deepcache.interval=3"."""
    return [f"{plugin}.{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in knobs.items()]


def knobs_of(plugin: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of an artefact: the knobs that its calibration was told beside the plugin's defaults, as JSON has them."""
    told = facts.get("knobs")
    try:
        usual = find(plugin).Config.model_construct().model_dump(mode="json")
    except DiffgraftError:  # a plugin that is not installed
        return {}
    return {name: value for name, value in told.items() if name in usual and value != usual[name]} if isinstance(told, dict) else {}


def check_size(path: Path, plugin: str, kind: str) -> None:
    """Raises ArtefactMismatch for a file too large to be one, before anything of it is read."""
    if (size := path.stat().st_size) > LARGEST:
        raise ArtefactMismatch(f"{path} has {size:,} bytes, more than any {kind} ({LARGEST:,}); {make_again(plugin, kind)}")


def find_file(source: str | os.PathLike[str], plugin: str, kind: str) -> Path:
    """A local path, or the file fetched from the Hub."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    text = os.fspath(source)
    suffixes = (".safetensors", ".json", *(PICKLES if kind == "weights" else ()))
    if text.count("/") >= 2 and text.endswith(suffixes) and not text.startswith((".", "/", "~")):
        from huggingface_hub import hf_hub_download

        owner, name, file = text.split("/", 2)
        try:
            return Path(hf_hub_download(f"{owner}/{name}", file))
        except (OSError, ValueError) as error:  # the Hub's own errors are kinds of these
            why = why_not_loaded(error, lacks="such file")
            raise ConfigError(f"plugin {plugin!r}: no {kind} {text!r}, here or on the Hub: {why}; {make_again(plugin, kind)}") from error
    why = "that is a folder" if path.is_dir() else "there is no such file"
    raise ConfigError(f"plugin {plugin!r}: no {kind} {text!r}, {why}; {make_again(plugin, kind)}")
