"""The fastest stacks by level: found by `diffgraft tune` on captions of the training set, measured on others beside everything else.

python -m diffgraft_bench tune-stacks        # the search, by pipeline; what is there is kept
python -m diffgraft_bench stacks             # the measurement, one picture and eight in a call
python -m diffgraft_bench stacks-readme      # the table in examples/stacks/README.md
"""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffgraft.methods.files import write_atomic

from . import findings
from .cases import FEW_STEPS, Bout, Method, all_bouts
from .models import CALIBRATION, ROOT, training_prompts
from .rows import Row, Store

STACKS = ROOT / "examples" / "stacks"
TUNED = STACKS / "tuned"
BEGIN, END = "<!-- stacks:begin (made by `python -m diffgraft_bench stacks-readme`) -->\n", "<!-- stacks:end -->"


@dataclass(frozen=True)
class Search:
    """A `diffgraft tune`: the level that it looks for (its front serves the others too), its budget, knobs that are given, and how many
    clips or pictures a candidate is judged on."""

    target: str
    budget: str
    pictures: int
    given: tuple[str, ...] = ()


SEARCHES = {
    "emoji-sd": Search("psnr=34", "8m", 8, ("t_stitch.model=emoji-sd-small",)),
    "emoji-flux": Search("psnr=36", "8m", 8),
    "emoji-wan": Search("psnr=34", "10m", 4),
}
REFERENCE_STEPS = 200
BEHIND = frozenset({"tomesd", "tgate", "pruna", "MagCache", "PAB", "FasterCache", "para-attn", "Euler", "faster_diffusion"})
"""Left out: in the benchmark's rows each of them is at every level behind another one that is here."""
MINE = frozenset({findings.OURS, "fitted"})
LEVELS = (25.0, 30.0, 35.0, 40.0, 45.0)
"""dB to the plain pipeline's many-step pictures."""


def search(pipeline: str, out: Path, say: Callable[[str], None]) -> None:
    """Keep the front of one search as tuned/PIPELINE.json: [{"steps", "plugins"}], and the command."""
    path = TUNED / f"{pipeline}.json"
    if path.exists():
        return
    wanted = SEARCHES[pipeline]
    prompts = out / f"{pipeline}-captions.txt"
    write_atomic(prompts, "\n".join(training_prompts(pipeline, 3 * wanted.pictures)).encode())
    words = ["tune", pipeline, "--target", wanted.target, "--budget", wanted.budget, "--num-prompts", str(wanted.pictures)]
    words += ["--reference-steps", str(REFERENCE_STEPS), "--batch", "8", "--prompts", str(prompts), "--out", str(out / pipeline)]
    words += ["--seed", "700000", "--threads", "1", *(word for knob in wanted.given for word in ("-o", knob))]
    subprocess.run([sys.executable, "-m", "diffgraft", *words], check=True)
    found = json.loads((out / pipeline / "tune.json").read_text())
    front = [trial["candidate"] for trial in found["trials"] if trial["number"] in set(found["front"])]
    about = {"command": found["command"], "trials": len(found["trials"]), "seconds": found["spent"], "front": front}
    write_atomic(path, (json.dumps(about, indent=1) + "\n").encode())
    say(f"{path}: {len(front)} of {len(found['trials'])} candidates")


def tuned(pipeline: str) -> tuple[Method, ...]:
    """The stacks of a search's front; plain steps are measured anyway."""
    path = TUNED / f"{pipeline}.json"
    front = json.loads(path.read_text())["front"] if path.exists() else []
    return tuple(Method(label_of(each["plugins"]), findings.OURS, knobs=filled(each["plugins"]), steps=each["steps"]) for each in front
                 if each["plugins"])  # fmt: skip


def label_of(stack: Mapping[str, Any]) -> str:
    return " + ".join(stack)


def filled(stack: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """With what `tune` calibrated by itself."""
    return {name: {**({"artefact": "calibrate"} if name in CALIBRATION else {}), **knobs} for name, knobs in stack.items()}


def stack_bouts() -> list[Bout]:
    """On each pipeline what the benchmark has, and the tuned stacks and few-step models beside it."""
    found = []
    for bout in all_bouts(quick=False):
        if bout.arm != "quality" or bout.pipeline not in SEARCHES:
            continue
        methods = tuple(method for method in bout.methods if method.label not in BEHIND)
        if not any(each.pipeline == bout.pipeline for each in found):
            methods += tuned(bout.pipeline) + FEW_STEPS.get(bout.pipeline, ())
        found += [replace(bout, methods=methods)] if methods else []
    return found


# the table -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """The fastest of ours and of everything else at one level; ``ratio`` of their speed-ups with a 95 % interval over the rounds."""

    pipeline: str
    batch: int
    level: str
    ours: Row | None
    peer: Row | None
    ratio: float = math.nan
    low: float = math.nan
    high: float = math.nan


def levels(rows: Iterable[Row], pipeline: str, batch: int) -> list[Level]:
    """By level of nearness, then of the judge. Nearness and verdict are those of the rows with most pictures."""
    good = [row for row in findings.measured(rows) if row["pipeline"] == pipeline]
    judged = {which(row): row for row in sorted(good, key=lambda row: row["samples"])}
    timed = {which(row): row for row in good if row["timed_batch"] == batch}
    both = [(timed[key], judged[key]) for key in timed]
    found = []
    for level in LEVELS:
        near = [time for time, seen in both if (seen["psnr_reference_mean"] or 0) >= level]
        found.append(best_of(pipeline, batch, f"{level:g} dB", near))
    for share in (1.0, 0.95):
        right = [time for time, seen in both if seen.get("judged") and seen["right"] >= share * seen["plain_right"]]
        found.append(best_of(pipeline, batch, f"judge: {share:.0%} of plain", right))
    return found


def which(row: Row) -> tuple[str, str, str]:
    return row["label"], row["setting"], row["env"]


def best_of(pipeline: str, batch: int, level: str, rows: Sequence[Row]) -> Level:
    """The fastest of each side among rows that reach a level."""
    sides = [[row for row in rows if (row["kind"] in MINE) is mine] for mine in (True, False)]
    ours, peer = (max(side, key=lambda row: row["speedup"], default=None) for side in sides)
    return Level(pipeline, batch, level, ours, peer, *(against(ours, peer) if ours and peer else ()))


def against(ours: Row, peer: Row, draws: int = 2000) -> tuple[float, float, float]:
    """Ratio of the speed-ups and a bootstrap interval over rounds; of one process the rounds are paired."""
    mine = [p / s for p, s in zip(ours["plain_seconds"], ours["seconds"], strict=True)]
    other = [p / s for p, s in zip(peer["plain_seconds"], peer["seconds"], strict=True)]
    rng, found = random.Random(0), []
    paired = ours["session"] == peer["session"]
    for _ in range(draws):
        first = rng.choices(range(len(mine)), k=len(mine))
        second = first if paired else rng.choices(range(len(other)), k=len(other))
        found.append(statistics.median(mine[i] for i in first) / statistics.median(other[i] for i in second))
    found.sort()
    return statistics.median(mine) / statistics.median(other), found[int(0.025 * draws)], found[int(0.975 * draws)]


def table(rows: Sequence[Row]) -> str:
    """Markdown: by pipeline and pictures in a call."""
    lines = ["| pipeline, in a call | level | ours | speed-up | best single peer | speed-up | ours / peer (95 %) |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for pipeline in SEARCHES:
        for batch in sorted({row["timed_batch"] for row in rows if row["pipeline"] == pipeline}):
            for each in levels(rows, pipeline, batch):
                ratio = "-" if math.isnan(each.ratio) else f"{each.ratio:.2f} ({each.low:.2f} to {each.high:.2f})"
                if each.ratio >= 1.3:
                    ratio = f"**{ratio}**"
                lines.append(f"| {pipeline}, {batch} | {each.level} | {told(each.ours)} | {told(each.peer)} | {ratio} |")
    return "\n".join(lines) + "\n"


def told(row: Row | None) -> str:
    return "none | -" if row is None else f"{row['label']}, {row['setting']} | {row['speedup']:.2f}x"


def shares(rows: Sequence[Row]) -> str:
    """Markdown: which part of a plain call, and of the fastest calls, is not the denoiser's."""
    lines = []
    for pipeline in SEARCHES:
        for batch in sorted({row["timed_batch"] for row in rows if row["pipeline"] == pipeline}):
            here = [row for row in findings.measured(rows) if row["pipeline"] == pipeline and row["timed_batch"] == batch]
            fast = [each.ours for each in levels(rows, pipeline, batch) if each.ours]
            if here and fast:
                quickest = max(fast, key=lambda row: row["speedup"])
                plain, ours = 1 - here[0]["plain_denoiser_share"], 1 - quickest["denoiser_share"]
                who = f"{quickest['label']} ({quickest['setting']})"
                lines.append(f"- {pipeline}, {batch} in a call: outside the denoiser {plain:.0%} of a plain call, {ours:.0%} of {who}")
    return "\n".join(lines) + "\n"


def write_stacks(store: Store) -> Path:
    """Table and raw rows into examples/stacks."""
    rows = list(store)
    store.write_csv(STACKS / "rows.csv")
    readme = STACKS / "README.md"
    before, rest = readme.read_text().split(BEGIN, 1)
    commands = " and ".join(f"`{command}`" for command in sorted({row["command"] for row in rows}))
    body = f"{table(rows)}\n{shares(rows)}\n{commands}. Raw rows: [rows.csv](rows.csv).\n"
    write_atomic(readme, (before + BEGIN + body + END + rest.split(END, 1)[1]).encode())
    return readme
