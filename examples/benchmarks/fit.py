"""Steps a second of ``fit`` against a bare accelerate loop that learns the same module on the same batches with the same pipeline.

    python examples/benchmarks/fit.py [--pipeline emoji-sd] [--steps 10] [--batch 8] [--rounds 5]

Both take turns in one process. What both do: encode pictures and prompts, one denoiser call, a head of two convolutions on its prediction,
AdamW, clipped gradients. The first steps are not counted. On the CPU it is processor time that counts (of all threads), so that others on
the machine do not; on an accelerator it is the time that passes.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer
from accelerate import Accelerator
from diffgraft import Fitter, Paper, Plugin, load_pipeline, unload
from diffgraft.methods.examples import Example, pixels_of
from diffgraft.methods.fitting import FitPlan, fit
from diffgraft.methods.inputs import CallSettings
from diffgraft.methods.variants import own_size
from PIL import Image
from torch import nn

WARM = 3
"""Steps before the clock starts."""


def now(pipe: Any) -> float:
    """Seconds."""
    return time.process_time() if pipe.device.type == "cpu" else time.perf_counter()


def head(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, channels, 3, padding=1))


class HeadFitter(Fitter):
    def build(self, probe: Any) -> nn.Module:
        return head(probe.target.pipe.unet.config.out_channels)

    def loss(self, session: Any, batch: Any) -> torch.Tensor:
        x0, text = self.latents(batch), self.conditioning(batch)
        noise = torch.randn(x0.shape, generator=batch.generator).to(x0)
        index = int(torch.randint(len(self.probe.timesteps), (), generator=batch.generator))
        t = self.probe.timesteps[index]
        session.at(index)
        x = self.probe.scheduler.add_noise(x0, noise, t[None])
        prediction = session.model(x, t.to(x.device), **text, return_dict=False)[0]
        return (self.trained(prediction) - noise).square().mean((1, 2, 3))


class Head(Plugin):
    name = "head"
    paper = Paper("a benchmark", "", "a head")
    families = ("sd",)
    neutral: ClassVar[dict[str, Any]] = {}
    fitting = HeadFitter

    def denoise(self, call: Any, next: Any) -> Any:
        return next(call)


def ours(pipe: Any, examples: list[Example], steps: int, batch: int) -> float:
    """Seconds of a step."""
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        plan = FitPlan(steps + WARM, batch)
        done: Any = lambda phase, step, total: times.append(now(pipe))  # noqa: E731
        fit(pipe, Head(), examples, CallSettings(steps=10), Path(folder) / "head.safetensors", plan, on_progress=done)
    return (times[-2] - times[WARM - 1]) / (len(times) - 1 - WARM)  # without the last, which writes the file's state


def bare(pipe: Any, examples: list[Example], steps: int, batch: int) -> float:
    """Seconds of a step."""
    accelerator, plan = Accelerator(device_placement=False), FitPlan(steps + WARM, batch)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    pipe.scheduler.set_timesteps(10)
    model = head(pipe.unet.config.out_channels).to(pipe.device)
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=1e-4))
    size = own_size(pipe)
    assert size is not None
    times = []
    for step in range(steps + WARM):
        taken = [examples[row] for row in plan.rows(step, len(examples))]
        pixels = pixels_of(taken, *size)
        assert pixels is not None
        with torch.no_grad():
            x0 = pipe.vae.encode(pixels.to(pipe.device)).latent_dist.mode() * pipe.vae.config.scaling_factor
            text, _ = pipe.encode_prompt([each.prompt for each in taken], pipe.device, 1, False)
        noise = torch.randn(x0.shape).to(x0)
        t = pipe.scheduler.timesteps[int(torch.randint(10, ()))]
        x = pipe.scheduler.add_noise(x0, noise, t[None])
        loss = (model(pipe.unet(x, t, text, return_dict=False)[0]) - noise).square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        float(loss)  # looked at for NaN, as ours is
        times.append(now(pipe))
    return (times[-2] - times[WARM - 1]) / (len(times) - 1 - WARM)


def main(
    pipeline: Annotated[str, typer.Option(help="A pipeline of the family sd.")] = "emoji-sd",
    steps: Annotated[int, typer.Option(min=3)] = 10,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    device: Annotated[str, typer.Option()] = "cpu",
) -> None:
    """Print the throughput of each round and the median share."""
    pipe = unload(load_pipeline(pipeline)).to(device)
    examples = [Example(f"a big apple on a background of colour {i}", Image.effect_noise((64, 64), i + 1)) for i in range(4 * batch)]
    shares = []
    for number in range(rounds):
        b, o = bare(pipe, examples, steps, batch), ours(pipe, examples, steps, batch)
        shares.append(b / o)
        print(f"round {number}: bare {1 / b:.2f} steps/s, fit {1 / o:.2f} steps/s: {b / o:.1%}")
    print(f"median: {statistics.median(shares):.1%} of the bare loop ({device}, {torch.get_num_threads()} threads)")


if __name__ == "__main__":
    typer.run(main)
