"""What a plain ``pip install diffgraft`` does not bring: which extra does, said by one helper."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from diffgraft.installed.errors import Unsupported

EXTRAS = {
    "torchmetrics": "lab",
    "optuna": "lab",
    "matplotlib": "lab",
    "jinja2": "author",
    "pytest": "author",
    "peft": "lora",
    "ftfy": "author",
    "xformers": "xformers",
    "ray": "ray",
    "torchao": "torchao",
    "gradio": "ui",
}
"""Import package -> the extra of ``diffgraft`` that brings it; a test holds it against the pyproject."""


def imported(module: str, what: str) -> Any:
    """A module that only an extra brings.

    Args:
        what: needs it, for the error: "`diffgraft tune`".

    Raises:
        Unsupported: it is not installed; the text has the pip command.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise Unsupported(
            f"{what} needs {package}, which cannot be imported ({error}): pip install 'diffgraft[{EXTRAS[package]}]'"
        ) from error
