"""One, two and four steps on emoji-wan: jumps with a fitted LoRA, the same jumps without it, plain runs, and 50 guided steps.

    python plugins/rcm/benchmarks/few_steps.py                                # what a LoRA has to beat: 2 minutes on one core
    python plugins/rcm/benchmarks/few_steps.py --lora FILE --out few-steps    # and one

``teacher`` is the checkpoint as it is called: 50 Euler steps, guidance 2, 100 forwards. ``plain, guided`` are fewer such steps, ``plain``
the same without guidance, ``jumps`` rCM's scheduler. Cases and columns are those of `diffgraft_checkpoints.train.wan_runs`.
Writes OUT.json and OUT.png.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffgraft_checkpoints.train.export import versions
from diffgraft_checkpoints.train.wan_runs import WanRuns, distances, sheet, told
from diffgraft_rcm import RCM
from rich.console import Console
from torch import Tensor


def main(
    lora: Annotated[str | None, typer.Option(help="a file of `diffgraft fit rcm`")] = None,
    steps: Annotated[str, typer.Option()] = "1,2,4",
    cases: Annotated[int, typer.Option(min=8, max=512)] = 32,
    controls: Annotated[bool, typer.Option(help="also the runs without a LoRA")] = True,
    table: Annotated[str, typer.Option(help="times of the jumps")] = "quality",
    out: Annotated[Path, typer.Option()] = Path("few-steps"),
) -> None:
    console = Console(markup=False, highlight=False, width=220)
    torch.set_num_threads(1)
    wan = WanRuns(cases)
    arms: list[tuple[str, list[Any], dict[str, Any]]] = [("teacher", [], {"num_inference_steps": 50})]
    for n in map(int, steps.split(",")):
        call = {"num_inference_steps": n}
        if controls:
            arms += [
                ("plain, guided", [], call),
                ("plain", [], {**call, "guidance_scale": 1.0}),
                ("jumps, no LoRA", [RCM(times=table)], call),
                ("jumps, guided", [RCM(times=table, guided=True)], {**call, "guidance_scale": 2.0}),
            ]
        arms += [("jumps", [RCM(times=table, lora=lora)], call)] if lora else []
    other = wan.other([], num_inference_steps=50)
    rows: list[dict[str, Any]] = []
    shown: dict[str, list[np.ndarray]] = {}
    teacher: Tensor | None = None
    for name, plugins, call in arms:
        made, forwards = wan.end(plugins, **call)
        teacher = made if teacher is None else teacher
        clips, steps_made = wan.clips(made), call["num_inference_steps"]
        row = {"run": name, "steps": steps_made, "forwards": forwards, **wan.judged(clips)}
        row |= distances(made, teacher, other, wan.many(plugins, **call))
        rows.append(row)
        shown[f"{name}\n{steps_made} steps\n{forwards} forwards"] = clips
        console.print(f"{name}, {steps_made} steps, {forwards} forwards | {told(row)}")
    facts = {"cases": cases, "lora": lora, "table": table, "versions": versions(), "rows": rows}
    out.with_suffix(".json").write_text(json.dumps(facts, indent=1))
    sheet(shown, out.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
