"""What every benchmark of a calibrated method begins with: a pipeline, samples to measure on, and others to calibrate on."""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from diffgraft.installed import registry
from diffgraft.installed.anatomy import denoisers_of
from diffgraft.installed.errors import ConfigError
from diffgraft.kernel.loading import load_pipeline, unload
from diffgraft.lab.metrics import psnr
from diffgraft.lab.pictures import draw_grid, encode, strip, to_images
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.calibration import calibrate
from diffgraft.methods.files import write_atomic
from diffgraft.methods.inputs import CallSettings, Pictures, Sample, default_steps, make_pictures, make_samples

PipelineName = Annotated[str, typer.Option(help="A bundled name, a folder or a Hub id.")]
Plans = Annotated[list[str] | None, typer.Option(help="Plans to compare, as w4a8; repeat for several.")]
PromptFile = Annotated[Path | None, typer.Option(help="A text file with one prompt a line (default: the bundled pipeline's).")]
Samples = Annotated[int, typer.Option(min=1, help="Samples to compare.")]
CalibrateOn = Annotated[int, typer.Option(min=1, help="Samples to calibrate on; none of them is compared on.")]
Steps = Annotated[int | None, typer.Option(min=2)]
Device = Annotated[str, typer.Option()]
Out = Annotated[Path | None, typer.Option(help="Write the figures there as JSON, and a picture of the last plan beside it.")]

FIRST_SEED = 1000
"""Of the samples that are calibrated on; those that are measured on have 0, 1, ..."""


@dataclass(frozen=True)
class HeldOut:
    """A bare pipeline, what is measured on it, and what is calibrated on: no prompt and no seed is in both."""

    name: str
    pipe: Any
    settings: CallSettings
    tested: Sequence[Sample]
    teaching: Sequence[Sample]

    @classmethod
    def load(cls, name: str, steps: int | None, prompts: Path | None, tested: int, teaching: int, device: str = "cpu") -> HeldOut:
        """The first prompts are measured on, those behind them calibrated on.

        Raises:
            ConfigError: there are not enough prompts.
        """
        pipe = unload(load_pipeline(name)).to(device)
        pipe.set_progress_bar_config(disable=True)
        bundled = registry.bundled_of(name)
        texts = [line for line in prompts.read_text().splitlines() if line] if prompts else list(bundled.prompts if bundled else ())
        if texts and len(texts) < tested + teaching:
            raise ConfigError(f"{len(texts)} prompts for {tested} samples and {teaching} to calibrate on: give more by --prompts")
        settings = CallSettings(steps=steps or default_steps(pipe))
        seeds = range(FIRST_SEED, FIRST_SEED + teaching)
        taught = make_samples(pipe, seeds, texts[tested : tested + teaching]) if teaching else []
        return cls(name, pipe, settings, make_samples(pipe, range(tested), texts[:tested]), taught)

    def from_seed(self, first: int) -> HeldOut:
        """The same with other seeds to calibrate on."""
        return replace(self, teaching=[replace(sample, seed=first + i) for i, sample in enumerate(self.teaching)])

    @property
    def denoisers(self) -> Mapping[str, nn.Module]:
        return denoisers_of(self.pipe, registry.find_family(type(self.pipe)))

    def pictures(self) -> list[Pictures]:
        """One a measured sample, each in a call of its own, so that none depends on its neighbours."""
        return [make_pictures(self.pipe, [sample], self.settings) for sample in self.tested]

    def seeing(self, layers: Mapping[str, nn.Module]) -> tuple[list[Pictures], dict[str, Tensor]]:
        """(the same, what layers gave for them [forwards x rows, ...] by name)."""
        found: dict[str, list[Tensor]] = {name: [] for name in layers}
        hooks = [
            layer.register_forward_hook(lambda _, args, y, name=name: found[name].append(y.detach().clone()))
            for name, layer in layers.items()
        ]
        try:
            return self.pictures(), {name: torch.cat(each) for name, each in found.items()}
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def grafted(self, *plugins: Any) -> Iterator[Any]:
        """The pipeline with plugins inside."""
        try:
            yield load_pipeline(self.pipe, plugins=list(plugins))
        finally:
            unload(self.pipe)

    def calibrated(self, plugin: Any, keep: Path | None = None) -> tuple[Artefact, float]:
        """(what a plugin measures on the samples to calibrate on, seconds of the processor); a calibration of blocks into a file ``keep``
        goes on where it was interrupted."""
        started = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            artefact = calibrate(self.pipe, plugin, self.teaching, self.settings, keep or Path(folder) / "artefact.safetensors")
        return artefact, time.process_time() - started

    @property
    def facts(self) -> dict[str, Any]:
        """What belongs to every figure."""
        return {
            "pipeline": self.name,
            "steps": self.settings.steps,
            "samples": len(self.tested),
            "calibrate_on": len(self.teaching),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch", "diffusers", "diffgraft")},
        }

    @property
    def title(self) -> str:
        taught = f", calibrated on {len(self.teaching)}" if self.teaching else ""
        return f"{self.name}, {self.settings.steps} steps, {len(self.tested)} samples{taught}"

    def draw(self, out: Path | None, plan: str, shown: Mapping[str, Sequence[Pictures]]) -> None:
        """Pictures beside the file of figures, where one is wanted: a row for each way, the first one what the others are held against."""
        if out is None:
            return
        reference = next(iter(shown.values()))
        rows = []
        for way, found in shown.items():
            near = decibels(found, reference)
            told = [] if found is reference else [f"{near['mean']:.1f} dB", f"worst {near['worst']:.1f} dB"]
            rows.append(([way, *told], [strip(to_images(pictures[0])) for pictures in found]))
        grid = draw_grid(f"{self.title}: {plan}", "PSNR to the first row", [sample.label for sample in self.tested], rows, side=128)
        write_atomic(out.with_suffix(".png"), encode([grid], ".png"))

    def write(self, out: Path | None, **figures: Any) -> None:
        """The facts and the figures as JSON, where a file is wanted."""
        if out is not None:
            write_atomic(out, (json.dumps({**self.facts, **figures}, indent=1) + "\n").encode())


def decibels(found: Sequence[Pictures], reference: Sequence[Pictures]) -> dict[str, Any]:
    """PSNR of pictures to those of a reference: of each, their mean, and the worst."""
    each = [psnr(a, b)[0] for a, b in zip(found, reference, strict=True)]
    return {"psnr_db": each, "mean": statistics.mean(each), "worst": min(each)}


def feature_error(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
    """Of layers' outputs: the relative error in L2 of all, and the mean cosine of a layer's."""
    error = sum(float((y - reference[name]).pow(2).sum()) for name, y in found.items())
    size = sum(float(y.pow(2).sum()) for y in reference.values())
    cosines = [torch.cosine_similarity(y, reference[name], dim=-1).mean() for name, y in found.items()]
    return {"error": (error / size) ** 0.5, "cosine": float(torch.stack(cosines).mean())}
