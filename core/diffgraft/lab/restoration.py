"""Restored pictures: measurements from files, how good a result is, and a picture of truth, measurement and result side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffgraft.installed.errors import ConfigError
from diffgraft.lab.metrics import psnr, ssim
from diffgraft.lab.pictures import draw_grid, to_images
from diffgraft.methods.inputs import Pictures
from diffgraft.methods.problems import Problem

ARRAYS = (".npy", ".safetensors")
"""Files of measurements that are no pictures."""
OF_THE_NOISE = 0x5EED
"""Added to the seed of a run: the noise in a simulated measurement is none that the run draws."""


def draws(seed: int) -> torch.Generator:
    """Of the noise in a measurement that is simulated for a run of this seed."""
    return torch.Generator().manual_seed((seed + OF_THE_NOISE) % 2**63)


def read_array(path: Path, option: str) -> Tensor:
    """The one array of a .npy or .safetensors file, as samples; ``option`` says in errors who named it.

    Raises:
        ConfigError: nothing of the kind is there.
    """
    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, allow_pickle=False)
            if array.dtype.kind not in "fiub":
                raise ConfigError(f"{option}: numbers of the kind {array.dtype}; save real ones")
            y = torch.from_numpy(np.ascontiguousarray(array)).float()
        else:
            held = load_file(path)
            if len(held) != 1:
                raise ConfigError(f"{option} holds {len(held)} arrays ({', '.join(held) or 'none'}): save the measurement alone")
            y = next(iter(held.values())).float()
    except (OSError, EOFError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{option} cannot be read: {error}") from None
    return y[None] if y.ndim == 3 else y


def as_pixels(image: Image.Image) -> Tensor:
    """[1, c, h, w] in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / 127.5 - 1
    return pixels[None, None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)[None].contiguous()


def judged(problem: Problem, truth: Tensor | None, made: Pictures) -> list[dict[str, Any]]:
    """For the pseudo-inverse, where there is one, and each picture made [n, frames, h, w, 3] in 0..1: its residual, and where the truth
    [1, c, h, w] is known PSNR in dB and SSIM."""
    rows = [("pseudo-inverse", without_model(problem))] if problem.operator.linear else []
    rows += [(f"result {i}" if len(made) > 1 else "result", samples_of(made[i : i + 1], problem)) for i in range(len(made))]
    found = []
    for name, x in rows:
        row: dict[str, Any] = {"what": name, "residual": float(problem.residual(x).mean())}
        if truth is not None:
            here, there = pictures_of(x), pictures_of(truth)
            row["psnr"], similar = psnr(here, there)[0], ssim(here, there)
            row["ssim"] = None if similar is None else similar[0]
        found.append(row)
    return found


def without_model(problem: Problem) -> Tensor:
    """What the measurement alone says: the pseudo-inverse."""
    return problem.operator.pinv(problem.y[:1])


def samples_of(made: Pictures, problem: Problem) -> Tensor:
    """Pictures or videos [n, frames, h, w, 3] in 0..1 as the operator takes them."""
    x = torch.from_numpy(made).permute(0, 4, 1, 2, 3) * 2 - 1
    x = x[:, : problem.shape[1]]
    return (x if len(problem.shape) == 5 else x[:, :, 0]).to(problem.y)


def pictures_of(x: Tensor) -> Pictures:
    """The way back, within what can be shown."""
    x = x if x.ndim == 5 else x[:, :, None]
    array: Pictures = ((x.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 4, 1).float().numpy()
    return np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array


def shown(y: Tensor) -> Image.Image:
    """A measurement as a picture; what is in no range of pictures is spread from its least to its largest value."""
    channels = y[0] if y.ndim == 4 else y[0].flatten(1, -2)[:, None] if y.ndim == 3 else y[0][:, 0]
    least, most = float(channels.min()), float(channels.max())
    if least < -1.2 or most > 1.2:
        channels = (channels - least) / (most - least) * 2 - 1
    return to_images(pictures_of(channels[None] if len(channels) in (1, 3) else channels[None, :1])[0])[0]


def sheet_of(problem: Problem, truth: Tensor | None, made: Pictures, title: str) -> Image.Image:
    """Truth, measurement, pseudo-inverse and results in a row; of videos the first frame."""
    columns = [] if truth is None else [("truth", to_images(pictures_of(truth)[0])[0])]
    columns.append(("measurement", shown(problem.y)))
    if problem.operator.linear:
        columns.append(("pseudo-inverse", to_images(pictures_of(without_model(problem))[0])[0]))
    columns += [(f"result {i}" if len(made) > 1 else "result", to_images(made[i])[0]) for i in range(min(len(made), 4))]
    return draw_grid(title, "", [name for name, _ in columns], [([""], [image for _, image in columns])])


def table_of(rows: Sequence[Mapping[str, Any]], noise: float) -> Table:
    """For people."""
    known = "psnr" in rows[0]
    table = Table("", *(("PSNR, dB", "SSIM") if known else ()), f"rms of A(x) - y (noise: {noise:g})")
    for row in rows:
        similar = ("-" if row["ssim"] is None else f"{row['ssim']:.3f}",) if known else ()
        table.add_row(row["what"], *((f"{row['psnr']:.1f}", *similar) if known else ()), f"{row['residual']:.4f}")
    return table
