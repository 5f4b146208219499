"""A badge with a plugin's tier, as a file of its own: nothing is fetched."""

from __future__ import annotations

from html import escape

COLOURS = {"gold": "#b8860b", "silver": "#71797e", "bronze": "#a9642b", "no tier yet": "#6b6b6b"}
LABEL = "diffgraft"
CHARACTER = 7
"""Width of a character in pixels, about."""


def badge(tier: str | None) -> str:
    """The badge as SVG: "diffgraft | silver"."""
    word = tier or "no tier yet"
    left, right = (CHARACTER * len(text) + 12 for text in (LABEL, word))
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" aria-label="{LABEL}: {escape(word)}">
<title>{LABEL}: {escape(word)}</title>
<rect width="{left + right}" height="20" rx="3" fill="#3b3b3b"/>
<path d="M{left} 0h{right - 3}a3 3 0 0 1 3 3v14a3 3 0 0 1-3 3h-{right - 3}z" fill="{COLOURS[word]}"/>
<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle">
<text x="{left / 2:g}" y="14">{LABEL}</text>
<text x="{left + right / 2:g}" y="14">{escape(word)}</text>
</g>
</svg>
"""
