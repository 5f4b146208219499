"""Pictures with captions for `diffgraft fit`: what emoji-sd was trained on, none of its held-out combinations.

    python plugins/one_more_step/benchmarks/pictures.py --out pictures --number 4000

Writes OUT/00000.png ... and OUT/metadata.jsonl; a fifth shows two objects. Needs the font NotoColorEmoji.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from diffgraft_checkpoints.emoji import scenes


def main(out: Annotated[Path, typer.Option()], number: Annotated[int, typer.Option(min=1)] = 4000) -> None:
    out.mkdir(parents=True, exist_ok=True)
    training, _ = scenes.split()
    lines = []
    for i in range(number):
        rng = np.random.default_rng([0, i])
        if i % 5 == 4:
            pair = scenes.draw_pair(rng, held_out=False)
            drawn, text = scenes.sample_pair(pair, rng), scenes.pair_caption(pair, rng)
        else:
            labels = training[int(rng.integers(len(training)))]
            drawn, text = (scenes.sample_scene(labels, rng),), scenes.caption(labels, rng)
        scenes.render(*map(scenes.upright, drawn)).save(out / f"{i:05}.png")
        lines.append(json.dumps({"file_name": f"{i:05}.png", "text": text}) + "\n")
    (out / "metadata.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    typer.run(main)
