"""The rule on presets: each is one, its knobs hold, and what it is named by can be typed."""

from __future__ import annotations

import re
from collections.abc import Iterator

from diffgraft.community.check.project import Project
from diffgraft.community.check.rule import Problem, rule
from diffgraft.installed.config import build_config
from diffgraft.installed.errors import ConfigError
from diffgraft.stacks.presets import FOLDER, parsed


@rule("class")
def presets(project: Project) -> Iterator[Problem]:
    """Every preset is valid against the plugin's Config, its pattern compiles, and it names its source."""
    folder = project.package / FOLDER
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        where = project.where(path)
        if path.suffix != ".yaml" or not re.fullmatch(r"[a-z0-9]+([._-][a-z0-9]+)*", path.stem):
            yield Problem(
                f"{path.name} is no name of a preset: it is typed after the plugin's",
                "small letters, digits, hyphens: sdxl-fast.yaml",
                where,
            )
            continue
        try:
            preset = parsed(path)
            build_config(project.cls.name, project.cls.Config, preset.knobs)
        except ConfigError as error:
            yield Problem(str(error), "knobs that exist, with values that they take, and the fields of docs/howto/stack_files.md", where)
