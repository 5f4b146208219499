"""What a search minimises: how far a candidate's outputs are from what they should be, on fixed prompts and noises.

TrajectoryFitness   mean squared error of the final latents against a many-step run from the same noises: needs no weights, no data
RewardFitness       minus the mean of a reward (see `diffgraft.methods.rewards`)
FrechetFitness      Frechet distance of the pictures' features to those of reference pictures
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from diffgraft.installed.errors import ConfigError, RewardError
from diffgraft.installed.foreign import brief
from diffgraft.methods.calibration import OnProgress
from diffgraft.methods.files import write_atomic
from diffgraft.methods.inputs import CallSettings, Sample, call_arguments, parameters, to_float
from diffgraft.methods.named import find_callable
from diffgraft.methods.rewards import Reward, find_reward

FEATURES = "diffgraft.features"
"""Entry-point group of callables (images) -> features [n, d]."""

Features = Callable[[Sequence[Any]], Any]


class Fitness:
    """Base of what a search minimises.

    wants_latents  whether the pipeline should stop at its latents where it can
    """

    name: ClassVar[str]
    wants_latents: ClassVar[bool] = False

    def describe(self) -> dict[str, Any]:
        """Plain JSON values that tell one fitness from another."""
        return {"name": self.name}

    def prepare(
        self, pipe: Any, samples: Sequence[Sample], settings: CallSettings, batch: int, folder: Path, on_progress: OnProgress | None
    ) -> None:
        """Make what candidates are compared with, once a search; ``folder`` may keep it, so that an interrupted search has it."""

    def loss(self, outputs: Any, prompts: Sequence[str]) -> float:
        """The smaller the better. ``outputs`` are latents [n, ...], or a list of pictures."""
        raise NotImplementedError


class TrajectoryFitness(Fitness):
    """Mean squared error of the final latents (of the pictures, where a pipeline has no latents) to the plain pipeline's with many steps.

    Meant for deterministic samplers: one that draws noise in its steps draws other noise in another number of steps.
    """

    name = "trajectory"
    wants_latents = True

    def __init__(self, reference_steps: int = 50) -> None:
        self.reference_steps = reference_steps
        self.reference = torch.empty(0)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "reference_steps": self.reference_steps}

    def prepare(
        self, pipe: Any, samples: Sequence[Sample], settings: CallSettings, batch: int, folder: Path, on_progress: OnProgress | None
    ) -> None:
        def make() -> Tensor:
            return stacked(make_outputs(pipe, samples, replace(settings, steps=self.reference_steps), batch, True, on_progress))

        self.reference = kept(folder / "reference.safetensors", make)

    def loss(self, outputs: Any, prompts: Sequence[str]) -> float:
        return float((stacked(outputs).double() - self.reference.double()).square().mean())


class RewardFitness(Fitness):
    """Minus the mean of a reward: a callable, a registered name ("emoji_judge") or "package.module:attribute"."""

    name = "reward"

    def __init__(self, reward: Any) -> None:
        self.reward: Reward = find_reward("reward", reward)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "reward": self.reward.name}

    def loss(self, outputs: Any, prompts: Sequence[str]) -> float:
        scores = self.reward(outputs, prompts)
        return -sum(scores) / len(scores)


class FrechetFitness(Fitness):
    """Frechet distance of features to those of ``reference`` pictures [default: the plain pipeline's with many steps, same noises]."""

    name = "frechet"

    def __init__(self, features: Any, reference: Sequence[Any] | None = None, reference_steps: int = 50) -> None:
        self.feature_name, self.features = find_callable("features", features, FEATURES, "features", ("images",))
        self.pictures = reference
        self.reference_steps = reference_steps
        self.reference = torch.empty(0)

    def describe(self) -> dict[str, Any]:
        if self.pictures is None:
            return {"name": self.name, "features": self.feature_name, "reference_steps": self.reference_steps}
        digest = hashlib.sha256(b"".join(to_float(picture).tobytes() for picture in self.pictures)).hexdigest()
        return {"name": self.name, "features": self.feature_name, "reference": digest}

    def of(self, pictures: Sequence[Any]) -> Tensor:
        """Features of pictures [n, d], float64, on the CPU.

        Raises:
            RewardError: not a row a picture, or numbers that are not finite.
        """
        given = self.features(pictures)
        try:
            found = torch.as_tensor(given).detach().to("cpu", torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RewardError(f"features {self.feature_name!r} gave {brief(given)}: give a tensor with a row for each picture") from error
        if found.ndim != 2 or len(found) != len(pictures):
            raise RewardError(f"features {self.feature_name!r} gave {tuple(found.shape)} for {len(pictures)} pictures: give a row each")
        if not torch.isfinite(found).all():
            raise RewardError(f"features {self.feature_name!r} gave numbers that are not finite")
        return found

    def prepare(
        self, pipe: Any, samples: Sequence[Sample], settings: CallSettings, batch: int, folder: Path, on_progress: OnProgress | None
    ) -> None:
        def make() -> Tensor:
            pictures = self.pictures
            if pictures is None:
                pictures = make_outputs(pipe, samples, replace(settings, steps=self.reference_steps), batch, False, on_progress)
            return self.of(pictures)

        if len(samples) < 2 or (self.pictures is not None and len(self.pictures) < 2):
            raise ConfigError("fitness 'frechet' compares distributions: give at least two prompts and two reference pictures")
        self.reference = kept(folder / "reference.safetensors", make)

    def loss(self, outputs: Any, prompts: Sequence[str]) -> float:
        return frechet(self.of(outputs), self.reference)


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2)`` of two sets of features [n, d] and [m, d]; float64 inside.

    With C = R^T R the last trace is the sum of the singular values of R_a R_b^T: no square root of a matrix that is nearly singular.
    """
    a, b = a.double(), b.double()
    roots = [spread(x) for x in (a, b)]
    shared = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    traces = roots[0].square().sum() + roots[1].square().sum() - 2 * shared
    return max(0.0, float((a.mean(0) - b.mean(0)).square().sum() + traces))


def spread(x: Tensor) -> Tensor:
    """R with R^T R = the covariance of the rows of x [n, d]; at most d rows."""
    root = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    return torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root


# running and keeping ---------------------------------------------------------------------------------------------------------------------


def make_outputs(
    pipe: Any, samples: Sequence[Sample], settings: CallSettings, batch: int, latents: bool, on_progress: OnProgress | None = None
) -> Any:
    """Call the pipeline for all samples, ``batch`` at a time: latents [n, ...] on the CPU, or a list of pictures (or videos).

    Latents only where the pipeline hands them out; else its pictures as an array [n, ...].
    """
    latents = latents and "output_type" in parameters(pipe)
    made: list[Any] = []
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        arguments = {**call_arguments(pipe, part, settings), "output_type": "latent" if latents else "pil"}
        if latents and not hasattr(pipe, "vae"):
            arguments["output_type"] = "np"  # pixels are what it denoises
        output = pipe(**arguments, return_dict=False)[0]
        made += [output.detach().float().cpu()] if isinstance(output, Tensor) else [output] if latents else list(output)
        if on_progress:
            on_progress("reference", min(start + batch, len(samples)), len(samples))
    return torch.cat([torch.as_tensor(part) for part in made]) if latents else made


def stacked(outputs: Any) -> Tensor:
    """Latents, or pictures, as one float tensor [n, ...]."""
    return outputs.float() if isinstance(outputs, Tensor) else torch.from_numpy(to_float(outputs))


def kept(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """A tensor that was kept by an interrupted search, or made now and kept."""
    if path.exists():
        try:
            return load_file(path)["reference"]
        except (SafetensorError, OSError, KeyError) as error:
            raise ConfigError(f"{path} cannot be read ({error}): delete {path.parent}, or choose another --out") from error
    value = make().contiguous()
    write_atomic(path, save({"reference": value}))
    return value


def read_pictures(folder: str | os.PathLike[str]) -> list[Any]:
    """All pictures of a folder, by name.

    Raises:
        ConfigError: there is no folder, or no picture in it.
    """
    from PIL import Image

    paths = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp", ".bmp"})
    if not paths:
        raise ConfigError(f"--reference {folder}: no picture there")
    return [Image.open(path).convert("RGB") for path in paths]
