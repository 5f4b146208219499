"""Pictures of emoji-flux in four steps, with and without experts, against the teacher's 50: judge, diversity over seeds, Frechet distance.

    python plugins/phased_dmd/benchmarks/compare.py                                    # 48 prompts, two minutes of one core
    python plugins/phased_dmd/benchmarks/compare.py --prompts 160 one=one.safetensors two=first.safetensors,second.safetensors

Each NAME=FILE[,FILE...] is a run by these experts, with a boundary at every place where a phase of equally many steps ends.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffgraft import load_pipeline, unload
from diffgraft.methods.fitness import frechet
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.emoji.judge import load_bundled
from diffgraft_checkpoints.train import evaluate as measuring

SEEDS = 6
BATCH = 16


def draw(pipe: Any, prompts: list[str], first_seed: int, **settings: Any) -> list[Any]:
    images = []
    for start in range(0, len(prompts), BATCH):
        few = prompts[start : start + BATCH]
        generators = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(few))]
        images += pipe(few, generator=generators, **settings).images
    return images


def diversities(images: list[Any]) -> np.ndarray:
    """Mean pairwise distance of the seeds of each prompt."""
    return np.array([measuring.rms_distance(images[i : i + SEEDS]) for i in range(0, len(images), SEEDS)])


def interval(values: np.ndarray) -> list[float]:
    """95 % bootstrap interval of the mean."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(4000, len(values)))].mean(1)
    return [round(float(v), 1) for v in np.quantile(means, (0.025, 0.975))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("experts", nargs="*", metavar="NAME=FILE[,FILE]")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--diverse", type=int, default=16, help="prompts that are drawn with several seeds")
    parser.add_argument("--teacher", type=int, default=50, help="steps of the teacher; 0: leave it out")
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    labels = measuring.held_out_labels()
    prompts = [scenes.caption(each) for each in labels[: chosen.prompts]]
    several = [scenes.caption(each) for each in labels[: chosen.diverse] for _ in range(SEEDS)]
    judge = load_bundled()
    true = judge.features(measuring.renders(labels[: chosen.prompts], 1))
    plain = unload(load_pipeline("emoji-flux"))
    rows: dict[str, tuple[Any, dict[str, Any]]] = {}
    if chosen.teacher:
        rows[f"teacher, {chosen.teacher} steps, guidance 2"] = plain, {"num_inference_steps": chosen.teacher}
    rows["4 steps, guidance 2"] = plain, {"num_inference_steps": 4}
    rows["4 steps, no guidance"] = plain, {"num_inference_steps": 4, "true_cfg_scale": 1.0}
    table = [1.0, 0.9, 0.75, 0.5]  # emoji-flux's own of four steps
    for item in chosen.experts:
        name, _, files = item.partition("=")
        phases = files.split(",")
        knobs = {f"phase_{i + 1}": file for i, file in enumerate(phases)}
        boundaries = tuple(table[k * 4 // len(phases)] for k in range(1, len(phases)))
        pipe = load_pipeline("emoji-flux", plugins={"phased_dmd": {**knobs, "boundaries": boundaries, "sampler": chosen.sampler}})
        rows[name] = pipe, {}
    found: dict[str, Any] = {}
    for name, (pipe, settings) in rows.items():
        pipe.set_progress_bar_config(disable=True)
        images, seeds = draw(pipe, prompts, 0, **settings), draw(pipe, several, 1000, **settings)
        scores = measuring.tally(judge.score(images, prompts))
        spread = diversities(seeds)
        found[name] = {
            "scores": scores,
            "frechet": round(frechet(judge.features(images), true), 1),
            "diversity": [round(float(spread.mean()), 1), *interval(spread)],
        }
        shares = ", ".join(f"{field} {100 * row['share']:.1f}" for field, row in scores.items())
        low, high = scores["all four"]["wilson_95"]
        print(
            f"{name}: {shares} ({100 * low:.0f}-{100 * high:.0f}); Frechet {found[name]['frechet']}; diversity {found[name]['diversity']}",
            flush=True,
        )
        if chosen.out:
            chosen.out.mkdir(parents=True, exist_ok=True)
            slug = (
                name.split(",")[0].replace(" ", "-")
                if name not in ("4 steps, guidance 2", "4 steps, no guidance")
                else name.replace(", ", "-").replace(" ", "-")
            )
            measuring.grid(images[:32], prompts[:32]).save(chosen.out / f"{slug}.png")
            measuring.grid(seeds[: 4 * SEEDS], several[: 4 * SEEDS], SEEDS).save(chosen.out / f"{slug}-seeds.png")
    if chosen.out:
        (chosen.out / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
