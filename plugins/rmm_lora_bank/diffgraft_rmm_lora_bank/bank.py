"""A bank: the basis updates of one denoiser's layers, side by side as one LoRA, and how much of each makes each task.

The file is a safetensors file: per layer ``PATH.lora_A.weight`` [R, in, ...], ``PATH.lora_B.weight`` [out, R, ...] and
``PATH.coefficients`` [N, p]; its header says the ranks of the p basis updates (R is their sum), the tasks' names, the errors, and the
model that it is for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffgraft import ArtefactMismatch, ConfigError, Need, Plugin, Target, nearest
from diffgraft.methods.adapters import Adapter, Lora, unfused_layers
from diffgraft.methods.artefacts import Fingerprint
from diffgraft.methods.files import check_file, write_atomic
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

KEY = "rmm_lora_bank"
"""Of the header, as JSON."""
AGAIN = "make one with `python -m diffgraft_rmm_lora_bank --help`"


class About(BaseModel):
    """What a bank's header says.

    denoiser   attribute of the pipeline; fingerprint: of the model that its LoRA were read for, none of a plain LoRA
    tasks      names, in the order of the coefficients' rows; errors: || dW - dW' || / || dW || of each, over all layers
    ranks      path of a layer -> rank of each basis update there
    lora_bytes of the LoRA that went in; alone: errors of the same LoRA, each cut by its own SVD to the bank's bytes
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    denoiser: str
    fingerprint: Fingerprint | None = None
    tasks: list[str] = Field(min_length=1)
    ranks: dict[str, list[int]]
    errors: list[float] = []
    alone: list[float] = []
    lora_bytes: int = 0


@dataclass(frozen=True, eq=False)
class Table:
    """The coefficients of one denoiser's bank, by layer [N, p], and what is known of it."""

    about: About
    coefficients: Mapping[str, Tensor]
    bytes: int

    @property
    def tasks(self) -> list[str]:
        return self.about.tasks

    def weights(self, task: Any, where: str) -> Tensor:
        """How much of each task [N]: of one by name or number, of several by a dict.

        Raises:
            ConfigError: no such task, or none is named where there are several.
        """
        names = self.tasks
        if isinstance(task, Mapping) and not task:
            raise ConfigError(f"{where} = {{}}: a mix of nothing; name one at least, of {', '.join(names)}")
        if task is None:
            if len(names) > 1:
                raise ConfigError(f"{where} = None: say which of the bank's {len(names)} tasks: {', '.join(names)}")
            task = 0
        out = torch.zeros(len(names), dtype=torch.float64)
        for one, weight in (task if isinstance(task, Mapping) else {task: 1.0}).items():
            if abs(weight) > torch.finfo(torch.float32).max:
                raise ConfigError(f"{where}.{one}: its weight is too large for float32; 1 is the LoRA at its own strength")
            if isinstance(one, int):
                if not 0 <= one < len(names):
                    raise ConfigError(f"{where} = {one}: the bank has tasks 0 to {len(names) - 1}: {', '.join(names)}")
                out[one] += weight
            elif one in names:
                out[names.index(one)] += weight
            else:
                raise ConfigError(f"{where} = {one!r}: no such task{nearest(str(one), names)} In the bank: {', '.join(names)}")
        return out

    def strengths(self, weights: Tensor) -> dict[str, Tensor]:
        """How much each rank of the stacked LoRA counts, by layer [R]."""
        return {
            path: (weights @ c.double()).repeat_interleave(torch.tensor(self.about.ranks[path])).float()
            for path, c in self.coefficients.items()
        }

    def named(self, task: Any) -> str:
        """A task for people."""
        if isinstance(task, Mapping):
            return "mix of " + ", ".join(f"{weight:g} {name}" for name, weight in task.items())
        return f"task {task if isinstance(task, str) else self.tasks[task or 0]!r}"

    def told(self) -> str:
        """Its sizes and errors, in a line."""
        about = self.about
        if not about.lora_bytes:
            return f"{len(self.tasks)} task, {self.bytes:,} bytes: a plain LoRA"
        share = self.bytes / about.lora_bytes
        bases = max(map(len, about.ranks.values()), default=0)
        return (
            f"{len(self.tasks)} tasks in {bases} basis updates: {self.bytes:,} bytes, {share:.0%} of the {about.lora_bytes:,} of the LoRA; "
            f"mean error of the weights {mean(about.errors):.1%} (each LoRA cut to its share of as many bytes: {mean(about.alone):.1%})"
        )


@dataclass(frozen=True, eq=False)
class Bank(Adapter):
    """Basis updates as one LoRA a denoiser, and their tables, by the denoiser's attribute."""

    tables: Mapping[str, Table]

    @classmethod
    def of(cls, plugin: Plugin, need: Need, value: Any, target: Target, number: int | None = None) -> Bank:
        """A bank file; a plain LoRA file is a bank of one task, named as the file. With several denoisers a dict of them."""
        where = f"plugin {plugin.name!r}: {need.knob}"
        of_each = isinstance(value, Mapping) and not any(isinstance(each, Tensor) for each in value.values())
        sources = dict(value) if of_each else {next(iter(target.denoisers)): value}
        if several := next((each for each in sources.values() if isinstance(each, Bank) and len(each.tables) > 1), None):
            raise ConfigError(f"{where}: a Bank of {', '.join(several.tables)} is given alone, not in a dict by denoiser")
        found = {attribute: read_bank(source, where) for attribute, source in sources.items()}
        for attribute, (_, about, _) in found.items():
            if about is not None and about.denoiser != attribute and attribute in target.denoisers:
                raise ArtefactMismatch(
                    f"{where}: the bank is for the {about.denoiser}, not for the {attribute}; give {{{about.denoiser!r}: FILE}}"
                )
        plain = super().of(plugin, need, {attribute: lora for attribute, (lora, _, _) in found.items()}, target, number)
        own = {attribute: next(iter(source.loras.values())) for attribute, source in sources.items() if isinstance(source, Bank)}
        loras = {**plain.loras, **own}  # a Bank's with what it knows of their strength
        tables = {
            attribute: table_of(loras[attribute], attribute, about, coefficients, sources[attribute], where)
            for attribute, (_, about, coefficients) in found.items()
        }
        return cls(plain.name, loras, tables)

    def ensure_model(self, denoisers: Mapping[str, nn.Module]) -> None:
        """Raises ArtefactMismatch where a bank was made for another model, Unsupported where a LoRA is fused into this one."""
        for attribute, table in self.tables.items():
            made_for = table.about.fingerprint
            if attribute in denoisers:
                unfused_layers(denoisers[attribute])
            else:
                raise ArtefactMismatch(f"rmm_lora_bank: the bank is for a {attribute}, and this pipeline has none; {AGAIN}")
            if made_for is not None and (why := made_for.difference(Fingerprint.of(denoisers[attribute]), crosses=True)):
                raise ArtefactMismatch(f"rmm_lora_bank: the bank is of another model: {attribute}: found {why}; {AGAIN}")

    @property
    def table(self) -> Table:
        """Of the one denoiser that it was built for."""
        return next(iter(self.tables.values()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file of a bank of one denoiser: the whole of it, or nothing; ConfigError for a name that is none."""
        check_file(Path(path), {".safetensors"}, "rmm_lora_bank: save")
        attribute, table = next(iter(self.tables.items()))
        tensors = {name.removeprefix(f"{prefix_of(attribute)}."): value for name, value in self.loras[attribute].tensors.items()}
        tensors |= {f"{path}.coefficients": value for path, value in table.coefficients.items()}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        header = {"format": 1, **table.about.model_dump(mode="json", exclude={"fingerprint"})}
        header["fingerprint"] = None if table.about.fingerprint is None else asdict(table.about.fingerprint)
        header["checksum"] = checksum(header, tensors)
        write_atomic(Path(path), save(tensors, metadata={KEY: json.dumps(header, sort_keys=True)}))


def prefix_of(attribute: str) -> str:
    """What a denoiser's tensors begin with in a LoRA file."""
    return attribute.removesuffix("_2")


def checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the header and all tensors."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_bank(source: Any, where: str) -> tuple[Any, About | None, dict[str, Tensor]]:
    """(what diffusers reads as a LoRA, header, coefficients) of a bank file or a Bank of one denoiser.

    Anything else is returned as it is, for diffusers to read.

    Raises:
        ArtefactMismatch: a bank file that is damaged, or not what this plugin writes.
    """
    if isinstance(source, Bank):
        lora = next(iter(source.loras.values()))
        return dict(lora.tensors), source.table.about, dict(source.table.coefficients)
    if not isinstance(source, (str, os.PathLike)) or not Path(source).expanduser().is_file():
        return source, None, {}
    path = Path(source).expanduser()
    try:
        with safe_open(path, framework="pt") as file:
            if (written := (file.metadata() or {}).get(KEY)) is None:
                return os.fspath(path), None, {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError) as error:
        if path.suffix == ".safetensors":
            raise ArtefactMismatch(f"{where} = {source} cannot be read ({error}); {AGAIN}") from error
        return os.fspath(path), None, {}
    try:
        header = json.loads(written)
        expected, number = header.pop("checksum", None), header.get("format")
        if number != 1:
            raise ArtefactMismatch(f"{where} = {source} has layout {number!r}, this plugin reads 1; {AGAIN}")
        if checksum(header, tensors) != expected:
            raise ArtefactMismatch(f"{where} = {source} is damaged: its checksum is wrong; {AGAIN}")
        header.pop("format")
        about = About.model_validate(header)
    except (ValueError, AttributeError, ValidationError, RecursionError) as error:
        raise ArtefactMismatch(f"{where} = {source} is not what this plugin writes: {str(error).splitlines()[0]}; {AGAIN}") from error
    coefficients = {name.removesuffix(".coefficients"): tensors.pop(name) for name in list(tensors) if name.endswith(".coefficients")}
    return {f"{prefix_of(about.denoiser)}.{name}": value for name, value in tensors.items()}, about, coefficients


def table_of(lora: Lora, attribute: str, about: About | None, coefficients: dict[str, Tensor], source: Any, where: str) -> Table:
    """The table of a bank whose LoRA fits the model; of a plain LoRA one of one task.

    Raises:
        ArtefactMismatch: ranks or coefficients that do not go with the LoRA.
    """
    start = f"{prefix_of(attribute)}."
    halves = {name.removeprefix(start).removesuffix(".lora_B.weight"): value for name, value in lora.tensors.items() if ".lora_B." in name}
    if about is None:
        name = Path(os.fspath(source)).stem if isinstance(source, (str, os.PathLike)) else "lora"
        ranks = {path: [value.shape[1]] for path, value in halves.items()}
        about = About(denoiser=attribute, tasks=[name], ranks=ranks)
        coefficients = {path: torch.ones(1, 1) for path in halves}
    if not about.ranks.keys() == coefficients.keys() == halves.keys():
        path = min((about.ranks.keys() ^ halves.keys()) | (coefficients.keys() ^ halves.keys()))
        raise ArtefactMismatch(f"{where}: the bank's layer {path} lacks a part of it; {AGAIN}")
    for path, value in halves.items():
        ranks, wanted = about.ranks[path], (len(about.tasks), len(about.ranks[path]))
        c, A = coefficients[path], lora.tensors[f"{start}{path}.lora_A.weight"]
        if tuple(c.shape) != wanted or not c.is_floating_point() or not bool(c.isfinite().all()):
            raise ArtefactMismatch(f"{where}: the bank's coefficients of {path} are not {wanted[0]} x {wanted[1]} finite numbers; {AGAIN}")
        if min(ranks) < 0 or not sum(ranks) == value.shape[1] == A.shape[0]:
            raise ArtefactMismatch(f"{where}: the bank's ranks {ranks} of {path} are not those of its tensors; {AGAIN}")
    size = sum(map(bytes_of, lora.tensors.values())) + (sum(map(bytes_of, coefficients.values())) if len(about.tasks) > 1 else 0)
    return Table(about, coefficients, size)


def bytes_of(value: Tensor) -> int:
    """Bytes of a tensor's numbers."""
    return value.numel() * value.element_size()


def mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)
