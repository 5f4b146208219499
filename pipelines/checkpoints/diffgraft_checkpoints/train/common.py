"""What every training stage shares: device and precision, resumable checkpoints, weight averages, a progress loop."""

from __future__ import annotations

import ctypes.util
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.models.attention_processor import Attention, AttnProcessor
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

console = Console()
SAVE_EVERY = 250
"""Steps between checkpoints."""
SAVE_SECONDS = 300
"""Seconds after which a checkpoint is written in any case."""
LOG_EVERY = 50
AVERAGE_EVERY = 5
"""Steps between updates of the averaged weights."""


def make_accelerator(device: str) -> Accelerator:
    """bf16 autocast on CPU and on CUDA; `device` is "auto", "cpu" or "cuda"."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device; use --device cpu")
    return Accelerator(mixed_precision="bf16", cpu=device == "cpu")


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step instead of giving it back to the system.

    Giving it back and faulting it in again took 44 % of the time of a training step on a CPU. No effect without glibc.
    """
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
    library = ctypes.util.find_library("c")
    mallopt = getattr(ctypes.CDLL(library), "mallopt", None) if library else None
    if mallopt is not None:
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_top_pad, 256 * 2**20)


def plain_attention(model: nn.Module) -> None:
    """Give every attention layer of `model` plain matrix products: the backward pass of PyTorch's own in bf16 is slow on a CPU."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())


def cosine(step: int, steps: int, warmup: int = 100) -> float:
    """Learning-rate factor: a linear warm-up, then a half cosine down to 1 % at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def trapezoid(step: int, steps: int, decay: int, warmup: int = 100) -> float:
    """Learning-rate factor: a linear warm-up, then constant, then falling linearly to 1 % over the last `decay` of `steps`."""
    return min((step + 1) / warmup, 1.0, max(0.01, (steps - step) / decay))


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step: the same after a resume as without one."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that an interruption leaves the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


class Averages:
    """Exponential moving averages of the weights of several modules (fp32); `decay` is per step."""

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.values = {n: {k: v.detach().clone() for k, v in m.state_dict().items()} for n, m in modules.items()}

    @torch.no_grad()
    def update(self, modules: dict[str, nn.Module], step: int) -> None:
        """Move towards the present weights; the first steps average over a shorter time."""
        if step % AVERAGE_EVERY:
            return
        decay = min(self.decay, (1 + step) / (10 + step)) ** AVERAGE_EVERY
        for name, module in modules.items():
            old, new = self.values[name], module.state_dict()
            floats = [key for key, value in new.items() if value.is_floating_point()]
            torch._foreach_lerp_([old[key] for key in floats], [new[key] for key in floats], 1 - decay)
            for key in new.keys() - set(floats):
                old[key].copy_(new[key])


@dataclass
class Stage:
    """One training loop: modules with a loss, trained by step count, resumable from `folder/<name>.pt`."""

    name: str
    folder: Path
    modules: dict[str, nn.Module]
    steps: int
    learning_rate: float
    accelerator: Accelerator
    ema: float = 0.998
    weight_decay: float = 0.01
    horizon: int = 0
    """Step at which the learning rate's cosine would end; 0: `steps`."""
    decay: int = 0
    """Steps at the end over which the learning rate falls, constant before; 0: a cosine over all steps.

    What is learned before the decay does not depend on `steps`, so a stage may be stopped anywhere and ended later, or go on longer.
    """

    def run(self, loss: Callable[[int], Tensor]) -> dict[str, dict[str, Tensor]]:
        """Train with `loss(step)` and return the averaged weights of each module; a finished stage returns at once."""
        path = self.folder / f"{self.name}.pt"
        for module in self.modules.values():
            module.to(self.accelerator.device).train()
        parameters = [p for m in self.modules.values() for p in m.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=self.weight_decay, fused=True)
        averages = Averages(self.modules, self.ema)
        step, seconds = 0, 0.0
        if path.exists():
            state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
            for name, module in self.modules.items():
                module.load_state_dict(state["modules"][name])
            optimizer.load_state_dict(state["optimizer"])
            averages.values, step, seconds = state["averages"], state["step"], state["seconds"]
            console.print(f"{self.name}: goes on at step {step} of {self.steps}")

        def save() -> None:
            state = {
                "modules": {n: m.state_dict() for n, m in self.modules.items()},
                "optimizer": optimizer.state_dict(),
                "averages": averages.values,
                "step": step,
                "seconds": seconds,
            }
            write_atomic(path, lambda p: torch.save(state, p))

        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        recent: list[float] = []
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task(self.name, total=self.steps, completed=step, note="")
            mark = saved = time.perf_counter()
            while step < self.steps:
                factor = trapezoid(step, self.steps, self.decay) if self.decay else cosine(step, self.horizon or self.steps)
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate * factor
                with self.accelerator.autocast():
                    value = loss(step)
                optimizer.zero_grad(set_to_none=True)
                self.accelerator.backward(value)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                averages.update(self.modules, step)
                recent.append(value.item())
                step += 1
                progress.advance(task)
                now = time.perf_counter()
                seconds, mark = seconds + now - mark, now
                if step % LOG_EVERY == 0 or step == self.steps:
                    note = f"loss {sum(recent) / len(recent):.4f}"
                    progress.update(task, note=note)
                    if not console.is_terminal:
                        console.print(f"{self.name} {step}/{self.steps} {note} {seconds:.0f} s", highlight=False)
                    recent.clear()
                if step % SAVE_EVERY == 0 or step == self.steps or now - saved > SAVE_SECONDS:
                    save()
                    saved = now
        note_seconds(self.folder, self.name, seconds, step)
        return averages.values


def note_seconds(folder: Path, stage: str, seconds: float, steps: int) -> None:
    """Keep how long a stage took, for the model card."""
    path = folder / "seconds.json"
    times = json.loads(path.read_text()) if path.exists() else {}
    times[stage] = {"seconds": round(seconds), "steps": steps}
    write_atomic(path, lambda p: p.write_text(json.dumps(times, indent=1)))
