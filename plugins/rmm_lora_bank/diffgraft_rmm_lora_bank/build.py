"""Making a bank of LoRA files: every layer's factors as diffusers would load them, the algebra of :mod:`.method`, and what it costs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from accelerate import init_empty_weights
from diffgraft import ArtefactMismatch, ConfigError, Unsupported, denoisers_of, find_family, nearest, root_of
from diffgraft.methods.adapters import Lora, read_lora, unfused_layers
from diffgraft.methods.artefacts import Fingerprint
from diffgraft.methods.extras import imported
from torch import Tensor, nn

from diffgraft_rmm_lora_bank.bank import About, Bank, Table, bytes_of, prefix_of
from diffgraft_rmm_lora_bank.method import Update, alone, basis_of, coefficients, norm, residual

NAME = "diffgraft:rmm_lora_bank:bank"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Factors = dict[str, list[Update]]
"""Path of a layer -> the update of each LoRA there; of rank 0 where a LoRA has none."""


def build_bank(
    pipe: Any,
    loras: Mapping[str, Any],
    p: int,
    rank: int | str | None = None,
    denoiser: str | None = None,
    dtype: str | None = None,
    larger: bool = False,
) -> Bank:
    """The bank of some LoRA of a pipeline's denoiser, in memory: give it to the knob ``bank``, or ``save`` it.

    Args:
        pipe: the pipeline that the LoRA are for, without a fused LoRA; it stays as it is.
        loras: name of the task -> LoRA file (path or Hub id, any that ``pipe.load_lora_weights`` reads), or its tensors.
        p: number of basis updates, 1 to N.
        rank: r', the most of each basis update; None: the highest of the LoRA in a layer; "full": as it comes, up to the sum of theirs.
        denoiser: its attribute, where there are two.
        dtype: in which the basis is kept ("float32", "float16", "bfloat16"); None: the widest of the LoRA.
        larger: whether a bank that is larger than the LoRA will do.

    Raises:
        ConfigError: names that are none, one LoRA alone, p of more than there are, a bank larger than the LoRA, no such file.
        ArtefactMismatch: a LoRA of another model.
        Unsupported: the pipeline loads no LoRA, or has one that is fused.
    """
    where = "rmm_lora_bank"
    if not isinstance(loras, Mapping) or not all(isinstance(task, str) and task for task in loras):
        given = list(loras) if isinstance(loras, Mapping) else type(loras).__name__
        raise ConfigError(f"{where}: loras = {given}: a dict of names and LoRA, {{'night': 'night.safetensors', ...}}")
    N = len(loras)
    if N < 2:
        raise ConfigError(f"{where}: {N} LoRA: a bank takes two or more; one alone is loaded with pipe.load_lora_weights")
    if isinstance(p, bool) or not isinstance(p, int) or not 1 <= p <= N:
        raise ConfigError(f"{where}: p = {p!r}: 1 to {N}, the number of the LoRA")
    if not (rank in (None, "full") or (isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1)):
        raise ConfigError(f"{where}: rank = {rank!r}: a whole number of at least 1, 'full', or None for that of the LoRA")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"{where}: dtype = {dtype!r}{nearest(str(dtype), DTYPES)} There are {', '.join(DTYPES)}")
    attribute, read = read_loras(pipe, loras, denoiser)
    model = root_of(getattr(pipe, attribute))
    layers = layers_of(model, attribute, read)
    tensors = [value for lora in read.values() for value in lora.tensors.values()]
    kept = DTYPES[dtype] if dtype else reduce(torch.promote_types, (value.dtype for value in tensors))
    known = {path: root_layer(model, path).weight.shape for path in layers}

    about = About(denoiser=attribute, fingerprint=Fingerprint.of(model), tasks=list(loras), ranks={})
    stacked: dict[str, Tensor] = {}
    table: dict[str, Tensor] = {}
    off, off_alone = Tally(N), Tally(N)
    for path, updates in layers.items():
        most = None if rank == "full" else rank or max(each.rank for each in updates)
        basis = [rounded(each, kept) for each in basis_of(updates, p, most)]
        c = coefficients(updates, basis).float()
        norms = [norm(each) for each in updates]
        off.add(norms, [residual(each, basis, c[i].double()) for i, each in enumerate(updates)])
        cut = alone(updates, sum(each.rank for each in basis))
        off_alone.add(norms, [residual(x, [y], torch.ones(1, dtype=torch.float64)) for x, y in zip(updates, cut, strict=True)])
        if not any(each.rank for each in basis):  # LoRA that do nothing here
            continue
        A, B = torch.cat([each.A for each in basis]), torch.cat([each.B for each in basis], 1)
        shape = known[path]
        stacked[f"{prefix_of(attribute)}.{path}.lora_A.weight"] = A.to(kept).reshape(-1, *shape[1:])
        stacked[f"{prefix_of(attribute)}.{path}.lora_B.weight"] = B.to(kept).reshape(shape[0], -1, *[1] * (len(shape) - 2))
        table[path], about.ranks[path] = c, [each.rank for each in basis]
    if not table:
        raise ConfigError(f"{where}: none of these LoRA changes anything: every one is nought")
    about.errors, about.alone, about.lora_bytes = off.shares(), off_alone.shares(), sum(map(bytes_of, tensors))
    size = sum(map(bytes_of, [*stacked.values(), *table.values()]))
    if size > about.lora_bytes and not larger:
        raise ConfigError(
            f"{where}: p = {p}, rank = {rank}: the bank would have {size:,} bytes, and the {N} LoRA have {about.lora_bytes:,}: basis "
            f"updates of a rank that has grown cost more than they save; take fewer, a lower rank, or say larger=True (--larger)"
        )
    return Bank(NAME, {attribute: Lora(stacked, {"metadata": None})}, {attribute: Table(about, table, size)})


def read_loras(pipe: Any, loras: Mapping[str, Any], denoiser: str | None = None) -> tuple[str, dict[str, Lora]]:
    """(the denoiser's attribute, the LoRA by task), each held against the model."""
    if not hasattr(pipe, "load_lora_weights"):
        raise Unsupported(f"rmm_lora_bank: {type(pipe).__name__} loads no LoRA")
    imported("peft", "rmm_lora_bank: a LoRA")
    there = denoisers_of(pipe, find_family(type(pipe)))
    attribute = denoiser or next(iter(there))
    if attribute not in there:
        raise ConfigError(f"rmm_lora_bank: no denoiser {attribute!r}{nearest(attribute, there)} There are {', '.join(there)}")
    model = root_of(there[attribute])
    unfused_layers(model)
    read = {}
    for task, source in loras.items():
        if isinstance(source, (str, os.PathLike)):
            source = os.fspath(source)
        read[task] = read_lora(pipe, model, source, f"rmm_lora_bank: {task}")
    return attribute, read


def layers_of(model: nn.Module, attribute: str, loras: Mapping[str, Lora]) -> Factors:
    """The update of every LoRA at every layer that one of them has; scales are those that peft computes (alpha, rsLoRA, patterns)."""
    with init_empty_weights():
        skeleton: Any = type(model).from_config(model.config)  # type: ignore[attr-defined]
    found: dict[str, dict[str, Update]] = {}
    for task, lora in loras.items():
        name = f"task{len(skeleton.peft_config) if hasattr(skeleton, 'peft_config') else 0}"
        skeleton.load_lora_adapter(
            dict(lora.tensors), prefix=prefix_of(attribute), adapter_name=name, low_cpu_mem_usage=True, **lora.strength
        )
        for path, layer in skeleton.named_modules():
            if name not in getattr(layer, "lora_B", {}):
                continue
            if getattr(layer.get_base_layer(), "groups", 1) != 1:
                raise Unsupported(f"rmm_lora_bank: {task}: {path} is a convolution in groups, whose LoRA is no product of two matrices")
            B, A = (lora.tensors[f"{prefix_of(attribute)}.{path}.lora_{half}.weight"].cpu().double().flatten(1) for half in "BA")
            if not math.isfinite(layer.scaling[name]):
                raise ArtefactMismatch(f"rmm_lora_bank: {task}: the scale of {path} is {layer.scaling[name]}: no finite number")
            found.setdefault(path, {})[task] = Update(B * layer.scaling[name], A)
    return {path: [there.get(task) or nothing_like(next(iter(there.values()))) for task in loras] for path, there in sorted(found.items())}


def nothing_like(update: Update) -> Update:
    """An update of rank 0 of the same layer."""
    return Update(update.B[:, :0], update.A[:0])


def rounded(update: Update, dtype: torch.dtype) -> Update:
    """The update as it will be kept."""
    return Update(update.B.to(dtype).double(), update.A.to(dtype).double())


def root_layer(model: nn.Module, path: str) -> Any:
    """A layer, without the user's LoRA around it."""
    layer: Any = model.get_submodule(path)
    return getattr(layer, "base_layer", layer)


class Tally:
    """|| dW - dW' ||^2 and || dW ||^2 of each task, summed over layers."""

    def __init__(self, tasks: int) -> None:
        self.left, self.whole = [0.0] * tasks, [0.0] * tasks

    def add(self, norms: list[float], residuals: list[float]) -> None:
        self.left = [a + b * b for a, b in zip(self.left, residuals, strict=True)]
        self.whole = [a + b * b for a, b in zip(self.whole, norms, strict=True)]

    def shares(self) -> list[float]:
        """|| dW - dW' || / || dW || of each task; 0 of a LoRA that is nought."""
        return [math.sqrt(a / b) if b else 0.0 for a, b in zip(self.left, self.whole, strict=True)]
