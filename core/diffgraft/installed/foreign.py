"""Text that is not ours (metadata, catalogues, files, exceptions of others), made fit to be shown: it can neither steer a terminal nor
forge a line."""

from __future__ import annotations

import unicodedata

OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories that terminals act on or that hide and turn round what stands beside them."""
JOINERS = "\u200c\u200d"
"""Of these the two that scripts and emoji are written with."""
LONGEST = 1000
"""Characters that are shown of what somebody else's exception says."""


def plain(text: object, lines: bool = False) -> str:
    """``text`` in one line, or in its lines, in which whatever a terminal obeys is written out (``\\x1b``)."""
    words = str(text)
    if words.isprintable():
        return words
    if not lines:
        return "".join(map(shown, " ".join(words.split())))
    return "\n".join("".join(map(shown, line.replace("\t", "    "))) for line in words.replace("\r\n", "\n").split("\n"))


def shown(sign: str) -> str:
    """One character, written out where it is none to be seen."""
    if unicodedata.category(sign) not in OBEYED or sign in JOINERS:
        return sign
    return sign.encode("unicode_escape").decode("ascii")


def brief(value: object, most: int = 80) -> str:
    """``repr`` of a value for an error, cut; a value that has none (a number of 5,000 digits) by its type."""
    try:
        text = plain(repr(value))
    except (Exception, SystemExit):
        return f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}... ({type(value).__name__})"


def said(error: BaseException) -> str:
    """``Type: text`` of somebody else's exception in one line, whatever its ``__str__`` does."""
    try:
        text = plain(str(error))
    except (Exception, SystemExit):
        text = "its text cannot be shown"
    name = plain(type(error).__name__)
    return f"{name}: {text[:LONGEST]}" if text else name
