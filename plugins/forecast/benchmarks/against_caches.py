"""Forecasts against other caches and against fewer steps: how near to the plain picture, in which time.

    python plugins/forecast/benchmarks/against_caches.py                                   # emoji-flux, 4 prompts: about a minute
    python plugins/forecast/benchmarks/against_caches.py --pipeline emoji-wan --samples 12 --out wan.csv
    python plugins/forecast/benchmarks/against_caches.py --pipeline wide-flux     # random weights in the layout of Flux; wide-wan: of Wan

Each row is the plain pipeline's call with one thing changed. Time is that of the process (one thread), whole calls with text encoder and
VAE; every row's call is made right behind a plain one of the same prompt and seed, and a row's speed is the median of the ratios. dB: PSNR
to the plain picture; of the random weights to the plain latents, whose range is the peak. NFE: denoiser forwards of the last sample.
"""

from __future__ import annotations

import csv
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
from diffgraft import DiffgraftError, load_pipeline, unload
from diffgraft.installed import registry
from diffgraft.lab.metrics import psnr
from diffgraft.methods.inputs import as_array
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel, WanPipeline, WanTransformer3DModel

ROWS: list[tuple[str, dict[str, Any], float]] = [
    *((f"plain, {share:.0%} of the steps", {}, share) for share in (0.8, 0.6, 0.5, 0.4, 0.3)),
    *((f"forecast {tol:g}, order {n}", {"forecast": {"tolerance": tol, "order": n}}, 1) for n in (1, 2) for tol in (0.02, 0.05, 0.1, 0.2)),
    *((f"first_block {t:g}", {"diffusers_cache": {"method": "first_block", "threshold": t}}, 1) for t in (0.05, 0.1, 0.2)),
    *((f"mag {t:g}", {"diffusers_cache": {"method": "mag", "threshold": t}}, 1) for t in (0.06, 0.12)),
    *((f"sea {t:g}", {"diffusers_cache": {"method": "sea", "threshold": t}}, 1) for t in (0.1, 0.25, 0.5)),
    *((f"deepcache {n}", {"deepcache": {"interval": n}}, 1) for n in (2, 3, 5)),
]
WIDTH, TOKENS, STEPS = 512, 64, 50


def wide_flux() -> tuple[Any, dict[str, Any]]:
    """(A Flux of random weights, 2 double and 4 single blocks; the arguments of its call)."""
    transformer = FluxTransformer2DModel(
        num_layers=2, num_single_layers=4, num_attention_heads=WIDTH // 128, pooled_projection_dim=768, joint_attention_dim=WIDTH
    )
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=transformer.eval(), **parts)
    pooled = torch.randn(1, 768)
    return pipe, {"prompt_embeds": torch.randn(1, TOKENS, WIDTH), "pooled_prompt_embeds": pooled, "height": 256, "width": 256}


def wide_wan() -> tuple[Any, dict[str, Any]]:
    """(A Wan of random weights, 6 blocks; the arguments of its call, guidance on)."""
    transformer = WanTransformer3DModel(
        num_attention_heads=WIDTH // 128, attention_head_dim=128, text_dim=WIDTH, freq_dim=256, ffn_dim=4 * WIDTH, num_layers=6
    )
    pipe = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(shift=3.0), transformer.eval())
    said, unsaid = torch.randn(2, 1, TOKENS, WIDTH).unbind()
    return pipe, {"prompt_embeds": said, "negative_prompt_embeds": unsaid, "height": 128, "width": 128, "num_frames": 9}


WIDE = {"wide-flux": wide_flux, "wide-wan": wide_wan}
"""Layouts with random weights: the caches' own tests of speed use such, and no training has made their paths straight."""


class Subject:
    """What a row's calls are made on: a bundled checkpoint, or random weights."""

    def __init__(self, name: str, scheduler: str) -> None:
        self.name, self.scheduler = name, scheduler
        self.steps, self.prompts = STEPS, ()
        if name not in WIDE:
            bundled = registry.bundled()[name]
            self.steps, self.prompts = bundled.steps, bundled.prompts
        self.arguments: dict[str, Any] = {}

    def pipeline(self) -> Any:
        """It, without plugins."""
        torch.manual_seed(0)
        if self.name in WIDE:
            pipe, self.arguments = WIDE[self.name]()
        else:
            pipe = load_pipeline(self.name)
        pipe.set_progress_bar_config(disable=True)
        if self.scheduler:
            pipe.scheduler = getattr(diffusers, self.scheduler).from_config(pipe.scheduler.config)
        return pipe

    def call(self, pipe: Any, sample: int, share: float = 1.0) -> tuple[Any, float]:
        """(pictures, or latents, of one call; seconds of the process)."""
        asked = {"prompt": self.prompts[sample % len(self.prompts)]} if self.prompts else dict(self.arguments)
        start = time.process_time()
        made = pipe(
            **asked,
            num_inference_steps=max(2, round(share * self.steps)),
            generator=torch.Generator().manual_seed(1000 + sample),
            output_type="latent" if self.name in WIDE else "np",
        )
        seconds = time.process_time() - start
        return (made[0].numpy() if self.name in WIDE else as_array(made, 1)), seconds

    def decibels(self, found: Any, wanted: Any) -> list[float]:
        """PSNR of one to the other."""
        if self.name in WIDE:
            low, high = wanted.min(), wanted.max()
            found, wanted = ((x.reshape(1, 1, -1, 1) - low) / (high - low) for x in (found, wanted))
        return psnr(found, wanted)


def main(
    pipeline: Annotated[str, typer.Option(help="a bundled checkpoint, wide-flux or wide-wan")] = "emoji-flux",
    samples: Annotated[int, typer.Option(help="prompts and seeds")] = 4,
    scheduler: Annotated[str, typer.Option(help="a class of diffusers in place of its own")] = "",
    rows: Annotated[str, typer.Option(help="only rows that begin like one of these, separated by commas")] = "",
    out: Annotated[Path | None, typer.Option(help="all numbers, as CSV")] = None,
) -> None:
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    subject = Subject(pipeline, scheduler)
    plain, other = subject.pipeline(), subject.pipeline()
    ratios: list[float] | None = None

    def settings(plugins: dict[str, Any]) -> dict[str, Any]:
        """MagCache's ratios are measured on a prompt that no sample has."""
        nonlocal ratios
        if plugins.get("diffusers_cache", {}).get("method") != "mag":
            return plugins
        if ratios is None:
            pipe = load_pipeline(subject.pipeline(), {"diffusers_cache": {"method": "mag", "mag_ratios": "measure"}})
            subject.call(pipe, samples)
            ratios = pipe.plugins.report().plugins["diffusers_cache"].records["mag_ratios.cond"].tolist()
        return {"diffusers_cache": {**plugins["diffusers_cache"], "mag_ratios": ratios}}

    print(f"{pipeline}, {subject.steps} steps, {samples} samples; torch {torch.__version__}, diffusers {diffusers.__version__}")
    print(f"{'':28} dB mean (worst)   speed   NFE")
    table: list[dict[str, Any]] = []
    for name, plugins, share in ROWS:
        if rows and not name.startswith(tuple(rows.split(","))):
            continue
        try:
            load_pipeline(unload(other) or other, settings(plugins))
        except DiffgraftError as error:
            print(f"{name:28} refused: {str(error)[:90]}")
            continue
        values, speeds = [], []
        for i in range(samples):
            (wanted, whole), (found, seconds) = subject.call(plain, i), subject.call(other, i, share)
            values += subject.decibels(found, wanted)
            speeds.append(whole / seconds)
        nfe = sum(other.plugins.report().forwards.values()) if plugins else "-"
        table.append({"row": name, "dB": statistics.mean(values), "worst": min(values), "speed": statistics.median(speeds), "nfe": nfe})
        print(f"{name:28} {statistics.mean(values):6.1f} ({min(values):5.1f})   {statistics.median(speeds):5.2f}   {nfe}", flush=True)
    if out is not None:
        with out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    typer.run(main)
