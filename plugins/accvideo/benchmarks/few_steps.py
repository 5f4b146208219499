"""Few steps on emoji-wan: a fitted LoRA on its levels, against the same levels without it, plain runs, and the teacher's 50 steps.

    python plugins/accvideo/benchmarks/few_steps.py                                     # what a LoRA has to beat: 4 minutes of a free core
    python plugins/accvideo/benchmarks/few_steps.py --steps 4 --cases 8 --judged 8      # the same in half a minute
    python plugins/accvideo/benchmarks/few_steps.py --lora 4=FILE --lora 5=FILE --out few

The teacher has the checkpoint's own guidance, as have the runs called ``guided``, which cost two forwards a step; all others have none.
Cases and columns are those of `diffgraft_checkpoints.train.wan_runs`; the judge sees the first ``--judged`` cases.
Writes OUT.json and OUT.png; rows that are in OUT.json already are not measured again.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffgraft_accvideo import AccVideo
from diffgraft_checkpoints.emoji import motion
from diffgraft_checkpoints.train.export import versions
from diffgraft_checkpoints.train.wan_runs import COLUMNS, WanRuns, distances, sheet, told
from rich.console import Console
from safetensors.torch import load_file, save_file


def main(
    lora: Annotated[list[str] | None, typer.Option(help="N=FILE, for as many N as there are")] = None,
    steps: Annotated[str, typer.Option(help="N of the runs")] = "4,5,10",
    cases: Annotated[int, typer.Option(min=8, max=512)] = 64,
    judged: Annotated[int, typer.Option(min=1, help="cases that are decoded and judged")] = 32,
    teacher: Annotated[Path | None, typer.Option(help="file of the teacher's latents: written, or read where it is there")] = None,
    out: Annotated[Path, typer.Option()] = Path("few-steps"),
    captions: Annotated[Path | None, typer.Option(help="write the captions to collect trajectories of, and end")] = None,
) -> None:
    if captions is not None:
        training = list(motion.split()[0])
        random.Random(0).shuffle(training)
        captions.write_text("".join(f"{motion.caption(each)}\n" for each in training[:113]))
        return
    console = Console(markup=False, highlight=False, width=200)
    torch.set_num_threads(1)
    loras = {int(n): path for n, _, path in (each.partition("=") for each in lora or [])}
    wan = WanRuns(cases)
    fifty: dict[str, Any] = {"plugins": [], "num_inference_steps": 50}
    arms: list[tuple[str, int, dict[str, Any]]] = [("teacher", 50, fifty)]
    for n in map(int, steps.split(",")):
        arms += [
            ("plain, guided", n, {"plugins": [], "num_inference_steps": n}),
            ("plain", n, {"plugins": [], "num_inference_steps": n, "guidance_scale": 1.0}),
            ("levels, guided", n, {"plugins": [AccVideo(steps=n, guidance="keep")]}),
            ("levels", n, {"plugins": [AccVideo(steps=n)]}),
        ]
        if n in loras:
            arms.append(("AccVideo", n, {"plugins": [AccVideo(steps=n, lora=loras[n])]}))
    if teacher is not None and teacher.exists():
        kept = load_file(teacher)
    else:
        kept = {"end": wan.end(**fifty)[0], "other": wan.other(**fifty), "many": wan.many(**fifty)}
        if teacher is not None:
            save_file(kept, teacher)
    rows: list[dict[str, Any]] = []
    shown: dict[str, list[np.ndarray]] = {}
    page = out.with_suffix(".json")
    before = json.loads(page.read_text()) if page.exists() else {}
    done = before.get("rows", []) if (before.get("cases"), before.get("judged")) == (cases, judged) else []
    for name, n, arm in arms:
        what = {"run": name, "steps": n, "lora": loras.get(n) if name == "AccVideo" else None}
        row = next((each for each in done if each.items() >= what.items()), None)
        texts = wan.texts[: COLUMNS if row else cases]
        made, forwards = (kept["end"][: len(texts)], 100) if name == "teacher" else wan.make(texts, 0, **arm)
        clips = wan.clips(made[: COLUMNS if row else judged])
        if row is None:
            many = kept["many"] if name == "teacher" else wan.many(**arm)
            row = {**what, "forwards": forwards, **distances(made, kept["end"], kept["other"], many), **wan.judged(clips)}
        shown[f"{name}\n{n} steps\n{forwards} forwards"] = clips
        rows.append(row)
        console.print(f"{name}, {n} steps, {forwards} forwards | {told(row)}")
        others = [each for each in done if each not in rows]
        page.write_text(json.dumps({"cases": cases, "judged": judged, "versions": versions(), "rows": rows + others}, indent=1))
    sheet(shown, out.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
