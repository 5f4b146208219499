"""Drafts: a video in any of the usual forms, or a function that renders it, to pixels; and to the latents of the pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffgraft import ConfigError, Family, Unsupported
from diffgraft.methods.decoding import to_latents
from diffgraft.methods.inputs import parameters
from diffusers import AutoencoderKL
from PIL import Image, ImageSequence
from torch import Tensor

NAME = "plugin 'videoscene_leap': draft"
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
MOVING = {".gif", ".webp", ".apng", ".png"}
"""Files that hold frames and that PIL reads."""


FILMS = {".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"}
"""Files that imageio reads."""


class Size(NamedTuple):
    """Of a video, in frames and pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.height} x {self.width}"


class Grid(NamedTuple):
    """What a pipeline's videos are multiples of: frames are 1 + a multiple of ``time``, sides a multiple of ``side``."""

    time: int
    side: int


Render = Callable[[str | None, int, int, int], Any]
"""(prompt or None, frames, height, width) -> a video."""


def moving_square(prompt: str | None, frames: int, height: int, width: int) -> np.ndarray:
    """A draft of no meaning, for tests: a bright square that goes to the right over grey. uint8 [frames, height, width, 3]."""
    video = np.full((frames, height, width, 3), 96, dtype=np.uint8)
    side = max(height // 3, 1)
    for i in range(frames):
        left = round((width - side) * i / max(frames - 1, 1))
        video[i, height // 3 : height // 3 + side, left : left + side] = (240, 200, 40)
    return video


# forms --------------------------------------------------------------------------------------------------------------------------------


def ensure_form(draft: Any) -> None:
    """Refuse what no video can be read from, by its form alone.

    Raises:
        ValueError: it is something else than a tensor, an array, pictures, a path, a function, or a list of these.
    """
    if isinstance(draft, (Tensor, np.ndarray)):
        if draft.ndim not in (4, 5):
            raise ValueError(f"a video has 4 axes and a batch of videos 5, and this one has {draft.ndim}: {tuple(draft.shape)}")
    elif isinstance(draft, (list, tuple)):
        if not draft:
            raise ValueError("there is no video in an empty list")
    elif isinstance(draft, (str, Path)):
        if not str(draft).strip():
            raise ValueError("an empty path names no video; none: off")
    elif callable(draft):
        ensure_renders(draft)
    else:
        raise ValueError(f"{type(draft).__name__} is no video: give frames (tensor, array, pictures), a path, or a function that renders")


def ensure_renders(draft: Callable[..., Any]) -> None:
    """Refuse a function that cannot be called as a draft is.

    Raises:
        ValueError: by its signature, where it has one.
    """
    try:
        signature = inspect.signature(draft)
    except (TypeError, ValueError):  # a built-in without one
        return
    try:
        signature.bind(None, 1, 1, 1)
    except TypeError as error:
        raise ValueError(f"a function is called as draft(prompt, frames, height, width), and this one is not: {error}") from None


def ensure_there(draft: Any) -> None:
    """Refuse paths that name nothing, before a model is touched.

    Raises:
        ConfigError: with the path.
    """
    if isinstance(draft, (str, Path)) and not exists(Path(draft)):
        raise ConfigError(f"{NAME} = {str(draft)!r}: there is no such file or folder (from {str(Path.cwd())!r})")
    if isinstance(draft, (list, tuple)):
        for each in draft:
            ensure_there(each)


def exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long
        return False


def rendered(draft: Callable[..., Any], prompt: str | None, size: Size) -> Any:
    """What the user's function makes.

    Raises:
        ConfigError: it raised, and what is the cause of this one.
    """
    try:
        return draft(prompt, *size)
    except Exception as error:
        raise ConfigError(f"{NAME}: the function that renders it raised {type(error).__name__} for {size}: {error}") from error


def videos_of(draft: Any) -> list[Tensor]:
    """All videos of a draft [3, frames, height, width], float32 in -1 to 1.

    Args:
        draft: one video or several: tensors [(videos,) frames, 3, height, width] in 0 to 1, arrays [(videos,) frames, height, width, 3]
            in 0 to 1 or uint8, lists of PIL pictures, paths (a folder of pictures, .gif, .npy, or what imageio reads), lists of these.

    Raises:
        ConfigError: something in it is no video, a file cannot be read, frames of one video have different sizes, or values are outside
            their range.
    """
    try:
        ensure_form(draft)
    except ValueError as error:
        raise ConfigError(f"{NAME}: {error}") from None
    if callable(draft):
        raise ConfigError(f"{NAME}: a function is given alone, not among videos: it is called for each prompt")
    if isinstance(draft, (str, Path)):
        return videos_of(read(Path(draft)))
    if isinstance(draft, (Tensor, np.ndarray)):
        return [video_of(each) for each in (draft if draft.ndim == 5 else [draft])]
    if isinstance(draft[0], Image.Image) or (isinstance(draft[0], (Tensor, np.ndarray)) and draft[0].ndim == 3):
        return [video_of(draft)]
    return [video for each in draft for video in videos_of(each)]


def video_of(frames: Any) -> Tensor:
    """One video [3, frames, height, width] in -1 to 1."""
    if isinstance(frames, (list, tuple)):
        parts = [np.asarray(frame.convert("RGB")) if isinstance(frame, Image.Image) else frame for frame in frames]
        if len(shapes := {tuple(part.shape) for part in parts}) > 1:
            raise ConfigError(f"{NAME}: its frames have different sizes: {', '.join(map(str, sorted(shapes)))}")
        frames = torch.stack(list(parts)) if isinstance(parts[0], Tensor) else np.stack(parts)
    if isinstance(frames, np.ndarray):
        frames = torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, 1)
    if frames.ndim != 4 or frames.shape[1] != 3 or not frames.numel():
        raise ConfigError(f"{NAME}: three colours are expected (axis 1 of a tensor, the last of an array), not {tuple(frames.shape)}")
    x = frames.detach().float() / (255 if frames.dtype == torch.uint8 else 1)
    low, high = float(x.min()), float(x.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ConfigError(f"{NAME}: its values go from {low:.3g} to {high:.3g}; give 0 to 1 (as pipelines do), or uint8 of 0 to 255")
    return x.movedim(1, 0) * 2 - 1


def read(path: Path) -> Any:
    """The frames of a file, or of a folder of pictures in the order of their names.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
            if not files:
                raise ConfigError(f"{NAME} = {str(path)!r}: no pictures are in this folder")
            return [Image.open(file).convert("RGB") for file in files]
        if path.suffix.lower() == ".npy":
            return array(path)
        if path.suffix.lower() in MOVING:
            with Image.open(path) as image:
                return [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
        return films(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{NAME} = {str(path)!r}: {error}") from None


def array(path: Path) -> Any:
    """A .npy file's array."""
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError):  # numpy's advice is to unpickle it
        raise ConfigError(
            f"{NAME} = {str(path)!r}: it holds no plain array: np.save one of [frames, height, width, 3], in 0 to 1 or uint8"
        ) from None


def films(path: Path) -> list[Image.Image]:
    """Frames of a film, which diffusers has imageio read."""
    if not path.is_file():
        raise ConfigError(f"{NAME} = {str(path)!r}: there is no such file")
    if path.suffix.lower() not in FILMS:
        raise ConfigError(f"{NAME} = {str(path)!r}: give a folder of pictures, .gif, .npy, or a film ({', '.join(sorted(FILMS))})")
    from diffusers.utils import load_video

    try:
        return [frame.convert("RGB") for frame in load_video(str(path))]
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{NAME} = {str(path)!r}: films are read by imageio: pip install imageio imageio-ffmpeg ({error})") from None


# sizes --------------------------------------------------------------------------------------------------------------------------------


def grid_of(pipe: Any, family: Family) -> Grid:
    """What frames and sides of this pipeline's videos are multiples of."""

    def first(*names: str) -> int:
        return next((int(value) for name in names if (value := getattr(pipe, name, None))), 1)

    time = first("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
    side = first("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")
    patch = getattr(pipe, family.denoisers[0]).config.get("patch_size", 1)
    return Grid(time, side * int(patch[-1] if isinstance(patch, (list, tuple)) else patch))


def size_of(draft: Tensor) -> Size:
    return Size(*draft.shape[1:])


def ensure_size(size: Size, grid: Grid, said: dict[str, int]) -> None:
    """Hold a draft's size against what the call says and what the autoencoder keeps.

    Raises:
        ConfigError: they are different.
    """
    draft = {"num_frames": size.frames, "height": size.height, "width": size.width}
    if other := [f"{name} = {value}, and the draft has {draft[name]}" for name, value in said.items() if value != draft[name]]:
        raise ConfigError(f"{NAME}: {size}: the call says {'; '.join(other)}. Leave these out, or render the draft in the call's size")
    if (size.frames - 1) % grid.time or size.height % grid.side or size.width % grid.side:
        raise ConfigError(
            f"{NAME}: {size}: this pipeline makes videos of 1 + a multiple of {grid.time} frames, and of sides that are multiples of "
            f"{grid.side}; render the draft in such a size"
        )


def usual_size(pipe: Any, family: Family, said: dict[str, int]) -> Size:
    """The size of the call's videos: what it says, else what the pipeline takes."""
    known, config = parameters(pipe), getattr(pipe, family.denoisers[0]).config
    factor = int(getattr(pipe, "vae_scale_factor_spatial", 0) or getattr(pipe, "vae_scale_factor", 1))

    def of(name: str, *keys: str) -> int:
        if (value := said.get(name) or known[name].default) is not None:
            return int(value)
        own = [int(config[key]) for key in keys if config.get(key)]
        if not own:
            raise ConfigError(f"{NAME}: a function renders in the call's size: say {name}")
        return own[0] * (1 if name == "num_frames" else factor)

    sides = of("height", "sample_height", "sample_size"), of("width", "sample_width", "sample_size")
    return Size(of("num_frames", "sample_frames"), *sides)


# latents ------------------------------------------------------------------------------------------------------------------------------


def ensure_encodes(pipe: Any, family: Family) -> None:
    """Refuse a pipeline whose way from a video to latents is not known here.

    Raises:
        Unsupported: with the reason.
    """
    if getattr(pipe, "vae", None) is None:
        raise Unsupported(f"videoscene_leap: {type(pipe).__name__} has no autoencoder, and a draft is encoded by it")


@torch.no_grad()
def encode(pipe: Any, family: Family, pixels: Tensor) -> Tensor:
    """Clean latents [n, ...] of videos [n, 3, frames, height, width] in -1 to 1, in the layout of ``scheduler.step``, at the mode of the
    autoencoder's posterior; one video at a time, as many as there are fit into memory."""
    return torch.cat([_encode(pipe, family, video[None].to(pipe._execution_device)) for video in pixels])


def _encode(pipe: Any, family: Family, video: Tensor) -> Tensor:
    vae = pipe.vae
    if family.latents == "bcfhw" and vae.config.get("latents_mean") is not None:  # Wan
        return to_latents(pipe, family, video)
    video = video.to(vae.dtype)
    if isinstance(vae, AutoencoderKL):  # AnimateDiff: one frame at a time
        z = vae.encode(video[0].movedim(1, 0)).latent_dist.mode().movedim(0, 1)[None]
        return z * vae.config["scaling_factor"]  # type: ignore[no-any-return]
    z = vae.encode(video).latent_dist.mode()
    if family.latents == "bfchw":  # CogVideoX
        return (z * vae.config["scaling_factor"]).movedim(2, 1)  # type: ignore[no-any-return]
    z = pipe._normalize_latents(z, vae.latents_mean, vae.latents_std, vae.config["scaling_factor"])  # LTX
    return pipe._pack_latents(z, pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size)  # type: ignore[no-any-return]


def rows(latents: Tensor, wanted: Sequence[int], what: str) -> Tensor:
    """``latents`` [drafts, ...] spread over a run's batch, several videos of a prompt one after the other.

    Raises:
        ConfigError: they are of another shape than the run's.
    """
    n, batch = len(latents), wanted[0]
    if batch % n or tuple(latents.shape[1:]) != tuple(wanted[1:]):
        raise ConfigError(
            f"{NAME}: {what} is {list(latents.shape)} as latents, and this run's are {list(wanted)}: render it in the size of the call"
        )
    return latents.repeat_interleave(batch // n, 0)
