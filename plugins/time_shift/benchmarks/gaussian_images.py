"""Time-Shift on data whose exact denoiser is known: stationary Gaussian "images" with the 1/f^2 spectrum of photographs.

    python plugins/time_shift/benchmarks/gaussian_images.py [--steps 10] [--count 256]

The denoiser is the Wiener filter (exact), or the same with an error put in: its noise prediction is off by a factor, or it carries
noise of its own. Prints, for DDIM without and with time_shift, the squared Wasserstein-2 distance per pixel between the spectrum of the
samples and that of the data (x 1000, smaller is better) and the variance of the samples. Nothing is random but the start noise and the
planted error, both seeded.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch
from diffgraft import load_pipeline
from diffusers import ConfigMixin, DDIMPipeline, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor


class WienerUNet(ModelMixin, ConfigMixin):
    """The exact noise prediction for Gaussian data with power spectrum S: eps = sqrt(b) X / (a S + b) in Fourier space.

    ``factor`` multiplies the prediction, ``noise`` adds white noise of that standard deviation (seeded by the time): planted errors.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 16,
        in_channels: int = 3,
        variance: float = 0.25,
        slope: float = 2.0,
        factor: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        f = torch.fft.fftfreq(sample_size)
        radius = (f[:, None] ** 2 + f[None] ** 2).sqrt().clamp(min=1 / sample_size)
        power = radius**-slope if slope else torch.ones_like(radius)
        self.register_buffer("spectrum", variance * power / power.mean())
        self.register_buffer("abar", DDIMScheduler().alphas_cumprod.clone())
        self.scale = torch.nn.Parameter(torch.ones(()))  # ModelMixin asks a parameter for its dtype

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> Any:
        t = torch.as_tensor(timestep).expand(sample.shape[0])
        a = self.abar[t.long()].reshape(-1, 1, 1, 1)
        gain = (1 - a).sqrt() / (a * self.spectrum + 1 - a)
        eps = torch.fft.ifft2(gain * torch.fft.fft2(sample)).real * self.config.factor * self.scale
        if self.config.noise:
            generator = torch.Generator().manual_seed(int(t[0]) // 5)
            eps = eps + self.config.noise * torch.randn(eps.shape, generator=generator)
        return UNet2DOutput(sample=eps) if return_dict else (eps,)


def pipeline(**model: Any) -> DDIMPipeline:
    """DDIM on the exact denoiser."""
    pipe = DDIMPipeline(WienerUNet(**model).requires_grad_(False), DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: DDIMPipeline, count: int, steps: int) -> Tensor:
    """``count`` samples, not clamped to the range of a picture."""
    kept: list[Any] = []
    step = pipe.scheduler.step

    @functools.wraps(step)
    def keeping(*args: Any, **kwargs: Any) -> Any:
        kept.append(step(*args, **kwargs))
        return kept[-1]

    pipe.scheduler.step = keeping
    try:
        pipe(batch_size=count, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="np")
    finally:
        del pipe.scheduler.step
    return kept[-1].prev_sample


def distance(x: Tensor, spectrum: Tensor) -> float:
    """Wasserstein-2 between two stationary Gaussians, squared and per pixel, x 1000: mean_f (sqrt(S) - sqrt(S_hat))^2."""
    power = torch.fft.fft2(x, norm="ortho").abs().square().mean(dim=(0, 1))
    return 1000 * float((power.sqrt() - spectrum.sqrt()).square().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--count", type=int, default=256)
    args = parser.parse_args()
    errors = {"exact": {}, "eps x 0.99": {"factor": 0.99}, "eps x 1.01": {"factor": 1.01}, "eps + 0.1 noise": {"noise": 0.1}}
    errors |= {"white data, exact": {"slope": 0.0}, "white data, eps x 0.99": {"slope": 0.0, "factor": 0.99}}
    errors |= {"white data, eps x 1.01": {"slope": 0.0, "factor": 1.01}}
    settings = {
        "without": None,
        "sigma_d^2 = 0 (paper)": {"data_variance": 0.0},
        "sigma_d^2 = 0.25 (true)": {"data_variance": 0.25},
        "auto": {},
        "target, 0 (official)": {"mode": "target", "data_variance": 0.0},
        "target, 0.25": {"mode": "target", "data_variance": 0.25},
    }
    print(f"DDIM, {args.steps} steps, {args.count} samples of 3 x 16 x 16, window 30, cutoff 300; true variance 0.25")
    for name, error in errors.items():
        print(f"\n{name}\n  {'':26}{'W2^2 x 1000':>12}{'variance':>10}  note")
        for label, knobs in settings.items():
            pipe = pipeline(**error)
            if knobs is not None:
                pipe = load_pipeline(pipe, plugins=[("time_shift", knobs)])
            x = sample(pipe, args.count, args.steps)
            note = pipe.plugins.report().plugins["time_shift"].notes[-1] if knobs is not None else ""
            note = note.replace(" (samples x steps at t > cutoff)", "").replace(" on average; ", "; ")
            print(f"  {label:26}{distance(x, pipe.unet.spectrum):12.3f}{float(x.var()):10.4f}  {note[:60]}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
