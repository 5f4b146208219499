"""A tuning for people: latency against fidelity as a picture, a table, and the line to use."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.table import Table

from diffgraft.installed import registry
from diffgraft.installed.foreign import plain
from diffgraft.installed.specs import build_plugin
from diffgraft.lab.compare_picture import seconds_text
from diffgraft.lab.metrics import Mean
from diffgraft.lab.terminal import console, say
from diffgraft.lab.tune.goal import MOST_DB, Final, Trial, Tuning, arguments_of
from diffgraft.methods.extras import imported
from diffgraft.methods.files import write_atomic
from diffgraft.stacks.reading import NAME
from diffgraft.stacks.schema import Measured
from diffgraft.stacks.writing import write_stack

COLOURS = ("#d95f02", "#7570b3", "#e7298a", "#1b9e77", "#e6ab02", "#a6761d", "#66a61e", "#0072b2", "#999933")


def write_plot(result: Tuning, pipeline: str, out: Path) -> None:
    """``tune.png``: every trial, the front, plain steps as a series of their own, and the end with its intervals."""
    buffer = io.BytesIO()
    draw(result, pipeline).savefig(buffer, format="png", dpi=120)
    write_atomic(out / "tune.png", buffer.getvalue())


def write_winner(result: Tuning, pipeline: str, command: str, out: Path) -> Path | None:
    """``stack.yaml``: the stack that is worth it, with what it was measured at; where there is none, none is left from before."""
    path, winner = out / NAME, result.winner
    if winner is None:
        path.unlink(missing_ok=True)
        return None
    against, alone, near = winner.against_fewer, winner.of_plain, winner.fidelity
    assert against is not None
    measured = Measured(
        pipeline=pipeline,
        call=arguments_of(winner.candidate, result.settings.call),
        figures={
            f"times as fast as {result.fewer_steps.candidate.steps} plain steps": (against.p50, against.low, against.high),
            f"times as fast as {result.settings.steps} plain steps": (1 / alone.p50, 1 / alone.high, 1 / alone.low),
            result.settings.goal.measure: (near.mean, near.low, near.high),
        },
        command=plain(command)[:1000],
        versions={name: number for name, number in result.environment["versions"].items() if number is not None},
    )
    found = registry.family_of([result.pipeline])
    plugins = [(build_plugin(spec), True) for spec in winner.candidate.plugins.items()]
    return write_stack(path, plugins, found[0].name if found else None, result.pipeline, measured=measured)


def draw(result: Tuning, pipeline: str) -> Any:
    """The figure."""
    measured = [trial for trial in result.trials if trial.reason is None]
    plain = result.finals[0]
    unit = plain.seconds.p50
    goal, decibel = result.settings.goal, result.settings.goal.measure == "psnr"
    seen = [trial.fidelity for trial in measured if trial.fidelity < MOST_DB] + [final.fidelity.mean for final in result.finals[1:]]
    low, high = min([*seen, goal.value]), max([goal.value, *(v for v in seen if v < MOST_DB)])
    margin = 0.08 * (high - low) or 0.05 * high
    top = high + margin

    def shown(fidelity: float) -> float:
        return min(fidelity, top)  # of equal pictures PSNR is infinite: the upper edge

    figure = imported("matplotlib.figure", "`diffgraft tune`").Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    steps = sorted((trial for trial in measured if not trial.candidate.plugins), key=lambda trial: trial.candidate.steps)
    line = [unit * t.ratio for t in steps], [shown(t.fidelity) for t in steps]
    axes.plot(*line, "o-", color="black", label="plain, fewer steps", zorder=3)
    for trial in steps:
        text = f"{trial.candidate.steps}{' (identical)' if trial.fidelity >= MOST_DB else ''}"
        axes.annotate(text, (unit * trial.ratio, shown(trial.fidelity)), (5, -12), textcoords="offset points")
    stacks: dict[str, list[Trial]] = {}
    for trial in measured:
        if trial.candidate.plugins:
            stacks.setdefault(" + ".join(sorted(trial.candidate.plugins)), []).append(trial)
    for i, (name, trials) in enumerate(sorted(stacks.items())):
        points = [unit * t.ratio for t in trials], [shown(t.fidelity) for t in trials]
        axes.scatter(*points, color=COLOURS[i % len(COLOURS)], label=name, alpha=0.8, zorder=4)
    axes.step([unit * t.ratio for t in result.front], [shown(t.fidelity) for t in result.front], where="post", color="gray", lw=1,
              label="front of the search")  # fmt: skip
    axes.axhline(goal.value, color="green", ls="--", lw=1, label=f"target {goal}")
    for number, final in enumerate(result.finals[1:]):
        time, mean, best = final.of_plain, final.fidelity, final is result.best
        axes.errorbar(
            unit * time.p50,
            shown(mean.mean),
            xerr=[[unit * (time.p50 - time.low)], [unit * (time.high - time.p50)]],
            yerr=[[shown(mean.mean) - shown(mean.low)], [shown(mean.high) - shown(mean.mean)]],
            fmt="*" if best else "D",
            markersize=15 if best else 6,
            mfc="none",
            color="crimson",
            capsize=3,
            zorder=5,
            label=None if number else "the end, other prompts: 95 % and range of the rounds",
        )
    axes.set_xlim(left=0)
    axes.set_ylim(low - margin, top + margin / 2)
    axes.set_xlabel("seconds a picture (ratio to the plain pipeline beside it, times its median)")
    against = f"the plain pipeline's {result.settings.reference_steps or result.settings.steps} steps"
    axes.set_ylabel("share that the judge finds right" if goal.measure == "judge" else f"PSNR in dB to {against}" if decibel
                    else f"SSIM to {against}")  # fmt: skip
    axes.set_title(f"{pipeline}: {verdict(result)}", fontsize=10, wrap=True)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)
    return figure


def verdict(result: Tuning) -> str:
    """What it comes to, in a sentence."""
    fewer = result.fewer_steps
    if result.winner is not None:
        against = result.winner.against_fewer
        assert against is not None
        return (
            f"{result.winner.candidate} reaches {result.settings.goal} and is {against.p50:.2f}x as fast as the plain pipeline's "
            f"{fewer.candidate.steps} steps ({against.low:.2f}-{against.high:.2f} over the rounds)"
        )
    reached = "reach" if fewer.reaches else "do not reach"
    return f"no stack beats fewer steps here: {fewer.candidate.steps} plain steps {reached} {result.settings.goal}"


def print_tuning(result: Tuning) -> None:
    """The end as a table, what must be known to read it, and the line to use."""
    refused = [trial for trial in result.trials if trial.reason is not None]
    out = console()
    out.print(finals_table(result))
    out.print()
    stop = ", the whole space" if result.exhausted else ""
    say(f"{len(result.trials)} candidates in {result.spent:.0f} s{stop}; {len(result.front)} on the front, {len(refused)} refused")
    for reason, candidate in {trial.reason: trial.candidate for trial in reversed(refused)}.items():  # the first of each reason
        say(f"refused: {candidate}: {reason}")
    for name, why in result.left_out.items():
        say(f"not tried: {name}: {why}")
    if not any(final.kind == "stack" for final in result.finals):
        say(f"no stack reached {result.settings.goal} in the search")
    say((verdict(result), "green" if result.winner else "yellow"))
    if not result.best.surely:
        say(f"the interval contains the target: with other prompts {result.settings.goal} may be missed")
    say(result.best.ready)


def finals_table(result: Tuning) -> Table:
    number = len(result.settings.held_out)
    goal = result.settings.goal
    table = Table(
        title=f"{goal} on {number} pictures that the search has not seen, {result.settings.final_rounds} rounds",
        title_justify="left",
        header_style="bold",
    )
    for column in ("side", "p50", "speed-up", goal.measure + " (95 %)", "target", "against fewer steps (range)"):
        table.add_column(column, justify="left" if column in ("side", "target") else "right", overflow="fold")
    for final in result.finals:
        title = f"plain, {final.candidate.steps} steps: fewest that reach it" if final.kind == "fewer_steps" else str(final.candidate)
        table.add_row(
            title,
            seconds_text(final.seconds.p50),
            f"{1 / final.of_plain.p50:.2f}x",
            fidelity_text(final.fidelity, goal.measure),
            target_text(final),
            against_text(final),
        )
    return table


def fidelity_text(fidelity: Mean, measure: str) -> str:
    if fidelity.low >= MOST_DB:
        return "identical"
    digits = 1 if measure == "psnr" else 3
    return f"{fidelity.mean:.{digits}f} ({fidelity.low:.{digits}f} to {fidelity.high:.{digits}f})"


def target_text(final: Final) -> str:
    return ("reached" if final.reaches else "missed") + ("" if final.surely else ", interval contains it")


def against_text(final: Final) -> str:
    """``1.31x (1.20-1.42)``, and in a word what the rounds say together."""
    if final.against_fewer is None:
        return "-"
    word = {True: "faster", False: "slower", None: "within noise"}[final.faster]
    return f"{final.against_fewer.p50:.2f}x ({final.against_fewer.low:.2f}-{final.against_fewer.high:.2f}), {word}"
