"""DeepCache on a random U-Net of Stable Diffusion 1.5's configuration: ours against the baseline, the counted MACs and the PyPI package.

    python plugins/deepcache/benchmarks/against_package.py                                        # CPU, 256 px
    python plugins/deepcache/benchmarks/against_package.py --device cuda --dtype float16 --size 64 --steps 50 --rounds 10 [--compile]

Only denoising is run (prompt embeddings go in, latents come out), with guidance, so in batches of 2, on a real StableDiffusionPipeline that
went through ``load_pipeline``. Time: the sides take turns in one process; medians over the rounds, speed-ups within a round. MACs: torch's
flop counter on one whole and one skip step; the MAC limit is the speed-up if time followed them. Memory: bytes of tensors alive beside
the weights at the worst moment, counted at every operator by a dispatch mode (on CUDA also by the allocator), in a run of its own.
"""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffgraft import load_pipeline
from diffgraft.lab.instruments import LiveBytes
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode


def make_pipeline(device: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    """SD 1.5 without text encoder and VAE, random weights."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval().requires_grad_(False)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet.to(device, dtype),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Sides:
    """Baseline, ours and the package on one pipeline; each is put on for its turn and taken off again."""

    def __init__(self, pipe: Any, interval: int, branch: int, steps: int, size: int, package: bool) -> None:
        self.pipe, self.interval, self.branch = pipe, interval, branch
        self.names = ["baseline", "diffgraft", *(["DeepCache package"] if package else [])]
        unet = pipe.unet
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(unet.device, unet.dtype)

        self.kwargs = {
            "prompt_embeds": noise(1, 77, 768),
            "negative_prompt_embeds": noise(1, 77, 768),
            "latents": noise(1, 4, size, size),
            "num_inference_steps": steps,
            "height": 8 * size,
            "width": 8 * size,
            "output_type": "latent",
        }
        load_pipeline(pipe, plugins=[("deepcache", {"interval": interval, "branch": branch})]).plugins.disable()

    @contextlib.contextmanager
    def on(self, side: str) -> Iterator[None]:
        if side == "diffgraft":
            self.pipe.plugins.enable()
            try:
                yield
            finally:
                self.pipe.plugins.disable()
        elif side == "DeepCache package":
            from DeepCache import DeepCacheSDHelper

            helper = DeepCacheSDHelper(pipe=self.pipe)
            helper.set_params(cache_interval=self.interval, cache_branch_id=self.branch)
            helper.enable()
            try:
                yield
            finally:
                helper.disable()
        else:
            yield

    def run(self, **kwargs: Any) -> torch.Tensor:
        return self.pipe(**{**self.kwargs, **kwargs}).images  # type: ignore[no-any-return]

    def seconds(self, side: str) -> float:
        with self.on(side):
            wait(self.pipe.device)
            start = time.perf_counter()
            self.run()
            wait(self.pipe.device)
            return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(sides: Sides, side: str) -> tuple[int, int | None]:
    """(bytes of tensors made and alive at the worst moment, the CUDA allocator's peak above the weights)."""
    known = {t.untyped_storage()._cdata for t in (*sides.pipe.unet.parameters(), *sides.kwargs.values()) if isinstance(t, torch.Tensor)}
    steps = {"num_inference_steps": sides.interval + 1}  # a whole step on top of a filled cache
    with sides.on(side):
        gc.collect()
        with LiveBytes(known) as counter:
            sides.run(**steps)
        allocated = None
        if sides.pipe.device.type == "cuda":
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            sides.run(**steps)
            allocated = torch.cuda.max_memory_allocated() - before
    return counter.peak, allocated


def macs(sides: Sides, side: str, steps: int) -> int:
    with sides.on(side), FlopCounterMode(display=False) as counter:
        sides.run(num_inference_steps=steps)
    return counter.get_total_flops() // 2


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; in each, every side runs once.")] = 5,
    steps: Annotated[int, typer.Option(min=2, help="Denoising steps of a run.")] = 12,
    interval: Annotated[int, typer.Option(min=2)] = 3,
    branch: Annotated[int, typer.Option(min=0, max=11)] = 0,
    size: Annotated[int, typer.Option(help="Side of the latents; 32 is 256 px.")] = 32,
    device: Annotated[str, typer.Option()] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the U-Net (all sides).")] = False,
    package: Annotated[bool, typer.Option(help="Compare with DeepCache==0.1.1.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the figures there as JSON.")] = None,
) -> None:
    """Time, MACs and memory of DeepCache on SD 1.5's U-Net."""
    console = Console()
    pipe = make_pipeline(device, getattr(torch, dtype))
    sides = Sides(pipe, interval, branch, steps, size, package)
    with console.status("counting MACs and memory"):
        whole = macs(sides, "diffgraft", 1)
        skip = macs(sides, "diffgraft", 2) - whole
        keys = len(range(0, steps, interval))
        limit = steps * whole / (keys * whole + (steps - keys) * skip)
        memory = {side: peak_bytes(sides, side) for side in sides.names}
    answers = {}
    for side in sides.names:
        with sides.on(side):
            answers[side] = sides.run()
    if compile:
        torch._dynamo.config.recompile_limit = 64  # three sides, whole and skip steps
        pipe.unet.compile()
    times: dict[str, list[float]] = {side: [] for side in sides.names}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("rounds", total=(rounds + 1) * len(sides.names))
        for number in range(rounds + 1):  # the first warms up
            order = sides.names[number % len(sides.names) :] + sides.names[: number % len(sides.names)]
            for side in order:
                seconds = sides.seconds(side)
                if number:
                    times[side].append(seconds)
                progress.advance(task)
    medians = {side: statistics.median(seconds) for side, seconds in times.items()}
    result = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else f"cpu, {torch.get_num_threads()} threads",
        "dtype": dtype,
        "compile": compile,
        "latents": size,
        "steps": steps,
        "interval": interval,
        "branch": branch,
        "rounds": rounds,
        "gmacs_whole_step": whole / 1e9,
        "gmacs_skip_step": skip / 1e9,
        "mac_limit": limit,
        "max_abs_difference_to_package": float((answers["diffgraft"] - answers[sides.names[-1]]).abs().max()) if package else None,
        "sides": {},
    }
    where = f"{result['device']}, {dtype}{', compiled' if compile else ''}"
    table = Table(title=f"{where}: {steps} steps at {8 * size} px, interval {interval}, branch {branch}")
    columns = ["side", "median s", "min..max s", "speed-up", "share of MAC limit", "peak MiB"]
    for column in [*columns, *(["CUDA peak MiB"] if device.startswith("cuda") else [])]:
        table.add_column(column, justify="left" if column == "side" else "right")
    for side in sides.names:
        speed_up = statistics.median(b / s for b, s in zip(times["baseline"], times[side], strict=True))
        live, allocated = memory[side]
        figures = {
            "seconds": times[side],
            "median": medians[side],
            "speed_up": speed_up,
            "share_of_mac_limit": None if side == "baseline" else speed_up / limit,
            "peak_tensor_bytes": live,
            "peak_cuda_bytes": allocated,
        }
        result["sides"][side] = figures
        share = "" if side == "baseline" else f"{speed_up / limit:.1%}"
        spread = f"{min(times[side]):.2f}..{max(times[side]):.2f}"
        cells = [side, f"{medians[side]:.3f}", spread, f"{speed_up:.2f}x", share, f"{live / 2**20:.1f}"]
        table.add_row(*cells, *([f"{allocated / 2**20:.1f}"] if allocated is not None else []))
    console.print(table)
    console.print(f"MACs: {whole / 1e9:.1f} G a whole step, {skip / 1e9:.1f} G a skip step: limit {limit:.2f}x")
    if package:
        console.print(f"largest difference to the package: {result['max_abs_difference_to_package']:.1e}")
    if out is not None:
        out.write_text(json.dumps(result, indent=1))
        console.print(f"figures: {out}")


if __name__ == "__main__":
    typer.run(main)
