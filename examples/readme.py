"""Fill the generated parts of README.md: the plugin table from the installed plugins, the picture and its figures from a compare run.

    bash examples/run.sh                       # makes out/compare.png and out/compare.json
    python examples/readme.py out              # copies the picture and writes both parts
    python examples/readme.py --check          # exit code 1 when the plugin table is not what its plugins say
    python examples/readme.py --check --all    # or when a plugin is not in it: for a release, as a new plugin edits nothing but its folder
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from diffgraft.community.tables import installed_table

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def replaced(text: str, part: str, body: str) -> str:
    """``text`` with what stands between the marks of ``part`` exchanged."""
    begin, rest = text.split(f"<!-- {part}:begin", 1)
    mark, rest = rest.split("-->\n", 1)
    _, end = rest.split(f"<!-- {part}:end -->", 1)
    return f"{begin}<!-- {part}:begin{mark}-->\n{body}<!-- {part}:end -->{end}"


def name_in(line: str) -> str:
    """The first cell of a row, which names its plugin."""
    return line.split(" | ")[0]


def compare_part(folder: Path) -> str:
    """The picture and a table of its figures."""
    raw = json.loads((folder / "compare.json").read_text())
    shutil.copyfile(folder / "compare.png", ROOT / "examples" / "compare.png")
    lines = [
        "![The same prompts and seeds, with and without plugins](examples/compare.png)\n",
        "| | steps | p50 s | speed-up | denoiser MACs | PSNR dB, mean (worst) | as prompted |",
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
            f"{latency['of_medians']:.2f}x",
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
    notes = dict.fromkeys(note for item in raw["arms"] for note in item["notes"] if "inactive" in note)
    lines += [f"\n{note}" for note in notes]
    return "\n".join(lines) + "\n"


def main() -> None:
    text = README.read_text()
    table, faults = installed_table()
    assert not faults, faults
    new = replaced(text, "plugins", table)
    if "--check" in sys.argv:
        known = table if "--all" in sys.argv else "".join(line for line in table.splitlines(True) if name_in(line) in text)
        sys.exit(replaced(text, "plugins", known) != text)
    if len(sys.argv) > 1:
        new = replaced(new, "compare", compare_part(Path(sys.argv[1])))
    README.write_text(new)


if __name__ == "__main__":
    main()
