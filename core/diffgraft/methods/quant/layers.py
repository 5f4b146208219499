"""Linear and convolution layers whose weights and inputs lie on grids, and the layers of a model in whose place they come.

A quantised layer keeps the ``weight`` and ``bias`` of the one it stands for, the same objects: it costs no second copy of them to undo it,
and the model is still known by its weights (fingerprints). Beside them it has the rounded weight, which it computes with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffgraft.installed.anatomy import root_of
from diffgraft.installed.errors import ConfigError, Conflict, NotFinite, Unsupported, nearest
from diffgraft.kernel.weights import kept_as
from diffgraft.methods.quant.affine import Scale, UniformAffine, at_index, moved, nearest_scale
from diffgraft.methods.quant.rotation import Rotation
from diffgraft.methods.standing_in import ensure_exchangeable, stand_in

Pick = Callable[[], "Tensor | int | None"]


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear or convolution of a denoiser, and where it is.

    ``path`` on the denoiser as without a LoRA ("blocks.0.attn1.to_q"), ``name`` in its ``parent``, ``model`` the denoiser's attribute.
    """

    path: str
    model: str
    parent: nn.Module
    name: str
    module: nn.Linear | nn.Conv2d

    @property
    def key(self) -> str:
        """Its name in an artefact."""
        return f"{self.model}.{self.path}"


def layers_of(denoisers: Mapping[str, nn.Module], kinds: tuple[type, ...] = (nn.Linear, nn.Conv2d)) -> Iterator[Layer]:
    """The linears and convolutions of the denoisers. Of a layer with a LoRA it is the one under it, and the LoRA's own are none.

    A class that only inherits from these is no such layer: what it does with its weights is not known.

    Raises:
        Unsupported: weights that are quantised already.
        Conflict: a plugin quantises them already.
    """
    for model, denoiser in denoisers.items():
        root = root_of(denoiser)
        for path, module in list(root.named_modules()):
            if isinstance(module, _Quantised) and type(module) not in kinds:
                raise Conflict(f"{model}.{path} is quantised by another plugin already: one quantises a model; take the other off")
            if type(module) in kinds and ".lora_" not in path:
                if how := kept_as(module.weight):
                    raise Unsupported(f"{model}.{path} is kept as {how} already; load plain weights, or leave the plugin out")
                parent, _, name = path.rpartition(".")
                yield Layer(path.replace(".base_layer", ""), model, root.get_submodule(parent), name, module)


def chosen(layers: Sequence[Layer], names: Sequence[str], knob: str) -> list[Layer]:
    """The layers whose path is one of ``names``, or lies under one, or ends in one ("proj_out", "blocks.0", "attn1.to_q").

    Raises:
        ConfigError: a name that no layer has.
    """
    found: list[Layer] = []
    for name in names:
        mine = [layer for layer in layers if f".{name}." in f".{layer.path}."]
        if not mine:
            parts = {layer.path for layer in layers} | {part for layer in layers for part in layer.path.split(".")}
            raise ConfigError(f"{knob} = {name!r}: the model has no such layer{nearest(name, parts)}")
        found += mine
    return found


class Rounder(nn.Module):
    """Puts an input on a grid: on that of a fixed scale (of as many axes as the inputs have), or else on that of what comes in."""

    delta: Tensor | None
    zero: Tensor | None

    def __init__(self, grid: UniformAffine, scale: Scale | None = None) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("delta", None if scale is None else scale.delta, persistent=False)
        self.register_buffer("zero", None if scale is None else scale.zero, persistent=False)

    @property
    def fixed(self) -> Scale | None:
        return None if self.delta is None or self.zero is None else Scale(self.delta, self.zero)

    def fix(self, scale: Scale) -> None:
        """Round by this scale from now on."""
        self.delta, self.zero = scale

    def now(self) -> Scale | None:
        """The fixed scale that this forward takes; a subclass may have several. None: that of what comes in."""
        return self.fixed

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0:  # no tokens: a picture that was not given
            return x
        scale = self.now() or nearest_scale(x.detach(), self.grid)
        learns = torch.is_grad_enabled() and (x.requires_grad or scale.delta.requires_grad)
        return self.grid.through(x, scale) if learns else self.grid.rounded(x, scale)

    def _apply(self, fn: Any, recurse: bool = True) -> Rounder:
        return moved(self, fn)


class SeveralScales(Rounder):
    """Puts an input on the grid that ``pick`` says (of a timestep, of a call), of delta and zero [grids, 1]; on that of its own range where
    it says None: in a run of others, who ask at times of their own."""

    def __init__(self, grid: UniformAffine, scale: Scale, pick: Pick) -> None:
        super().__init__(grid, scale)
        self.pick = pick

    def now(self) -> Scale | None:
        fixed, at = self.fixed, self.pick()
        return None if fixed is None or at is None else Scale(at_index(fixed.delta, at), at_index(fixed.zero, at))


class Weights(nn.Module):
    """A weight on a grid, or parts of it along the input channels each on its own: Q-Diffusion's split.

    ``value`` what the layer computes with; ``scales`` of the parts. ``learn`` gives a value with a gradient while its rounding is learned.
    """

    value: Tensor

    def __init__(
        self, weight: Tensor, grid: UniformAffine, scales: Sequence[Scale], sizes: Sequence[int], up: Tensor | None = None
    ) -> None:
        super().__init__()
        self.grid, self.sizes = grid, tuple(sizes)
        self.learn: Callable[[], Tensor] | None = None
        for i, scale in enumerate(scales):
            self.register_buffer(f"delta{i}", scale.delta, persistent=False)
            self.register_buffer(f"zero{i}", scale.zero, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("value", self.rounded(weight, up), persistent=False)

    @property
    def scales(self) -> list[Scale]:
        return [Scale(getattr(self, f"delta{i}"), getattr(self, f"zero{i}")) for i in range(len(self.sizes))]

    def parts(self, x: Tensor) -> list[tuple[Tensor, Scale]]:
        """A tensor like the weight, cut as it is, with the scales."""
        return list(zip(x.split(self.sizes, dim=1), self.scales, strict=True))

    @torch.no_grad()
    def rounded(self, weight: Tensor, up: Tensor | None = None) -> Tensor:
        """The weight on its grid, ``up`` as in :meth:`UniformAffine.quantise`."""
        ups = [None] * len(self.sizes) if up is None else up.split(self.sizes, dim=1)
        return torch.cat([self.grid.rounded(part, scale, u) for (part, scale), u in zip(self.parts(weight.detach()), ups, strict=True)], 1)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        """The whole numbers q that the weight is, float32."""
        ups = [None] * len(self.sizes) if self.up is None else self.up.split(self.sizes, dim=1)
        return torch.cat([self.grid.quantise(part, scale, u) for (part, scale), u in zip(self.parts(weight.detach()), ups, strict=True)], 1)

    def forward(self) -> Tensor:
        return self.value if self.learn is None else self.learn()

    def _apply(self, fn: Any, recurse: bool = True) -> Weights:
        self.value = fn(self.value)
        return moved(self, fn, {"value"})


class _Quantised:
    """What the two classes of layers share.

    inputs   for each part of the input channels how it is put on a grid; none where the inputs stay floats
    weights  one for each range of timesteps that has its own; none where the weight stays as it is
    balance  s [ranges, channels]: inputs are divided by it, and the weights in ``weights`` are multiplied with it; None: 1
    rotation what both are rotated by after that, or None
    pick     which range a forward is in, asked where there are several
    outputs  how what comes out is put on a grid (queries, keys, values), or None
    softmax  of a layer of queries: how the softmax that they go into is put on a grid (`attention`), or None
    see      is shown each input before anything is done to it
    active   False: the layer computes what the one it stands for does
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    balance: Tensor | None
    rotation: Rotation | None
    outputs: Rounder | None
    softmax: Rounder | None
    key: str = ""
    under_lora: bool = False
    probe: Tensor | None = None
    active: bool = True
    axis: int

    def prepare(
        self,
        layer: nn.Module,
        weights: Sequence[Weights] = (),
        inputs: Sequence[Rounder] = (),
        balance: Tensor | None = None,
        pick: Pick | None = None,
        see: Callable[[Tensor], None] | None = None,
        outputs: Rounder | None = None,
        softmax: Rounder | None = None,
        rotation: Rotation | None = None,
    ) -> None:
        if len(weights) > 1 and pick is None:
            raise ValueError("several ranges, and nothing that says which a forward is in")
        if balance is not None and len(balance) != len(weights):
            raise ValueError(f"balance for {len(balance)} ranges, and {len(weights)} weights that are multiplied with it")
        stand_in(self, layer)  # type: ignore[arg-type]
        self.inputs, self.weights = nn.ModuleList(inputs), nn.ModuleList(weights)
        self.outputs, self.softmax, self.rotation = outputs, softmax, rotation
        self.pick, self.see, self.sizes = pick, see, weights[0].sizes if weights else (layer.weight.shape[1],)  # type: ignore[index, union-attr]
        self.register_buffer("balance", balance, persistent=False)  # type: ignore[attr-defined]

    def switch(self, active: bool) -> None:
        """Let the layer compute on its grids, or what the one it stands for does."""
        self.active = active

    def show(self, see: Callable[[Tensor], None] | None) -> None:
        """Let ``see`` be shown the inputs from now on, or nobody."""
        self.see = see

    def round_inputs(self, rounders: Sequence[Rounder]) -> None:
        """Put each part of the inputs on the grid of its own rounder from now on."""
        self.inputs = nn.ModuleList(rounders)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(input, weight) as the layer multiplies them."""
        if self.see is not None:
            self.see(x)
        if not self.active:
            return x, self.weight
        several = len(self.weights) > 1
        at = (self.pick() if several and self.pick is not None else 0) or 0
        at = int(at) if isinstance(at, Tensor) and at.device.type == "cpu" else at
        if self.balance is not None:
            x = (x / at_index(self.balance, at)).to(x.dtype)
        if self.rotation is not None:
            x = self.rotation(x)
        if self.inputs:
            parts = x.split(self.sizes, dim=self.axis) if len(self.inputs) > 1 else (x,)
            rounded = [rounder(part) for rounder, part in zip(self.inputs, parts, strict=True)]
            x = torch.cat(rounded, self.axis) if len(rounded) > 1 else rounded[0]
        if not self.weights:
            return x, self.weight
        if several and isinstance(at, Tensor):
            return x, at_index(torch.stack([weights.value for weights in self.weights]), at)  # type: ignore[misc]
        return x, self.weights[int(at)]()

    def leaving(self, y: Tensor) -> Tensor:
        """What comes out, for what was computed."""
        return y if self.outputs is None or not self.active else self.outputs(y)  # type: ignore[no-any-return]

    def round_activations(
        self, inputs: UniformAffine, split: int = 0, outputs: UniformAffine | None = None, softmax: UniformAffine | None = None
    ) -> None:
        """Put inputs, of ``split`` > 0 in two parts, outputs and softmax on grids: on each tensor's own range until one is fixed."""
        channels = self.weight.shape[1]
        self.sizes = (split, channels - split) if split else (channels,)
        self.inputs = nn.ModuleList(Rounder(inputs) for _ in self.sizes)
        self.outputs, self.softmax = (None if grid is None else Rounder(grid) for grid in (outputs, softmax))

    def rounders(self) -> dict[str, Rounder]:
        """All that rounds activations, by name: "inputs.0", "outputs", "softmax"."""
        named: dict[str, Any] = {f"inputs.{j}": rounder for j, rounder in enumerate(self.inputs)}
        return named | {name: one for name in ("outputs", "softmax") if (one := getattr(self, name)) is not None}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        balance, self.balance = self.balance, None  # stays float32, as the scales do
        super()._apply(fn, recurse)  # type: ignore[misc]
        self.balance = None if balance is None else balance.to(fn(balance.new_zeros(1)).device)
        return self


class QuantLinear(_Quantised, nn.Linear):
    """y = Q(x / s) Q(W s)^T + b, for a plain ``nn.Linear``."""

    axis = -1

    def __init__(self, layer: nn.Linear, **parts: Any) -> None:
        nn.Linear.__init__(self, layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.prepare(layer, **parts)

    def forward(self, input: Tensor) -> Tensor:
        return self.leaving(F.linear(*self.operands(input), self.bias))


class QuantConv2d(_Quantised, nn.Conv2d):
    """The same for a plain ``nn.Conv2d``; several parts are several ranges of input channels (`split`)."""

    axis = 1

    def __init__(self, layer: nn.Conv2d, *lora: Any, **parts: Any) -> None:
        if lora:  # peft makes its own convolutions of the class of the one that it lies over
            raise Unsupported("a LoRA is loaded over a quantised convolution: take the plugin off, load the LoRA, put the plugin on again")
        place: Any = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
        nn.Conv2d.__init__(self, *place, bias=layer.bias is not None, padding_mode=layer.padding_mode, device="meta")
        self.prepare(layer, **parts)

    def forward(self, input: Tensor) -> Tensor:
        return self.leaving(self._conv_forward(*self.operands(input), self.bias))


QuantLayer = QuantLinear | QuantConv2d


def quantised_in(denoisers: Mapping[str, nn.Module]) -> dict[str, QuantLayer]:
    """The quantised layers of the denoisers, by key."""
    modules = [module for denoiser in denoisers.values() for module in root_of(denoiser).modules()]
    return {module.key: module for module in modules if isinstance(module, (QuantLinear, QuantConv2d))}


def in_place_of(layer: nn.Linear | nn.Conv2d, **parts: Any) -> QuantLayer:
    """The quantised layer for a plain one; without parts it computes just what that does, bit for bit."""
    return QuantLinear(layer, **parts) if isinstance(layer, nn.Linear) else QuantConv2d(layer, **parts)


def quantised(
    layer: nn.Linear | nn.Conv2d,
    weight: UniformAffine | None,
    inputs: UniformAffine | None = None,
    *,
    ranges: Sequence[Scale | None] = (None,),
    split: int = 0,
    balance: Tensor | None = None,
    pick: Pick | None = None,
    rotation: Rotation | None = None,
    scale_of: Callable[[Tensor, UniformAffine], Scale] = nearest_scale,
) -> QuantLayer:
    """A layer on grids.

    Args:
        weight: grid of the weights, None to leave them.
        inputs: grid of the inputs, None to leave them.
        ranges: fixed scales of the inputs, one for each part; None: each input's own.
        split: channels of the first of two parts; 0: one part.
        balance: s [timestep ranges, input channels].
        pick: which range of timesteps a forward is in.
        rotation: of a linear: inputs and weights, after the balance.
        scale_of: how the scales of the weights are found: ``nearest_scale``, ``searched_scale``.
    """
    channels = layer.weight.shape[1]
    if split and not (0 < split < channels and getattr(layer, "groups", 1) == 1):
        raise ValueError(f"split = {split} of {channels} input channels in {getattr(layer, 'groups', 1)} groups")
    sizes = (split, channels - split) if split else (channels,)
    shape = (1, -1) + (1,) * (layer.weight.ndim - 2)
    factors: list[Any] = [1] if balance is None else [s.reshape(shape).to(layer.weight.device) for s in balance]
    whole = [] if weight is None else [layer.weight.detach().float() * s for s in factors]
    whole = whole if rotation is None else [rotation.to(layer.weight.device)(w) for w in whole]
    weights = [Weights(w, weight, [scale_of(part, weight) for part in w.split(sizes, 1)], sizes) for w in whole if weight is not None]
    for one in weights:
        one.value = one.value.to(layer.weight.dtype)
    fixed = list(ranges) if len(ranges) == len(sizes) else [None] * len(sizes)
    rounders = [] if inputs is None else [Rounder(inputs, scale) for scale in fixed]
    return in_place_of(layer, weights=weights, inputs=rounders, balance=balance, pick=pick, rotation=rotation)


def ensure_finite(values: Mapping[str, Tensor], plugin: str) -> None:
    """Raises NotFinite naming the first layer whose inputs were not finite: no scale can be made of them."""
    for name, value in values.items():
        if not bool(value.isfinite().all()):
            raise NotFinite(f"{plugin}: the inputs of {name} hold values that are not finite, so they have no range; use a wider dtype")


def ensure_current(denoisers: Mapping[str, nn.Module], plugin: str) -> None:
    """Waits once for each device.

    Raises:
        Unsupported: a LoRA was loaded over a quantised layer (taken off in this order it would leave the layer behind), or the weights of
            one were written to (a LoRA fused, a state loaded), of which its rounded ones know nothing.
    """
    seen: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor, Tensor]]] = {}
    for model, denoiser in denoisers.items():
        for path, module in root_of(denoiser).named_modules():
            if not isinstance(module, (QuantLinear, QuantConv2d)):
                continue
            if path.endswith(".base_layer") and not module.under_lora:
                raise Unsupported(
                    f"{plugin}: a LoRA was loaded over {model}.{path.removesuffix('.base_layer')}, which is quantised: unload it "
                    f"(pipe.unload_lora_weights()), take the plugin off (pipe.plugins.remove({plugin!r})), load the LoRA, then put the "
                    "plugin on again: the LoRA stays in floats beside the quantised weights"
                )
            if module.probe is not None and not module.weight.is_meta:
                place = module.weight.device, module.weight.dtype
                seen.setdefault(place, []).append((f"{model}.{path}", module.probe, probe_of(module.weight)))
    for (_, dtype), layers in seen.items():
        before = torch.stack([probe for _, probe, _ in layers])
        after = torch.stack([probe for _, _, probe in layers]).cpu()
        kinds = {torch.float32, torch.bfloat16, torch.float16, dtype}  # they may have been cast, and back
        held = torch.stack([before.to(kind).float().isclose(after.to(kind).float(), 0, 0, equal_nan=True).all(1) for kind in kinds]).any(0)
        if not bool(held.all()):
            path = layers[int(held.int().argmin())][0]
            raise Unsupported(
                f"{plugin}: the weights of {path}, which is quantised, were written to (a LoRA fused, weights loaded), and what it "
                f"computes with are the ones before, rounded: take the plugin off (pipe.plugins.remove({plugin!r})), unfuse the LoRA "
                "(pipe.unfuse_lora()) where an artefact was made without it, then put it on again"
            )


PROBES = 8


def probe_of(weight: Tensor) -> Tensor:
    """Some values of a weight [PROBES], float32, to tell whether it was written to: on its device, nothing waits."""
    flat = weight.detach().reshape(-1)
    places = torch.arange(PROBES, device=flat.device) * (flat.numel() - 1) // (PROBES - 1)
    return flat[places].float()


def put(swap: Callable[[nn.Module, str, nn.Module], None], layer: Layer, new: QuantLayer) -> None:
    """Exchange a layer by ``call.swap``; the new one knows its ``key``, whether it lies under a LoRA, and what its weights were."""
    new.key, new.under_lora = layer.key, layer.name == "base_layer"
    new.probe = None if new.weight.is_meta else probe_of(new.weight).cpu()
    ensure_exchangeable(layer.module, layer.key)
    swap(layer.parent, layer.name, new)


def bytes_of(layers: Sequence[QuantLayer]) -> tuple[int, int]:
    """(bytes of the layers' weights and scales as their plan keeps them, bytes of the weights as they are)."""
    packed = plain = 0
    for layer in layers:
        plain += layer.weight.numel() * layer.weight.element_size()
        if not layer.weights:
            packed += layer.weight.numel() * layer.weight.element_size()
        for weights in layer.weights:
            scales = sum(scale.delta.numel() * (4 if weights.grid.symmetric else 6) for scale in weights.scales)  # type: ignore[union-attr]
            packed += -(-layer.weight.numel() * weights.grid.bits // 8) + scales  # type: ignore[union-attr, operator]
    return packed, plain
