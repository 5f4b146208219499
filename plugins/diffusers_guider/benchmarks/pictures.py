"""Guiders of diffusers on the bundled checkpoints, judged by emoji's judge, at a usual and at a high guidance scale.

    python plugins/diffusers_guider/benchmarks/pictures.py         # emoji-sd, 12 captions, 10 steps, scales 2 and 8: 2 minutes of a core
    python plugins/diffusers_guider/benchmarks/pictures.py --model emoji-flux --scales 2,6

Every arm draws the same held-out captions from the same seeds. "right": the judge finds all that the caption asks for, with Wilson's
95 % interval. "PSNR": mean, to the picture of plain guidance at the same scale. "saturation": mean of HSV's S. "clipped": share of channel
values at 0 or 255. "forwards": rows of denoiser work a step and sample. "time": to plain guidance's at the same scale, least of --repeats.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffgraft import load_pipeline
from diffgraft.lab.judging import all_right
from diffgraft.lab.metrics import psnr, share
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.emoji.judge import load_bundled
from diffgraft_checkpoints.train.evaluate import held_out_labels
from PIL import Image
from rich.console import Console
from rich.table import Table

LAYERS = {"emoji-sd": {"indices": [0], "fqn": "mid_block.attentions.0.transformer_blocks"}}
console = Console(width=140)


def arms(model: str) -> dict[str, dict[str, Any] | None]:
    """Name -> knobs; the guiders that perturb layers where diffusers can."""
    found: dict[str, dict[str, Any] | None] = {
        "plain": None,
        "APG (eta 0, threshold 5)": {
            "guider": "AdaptiveProjectedGuidance",
            "options": {"eta": 0.0, "adaptive_projected_guidance_rescale": 5.0, "adaptive_projected_guidance_momentum": -0.5},
        },
        "CFG-Zero* (no zero-init)": {"guider": "ClassifierFreeZeroStarGuidance", "options": {"zero_init_steps": 0}},
        "TCFG": {"guider": "TangentialClassifierFreeGuidance"},
        "MAMBO-G": {"guider": "MagnitudeAwareGuidance"},
        "CFG in steps 20 to 80 %": {"guider": "ClassifierFreeGuidance", "options": {"start": 0.2, "stop": 0.8}},
    }
    if model in LAYERS:
        found["PAG (mid block)"] = {
            "guider": "PerturbedAttentionGuidance",
            "options": {
                "perturbed_guidance_config": {**LAYERS[model], "skip_attention": False, "skip_attention_scores": True, "skip_ff": False},
                "perturbed_guidance_scale": 1.0,
                "perturbed_guidance_stop": 1.0,
            },
        }
    return found


def draw(pipe: Any, prompts: list[str], call: dict[str, Any]) -> list[Image.Image]:
    """One picture for each prompt, prompt i from seed i."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    return pipe(prompts, generator=generators, **call).images  # type: ignore[no-any-return]


def main(
    model: Annotated[str, typer.Option(help="emoji-sd or emoji-flux.")] = "emoji-sd",
    captions: Annotated[int, typer.Option(help="Held-out captions.")] = 12,
    steps: Annotated[int, typer.Option(help="Steps.")] = 10,
    scales: Annotated[str, typer.Option(help="Guidance scales, with commas.")] = "2,8",
    repeats: Annotated[int, typer.Option(help="How often each arm is timed.")] = 1,
) -> None:
    """Judge every arm at every scale."""
    pipe, judge = load_pipeline(model), load_bundled()
    pipe.set_progress_bar_config(disable=True)
    prompts = [scenes.caption(each) for each in held_out_labels()[:captions]]
    for scale in map(float, scales.split(",")):
        call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": scale}
        if model == "emoji-flux":
            call = {"num_inference_steps": steps, "true_cfg_scale": scale, "negative_prompt": [""] * captions}
            call |= {"height": 64, "width": 64, "max_sequence_length": 20}
        table = Table("arm", "right", "PSNR", "saturation", "clipped", "forwards", "time", title=f"{model}, scale {scale:g}, {steps} steps")
        plain: Any = None
        first = 0.0
        for name, knobs in arms(model).items():
            if knobs is not None:
                load_pipeline(pipe, plugins={"diffusers_guider": knobs})
            try:
                seconds = []
                for _ in range(repeats):
                    start = time.perf_counter()
                    images = draw(pipe, prompts, call)
                    seconds.append(time.perf_counter() - start)
                asked = pipe.plugins.report().forwards if knobs is not None else {}
            finally:
                if knobs is not None:
                    pipe.plugins.clear()
            first = first or min(seconds)
            rows = sum(n * (2 if branch == "both" else 1) for branch, n in asked.items()) / steps if asked else 2.0
            pixels = np.stack([np.asarray(image) for image in images])
            plain = pixels / 255 if plain is None else plain
            saturation = np.stack([np.asarray(image.convert("HSV"))[..., 1] for image in images]).mean() / 255
            clipped = ((pixels == 0) | (pixels == 255)).mean()
            like = "" if knobs is None else f"{np.mean(psnr(pixels / 255, plain)):.1f}"
            table.add_row(
                name, str(share(all_right(judge.score(images, prompts)))), like, f"{saturation:.3f}", f"{clipped:.3f}", f"{rows:.2f}",
                f"{min(seconds) / first:.2f}",
            )  # fmt: skip
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
