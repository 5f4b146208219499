"""Reading weights that others published: first what a file says that it has; nothing but tensors ever, and none where that does not fit.

Of safetensors the header is read first, also of several files with an index. Of pickles (``.pt``, ``.pth``, ``.bin``, ``.ckpt``)
``torch.load(weights_only=True)`` reads first all but the numbers; what else than tensors is in them is never run.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from diffgraft.installed.errors import ArtefactMismatch, ConfigError
from diffgraft.installed.foreign import brief, plain, said
from diffgraft.installed.unread import PICKLES
from diffgraft.methods.artefacts import find_file
from diffgraft.methods.layouts import MOST, Comparison, Layout, Spec, shown
from diffgraft.methods.schema import name_of

HEADER = 16 * 2**20
"""Bytes of a file's header, of an index, and of what a pickle is without its numbers."""
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16"}
DTYPES |= {"I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
"""What safetensors call dtypes."""


@dataclass(frozen=True, eq=False)
class Weights:
    """What a plugin gets: tensors by the keys of its layout, the numbers of the layout's letters, where they are from, and the layout by
    which they were read. ``Weights(tensors)`` is a state dict that is given instead of a file, and read as one."""

    tensors: Mapping[str, Tensor] = field(repr=False)
    sizes: Mapping[str, int] = field(default_factory=dict)
    source: str = "(in memory)"
    layout: Layout | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Found:
    """A file, or a state dict in memory, with what it says that it has."""

    specs: dict[str, Spec]
    path: Path | None
    state: Mapping[str, Any]

    def tensors(self, keys: Mapping[str, str], layout: Layout) -> dict[str, Tensor]:
        """Those of its tensors that are among ``keys``: name -> key."""
        mine = {name: key for name, key in keys.items() if key in self.specs}
        if self.path is not None and self.path.suffix.lower() == ".safetensors":
            with reading(self.path), safe_open(self.path, framework="pt") as file:
                return {name: file.get_tensor(key) for name, key in mine.items()}
        state = self.state if self.path is None else unpickled(self.path, layout, "cpu")
        return {name: state[key].detach() for name, key in mine.items()}


def read_weights(layout: Layout, source: Any, plugin: str, knob: str) -> Weights:
    """The weights of a file (path, or ``owner/name/file`` on the Hub), of several, of an index of several, or of ``Weights`` in memory.

    Raises:
        ConfigError: there is no such file, or it is of no kind that is read.
        ArtefactMismatch: it is damaged, holds more than tensors, or is not as the layout says: with everything that is wrong.
    """
    comparison, files = compare(layout, source, plugin, knob)
    what, where = in_words(knob, source), in_words("", source)
    comparison.ensure(plugin, what)
    tensors = {name: tensor for file in files for name, tensor in file.tensors(comparison.used, layout).items()}
    if wrong := [name for name in comparison.used if not is_finite(tensors[name])]:
        raise ArtefactMismatch(f"{plugin}: {what} holds numbers that are not finite: {', '.join(wrong)}")
    shaped = {name: tensors[name].reshape(shape) for name, shape in comparison.shapes.items()}
    return Weights(shaped, comparison.sizes, where, layout)


def compare(layout: Layout, source: Any, plugin: str, knob: str) -> tuple[Comparison, list[Found]]:
    """What is in one or several files, held against a layout, without a tensor being read.

    Raises:
        ConfigError, ArtefactMismatch: what cannot be read at all.
    """
    if isinstance(source, Weights):
        if wrong := [key for key in source.tensors if not isinstance(key, str)]:
            raise ConfigError(f"plugin {plugin!r}: {knob}: {brief(wrong[0])} is no name of a tensor")
        files = [Found({key: spec_of(value) for key, value in source.tensors.items()}, None, source.tensors)]
    else:
        sources = source if isinstance(source, (list, tuple)) else [source]
        if wrong := [one for one in sources if not isinstance(one, (str, os.PathLike))]:
            kind = type(wrong[0]).__name__
            raise ConfigError(f"plugin {plugin!r}: {knob} = {kind}: give a file, a Hub id 'owner/name/file', or Weights")
        paths = [path for one in sources for path in paths_of(one, plugin)]
        files = [Found(specs_of(path, layout), path, {}) for path in paths]
    both: dict[str, Spec] = {}
    for file in files:
        if twice := both.keys() & file.specs.keys():
            raise ArtefactMismatch(f"{plugin}: {in_words(knob, source)}: two files have {', '.join(sorted(map(shown, twice)))}")
        both |= file.specs
    if len(both) > MOST:
        raise ArtefactMismatch(f"{plugin}: {in_words(knob, source)} has {len(both):,} keys, more than any model ({MOST:,})")
    return layout.compare(both), files


def in_words(knob: str, source: Any) -> str:
    """What somebody gave, for errors."""
    several = source if isinstance(source, (list, tuple)) else [source]
    text = source.source if isinstance(source, Weights) else ", ".join(plain(os.fspath(one)) for one in several)
    return f"{knob} = {text}" if knob else text


# files --------------------------------------------------------------------------------------------------------------------------------


def paths_of(source: str | os.PathLike[str], plugin: str) -> list[Path]:
    """The files that a name stands for: itself, or those of an index."""
    path = find_file(source, plugin, "weights")
    if path.suffix.lower() in (".safetensors", *PICKLES):
        return [path]
    if path.suffix != ".json":
        raise ConfigError(f"plugin {plugin!r}: {source} is none of .safetensors, .safetensors.index.json, {', '.join(PICKLES)}")
    with reading(path):
        if path.stat().st_size > HEADER:
            raise ArtefactMismatch(f"{source} has {path.stat().st_size:,} bytes, more than any index ({HEADER:,})")
        shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    if wrong := [one for one in map(str, shards) if not re.fullmatch(r"\w[\w.-]*\.safetensors", one)]:
        raise ArtefactMismatch(f"{source}: {plain(wrong[0])[:100]!r} is no file beside it")
    return [find_file(Path(source).with_name(shard).as_posix(), plugin, "weights") for shard in shards]


def specs_of(path: Path, layout: Layout) -> dict[str, Spec]:
    """What a file says that it has.

    Raises:
        ArtefactMismatch: it cannot be read.
    """
    if path.suffix.lower() != ".safetensors":
        state = unpickled(path, layout, "meta")
        size = path.stat().st_size
        if wrong := [key for key, value in state.items() if isinstance(value, Tensor) and value.nbytes > size]:
            raise ArtefactMismatch(f"{path}: {shown(wrong[0])} is larger than the whole file")
        return {key: spec_of(value) for key, value in state.items()}
    with reading(path):
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
        if HEADER < length < path.stat().st_size:
            raise ArtefactMismatch(f"{path} has a header of {length:,} bytes, more than any ({HEADER:,})")
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # not a dict
            return {key: Spec(tuple(one.get_shape()), DTYPES.get(one.get_dtype(), one.get_dtype())) for key, one in slices.items()}


def unpickled(path: Path, layout: Layout, device: str) -> dict[str, Any]:
    """The state dict of a pickle, on "meta" without its numbers."""
    with reading(path):
        if zipfile.is_zipfile(path):
            for entry in zipfile.ZipFile(path).infolist():
                if entry.compress_type != zipfile.ZIP_STORED or (entry.filename.endswith(".pkl") and entry.file_size > HEADER):
                    raise ArtefactMismatch(f"{path}: {plain(entry.filename)[:100]} is packed as nobody packs weights")
        state = torch.load(path, map_location=device, weights_only=True)
    for name in layout.inside:
        state = state[name] if isinstance(state, Mapping) and isinstance(state.get(name), Mapping) else state
    if not isinstance(state, Mapping):
        raise ArtefactMismatch(f"{path} holds a {type(state).__name__}, no state dict")
    return {key if isinstance(key, str) else f"(a {type(key).__name__})": value for key, value in state.items()}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever reading somebody else's file raises, in our words."""
    try:
        yield
    except (ArtefactMismatch, KeyboardInterrupt):
        raise
    except Exception as error:  # a crafted pickle can make torch raise anything; its own advice (weights_only=False) is not repeated
        code = re.search(r"(?:GLOBAL|[Gg]lobal:?) ([\w.]+\.\w+)", str(error))
        if code is not None and path.suffix.lower() in PICKLES:
            why = f"it names {code[1]}, so it holds more than tensors; nothing of it is run. Ask for safetensors, or a plain state dict"
        else:
            words = "" if path.suffix.lower() in PICKLES else f" ({said(error)})"
            why = f"it is damaged, cut off, or not what its name says{words}: fetch or save it again"
        raise ArtefactMismatch(f"{path} cannot be read: {why}") from error


def spec_of(value: Any) -> Spec:
    """What a value of a state dict is."""
    if not isinstance(value, Tensor):
        return Spec(None, type(value).__name__)
    if value.layout is not torch.strided or value.is_quantized:
        return Spec(None, f"a {name_of(value.layout)} tensor of {name_of(value.dtype)}")
    return Spec(tuple(value.shape), name_of(value.dtype))


def is_finite(tensor: Tensor) -> bool:
    values = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
    return bool(values.isfinite().all())
