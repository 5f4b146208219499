"""Calibration block by block (BRECQ, arXiv 2102.05426): a denoiser's calls, kept from runs and replayed, and each block learned by itself.

    class Measure(Keeping):                                      # a calibrator: its runs keep what the denoiser was asked
        def keeps(self, call): return call.step.index % 2 == 0
        def summarise(self, records, target):
            units = units_of(target, layers)
            losses = learned(records, target, units, "weights", learn)    # learn(unit, outputs, targets, count) -> Losses

A block learns to give, for the inputs that the quantised blocks before it give, the outputs that it gives in floats. Inputs and outputs are
in files while it learns, so that memory does not grow with the number of prompts. What a block has learned is written beside the records
of the runs: an interrupted calibration goes on with the next block.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffgraft.installed.anatomy import Target, root_of
from diffgraft.installed.errors import ConfigError, NotFinite, Unsupported
from diffgraft.installed.family import Family
from diffgraft.kernel.calls import DenoiseCall, RunCall
from diffgraft.methods.calibration import OnProgress, Records
from diffgraft.methods.files import write_atomic
from diffgraft.methods.quant.attention import rounded_softmaxes
from diffgraft.methods.quant.kept import fill, keep
from diffgraft.methods.quant.layers import QuantLayer
from diffgraft.methods.quant.rounding import Losses, Outputs
from diffgraft.methods.watching import Calibrator

PLAIN = (str, int, float, bool, type(None))
"""What a call may hold beside tensors."""
RunRecords = Sequence[dict[str, Tensor]]


def replayable(family: Family) -> bool:
    """Whether its calls can be asked again by themselves: perturbed-attention guidance splits each batch in three, which only its own
    pipeline makes."""
    return not family.name.endswith("_pag")


def ensure_replayable(target: Target, plugin: str) -> None:
    """Raises Unsupported where they cannot."""
    if not replayable(target.family):
        raise Unsupported(
            f"{plugin}: {type(target.pipe).__name__} has perturbed-attention guidance, which splits each batch in three, and a "
            "calibration asks calls again by themselves; use the pipeline without it"
        )


# calls ----------------------------------------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """One denoiser call: the denoiser's attribute, its arguments by name, its rows."""

    model: str
    arguments: dict[str, Any]
    rows: int


@dataclass
class Kept:
    """Of a run: the calls that are kept."""

    calls: list[Asked] = field(default_factory=list)


class Keeping(Calibrator):
    """A calibrator whose runs keep denoiser calls. All guidance branches are kept, in one call or in one each."""

    State = Kept

    def keeps(self, call: DenoiseCall) -> int:
        """How often a call is kept: not at all, once, more often."""
        raise NotImplementedError

    def kept(self, call: DenoiseCall) -> Asked:
        """What is kept of a call."""
        arguments = {**call.arguments(), call.family.timestep: torch.as_tensor(call.timestep)}
        return on_cpu(Asked(call.model_name, arguments, len(call.sample)))

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        if often := self.keeps(call):
            call.shared.calls.extend([self.kept(call)] * often)
        return next(call)  # type: ignore[no-any-return]

    def collect(self, call: RunCall) -> dict[str, Tensor]:
        return recorded(call.shared.calls)


def by_row(x: Tensor, rows: int) -> Tensor:
    """A tensor of a call as [rows, parts of a row, ...]; what is one for all rows is repeated.

    Raises:
        Unsupported: it has neither.
    """
    x = x.detach().reshape(1) if x.ndim == 0 else x.detach()
    x = x.expand(rows, *x.shape[1:]) if len(x) == 1 else x
    if len(x) % rows:
        raise Unsupported(f"a denoiser call of {rows} rows holds a tensor of shape {tuple(x.shape)}, of which no row has its part")
    return x.reshape(rows, -1, *x.shape[1:])


def on_cpu(asked: Asked) -> Asked:
    """A call whose tensors are copies of their own, which the pipeline does not change any more."""
    return asked._replace(arguments=pytree.tree_map_only(Tensor, lambda x: x.detach().to("cpu", copy=True), asked.arguments))


def recorded(calls: Sequence[Asked]) -> dict[str, Tensor]:
    """Calls as tensors of a record: those of one form behind each other, "<number>/<leaf>" [rows, ...], and "<number>" their form as JSON.

    Raises:
        Unsupported: a call holds something that no file can.
    """
    found: dict[str, list[list[Tensor]]] = {}
    for asked in calls:
        leaves, form = pytree.tree_flatten(asked.arguments)
        if other := next((x for x in leaves if not isinstance(x, (Tensor, *PLAIN))), None):
            raise Unsupported(f"the denoiser is given a {type(other).__name__}, which cannot be kept for a calibration by blocks")
        tensors = [by_row(x, asked.rows).cpu() for x in leaves if isinstance(x, Tensor)]
        told = {
            "model": asked.model,
            "form": pytree.treespec_dumps(form),
            "plain": [None if isinstance(x, Tensor) else [x] for x in leaves],
        }
        told["shapes"] = [[str(x.dtype), *x.shape[1:]] for x in tensors]
        found.setdefault(json.dumps(told), []).append(tensors)
    record: dict[str, Tensor] = {}
    for number, (told_as, parts) in enumerate(found.items()):
        record[str(number)] = torch.tensor(list(told_as.encode()), dtype=torch.uint8)
        record |= {f"{number}/{i}": torch.cat(tensors) for i, tensors in enumerate(zip(*parts, strict=True))}
    return record


def asked_in(record: Mapping[str, Tensor], batch: int) -> Iterator[Asked]:
    """The calls of a record again, ``batch`` rows at a time."""
    for name in sorted(name for name in record if "/" not in name):
        told = json.loads(bytes(record[name].tolist()))
        tensors = [record[f"{name}/{i}"] for i in range(len(told["shapes"]))]
        for start in range(0, len(tensors[0]), batch):
            parts = iter([x[start : start + batch].flatten(0, 1) for x in tensors])
            leaves = [next(parts) if plain is None else plain[0] for plain in told["plain"]]
            rows = min(batch, len(tensors[0]) - start)
            yield Asked(told["model"], pytree.tree_unflatten(leaves, pytree.treespec_loads(told["form"])), rows)


# blocks ---------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Unit:
    """What is learned together: a block, or a layer outside of all; ``key`` "unet.mid_block.resnets.0", its quantised layers by key."""

    key: str
    model: str
    module: nn.Module
    layers: Mapping[str, QuantLayer]


def units_of(target: Target, layers: Mapping[str, QuantLayer]) -> list[Unit]:
    """The blocks of a denoiser that have quantised layers, and the layers outside of them each alone; in no order.

    A block of a U-Net is what the family calls a layer of one (a residual block, a transformer, a sampler); of several transformer blocks
    in one (SDXL) each is one. A block of a transformer is a whole one.
    """
    unet = target.family.kind == "unet"
    places: dict[str, tuple[str, nn.Module]] = {}
    for block in target.blocks:
        if block.is_layer == unet:
            inner = getattr(block.module, "transformer_blocks", ())
            parts = [(f"{block.path}.transformer_blocks.{i}", part) for i, part in enumerate(inner)] if len(inner) > 1 else []
            places |= {f"{block.model}.{path}": (block.model, part) for path, part in parts or [(block.path, block.module)]}
    owned: dict[str, dict[str, QuantLayer]] = {}
    for key, layer in layers.items():
        owner = next((place for place in places if key.startswith(f"{place}.")), key)
        owned.setdefault(owner, {})[key] = layer
    return [Unit(key, *places.get(key, (key.partition(".")[0], layers.get(key))), mine) for key, mine in owned.items()]  # type: ignore[arg-type]


class _Stop(Exception):
    """Nothing behind this is asked for."""


@contextmanager
def active(layers: Mapping[str, QuantLayer], on: bool) -> Iterator[None]:
    """All layers on their grids, or in floats."""
    before = {key: layer.active for key, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.active = on
        yield
    finally:
        for key, layer in layers.items():
            layer.active = before[key]


def first_of(output: Any) -> Tensor:
    """What a block gives, of a tuple or an output of diffusers the first."""
    return next(x for x in pytree.tree_leaves(output) if isinstance(x, Tensor))


def ask(denoiser: nn.Module, arguments: Mapping[str, Any], module: nn.Module, whole: bool) -> tuple[Any, Tensor | None]:
    """((args, kwargs) that the module gets in a call of the denoiser, its output where the ``whole`` of it is to be computed)."""
    got: list[Any] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        got.append((args, kwargs))
        if not whole:
            raise _Stop

    def after(_: nn.Module, args: Any, output: Any) -> None:
        got.append(first_of(output).detach())
        raise _Stop

    handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        denoiser(**arguments)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return (got[0] if got else None), (got[1] if len(got) > 1 else None)


class OnDisk:
    """Tensors of many rows in files, of which only those that are asked for are read."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder, self.rows = folder, rows
        self.files: dict[str, Tensor] = {}

    def put(self, name: str, start: int, values: Tensor) -> None:
        """Rows from ``start`` on; values [rows, parts of a row, ...].

        Raises:
            Unsupported: they have another shape than those before.
        """
        if name not in self.files:
            shape = (self.rows, *values.shape[1:])
            path, size = str(self.folder / name), torch.Size(shape).numel()
            self.files[name] = torch.from_file(path, shared=True, size=size, dtype=values.dtype).reshape(shape)
        file = self.files[name]
        if file.shape[1:] != values.shape[1:]:
            raise Unsupported(
                f"a block gets {tuple(values.shape[1:])} in one call and {tuple(file.shape[1:])} in another: calibrate at one size"
            )
        file[start : start + len(values)] = values.cpu()

    def get(self, name: str, rows: list[int], device: torch.device) -> Tensor:
        return self.files[name][rows].flatten(0, 1).to(device)


class Taken:
    """What came into a block and should come out of it, on disk."""

    def __init__(self, unit: Unit, folder: Path, rows: int) -> None:
        self.unit, self.count = unit, rows
        self.disk, self.filled = OnDisk(folder, rows), 0
        self.form: Any = None
        self.plain: list[Any] = []
        self.device = next(iter(unit.layers.values())).weight.device

    def add(self, given: Any, target: Tensor, rows: int) -> None:
        """A call's."""
        leaves, self.form = pytree.tree_flatten(given)
        self.plain = [None if isinstance(x, Tensor) else x for x in leaves]
        for i, x in enumerate(leaves):
            if isinstance(x, Tensor):
                self.disk.put(str(i), self.filled, by_row(x, rows))
        self.disk.put("target", self.filled, by_row(target, rows))
        self.filled += rows

    def outputs(self, rows: list[int]) -> Tensor:
        leaves = [self.disk.get(str(i), rows, self.device) if str(i) in self.disk.files else x for i, x in enumerate(self.plain)]
        args, kwargs = pytree.tree_unflatten(leaves, self.form)
        return first_of(self.unit.module(*args, **kwargs))

    def targets(self, rows: list[int]) -> Tensor:
        return self.disk.get("target", rows, self.device)


@torch.no_grad()
def replay(records: RunRecords, target: Target, batch: int = 32) -> None:
    """Ask the denoisers all that was kept again."""
    for record in records:
        for asked in asked_in(record, batch):
            root_of(target.denoisers[asked.model])(**arguments_on(target.denoisers[asked.model], asked))


def arguments_on(denoiser: nn.Module, asked: Asked) -> dict[str, Any]:
    """A call's arguments on the device of its denoiser."""
    device = next(root_of(denoiser).parameters()).device
    return pytree.tree_map_only(Tensor, lambda x: x.to(device), asked.arguments)  # type: ignore[no-any-return]


@torch.no_grad()
def take(unit: Unit, records: RunRecords, target: Target, layers: Mapping[str, QuantLayer], folder: Path, batch: int) -> Taken | None:
    """A block's inputs from the quantised model and its outputs in floats, of all kept calls; None where no call comes to it.

    Raises:
        NotFinite: its outputs are not.
    """
    rows = sum(asked.rows for record in records for asked in asked_in(record, batch) if asked.model == unit.model)
    taken, denoiser = Taken(unit, folder, rows), root_of(target.denoisers[unit.model])
    for record in records:
        for asked in asked_in(record, batch):
            if asked.model == unit.model:
                arguments = arguments_on(denoiser, asked)
                with active(layers, False):
                    _, output = ask(denoiser, arguments, unit.module, whole=True)
                with active(layers, True):
                    given, _ = ask(denoiser, arguments, unit.module, whole=False)
                if output is None:
                    return None
                if not bool(output.isfinite().all()):
                    raise NotFinite(f"the outputs of {unit.key} hold values that are not finite, so it has no range; use a wider dtype")
                taken.add(given, output, asked.rows)
    return taken


@torch.no_grad()
def in_order(units: Sequence[Unit], records: RunRecords, target: Target) -> list[Unit]:
    """The blocks in the order in which a call comes to them.

    Raises:
        ConfigError: no call was kept.
        NotFinite: a block of which a call makes what is not finite, the first of them.
    """
    order: list[str] = []
    bad: list[str] = []

    def after(key: str, output: Any) -> None:
        if not bool(first_of(output).isfinite().all()):
            bad.append(key)

    handles = [unit.module.register_forward_pre_hook(lambda *_, key=unit.key: order.append(key)) for unit in units]
    handles += [unit.module.register_forward_hook(lambda _, args, output, key=unit.key: after(key, output)) for unit in units]
    try:
        for model, denoiser in target.denoisers.items():
            one = next((asked for record in records for asked in asked_in(record, 1) if asked.model == model), None)
            if one is not None:
                root_of(denoiser)(**arguments_on(denoiser, one))
    finally:
        for handle in handles:
            handle.remove()
    if bad:
        raise NotFinite(f"the outputs of {bad[0]} hold values that are not finite, so it has no range; use a wider dtype")
    if not order:
        raise ConfigError("no denoiser call was kept, so there is nothing to calibrate on: take more steps, or more of them")
    return sorted((unit for unit in units if unit.key in order), key=lambda unit: order.index(unit.key))


# the whole ------------------------------------------------------------------------------------------------------------------------------

Learn = Callable[[Unit, Outputs, Outputs, int], Losses]
"""Learns a block: (it, outputs of samples, targets of samples, how many there are)."""


def learned(records: RunRecords, target: Target, units: Sequence[Unit], stage: str, learn: Learn, batch: int = 32) -> dict[str, Losses]:
    """Let ``learn`` have each block in turn -> what it gave, by the block's key, in running order.

    Args:
        stage: a name for it, of several: "weights", "inputs".
        batch: rows in one call of the denoiser.
    """
    layers = {key: layer for unit in units for key, layer in unit.layers.items()}
    found: dict[str, Losses] = {}
    with (
        workplace(records) as (folder, digest, on_progress),
        rounded_softmaxes(map(root_of, target.denoisers.values())),
        active(layers, True),
    ):
        units = in_order(units, records, target)
        for number, unit in enumerate(units):
            path = folder / f"{stage}-{number:04d}.safetensors"
            losses = read(path, unit, digest)
            if losses is None:
                with tempfile.TemporaryDirectory(dir=folder) as place:
                    taken = take(unit, records, target, layers, Path(place), batch)
                    losses = Losses(0.0, 0.0, False) if taken is None else learn(unit, taken.outputs, taken.targets, taken.count)
                write(path, unit, digest, losses)
            found[unit.key] = losses
            if on_progress is not None:
                on_progress(stage, number + 1, len(units))
    return found


@contextmanager
def workplace(records: RunRecords) -> Iterator[tuple[Path, str, OnProgress | None]]:
    """(where what was learned is kept, what tells this work from another, who is told how far it is)."""
    if isinstance(records, Records):
        yield records.folder, records.digest, records.on_progress
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder), "", None


def write(path: Path, unit: Unit, digest: str, losses: Losses) -> None:
    """Keep what a block has learned."""
    tensors, facts = keep(unit.layers)
    told = {"digest": digest, "key": unit.key, "losses": list(losses), "facts": facts}
    write_atomic(path, save({**tensors, "none": torch.zeros(1)}, metadata={"blocks": json.dumps(told)}))


def read(path: Path, unit: Unit, digest: str) -> Losses | None:
    """What a block has learned before, put into its layers; None where it has not.

    Raises:
        ConfigError: the folder is that of another calibration.
    """
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()["blocks"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    if (told["digest"], told["key"]) != (digest, unit.key):
        raise ConfigError(
            f"{path.parent} holds blocks of an unfinished calibration with other prompts: finish that one, delete the folder, or choose "
            "another --out"
        )
    fill(unit.layers, tensors, told["facts"], f"delete {path.parent}")
    return Losses(*told["losses"])
