"""``python -m diffgraft``: the command line."""

from diffgraft.cli import app

app(prog_name="diffgraft")
