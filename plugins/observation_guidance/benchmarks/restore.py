"""How near observation_guidance comes to held-out renders, beside the pseudo-inverse and red_diff at as many denoiser forwards.

    python plugins/observation_guidance/benchmarks/restore.py                       # emoji-pixel, three problems: about two minutes
    python plugins/observation_guidance/benchmarks/restore.py --model emoji-sd      # a box to fill, four minutes; emoji-dit likewise
    python plugins/observation_guidance/benchmarks/restore.py --coverage            # emoji-pixel: what the quantiles cover, two minutes

A forward is one of the denoiser for all pictures; the backward passes of observation_guidance are not counted. Scenes are rendered from the
emoji font; where it is not installed, they are pictures that the model itself draws.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffgraft import load_pipeline
from diffgraft.lab.metrics import ssim
from diffgraft.methods.measurements import Mask
from diffgraft.methods.operators import Operator
from diffgraft.methods.problems import Problem, read_operator, simulated
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.train.pixel import draw_pixel_scene
from diffgraft_checkpoints.train.pool import draw_scene
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

PROBLEMS = {
    "emoji-pixel": ("mask(0.5) + noise(0.02)", "downsample(4) + noise(0.02)", "blur(1.5) + noise(0.02)"),
    "emoji-sd": ("box + noise(0.02)",),
    "emoji-dit": ("box + noise(0.02)",),
}
NAME = "observation_guidance"


class Scenes:
    """Held-out scenes as a model would be asked for them; ``truth`` [n, 3, side, side] in [-1, 1]."""

    def __init__(self, pipe: Any, model: str, pictures: int, seed: int) -> None:
        self.pipe, self.model, self.n = pipe, model, pictures
        self.drawn: list[scenes.Scene] = []
        try:
            draw = draw_pixel_scene if model == "emoji-pixel" else draw_scene
            self.drawn = [draw(seed, i, True, True) for i in range(pictures)]
            x = torch.stack([torch.from_numpy(np.asarray(scenes.render(each)).copy()) for each in self.drawn])
            x = x.permute(0, 3, 1, 2).float() / 127.5 - 1
            self.truth = torch.nn.functional.avg_pool2d(x, 2) if model == "emoji-pixel" else x
        except scenes.ArtworkMissing:
            if model != "emoji-pixel":
                raise
            self.truth = self.made(100, seed)

    def made(self, steps: int, seed: int) -> Tensor:
        """What the pipeline makes of them, with the plugins that are on."""
        asked: dict[str, Any] = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed), "output_type": "np"}
        if self.model == "emoji-pixel":
            asked["batch_size"] = self.n
        elif self.model == "emoji-sd":
            asked.update(prompt=[scenes.caption(each.labels) for each in self.drawn], guidance_scale=2.0)
        else:
            asked.update(class_labels=self.pipe.get_label_ids([each.labels.object for each in self.drawn]), guidance_scale=2.0)
        return torch.from_numpy(np.asarray(self.pipe(**asked).images)).permute(0, 3, 1, 2).float() * 2 - 1


def operator_of(text: str, side: int) -> tuple[Operator, float]:
    """Of a problem as text, or of a box of half the side in the middle that is not seen."""
    if not text.startswith("box"):
        return read_operator(text)
    seen = torch.ones(side, side)
    seen[side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = 0
    return Mask(seen), 0.02


def psnr(x: Tensor, truth: Tensor) -> Tensor:
    """dB of each picture, of a range of 2."""
    return -10 * torch.log10((x.clamp(-1, 1) - truth).square().flatten(1).mean(1) / 4)


def mean(values: Tensor) -> str:
    """With its 95 % interval (1.96 standard errors over pictures)."""
    return f"{values.mean():.1f} +- {1.96 * values.std() / len(values) ** 0.5:.1f}"


def similar(x: Tensor, truth: Tensor) -> float:
    """Mean structural similarity."""

    def pictures(t: Tensor) -> Any:
        return ((t.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1)[:, None].numpy()

    return float(np.mean(ssim(pictures(x), pictures(truth)) or [float("nan")]))


def kept_for_backward(pipe: Any, problem: Problem, asked: Scenes) -> list[float]:
    """MiB a picture that one step keeps for its backward pass, without and with checkpointing."""
    found = []
    for checkpointing in (False, True):
        storages: dict[int, int] = {}

        def note(t: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        weights = {each.untyped_storage().data_ptr() for model in pipe.components.values() if isinstance(model, torch.nn.Module)
                   for each in model.parameters()}  # fmt: skip
        load_pipeline(pipe, plugins={NAME: {"problem": problem, "noisiest": 1e4, "checkpointing": checkpointing}})
        try:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
                asked.made(1, seed=3)
            found.append(sum(size for at, size in storages.items() if at not in weights) / 2**20 / asked.n)
        except Exception as error:  # a model without checkpointing
            Console().print(f"checkpointing: {error}")
            found.append(float("nan"))
        pipe.plugins.remove(NAME)
    return found


def compare(model: str, pictures: int, steps: int, scale: float, seed: int, out: Path) -> None:
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    asked = Scenes(pipe, model, pictures, seed)
    truth, side = asked.truth, asked.truth.shape[-1]
    table = Table("problem", "method", "PSNR, dB", "SSIM", "residual", "forwards")
    rows, strips = [], []
    for text in PROBLEMS[model]:
        operator, noise = operator_of(text, side)
        problem = simulated(operator, truth, noise, torch.Generator().manual_seed(2))
        found = {"pseudo-inverse": (operator.pinv(problem.y), 0)}
        ways: list[tuple[str, str, dict[str, Any], int]] = [
            ("squared, eps", NAME, {"scale": scale}, steps),
            ("pinball, eps", NAME, {"scale": scale, "loss": "pinball", "quantiles": 1}, steps),
            ("red_diff", "red_diff", {}, 0),
            ("red_diff, lr 0.3", "red_diff", {"lr": 0.3}, 0),
        ]
        if model != "emoji-pixel":
            ways.insert(1, ("squared, in latents", NAME, {"scale": scale, "space": "latents"}, steps))
        for label, plugin, knobs, count in ways:
            load_pipeline(pipe, plugins={plugin: {"problem": problem, **knobs}})
            x = asked.made(count or found["squared, eps"][1], seed=3)
            found[label] = (x, sum(pipe.plugins.report().forwards.values()))
            pipe.plugins.remove(plugin)
        ours = psnr(found["squared, eps"][0], truth)
        for label, (x, forwards) in found.items():
            scores = mean(psnr(x, truth)), f"{similar(x, truth):.3f}", f"{problem.residual(x).mean():.4f}", str(forwards)
            table.add_row(text, label, *scores)
            gain = mean(ours - psnr(x, truth))
            rows.append({"problem": text, "method": label, "scores": scores, "squared above it, dB": gain, "psnr": psnr(x, truth).tolist()})
        if text.startswith("box"):
            seen = operator.at(truth)  # type: ignore[attr-defined]
            rows.append({"pasted back": mean(psnr(seen * problem.y + (1 - seen) * found["squared, eps"][0], truth))})
        shown = (truth, problem.operator.pinv(problem.y).clamp(-1, 1), found["squared, eps"][0], found["red_diff"][0])
        strips.append(torch.cat([part[i] for i in range(min(2, pictures)) for part in shown], -1))
    rows.append({"MiB a picture for backward, plain and checkpointed": kept_for_backward(pipe, problem, asked)})
    out.mkdir(parents=True, exist_ok=True)
    sheet = ((torch.cat(strips, -2).clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    enlarged = Image.fromarray(sheet).resize((sheet.shape[1] * 128 // side, sheet.shape[0] * 128 // side), Image.Resampling.NEAREST)
    enlarged.save(out / f"{model}.png")
    (out / f"{model}.json").write_text(json.dumps(rows, indent=1))
    Console(width=140).print(table)
    for row in rows:
        if "method" not in row or row["method"].startswith("red_diff"):
            Console(width=140).print({key: value for key, value in row.items() if key not in ("psnr", "scores")})


def coverage(truths: int, K: int, steps: int, scale: float, seed: int) -> None:
    """Of K pictures of one measurement: how often a hidden pixel's truth lies between the least and the greatest, 1 - 2 / (K + 1) of the
    time if they are draws of the posterior, or its quantiles."""
    pipe = load_pipeline("emoji-pixel")
    pipe.set_progress_bar_config(disable=True)
    truth = Scenes(pipe, "emoji-pixel", truths, seed).truth
    operator, noise = operator_of("box", 32)
    problem = simulated(operator, truth, noise, torch.Generator().manual_seed(2))
    repeated = Problem(operator, problem.y.repeat_interleave(K, 0), noise)
    hidden = (operator.at(truth) == 0).expand(3, -1, -1)  # type: ignore[attr-defined]
    table = Table("loss", "where", "covered", f"wanted: {1 - 2 / (K + 1):.2f}", "mean width")
    for label, knobs in (("squared", {"loss": "squared"}), ("pinball", {"loss": "pinball", "quantiles": K})):
        load_pipeline(pipe, plugins={NAME: {"problem": repeated, "scale": scale, **knobs}})
        made = pipe(batch_size=truths * K, num_inference_steps=steps, generator=torch.Generator().manual_seed(3), output_type="np").images
        pipe.plugins.remove(NAME)
        x = (torch.from_numpy(np.asarray(made)).permute(0, 3, 1, 2).float() * 2 - 1).unflatten(0, (truths, K))
        least, most = x.amin(1), x.amax(1)
        for where, mask in (("hidden", hidden), ("seen", ~hidden)):
            inside = ((least <= truth) & (truth <= most)).float()[:, mask].mean(1)
            table.add_row(label, where, mean(100 * inside) + " %", "", f"{(most - least)[:, mask].mean():.3f}")
    Console(width=140).print(table)


def main(
    model: Annotated[str, typer.Option(help="emoji-pixel, emoji-sd or emoji-dit")] = "emoji-pixel",
    pictures: Annotated[int, typer.Option(min=2)] = 12,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    scale: Annotated[float, typer.Option(min=0)] = 2.0,
    seed: Annotated[int, typer.Option(help="of the scenes; knobs were chosen on those of seed 500")] = 900,
    covered: Annotated[bool, typer.Option("--coverage")] = False,
    out: Annotated[Path, typer.Option()] = Path("out/observation_guidance"),
) -> None:
    if covered:
        coverage(max(2, pictures // 2), 9, steps, scale, seed)
    else:
        compare(model, pictures, steps, scale, seed, out)


if __name__ == "__main__":
    typer.run(main)
