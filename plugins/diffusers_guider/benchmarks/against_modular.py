"""Time and memory against diffusers' own modular pipeline with the same guider: emoji-wan, the same parts, prompts and noise.

    python plugins/diffusers_guider/benchmarks/against_modular.py               # 9 frames, 16 steps, 5 pairs of runs: 1 minute of a core

Runs take turns, ours and theirs, in seconds of the CPU, so that a busy machine counts for little; "ratio" is the median of ours / theirs
in a turn. "peak": the most that torch held in tensors above what it held before, in MiB, counted by its profiler's memory events. "worst":
the largest difference of the two videos (0 to 1).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import diffusers
import torch
import typer
from diffgraft import load_pipeline
from diffusers.modular_pipelines.wan import WanBlocks
from rich.console import Console
from rich.table import Table

GUIDERS: dict[str, dict[str, Any]] = {
    "ClassifierFreeGuidance": {},
    "AdaptiveProjectedGuidance": {"eta": 0.0, "adaptive_projected_guidance_momentum": -0.5},
    "TangentialClassifierFreeGuidance": {},
    "SkipLayerGuidance": {"skip_layer_config": {"indices": [1], "fqn": "blocks"}, "skip_layer_guidance_stop": 1.0},
}


def peak(run: Callable[[], Any]) -> float:
    """MiB above the start: running sum of the profiler's allocations."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20


def main(
    steps: Annotated[int, typer.Option(help="Steps.")] = 16,
    turns: Annotated[int, typer.Option(help="Pairs of runs.")] = 5,
) -> None:
    """One row a guider."""
    pipe = load_pipeline("emoji-wan")
    theirs = WanBlocks().init_pipeline()
    theirs.update_components(**{k: v for k, v in pipe.components.items() if v is not None and k in theirs._component_specs})
    for one in (pipe, theirs):
        one.set_progress_bar_config(disable=True)
    side = 64
    theirs_side = side * theirs.vae_scale_factor_spatial // pipe.vae_scale_factor_spatial  # it takes the VAE's scale to be another
    call = {
        "prompt": "a big donut on the left on a red background",
        "negative_prompt": "",
        "num_inference_steps": steps,
        "output_type": "np",
    }
    call |= {"num_frames": 9, "height": side, "width": side, "max_sequence_length": 20}
    table = Table("guider", "ours s", "theirs s", "ratio", "peak ours", "peak theirs", "worst")
    for name, options in GUIDERS.items():
        options = {**options, "guidance_scale": 3.0}

        def mine() -> Any:
            return pipe(**call, guidance_scale=3.0, generator=torch.Generator().manual_seed(0)).frames

        def modular() -> Any:
            size = {"height": theirs_side, "width": theirs_side}
            return theirs(**call | size, generator=torch.Generator().manual_seed(0), output="videos")

        theirs.update_components(guider=getattr(diffusers.guiders, name)(**options))
        load_pipeline(pipe, plugins={"diffusers_guider": {"guider": name, "options": options}})
        found, expected = torch.as_tensor(mine()), torch.as_tensor(modular())
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for turn in range(turns):
            for who, run in (("ours", mine), ("theirs", modular))[:: 1 if turn % 2 else -1]:
                start = time.process_time()
                run()
                seconds[who].append(time.process_time() - start)
        ratio = statistics.median(a / b for a, b in zip(seconds["ours"], seconds["theirs"], strict=True))
        ours, own = peak(mine), peak(modular)
        worst = float((found.reshape(expected.shape) - expected).abs().max())
        row = (min(seconds["ours"]), min(seconds["theirs"]), ratio)
        table.add_row(name, *(f"{value:.3f}" for value in row), f"{ours:.1f}", f"{own:.1f}", f"{worst:.1e}")
        pipe.plugins.clear()
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
