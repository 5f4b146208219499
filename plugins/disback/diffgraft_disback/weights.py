"""The published student: a whole U-Net of Stable Diffusion XL, under diffusers' own keys (SYZhang0805/DisBack, ``SDXL_DisBack.bin``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffgraft.methods.layouts import Layout
from diffgraft.methods.unet_keys import unet_keys
from torch import Tensor, nn

LAYOUT = Layout(unet_keys(time=True), small={"w": 8, "c": 4, "d": 64, "p": 80, "m": 1, "n": 2})


def misfits(state: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """What of a file has no place in ``model``, and what of it would be left without."""
    here = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wrong = [f"{name} is {list(state[name].shape)}, here {list(here[name])}" for name in here.keys() & state.keys()
             if tuple(state[name].shape) != here[name]]  # fmt: skip
    wrong += [f"{name} has no place here" for name in state.keys() - here.keys()]
    return sorted(wrong + [f"{name} is missing" for name in here.keys() - state.keys()])


def filled(model: Any, state: Mapping[str, Tensor]) -> nn.Module:
    """A U-Net like ``model`` with these weights, in its dtypes and on its device; ``model`` is not touched."""
    with torch.device("meta"):
        new = type(model).from_config(model.config)
    own = model.state_dict()
    new.load_state_dict({name: value.to(own[name].device, own[name].dtype, copy=True) for name, value in state.items()}, assign=True)
    return new.requires_grad_(False).train(model.training)  # type: ignore[no-any-return]
