"""Gradients inside a pipeline that runs under ``no_grad``: d loss / d latents through the denoiser.

    def losses(z):                                          # z [batch, ...]: a leaf copy of the latents
        predict_alone(call.only("cond").with_input(z))      # the denoiser, with this plugin's own block and attention hooks
        return ...                                          # [batch], one loss a sample

    found = latent_gradient(call, losses)
    return next(call.with_latents(call.latents - alpha * found.gradient))

The pass goes **past the other plugins of the run**: it calls the denoiser itself, and in there only the asking plugin's hooks
fire. So a cache neither gives the gradient an old step's features nor learns anything from it: it sees only the usual calls.
A compiled denoiser is differentiated in its eager form.

Nothing stays behind: parameters collect no ``.grad``, their ``requires_grad`` is as it was, the graph is gone when the function returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from diffgraft.installed.anatomy import eager_forward, root_of
from diffgraft.installed.errors import Conflict, Unsupported
from diffgraft.kernel.calls import DenoiseCall, RunView
from diffgraft.kernel.onion import running
from diffgraft.kernel.slots import Slot, opened, set_requires_grad, surely
from diffgraft.kernel.speech import forwarded
from diffgraft.kernel.weights import kept_by

MOVES_WEIGHTS = ("group_offloading", "lazy_prefetch_group_offloading", "layerwise_casting")
"""diffusers' hooks under which a layer's weights are somewhere else, or something else, by the time that its backward runs."""


@dataclass(frozen=True)
class LatentGradient:
    """``losses`` [batch] float32 and ``gradient`` of their sum, like the latents in shape and dtype; neither carries a graph.

    A denoiser does not mix the samples of a batch, so sample i of the gradient belongs to loss i alone.
    """

    losses: Tensor
    gradient: Tensor


class LossScale:
    """Keeps float16 gradients in range: the loss is multiplied by a power of two, the gradient divided by it.

    Where the gradient overflows all the same it counts as zero, and the scale becomes smaller for the passes that follow. All of that
    happens on the device, nothing waits for it. Keep one a run (in the plugin's ``State``).
    """

    START, BACKOFF = 2.0**13, 2.0**-3

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def on(self, device: torch.device) -> Tensor:
        """The scale now, a 0-dim float32 tensor."""
        if self.value is None:
            self.value = torch.tensor(self.START, device=device)
        return self.value

    def undone(self, gradient: Tensor) -> Tensor:
        """The gradient (float32) without the scale; zero where it overflowed."""
        assert self.value is not None
        gradient = gradient.float() / self.value
        fits = gradient.isfinite().all()
        self.value = torch.where(fits, self.value, self.value * self.BACKOFF)
        return torch.where(fits, gradient, 0.0)


def latent_gradient(
    call: DenoiseCall, losses: Callable[[Tensor], Tensor], *, checkpointing: bool = False, scale: LossScale | None = None
) -> LatentGradient:
    """The gradient of per-sample losses with respect to the pipeline's latents at this denoiser call.

    Args:
        losses: gets a copy z [batch, ...] of ``call.latents`` with gradient, gives [batch]; runs the denoiser by :func:`predict_alone`.
        checkpointing: compute the blocks a second time instead of keeping what they computed (diffusers' gradient checkpointing).
        scale: for float16 denoisers; by default one for this pass alone.

    Raises:
        Unsupported: no gradient can be had here (``inference_mode``, weights that move), or the losses do not depend on the latents.
        Conflict: a cache of diffusers itself is on.
    """
    model = root_of(call.model)
    ensure_differentiable(call, model)
    half = call.sample.dtype == torch.float16
    scale = (scale or LossScale()) if half else None
    with ExitStack() as stack:
        stack.enter_context(alone(call))
        stack.enter_context(frozen(model))
        stack.enter_context(checkpointed(model, call.run) if checkpointing else nullcontext())
        stack.enter_context(torch.enable_grad())
        z = call.latents.detach().clone().requires_grad_()
        with explained(call, model):
            found = losses(z).float()
        if not found.requires_grad:
            kept = f", or not by way of weights kept as {kept_by(model)}: load plain ones" if kept_by(model) else ""
            raise Unsupported(f"{call.entry.name}: its loss does not depend on the latents, so there is no gradient to follow{kept}")
        total = found.sum() if scale is None else found.sum() * scale.on(z.device)
        with explained(call, model):
            (gradient,) = torch.autograd.grad(total, z)
    if scale is not None:
        gradient = scale.undone(gradient)
    return LatentGradient(found.detach(), gradient.to(z.dtype))


def vjp_alone(call: DenoiseCall, u: Tensor, *, at: Tensor | None = None) -> Tensor:
    """J^T u: the prediction's Jacobian with respect to the latents, transposed, times ``u`` (like the prediction); like the latents.

    One forward and one backward pass, past the other plugins. Float16 denoisers may overflow: scale ``u``.

    Args:
        at: latents [batch, ...] of the same noise level to take it at instead of the run's.

    Raises:
        Unsupported, Conflict: see :func:`latent_gradient`.
    """
    return vjp_of(call, lambda z: predict_alone(call.with_input(z)), call.latents if at is None else at, u)


def vjp_of(call: DenoiseCall, predict: Callable[[Tensor], Tensor], z: Tensor, u: Tensor) -> Tensor:
    """J^T u of another function of the denoiser than that of the latents: ``predict(z)`` runs it by :func:`predict_alone`, with a hook of
    the asking plugin that puts ``z`` where a block's output was."""
    model = root_of(call.model)
    ensure_differentiable(call, model)
    with alone(call), frozen(model), torch.enable_grad(), explained(call, model):
        z = z.detach().clone().requires_grad_()
        (found,) = torch.autograd.grad(predict(z), z, u)
    return found


def jvp_alone(call: DenoiseCall, v: Tensor, *, at: Tensor | None = None) -> Tensor:
    """J v: how the prediction changes as the latents move along ``v`` (like the latents); like the prediction.

    Forward-mode differentiation, with the plain form of attention (the fused ones have no forward mode). Where some part of a denoiser
    has none (``group_norm`` of tokens), two backward passes take its place: the derivative of J^T w with respect to w, as exact. Where that
    is not to be had either, central differences do, two forward passes. The run's report says which.

    Args:
        at: see :func:`vjp_alone`.

    Raises:
        Unsupported, Conflict: see :func:`latent_gradient`.
    """
    return jvp_of(call, lambda z: predict_alone(call.with_input(z)), call.latents if at is None else at, v)


def jvp_of(call: DenoiseCall, predict: Callable[[Tensor], Tensor], z: Tensor, v: Tensor) -> Tensor:
    """J v, likewise: see :func:`vjp_of` for the function, :func:`jvp_alone` for the ways."""
    model = root_of(call.model)
    ensure_differentiable(call, model)
    z = z.detach()
    v, missing = v.to(z.dtype), []
    with alone(call), frozen(model):
        for name, way in (("forward mode", _forward_mode), ("two backward passes", _two_backward_passes)):
            try:
                with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
                    made = way(predict, z, v)
                break
            except (RuntimeError, NotImplementedError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                why = str(error).partition("\n")[0]
                missing.append(f"{name} ({why})")
        else:
            name, made = "central differences", _central_differences(predict, z, v)
    if missing:
        call.note(f"Jacobian products by {name}: {type(model).__name__} has no {' and no '.join(missing)}")
    return made


def _forward_mode(predict: Callable[[Tensor], Tensor], z: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        made = forward_ad.unpack_dual(predict(forward_ad.make_dual(z, v))).tangent
    if made is None:
        raise NotImplementedError("its prediction carries no tangent")
    return made.detach()


def _two_backward_passes(predict: Callable[[Tensor], Tensor], z: Tensor, v: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    out = predict(z)
    w = torch.zeros_like(out, requires_grad=True)
    (back,) = torch.autograd.grad(out, z, w, create_graph=True)  # J^T w, linear in w
    (made,) = torch.autograd.grad(back, w, v)
    return made


@torch.no_grad()
def _central_differences(predict: Callable[[Tensor], Tensor], z: Tensor, v: Tensor) -> Tensor:
    h = torch.finfo(z.dtype).eps ** (1 / 3) * z.norm() / v.norm().clamp(min=torch.finfo(torch.float32).tiny)
    return (predict(z + h * v) - predict(z - h * v)) / (2 * h)


def predict_alone(call: DenoiseCall) -> Tensor:
    """The denoiser's own prediction for ``call``, past the other plugins, eager also where it is compiled. For :func:`latent_gradient`."""
    call.run.ran(call.branch)
    forward = torch.compiler.disable(eager_forward(call.model) or call.inner)
    return forwarded(call, forward)


def ensure_graphs(call: DenoiseCall) -> None:
    """Raises Unsupported where torch keeps nothing for a gradient, whatever it is of."""
    if torch.is_inference_mode_enabled():
        raise Unsupported(f"{call.entry.name} needs gradients, which torch.inference_mode() rules out: call the pipeline without it")


def ensure_differentiable(call: DenoiseCall, model: nn.Module | None = None) -> None:
    """Raises Unsupported or Conflict where a backward pass would fail, or give something else than the gradient.

    The functions here ask it themselves; a plugin whose first gradient comes late in a run asks it in the run's first denoiser call.
    """
    model = root_of(call.model) if model is None else model
    name, cls = call.entry.name, type(model).__name__
    ensure_graphs(call)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise Unsupported(
            f"{name} needs gradients, but sequential CPU offload takes each layer's weights away before its backward runs: use "
            "pipe.enable_model_cpu_offload() instead"
        )
    if getattr(model, "is_cache_enabled", False):
        raise Conflict(
            f"{name} needs gradients through {cls}, but a cache of diffusers itself is on, which would answer with an old step's features: "
            "disable_cache() first, or use a cache that is a diffgraft plugin (the gradient pass goes past it)"
        )
    for module in model.modules():
        registry = module.__dict__.get("_diffusers_hook")
        if registry is not None and (found := [hook for hook in MOVES_WEIGHTS if hook in registry.hooks]):
            raise Unsupported(
                f"{name} needs gradients, but {found[0]} on this {cls} changes its weights between forward and backward; load it without"
            )


@contextmanager
def explained(call: DenoiseCall, model: nn.Module) -> Iterator[None]:
    """Raises Unsupported where a quantiser's tensor class cannot do what autograd asks of it."""
    try:
        yield
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        if not (kept := kept_by(model)) or isinstance(error, torch.OutOfMemoryError):
            raise
        raise Unsupported(
            f"{call.entry.name} needs gradients, and the weights of this {type(model).__name__} are kept as {kept}, which gives none here "
            f"({error}): load it with plain weights"
        ) from error


@contextmanager
def alone(call: DenoiseCall) -> Iterator[None]:
    """Until the end of this block only the hooks of the plugin that ``call`` belongs to fire."""
    run = call.run
    before = run.alone, run.branch
    run.alone, run.branch = call.entry, call.branch
    try:
        yield
    finally:
        run.alone, run.branch = before


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Parameters without ``requires_grad``, so that nothing is kept for gradients of theirs; afterwards each is as it was."""
    changed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        set_requires_grad(changed, False)
        yield
    finally:
        surely(lambda: set_requires_grad(changed, True))


@contextmanager
def checkpointed(model: nn.Module, run: RunView) -> Iterator[None]:
    """diffusers' gradient checkpointing; afterwards every switch is as it was.

    On a GPU the second computation happens in a thread of autograd's own, where ``run`` must be the active one for hooks to fire again.
    """
    if not getattr(model, "_supports_gradient_checkpointing", False):
        raise Unsupported(f"{type(model).__name__} has no gradient checkpointing")

    def twice(module: nn.Module, *args: Any) -> Any:
        return checkpoint(partial(in_run, run, run.branch, module), *args, use_reentrant=False)

    slots = []
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", True):
            continue  # it has none, or it is on already
        for name, value in (("gradient_checkpointing", True), ("_gradient_checkpointing_func", twice)):
            slot = Slot(module.__dict__, name, lambda: None)
            slot.value = value
            slots.append(slot)
    with opened(slots):
        yield


def in_run(run: RunView, branch: str | None, module: nn.Module, *args: Any) -> Any:
    """Call a block as a part of ``run``, whatever thread this is."""
    with running(run):
        return module(*args)
