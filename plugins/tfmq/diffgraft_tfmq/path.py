"""The temporal information block of a live U-Net, and inputs that have a scale for each timestep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffgraft import DenoiseCall, Unsupported, root_of
from diffgraft.methods.quant.affine import Scale
from diffgraft.methods.quant.layers import QuantLinear, SeveralScales
from torch import Tensor, nn

from diffgraft_tfmq.method import features

OTHERS = ("time_embed_act", "time_embedding.cond_proj")
"""What U-Nets may have on their time path that the paper's have not."""


def ensure_known(unet: nn.Module) -> None:
    """Raises Unsupported where the time path is another one than TFMQ's."""
    root: Any = root_of(unet)
    if getattr(root, "time_embedding", None) is None or getattr(root, "time_proj", None) is None:
        raise Unsupported(f"tfmq: {type(root).__name__} has no time embedding")
    other = next((name for name in OTHERS if attrgetter_or_none(root, name) is not None), None)
    config = root.config
    if config.get("class_embeddings_concat"):
        other = "class_embeddings_concat"
    if config.get("addition_embed_type") == "image_hint":
        other = "addition_embed_type image_hint"
    if other:
        raise Unsupported(f"tfmq: {type(root).__name__} has {other}, and its temporal features are not those of the paper's models")


def attrgetter_or_none(thing: Any, path: str) -> Any:
    """An attribute of an attribute, or None."""
    for name in path.split("."):
        thing = getattr(thing, name, None)
    return thing


def added(call: DenoiseCall) -> Tensor:
    """What this call adds to its timestep's embedding [rows, channels], of classes or of a pooled text; [1, 0] where that is nothing."""
    root: Any = root_of(call.model)
    parts = []
    if hasattr(root, "get_aug_embed"):
        emb = torch.zeros(1, device=call.sample.device, dtype=call.sample.dtype)
        told = call.get("encoder_hidden_states"), call.get("added_cond_kwargs")
        parts = [
            root.get_class_embed(sample=call.sample, class_labels=call.get("class_labels")),
            root.get_aug_embed(emb=emb, encoder_hidden_states=told[0], added_cond_kwargs=told[1]),
        ]
    elif getattr(root, "class_embedding", None) is not None:
        labels = call["class_labels"]
        timed = root.config["class_embed_type"] == "timestep"
        parts = [root.class_embedding(root.time_proj(labels).to(call.sample.dtype) if timed else labels)]
    found = [part for part in parts if part is not None]
    return torch.stack(found).sum(0) if found else call.sample.new_zeros(1, 0)


def watched(call: DenoiseCall, tell: Callable[[Any], None]) -> DenoiseCall:
    """A copy that tells the timestep which the denoiser is given, each time that it is asked: also where plugins further in edit it."""
    new: DenoiseCall = call.replace()
    inner, name, position = call.inner, call.family.timestep, call.names.get(call.family.timestep)

    def asking(*args: Any, **kwargs: Any) -> Any:
        tell(kwargs[name] if name in kwargs or position is None else args[position])
        return inner(*args, **kwargs)

    new.inner = asking  # check: allow foreign_writes because the copy is this call's own
    return new


class TimedScales(SeveralScales):
    """Puts an input on the grid of its timestep; where the rows of a batch are at timesteps of their own, each row on that of its own."""

    def forward(self, x: Tensor) -> Tensor:
        at = self.pick()
        if not isinstance(at, Tensor) or at.ndim == 0 or self.fixed is None or x.numel() == 0:
            return super().forward(x)
        if len(at) != len(x):
            raise Unsupported(f"tfmq: the timestep has {len(at)} values, and a layer gets {len(x)} rows: which is whose is not known")
        rows = (len(x),) + (1,) * (x.ndim - 1)
        scale = Scale(*(each.index_select(0, at).reshape(rows) for each in self.fixed))
        return (self.grid.through if torch.is_grad_enabled() and x.requires_grad else self.grid.rounded)(x, scale)


class TimePath:
    """g(t): the time embedding and each block's projection of it, on the modules of the U-Net that are there now, LoRA included.

    ``at`` which of the calibrated timesteps it is asked at, for inputs that have their scales already.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.root: Any = root_of(unet)
        self.at = 0
        self.blocks: list[Any] = [block for block in self.root.modules() if isinstance(getattr(block, "time_emb_proj", None), nn.Module)]

    def pick(self) -> int:
        """``at``, for the layers."""
        return self.at

    def stages(self) -> list[list[QuantLinear]]:
        """Its quantised layers, in the order in which the inputs of one depend on the ones before."""
        mlp, projections = self.root.time_embedding, [block.time_emb_proj for block in self.blocks]
        found = [[layer_in(mlp.linear_1)], [layer_in(mlp.linear_2)], [layer_in(each) for each in projections]]
        return [[layer for layer in stage if layer is not None] for stage in found]

    def __call__(self, t: Tensor, add: Tensor) -> Tensor:
        """All g_i side by side [n, channels], for timesteps [n] and what is added to their embedding [n, channels or 0]."""
        parameter = next(self.root.parameters())
        emb = self.root.time_embedding(self.root.time_proj(t.to(parameter.device)).to(parameter.dtype))
        emb = emb + add.to(emb) if add.shape[1] else emb
        return features(
            [block.time_emb_proj(emb if getattr(block, "skip_time_act", False) else block.nonlinearity(emb)) for block in self.blocks]
        )


def layer_in(module: nn.Module) -> QuantLinear | None:
    """The quantised layer itself, or that under a LoRA; None where the layer stays floats."""
    base = getattr(module, "base_layer", module)
    return base if isinstance(base, QuantLinear) else None


def ranges_of(layer: QuantLinear, ask: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """(least, largest) value of what comes into a layer while ``ask`` runs."""
    seen: list[Tensor] = []
    layer.show(lambda x: seen.append(torch.stack([x.detach().amin(), x.detach().amax()]).float()))
    try:
        ask()
    finally:
        layer.show(None)
    both = torch.stack(seen)
    return both[:, 0].amin(), both[:, 1].amax()
