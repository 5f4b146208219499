"""Write the catalogue that `diffgraft search` reads: from the plugins' own metadata, and from what the community sent in; and the names
that belong to this project's packages, which no other package can take.

    python examples/registry.py             # plugins.json and plugins.schema.json of diffgraft.community, names.json of diffgraft.installed
    python examples/registry.py --check     # exit code 1 when they are not what their plugins say; what CI runs on a contribution
    python examples/registry.py --check --all   # or when a plugin of this repository is not in it (a release)

A plugin from another repository comes in as one file, docs/community/<name>.json, in the form of a single entry; nothing else is edited.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from diffgraft.community.catalogue import FIRST_PARTY, Catalogue, CataloguedPlugin, PaperEntry, dump, schema, shipped
from diffgraft.community.quality import tier_of, toml
from diffgraft.community.tables import describe
from diffgraft.installed import offers, registry
from pydantic import ValidationError

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "core" / "diffgraft" / "community"
NAMES = ROOT / "core" / "diffgraft" / "installed" / "names.json"
COMMUNITY = ROOT / "docs" / "community"


def first_party() -> list[CataloguedPlugin]:
    """The plugins of this repository, as their metadata and classes tell."""
    made, installed = [], registry.installed()
    for folder in sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml")):
        info = installed[folder.name]
        facts = describe(registry.find(folder.name), info)
        made.append(
            CataloguedPlugin(
                name=info.name,
                dist=info.dist,
                summary=info.summary,
                paper=PaperEntry(title=facts["paper"]["title"], arxiv=facts["paper"]["arxiv"]),
                hook_points=tuple(facts["hook_points"]),
                families=tuple(facts["families"]),
                tier=tier_of(info.module) or "none",
                homepage=f"https://{FIRST_PARTY}/diffgraft/tree/main/plugins/{folder.name}",
            )
        )
    return made


def community() -> list[CataloguedPlugin]:
    """What was sent in.

    Raises:
        ValueError: with every fault of every file.
    """
    made, faults = [], []
    for path in sorted(COMMUNITY.glob("*.json")):
        try:
            entry = CataloguedPlugin.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            faults += [f"{path.name}: {'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors(include_url=False)]
            continue
        if path.stem != entry.name:
            faults.append(f"{path.name}: the plugin is called {entry.name}: the file must be {entry.name}.json")
        if entry.publisher == FIRST_PARTY:
            faults.append(f"{path.name}: homepage: {FIRST_PARTY} publishes the plugins of this repository only; give your own")
        made.append(entry)
    if faults:
        raise ValueError("\n".join(faults))
    return made


def own_names() -> dict[str, dict[str, str]]:
    """Group -> name -> package, as the pyprojects of this repository say."""
    found: dict[str, dict[str, str]] = {}
    for path in (ROOT / "core" / "pyproject.toml", *ROOT.glob("pipelines/*/pyproject.toml"), *ROOT.glob("plugins/*/pyproject.toml")):
        project = toml(path.read_text(encoding="utf-8"), str(path))["project"]
        for group, entries in project.get("entry-points", {}).items():
            found.setdefault(group, {}).update(dict.fromkeys(entries, project["name"]))
    return {group: dict(sorted(names.items())) for group, names in sorted(found.items())}


def main() -> None:
    try:
        catalogue = Catalogue(plugins=(*first_party(), *community()))
    except ValueError as error:
        sys.exit(str(error))
    names = own_names()
    if "--check" in sys.argv and "--all" not in sys.argv:  # what is new comes in with the next release
        listed = {plugin.name for plugin in shipped().plugins}
        catalogue = Catalogue(plugins=tuple(plugin for plugin in catalogue.plugins if plugin.name in listed))
        known = offers.own_names()
        names = {group: {name: dist for name, dist in own.items() if name in known.get(group, {})} for group, own in names.items()}
        names = {group: own for group, own in names.items() if own}
    wanted = {
        PACKAGE / "plugins.json": dump(catalogue),
        PACKAGE / "plugins.schema.json": schema(),
        NAMES: json.dumps(names, indent=1) + "\n",
    }
    for path, text in wanted.items():
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.relative_to(ROOT)} is not what the plugins say: run `python examples/registry.py`")


if __name__ == "__main__":
    main()
