"""One More Step (Hu, Zheng, Zheng, Wang, Tao, Cham, arXiv 2311.15744): a run begins at the noisiest sample that the model was trained on.

Before the first denoiser call a small network psi of its own tells from pure noise and the prompt what is seen there at the lowest
frequencies, x_0^ = -psi(n, c), and the run's first latents become x_T = sqrt(abar_T) x_0^ + sqrt(1 - abar_T) n_2. The rest of the run is
the pipeline's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffgraft import ConfigError, Conflict, DenoiseCall, Effects, Need, Paper, Plugin, PluginConfig, RunCall, Target, Unsupported
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.conditioning import for_each_prompt, number_of_prompts, own_conditioning, with_prompt
from diffgraft.methods.encoders import Encoder
from diffgraft.methods.predictions import levels_of
from diffgraft.methods.published import Weights
from diffgraft.methods.starts import is_first, start_from, unit_noise
from diffusers.utils.torch_utils import randn_tensor
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from diffgraft_one_more_step.fitting import OneMoreStepFitter
from diffgraft_one_more_step.method import Std, clean, guided, share_of_noise
from diffgraft_one_more_step.network import GROUPS, LAYOUT, AsPublished, network_of, predict, sizes_of

__all__ = ["OneMoreStep"]
__version__ = "0.1.0"

PURE = 1e-5
"""Of a schedule that ends below this abar nothing is left to mend: x_0 is not seen at its end."""


class OneMoreStepConfig(PluginConfig):
    """Knobs of One More Step."""

    one_more: bool = Field(True, description="take the step; false is off, bit for bit")
    weights: str | Path | list[str | Path] | Weights | None = Field(
        None, description="a published network: a file, 'owner/name/file' on the Hub, or what `diffgraft fit` made for a sibling"
    )
    encoder: str | Path | Encoder | tuple[Any, nn.Module] | None = Field(
        None, description="the text encoder of `weights`: a folder, a Hub id or (tokenizer, model); none: the pipeline's own serves"
    )
    artefact: str | Path | Artefact | None = Field(None, description="a network that `diffgraft fit one_more_step` learned on this model")
    prompt: str | tuple[str, ...] | None = Field(
        None, description="what the network is told (colours, brightness), one text or one for each prompt of the call; none: the call's"
    )
    guidance_scale: float = Field(1.0, ge=0, description="w: v_0 + w (v - v_0), v_0 told nothing; 1 asks for v alone")
    std: Std = Field("deviation", description="of n_2: sqrt(1 - abar_T), or 1 - abar_T as in the official code ('variance')")

    @model_validator(mode="after")
    def _one_network(self) -> Self:  # before anything is fetched
        if self.artefact is not None and self.weights is not None:
            raise ValueError("weights and artefact both say a network; give one of them")
        if self.artefact is not None and self.encoder is not None:
            raise ValueError("artefact was learned with the pipeline's own text encoder; leave encoder out")
        return self


@dataclass
class Said:
    """What the network is told in this run [prompts, tokens, width]: ``text`` where it is not the call's own, ``nothing`` for v_0."""

    text: Any = None
    nothing: Any = None


class OneMoreStep(Plugin):
    name = "one_more_step"
    paper = Paper(
        title="One More Step: A Versatile Plug-and-Play Module for Rectifying Diffusion Schedule Flaws and Enhancing Low-Frequency "
        "Controls",
        arxiv="2311.15744",
        implemented="the extra step with its own prompt and guidance, by published networks or by one of your own (`diffgraft fit`)",
        omitted="other noise levels than abar = 0 at the network's input",
        licence="the official repository names none; written from the equations",
    )
    families = ("sd", "sdxl", "latent_consistency")
    not_on: ClassVar[dict[str, str]] = dict.fromkeys(
        ("*Img2Img*", "*Depth2Img*", "*Inpaint*"), "it begins with a noised picture, whose low frequencies are there already"
    )
    Config = OneMoreStepConfig
    State = Said
    neutral: ClassVar[dict[str, Any]] = {"one_more": False}
    active: ClassVar[dict[str, Any]] = {"one_more": True}
    effects = Effects(edits=frozenset({"latents"}), stochastic=True)
    needs = (
        Need("fit", "artefact", fits=frozenset(), holds=AsPublished()),
        Need("weights", "weights", holds=LAYOUT),
        Need("encoder", "encoder"),
    )
    fitting = OneMoreStepFitter
    config: OneMoreStepConfig

    def check(self, target: Target) -> None:
        given, tensors = target.given, tensors_of(target.given)
        if tensors is None or not self.config.one_more:
            return
        ensure_mismatch(target.pipe.scheduler)
        sizes, config = sizes_of(tensors), target.denoisers["unet"].config
        if sizes["c"] != config["out_channels"]:
            raise Unsupported(f"one_more_step: its network is for latents of {sizes['c']} channels, these have {config['out_channels']}")
        if sizes["w"] % GROUPS:
            raise Unsupported(f"one_more_step: its network is {sizes['w']} channels wide, no multiple of {GROUPS}: nobody publishes such")
        encoder = given["encoder"]
        width = config["cross_attention_dim"] if encoder is None else width_of(encoder)
        if sizes["d"] != width:
            whose = "the pipeline's text encoder" if encoder is None else "encoder"
            raise Unsupported(
                f"one_more_step: its network reads text of width {sizes['d']}, and {whose} gives {width}: name the one that it was made "
                "with (encoder='stabilityai/stable-diffusion-2-1/text_encoder' for the published OpenCLIP ones)"
            )

    def run(self, call: RunCall, next: Any) -> Any:
        said: Said = call.shared
        said.text = said.nothing = None  # an outer plugin may run the pipeline several times
        if not self.config.one_more:
            return next(call)
        if self.tensors(call) is None:
            call.note(
                "inactive: no network is given; name weights=, or artefact= (`diffgraft fit one_more_step --pipeline ... --data ...`)"
            )
            return next(call)
        if call.get("latents") is not None:
            raise Unsupported(
                "one_more_step: latents were given (by the call, or a plugin further out), but where a run begins is what it says itself; "
                "leave latents out, or take it off"
            )
        if self.config.prompt is not None or call.given("encoder") is not None:
            said.text = self.told(call, self.prompts(call))
        if self.config.guidance_scale != 1:
            said.nothing = self.told(call, [""] * number_of_prompts(call.arguments()))
        return next(call)

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        if call.step.call == 0 and self.config.one_more and self.tensors(call) is not None:
            call = call.with_latents(self.start(call) if is_first(call) else call.latents)
        return next(call)  # type: ignore[no-any-return]

    def start(self, call: DenoiseCall) -> Tensor:
        """x_T, in the pipeline's layout and dtype."""
        said, w = call.shared, self.config.guidance_scale
        try:
            noise = unit_noise(call)
        except Conflict as error:
            raise Unsupported(f"{error}, or name one_more_step before it") from error
        psi = network_of(self.tensors(call), noise.device, call.sample.dtype)  # kept for this one call: it takes memory
        v = predict(psi, noise, call.only("cond")["encoder_hidden_states"] if said.text is None else said.text)
        if w != 1:
            v = guided(predict(psi, noise, said.nothing), v, w)
        fresh = randn_tensor(noise.shape, generator=call.generator, device=noise.device, dtype=torch.float32)
        call.count("more steps")
        return start_from(call, clean(v), share_of_noise(*levels_of(call), self.config.std) * fresh)

    def tensors(self, call: Any) -> Any:
        """Of the network; None where none is given."""
        return tensors_of({knob: call.given(knob) for knob in ("weights", "artefact")})

    def prompts(self, call: RunCall) -> list[str]:
        """What the network is told, a text for each prompt of the call."""
        prompt = call.get("prompt") if self.config.prompt is None else self.config.prompt
        if prompt is None:
            raise ConfigError(
                "plugin 'one_more_step': the call gives its prompt as embeddings, which say nothing to encoder; say it as text, or name "
                "prompt= for this plugin"
            )
        return for_each_prompt(self.name, prompt, call.arguments())

    @torch.no_grad()
    def told(self, call: RunCall, prompts: Sequence[str]) -> Tensor:
        """These prompts as the network reads them [prompts, tokens, width]."""
        encoder: Encoder | None = call.given("encoder")
        if encoder is None:
            heard = own_conditioning(call.pipe, with_prompt(call.arguments(), list(prompts)))
            return heard.of_branch["cond"]["encoder_hidden_states"]  # type: ignore[no-any-return]
        words = encoder.tokenizer(
            list(prompts), padding="max_length", max_length=encoder.tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        return encoder.model(words.input_ids.to(encoder.model.device))[0]  # type: ignore[no-any-return]


def tensors_of(given: Any) -> Any:
    """Of the network that a plugin was given; None where it was given none."""
    found = given["weights"] if given["artefact"] is None else given["artefact"]
    return None if found is None else found.tensors


def width_of(encoder: Encoder) -> int:
    """Of what a text encoder gives."""
    config: Any = encoder.model.config
    return int(getattr(config, "d_model", None) or config.hidden_size)


def ensure_mismatch(scheduler: Any) -> None:
    """Raises Unsupported for a schedule that ends in pure noise, or says nothing of abar."""
    abar = getattr(scheduler, "alphas_cumprod", None)
    name = type(scheduler).__name__
    if scheduler.config.get("use_flow_sigmas"):
        raise Unsupported(f"one_more_step: the schedule of this {name} is a flow model's (use_flow_sigmas): it begins in pure noise")
    if abar is None:
        raise Unsupported(f"one_more_step: {name} has no alphas_cumprod, so it is not known where its training began")
    if float(abar[-1]) < PURE:
        raise Unsupported(
            f"one_more_step: the schedule of this {name} ends in pure noise already (rescale_betas_zero_snr, or a cosine), so there is "
            "nothing to mend: take it off, and sample with timestep_spacing='trailing'"
        )
