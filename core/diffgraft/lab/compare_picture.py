"""A comparison as one picture: the reference's pictures large, and of every other arm its time as a bar, its pictures, and what differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffgraft.lab.pictures import GAP, fit, strip, to_images, wrap
from diffgraft.lab.results import ArmResult, Comparison
from diffgraft.methods.inputs import Pictures

COLUMNS, SIDE = 4, 256
VIDEO_COLUMNS, VIDEO_SIDE = 2, 480
LABEL, BAR = 330, 20
FASTER, SLOWER, NEITHER = "#2a9d5c", "#d1603d", "#a9adb3"
FACTORS = (64, 32, 16, 8, 4, 2, 1)


@dataclass
class Row:
    """One row: the lines beside it (the first one larger), its bar as (share of the longest, colour), its pictures."""

    lines: list[str]
    bar: tuple[float, str] | None
    cells: list[Image.Image]


def comparison_picture(result: Comparison, pipeline: str) -> Image.Image:
    """What is compared with in the first row, large; below it a row an arm, its pictures beside their amplified differences to it."""
    video = result.arms[0].pictures.shape[1] > 1
    number = min(VIDEO_COLUMNS if video else COLUMNS, len(result.settings.samples))
    side, small = (VIDEO_SIDE, VIDEO_SIDE) if video else (SIDE, SIDE // 2)
    measure = (result.arms[0].pictures if result.reference is None else result.reference)[:number]
    factor = amplification([item.pictures[:number] for item in result.arms], measure)
    longest = max(item.latency.seconds.p50 for item in result.arms)
    rows = [] if result.reference is None else [Row([reference_name(result)], None, thumbnails(measure, side))]
    for item in result.arms:
        bar = (item.latency.seconds.p50 / longest, colour(item))
        shown = item.pictures[:number]
        if is_measure(item, result):
            cells = thumbnails(shown, side)
        else:
            pairs = zip(thumbnails(shown, small), thumbnails(differences(shown, measure, factor), small), strict=True)
            cells = [joined(pair, downward=video) for pair in pairs]
        rows.append(Row(label(item, result), bar, cells))
    captions = [f"{sample.label} (seed {sample.seed})" for sample in result.settings.samples[:number]]
    where = "Below" if video else "Right of"
    machine, samples = result.environment, len(result.settings.samples)
    footer = (
        f"{where} each picture: its difference to the {reference_name(result)}, x {factor} (black: none). Bars: seconds a picture, p50 of "
        f"{result.settings.repeats} interleaved rounds, {machine.get('device_name') or machine['processor']}, "
        f"{machine['dtype'].removeprefix('torch.')}. PSNR to the {reference_name(result)}: mean (worst) of {samples} pictures. Fewer steps "
        f"at equal time: {result.equal_time}." + (f" In every arm: {', '.join(result.always)}." if result.always else "")
    )
    return draw(f"{pipeline}: plugins against the plain pipeline", footer, captions, rows)


def reference_name(result: Comparison) -> str:
    """What the fidelity figures are held against."""
    steps = result.settings.reference_steps
    return "baseline" if steps is None else f"baseline with {steps} steps"


def is_measure(item: ArmResult, result: Comparison) -> bool:
    """Whether the arm is itself what fidelity is held against."""
    return item.arm.kind == "baseline" and result.reference is None


def label(item: ArmResult, result: Comparison) -> list[str]:
    """The lines beside a row."""
    lines = [item.arm.name, item.reading if item.arm.kind != "baseline" else ""]
    facts = [f"{item.arm.steps} steps, {seconds_text(item.latency.seconds.p50)}"]
    if not is_measure(item, result):
        facts.append("changed nothing" if item.changed_nothing else f"PSNR {psnr_text(item)}")
    if item.verdicts is not None and (everything := item.verdicts.shares.get("all")) is not None:
        facts.append(f"as prompted {everything.right}/{everything.total}")
    if item.inactive and not item.is_idle:
        facts.append(f"{', '.join(item.inactive)}: inactive")
    return [*filter(None, lines), *facts]


def psnr_text(item: ArmResult) -> str:
    """``44.1 (39.0)``, with the number of pictures that equal the baseline's."""
    near = item.fidelity
    if near.psnr_mean is None or near.psnr_worst is None:
        return "changed nothing" if item.changed_nothing else "identical"
    equal = f", {near.identical} identical" if near.identical else ""
    return f"{near.psnr_mean:.1f} ({near.psnr_worst:.1f}){equal}"


def seconds_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def colour(item: ArmResult) -> str:
    """Of an arm's bar: green and red only where there is a gain or a loss to read."""
    if item.arm.kind == "baseline" or item.is_idle or item.latency.within_noise:
        return NEITHER
    return FASTER if item.latency.of_medians > 1 else SLOWER


def amplification(shown: Sequence[Pictures], measure: Pictures) -> int:
    """The largest factor at which no more than a hundredth of the worst arm's differing values is cut off; one for all arms."""
    most = max(float(np.quantile(np.abs(pictures - measure), 0.99)) for pictures in shown)
    return next((factor for factor in FACTORS if factor * most <= 1), 1)


def differences(shown: Pictures, measure: Pictures, factor: int) -> Pictures:
    """Absolute differences, amplified."""
    found: Pictures = np.abs(shown - measure) * np.float32(factor)
    return found


def thumbnails(pictures: Pictures, side: int) -> list[Image.Image]:
    """One image a picture; of a video a strip of frames."""
    return [fit(strip(to_images(frames)), side) for frames in pictures]


def joined(images: Sequence[Image.Image], downward: bool) -> Image.Image:
    """Images of one size beside or below each other."""
    width, height = images[0].size
    across, down = (0, 1) if downward else (1, 0)
    page = Image.new("RGB", (width * (1 + across * (len(images) - 1)), height * (1 + down * (len(images) - 1))))
    for i, image in enumerate(images):
        page.paste(image, (i * width * across, i * height * down))
    return page


def draw(title: str, footer: str, captions: Sequence[str], rows: Sequence[Row]) -> Image.Image:
    """The page: a column of labels with their bars, and a column a caption."""
    big, small, tiny = (ImageFont.load_default(size) for size in (22, 17, 14))
    pencil = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    cell = max(image.width for row in rows for image in row.cells)
    inside = LABEL - 2 * GAP
    texts = [[part for i, line in enumerate(row.lines) for part in wrap(line, inside, small if i else big, pencil)] for row in rows]
    heads = [len(wrap(row.lines[0], inside, big, pencil)) for row in rows]
    tall = [27 * head + (BAR + GAP if row.bar else 0) + 21 * (len(text) - head) for row, text, head in zip(rows, texts, heads, strict=True)]
    heights = [max(high, *(image.height for image in row.cells)) for row, high in zip(rows, tall, strict=True)]
    width = LABEL + len(captions) * (cell + GAP) + GAP
    wrapped = [wrap(caption, cell, small, pencil) for caption in captions]
    titles, feet = wrap(title, width - 2 * GAP, big, pencil), wrap(footer, width - 2 * GAP, tiny, pencil)
    top = GAP + 27 * len(titles) + GAP
    head = top + 21 * max(map(len, wrapped)) + GAP
    bottom = head + sum(heights) + 2 * GAP * len(rows)
    page = Image.new("RGB", (width, bottom + 18 * len(feet) + GAP), "white")
    pencil = ImageDraw.Draw(page)
    for i, line in enumerate(titles):
        pencil.text((GAP, GAP + 27 * i), line, "black", big)
    for column, lines in enumerate(wrapped):
        for i, line in enumerate(lines):
            pencil.text((LABEL + column * (cell + GAP), top + 21 * i), line, "#222222", small)
    y = head
    for row, text, first, height in zip(rows, texts, heads, heights, strict=True):
        at = y
        for i, line in enumerate(text):
            if i == first and row.bar:
                share, fill = row.bar
                pencil.rectangle((GAP, at + 2, LABEL - 2 * GAP, at + 2 + BAR), "#eef0f2")
                pencil.rectangle((GAP, at + 2, GAP + share * (LABEL - 3 * GAP), at + 2 + BAR), fill)
                at += BAR + GAP
            ink = row.bar[1] if row.bar and i == first and row.bar[1] != NEITHER else "black" if i < first else "#333333"
            pencil.text((GAP, at), line, ink, big if i < first else small)
            at += 27 if i < first else 21
        for column, image in enumerate(row.cells):
            page.paste(image, (LABEL + column * (cell + GAP), y))
        y += height + 2 * GAP
    for i, line in enumerate(feet):
        pencil.text((GAP, bottom + 18 * i), line, "#555555", tiny)
    return page
