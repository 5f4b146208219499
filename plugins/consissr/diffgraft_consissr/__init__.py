"""ConsisSR (Gu, Jiang, Zhang, Zhou, Chen, Yang, Li, arXiv 2410.13807): super-resolution by a diffusion model that begins near its end, and
that is told of the low-quality picture in cross-attention.

Two parts, each of use alone. GAN-embedding: a run begins at t_s < T, from the super-resolved picture of any network, noised to that level.
HPA, the hybrid prompt adapter: layers of cross-attention read tokens of the low-quality picture beside the text's, with keys and values of
their own. At the end the colours are those of the low-quality picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from diffgraft import (
    AttentionCall,
    AttentionInfo,
    ConfigError,
    DenoiseCall,
    Effects,
    Need,
    Plugin,
    RunCall,
    Schedule,
    ScheduleCall,
    Target,
    Unsupported,
)
from diffgraft.methods.conditioning import number_of_prompts
from diffgraft.methods.decoding import ensure_decodes
from diffgraft.methods.inputs import parameters
from diffgraft.methods.late import ensure_steps, kind_of, late
from diffgraft.methods.restoring import latents_of
from diffgraft.methods.starts import cut, start_from
from torch import Tensor

from diffgraft_consissr.adapter import (
    LAYOUT,
    AsPublished,
    Values,
    ask_with_image,
    cross_layers,
    ensure_fits,
    features_of,
    has_eye,
    image_tokens,
    of_layer,
    seen,
)
from diffgraft_consissr.fitting import HpaFitter
from diffgraft_consissr.knobs import PAPER, ConsisSRConfig
from diffgraft_consissr.method import adain, resized, wavelet
from diffgraft_consissr.pictures import card, enlarged, ensure_there, in_form, network_of, pixels_of, rows

__all__ = ["ConsisSR"]
__version__ = "0.1.0"

UPSCALER = "sd_upscale"
"""The family whose calls bring the low-quality picture themselves, and make another one `vae_scale_factor` times as large."""
OWN = "it begins with a noised picture of its own: give it the super-resolved one as `image`, and t_s as `strength`"


@dataclass
class Seen:
    """Of a run: the clean latents of the super-resolved pictures, and c_img; the adapter's values by layer, where the denoiser is."""

    z: Tensor | None = None
    tokens: Tensor | None = None
    spread: Tensor | None = None
    """c_img of each sample of the denoiser call in progress."""
    values: dict[str, Values] = field(default_factory=dict)


class ConsisSR(Plugin):
    name = "consissr"
    paper = PAPER
    families = ("sd", "sd_upscale", "sdxl", "latent_consistency")
    not_on: ClassVar[dict[str, str]] = {
        "*Img2Img*": OWN,
        "*Depth2Img*": OWN,
        "*Inpaint*": "it keeps parts of a picture of its own, over which the super-resolved one would be drawn",
    }
    Config = ConsisSRConfig
    State = Seen
    neutral: ClassVar[dict[str, Any]] = {"start": 1.0, "scale": 0.0, "colour": "none"}
    active: ClassVar[dict[str, Any]] = {"image": card(), "sr": "bicubic", "start": 0.6, "scale": 1.0, "colour": "adain"}
    effects = Effects(edits=frozenset({"schedule", "latents", "attention"}), needs=frozenset({"one_size"}))
    needs = (Need("fit", "artefact", fits=frozenset(), holds=AsPublished()), Need("weights", "weights", holds=LAYOUT))
    fitting = HpaFitter
    config: ConsisSRConfig

    def __init__(self, **knobs: Any) -> None:
        super().__init__(**knobs)
        edits = {"schedule", "latents"} if self.config.starts else set()
        needs = {"one_size"} if self.config.starts else set()
        self.effects = Effects(edits=frozenset(edits | ({"attention"} if self.config.adapts else set())), needs=frozenset(needs))

    def check(self, target: Target) -> None:
        ensure_there("image", self.config.image)
        ensure_there("sr", self.config.sr)
        if self.config.starts:
            network_of(self.config.sr)
            ensure_decodes(target.pipe, target.family, float32=True)
            self.ensure_schedule(target.family, target.pipe.scheduler, None)
        tensors = self.tensors(target.given)
        if tensors is None or not self.config.adapts:
            return
        if target.family.kind != "unet":
            raise Unsupported(f"consissr: its adapter is for U-Nets, not for {type(target.pipe).__name__}; leave it out")
        ensure_fits(tensors, [*cross_layers(target.denoisers["unet"]).values()])
        if not has_eye(tensors) and self.config.vision is None:
            raise ConfigError(
                "plugin 'consissr': vision = None: this adapter brings no eye of its own; give the image encoder that it was made with "
                "(the authors': the image embedding of CLIP ViT-H/14, fine-tuned)"
            )
        if has_eye(tensors) and self.config.vision is not None:
            raise ConfigError("plugin 'consissr': vision: this adapter brings an eye of its own, and was made with it; leave vision out")

    def ensure_schedule(self, family: Any, scheduler: Any, steps: Any) -> None:
        """Refuse a scheduler that cannot begin at t_s, or more steps than are below it.

        Raises:
            Unsupported, ConfigError: with the reason.
        """
        kind = kind_of(self.name, family, scheduler)
        if self.config.spacing == "cut":
            return
        if kind == "levels":
            raise Unsupported(
                f"consissr: {type(scheduler).__name__} spreads its levels between sigma_min and sigma_max, and t_s is a share of the "
                "training's time: set spacing='cut', or use a scheduler whose config says no sigma_max"
            )
        ensure_steps(self.name, scheduler, kind, self.config.start, steps, "start")

    def tensors(self, given: Mapping[str, Any]) -> Mapping[str, Tensor] | None:
        """Of the adapter; None where none is given."""
        found = given["weights"] if given["artefact"] is None else given["artefact"]
        return None if found is None else found.tensors

    # a run ---------------------------------------------------------------------------------------------------------------------------

    def run(self, call: RunCall, next: Any) -> Any:
        knobs, memory = self.config, call.shared
        memory.__init__()  # an outer plugin may run the pipeline several times
        low = self.low(call)
        fixes = knobs.colour != "none" and (low is not None or knobs.starts or knobs.adapts)
        if not (knobs.starts or knobs.adapts or fixes):
            self.say_why(call)
            return next(call)
        if low is None and (fixes or knobs.adapts):
            what = f"colour = {knobs.colour!r} is taken from" if fixes else "the adapter is told of"
            raise ConfigError(f"plugin 'consissr': {what} the low-quality picture, and there is none: give image="
                              + (", or set colour='none'" if fixes else ""))  # fmt: skip
        ensure_number("image", low, call)
        if knobs.starts:
            call, memory.z = self._with_start(call, low)
        if knobs.adapts:
            assert low is not None
            memory.tokens = self._tokens(call, low)
            call.count("image tokens", memory.tokens.shape[1])
        result = next(call)
        return self._recoloured(call, result, low) if fixes else result

    def say_why(self, call: RunCall) -> None:
        """Why a run is the plain one."""
        if self.config.sr is not None and self.config.start == 1:
            call.note("inactive: at start = 1 a run is the plain one")
        else:
            call.note("inactive: nothing is asked for: no super-resolved picture (sr), no adapter (artefact, weights), and no "
                      "colours of a low-quality picture (image, colour)")  # fmt: skip

    def low(self, call: RunCall) -> Tensor | None:
        """The low-quality pictures [n, 3, height, width] in -1 to 1: the knob's, else those of an upscaler's call."""
        if self.config.image is not None:
            x = pixels_of("image", self.config.image)
        elif call.family.name == UPSCALER and call.get("image") is not None:
            x = call.pipe.image_processor.preprocess(call["image"]).float()
        else:
            return None
        return x.to(call.pipe._execution_device)

    def _with_start(self, call: RunCall, low: Tensor | None) -> tuple[RunCall, Tensor]:
        """The call in the size of its super-resolved pictures where it says none, and their clean latents.

        Raises:
            ConfigError: the call says a schedule of its own, or more steps than there are.
        """
        if own := [name for name in ("timesteps", "sigmas") if call.get(name) is not None]:
            raise ConfigError(f"plugin 'consissr': the call says {' and '.join(own)} itself, and a start at t_s writes another schedule; "
                              "leave them out, or set start = 1")  # fmt: skip
        self.ensure_schedule(call.family, call.pipe.scheduler, call.get("num_inference_steps"))
        large = enlarged(self.config.sr, low).to(call.pipe._execution_device)
        ensure_number("sr", large, call)
        call, size = sized(call, tuple(large.shape[-2:]))  # type: ignore[arg-type]
        if size != tuple(large.shape[-2:]):
            call.note(f"the super-resolved picture of {large.shape[-2]} x {large.shape[-1]} was brought to {size[0]} x {size[1]}")
        return call, latents_of(call, resized(large, size))

    @torch.no_grad()
    def _tokens(self, call: RunCall, low: Tensor) -> Tensor:
        """c_img [pictures, tokens, d], float32."""
        tensors = {key: value.to(low.device, torch.float32) for key, value in (self.tensors(call.entry.given) or {}).items()}
        layers = cross_layers(getattr(call.pipe, call.family.denoisers[0]))
        call.shared.values = {path: of_layer(tensors, i) for i, path in enumerate(layers)}
        vision, width = self.config.vision, len(tensors["tokens.0.weight"])
        features = seen(tensors, low) if vision is None else features_of(vision, low, width).to(low.device, torch.float32)
        return image_tokens(tensors, features)

    def _recoloured(self, call: RunCall, result: Any, low: Tensor | None) -> Any:
        """The result with the colours of the upscaled low-quality picture."""
        assert low is not None
        images = result[0] if isinstance(result, tuple) else result.images
        if call.get("output_type") == "latent":
            call.note("the call asks for latents, which have no colours to be fixed")
            return result

        def fix(x: Tensor) -> Tensor:
            y = rows((resized(low, (x.shape[-2], x.shape[-1])) + 1) / 2, len(x), "image", call.family.name == UPSCALER).to(x)
            return adain(x, y) if self.config.colour == "adain" else wavelet(x, y)

        fixed = in_form(images, fix)
        call.count("recoloured", len(images))
        return (fixed, *result[1:]) if isinstance(result, tuple) else replace(result, images=fixed)

    # its schedule, its denoiser ------------------------------------------------------------------------------------------------------

    def schedule(self, call: ScheduleCall, next: Any) -> Schedule:
        own: Schedule = next(call)
        if not self.config.starts:
            return own
        if self.config.spacing == "cut":
            return cut(call, own, self.config.start * call.scheduler.config["num_train_timesteps"])
        # trailing: the first step is at t_s itself, however few there are
        return late(call, own, kind_of(self.name, call.family, call.scheduler), self.config.start, "start", timestep_spacing="trailing")

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        memory, tiled = call.shared, call.family.name == UPSCALER
        if memory.z is not None and call.step.call == 0:
            z = rows(memory.z.to(call.latents.device), len(call.latents), "sr", tiled)
            if z.shape[1:] != (wanted := call.latents.shape[1:]):
                raise ConfigError(f"plugin 'consissr': sr is {list(z.shape[1:])} as latents, and this run's are {list(wanted)}")
            call = call.with_latents(start_from(call, z))
        if memory.tokens is not None:
            samples = len(call.sample) // len(call.branches)
            if memory.spread is None or len(memory.spread) != samples:
                memory.spread = rows(memory.tokens, samples, "image", tiled).to(call.sample)
                memory.values = {path: {key: x.to(call.sample) for key, x in layer.items()} for path, layer in memory.values.items()}
        return next(call)  # type: ignore[no-any-return]

    def select_attention(self, layers: Sequence[AttentionInfo]) -> Sequence[AttentionInfo]:
        return [layer for layer in layers if layer.is_cross] if self.config.adapts else []

    def attention(self, call: AttentionCall, next: Any) -> Any:
        memory = call.shared
        if memory.spread is None or call.info.path not in memory.values:
            return next(call)
        return ask_with_image(call, next, memory.values[call.info.path], memory.spread, self.config.scale)


def ensure_number(knob: str, pictures: Tensor | None, call: RunCall) -> None:
    """Raises ConfigError for another number of pictures than one, or one for each prompt."""
    prompts = number_of_prompts(call.arguments())
    if pictures is not None and len(pictures) not in (1, prompts):
        raise ConfigError(f"plugin 'consissr': {knob} has {len(pictures)} pictures, and the call has {prompts} prompts: give one for each, "
                          "or one for all")  # fmt: skip


def sized(call: RunCall, size: tuple[int, int]) -> tuple[RunCall, tuple[int, int]]:
    """(the call, the size of its pictures): as it says, of an upscaler as its `image` says, else nearly ``size``, said for it."""
    pipe = call.pipe
    if call.family.name == UPSCALER:
        height, width = pipe.image_processor.preprocess(call["image"]).shape[-2:]
        return call, (height * pipe.vae_scale_factor, width * pipe.vae_scale_factor)
    side = math.lcm(8, pipe.vae_scale_factor)  # diffusers takes multiples of 8, whatever the autoencoder's factor is
    known = {name: call.get(name) for name in ("height", "width") if name in parameters(pipe)}
    asked = {name: value or max(of // side, 1) * side for (name, value), of in zip(known.items(), size, strict=True)}
    return call.replace(**asked), (asked["height"], asked["width"])
