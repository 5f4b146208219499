"""What the scheduler itself costs: process time of its steps beside that of the whole call, and of diffusers' own solvers.

python plugins/usf_s3/benchmarks/overhead.py            # 10 seconds
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch
import typer
from diffgraft import load_pipeline, unload
from diffgraft_usf_s3 import SolverScheduleScheduler
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

MIXED = [
    {"correct": {"order": 2}}, {"type": "eps", "order": 2, "correct": {"order": 3}}, {"order": 3, "correct": {"order": 4}},
    {"type": "eps", "order": 4, "correct": {"order": 5}}, {"order": 4, "correct": {"order": 5}}, {"order": 4}, {"order": 3}, {"order": 2},
]  # fmt: skip
"""A schedule as dear as can be: both kinds of values, high orders, a corrector nearly everywhere."""


def timed(scheduler: Any, x: torch.Tensor, n: int, repeats: int) -> float:
    """Milliseconds of a step, the best run; the run's plan is made in its first step."""
    best = float("inf")
    for _ in range(repeats):
        scheduler.set_timesteps(n)
        state, spent = x, 0.0
        for t in scheduler.timesteps:
            output = state * 0.1
            began = time.process_time()
            state = scheduler.step(output, t, state).prev_sample
            spent += time.process_time() - began
        best = min(best, spent)
    return 1000 * best / n


def main(pipeline: Annotated[str, typer.Option()] = "emoji-sd", batch: int = 8, repeats: int = 12) -> None:
    torch.set_num_threads(1)
    pipe = unload(load_pipeline(pipeline, plugins=[]))
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a big apple on the left on a blue background"] * batch
    n, call, own = len(MIXED), float("inf"), pipe.scheduler.config
    for _ in range(3):
        began = time.process_time()
        latents = pipe(prompts, num_inference_steps=n, output_type="latent").images
        call = min(call, time.process_time() - began)
    step = 1000 * call / n
    table = {"timesteps": [999 - 120 * k for k in range(n)], "end": 0, "steps": MIXED}
    arms = {
        "usf_s3, UniPC": SolverScheduleScheduler.from_config(own),
        "usf_s3, the dearest": SolverScheduleScheduler.from_config(own, solver_schedule=table),
        "diffusers UniPC": UniPCMultistepScheduler.from_config(own),
        "diffusers DPM++ 2M": DPMSolverMultistepScheduler.from_config(own),
    }
    print(f"{pipeline}, batch {batch}: {step:.1f} ms of a core for a step of the pipeline")
    for name, scheduler in arms.items():
        mine = timed(scheduler, torch.randn_like(latents), n, repeats)
        print(f"{name}: {mine:.3f} ms a step, {100 * mine / step:.2f} %")


if __name__ == "__main__":
    typer.run(main)
