"""Fill the generated parts of README.md: the tables by goal from what the plugins say, the picture and its figures from a compare run.

bash examples/run.sh                       # makes out/compare.png and out/compare.json
python examples/readme.py out              # copies the picture and writes both parts
python examples/readme.py --check          # exit code 1 when a plugin's row is not what it says
python examples/readme.py --check --all    # or when the tables are not complete (a release; a new plugin edits nothing but its folder)
"""

from __future__ import annotations

import json
import posixpath
import shutil
import sys
from pathlib import Path

from diffgraft.community.quality import Card
from diffgraft.community.tables import goal_tables
from diffgraft.installed import registry

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def replaced(text: str, part: str, body: str) -> str:
    """``text`` with what stands between the marks of ``part`` exchanged."""
    begin, rest = text.split(f"<!-- {part}:begin", 1)
    mark, rest = rest.split("-->\n", 1)
    _, end = rest.split(f"<!-- {part}:end -->", 1)
    return f"{begin}<!-- {part}:begin{mark}-->\n{body}<!-- {part}:end -->{end}"


def page(name: str) -> str:
    """A plugin's page, from the root of the repository."""
    return f"plugins/{name}/README.md"


def place(name: str, card: Card) -> str:
    """Where the figures of a plugin's card stand, from the root of the repository."""
    return posixpath.normpath(f"plugins/{name}/{card.gain_where.partition('#')[0]}")


def plugins_part() -> str:
    """Which plugin for what."""
    names = sorted(folder.parent.name for folder in ROOT.glob("plugins/*/pyproject.toml"))
    return goal_tables([registry.find(name) for name in names], page, place)


def rows(text: str) -> set[str]:
    """The rows of plugins in a text."""
    return {line for line in text.splitlines() if line.startswith("| [`")}


def compare_part(folder: Path) -> str:
    """The picture and a table of its figures."""
    raw = json.loads((folder / "compare.json").read_text())
    if raw["unfinished"]:
        sys.exit(f"{folder}/compare.json is of an unfinished run: {raw['unfinished']}")
    shutil.copyfile(folder / "compare.png", ROOT / "examples" / "compare.png")
    lines = [
        "![The same prompts and seeds, with and without plugins](examples/compare.png)\n",
        "| | steps | p50 s | speed | denoiser MACs | PSNR dB, mean (worst) | as prompted |",
        "|---|---|---|---|---|---|---|",
    ]
    for item in raw["arms"]:
        arm, latency, fidelity = item["arm"], item["latency"], item["fidelity"]
        psnr = "same bits" if fidelity["psnr_mean"] is None else f"{fidelity['psnr_mean']:.1f} ({fidelity['psnr_worst']:.1f})"
        judged = (item["verdicts"] or {"shares": {}})["shares"].get("all")
        cells = [
            arm["name"],
            str(arm["steps"]),
            f"{latency['seconds']['p50']:.2f}",
            item["reading"],
            f"{item['macs']['per_run'] / 1e9:.1f} G",
            "" if arm["kind"] == "baseline" else psnr,
            f"{judged['right']}/{judged['total']}" if judged else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    env, settings = raw["environment"], raw["settings"]
    versions = env["versions"]
    lines.append(
        f"\n`{raw['command']}` on {env.get('device_name') or env['processor']}, {env['cpus']} cores, torch {versions['torch']}, diffusers "
        f"{versions['diffusers']}; one picture a call, medians of {settings['repeats']} rounds with the sides in turn, fidelity over "
        f"{len(settings['samples'])} pictures, last line: fewer steps in the time of the stack."
    )
    if raw["advantage"]:
        more, target, last = raw["advantage"], raw["equal_time"]["matched_to"], raw["arms"][-1]["arm"]["name"]
        interval = f"{more['low']:+.2f} to {more['high']:+.2f}, 95 % interval"
        lines.append(f"\nPSNR of {target} above that of {last}: {more['mean']:+.2f} dB ({interval}).")
    notes = dict.fromkeys(note for item in raw["arms"] for note in item["notes"] if "inactive" in note)
    lines += [f"\n{note}" for note in notes]
    return "\n".join(lines) + "\n"


def main() -> None:
    text = README.read_text()
    new = replaced(text, "plugins", plugins_part())
    if "--check" in sys.argv:
        sys.exit(new != text if "--all" in sys.argv else not rows(text) <= rows(plugins_part()))
    if len(sys.argv) > 1:
        new = replaced(new, "compare", compare_part(Path(sys.argv[1])))
    README.write_text(new)


if __name__ == "__main__":
    main()
