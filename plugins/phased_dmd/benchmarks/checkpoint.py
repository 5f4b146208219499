"""From what the fits wrote to the folder `emoji-flux-4step`: LoRA in fp16, figures, picture grids, model card.

    python plugins/phased_dmd/benchmarks/checkpoint.py --one one.safetensors --phases phase_1.safetensors phase_2.safetensors \\
        --commands commands.md --notes notes.md --out emoji-flux-4step

About two minutes of one core: 160 pictures of one object, 96 of two, 64 objects, 96 with several seeds, by the LoRA of one phase.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffgraft import load_pipeline, unload
from diffgraft_checkpoints.emoji.judge import load_bundled
from diffgraft_checkpoints.train import cards, export
from diffgraft_checkpoints.train import evaluate as measuring
from diffgraft_checkpoints.train.flux import Guided
from safetensors.torch import load_file, save_file

STEPS = 4
CARD = """# emoji-flux-4step

LoRA with which emoji-flux draws in four steps without guidance, learned by distribution matching (Yin et al., arXiv 2311.18828) and, in two
phases, by Phased DMD (Fan et al., arXiv 2510.27684).

```python
from diffusers import FluxPipeline

pipe = FluxPipeline.from_pretrained("path/to/emoji-flux")
pipe.load_lora_weights("path/to/emoji-flux-4step")
image = pipe(
    "a small apple on the left on a blue background",
    height=64, width=64, max_sequence_length=20, num_inference_steps=4,
).images[0]
```

`pytorch_lora_weights.safetensors` is the LoRA of one phase, for all four steps, and what `load_pipeline("emoji-flux-4step")` loads.
`phase_1.safetensors` (the first two steps, down to noise level 0.75) and `phase_2.safetensors` (the others) are for `phased_dmd`.

"""
RECIPE = """## Recipe

The prompts are the {prompts} combinations that emoji-flux's own training saw (`plugins/phased_dmd/benchmarks/prompts.py`).

{commands}

Hardware: 2 shared CPU cores (x86_64), no GPU. Versions: {versions}.
Parameters: LoRA {parameters:.2f} M each, rank 32, attention and feed-forward.
The teacher is emoji-flux with guidance 2. No pictures were used.

"""


def halved(source: Path, out: Path) -> int:
    """A LoRA in fp16; how many numbers it has."""
    tensors = {name: value.half().contiguous() for name, value in load_file(source).items()}
    save_file(tensors, out, {"format": "pt"})
    return sum(value.numel() for value in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", type=Path, required=True)
    parser.add_argument("--phases", type=Path, nargs=2, required=True)
    parser.add_argument("--commands", type=Path, required=True, help="the commands that made them, as Markdown")
    parser.add_argument("--notes", type=Path, required=True, help="a person's remarks, as Markdown")
    parser.add_argument("--prompts", type=int, default=160)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    judge = load_bundled()
    with export.replacing(chosen.out) as fresh:
        count = halved(chosen.one, fresh / "pytorch_lora_weights.safetensors")
        for number, phase in enumerate(chosen.phases, 1):
            halved(phase, fresh / f"phase_{number}.safetensors")
        pipe = unload(load_pipeline("emoji-flux"))
        pipe.scheduler.save_pretrained(fresh / "scheduler")
        pipe.load_lora_weights(fresh, weight_name="pytorch_lora_weights.safetensors", adapter_name="few")
        result: dict[str, Any] = measuring.evaluate(Guided(pipe), judge, fresh / "grids", chosen.prompts, 1.0, STEPS)
        recipe = {
            "command": "diffgraft fit phased_dmd, see the card",
            "hardware": "2 shared CPU cores (x86_64), no GPU",
            "stages": {},
            "parameters": {"LoRA": count},
            "versions": export.versions(),
        }
        about = RECIPE.format(
            prompts=4608,
            commands=chosen.commands.read_text().strip(),
            versions=", ".join(f"{name} {version}" for name, version in export.versions().items()),
            parameters=count / 1e6,
        )
        # braces of the card's own text are the template's
        template = cards.HEAD + CARD + cards.FIGURES + "{notes}" + about.replace("{", "{{").replace("}", "}}") + cards.LICENCE
        export.write_card(fresh, template, recipe, judge, result, chosen.notes.read_text())
    print(result["scores"]["all four"], result["frechet_to_renders"], result["diversity_rms"])


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
