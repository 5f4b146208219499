"""What can be repaired mechanically: README title, headings and table of knobs, missing rows of quality.toml, the version range, the
repository's licence."""

from __future__ import annotations

import re
from collections.abc import Mapping

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from diffgraft.community.check.claims import quality_of, with_missing_rows
from diffgraft.community.check.packaging import RANGE, is_open, is_requirement, licence_above
from diffgraft.community.check.project import Project
from diffgraft.community.check.readme import BEGIN, END, PART, SECTIONS, section
from diffgraft.community.quality import FILE, SCALE
from diffgraft.community.tables import knob_table, knobs
from diffgraft.installed.errors import BrokenPlugin, ConfigError
from diffgraft.methods.files import write_atomic


def fix(project: Project, computed: Mapping[str, bool]) -> list[str]:
    """Repair what can be repaired, and say what was. ``computed`` are the criteria that the check found met.

    Raises:
        ConfigError: there is no source folder to write to; or quality.toml cannot be read.
    """
    if project.root is None:
        raise ConfigError(f"{project.name} is installed without its source folder: give the folder, `diffgraft check --fix PATH`")
    pyproject, readme, quality = project.root / "pyproject.toml", project.root / "README.md", project.package / FILE
    written = pyproject.read_text(encoding="utf-8")
    claims = quality_of(project).claims
    new = {
        readme: (project.readme, with_table(with_sections(project), project)),
        pyproject: (written, with_range(written, project)),
    }
    if any(criterion.name not in claims for criterion in SCALE):  # an author's own comments in a whole file stay
        new[quality] = (quality.read_text(encoding="utf-8") if quality.is_file() else "", with_missing_rows(project, computed))
    if not any(project.root.glob("LICEN[SC]E*")) and (licence := licence_above(project.root)) is not None:
        new[project.root / licence.name] = ("", licence.read_text(encoding="utf-8"))
    changed = {path: text for path, (before, text) in new.items() if text != before}
    for path, text in changed.items():
        write_atomic(path, text.encode())
    return [f"wrote {project.where(path)}" for path in changed]


def with_sections(project: Project) -> str:
    """The README with its title and every section's heading; a new section says TODO."""
    lines = project.readme.splitlines(keepends=True)
    title = next((i for i, line in enumerate(lines) if line.startswith("# ")), None)
    if title is None:
        lines.insert(0, f"# {project.name}\n\n")
    else:
        lines[title] = f"# {project.name}\n"
    text = "".join(lines)
    for name in SECTIONS:
        if section(text, name) is None:
            text = f"{text.rstrip()}\n\n## {name}\n\nTODO\n"
    return text


def with_table(text: str, project: Project) -> str:
    """The README with the generated table of knobs: where the marks are, or in section Knobs where a knob is not named."""
    try:
        cls = project.cls
    except BrokenPlugin:
        return text
    if PART.search(text):
        return PART.sub(lambda part: part[1] + knob_table(cls) + part[3], text)
    found = section(text, "Knobs")
    if found is None or all(f"`{knob.name}`" in found[1] for knob in knobs(cls)):
        return text
    lines = text.splitlines(keepends=True)
    rest = "".join(lines[found[0] :])
    rest = re.sub(r"^\s*TODO\s*\n", "\n", rest, count=1)
    return "".join(lines[: found[0]]) + f"\n{BEGIN}\n{knob_table(cls)}{END}\n" + rest


def with_range(text: str, project: Project) -> str:
    """The pyproject with a range for diffgraft in the place of what is there."""
    given = [str(item) for item in project.project.get("dependencies", [])]
    own = [item for item in given if is_requirement(item) and canonicalize_name(Requirement(item).name) == "diffgraft"]
    if not own:
        if "dependencies" in project.project:
            return re.sub(r"^(dependencies\s*=\s*\[)", rf'\1"{RANGE}"' + (", " if given else ""), text, count=1, flags=re.MULTILINE)
        return re.sub(r"^(\[project\]\s*\n)", rf'\1dependencies = ["{RANGE}"]\n', text, count=1, flags=re.MULTILINE)
    requirement = Requirement(own[0])
    if {item.operator for item in requirement.specifier} & {"==", "==="} or is_open(requirement):
        return re.sub(rf"""(["']){re.escape(own[0])}\1""", f'"{RANGE}"', text, count=1)
    return text
