"""How the page looks: HTML of figures and faults (somebody's text is escaped), and its style sheet."""

from __future__ import annotations

from html import escape

from diffgraft.installed.foreign import plain
from diffgraft.ui.running import Outcome, Progress, macs_text, psnr_of
from diffgraft.ui.stacks import Verdict

FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]
MONO = ["ui-monospace", "Menlo", "Consolas", "monospace"]

CSS = """
.gradio-container {max-width: 1240px !important; margin: 0 auto !important;}
#plugins .token {max-width: 190px;}
#plugins .token span {overflow: hidden; text-overflow: ellipsis; white-space: nowrap;}
#head h1 {margin: 0; font-size: 1.5rem; letter-spacing: -0.02em;}
#head p {margin: 0; opacity: .7;}
.dg-tiles {display: grid; grid-template-columns: repeat(auto-fit, minmax(118px, 1fr)); gap: 8px;}
.dg-tile {border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 8px 12px; background: var(--block-background-fill);}
.dg-tile b {display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; color: var(--body-text-color); white-space: nowrap;}
.dg-tile.good b {color: #15803d;} .dg-tile.bad b {color: #c2410c;}
.dark .dg-tile.good b {color: #4ade80;} .dark .dg-tile.bad b {color: #fb923c;}
.dg-tile span {font-size: .78rem; opacity: .7;}
.dg-table {width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; margin-top: 10px; font-size: .88rem;}
.dg-table th, .dg-table td {text-align: left !important; padding: 4px 8px 4px 0 !important; border: 0 !important;}
.dg-table, .dg-table thead, .dg-table tbody {border: 0 !important;}
.dg-table tr {border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important;}
.dg-table th {font-weight: 600; opacity: .7;}
.dg-note {border-radius: 8px; padding: 8px 12px; margin: 0 0 6px; border-left: 4px solid; font-size: .9rem; line-height: 1.4;}
.dg-note.bad {border-color: #dc2626; background: rgba(220, 38, 38, .08);}
.dg-note.warn {border-color: #d97706; background: rgba(217, 119, 6, .08);}
.dg-note.good {border-color: #16a34a; background: rgba(22, 163, 74, .08);}
.dg-note.info {border-color: #64748b; background: rgba(100, 116, 139, .08);}
#runs .grid-container {grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)) !important;}
#runs .grid-wrap {min-height: 0 !important; max-height: 340px;}
.dg-bar {height: 6px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden; margin-top: 4px;}
.dg-bar i {display: block; height: 100%; background: var(--color-accent); transition: width .15s linear;}
.dg-state {font-size: .88rem; font-variant-numeric: tabular-nums;}
.dg-sides {display: flex; justify-content: space-between; font-size: .8rem; opacity: .7;}
.card-head {align-items: center; flex-wrap: nowrap !important;}
.card-head button {min-width: 34px !important; flex-grow: 0 !important;}
.card-head .prose {flex-grow: 1; padding-left: 14px;}
.card {margin-top: 4px;}
@media (max-width: 480px) {
  .gradio-container .main.fillable {padding: 12px 8px !important;}
  #plugins .token {max-width: 130px;}
}
"""

PHASES = {
    "loading": "loading the pipeline",
    "baseline": "the plain pipeline",
    "stack": "with the stack",
    "again": "the plain pipeline once more, now that it is warm",
    "counting": "counting multiply-adds",
}


def progress_html(at: Progress) -> str:
    """The bar of a run."""
    share = at.done / at.total if at.total else 0
    steps = f", step {at.done} of {at.total}" if at.total else "..."
    bar = f'<div class="dg-bar"><i style="width:{100 * share:.0f}%"></i></div>'
    return f'<div class="dg-state" role="status">{PHASES[at.phase]}{steps}</div>{bar}'


def note(text: str, kind: str) -> str:
    return f'<div class="dg-note {kind}">{escape(plain(text))}</div>'


def verdict_html(verdict: Verdict, chosen: int) -> str:
    """What is to be said of the stack as it is put together."""
    notes = [note(text, "bad") for text in (*verdict.faults, *verdict.clashes)] + [note(text, "warn") for text in verdict.warnings]
    if not notes and chosen > 1:
        notes = [note("these plugins fit together; the first is outermost", "good")]
    return "".join(notes)


def tile(figure: str, words: str, kind: str = "") -> str:
    return f'<div class="dg-tile {kind}"><b>{escape(figure)}</b><span>{escape(words)}</span></div>'


def outcome_html(found: Outcome) -> str:
    """The figures of a run: the most telling ones large, all of them below."""
    one, other = found.baseline, found.stack
    tiles = []
    if other is not None:
        ratio = other.latency.of_medians
        kind = "" if other.is_idle else "good" if ratio > 1 else "bad"
        tiles.append(tile("idle" if other.is_idle else f"{ratio:.2f}x", "the speed, in one run of each", kind))
        tiles.append(tile(psnr_of(other), "PSNR to the baseline"))
        if found.macs and one.macs.per_run:
            tiles.append(tile(f"{other.macs.per_run / one.macs.per_run:.0%}", "of the multiply-adds"))
        if skipped := {key: n for key, n in other.skipped.items() if key.endswith(": skipped")}:
            tiles.append(tile(f"{sum(skipped.values()):g}", "calls skipped"))
    else:
        tiles.append(tile(found.facts()[0][1], "the plain pipeline"))
        if found.macs:
            tiles.append(tile(macs_text(one.macs.per_run), "multiply-adds"))
    rows = "".join(f"<tr><td>{escape(what)}</td><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for what, a, b in found.facts())
    table = f'<table class="dg-table"><tr><th></th><th>baseline</th><th>{escape(plain(found.asked.title))}</th></tr>{rows}</table>'
    sides = '<div class="dg-sides"><span>&#9664; baseline</span><span>stack &#9654;</span></div>' if other is not None else ""
    notes = [note(text, "info") for text in (found.stack.notes if found.stack else [])] + [note(text, "warn") for text in found.warnings]
    return f'{sides}<div class="dg-tiles">{"".join(tiles)}</div>{table}{"".join(notes)}'
