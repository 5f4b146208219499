"""What a picture was made with, in the picture's own file: to read, and to make the same picture again."""

from __future__ import annotations

import json
import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from PIL import Image, PngImagePlugin
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from diffgraft.installed.errors import ConfigError

_log = logging.getLogger(__name__)

KEY = "diffgraft"
DESCRIPTION, USER_COMMENT, EXIF_IFD = 0x010E, 0x9286, 0x8769
UNICODE = b"UNICODE\0"
MOST = 1000
"""Pictures of one call, on a command line and in a file."""
EXIF_LIMIT = 65_000
"""Bytes that the EXIF block of a JPEG may have, a little less than its 16-bit length allows."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Recipe(Strict):
    """Everything that `diffgraft run` was told, with the pipeline's own values where nothing was said."""

    pipeline: str
    prompt: str | None = None
    negative_prompt: str | None = None
    plugins: list[tuple[str, dict[str, Any]]] = []
    seed: int = 0
    num_images: int = Field(default=1, ge=1, le=MOST)
    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    class_label: list[int | str] = []
    image: str | None = None
    mask: str | None = None
    controlnet: str | None = None
    control_image: str | None = None
    strength: float | None = None
    args: dict[str, Any] = {}
    device: str | None = None
    dtype: str | None = None
    backend: str | None = None


class Record(Strict):
    """A recipe and the run that followed it. ``picture`` is the place among the ``num_images`` of one call (noise: seed + picture);
    ``asked`` tells the line of a batch from any other (`diffgraft batch`)."""

    format: Literal[1] = 1
    recipe: Recipe
    picture: int = Field(default=0, ge=0)
    kind: str
    scheduler: str
    size: tuple[int, int]
    files: dict[str, str] = {}
    versions: dict[str, str]
    asked: str | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.picture >= self.recipe.num_images:
            raise ValueError(f"picture {self.picture} of {self.recipe.num_images}: they are counted from 0")
        return self

    def line(self) -> str:
        """The text under the key "parameters", as other programs write and read it."""
        asked = self.recipe
        lines = [asked.prompt or ""]
        if asked.negative_prompt:
            lines.append(f"Negative prompt: {asked.negative_prompt}")
        said = [(name, ", ".join(f"{knob}={value}" for knob, value in knobs.items())) for name, knobs in asked.plugins]
        stack = " + ".join(f"{name}({knobs})" if knobs else name for name, knobs in said)
        facts = {
            "Steps": asked.steps,
            "Sampler": self.scheduler,
            "CFG scale": asked.guidance_scale if asked.guidance_scale is not None else asked.args.get("true_cfg_scale"),
            "Seed": asked.seed + self.picture,
            "Size": f"{self.size[0]}x{self.size[1]}",
            "Model": asked.pipeline,
            "Denoising strength": asked.strength,
            "ControlNet": asked.controlnet,
            "Plugins": stack or None,
            "Version": f"diffgraft {self.versions.get('diffgraft-core', '?')}",
        }
        lines.append(", ".join(f"{key}: {value}" for key, value in facts.items() if value is not None))
        return "\n".join(lines)


def versions_of(dists: list[str]) -> dict[str, str]:
    """The versions of the packages that a picture depends on."""
    return {name: version_here(name) for name in dict.fromkeys(["diffgraft-core", "torch", "diffusers", "transformers", *dists])}


def version_here(name: str) -> str:
    """The version of a package, whose name may come from a file."""
    try:
        return version(name)
    except (PackageNotFoundError, ValueError):
        return "not installed"


def save_options(record: Record | None, suffix: str) -> dict[str, Any]:
    """What Pillow's ``save`` is given so that the file carries the record: PNG text, a GIF's comment, EXIF for the others."""
    if record is None:
        return {}
    text, line = record.model_dump_json(), record.line()
    if suffix == ".png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text(KEY, json.dumps(json.loads(text)))  # ASCII
        chunks.add_text("parameters", line)
        return {"pnginfo": chunks}
    if suffix == ".gif":
        return {"comment": json.dumps({KEY: json.loads(text)}).encode("ascii")}
    exif = Image.Exif()
    exif[DESCRIPTION] = json.dumps({KEY: json.loads(text)})
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = UNICODE + line.encode("utf-16-be")
    if len(exif.tobytes()) > EXIF_LIMIT:
        _log.warning("the prompt and the settings are too long for a %s file, which says nothing of its making; .png has no limit", suffix)
        return {}
    return {"exif": exif}


def read_record(path: Path) -> Record:
    """The record in a picture's file.

    Raises:
        ConfigError: no such file, no picture, none of diffgraft's, or not as diffgraft writes it.
    """
    try:
        with Image.open(path) as image:
            found = image.info.get(KEY) or image.info.get("comment") or image.getexif().get(DESCRIPTION)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path} cannot be read as a picture: {error}") from None
    try:
        value = json.loads(found or "null")
    except (ValueError, RecursionError, TypeError):
        value = None
    value = value.get(KEY, value) if isinstance(value, dict) else None
    if value is None:
        raise ConfigError(
            f"{path} does not say how it was made: only pictures of `diffgraft run` do, without --no-metadata, and as long as no other "
            "program saved them anew"
        )
    try:
        return Record.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: what it says about its making is not as diffgraft writes it ({where}: {first['msg']})") from None
