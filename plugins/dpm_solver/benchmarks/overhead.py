"""What the solver itself costs: time of one scheduler step beside one denoiser call, on the CPU.

    python plugins/dpm_solver/benchmarks/overhead.py                 # emoji-sd: about 20 seconds of a quiet core

Prints medians over the steps of one run each: the pipeline's own scheduler, DPM-Solver with planned and with adaptive steps (guided, batch
of --pictures). The plugin's share is the time of its ``scheduler.step`` (and, adaptive, of the times that it tells) over that of the
denoiser's forward.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated, Any

import torch
import typer
from diffgraft import load_pipeline, unload
from diffgraft_dpm_solver import DPMSolverScheduler


def main(
    pipeline: Annotated[str, typer.Option()] = "emoji-sd",
    pictures: Annotated[int, typer.Option(min=1)] = 1,
    steps: Annotated[int, typer.Option(min=6)] = 30,
) -> None:
    torch.set_num_threads(1)
    pipe = unload(load_pipeline(pipeline, plugins=[]))
    pipe.set_progress_bar_config(disable=True)
    unet, own = pipe.unet, pipe.scheduler
    arms: dict[str, Any] = {"own scheduler": own}
    for name, knobs in {"order 3": {}, "order 3, adaptive": {"mode": "adaptive", "together": False}}.items():
        arms[name] = DPMSolverScheduler.from_config(own.config, solver_order=3, **knobs)
    text = pipe.encode_prompt("a big car", "cpu", pictures, True)
    states = torch.cat([text[1], text[0]])
    for name, scheduler in arms.items():
        scheduler.set_timesteps(steps)
        x = torch.randn(pictures, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        asked, stepped = [], []
        with torch.no_grad():
            for t in scheduler.timesteps:
                begin = time.perf_counter()
                out = unet(torch.cat([x, x]), t, encoder_hidden_states=states).sample
                middle = time.perf_counter()
                if hasattr(scheduler, "times"):
                    scheduler.times()
                x = scheduler.step(out.chunk(2)[1], t, x).prev_sample
                asked.append(middle - begin)
                stepped.append(time.perf_counter() - middle)
        ask, step = statistics.median(asked), statistics.median(stepped)
        print(f"{name:20s} denoiser {1e3 * ask:7.2f} ms   step {1e3 * step:6.3f} ms   share {100 * step / ask:5.2f} %")


if __name__ == "__main__":
    typer.run(main)
