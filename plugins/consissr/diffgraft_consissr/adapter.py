"""The hybrid prompt adapter: the keys of its files, the picture's tokens, and what it adds to a layer of cross-attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffgraft import ArtefactMismatch, AttentionCall, ConfigError, Unsupported
from diffgraft.methods.layouts import Layout
from diffgraft.methods.published import spec_of
from diffgraft.methods.schema import Holds
from diffgraft.methods.through import Through
from diffgraft.methods.weights import plain_values
from torch import Tensor, nn

from diffgraft_consissr.method import image_part, resized

LOOKS = 16
"""Side, in pixels, of what the adapter's own eye sees."""
PATCH = 4
"""Side of the squares of that of which each becomes a token."""
PUBLISHED = "model.diffusion_model."
"""The authors' checkpoint is a whole ControlLDM; of it the U-Net's share of the adapter is read."""


def original_names() -> dict[str, str]:
    """Layers of Stable Diffusion's U-Net by their names in the authors' file -> by their order here: down, middle, up."""
    there = [f"input_blocks.{i}.1" for i in (1, 2, 4, 5, 7, 8)] + ["middle_block.1"] + [f"output_blocks.{i}.1" for i in range(3, 12)]
    return {f"{PUBLISHED}{name}.transformer_blocks.0.attn2.": f"layers.{i}." for i, name in enumerate(there)}


KEYS: dict[str, tuple[Any, ...]] = {
    "layers.{i}.to_k_ip.weight": ("c{i}", "d"),
    "layers.{i}.to_v_ip.weight": ("c{i}", "d"),
    "layers.{i}.to_out_ip.0.weight": ("h{i}", "h{i}"),
    "layers.{i}.to_out_ip.0.bias": ("h{i}",),
    "tokens.0.weight": ("f",),
    "tokens.0.bias": ("f",),
    "tokens.1.weight": ("d", "f"),
    "tokens.1.bias": ("d",),
    "tokens.4.weight": ("d", "d"),
    "tokens.4.bias": ("d",),
    "tokens.6.weight": ("d", "d"),
    "tokens.6.bias": ("d",),
    "eye.places": ((LOOKS // PATCH) ** 2, "f"),
    "eye.0.weight": ("e", 3, 3, 3),
    "eye.0.bias": ("e",),
    "eye.2.weight": ("e", "e", 3, 3),
    "eye.2.bias": ("e",),
    "eye.4.weight": ("f", "e", PATCH, PATCH),
    "eye.4.bias": ("f",),
}
LAYOUT = Layout(
    KEYS,
    renames={**original_names(), "cond_stage_model.ft_layers_4.": "tokens."},
    optional=("eye.*",),
    ignored=("model.*", "control_model.*", "first_stage_model.*", "cond_encoder.*", "cond_stage_model.*", "*alphas_cumprod*", "betas",
             "log_one_minus_*", "posterior_*", "sqrt_*", "logvar", "scale_factor"),
    inside=("state_dict",),
    small={"i": 7, "d": 32, "f": 16, "e": 4} | {f"c{i}": 32 for i in range(7)} | {f"h{i}": 16 for i in range(7)},
)  # fmt: skip
"""What the authors publish, as their code names it, and what ``diffgraft fit consissr`` writes (with an eye of its own)."""


class AsPublished(Holds):
    """The same of what a fit wrote."""

    def fault(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str | None:
        faults = LAYOUT.compare({key: spec_of(value) for key, value in tensors.items()}).faults
        wrong = (f"{key} ({group}): {words}" for group, keys in faults.items() for key, words in keys.items())
        infinite = (f"{key} holds numbers that are not finite" for key, value in tensors.items() if not bool(value.isfinite().all()))
        return next(wrong, None) or next(infinite, None)


# what is learned -----------------------------------------------------------------------------------------------------------------------


class ImageLayer(nn.Module):
    """Of one layer of cross-attention: W'_k, W'_v and W. The first two begin as those of the text, W at zero."""

    def __init__(self, attn: Any) -> None:
        super().__init__()
        inner, width = attn.to_k.weight.shape
        self.to_k_ip = nn.Linear(width, inner, bias=False)
        self.to_v_ip = nn.Linear(width, inner, bias=False)
        self.to_out_ip = nn.Sequential(nn.Linear(inner // attn.heads, inner // attn.heads))
        with torch.no_grad():
            self.to_k_ip.weight.copy_(plain_values(attn.to_k.weight))
            self.to_v_ip.weight.copy_(plain_values(attn.to_v.weight))
        for value in self.to_out_ip.parameters():
            nn.init.zeros_(value)


class Eye(nn.Sequential):
    """A picture [n, 3, LOOKS, LOOKS] in -1 to 1 -> a feature for each of its squares [n, squares, width]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(
            nn.Conv2d(3, channels, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, width, PATCH, PATCH),
        )
        self.places = nn.Parameter(0.02 * torch.randn((LOOKS // PATCH) ** 2, width))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(2).transpose(1, 2) + self.places  # type: ignore[no-any-return]


class Adapter(nn.Module):
    """All of it, for a denoiser's layers of cross-attention in order."""

    def __init__(self, layers: Sequence[Any], channels: int, width: int) -> None:
        super().__init__()
        d = layers[0].to_k.weight.shape[1]
        self.layers = nn.ModuleList(ImageLayer(layer) for layer in layers)
        self.tokens = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, d), nn.GELU(), nn.Identity(), nn.Linear(d, d), nn.GELU(), nn.Linear(d, d)
        )  # number 3 is a reshape in the published one
        self.eye = Eye(channels, width)


# what it computes ----------------------------------------------------------------------------------------------------------------------


def image_tokens(state: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """c_img [n, tokens, d] of a picture's features [n, tokens, f]."""
    x = F.layer_norm(features, features.shape[-1:], state["tokens.0.weight"], state["tokens.0.bias"])
    x = F.gelu(F.linear(x, state["tokens.1.weight"], state["tokens.1.bias"]))
    x = F.gelu(F.linear(x, state["tokens.4.weight"], state["tokens.4.bias"]))
    return F.linear(x, state["tokens.6.weight"], state["tokens.6.bias"])


def seen(state: Mapping[str, Tensor], pixels: Tensor) -> Tensor:
    """The features [n, squares, f] that the adapter's own eye has of pixels [n, 3, height, width] in -1 to 1."""
    x = resized(pixels, (LOOKS, LOOKS))
    x = F.silu(F.conv2d(x, state["eye.0.weight"], state["eye.0.bias"], padding=1))
    x = F.silu(F.conv2d(x, state["eye.2.weight"], state["eye.2.bias"], padding=1))
    x = F.conv2d(x, state["eye.4.weight"], state["eye.4.bias"], stride=PATCH)
    return x.flatten(2).transpose(1, 2) + state["eye.places"]


Values = Mapping[str, Tensor]
"""Of one layer: "to_k_ip.weight", "to_v_ip.weight", "to_out_ip.0.weight", "to_out_ip.0.bias"."""


def ask_with_image(call: AttentionCall, next: Any, values: Values, tokens: Tensor, scale: float) -> Any:
    """The layer's answer with lambda W Softmax(Q K'^T) V' added before its output projection; queries, text, LoRA, and an IP-Adapter's
    picture are what they were.

    Args:
        tokens: c_img [samples, tokens, d]; the layer's rows are these samples once, or once for each branch of guidance.
    """
    attn: Any = call["attn"]
    queries: list[Tensor] = []

    def keep(x: Tensor, *rest: Any) -> Tensor:
        queries.append(attn.to_q(x, *rest))
        return queries[-1]

    def project(Z: Tensor, *rest: Any) -> Tensor:
        q = queries[0] if queries else attn.to_q(call["hidden_states"])  # answered by another plugin, without the layer
        c = as_rows(tokens, len(Z)).to(Z)
        k, v = (F.linear(c, values[name].to(Z)) for name in ("to_k_ip.weight", "to_v_ip.weight"))
        more = image_part(q, k, v, values["to_out_ip.0.weight"].to(Z), values["to_out_ip.0.bias"].to(Z), attn.heads)
        return attn.to_out[0](Z + scale * more, *rest)  # type: ignore[no-any-return]

    return next(call.replace(attn=Through(attn, to_q=keep, to_out=(project, *attn.to_out[1:]))))


def as_rows(tokens: Tensor, rows: int) -> Tensor:
    """For each row of a call: the samples, or the samples again for each branch.

    Raises:
        Unsupported: they are neither.
    """
    if rows % len(tokens):
        raise Unsupported(f"consissr: the denoiser is asked for {rows} rows, and there are image tokens of {len(tokens)} samples")
    return tokens.repeat(rows // len(tokens), 1, 1)


def of_layer(tensors: Mapping[str, Tensor], i: int) -> Values:
    front = f"layers.{i}."
    return {key[len(front) :]: value for key, value in tensors.items() if key.startswith(front)}


def has_eye(tensors: Mapping[str, Tensor]) -> bool:
    """Whether an adapter brings its own eye.

    Raises:
        ArtefactMismatch: a part of one.
    """
    missing = [key for key in KEYS if key.startswith("eye.") and key not in tensors]
    if missing and len(missing) < sum(key.startswith("eye.") for key in KEYS):
        raise ArtefactMismatch(f"consissr: its adapter brings a part of an eye: {', '.join(missing)} is missing")
    return not missing


# the model that it is for --------------------------------------------------------------------------------------------------------------


def ordered(layers: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Path -> module, in the order of a U-Net's forward: down, middle, up."""
    place = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    return dict(sorted(layers, key=lambda layer: place.get(layer[0].split(".")[0], 3)))


def cross_layers(denoiser: nn.Module) -> dict[str, Any]:
    """A denoiser's layers of cross-attention, by path, in the order of :func:`ordered`."""
    root = getattr(denoiser, "_orig_mod", denoiser)
    return ordered((path, module) for path, module in root.named_modules() if is_cross(path, module))


def is_cross(path: str, module: Any) -> bool:
    """Whether a module is a layer of attention that reads the text."""
    return callable(getattr(module, "processor", None)) and bool(getattr(module, "is_cross_attention", path.endswith("attn2")))


def ensure_fits(tensors: Mapping[str, Tensor], layers: Sequence[Any]) -> None:
    """Hold an adapter's layers against the denoiser's (modules, in order).

    Raises:
        Unsupported: with the first that differs.
    """
    found = len({key.split(".")[1] for key in tensors if key.startswith("layers.")})
    if found != len(layers):
        raise Unsupported(f"consissr: its adapter is for {found} layers of cross-attention, and this denoiser has {len(layers)}")
    for i, attn in enumerate(layers):
        mine, own = tensors[f"layers.{i}.to_k_ip.weight"].shape, attn.to_k.weight.shape
        d, head = tensors[f"layers.{i}.to_out_ip.0.bias"].shape[0], own[0] // attn.heads
        if mine != own or d != head:
            raise Unsupported(
                f"consissr: its adapter's layer {i} has keys of {list(mine)} and heads of {d}, this denoiser's {list(own)} and {head}: "
                "it was made for another model"
            )


def features_of(vision: Callable[[Tensor], Any], pixels: Tensor, width: int) -> Tensor:
    """What the user's eye has of pixels [n, 3, height, width] in -1 to 1, as [n, tokens, width].

    Raises:
        ConfigError: it gives something else.
    """
    found = vision(pixels)
    found = getattr(found, "image_embeds", found)
    if not isinstance(found, Tensor) or found.ndim not in (2, 3) or len(found) != len(pixels) or found.shape[-1] != width:
        told = f"a tensor of {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ConfigError(f"plugin 'consissr': vision gave {told} for {len(pixels)} pictures; the adapter reads [{len(pixels)}, "
                          f"(tokens,) {width}]")  # fmt: skip
    return found[:, None] if found.ndim == 2 else found
