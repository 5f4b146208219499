"""Diffusion classifiers: how well a text describes a picture, by how well the denoiser predicts noise put on it when it is told the text.

    pipe = load_pipeline("emoji-sd", plugins=["diffusion_classifier"])
    classifier = pipe.plugins["diffusion_classifier"]
    classifier.classify(pipe, images, ["a big panda", "a big frog"])    # -> [0, 1, ...]
    classifier.score(pipe, images, prompts)                             # -> one number a picture, the larger the better

The equations are in ``method.py``, the calls of the denoiser in ``scoring.py``. In a run it changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from diffgraft import ConfigError, Effects, Paper, Plugin, PluginConfig, RunCall, Target
from diffgraft.methods.examples import pixels
from diffgraft.methods.rewards import asking_pipeline
from diffgraft.methods.variants import own_size
from PIL import Image
from pydantic import Field
from torch import Tensor

from diffgraft_diffusion_classifier.method import Norm, Scheme, fit_weights, weighted
from diffgraft_diffusion_classifier.scoring import NAME, Errors, Scorer, Size, ensure_scores, where, why_not_now

__all__ = ["DiffusionClassifier", "Errors", "fit_weights", "reward"]
__version__ = "0.1.0"

Prompts = Sequence[str] | Sequence[Sequence[str]]
Reward = Callable[[Sequence[Any], Sequence[str]], list[float]]


class DiffusionClassifierConfig(PluginConfig):
    """Knobs of DiffusionClassifier."""

    timesteps: int = Field(30, ge=1, description="S: times at which errors are measured, every floor(1000 / S)-th of the schedule")
    window: Literal["all", "late"] = Field("all", description="times of the whole schedule, or S of its noisier half")
    margin: int | None = Field(
        None, ge=0, description="times left out at either end of the schedule; none: 10 of 1000, and 20 of a flow model's (not of `late`)"
    )
    weights: Scheme | tuple[float, ...] = Field(
        "uniform", description="w_t: a scheme, or one number for each time, least noise first (those that `fit_weights` learned)"
    )
    norm: Norm = Field("mse", description="err_t: the mean of the squared differences, or their L2 norm")
    relative: bool = Field(
        True, description="a score is err(no prompt) - err(prompt); false: -err(prompt), for one picture's prompts alone"
    )
    guidance: float = Field(0.0, ge=0, description="the scale that a guidance-distilled model (FLUX.1-dev) is told; others have none")
    batch: int = Field(64, ge=1, description="pairs of picture and prompt in one call of the denoiser; the memory follows from it")
    seed: int = Field(0, ge=0, lt=2**63, description="of the noises, one for each time, the same for all pictures and prompts")
    size: tuple[int, int] | None = Field(None, description="height and width that pictures are cut to, in pixels; none: the pipeline's own")
    scores: bool = Field(False, description="score the pictures of each run under their prompts, for the report")


class DiffusionClassifier(Plugin):
    name = NAME
    paper = Paper(
        title="Diffusion Classifiers Understand Compositionality, but Conditions Apply",
        arxiv="2505.17955",
        implemented="errors of a denoiser under prompts, as classifier of pictures, score and reward; weights of times, given or fitted",
        omitted="errors of guided predictions; times drawn at random by a density; the benchmark's own data",
        licence="official code without a licence; written from the formulas",
    )
    families = ("sd", "sdxl", "sd3", "flux")
    not_on: ClassVar[dict[str, str]] = {
        f"*{word}*": "it takes more than a prompt, and what is scored is a text-to-image model: put the plugin on that pipeline of the "
        "same parts (AutoPipelineForText2Image.from_pipe)"
        for word in ("Img2Img", "Depth2Img", "Inpaint", "ControlNet", "AdapterPipeline")
    }
    Config = DiffusionClassifierConfig
    neutral: ClassVar[dict[str, Any]] = {"scores": False}
    active: ClassVar[dict[str, Any]] = {"scores": True, "timesteps": 2}
    effects = Effects()  # its noises have a seed of their own and reach no picture
    config: DiffusionClassifierConfig

    def check(self, target: Target) -> None:
        ensure_scores(target.pipe, target.family)
        where(self.config, target.family, target.pipe.scheduler)

    # what users call -----------------------------------------------------------------------------------------------------------------

    def errors(self, pipe: Any, images: Sequence[Any], prompts: Prompts) -> Errors:
        """err_t of each picture under each prompt: ``values`` [pictures, prompts, T].

        Args:
            pipe: whose denoiser is asked, with this plugin on it or not. Other plugins on it take no part.
            images: PIL pictures, or files.
            prompts: for all pictures, or a list of as many for each.

        Raises:
            ConfigError: something that is no picture or no prompt, or lists of unequal length.
            Unsupported: this plugin does not work on the pipeline.
        """
        return self._measured(pipe, images, prompts)[1]

    def classify(self, pipe: Any, images: Sequence[Any], prompts: Prompts) -> list[int]:
        """For each picture the number of the prompt that describes it best (of equally good ones the first); as :meth:`errors`."""
        scorer, measured = self._measured(pipe, images, prompts)
        return weighted(measured.values, scorer.weights).argmin(1).tolist() if len(images) else []

    def score(self, pipe: Any, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        """How well each prompt describes its picture, the larger the better: err(no prompt) - err(prompt).

        Raises:
            ConfigError: not one prompt for each picture; else as :meth:`errors`.
        """
        return self._scored(pipe, images, prompts, None)

    def reward(self, pipe: Any) -> Reward:
        """:meth:`score` by this pipeline as a reward, for plugins that search on it or on another one.

        Raises:
            Unsupported: this plugin does not work on the pipeline.
        """
        Scorer(pipe, self)

        def diffusion_classifier(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
            return self.score(pipe, images, prompts)

        return diffusion_classifier

    fit_weights = staticmethod(fit_weights)

    def _scored(self, pipe: Any, images: Sequence[Any], prompts: Sequence[str], size: Size | None) -> list[float]:
        if isinstance(prompts, str) or len(images) != len(prompts):
            what = "one text" if isinstance(prompts, str) else f"{len(prompts)} prompts"
            raise ConfigError(f"{NAME}: {len(images)} pictures and {what}: a score wants a list with one prompt for each picture")
        for_each(images, [[prompt] for prompt in prompts])
        scorer = Scorer(pipe, self, self.config.size or size)
        return scorer.scores(encoded(scorer, images), prompts).tolist()  # type: ignore[no-any-return]

    def _measured(self, pipe: Any, images: Sequence[Any], prompts: Prompts) -> tuple[Scorer, Errors]:
        wanted = for_each(images, prompts)
        scorer = Scorer(pipe, self)
        latents = encoded(scorer, images)
        count = len(wanted[0]) if wanted else len(prompts)
        places: dict[tuple[int, str], int] = {}  # what is asked twice has one answer
        for number in range(count):  # prompt by prompt, so that a batch holds few of them
            for i, texts in enumerate(wanted):
                places.setdefault((i, texts[number]), len(places))
        order = torch.tensor([places[i, text] for i, texts in enumerate(wanted) for text in texts], dtype=torch.long)
        values = scorer.errors(latents, list(places))[order].view(len(wanted), count, len(scorer.levels))
        return scorer, Errors(values, tuple(level.t for level in scorer.levels), scorer.forwards)

    # in a run -----------------------------------------------------------------------------------------------------------------------

    def run(self, call: RunCall, next: Any) -> Any:
        """After a run: the scores of its pictures, in the report. The pictures stay as they are."""
        result = next(call)
        if self.config.scores:
            prompt = call.get("prompt")
            why = "the run was stopped" if call.stopped else why_not_now(call.pipe)
            if prompt is None:
                why = "the prompt was given as embeddings, and a score wants its text"
            if why:
                call.note(f"inactive: {why}")
            else:
                self._tell(call, result[0], [prompt] if isinstance(prompt, str) else list(prompt))
        return result

    def _tell(self, call: RunCall, made: Any, prompts: Sequence[str]) -> None:
        sides = call.get("height"), call.get("width")
        scorer = Scorer(call.pipe, self, own_size(call.pipe) if None in sides else sides)
        if call.get("output_type") == "latent":
            latents = made.float()
        elif isinstance(made, (list, tuple)):
            latents = encoded(scorer, made)
        else:
            pixels = made if isinstance(made, Tensor) else torch.from_numpy(made).permute(0, 3, 1, 2)
            latents = scorer.latents(2 * pixels.float() - 1)
        several = len(latents) // len(prompts)  # num_images_per_prompt
        found = scorer.scores(latents, [prompt for prompt in prompts for _ in range(several)])
        call.record({"scores": found})
        call.note(
            f"scores under the prompts: {', '.join(f'{value:.4g}' for value in found.tolist())} (inactive on the pictures themselves)"
        )


def reward(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """The reward "diffusion_classifier": :meth:`DiffusionClassifier.score` by the very pipeline whose run asks, with the knobs of the
    plugin where it is on that pipeline, else with the defaults.

    Raises:
        ConfigError: no run asks.
    """
    pipe = asking_pipeline()
    if pipe is None:
        raise ConfigError(
            "reward 'diffusion_classifier': it judges by the pipeline whose run asks for it, and no run does; take one that has its "
            'pipeline: pipe.plugins["diffusion_classifier"].reward(pipe)'
        )
    plugin: DiffusionClassifier = pipe.plugins[NAME] if NAME in pipe.plugins else DiffusionClassifier()
    made = [image.size for image in images if isinstance(image, Image.Image)]
    return plugin._scored(pipe, images, prompts, (made[0][1], made[0][0]) if made else None)  # as large as the run makes them


def for_each(images: Sequence[Any], prompts: Prompts) -> list[tuple[str, ...]]:
    """The prompts of each picture.

    Raises:
        ConfigError: naming what is no picture or no prompt, or the lengths that do not fit.
    """
    for what, values in (("images", images), ("prompts", prompts)):
        if not isinstance(values, (list, tuple)):
            raise ConfigError(f"{NAME}: {what} = {values!r:.80}: give a list of {'pictures' if what == 'images' else 'texts'}")
    for i, image in enumerate(images):
        if not isinstance(image, (Image.Image, str, os.PathLike)):
            raise ConfigError(f"{NAME}: images[{i}] is a {type(image).__name__}: give PIL pictures or files")
    shared = all(isinstance(each, str) for each in prompts)
    if not shared and len(prompts) != len(images):
        raise ConfigError(f"{NAME}: {len(images)} pictures but {len(prompts)} lists of prompts: give one list for each, or one for all")
    lists: Sequence[Any] = [prompts] * len(images) if shared else prompts
    wanted = [tuple(each) if isinstance(each, (list, tuple)) else (each,) for each in lists]
    if wrong := [each for texts in wanted for each in texts if not isinstance(each, str)]:
        raise ConfigError(f"{NAME}: prompts: {wrong[0]!r:.80} is no text")
    counts = {len(texts) for texts in wanted}
    if counts == {0} or len(counts) > 1:
        raise ConfigError(f"{NAME}: prompts: {sorted(counts)} for the pictures: give each picture the same number, at least one")
    return wanted


def encoded(scorer: Scorer, images: Sequence[Any]) -> Tensor:
    """Clean latents of pictures or files, cut to the scorer's size around the middle."""
    parts = [images[begin : begin + scorer.config.batch] for begin in range(0, len(images), scorer.config.batch)]
    found = [scorer.latents(torch.stack([pixels(image, *scorer.size) for image in part])) for part in parts]
    return torch.cat(found) if found else torch.empty(0)
