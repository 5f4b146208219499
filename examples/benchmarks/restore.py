"""One benchmark for all methods that restore pictures: five problems on held-out renders, ours beside deepinv's with the same denoiser.

    python -m pip install deepinv                                     # brings torchvision; without it only ours are measured
    python examples/benchmarks/restore.py [--pictures 100] [--nfe 50] # emoji-pixel: about 70 minutes of a core
    python examples/benchmarks/restore.py --only 1 --only 2           # these problems alone, say beside another process with the rest
    python examples/benchmarks/restore.py --pictures 4 --tuned 2 --nfe 10   # a look: half a minute

    python examples/benchmarks/restore.py --model emoji-sd --pictures 12 --tuned 3 --nfe 24     # through an autoencoder, ours alone
    python examples/benchmarks/restore.py --model emoji-wan-4step --pictures 6 --tuned 2        # videos

All ask the model's denoiser equally often (``--nfe`` forwards a picture; lvtino, for few-step models, 8 or fewer) and get the same
operators and measurements. The knobs of each method are the best of its grid (GRIDS) by mean PSNR on other pictures than the measured ones,
for each problem. Writes restore.json, restore.md and restore.png to ``--out``; what a problem gave is kept there and not measured again
with the same settings, so a run that was stopped goes on.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffgraft import load_pipeline
from diffgraft.lab.metrics import psnr, ssim
from diffgraft.lab.restoration import pictures_of
from diffgraft.methods.inputs import parameters
from diffgraft.methods.problems import Problem, read_operator, simulated
from diffgraft_checkpoints.emoji import motion, scenes
from diffgraft_checkpoints.emoji.judge import load_bundled
from diffgraft_checkpoints.train.pixel import draw_pixel_scene
from diffgraft_checkpoints.train.pool import draw_scene
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

MODELS = ("emoji-pixel", "emoji-sd", "emoji-wan-4step")
SIDE = 32
AT_ONCE = 20
PROBLEMS = (
    "mask(0.5) + noise(0.02)",
    "downsample(4) + noise(0.02)",
    "blur(1.5) + noise(0.02)",
    "radon(8) + noise(0.005)",
    "motion_blur(9, angle=30) + noise(0.02)",
)
STILL = ("mask(0.5) + noise(0.02)", "downsample(4) + noise(0.02)", "blur(1.5) + noise(0.02)")
CLIPS = ("temporal_mean(3) + noise(0.02)", "downsample(2) + noise(0.02)", "downsample(4) @ temporal_mean(3) + noise(0.02)")
GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "red_diff": {"lr": (0.05, 0.1, 0.2), "weight": (0.03, 0.1, 0.25)},
    "observation_guidance": {"scale": (1.0, 2.0, 4.0, 8.0, 16.0)},
    "diffusion_mbir": {"cg_steps": (1, 2, 3)},
    "lvtino": {"delta": (0.1, 1.0, 10.0), "encoding": ("plain", "difference")},
    "deepinv DPS": {"weight": (10.0, 30.0, 100.0, 300.0)},
    "deepinv DiffPIR": {"lambda_": (1.0, 7.0), "zeta": (0.5, 1.0)},
    "deepinv DDRM": {"eta": (0.7, 0.85, 1.0)},
}
INTRO = """All ask emoji-pixel's U-Net equally often and get the same operators and measurements of held-out renders, 32 x 32. The knobs of
each method are the best of its grid by mean PSNR on other pictures than the measured ones, for each problem; diffusion_mbir stands at
`weight=0`, where it solves picture by picture. In brackets: deviation of the noise in y, in pictures from -1 to 1. Mean over pictures with
1.96 standard errors; *right*: pictures in which emoji-sd's judge sees the object that was rendered; seconds of processor time a picture."""
INTRO_OTHERS = """Held-out renders of 64 x 64 pixels with their captions as prompts, guidance off; all get the same operators and
measurements. What asks emoji-sd asks it equally often; lvtino asks a distilled model (emoji-sd-lcm, emoji-wan-4step), in so many steps as
the table says. The knobs of each method are the best of its grid by mean PSNR on training renders. In brackets: deviation of the noise in
y, in pictures from -1 to 1. Mean over pictures or clips with 1.96 standard errors; *right*: pictures in which emoji-sd's judge sees the
object that was rendered; seconds of processor time a picture."""
Way = Callable[[Problem, Mapping[str, Any], int, int, list[str]], tuple[Tensor, float]]
"""(problem, knobs, forwards that are wanted, seed, captions) -> (pictures [n, 3, ...] in [-1, 1], forwards a picture that there were)."""


@dataclass
class Setting:
    """What is measured of a model; ``drawn`` makes (truth, captions) of (seed, number, held out)."""

    problems: tuple[str, ...]
    ways: dict[str, Way]
    drawn: Callable[[int, int, bool], tuple[Tensor, list[str]]]
    intro: str = INTRO_OTHERS


def rendered(first: int, n: int, held_out: bool) -> tuple[Tensor, list[str]]:
    """Scenes as emoji-pixel knows them, [n, 3, 32, 32] in [-1, 1], and their captions."""
    drawn = [draw_pixel_scene(first, i, held_out, True) for i in range(n)]
    x = torch.stack([torch.from_numpy(np.asarray(scenes.render(each)).copy()) for each in drawn]).permute(0, 3, 1, 2).float() / 127.5 - 1
    return nn.functional.avg_pool2d(x, x.shape[-1] // SIDE), [scenes.caption(each.labels) for each in drawn]


def still(first: int, n: int, held_out: bool) -> tuple[Tensor, list[str]]:
    """Scenes as emoji-sd knows them, [n, 3, 64, 64]."""
    drawn = [draw_scene(first, i, held_out, True) for i in range(n)]
    return torch.stack([as_tensor(scenes.render(each)) for each in drawn]), [scenes.caption(each.labels) for each in drawn]


def moving(first: int, n: int, held_out: bool) -> tuple[Tensor, list[str]]:
    """Clips as emoji-wan knows them, [n, 3, 9, 64, 64]."""
    drawn = [motion.draw_clip(first, i, held_out) for i in range(n)]
    frames = [torch.stack([as_tensor(frame) for frame in motion.render_clip(clip)], 1) for clip in drawn]
    return torch.stack(frames), [motion.caption(clip.labels) for clip in drawn]


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


# ours ----------------------------------------------------------------------------------------------------------------------------------


def plugin(pipe: Any, name: str, fixed: Mapping[str, Any], forwards_a_step: int = 1, most: int | None = None) -> Way:
    """A plugin on the pipeline's own loop, in ``most`` steps at most; those that the knob ``times`` says are not said to the call."""

    def way(problem: Problem, knobs: Mapping[str, Any], nfe: int, seed: int, captions: list[str]) -> tuple[Tensor, float]:
        load_pipeline(pipe, plugins={name: {"problem": problem, **fixed, **knobs}})
        try:
            asked: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "output_type": "np"}
            if "times" not in fixed:
                asked["num_inference_steps"] = min(nfe // forwards_a_step, most or nfe)
            if "prompt" in parameters(pipe):
                asked |= {"prompt": captions, "guidance_scale": 1.0}
            else:
                asked["batch_size"] = len(problem.y)
            made = pipe(**asked)[0]
            forwards = sum(pipe.plugins.report().forwards.values())
        finally:
            pipe.plugins.remove(name)
        return torch.from_numpy(np.asarray(made)).movedim(-1, 1).float() * 2 - 1, forwards

    return way


def loaded(name: str) -> Any:
    pipe = load_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def setting_of(model: str) -> Setting:
    """What is measured of a model."""
    if model == "emoji-wan-4step":
        taus = {"few_step": True, "times": (757.0, 522.0, 375.0, 255.0, 125.0)}
        return Setting(CLIPS, {"lvtino": plugin(loaded(model), "lvtino", taus)}, moving)
    pipe = loaded(model)
    ways = {
        "red_diff": plugin(pipe, "red_diff", {}),
        "observation_guidance": plugin(pipe, "observation_guidance", {"noisiest": 1e4}, forwards_a_step=2),
        "diffusion_mbir": plugin(pipe, "diffusion_mbir", {"weight": 0.0}),
    }
    if model == "emoji-pixel":
        return Setting(PROBLEMS, {**ways, **peers(pipe)}, rendered, INTRO)
    ways["lvtino"] = plugin(loaded("emoji-sd-lcm"), "lvtino", {}, most=8)
    return Setting(STILL, ways, still)


# deepinv -------------------------------------------------------------------------------------------------------------------------------


class Cleaner(nn.Module):
    """The U-Net as deepinv asks for it: pictures in [0, 1] with noise of deviation sigma -> clean ones."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.unet = pipe.unet
        abar = pipe.scheduler.alphas_cumprod.double()
        self.levels = ((1 - abar) / abar).sqrt()  # of pictures in [-1, 1], rising
        self.asked = 0

    def forward(self, x: Tensor, sigma: Any, *_: Any, **__: Any) -> Tensor:
        self.asked += 1
        wanted = 2 * float(torch.as_tensor(sigma).flatten()[0])
        t = float(np.interp(math.log(max(wanted, 1e-8)), self.levels.log().numpy(), np.arange(len(self.levels))))
        level = max(wanted, float(self.levels[0]))
        noisy = 2 * x.float() - 1
        eps = self.unet(noisy / math.sqrt(1 + level**2), torch.full((len(x),), t)).sample
        return ((noisy - level * eps + 1) / 2).to(x.dtype)


def physics_of(problem: Problem) -> tuple[Any, Tensor]:
    """The problem as deepinv has it: pictures in [0, 1], an operator by its singular values (all of these act on each channel alone)."""
    import deepinv

    rows, y = problem.y.shape, problem.y
    basis = torch.eye(SIDE * SIDE).reshape(-1, 1, SIDE, SIDE).expand(-1, 3, -1, -1).contiguous()
    dense = problem.operator.A(basis)[:, 0].flatten(1).T.double()  # [m, n]
    U, s, Vt = torch.linalg.svd(dense, full_matrices=True)
    least = min(dense.shape)
    values = torch.zeros(SIDE * SIDE)
    values[:least] = s[:least].float()
    U, Vt = U.float(), Vt.float()

    def lift(z: Tensor) -> Tensor:  # U
        return (z[..., : len(U)] @ U.T[: z.shape[-1]]).reshape(len(z), *rows[1:])

    def lift_back(v: Tensor) -> Tensor:
        z = v.flatten(2) @ U
        return nn.functional.pad(z, (0, max(0, SIDE * SIDE - z.shape[-1])))[..., : SIDE * SIDE]

    physics = deepinv.physics.DecomposablePhysics(
        U=lift,
        U_adjoint=lift_back,
        V=lambda z: (z @ Vt).reshape(len(z), 3, SIDE, SIDE),
        V_adjoint=lambda x: x.flatten(2) @ Vt.T,
        mask=values.expand(1, 3, -1).contiguous(),
        img_size=(3, SIDE, SIDE),
        noise_model=deepinv.physics.GaussianNoise(max(problem.noise, 1e-4) / 2),
    )
    ones = problem.operator.A(torch.ones(1, 3, SIDE, SIDE))
    return physics, (y + ones) / 2  # A((x + 1) / 2)


def peers(pipe: Any) -> dict[str, Way]:
    """deepinv's methods, where it is installed."""
    try:
        import deepinv
    except ImportError as error:
        Console(stderr=True).print(f"without deepinv's methods: {error}")
        return {}
    cleaner = Cleaner(pipe)

    def dps(problem: Problem, knobs: Mapping[str, Any], nfe: int, seed: int) -> Tensor:
        physics, y = physics_of(problem)
        model = deepinv.sampling.DPS(cleaner, num_steps=nfe + 1, rng=torch.Generator().manual_seed(seed), **knobs)
        found: Tensor = model(y, physics)
        return found

    def diffpir(problem: Problem, knobs: Mapping[str, Any], nfe: int, seed: int) -> Tensor:
        physics, y = physics_of(problem)
        model = deepinv.sampling.DiffPIR(cleaner, deepinv.optim.data_fidelity.L2(), max_iter=nfe, sigma=problem.noise / 2, **knobs)
        found: Tensor = model(y, physics, seed=seed, x_init=physics.A_dagger(y).clamp(0, 1))
        return found

    def ddrm(problem: Problem, knobs: Mapping[str, Any], nfe: int, seed: int) -> Tensor:
        physics, y = physics_of(problem)
        found: Tensor = deepinv.sampling.DDRM(cleaner, sigmas=np.linspace(1, 0, nfe), **knobs)(y, physics, seed=seed)
        return found

    def counted(method: Callable[..., Tensor]) -> Way:
        def way(*asked: Any) -> tuple[Tensor, float]:
            cleaner.asked = 0
            return 2 * method(*asked[:4]).detach().float() - 1, cleaner.asked

        return way

    return {"deepinv DPS": counted(dps), "deepinv DiffPIR": counted(diffpir), "deepinv DDRM": counted(ddrm)}


# measuring -----------------------------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    x: Tensor
    forwards: float
    seconds: float


def timed(way: Way, problem: Problem, knobs: Mapping[str, Any], nfe: int, seed: int, captions: list[str]) -> Found:
    """With processor seconds of a picture; so many at once, each of which is restored by itself."""
    began, found, forwards = time.process_time(), [], 0.0
    for i, y in enumerate(problem.y.split(AT_ONCE)):
        texts = captions[i * AT_ONCE : (i + 1) * AT_ONCE]
        x, forwards = way(Problem(problem.operator, y, problem.noise), knobs, nfe, seed + i, texts)
        found.append(x)
    return Found(torch.cat(found), forwards, (time.process_time() - began) / len(problem.y))


def scores(x: Tensor, truth: Tensor) -> list[float]:
    """PSNR in dB of each picture; of one with other things than numbers that of a grey one."""
    return psnr(pictures_of(x.nan_to_num(0.0)), pictures_of(truth))


def best_of(name: str, way: Way, problem: Problem, truth: Tensor, nfe: int, captions: list[str]) -> dict[str, Any]:
    """The knobs of the grid with the best mean PSNR."""
    grid = GRIDS[name]
    tried = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return max(tried, key=lambda knobs: float(np.mean(scores(timed(way, problem, knobs, nfe, 11, captions).x, truth))))


def recognised(x: Tensor, captions: list[str]) -> int | None:
    """In how many pictures the judge sees the right object; None of videos."""
    if x.ndim == 5:
        return None
    arrays = ((each[0] * 255).round().astype(np.uint8) for each in pictures_of(x))
    images = [Image.fromarray(array).resize((64, 64), Image.Resampling.BICUBIC) for array in arrays]
    return sum(bool(seen) for seen in load_bundled().score(images, captions)["object"])


def middle(x: Tensor) -> Tensor:
    """Pictures, or of videos the middle frame."""
    return x[:, :, x.shape[2] // 2] if x.ndim == 5 else x


def told(values: list[float], digits: int = 1) -> str:
    """Mean and 1.96 standard errors over pictures."""
    return f"{np.mean(values):.{digits}f} ± {1.96 * np.std(values, ddof=1) / math.sqrt(len(values)):.{digits}f}"


def page(rows: list[dict[str, Any]], command: str, noises: Mapping[str, float], model: str, intro: str) -> str:
    lines = [f"# Restoring pictures: {model}", "", "Generated by", "", f"    {command}", "", intro, ""]
    for problem in dict.fromkeys(row["problem"] for row in rows):
        lines += [f"## {problem.partition(' + ')[0]} ({noises[problem]:g})", ""]
        lines += ["| method | PSNR, dB | SSIM | residual | right | forwards | seconds | knobs |", "|---|---|---|---|---|---|---|---|"]
        best = max(np.mean(row["psnr"]) for row in rows if row["problem"] == problem)
        for row in (row for row in rows if row["problem"] == problem):
            mark = "**" if np.mean(row["psnr"]) == best else ""
            knobs = ", ".join(f"{key}={value}" for key, value in row["knobs"].items())
            right = "" if row["right"] is None else f"{row['right']}/{len(row['psnr'])}"
            lines.append(
                f"| {row['method']} | {mark}{told(row['psnr'])}{mark} | {np.mean(row['ssim']):.3f} | {row['residual']:.4f} | "
                f"{right} | {row['forwards']:.0f} | {row['seconds']:.2f} | {knobs} |"
            )
        lines.append("")
    lines += ["![The truth and each method in the tables' order, two pictures a problem](restore.png)", "", versions(), ""]
    return "\n".join(lines)


def versions() -> str:
    found = []
    for name in ("torch", "diffusers", "diffgraft", "deepinv"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return f"{', '.join(found)}; {platform.machine()}, one thread."


def main(
    model: Annotated[str, typer.Option(help=f"one of {', '.join(MODELS)}")] = MODELS[0],
    pictures: Annotated[int, typer.Option(min=2)] = 100,
    tuned: Annotated[int, typer.Option(min=2, help="other pictures that knobs are chosen on")] = 8,
    nfe: Annotated[int, typer.Option(min=4, help="denoiser forwards a picture")] = 50,
    only: Annotated[list[int] | None, typer.Option(min=1, max=len(PROBLEMS), help="numbers of problems, 1 the first")] = None,
    out: Annotated[Path | None, typer.Option()] = None,
) -> None:
    torch.set_num_threads(1)
    setting = setting_of(model)
    ways = setting.ways
    truth, captions = setting.drawn(900, pictures, True)
    other, texts = setting.drawn(700, tuned, False)
    out = out or Path("out/restore") / model
    out.mkdir(parents=True, exist_ok=True)
    settings = {"pictures": pictures, "tuned": tuned, "nfe": nfe, "grids": {name: GRIDS[name] for name in ways}}
    parts: list[dict[str, Any]] = []
    chosen = [text for i, text in enumerate(setting.problems, 1) if not only or i in only]
    for text in track(chosen, "problems", console=Console(stderr=True)):
        file = out / f"{text.partition(' + ')[0]}.json"
        if file.exists() and (kept := json.loads(file.read_text()))["settings"] == json.loads(json.dumps(settings)):
            parts.append(kept)
            continue
        operator, noise = read_operator(text)
        problem = simulated(operator, truth, noise, torch.Generator().manual_seed(2))
        aside = simulated(operator, other, noise, torch.Generator().manual_seed(4))
        found = {"pseudo-inverse": (Found(problem.operator.pinv(problem.y), 0, 0), {})}
        rows = []
        for name, way in ways.items():
            knobs = best_of(name, way, aside, other, nfe, texts)
            found[name] = (timed(way, problem, knobs, nfe, 3, captions), knobs)
        for name, (made, knobs) in found.items():
            rows.append({
                "problem": text, "method": name, "knobs": knobs, "psnr": scores(made.x, truth),
                "ssim": ssim(pictures_of(made.x.nan_to_num(0.0)), pictures_of(truth)) or [float("nan")],
                "residual": float(problem.residual(made.x).mean()), "right": recognised(made.x.nan_to_num(0.0), captions),
                "forwards": made.forwards, "seconds": made.seconds,
            })  # fmt: skip
        shown = [middle(x) for x in (truth, *(made.x.clamp(-1, 1) for made, _ in found.values()))]
        strip = torch.cat([torch.cat([part[i] for part in shown], -1) for i in range(2)], -2)
        parts.append({"settings": settings, "noise": noise, "rows": rows, "strip": ((strip + 1) * 127.5).round().tolist()})
        file.write_text(json.dumps(parts[-1]))
    rows = [row for part in parts for row in part["rows"]]
    noises = {part["rows"][0]["problem"]: part["noise"] for part in parts}
    (out / "restore.json").write_text(json.dumps(rows, indent=1))
    sheet = torch.cat([torch.tensor(part["strip"]) for part in parts], -2).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(sheet).resize((sheet.shape[1] * 3, sheet.shape[0] * 3), Image.Resampling.NEAREST).save(out / "restore.png")
    command = f"python examples/benchmarks/restore.py --model {model} --pictures {pictures} --tuned {tuned} --nfe {nfe}"
    (out / "restore.md").write_text(page(rows, command, noises, model, setting.intro))
    Console().print((out / "restore.md").read_text(), markup=False)


if __name__ == "__main__":
    typer.run(main)
