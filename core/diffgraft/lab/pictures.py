"""Pictures to files: stills, animations, contact sheets and labelled grids. Writing is atomic: a file is whole or not there."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageSequence

from diffgraft.lab.recipes import Record, save_options
from diffgraft.methods.files import write_atomic
from diffgraft.methods.inputs import Pictures

STILL = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".gif": "GIF"}
ANIMATED = {".gif", ".webp"}
FRAME_MS = 125
GAP = 10


def to_images(frames: Pictures) -> list[Image.Image]:
    """[frames, height, width, 3] as PIL pictures."""
    return [Image.fromarray(frame) for frame in (np.nan_to_num(frames).clip(0, 1) * 255).round().astype(np.uint8)]


def save_pictures(pictures: Pictures, path: Path, records: Sequence[Record] = ()) -> list[Path]:
    """Write ``a.png``, or ``a-0.png``, ``a-1.png``... for several, each with what it was made with, if that is given.

    A video becomes an animation (.gif, .webp) or a contact sheet.
    """
    written = []
    for i, frames in enumerate(pictures):
        target = path if len(pictures) == 1 else path.with_name(f"{path.stem}-{i}{path.suffix}")
        write_atomic(target, encode(to_images(frames), path.suffix.lower(), records[i] if records else None))
        written.append(target)
    return written


def encode(frames: list[Image.Image], suffix: str, record: Record | None = None) -> bytes:
    """One picture or video as the bytes of a file."""
    buffer = io.BytesIO()
    options = save_options(record, suffix)
    if len(frames) > 1 and suffix in ANIMATED:
        frames[0].save(buffer, STILL[suffix], save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0, **options)
    else:
        (contact_sheet(frames) if len(frames) > 1 else frames[0]).save(buffer, STILL[suffix], **options)
    return buffer.getvalue()


def same_picture(one: Path, data: bytes) -> bool:
    """Whether a file and the bytes of another show the same pixels, in all frames."""
    with Image.open(one) as mine, Image.open(io.BytesIO(data)) as other:
        pairs = itertools.zip_longest(ImageSequence.Iterator(mine), ImageSequence.Iterator(other))
        return all(a is not None and b is not None and a.size == b.size and a.tobytes() == b.tobytes() for a, b in pairs)


def contact_sheet(frames: list[Image.Image]) -> Image.Image:
    """All frames of a video side by side, row by row."""
    columns = math.ceil(math.sqrt(len(frames)))
    width, height = frames[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(frames) / columns) * height), "white")
    for i, frame in enumerate(frames):
        sheet.paste(frame, ((i % columns) * width, (i // columns) * height))
    return sheet


def strip(frames: Sequence[Image.Image], count: int = 5) -> Image.Image:
    """``count`` frames of a video side by side, spread evenly from the first to the last; a still picture as it is."""
    chosen = [frames[round(i * (len(frames) - 1) / (count - 1))] for i in range(count)] if len(frames) > count else frames
    width, height = frames[0].size
    page = Image.new("RGB", (width * len(chosen), height))
    for i, frame in enumerate(chosen):
        page.paste(frame, (i * width, 0))
    return page


def draw_grid(
    title: str, footer: str, captions: Sequence[str], rows: Sequence[tuple[Sequence[str], Sequence[Image.Image]]], side: int = 192
) -> Image.Image:
    """A labelled grid: one row an arm (its label lines, the first one larger; its pictures), one column a caption."""
    big, small, tiny = (ImageFont.load_default(size) for size in (20, 16, 14))
    pencil = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    rows = [(lines, [fit(image, side) for image in images]) for lines, images in rows]
    cell_w = max(image.width for _, images in rows for image in images)
    cell_h = max(max(image.height for image in images) for _, images in rows)
    cell_h = max(cell_h, *(28 + 21 * len(lines) for lines, _ in rows))
    label_w = max(int(pencil.textlength(line, big if i == 0 else small)) for lines, _ in rows for i, line in enumerate(lines)) + 2 * GAP
    wrapped: Sequence[Sequence[str]] = [wrap(caption, cell_w, small, pencil) for caption in captions]
    width = label_w + len(captions) * (cell_w + GAP) + GAP
    title_lines, footer_lines = wrap(title, width - 2 * GAP, big, pencil), wrap(footer, width - 2 * GAP, tiny, pencil)
    top = GAP + 26 * len(title_lines) + GAP
    head = top + 20 * max(len(lines) for lines in wrapped) + GAP
    bottom = head + len(rows) * (cell_h + GAP)
    page = Image.new("RGB", (width, bottom + 18 * len(footer_lines) + GAP), "white")
    pencil = ImageDraw.Draw(page)
    for i, line in enumerate(title_lines):
        pencil.text((GAP, GAP + 26 * i), line, "black", big)
    for i, line in enumerate(footer_lines):
        pencil.text((GAP, bottom + 18 * i), line, "#555555", tiny)
    for column, lines in enumerate(wrapped):
        for i, line in enumerate(lines):
            pencil.text((label_w + column * (cell_w + GAP), top + 20 * i), line, "#222222", small)
    for row, (lines, images) in enumerate(rows):
        y = head + row * (cell_h + GAP)
        for i, line in enumerate(lines):
            pencil.text((GAP, y if i == 0 else y + 28 + 21 * (i - 1)), line, "black" if i == 0 else "#333333", big if i == 0 else small)
        for column, image in enumerate(images):
            page.paste(image, (label_w + column * (cell_w + GAP), y))
    return page


def fit(image: Image.Image, side: int) -> Image.Image:
    """Small pictures enlarged by a whole factor without smoothing, large ones reduced, to about ``side`` pixels."""
    longest = max(image.size)
    if longest <= side:
        factor = max(1, side // longest)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale = side / longest
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, pencil: ImageDraw.ImageDraw) -> list[str]:
    """Break a text into lines of at most ``width`` pixels, at spaces."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and pencil.textlength(longer, font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
