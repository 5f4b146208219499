"""Pictures with captions for `diffgraft fit consissr`: scenes of one object as emoji-sr was trained on, none of its held-out combinations.

    python plugins/consissr/benchmarks/pictures.py --out pictures --number 3000

Writes OUT/00000.png ... and OUT/metadata.jsonl. Needs the font NotoColorEmoji.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from diffgraft_checkpoints.emoji import scenes


def main(out: Annotated[Path, typer.Option()], number: Annotated[int, typer.Option(min=1)] = 3000) -> None:
    out.mkdir(parents=True, exist_ok=True)
    training, _ = scenes.split()
    lines = []
    for i in range(number):
        rng = np.random.default_rng([0, i])
        labels = training[int(rng.integers(len(training)))]
        scenes.render(scenes.upright(scenes.sample_scene(labels, rng))).save(out / f"{i:05}.png")
        lines.append(json.dumps({"file_name": f"{i:05}.png", "text": scenes.caption(labels, rng)}) + "\n")
    (out / "metadata.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    typer.run(main)
