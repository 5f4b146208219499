"""diffusers' caches by this plugin against the same ones by ``enable_cache``: time, memory, skips, and fidelity to the plain pipeline.

    python plugins/diffusers_cache/benchmarks/against_enable_cache.py                       # a short one on emoji-flux: about a minute
    python plugins/diffusers_cache/benchmarks/against_enable_cache.py --pipeline emoji-wan --samples 4 --rounds 2 --out wan.json
    python plugins/diffusers_cache/benchmarks/against_enable_cache.py --pipeline wide --samples 1 --rounds 5

Three pipelines of the same weights in one process: plain, with ``enable_cache``, with the plugin. They take turns, in an order that turns
with them; a ratio is of two calls that follow each other, and its median is over samples and rounds. Time is that of the process (one
thread), so that others on the machine do not count; whole calls, text encoder and VAE included. Memory: bytes of tensors made and alive at
the worst moment, counted at every operator, in a run of its own; and what is still held after the call. MagCache's ratios are measured on a
prompt that is not among the samples. The last lines are plain runs of fewer steps.
"""

from __future__ import annotations

import copy
import gc
import json
import platform
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
from diffgraft import DiffgraftError, load_pipeline, unload
from diffgraft.installed import registry
from diffgraft.lab.instruments import LiveBytes
from diffgraft.lab.metrics import psnr
from diffgraft.methods.inputs import as_array
from diffgraft_diffusers_cache.knobs import CONFIGS
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

SETTINGS: Mapping[str, list[dict[str, Any]]] = {
    "first_block": [{"threshold": 0.05}, {"threshold": 0.1}, {"threshold": 0.2}],
    "taylorseer": [{"cache_interval": n, "taylor_factors_dtype": "float32", "cache_identifiers": [".*attn[12]?"]} for n in (2, 3, 5)],
    "mag": [{"threshold": 0.06}, {"threshold": 0.12}, {"threshold": 0.24}],
    "sea": [{"threshold": 0.1}, {"threshold": 0.25}, {"threshold": 0.5}],
    "pab": [{"spatial_attention_block_skip_range": n} for n in (2, 3)],
}
WIDE = "wide"
"""A Flux of random weights, 512 wide, 2 double and 4 single blocks, 256 px: for time alone."""


def wide() -> tuple[Any, dict[str, Any]]:
    """(its pipeline, the arguments of its call)."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        num_layers=2, num_single_layers=4, num_attention_heads=4, pooled_projection_dim=768, joint_attention_dim=512
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = FluxPipeline(
        scheduler=scheduler,
        transformer=transformer.eval(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    embeds = {
        "prompt_embeds": torch.randn(1, 64, 512, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 768, generator=generator),
    }
    return pipe, {**embeds, "height": 256, "width": 256}


class Sides:
    """The three pipelines."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps = name, steps
        made = wide() if name == WIDE else None
        self.arguments = {} if made is None else made[1]
        self.pipes = {side: copy.deepcopy(made[0]) if made else load_pipeline(name) for side in ("plain", "theirs", "ours")}
        for pipe in self.pipes.values():
            pipe.set_progress_bar_config(disable=True)
        self.prompts = () if made else registry.bundled()[name].prompts
        self.ratios: list[float] = []

    def call(self, side: str, sample: int, steps: int | None = None) -> tuple[Any, float]:
        """(pictures, seconds of the process)."""
        start = time.process_time()
        out = self.run(self.pipes[side], sample, "np", steps)
        seconds = time.process_time() - start
        return (as_array(out, 1) if self.prompts else out[0].numpy()), seconds

    def run(self, pipe: Any, sample: int, output: str, steps: int | None = None) -> Any:
        """One call."""
        asked = {"prompt": self.prompts[sample % len(self.prompts)]} if self.prompts else {**self.arguments}
        generator = torch.Generator().manual_seed(1000 + sample)
        kind = output if self.prompts else "latent"
        return pipe(**asked, num_inference_steps=steps or self.steps, generator=generator, output_type=kind)

    def set(self, method: str, knobs: dict[str, Any]) -> None:
        """Put the same cache on both."""
        theirs, ours = self.pipes["theirs"], self.pipes["ours"]
        if method == "mag":
            knobs = {**knobs, "mag_ratios": self.measured()}
        options = dict(knobs)
        if "taylor_factors_dtype" in options:
            options["taylor_factors_dtype"] = getattr(torch, options["taylor_factors_dtype"])
        if method == "mag":
            options["num_inference_steps"] = self.steps
        if method == "pab":
            options["current_timestep_callback"] = lambda: theirs.current_timestep
        if theirs.transformer.is_cache_enabled:
            theirs.transformer.disable_cache()
        theirs.transformer.enable_cache(CONFIGS[method](**options))
        load_pipeline(unload(ours) or ours, {"diffusers_cache": {"method": method, **knobs}})

    def measured(self) -> list[float]:
        """MagCache's ratios, of one prompt that no sample has."""
        if not self.ratios:
            plain = wide()[0] if self.name == WIDE else self.name
            pipe = load_pipeline(plain, {"diffusers_cache": {"method": "mag", "mag_ratios": "measure"}})
            pipe.set_progress_bar_config(disable=True)
            self.run(pipe, len(self.prompts) - 1, "latent")
            self.ratios = pipe.plugins.report().plugins["diffusers_cache"].records["mag_ratios.cond"].tolist()
        return self.ratios

    def peak(self, side: str) -> tuple[int, int]:
        """(bytes of tensors at the worst moment of a call, bytes still there after it)."""
        pipe = self.pipes[side]
        gc.collect()
        modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        known = {t.untyped_storage()._cdata for module in modules for t in module.state_dict().values()}
        with LiveBytes(known) as live:
            out = self.run(pipe, 0, "latent")
            del out
            gc.collect()
        return live.peak, live.now


def main(
    pipeline: Annotated[str, typer.Option(help="a bundled checkpoint, or 'wide'")] = "emoji-flux",
    samples: Annotated[int, typer.Option(help="prompts and seeds")] = 2,
    rounds: Annotated[int, typer.Option(help="calls of each side and sample")] = 3,
    steps: Annotated[int, typer.Option(help="0: the checkpoint's own")] = 0,
    methods: Annotated[str, typer.Option(help="separated by commas")] = "first_block,taylorseer,mag,sea,pab",
    fewer: Annotated[str, typer.Option(help="plain runs of so many steps, as shares of the whole")] = "0.8,0.6,0.4",
    out: Annotated[Path | None, typer.Option(help="all numbers, as JSON")] = None,
) -> None:
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    sides = Sides(pipeline, steps or (12 if pipeline == WIDE else registry.bundled()[pipeline].steps))
    plain = [sides.call("plain", i)[0] for i in range(samples)]
    rows: list[dict[str, Any]] = []
    print(
        f"{pipeline}, {sides.steps} steps, {samples} samples, {rounds} rounds; {platform.processor()}, torch {torch.__version__}, ", end=""
    )
    print(f"diffusers {diffusers.__version__}")
    print("setting | dB to plain (worst) | steps skipped | plain/ours | ours/theirs (quartiles) | peak MiB theirs, ours | same picture")
    for method in methods.split(","):
        for knobs in SETTINGS[method]:
            try:
                sides.set(method, knobs)
            except DiffgraftError as error:
                print(f"{method}: refused: {str(error)[:150]}")
                break
            row = measure(sides, plain, samples, rounds)
            rows.append({"method": method, "knobs": knobs, **row})
            print(line(f"{method} {', '.join(f'{k}={v}' for k, v in list(knobs.items())[:1])}", row), flush=True)
    for share in fewer.split(",") if pipeline != WIDE else ():
        few = max(2, round(float(share) * sides.steps))
        times, values = [], []
        for i in range(samples):
            _, whole = sides.call("plain", i)
            picture, seconds = sides.call("plain", i, few)
            times.append(whole / seconds)
            values += psnr(picture, plain[i])
        rows.append({"method": "plain", "steps": few, "speed": statistics.median(times), "psnr": values})
        print(f"plain, {few} steps | {statistics.mean(values):.1f} ({min(values):.1f}) | | {statistics.median(times):.2f}", flush=True)
    if out is not None:
        out.write_text(
            json.dumps({"pipeline": pipeline, "steps": sides.steps, "samples": samples, "rounds": rounds, "rows": rows}, indent=1)
        )


def measure(sides: Sides, plain: list[Any], samples: int, rounds: int) -> dict[str, Any]:
    """One setting: every side on every sample, in turn."""
    values, ratios, speeds, same, skipped = [], [], [], True, 0.0
    for round_ in range(rounds):
        for i in range(samples):
            order = ["plain", "theirs", "ours"] if (round_ + i) % 2 == 0 else ["ours", "theirs", "plain"]
            found = {side: sides.call(side, i) for side in order}
            ratios.append(found["ours"][1] / found["theirs"][1])
            speeds.append(found["plain"][1] / found["ours"][1])
            if round_ == 0:
                values += psnr(found["ours"][0], plain[i])
                same &= bool((found["ours"][0] == found["theirs"][0]).all())
                report = sides.pipes["ours"].plugins.report().plugins["diffusers_cache"]
                skipped += report.total("steps skipped") / (report.total("steps skipped") + report.total("steps computed")) / samples
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    peaks = {side: sides.peak(side) for side in ("theirs", "ours")}
    return {"psnr": values, "skipped": skipped, "ratio": quartiles, "speed": statistics.median(speeds), "peak": peaks, "same": same}


def line(name: str, row: dict[str, Any]) -> str:
    low, middle, high = row["ratio"]
    theirs, ours = (row["peak"][side][0] / 2**20 for side in ("theirs", "ours"))
    return (
        f"{name} | {statistics.mean(row['psnr']):.1f} ({min(row['psnr']):.1f}) | {row['skipped']:.0%} | {row['speed']:.2f} | "
        f"{middle:.3f} ({low:.3f} to {high:.3f}) | {theirs:.2f}, {ours:.2f} | {'yes' if row['same'] else 'no'}"
    )


if __name__ == "__main__":
    typer.run(main)
