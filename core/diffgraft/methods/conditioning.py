"""The conditioning that a second pipeline makes of the same prompt: for plugins that let another model take over.

Every pipeline encodes prompts in its own way and hands the result to its denoiser. So the second pipeline is called for one step with a
listener on its denoiser, which keeps what arrives and ends the call there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffgraft.installed.errors import ConfigError, Unsupported
from diffgraft.installed.family import Family
from diffgraft.installed.plugin import Effects, Paper, Plugin
from diffgraft.kernel.boundary import usual_shape
from diffgraft.kernel.calls import DenoiseCall, StepCall
from diffgraft.kernel.calls import part_of as part_of  # for plugins that part a layer's arguments as `call.only` does the denoiser's
from diffgraft.kernel.onion import active_run
from diffgraft.kernel.speech import Rows
from diffgraft.kernel.speech import ask as ask  # for plugins that ask a second model for its prediction
from diffgraft.methods.artefacts import Fingerprint
from diffgraft.methods.inputs import default_steps, parameters

NOT_COPIED = {"self", "generator", "latents", "callback", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
              "output_type", "return_dict", "num_inference_steps", "timesteps", "sigmas", "callback_steps"}  # fmt: skip
"""Call arguments that do not concern the conditioning (a generator must not be drawn from twice)."""
PARTS_OF_A_RUN = {"denoising_start", "denoising_end"}
"""Call arguments that cut a run, and might leave no step in which the conditioning is seen."""


@dataclass(frozen=True)
class Conditioning:
    """Denoiser arguments by branch ("cond" -> {"encoder_hidden_states": [batch, tokens, width]}).

    whole  by branch all arguments of its call, noisy sample, timestep and token positions among them: what ``session.model`` wants
    """

    of_branch: Mapping[str, Mapping[str, Any]]
    whole: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def put_into(self, call: DenoiseCall, *branches: str) -> DenoiseCall:
        """``call`` with this conditioning of ``branches`` (default: those that the call has) in the place of its own.

        What is missing here (the mask of a prompt that needs none) goes; entries of a dict that are missing here (an IP-Adapter's picture)
        stay.
        """
        parts = [self.of_branch[branch] for branch in branches or call.texts]
        changes: dict[str, Any] = {name: None for name in call.family.conditioning if call.get(name) is not None}
        for name in parts[0]:
            value = join([part[name] for part in parts])
            changes[name] = {**(call.get(name) or {}), **value} if isinstance(value, dict) else value
        return call.replace(**changes)  # type: ignore[no-any-return]


def same_text_encoders(first: Any, second: Any) -> bool:
    """Whether two pipelines encode prompts with the same weights."""
    names = [name for name in first.components if name.startswith("text_encoder")]
    pairs = [(getattr(first, name), getattr(second, name, None)) for name in names]
    return all(
        a is b or (isinstance(a, nn.Module) and isinstance(b, nn.Module) and Fingerprint.of(a).difference(Fingerprint.of(b)) is None)
        for a, b in pairs
    )


def takes_pictures(model: nn.Module) -> bool:
    """Whether an IP-Adapter is loaded on a denoiser."""
    return any(getattr(model, name, None) is not None for name in ("encoder_hid_proj", "image_proj"))


def sibling(pipe: Any, scheduler: Any = None) -> Any:
    """A pipeline of the same parts and settings with a scheduler of its own: it can be called while ``pipe`` is running.

    Args:
        scheduler: made like this one; by default like the pipeline's own, also while a plugin's is in its place.
    """
    from diffgraft.kernel.stack import stack_of

    stack = stack_of(pipe)
    if scheduler is None:
        scheduler = pipe.scheduler if stack is None else stack.own_scheduler()
    cls = stack.base_class if stack is not None else type(pipe)
    names = inspect.signature(cls).parameters.keys() - pipe.components.keys()
    settings = {name: pipe.config[name] for name in names if name in pipe.config}
    made = cls(**{**pipe.components, "scheduler": type(scheduler).from_config(scheduler.config)}, **settings)
    for name, value in vars(pipe).items():  # what its user may have set on it: a prompt's template, how pictures are prepared
        if not name.startswith("_") and name not in made.components:
            setattr(made, name, value)
    made.set_progress_bar_config(disable=True)
    return made


class Listening:
    """A pipeline of the same parts as another one, asked for what it hands to its denoiser; for whoever asks often."""

    def __init__(self, pipe: Any) -> None:
        from diffgraft.kernel.loading import load_pipeline

        self.pipe = load_pipeline(sibling(pipe), [Listener()])  # the other's scheduler stays as it is, and it may be running
        self.asked = parameters(self.pipe).keys() - NOT_COPIED - PARTS_OF_A_RUN

    def conditioning(self, arguments: Mapping[str, Any], own: bool = False) -> Conditioning:
        """What comes of these arguments of a call; those that it does not take (a base without ControlNet) are left out.

        ``own``: of a call of the other pipeline itself, so that a None says something where that is not the default (Sana's instruction).
        """
        given = {name: value for name, value in arguments.items() if name in self.asked and (own or value is not None)}
        if given.get("strength") is not None:
            given["strength"] = 1.0  # else of few steps none may be left; the conditioning does not depend on it
        # the call's own number of steps: there are schedules without a single one (PNDM's)
        steps = arguments.get("num_inference_steps") or default_steps(self.pipe)
        try:
            with tokenizers_as_they_were(self.pipe):
                self.pipe(**given, num_inference_steps=steps, output_type="latent", generator=torch.Generator().manual_seed(0))
        except Heard as end:
            return Conditioning(end.branches.of_branch, end.branches.whole)
        return Conditioning({})


def own_conditioning(second: Any, arguments: Mapping[str, Any]) -> Conditioning:
    """What ``second`` hands to its denoiser when it is called with these arguments (of the first pipeline's call).

    Arguments that ``second`` does not take (a base without ControlNet) are left out. It may be the running pipeline itself, asked for
    another guidance scale or prompt.

    Raises:
        Unsupported: the prompt was given as embeddings, which only the first pipeline understands.
    """
    run = active_run()
    own = run is not None and run.pipe is second
    listening = Listening(second)
    embeddings = [name for name, value in arguments.items() if value is not None and name in listening.asked and "prompt_embeds" in name]
    if embeddings and not own:
        raise Unsupported(
            f"{', '.join(embeddings)}: embeddings of the first pipeline say nothing to {type(second).__name__} with another text encoder; "
            "give the prompt as text"
        )
    return listening.conditioning(arguments, own)


@contextmanager
def tokenizers_as_they_were(pipe: Any) -> Iterator[None]:
    """Fast tokenizers keep the padding and the truncation of their last call, and save them; afterwards these are as they were."""
    fast = [each for part in pipe.components.values() if (each := getattr(part, "backend_tokenizer", None)) is not None]
    kept = [(each, each.padding, each.truncation) for each in fast]
    try:
        yield
    finally:
        for each, padding, truncation in kept:
            each.no_padding() if padding is None else each.enable_padding(**padding)
            each.no_truncation() if truncation is None else each.enable_truncation(**truncation)


def is_of_the_prompt(name: str) -> bool:
    """Whether a call argument says the prompt or what a guidance is to avoid: as text for one encoder, as embeddings, pooled, masked.

    Not ``num_images_per_prompt`` and switches like ``prompt_template``, which say what to do with any prompt.
    """
    name = name.removeprefix("negative_").removeprefix("pooled_")
    return name == "prompt" or (name.startswith("prompt_") and name.split("_")[1] in OF_A_PROMPT)


OF_A_PROMPT = {"2", "3", "4", "embeds", "attention", "mask", "cu"}
"""What comes after ``prompt_`` in the names of such arguments (``prompt_2``, ``prompt_embeds_qwen``, ``prompt_attention_mask``)."""


def with_prompt(arguments: Mapping[str, Any], prompt: str | list[str]) -> dict[str, Any]:
    """The arguments of a call with another prompt, for :func:`own_conditioning`: every encoder is given ``prompt``.

    Whatever said the first prompt goes, in all its forms, because pipelines take one form only and an embedding belongs to its text. So
    does what the first one is guided away from: of the second prompt's conditioning only "cond" is meant. A list of one text is said as
    that text: there are pipelines that take no list (Wan VACE).
    """
    if not isinstance(prompt, str) and len(prompt) == 1:
        prompt = prompt[0]
    return {**{name: value for name, value in arguments.items() if not is_of_the_prompt(name)}, "prompt": prompt}


def number_of_prompts(arguments: Mapping[str, Any]) -> int:
    """How many prompts a call has, given as text or as embeddings."""
    prompt, embeddings = arguments.get("prompt", arguments.get("task_prompt")), arguments.get("prompt_embeds")
    if prompt is None and embeddings is not None:
        return len(embeddings)
    return len(prompt) if isinstance(prompt, (list, tuple)) else 1


def number_of_pictures(arguments: Mapping[str, Any], family: Family) -> int:
    """How many pictures, or videos, a call makes: samples of its latents. ``arguments`` as they were passed, with defaults or without."""
    told = any(arguments.get(name) is not None for name in ("prompt", "prompt_embeds", "task_prompt"))
    shown = next((arguments[name] for name in ("image_embeds", "image") if arguments.get(name) is not None), None)
    batch_size, labels = arguments.get("batch_size"), arguments.get("class_labels")
    if batch_size is not None:
        asked = int(batch_size)
    elif labels is not None:
        asked = len(labels) if hasattr(labels, "__len__") else 1
    elif not told and isinstance(shown, (list, tuple, Tensor)):
        asked = len(shown)  # a pipeline that is told nothing but its picture, as embeddings or as it is
    else:
        asked = number_of_prompts(arguments)
    each = arguments.get("num_images_per_prompt") or arguments.get("num_videos_per_prompt") or 1
    return asked * (1 if family.one_each else int(each))


def for_each_prompt(plugin: str, texts: str | Sequence[str], arguments: Mapping[str, Any], knob: str = "prompt") -> list[str]:
    """A text for each prompt of a call, of a ``knob`` that has one for all of them or one for each.

    Raises:
        ConfigError: it has another number.
    """
    count = number_of_prompts(arguments)
    if isinstance(texts, str):
        return [texts] * count
    if len(texts) != count:
        raise ConfigError(
            f"plugin {plugin!r}: {knob} has {len(texts)} texts for a call with {count} prompts; give one for each, or one text"
        )
    return list(texts)


class PromptWatch:
    """Whether a callback gave the pipeline another prompt in mid-run, for a plugin whose second model was told of the first one only.

    Conditioning that is the same unchanged object as at the first call costs nothing; other is compared on its device, without waiting
    for it. Keep one a run (in the plugin's ``State``).
    """

    def __init__(self) -> None:
        self._first: dict[str, list[Tensor]] = {}
        self._last: dict[tuple[str, ...], list[tuple[Tensor, int | None]]] = {}
        self._changed: Tensor | bool = False

    def see(self, call: DenoiseCall) -> None:
        """Look at a denoiser call's conditioning."""
        seen = [(x, None if x.is_inference() else x._version) for x in tensors_in([call.get(name) for name in call.family.conditioning])]
        last = self._last.get(call.branches, [])
        self._last[call.branches] = seen
        same = (a is b and m is not None and m == n for (a, m), (b, n) in zip(last, seen, strict=False))
        if last and len(last) == len(seen) and all(same):
            return
        for branch in call.branches:
            part = call.only(branch)
            now = tensors_in([part.get(name) for name in call.family.conditioning])
            first = self._first.get(branch)
            if first is None:  # copies: a callback may write into the tensor
                self._first[branch] = [x.clone() for x in now]
            elif [x.shape for x in first] != [x.shape for x in now]:
                self._changed = True
            else:
                for old, new in zip(first, now, strict=True):
                    self._changed = self._changed | (old != new).any()

    @property
    def changed(self) -> bool:
        """Whether any call's conditioning was another than the first one's of its branch; waits for the device."""
        return bool(self._changed)


def told(call: DenoiseCall) -> dict[str, Any]:
    """The conditioning of a denoiser call, by the names of its arguments."""
    return {name: call[name] for name in call.family.conditioning if call.get(name) is not None}


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of nested lists and dicts, in their order."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [x for item in items for x in tensors_in(item)]


class Heard(Exception):  # the listener's way out, not an error
    def __init__(self, branches: Branches) -> None:
        self.branches = branches


class Branches:
    """What was heard in this run."""

    def __init__(self) -> None:
        self.of_branch: dict[str, dict[str, Any]] = {}
        self.whole: dict[str, dict[str, Any]] = {}


class Listener(Plugin):
    """Keeps the conditioning of every branch and ends the run."""

    name = "conditioning listener"
    paper = Paper("none", "0000.00000", "listens")
    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}
    State = Branches
    effects = Effects(skips=frozenset({"denoiser"}))

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        for branch in call.branches:
            part = call.only(branch)
            call.shared.of_branch[branch] = told(part)
            call.shared.whole[branch] = part.arguments()
        if len(call.branches) > 1:
            raise Heard(call.shared)
        nothing = call.sample.new_zeros(usual_shape(call) or call.sample.shape)
        second = call.family.companion
        return nothing if second is None else call.accompanied(nothing, torch.zeros_like(call[second]))

    def step(self, call: StepCall, next: Any) -> Any:
        raise Heard(call.shared)


def join(parts: Sequence[Any]) -> Any:
    """The parts of branches one behind the other: the inverse of ``DenoiseCall.only``."""
    if isinstance(parts[0], dict):
        return {key: join([part[key] for part in parts]) for key in parts[0]}
    if isinstance(parts[0], Rows):
        return Rows(chain.from_iterable(parts))
    if isinstance(parts[0], (list, tuple)):
        return [join(each) for each in zip(*parts, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
