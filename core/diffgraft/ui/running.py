"""One run of the page: the plain pipeline, then the stack on it, timed in turn as `diffgraft compare` does, told step by step."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffgraft.installed.errors import ConfigError, DiffgraftError
from diffgraft.installed.specs import build_plugin
from diffgraft.kernel.loading import load_pipeline
from diffgraft.kernel.stack import ensure_bare
from diffgraft.lab.compare import Bench, quiet
from diffgraft.lab.compare_picture import psnr_text, seconds_text
from diffgraft.lab.compare_view import skipped_text, speed_text
from diffgraft.lab.pictures import fit, strip, to_images
from diffgraft.lab.results import Arm, ArmResult, CompareSettings
from diffgraft.methods.extras import imported
from diffgraft.methods.inputs import CallSettings, call_arguments, default_steps, make_samples, parameters
from diffgraft.ui.access import Access
from diffgraft.ui.preview import Lookout, Previewer, Watched
from diffgraft.ui.stacks import Asked

SHOWN = 512
"""Pixels of the longer side of a picture on the page."""
THUMB = 128
LIVE = 256
"""Of a preview: it is sent often."""
PACE = 0.4
"""Seconds between two words on a run."""
LIMITS = {"steps": (1, 1000), "guidance_scale": (-1e3, 1e3)}

Load = Callable[[str], Any]
"""A pipeline by its name, on its device and without plugins."""


@dataclass(frozen=True)
class Progress:
    """Where a run is. ``picture`` of the side that is on ("baseline", "stack"); None: as before."""

    phase: Literal["loading", "baseline", "stack", "again", "counting"]
    done: int = 0
    total: int = 0
    picture: Image.Image | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a run found. ``macs`` False: multiply-adds are not counted yet, or not at all."""

    asked: Asked
    baseline: ArmResult
    stack: ArmResult | None
    macs: bool
    pictures: tuple[Image.Image, Image.Image]
    """At the page's size, of the baseline and of the stack (without plugins twice the same)."""
    takes: Mapping[str, Any] = field(default_factory=dict)
    """What the call got beside steps and guidance: the prompt, or the class."""
    report: str = ""
    warnings: tuple[str, ...] = ()

    def facts(self) -> list[tuple[str, str, str]]:
        """(what, of the baseline, of the stack), in words."""
        one, other = self.baseline, self.stack
        rows = [("time", seconds_text(one.latency.seconds.p50), "-" if other is None else seconds_text(other.latency.seconds.p50))]
        if other is not None:
            rows.append(("speed-up", "1.00x", speed_text(other)))
            rows.append(("PSNR to the baseline", "-", psnr_of(other)))
        if self.macs:
            rows.append(("multiply-adds", macs_text(one.macs.per_run), "-" if other is None else macs_text(other.macs.per_run)))
        if other is not None and other.skipped:
            rows.append(("skipped", "-", ", ".join(skipped_text(key, n, other.denoiser_calls) for key, n in other.skipped.items())))
        return rows


def psnr_of(item: ArmResult) -> str:
    """Of the one picture."""
    worst = item.fidelity.psnr_worst
    return f"{worst:.1f} dB" if worst is not None else psnr_text(item)


def macs_text(macs: int) -> str:
    return f"{macs / 1e12:.3g} T" if macs >= 1e12 else f"{macs / 1e9:.3g} G"


def shown(frames: NDArray[np.float32]) -> Image.Image:
    """A picture at the page's size; of a video some frames side by side."""
    return fit(strip(to_images(frames)), SHOWN)


def thumbnail(image: Image.Image) -> Image.Image:
    """For the history."""
    return fit(image, THUMB)


def small(picture: NDArray[np.float32]) -> Image.Image:
    """A preview at the page's size."""
    image = to_images(picture[None])[0]
    scale = LIVE / max(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


Told = Progress | Outcome | BaseException | None
"""What a run tells: None is its end, an exception too."""


def newest(items: Sequence[Told]) -> list[Told]:
    """Of what was told in a row on one phase the last, with the last picture of it."""
    kept: list[Told] = []
    for item in items:
        before = kept[-1] if kept else None
        if isinstance(item, Progress) and isinstance(before, Progress) and before.phase == item.phase:
            kept.pop()
            item = replace(item, picture=item.picture or before.picture)
        kept.append(item)
    return kept


def paced(told: queue.SimpleQueue[Told]) -> Iterator[Progress | Outcome]:
    """What is told, a few times a second: a page that is sent every step takes the processor from the run."""
    while True:
        items = [told.get()]
        while not told.empty():
            items.append(told.get())
        for item in newest(items):
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
        time.sleep(PACE)


class Stopped(DiffgraftError):
    """The visitor does not want it any more."""


class Playground:
    """What the visitors of one page share: one pipeline in memory, one run at a time."""

    def __init__(self, load: Load, access: Access) -> None:
        self.load = load
        self.access = access
        self.busy = threading.Lock()
        self.loaded: tuple[str, Any, Previewer] | None = None
        self.counted: dict[str, int] = {}
        self.cold = True
        """Whether the pipeline has not run yet: a first call takes longer."""

    def warm(self, name: str) -> None:
        """Load a pipeline before anybody asks; what is wrong with it is said when somebody does."""
        try:
            with self.busy:
                self.pipeline(name)
                imported("torchmetrics.functional.image", "SSIM")  # seconds, which the first run would wait for
        except Exception:
            self.loaded = None

    def pipeline(self, name: str) -> tuple[Any, Previewer]:
        """The pipeline of this name, loaded once, and its previews; the one before goes first, so that two never share the memory."""
        if self.loaded is None or self.loaded[0] != name:
            self.loaded = None
            pipe = self.load(name)
            stack = load_pipeline(pipe).plugins
            try:
                previewer = Previewer(pipe, stack.family)
            finally:
                stack.clear()
            self.loaded, self.cold = (name, pipe, previewer), True
            self.counted.clear()
        return self.loaded[1], self.loaded[2]

    def run(self, asked: Asked, macs: bool = True) -> Iterator[Progress | Outcome]:
        """Do it in a thread of its own; closing the iterator ends it at its next step.

        Raises:
            DiffgraftError: whatever speaks against it; the pipeline is as it was.
        """
        told: queue.SimpleQueue[Told] = queue.SimpleQueue()
        stop = threading.Event()

        def work() -> None:
            try:
                with self.busy:
                    if not stop.is_set():
                        self.measure(asked, macs, told.put, stop)
                told.put(None)
            except BaseException as error:  # told to whoever waits for it
                told.put(error)

        worker = threading.Thread(target=work, name="diffgraft-run", daemon=True)
        worker.start()
        try:
            yield from paced(told)
        finally:
            stop.set()

    def measure(self, asked: Asked, macs: bool, tell: Callable[[Progress | Outcome], None], stop: threading.Event) -> None:
        """Both sides, and their figures: first without multiply-adds, which take a further run of each."""
        tell(Progress("loading"))
        pipe, previewer = self.pipeline(asked.pipeline)
        ensure_bare(pipe, "a run of the page begins without any")
        plugins = [build_plugin(spec) for spec in asked.specs]
        settings = settings_of(pipe, asked)
        phase: list[Any] = ["loading"]

        def on_step(done: int, total: int, picture: NDArray[np.float32] | None) -> None:
            if stop.is_set():
                raise Stopped("stopped")
            tell(Progress(phase[0], done, total, None if picture is None or phase[0] not in ("baseline", "stack") else small(picture)))

        watched = Watched(told=Lookout(previewer, on_step))
        with quiet(pipe):
            stack = load_pipeline(pipe, [watched, *plugins]).plugins
            try:
                bench = Bench(pipe, stack, settings, (watched.name,), lambda *_: None)
                arms = [bench.arm("baseline", "baseline", settings.steps)]
                if bench.names:
                    arms.append(bench.arm(asked.title, "stack", settings.steps, bench.names))
                report = ""
                cold, self.cold = self.cold, False
                if cold:
                    bench.called(replace(arms[0], steps=min(2, settings.steps)), 0)
                for arm in arms:
                    phase[0] = arm.kind
                    timing, pictures = bench.called(arm, 0)
                    bench.timings.append([timing])
                    bench.pictures.append(pictures)
                    report = str(stack.report()) if arm.kind == "stack" else ""
                if cold and len(arms) > 1:  # what came first paid for more than the two steps above did, and the stack did not
                    phase[0] = "again"
                    bench.timings[0] = [bench.called(arms[0], 0)[0]]
                bench.macs = [0] * len(arms)
                more = {"takes": asked_in(pipe, settings), "report": without(report, watched.name), "warnings": tuple(stack.plan.warnings)}
                tell(outcome(asked, bench, arms, False, more))
                if macs:
                    phase[0] = "counting"
                    bench.macs = [self.count(bench, arm, asked) for arm in arms]
                    tell(outcome(asked, bench, arms, True, more))
            finally:
                stack.clear()

    def count(self, bench: Bench, arm: Arm, asked: Asked) -> int:
        """Multiply-adds of one side; those of the baseline follow from the call's settings and are counted once."""
        key = repr((arm.steps, asked.guidance_scale))
        if arm.kind != "baseline":
            return bench.count_macs(arm, 0, 1)
        if key not in self.counted:
            self.counted[key] = bench.count_macs(arm, 0, 1)
        return self.counted[key]


def ensure_in_range(asked: Asked) -> Asked:
    """Raises ConfigError where a number is none that a call takes; the pipeline has the last word."""
    for name, (low, high) in LIMITS.items():
        value = getattr(asked, name)
        if value is not None and not low <= value <= high:  # not a number is neither
            raise ConfigError(f"{name} = {value}: it must be {low:g} to {high:g}, or empty for the pipeline's own")
    return asked


def settings_of(pipe: Any, asked: Asked) -> CompareSettings:
    """The call of both sides."""
    known, text = parameters(pipe), asked.prompt.strip()
    words = {"class_labels" if "class_labels" in known else "prompts": [text] if text else []}
    samples = make_samples(pipe, [asked.seed], **words)
    call = CallSettings(guidance_scale=asked.guidance_scale)
    return CompareSettings(samples=tuple(samples), steps=asked.steps or default_steps(pipe), call=call, repeats=1, warmup=0)


def asked_in(pipe: Any, settings: CompareSettings) -> dict[str, Any]:
    """What of the call follows from the prompt or the class, for a line of Python."""
    arguments = call_arguments(pipe, settings.samples, settings.call)
    return {name: arguments[name] for name in ("prompt", "class_labels", "batch_size") if name in arguments}


def without(report: str, name: str) -> str:
    """A report without the lines of one plugin."""
    return "\n".join(line for line in report.splitlines() if not line.strip().startswith(f"{name}:"))


def outcome(asked: Asked, bench: Bench, arms: list[Arm], macs: bool, more: Mapping[str, Any]) -> Outcome:
    """The figures of the arms that ran, as `compare` makes them."""
    results = [bench.result(arm, i, None, [None] * len(arms)) for i, arm in enumerate(arms)]
    pictures = shown(results[0].pictures[0]), shown(results[-1].pictures[0])
    light = [replace(result, pictures=result.pictures[:0]) for result in results]  # a page remembers many
    return Outcome(asked, light[0], light[1] if len(light) > 1 else None, macs, pictures, **more)
