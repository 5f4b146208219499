"""What score_geometry reads off fields whose geometry is known, and off trained networks.

    python plugins/score_geometry/benchmarks/geometry.py --out out/geometry      # everything; parts that are in --out already are kept

Four parts. A mixture of Gaussians with a rotation added, against its closed form. Renders of four emoji with 1, 2, 3 and 4 free parameters
(place, size, angle), their exact score and a network that this script trains on all of them. The same network's flow. The asymmetry of
emoji-sd and of the same U-Net before training. Writes results.json and spectra.png.
"""

from __future__ import annotations

import itertools
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import diffusers
import matplotlib as mpl
import numpy as np
import torch
import typer
from diffgraft import load_pipeline
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.train.evaluate import held_out_labels
from diffgraft_score_geometry import ScoreGeometry
from diffgraft_score_geometry.score import Draw
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from rich.console import Console
from rich.table import Table
from torch import Tensor

mpl.use("agg")
SIDE = 16
OBJECTS = ("star", "heart", "pig", "car")
"""The emoji with 1, 2, 3 and 4 free parameters."""
FREE = {"x": (24.0, 40.0), "y": (24.0, 40.0), "side": (36.0, 46.0), "rotation": (-25.0, 25.0)}
"""The parameters in the order in which they become free: pixels of 64, degrees."""
MIDDLE = {"x": 32.0, "y": 32.0, "side": 41.0, "rotation": 0.0}
POOL = {1: 1000, 2: 3000, 3: 5000, 4: 8000}
RENDER = 0.06
"""RMS distance to the nearest training picture from which on what the network makes is no render."""
STEPS = 50
PROBED = (-3, -4)
"""Steps of 50, timesteps 40 and 60: noise to signal .14 and .21."""
console = Console(width=150)


# renders ----------------------------------------------------------------------------------------------------------------------------


def render(k: int, values: dict[str, float]) -> Tensor:
    """The k-th emoji, grey, 16 x 16, in -1 to 1, flat [256]."""
    scene = scenes.Scene(scenes.Labels(OBJECTS[k - 1]), **{**MIDDLE, **values}, mirrored=False, color=scenes.BACKGROUNDS["blue"])
    grey = np.asarray(scenes.render(scene), dtype=np.float32).mean(2)
    step = scenes.SIZE // SIDE
    return torch.from_numpy(grey.reshape(SIDE, step, SIDE, step).mean((1, 3)) / 127.5 - 1).flatten()


def draw_values(k: int, rng: np.random.Generator, inner: bool = False) -> dict[str, float]:
    """Random values of the k free parameters, of the middle half of their ranges for test pictures."""
    share = 0.25 if inner else 0.0
    return {
        name: float(rng.uniform(low + share * (high - low), high - share * (high - low)))
        for name, (low, high) in itertools.islice(FREE.items(), k)
    }


def make_pool() -> dict[int, Tensor]:
    rng = np.random.default_rng(1)
    return {k: torch.stack([render(k, draw_values(k, rng)) for _ in range(n)]) for k, n in POOL.items()}


def grid_around(k: int, values: dict[str, float], sigma: float, number: int = 7, widths: float = 3.5) -> Tensor:
    """Renders on a grid around a picture, as wide as noise of this level can take one for another, or to the end of the ranges."""
    axes = []
    for name, centre in values.items():
        slope = (render(k, {**values, name: centre + 0.5}) - render(k, {**values, name: centre - 0.5})).norm()
        reach, (low, high) = widths * sigma / float(slope), FREE[name]
        axes.append(np.linspace(max(low, centre - reach), min(high, centre + reach), number))
    return torch.stack([render(k, dict(zip(values, point, strict=True))) for point in itertools.product(*axes)])


class Exact(UNet2DModel):
    """The exact denoiser of a set of pictures: the mean of them all, weighed by how well each explains the noisy one."""

    def __init__(self) -> None:
        super().__init__(**ARCHITECTURE, block_out_channels=(8, 8))
        self.abar, self.points = DDIMScheduler().alphas_cumprod, torch.zeros(1, SIDE**2)

    def forward(self, sample: Tensor, timestep: Any, return_dict: bool = True, **unused: Any) -> Any:  # type: ignore[override]
        abar = self.abar.to(sample)[int(timestep)]
        a, s, x, y = abar.sqrt(), (1 - abar).sqrt(), sample.flatten(1), self.points.to(sample)
        weights = ((a * x @ y.T - a * a * y.square().sum(1) / 2) / (s * s)).softmax(1)
        eps = ((x - a * weights @ y) / s).view_as(sample)
        return UNet2DOutput(eps) if return_dict else (eps,)


ARCHITECTURE: dict[str, Any] = {
    "sample_size": SIDE, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "add_attention": False, "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D"),
}  # fmt: skip


def pipeline(unet: UNet2DModel) -> DDIMPipeline:
    pipe = DDIMPipeline(unet.eval(), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def train(pool: dict[int, Tensor], path: Path, steps: int, batch: int = 32) -> UNet2DModel:
    """A network of all four emoji, averaged weights; read from ``path`` where it is there."""
    if path.is_dir():
        return UNet2DModel.from_pretrained(path)
    torch.manual_seed(0)
    unet = UNet2DModel(**ARCHITECTURE, block_out_channels=(16, 32))
    average = torch.optim.swa_utils.AveragedModel(unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
    optimiser = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.05)
    abar, generator, began = DDIMScheduler().alphas_cumprod, torch.Generator().manual_seed(0), time.perf_counter()
    for step in range(steps):
        kinds = torch.randint(1, 5, (batch,), generator=generator)
        clean = torch.stack([pool[k][torch.randint(len(pool[k]), (), generator=generator)] for k in kinds.tolist()]).view(-1, 1, SIDE, SIDE)
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randint(1000, (batch,), generator=generator)
        t = torch.where(torch.arange(batch) % 2 == 0, t % 250, t)  # half of them where the geometry is read
        a, s = abar[t].sqrt().view(-1, 1, 1, 1), (1 - abar[t]).sqrt().view(-1, 1, 1, 1)
        loss = (unet(a * clean + s * noise, t).sample - noise).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        average.update_parameters(unet)
        if step % 250 == 0 or step == steps - 1:
            console.print(f"step {step} loss {loss.item():.4f} {time.perf_counter() - began:.0f} s", highlight=False)
    average.module.save_pretrained(path)
    return average.module


# measuring --------------------------------------------------------------------------------------------------------------------------


def timestep_of(step: int) -> int:
    """Of a step that is counted from the run's end."""
    return 1000 // STEPS * (-step - 1)


def probed(pipe: Any, rows: int, number: int, **knobs: Any) -> tuple[dict[str, Tensor], int]:
    """The plugin's records of one run, and the denoiser forwards beyond the run's own."""
    load_pipeline(pipe, plugins=[ScoreGeometry(**knobs)])
    pipe(batch_size=rows, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(number))
    report = pipe.plugins.report()
    pipe.plugins.clear()
    return report.plugins["score_geometry"].records, sum(report.forwards.values()) - STEPS


def interval(values: list[float], draws: int = 2000) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval over pictures."""
    x = np.asarray(values, dtype=float)
    means = np.random.default_rng(0).choice(x, (draws, len(x))).mean(1)
    return float(x.mean()), *map(float, np.quantile(means, (0.025, 0.975)))


def published(values: Tensor) -> int:
    """Stanczuk et al.'s rule as it stands: the largest fall anywhere."""
    return len(values) - 1 - int((values[:-1] - values[1:]).argmax())


def neighbours_dimension(x: Tensor, pool: Tensor, k: int = 20) -> float:
    """Levina and Bickel's estimate from the distances to the nearest training pictures: what the data say without a model."""
    near = torch.cdist(x[None], pool)[0].sort().values[:k]
    return float((k - 2) / (near[-1] / near[:-1]).log().sum())


def at_pictures(pipe: Any, pictures: list[tuple[int, dict[str, float]]], exact: bool, rows: int, probes: int) -> list[dict[str, Any]]:
    """By picture and level: the dimension by the trace and by stacked scores."""
    found = []
    for number, (k, values) in enumerate(pictures):
        picture = render(k, values).view(1, 1, SIDE, SIDE)
        for step in PROBED:
            if exact:
                abar = float(DDIMScheduler().alphas_cumprod[timestep_of(step)])
                pipe.unet.points = grid_around(k, values, (1 / abar - 1) ** 0.5)
            made, forwards = probed(pipe, rows, number, steps=(step,), probes=probes, points=4.0, picture=picture, seed=number)
            found.append({
                "k": k, "level": float(made["level"][0]), "forwards": forwards,
                "trace": float(made["trace_dimension"].mean()),
                "scores": int(made["score_dimension"][0, 0]), "published": published(made["score_values"][0, 0]),
                "asymmetry": float(made["asymmetry"].mean()),
                "smallest": made["score_values"][0, 0, -16:].tolist(),
            })  # fmt: skip
        console.print(f"{time.strftime('%H:%M:%S')} {'exact' if exact else 'network'} {number + 1}/{len(pictures)}", highlight=False)
    return found


def mixture() -> list[dict[str, float]]:
    """A mixture of three Gaussians in 256 dimensions, float64, with a rotation of several strengths: measured and by the whole Jacobian."""
    means = torch.randn(3, SIDE**2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 4
    abar, rows = DDIMScheduler().alphas_cumprod.double(), []
    for dtype, strength in ((torch.float32, 0.0), *((torch.float64, c) for c in (0.0, 0.01, 0.1, 1.0))):

        class Field(Exact):
            def forward(self, sample: Tensor, timestep: Any, return_dict: bool = True, **unused: Any) -> Any:
                x = self.eps(sample.flatten(1), int(timestep)).view_as(sample)
                return UNet2DOutput(x) if return_dict else (x,)

            def eps(self, x: Tensor, t: int, c: float = strength) -> Tensor:
                a, s = abar[t].sqrt().to(x), (1 - abar[t]).sqrt().to(x)
                apart, total = x[:, None] - a * means.to(x), a * a * 0.1 + s * s
                weights = (-apart.square().sum(-1) / (2 * total)).softmax(1)
                first, second = x.chunk(2, 1)
                return s * (weights[..., None] * apart).sum(1) / total + c * torch.cat([-second, first], 1)

        pipe = pipeline(Field().to(dtype))
        picture = means[:2].mean(0).view(1, 1, SIDE, SIDE)
        made, _ = probed(pipe, 1, 0, steps=(-10,), probes=32, picture=picture, seed=1)
        t = timestep_of(-10)
        x = abar[t].sqrt() * picture + (1 - abar[t]).sqrt() * Draw(1, STEPS - 10, 1).like(picture.to(dtype))
        jacobian = torch.autograd.functional.jacobian(lambda v: pipe.unet.eps(v, t)[0], x.flatten(1))[:, 0]  # noqa: B023
        closed = float((jacobian - jacobian.T).norm() / (jacobian + jacobian.T).norm())
        rows.append({
            "rotation": strength, "bits": torch.finfo(dtype).bits, "measured": float(made["asymmetry"][0, 0]),
            "error": float(made["asymmetry_error"][0, 0]), "closed": closed,
        })  # fmt: skip
    return rows


def flow(pipe: Any, pool: dict[int, Tensor], samples: int, directions: int) -> list[dict[str, Any]]:
    """Pictures that the network makes: which emoji each is (the nearest training picture's), and the dimension along the run."""
    load_pipeline(pipe, plugins=[ScoreGeometry(steps=(), directions=directions)])
    images = pipe(batch_size=samples, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(5), output_type="np").images
    made = pipe.plugins.report().plugins["score_geometry"].records
    x = torch.from_numpy(images).float().permute(0, 3, 1, 2).flatten(1) * 2 - 1
    apart = torch.stack([torch.cdist(x, pool[k]).min(1).values for k in POOL])
    rows = zip(
        (apart.argmin(0) + 1).tolist(),
        made["flow_dimension"].tolist(),
        apart.min(0).values.tolist(),
        made["flow_values"].tolist(),
        strict=True,
    )
    return [{"k": k, "dimension": n, "apart": d / SIDE, "values": values, "drift": float(made["flow_drift"])} for k, n, d, values in rows]


def emoji_sd(prompts: int, probes: int, steps: int = 20) -> list[dict[str, Any]]:
    """Asymmetry of the conditional score of emoji-sd by step, and of its U-Net with the weights that it began with."""
    captions = [scenes.caption(labels) for labels in held_out_labels()[:prompts]]
    rows = []
    for name in ("trained", "untrained"):
        pipe = load_pipeline("emoji-sd")
        if name == "untrained":
            torch.manual_seed(0)
            pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config).eval()
        load_pipeline(pipe, plugins=[ScoreGeometry(steps=(0, 5, 10, 15, 18), probes=probes)])
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(i) for i in range(len(captions))]
        pipe(captions, num_inference_steps=steps, generator=generators, output_type="latent")
        report = pipe.plugins.report()
        made = report.plugins["score_geometry"].records
        console.print(str(report), highlight=False)
        rows += [
            {"weights": name, "step": int(step), "level": float(level), "asymmetry": ratio.tolist(), "trace": trace.tolist()}
            for step, level, ratio, trace in zip(made["step"], made["level"], made["asymmetry"], made["trace_dimension"], strict=True)
        ]
    return rows


# telling ----------------------------------------------------------------------------------------------------------------------------


def kept(path: Path, make: Callable[[], list[Any]]) -> list[Any]:
    """A part's rows; made unless they are there."""
    if not path.exists():
        began = time.perf_counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = make()
        path.write_text(json.dumps({"seconds": time.perf_counter() - began, "rows": rows}, indent=1))
    return list(json.loads(path.read_text())["rows"])


def table(title: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    made = Table(*columns, title=title)
    for row in rows:
        made.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row))
    console.print(made)


def told(values: list[float], form: str = ".2f") -> str:
    mean, low, high = interval(values)
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The smallest singular values of the stacked scores, a panel a level."""
    import matplotlib.pyplot as plt

    levels = sorted({round(row["level"], 3) for row in found["exact"]})
    figure, axes = plt.subplots(len(found), len(levels), figsize=(11, 6), sharex=True, sharey=True, constrained_layout=True)
    for (name, rows), line in zip(found.items(), axes, strict=True):
        for level, axis in zip(levels, line, strict=True):
            for k in POOL:
                values = np.mean([row["smallest"][::-1] for row in rows if row["k"] == k and round(row["level"], 3) == level], axis=0)
                axis.plot(range(1, len(values) + 1), values, "o-", markersize=4, label=f"{k} free")
            axis.set_title(f"{name}, s / a = {level:g}", fontsize=10)
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.supxlabel("singular value, from the smallest")
    figure.supylabel("of the stacked s x score, / sqrt(K)")
    figure.savefig(path, dpi=100)


def main(
    pictures: Annotated[int, typer.Option(help="test renders for each number of free parameters")] = 4,
    rows: Annotated[int, typer.Option(help="noisy points around each for the Jacobian, and scores a forward")] = 16,
    probes: int = 8,
    training: Annotated[int, typer.Option(help="steps of the network's training")] = 2500,
    samples: int = 32,
    directions: int = 8,
    prompts: int = 8,
    seed: Annotated[int, typer.Option(help="of the test renders; the rule for stacked scores was chosen on those of 77")] = 78,
    threads: int = 1,
    out: Path = Path("out/geometry"),
) -> None:
    """All parts and their tables."""
    torch.set_num_threads(threads)
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    began = time.perf_counter()
    rotations = kept(out / "mixture.json", mixture)
    table(
        "a mixture with a rotation",
        ("rotation c", "bits", "measured", "standard error", "whole Jacobian"),
        [tuple(row.values())[:5] for row in rotations],
    )
    rng = np.random.default_rng(seed)
    tests = [(k, draw_values(k, rng, inner=True)) for k in POOL for _ in range(pictures)]
    exact = kept(out / "exact.json", lambda: at_pictures(pipeline(Exact()), tests, True, rows, probes))
    pool = make_pool()
    trained = pipeline(train(pool, out / "network", training))
    network = kept(out / "network.json", lambda: at_pictures(trained, tests, False, rows, probes))
    around = kept(
        out / "neighbours.json", lambda: [{"k": k, "dimension": neighbours_dimension(render(k, values), pool[k])} for k, values in tests]
    )
    lines = []
    for name, found in (("exact", exact), ("network", network)):
        for level in sorted({round(row["level"], 3) for row in found}):
            for k in POOL:
                own = [row for row in found if row["k"] == k and round(row["level"], 3) == level]
                right = [f"{sum(row[rule] == k for row in own)}/{len(own)}" for rule in ("scores", "published")]
                trace, scores, ratio = ([row[key] for row in own] for key in ("trace", "scores", "asymmetry"))
                lines.append((name, level, k, told(trace), told(scores), *right, told(ratio, ".2g")))
    lines += [("nearest neighbours", "-", k, told([row["dimension"] for row in around if row["k"] == k]), "-", "-", "-", "-") for k in POOL]
    table("renders", ("score", "s / a", "free", "trace", "stacked scores", "right", "by the published rule", "asymmetry"), lines)
    draw({"exact": exact, "network": network}, out / "spectra.png")
    runs = kept(out / "flow.json", lambda: flow(trained, pool, samples, directions))
    renders = [row for row in runs if row["apart"] < RENDER]
    of = {k: [row for row in renders if row["k"] == k] for k in POOL}
    table(
        f"the {len(renders)} of {len(runs)} pictures that the network makes that are renders, by the flow",
        ("free", "pictures", "dimension", "right", "RMS to the nearest training picture"),
        [
            (
                k,
                len(own),
                told([row["dimension"] for row in own]),
                sum(row["dimension"] == k for row in own),
                float(np.mean([row["apart"] for row in own])),
            )
            for k, own in of.items()
            if own
        ],
    )
    asked = kept(out / "emoji-sd.json", lambda: emoji_sd(prompts, probes // 2))
    table(
        "emoji-sd",
        ("weights", "step of 20", "s / a", "asymmetry", "trace"),
        [(row["weights"], row["step"], row["level"], told(row["asymmetry"], ".3f"), told(row["trace"], ".0f")) for row in asked],
    )
    machine = (
        f"{platform.processor() or platform.machine()}, {threads} thread(s), torch {torch.__version__}, diffusers {diffusers.__version__}"
    )
    seconds = {path.stem: round(json.loads(path.read_text())["seconds"], 1) for path in out.glob("*.json") if path.stem != "results"}
    (out / "results.json").write_text(
        json.dumps({"machine": machine, "seconds": seconds, "renders": [list(map(str, line)) for line in lines]}, indent=1)
    )
    console.print(f"{machine}; seconds by part: {seconds}; now {time.perf_counter() - began:.0f} s", highlight=False)


if __name__ == "__main__":
    typer.run(main)
