"""From a fitted LoRA to the folder `emoji-wan-4step`: weights in fp16, scheduler, figures, strips of clips, notices.

    python plugins/accvideo/benchmarks/checkpoint.py --lora student-4.safetensors --out emoji-wan-4step

About four minutes of a free core, most of it the teacher's clips. The model card is written by hand from `evaluation.json`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffgraft import load_pipeline, unload
from diffgraft_accvideo import AccVideo
from diffgraft_checkpoints.emoji.motion_judge import FIELDS
from diffgraft_checkpoints.train import export
from diffgraft_checkpoints.train.evaluate import tally
from diffgraft_checkpoints.train.wan_measure import strips
from diffgraft_checkpoints.train.wan_runs import WanRuns, distances
from safetensors.torch import load_file, save_file

STEPS = 4
SHOWN = 10
"""Clips of the picture."""


def wrong(scores: dict[str, list[bool | None]], count: int) -> dict[str, str]:
    """Case -> what the judge did not find right of it."""
    missed = [[name for name in FIELDS if not scores[name][i]] for i in range(count)]
    return {str(i): ", ".join(names) for i, names in enumerate(missed) if names}


def main(
    lora: Annotated[Path, typer.Option()],
    out: Annotated[Path, typer.Option()],
    cases: Annotated[int, typer.Option(min=SHOWN)] = 96,
) -> None:
    torch.set_num_threads(1)
    with export.replacing(out) as fresh:
        tensors = {name: value.half().contiguous() for name, value in load_file(lora).items()}
        save_file(tensors, fresh / "pytorch_lora_weights.safetensors", {"format": "pt"})
        unload(load_pipeline("emoji-wan")).scheduler.save_pretrained(fresh / "scheduler")
        few = {"num_inference_steps": STEPS, "guidance_scale": 1.0}
        arms: dict[str, tuple[bool, list[AccVideo], dict[str, Any]]] = {
            "as it loads": (True, [], few),
            "with accvideo's levels": (True, [AccVideo(steps=STEPS)], {}),
            "without the LoRA": (False, [], few),
            "without the LoRA, guidance 2": (False, [], {**few, "guidance_scale": 2.0}),
            "teacher": (False, [], {"num_inference_steps": 50, "guidance_scale": 2.0}),
        }
        wan, made, forwards, again = WanRuns(cases), {}, {}, {}
        for name, (adapted, plugins, call) in arms.items():
            wan.pipe.unload_lora_weights()
            if adapted:
                wan.pipe.load_lora_weights(fresh, weight_name="pytorch_lora_weights.safetensors", adapter_name="few")
            began = time.perf_counter()
            made[name], forwards[name] = wan.end(plugins, **call)
            again[name] = wan.many(plugins, **call)
            print(name, f"{time.perf_counter() - began:.0f} s", flush=True)
        other = wan.make(wan.texts[:64], 10_000, [], **arms["teacher"][2])[0]
        rows: dict[str, Any] = {}
        for name, latents in made.items():
            clips = wan.clips(latents)
            scores = wan.judge.score(clips, wan.texts)
            apart = distances(latents, made["teacher"], other, again[name])
            rows[name] = {
                "forwards": forwards[name],
                "scores": tally(scores),
                "scores of the first 32": tally({key: row[:32] for key, row in scores.items()}),
                "rms_to_teacher": apart["end"],
                "diversity": apart["diversity"],
                "frechet_to_teacher": apart["frechet"],
                "wrong": wrong(scores, cases),
            }
            if name == "as it loads":
                (fresh / "grids").mkdir()
                sheet = strips(clips[:SHOWN], wan.texts[:SHOWN])
                sheet.quantize(256).save(fresh / "grids" / "held-out.png", optimize=True)
        recipe = {
            "command": "diffgraft fit accvideo, see the card",
            "hardware": "2 shared CPU cores (x86_64), no GPU",
            "parameters": {"LoRA": sum(value.numel() for value in tensors.values())},
            "versions": export.versions(),
        }
        export.save_figures(fresh, {"recipe": recipe, "prompts": cases, "steps": STEPS, "guidance": 1.0, "runs": rows})


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    typer.run(main)
