"""``diffgraft fit accvideo``: a LoRA whose Euler step leads from one key point of the teacher's trajectory to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffgraft import ArtefactMismatch, ConfigError, PluginConfig, denoisers_of, find_family
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.fitter import Batch, LoraFitter
from diffgraft.methods.inputs import CallSettings
from pydantic import Field
from torch import Tensor, nn

from diffgraft_accvideo.collection import HOLDS, ensure_teaches
from diffgraft_accvideo.knobs import ensure_unsaid
from diffgraft_accvideo.method import jump, key_points, trajectory_loss
from diffgraft_accvideo.schedules import strided, whole

FITS = frozenset({"scheduler"})
"""What of the collecting run a fit must share beside the model; the size is held against the denoiser's call."""


class FitConfig(PluginConfig):
    """Knobs of the fit."""

    rank: int = Field(32, ge=1, le=1024, description="of the LoRA (the published extract: 32)")
    rate: float = Field(5e-4, gt=0, le=1, description="largest learning rate")


class AccVideoFitter(LoraFitter):
    """One row is one trajectory of the example's prompt and one of its N jumps, both drawn."""

    Config = FitConfig
    wants: ClassVar[frozenset[str]] = frozenset({"prompts"})
    targets = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
    ema = 0.99
    plugin: Any
    config: FitConfig

    def suits(self, settings: CallSettings) -> CallSettings:
        """Calls of N steps.

        Raises:
            ConfigError: knobs of a run are set, or the settings say another number of steps, or guidance.
        """
        N = self.plugin.config.steps
        ensure_unsaid(self.plugin.config, "a fit begins anew, from the pipeline's own weights", "lora", "strength", "guidance")
        if N and settings.steps not in (None, N):
            raise ConfigError(
                f"plugin 'accvideo': --inference-steps {settings.steps}, and steps = {N} is what the student makes: leave the first out, "
                f"or say -o accvideo.steps={settings.steps}"
            )
        for name, said in (("--guidance-scale", settings.guidance_scale), ("--negative-prompt", settings.negative_prompt)):
            if said is not None:
                raise ConfigError(
                    f"plugin 'accvideo': {name} {said!r}: a fit has its teacher's guidance from the trajectories; leave {name} out, or "
                    f"collect others with it (`diffgraft calibrate accvideo ... {name} ...`)"
                )
        return replace(settings, steps=N or settings.steps)

    def ensure_enough(self, pipe: Any, examples: Sequence[Any], rows: Iterable[Sequence[int]]) -> None:
        """Read the trajectories, and refuse those of another model, scheduler or grid, and prompts without one."""
        family = find_family(type(pipe))
        ensure_teaches(pipe, family, self.plugin.config)
        self.read(pipe, denoisers_of(pipe, family), pipe.scheduler)
        if missing := next((each.prompt for each in examples if each.prompt not in self.of_text), None):
            raise ConfigError(
                f"plugin 'accvideo': the trajectories in {self.held.path or 'memory'} have none of {missing!r}: give the prompts that they "
                "were collected with, or collect some of it"
            )

    def read(self, pipe: Any, denoisers: Mapping[str, nn.Module], scheduler: Any) -> None:
        """The trajectories, held against the pipeline.

        Raises:
            ConfigError: none are named, or N is 0.
            ArtefactMismatch: they are of something else, or without the key points of N.
        """
        source, N = self.plugin.config.trajectories, self.plugin.config.steps
        if source is None:
            raise ConfigError(
                "plugin 'accvideo': a fit learns from trajectories: collect some (`diffgraft calibrate accvideo --pipeline NAME --prompts "
                "FILE --out FILE`), and name them: -o trajectories=FILE"
            )
        if not N:
            raise ConfigError(f"plugin 'accvideo': steps = {N}: a fit is for one number of steps, 1 or more: -o steps=N")
        held = source if isinstance(source, Artefact) else Artefact.load(source, self.plugin.name)
        held.ensure_model(pipe, denoisers)
        held.ensure_holds(HOLDS)
        held.ensure_run(scheduler, held.made_for.steps, held.made_for.shape, FITS)
        K, index = held.facts["grid"], held.facts["index"]
        if self.plugin.config.grid != K:
            raise ArtefactMismatch(
                f"accvideo: the trajectories are of {K} steps, and grid = {self.plugin.config.grid}: say -o grid={K}, or collect others"
            )
        wanted = key_points(K, N)
        if lacks := [t for t in wanted if t not in index]:
            raise ArtefactMismatch(
                f"accvideo: the trajectories hold the points {index} of {K}, and {N} steps need {lacks[0]} too: collect with "
                f"-o points=[{N}], or fit another number of steps"
            )
        self.place = torch.tensor([index.index(t) for t in wanted])
        self.held, self.kept, self.sigmas = held, held.tensors["points"], held.tensors["sigmas"][self.place]
        if not scheduler.config.get("use_dynamic_shifting"):
            ours = strided(whole(scheduler, K, self.plugin.config), N).sigmas
            if not torch.allclose(self.sigmas.float(), ours.float().cpu(), rtol=0, atol=1e-5):
                raise ArtefactMismatch(
                    "accvideo: a run with shift and levels as they are here would be at other levels than the trajectories: say the "
                    "-o shift= and -o levels= that they were collected with"
                )
        self.of_text: dict[str, list[int]] = {}
        for row, text in enumerate(held.facts["texts"]):
            self.of_text.setdefault(text, []).append(row)

    def loss(self, session: Any, batch: Batch) -> Tensor:
        family = self.probe.target.family
        texts, model = [str(each.prompt) for each in batch.examples], self.trained
        draws = torch.rand(2, len(texts), generator=batch.generator)
        row = [self.of_text[text][int(u * len(self.of_text[text]))] for text, u in zip(texts, draws[0].tolist(), strict=True)]
        i = (draws[1] * (len(self.place) - 1)).long()
        device = next(model.parameters()).device
        x, there = (self.kept[row, self.place[k]].to(device) for k in (i, i + 1))
        T = self.probe.scheduler.config.num_train_timesteps
        t = (self.sigmas[i] * T).float().to(device)
        call = dict(self.conditioning(batch, whole=True))
        if (size := tuple(call[family.sample].shape[1:])) != (here := tuple(x.shape[1:])):
            raise ArtefactMismatch(
                f"accvideo: the trajectories have latents of {here}, and this call {size}: give the --height, --width and -a num_frames= "
                "that they were collected with"
            )
        call |= {family.sample: x.to(model.dtype), family.timestep: family.told(t)}
        v = session.predict(call)
        return trajectory_loss(jump(x, v, self.sigmas[i], self.sigmas[i + 1]), there)

    def facts(self) -> dict[str, Any]:
        return {"steps": self.plugin.config.steps, "rank": self.rank}
