"""The denoiser with some layers left out or perturbed, as diffusers' guiders do it, and afterwards as it was.

diffusers' hooks stay behind in part when they are taken off: a registry on every module that had one, and its ``forward`` as an attribute
of the instance. Here both go again, also after an exception.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from diffgraft import Target, Unsupported, root_of
from diffusers.guiders import BaseGuidance
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import nn

from diffgraft_diffusers_guider.guiders import layers_of, perturbs

NUMBER = {"pred_uncond": 2}
"""Which prediction of a step the perturbed one is, as diffusers counts; of the conditional branch the third."""
ABSENT: Any = object()


@contextmanager
def perturbed(guider: BaseGuidance, denoiser: nn.Module, seed: int | None = None) -> Iterator[None]:
    """The denoiser with the guider's hooks on.

    The guider is told which prediction comes by the count that its own classes look at. It does not count by itself for
    SmoothedEnergyGuidance of diffusers 0.42.1, nor as far as the third where classifier-free guidance is off, and would put on nothing.

    Args:
        seed: of the noise of a dropout, drawn aside from the process's own; None: from that.
    """
    model = root_of(denoiser)
    number = NUMBER.get(perturbs(guider) or "", 3)
    found = [(module, module.__dict__.get("forward", ABSENT), "_diffusers_hook" in module.__dict__) for module in model.modules()]
    try:
        count_anew(guider, model, number - 1)
        guider.prepare_models(model)
        if guider._count_prepared < number:
            BaseGuidance.prepare_models(guider, model)
            guider.prepare_models(model)
        with nullcontext() if seed is None else torch.random.fork_rng():
            if seed is not None:
                torch.manual_seed(seed)
            yield
    finally:
        count_anew(guider, model, number)
        guider.cleanup_models(model)
        for module, forward, hooked in found:
            restore(module.__dict__, forward, hooked)


def count_anew(guider: BaseGuidance, model: nn.Module, number: int) -> None:
    """Tells the guider that so many predictions of its step were prepared: diffusers' base class counts, and does nothing else."""
    guider.set_state(guider._step, guider._num_inference_steps, guider._timestep)
    for _ in range(number):
        BaseGuidance.prepare_models(guider, model)


def restore(attributes: dict[str, Any], forward: Any, hooked: bool) -> None:
    """A module's ``__dict__`` as it was before diffusers' hooks."""
    if not hooked:
        attributes.pop("_diffusers_hook", None)  # check: allow foreign_write because diffusers leaves it behind
    if forward is ABSENT:
        attributes.pop("forward", None)  # check: allow foreign_write because diffusers leaves it behind
    elif attributes.get("forward") is not forward:
        attributes["forward"] = forward  # check: allow foreign_write because diffusers leaves another one behind


def ensure_layers(guider: BaseGuidance, target: Target) -> None:
    """Tries the guider's hooks on every denoiser, and takes them off again.

    Raises:
        Unsupported: with what diffusers says, or what it would do wrong without a word.
    """
    if not layers_of(guider):
        return
    who = f"diffusers_guider: {type(guider).__name__}"
    if target.family.branch_prediction == "unpacked_tail":
        raise Unsupported(f"{who} asks the denoiser a further time, and how {target.family.name} unpacks what it says is not known here")
    for name, denoiser in target.denoisers.items():
        model, what = root_of(denoiser), f"{name} ({type(denoiser).__name__})"
        if any(hasattr(m, "_orig_mod") or m.__dict__.get("_compiled_call_impl") is not None for m in denoiser.modules()):
            raise Unsupported(
                f"{who} puts other layers into the {what} in every step, which is compiled and would be again; leave it uncompiled"
            )
        for layers in layers_of(guider):
            ensure_config(who, what, model, layers)
        trial = deepcopy(guider)
        trial.set_state(None, None, None)  # in no run: whatever its interval is
        trial.enable()
        try:
            with perturbed(trial, model):
                hooked = sum(len(module._diffusers_hook.hooks) for module in model.modules() if hasattr(module, "_diffusers_hook"))
        except Exception as error:
            raise Unsupported(f"{who}: diffusers cannot perturb these layers of the {what}: {type(error).__name__}: {error}") from error
        before = sum(len(module._diffusers_hook.hooks) for module in model.modules() if hasattr(module, "_diffusers_hook"))
        if hooked == before and not is_without_effect(guider):
            raise Unsupported(
                f"{who}: in the layers named diffusers finds nothing of the {what} that it could perturb (attention to itself with plain "
                "Linear projections, feed-forwards); name others, or merge the LoRA"
            )


def is_without_effect(guider: BaseGuidance) -> bool:
    """Whether its own scale says that nothing is to be perturbed."""
    scale = getattr(guider, "skip_layer_guidance_scale", getattr(guider, "seg_guidance_scale", None))
    return scale == 0 if scale is not None else guider.num_conditions == 1


def ensure_config(who: str, what: str, model: nn.Module, layers: Any) -> None:
    """Raises Unsupported where the layers of one config are not there, not clear, or diffusers 0.42.1 would mix up their outputs."""
    paths = [name for name in sorted(_ALL_TRANSFORMER_BLOCK_IDENTIFIERS) if hasattr(model, name)] if layers.fqn == "auto" else [layers.fqn]
    if len(paths) != 1:
        stacks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and "transformer_blocks" in name]
        found = f"which is one of {', '.join(paths)} by chance" if paths else "and none has a name that diffusers knows"
        raise Unsupported(f"{who}: the layers are of 'auto' in the {what}, {found}; give a config with fqn: {', '.join(paths or stacks)}")
    blocks = dict(model.named_modules()).get(paths[0])
    if not isinstance(blocks, nn.ModuleList):
        stacks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        raise Unsupported(f"{who}: fqn = {paths[0]!r} is no list of blocks of the {what}; there are {', '.join(stacks)}")
    if wrong := [index for index in layers.indices if not 0 <= index < len(blocks)]:
        raise Unsupported(f"{who}: layer {wrong[0]} is not in {paths[0]} of the {what}, which has {len(blocks)} (0 to {len(blocks) - 1})")
    attention, feed = getattr(layers, "skip_attention", False), getattr(layers, "skip_ff", False)
    if not attention:
        return
    for block in (blocks[index] for index in layers.indices):
        try:
            known = TransformerBlockRegistry.get(type(block))
        except ValueError:
            continue  # diffusers says so itself, where it needs it
        two = known.return_encoder_hidden_states_index is not None
        if two and (not feed or known.return_hidden_states_index != 0 or layers.dropout < 1):
            raise Unsupported(
                f"{who}: the {type(block).__name__}s of the {what} return the text's tokens beside the picture's, and diffusers "
                f"{'would drop out of a pair' if feed and layers.dropout < 1 else 'gives back the two in the wrong places'} when it leaves "
                "such a block's attention out; perturb the attention's scores instead (PerturbedAttentionGuidance), or skip_ff alone"
            )
