"""A LoRA bank: reversible merging of N LoRA into p < N basis updates, any one of which is back in a run (Alipour, Amiri, arXiv 2510.14163).

The basis lies on the denoiser as one LoRA; a run lets each of its ranks count as much as the task at hand wants. Another task is another
row of coefficients: nothing is read, and no weight is written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from diffgraft import DenoiseCall, Effects, Need, Paper, Plugin, PluginConfig, Target
from diffgraft.methods.adapters import adapter_layers, ranked, showing, weighted
from pydantic import Field, StrictFloat, StrictInt, StrictStr, field_validator
from torch import Tensor, nn

from diffgraft_rmm_lora_bank.bank import Bank
from diffgraft_rmm_lora_bank.build import build_bank

__all__ = ["Bank", "RmmLoraBank", "build_bank"]
__version__ = "0.1.0"


class RmmLoraBankConfig(PluginConfig):
    """Knobs of :class:`RmmLoraBank`."""

    bank: Any = Field(
        None,
        description="a bank file, a Bank in memory, or a plain LoRA (a bank of one task); by denoiser where there are two; none: off",
    )
    task: StrictStr | StrictInt | dict[StrictStr, StrictInt | StrictFloat] | None = Field(
        None, description="i: which task, by name or number from 0, or a mix {name: weight}; none: the only one"
    )

    @field_validator("bank")
    @classmethod
    def _is_one(cls, value: Any) -> Any:
        if value is None or isinstance(value, (str, os.PathLike, Mapping, Bank)):
            return value
        raise ValueError(f"{type(value).__name__}: a file, a Bank, or a dict of them by denoiser")


@dataclass
class Shown:
    """Kept in one run: by denoiser, the slots that show the task's strengths."""

    slots: dict[str, Any] = field(default_factory=dict)


class RmmLoraBank(Plugin):
    name = "rmm_lora_bank"
    paper = Paper(
        title="Towards Reversible Model Merging For Low-rank Weights",
        arxiv="2510.14163",
        implemented="p basis updates and N x p coefficients a layer in place of N LoRA, in closed form; any task back in a run",
        omitted="the paper's own positions (rows of the factors) are in the benchmark alone; language models; merging baselines are peft's",
        licence="no official code was found; written from the abstract, a summary and own algebra",
    )
    families = ("sd", "sdxl", "sd3", "flux", "qwen_image", "wan", "ltx")
    Config = RmmLoraBankConfig
    State = Shown
    neutral: ClassVar[dict[str, Any]] = {"bank": None}
    effects = Effects(edits=frozenset({"weights"}))
    needs = (Need("adapter", "bank", holds=Bank),)
    config: RmmLoraBankConfig

    def check(self, target: Target) -> None:
        bank: Bank | None = target.given.get("bank")
        if bank is None:
            return
        bank.ensure_model(target.denoisers)
        for table in bank.tables.values():
            table.weights(self.config.task, "plugin 'rmm_lora_bank': task")

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        bank: Bank | None = call.given("bank")
        if bank is None or (table := bank.tables.get(call.model_name)) is None:
            call.note("inactive: no bank is given" if bank is None else f"the bank has nothing for the {call.model_name}")
            return next(call)  # type: ignore[no-any-return]
        slots = call.shared.slots
        if call.model_name not in slots:
            strengths = table.strengths(table.weights(self.config.task, "plugin 'rmm_lora_bank': task"))
            slots[call.model_name] = ranked(call.model, bank.name, strengths)
            call.note(f"{table.named(self.config.task)}; {table.told()}")
        with weighted(call.model, {**dict.fromkeys(own_adapters(call.model), 1.0), bank.name: 1.0}), showing(slots[call.model_name]):
            return next(call)  # type: ignore[no-any-return]


def own_adapters(model: nn.Module) -> list[str]:
    """The user's LoRA that are active on a denoiser; they go on beside the task."""
    layers = [layer for layer in adapter_layers(model) if not layer.disable_adapters]
    return sorted({name for layer in layers for name in layer.active_adapters})
