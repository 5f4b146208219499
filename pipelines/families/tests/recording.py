"""What a tiny pipeline does in one call: the denoiser's calls, the blocks' inputs and outputs, the steps.

The steps of copies of the scheduler after one denoiser call, each of one frame, are one step, of those frames side by side.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffgraft import BlockGroup, Family, Tiny
from diffgraft.installed.anatomy import layers_in
from diffgraft.kernel.speech import heard, prediction_of
from diffgraft.methods.inputs import calling, pictures_in
from diffgraft_pipelines.observe import other_condition
from diffgraft_pipelines.runs import bound
from diffgraft_pipelines.tiny import make
from torch import nn

LAYOUTS = {"bchw": "bchw", "pixels": "bchw", "bcfhw": "bcfhw", "bfchw": "bfchw", "packed": "btc"}


def output(result: Any) -> np.ndarray:
    return np.asarray(result.rgb if hasattr(result, "rgb") else pictures_in(result))


def run(tiny: Tiny, **changes: object) -> np.ndarray:
    return output(calling(tiny.pipe)(**{**tiny.kwargs, **changes}, generator=torch.Generator().manual_seed(0)))


def denoisers(family: Family, pipe: Any) -> list[nn.Module]:
    return [module for name in family.denoisers if (module := getattr(pipe, name, None)) is not None]


def blocks(denoiser: nn.Module, group: BlockGroup) -> list[nn.Module]:
    found = getattr(denoiser, group.path)
    return list(found) if isinstance(found, nn.ModuleList) else [found]


@dataclass
class Call:
    """One forward of a denoiser, as plugins see it."""

    denoiser: int
    inputs: dict[str, Any]
    step: int
    prediction: torch.Tensor | None = None
    companion: torch.Tensor | None = None
    blocks: list[tuple[nn.Module, dict[str, Any], Any]] = field(default_factory=list)


@dataclass
class Record:
    """What plain hooks saw in one run."""

    tiny: Tiny
    image: np.ndarray
    calls: list[Call]
    steps: list[dict[str, Any]]
    layers: list[nn.Module]
    beside: list[dict[str, Any]]
    """Steps of the companion."""


def record(family: Family, tiny: Tiny, **changes: object) -> Record:
    calls: list[Call] = []
    inside: list[bool] = [False]  # a ControlNet may run blocks of the denoiser
    steps: list[dict[str, Any]] = []
    beside: list[dict[str, Any]] = []
    layers: list[nn.Module] = []
    handles = []

    def enter(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given, inside[0] = bound(module, args, kwargs), True
        given |= {name: list(value) for name, value in given.items() if name in family.emptied and value}
        calls.append(Call(index, {**given, **heard(family, given)}, len(steps)))

    def leave(_module: nn.Module, _args: tuple[Any, ...], result: Any) -> None:
        calls[-1].prediction, inside[0] = prediction_of(family, result[0]), False
        calls[-1].companion = result[1] if family.companion else None

    def block(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if inside[0]:
            calls[-1].blocks.append((module, bound(module, args, kwargs), result))

    for index, denoiser in enumerate(denoisers(family, tiny.pipe)):
        handles.append(denoiser.register_forward_pre_hook(functools.partial(enter, index), with_kwargs=True))
        handles.append(denoiser.register_forward_hook(leave))
        for group in family.blocks:
            for module in blocks(denoiser, group):
                handles.append(module.register_forward_hook(block, with_kwargs=True))
                for name in group.layers:
                    for _, _, _, layer in layers_in(module, name):
                        handles.append(layer.register_forward_pre_hook(lambda module, _: layers.append(module)))

    scheduler: Any = tiny.pipe.scheduler  # type: ignore[attr-defined]
    original = type(scheduler).step
    signature = inspect.signature(original)
    frames: list[dict[str, Any]] = []  # of the copies' step in progress

    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        if family.companion and self is not scheduler:
            beside.append(given)
            return original(self, *args, **kwargs)
        assert (self is not scheduler) == family.copied_scheduler
        if self is scheduler:
            steps.append(given)
        else:
            if not steps or steps[-1].get("call") != len(calls):
                frames.clear()
                steps.append({})
            frames.append({name: value.clone() for name, value in given.items() if isinstance(value, torch.Tensor)})
            steps[-1] = {name: side_by_side([frame[name] for frame in frames]) for name in frames[0]} | {"call": len(calls)}
        return original(self, *args, **kwargs)

    type(scheduler).step = step  # on the class: an instance's own is copied with it
    try:
        image = run(tiny, **changes)
    finally:
        type(scheduler).step = original
        for handle in handles:
            handle.remove()
    return Record(tiny, image, calls, steps, layers, beside)


def side_by_side(frames: list[torch.Tensor]) -> torch.Tensor:
    """[b, c, h, w] of each frame -> [b, c, f, h, w]; a time each -> [f]."""
    return torch.stack(frames, dim=2 if frames[0].ndim else 0)


@functools.cache
def seen(family: Family, name: str, how: str = "on") -> Record:
    tiny = make(name)
    if how == "off" and family.guidance.layout != "none":
        return record(family, tiny, **{family.guidance.scale: family.guidance.off})
    return record(family, tiny, **(other_condition(tiny.kwargs) if how == "different" else {}))


def running(family: Family, guided: bool) -> tuple[str, ...]:
    """The branches of a tiny pipeline, which is asked for all optional ones."""
    optional = dict(family.guidance.optional)
    return tuple(name for name in family.guidance.order if guided or name == "cond" or name in optional)


def branches(family: Family, call_group: list[Call], guided: bool = True) -> dict[str, torch.Tensor]:
    """Each branch's prediction in one step, in the layout of ``model_output``."""
    order = running(family, guided)
    if family.guidance.layout == "batched":
        assert call_group[0].prediction is not None
        parts = call_group[0].prediction.chunk(len(order))
    else:
        parts = tuple(call.prediction for call in call_group)
    return dict(zip(order, parts, strict=True))


def layout(family: Family, pipe: Any, call: Call, prediction: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """``branch_prediction`` in words of torch."""
    channels = LAYOUTS[family.latents].index("c")
    if family.branch_prediction == "drop_sigma":
        return prediction.narrow(channels, 0, sample.shape[channels])
    if family.branch_prediction == "first_tokens":
        return prediction[:, : sample.shape[1]]
    if family.branch_prediction == "unpacked_tail":
        size = [call.inputs[name] for name in ("num_frames", "height", "width")]
        return pipe._unpack_latents(prediction, *size)[:, :, 1:]
    return stepped_frames(family, prediction, sample)


def stepped_frames(family: Family, x: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """Of the denoiser's frames those that copies of the scheduler step: given ones (a start picture) come first and stay as they are."""
    return x[:, :, x.shape[2] - sample.shape[2] :] if family.copied_scheduler else x


def equal(first: Any, second: Any) -> bool:
    return first.shape == second.shape and bool((first == second).all())


def changed(value: Any) -> Any:
    """Another value of the same kind for an input of the denoiser."""
    if isinstance(value, dict):
        return {key: changed(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(changed, value))
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype == torch.bool:
        return value.logical_not()
    if value.is_floating_point() and not value.le(1).logical_and(value.ge(0)).all():
        return value + 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    result = value.clone()
    result[..., 0] = 1 - result[..., 0] if value.max() <= 1 else result[..., 0] - 1
    return result
