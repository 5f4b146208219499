"""Timestep-segment preference optimisation (TPO): Diffusion-DPO with times of one segment alone, for a LoRA that acts in it.

    L = -log sigmoid(-beta ((|e - e_theta(x_w,t)|^2 - |e - e_ref(x_w,t)|^2) - (|e - e_theta(x_l,t)|^2 - |e - e_ref(x_l,t)|^2)))
    t ~ U(S_k)

x_w is the better picture of a prompt and x_l the worse one, both with the same noise e at the same t; theta is the model with the expert,
ref without it. Of models that predict v or a velocity e stands for that, the target that they were trained on.

Pairs come with the data (``worse`` beside each picture), or are made as the fit goes: some pictures of each prompt, by the model as it is
in use (the expert acting in its segment alone), of which a reward takes the best and the worst.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffgraft import ConfigError, DenoiseCall, LoraFitter, Unsupported
from diffgraft.methods.adapters import without_adapters
from diffgraft.methods.decoding import decode, ensure_decodes, to_latents
from diffgraft.methods.examples import Example, pixels_of
from diffgraft.methods.fitter import Batch
from diffgraft.methods.predictions import SignalNoise, is_flow, known_kind, levels_at, prediction_target
from diffgraft.methods.rewards import find_reward
from diffgraft.methods.search import Probe
from diffgraft.methods.variants import own_size
from torch import Tensor, nn

from diffgraft_segment_lora.knobs import PreferenceConfig
from diffgraft_segment_lora.method import is_in, normalised, preference_logit, preference_loss, squared_error

TRAINED = 1000
"""Of flow models: a timestep is so many times sigma."""


class PreferenceFitter(LoraFitter):
    Config = PreferenceConfig
    wants = frozenset({"prompts"})
    rolling: ClassVar[bool] = False
    config: PreferenceConfig

    def build(self, probe: Probe) -> nn.Module:
        family, scheduler, pipe = probe.target.family, probe.scheduler, probe.target.pipe
        self.kind, self.flow = known_kind(family, scheduler), is_flow(family, scheduler)
        ensure_decodes(pipe, family)
        start, end = self.config.start, self.config.end
        if len(probe.target.denoisers) > 1 and end < (boundary := float(pipe.config.get("boundary_ratio") or 0)):
            raise Unsupported(
                f"segment_lora: end = {end:g}: the first of two denoisers, which a fit learns for, runs to sigma = {boundary:g} only"
            )
        self.times = torch.empty(0)
        if not self.flow:
            every = torch.arange(int(scheduler.config.num_train_timesteps))
            levels = normalised(*levels_at(family, scheduler, every, None, torch.device("cpu"))).tolist()
            self.times = every[[is_in(sigma, (start, end)) for sigma in levels]]
            if not len(self.times):
                raise ConfigError(
                    f"segment_lora: no training time of this model has sigma in {start:g} to {end:g}; they are from {max(levels):.4f} to "
                    f"{min(levels):.4f}"
                )
        self.reward = None if self.config.reward is None else find_reward("segment_lora: reward", self.config.reward)
        return super().build(probe)

    def ensure_enough(self, pipe: Any, examples: Sequence[Example], rows: Iterable[Sequence[int]]) -> None:
        having = [each for each in examples if each.worse is not None]
        if self.config.reward is not None:
            find_reward("segment_lora: reward", self.config.reward)
            if having:
                raise ConfigError(f"segment_lora: {having[0].label} has a worse picture, and reward makes pairs itself: take one of both")
        elif missing := next((each for each in examples if each.worse is None or each.picture is None), None):
            raise ConfigError(
                f"segment_lora learns from pairs, and {missing.label} has no worse picture: --data FOLDER with "
                '{"file_name": "better.png", "worse": "worse.png", "text": "..."} in its metadata.jsonl, or --set reward=NAME'
            )

    # pairs -----------------------------------------------------------------------------------------------------------------------------

    def rollout(self, pipe: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Clean latents of the better and of the worse pictures, [batch, ...] each, and [batch] whether they are a pair: 1 or 0."""
        if self.reward is not None:
            return self.made_pairs(pipe, batch)
        better, worse = self.given_pairs(batch)
        return better, worse, torch.ones(len(better), device=better.device)

    @torch.no_grad()
    def given_pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        pipe, family = self.probe.target.pipe, self.probe.target.family
        settings = self.settings
        size = (settings.height, settings.width) if settings.height and settings.width else own_size(pipe)
        if size is None:
            raise ConfigError(f"{type(pipe).__name__} does not say how large its pictures are: give --height and --width")
        found = []
        for examples in (batch.examples, [replace(each, picture=each.worse) for each in batch.examples]):
            pixels = pixels_of(examples, *size)
            assert pixels is not None, "ensure_enough"
            pixels = pixels.to(pipe._execution_device)
            found.append(to_latents(pipe, family, pixels[:, :, None] if family.latents == "bcfhw" else pixels))
        return found[0], found[1]

    def made_pairs(self, pipe: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        several = replace(batch, examples=tuple(each for each in batch.examples for _ in range(self.config.candidates)))
        arguments = {**self.arguments(several), "output_type": "latent", "return_dict": False}
        self.rolling = True  # type: ignore[misc]
        try:
            latents = pipe(**arguments)[0]
        finally:
            self.rolling = False  # type: ignore[misc]
        pictures = decode(pipe, self.probe.target.family, latents, arguments)
        assert self.reward is not None
        scores = torch.tensor(self.reward(pictures, [each.prompt or "" for each in several.examples]), dtype=torch.float64)
        best, worst, told = best_and_worst(scores.view(-1, self.config.candidates))
        rows = latents.unflatten(0, (-1, self.config.candidates))
        places = torch.arange(len(rows))
        return rows[places, best], rows[places, worst], told.to(rows.device, torch.float32)

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Tensor]) -> Tensor:
        """While pictures are made: the expert acts in its segment alone."""
        if not self.rolling:
            return next(call)
        step = call.step
        sigma = float(normalised(*levels_at(call.family, call.pipe.scheduler, step.t, step.sigma, call.sample.device)))
        if is_in(sigma, (self.config.start, self.config.end)):
            return next(call)
        with without_adapters(self.trained):
            return next(call)

    # the loss --------------------------------------------------------------------------------------------------------------------------

    def loss(self, session: Any, batch: Batch) -> Tensor:
        better, worse, told = batch.made
        calls = self.conditioning(batch, whole=True)
        t, levels = self.drawn(batch, better)
        noise = torch.randn(better.shape, generator=batch.generator).to(better)
        errors = []
        for x0 in (worse, better):
            x, target = levels.a * x0 + levels.s * noise, prediction_target(x0, noise, levels, self.kind)
            with torch.no_grad(), without_adapters(self.trained):
                reference = squared_error(self.predicted(session, x, t, calls), target)
            errors += [squared_error(self.predicted(session, x, t, calls), target), reference]
        return preference_loss(preference_logit(*errors, beta=self.config.beta) * told)  # of equals log 2, which moves nothing

    def drawn(self, batch: Batch, like: Tensor) -> tuple[Tensor, SignalNoise]:
        """Times [batch] of the denoiser, uniform in S_k, and their levels as they broadcast to ``like``."""
        rows, device, shape = like.shape[0], like.device, (-1, *[1] * (like.ndim - 1))
        if self.flow:
            start, end = self.config.start, self.config.end
            s = end + (start - end) * torch.rand(rows, generator=batch.generator)
            t, levels = s * TRAINED, SignalNoise(1 - s, s)
        else:
            t = self.times[torch.randint(len(self.times), (rows,), generator=batch.generator)]
            abar = self.probe.scheduler.alphas_cumprod.cpu()[t]
            levels = SignalNoise(abar.sqrt(), (1 - abar).sqrt())
        a, s = (level.view(shape).to(device, like.dtype) for level in levels)
        return t.to(device), SignalNoise(a, s)

    def predicted(self, session: Any, x: Tensor, t: Tensor, calls: Mapping[str, Any]) -> Tensor:
        """The denoiser's prediction for x [batch, ...] at times t [batch]."""
        family = self.probe.target.family
        asked, time = calls[family.sample], calls[family.timestep]
        if asked.shape != x.shape:
            raise Unsupported(
                f"segment_lora: this denoiser is given {tuple(asked.shape)} where the latents are {tuple(x.shape)}: what lies beside them "
                "(a mask, a reference picture) no pair says"
            )
        t = family.told(t).to(time.dtype)
        found = session.predict({**calls, family.sample: x.to(asked.dtype), family.timestep: t})
        return found.narrow(family.channel_axis, 0, x.shape[family.channel_axis])  # type: ignore[no-any-return]


def best_and_worst(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of scores [batch, candidates] the number of the largest and of the least, and whether they differ: equals are no pair."""
    best, worst = scores.argmax(1), scores.argmin(1)
    return best, worst, scores.amax(1) > scores.amin(1)
