"""``diffgraft ui``: the playground in the browser."""

from __future__ import annotations

import errno
import ipaddress
import socket
import tempfile
import threading
from pathlib import Path
from typing import Annotated

import typer

from diffgraft.cli.options import Device, Dtype, Threads, pipeline_names
from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError
from diffgraft.lab.terminal import say
from diffgraft.methods.extras import imported

FIRST = "emoji-sd"
PORT = 7860


def ui(
    pipelines: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PIPELINE]...", help="Folders and Hub ids to offer beside the bundled pipelines.", autocompletion=pipeline_names
        ),
    ] = None,
    allow: Annotated[
        list[Path] | None,
        typer.Option("--allow", metavar="FOLDER", help="A folder whose files knobs may name (calibrations, LoRA); repeat."),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen: 0.0.0.0 lets other machines in, without a password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes any that is free.")] = PORT,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
) -> None:
    """Open the playground: put a stack together, run it, and see it beside the plain pipeline."""
    named = list(dict.fromkeys(pipelines or []))
    for name in named:
        registry.resolve(name)
    folders = tuple(ensure_folder(folder) for folder in allow or ())
    local = is_local(host)
    port = free_port(host, port)
    imported("gradio", "`diffgraft ui`")
    imported("torchmetrics", "`diffgraft ui`")
    from diffgraft.cli.steady import steady, tell
    from diffgraft.cli.values import load_bare
    from diffgraft.ui.access import Access
    from diffgraft.ui.page import serve
    from diffgraft.ui.running import Playground

    access = Access(tuple(named), folders, hub=local)
    if not access.offered:
        raise ConfigError(f"no pipeline to begin with: give a folder or a Hub id, or `pip install {registry.CHECKPOINTS}`")
    first = named[0] if named else FIRST if FIRST in access.offered else access.offered[0]
    ground = Playground(lambda name: load_bare(name, [], device, dtype)[0], access)
    with steady(threads) as warning, tempfile.TemporaryDirectory(prefix="diffgraft-ui-") as pictures:
        page, address = serve(ground, first, host, port, pictures)
        threading.Thread(target=ground.warm, args=(first,), daemon=True).start()
        tell(warning)
        say(f"the playground is at {address} (Ctrl-C ends it)")
        if not local:
            say(("anybody who reaches this machine can use it: there is no password", "yellow"), err=True)
        page.block_thread()


def ensure_folder(folder: Path) -> Path:
    """Raises ConfigError where there is no such folder."""
    if not folder.expanduser().is_dir():
        raise ConfigError(f"--allow {folder}: there is no such folder")
    return folder.expanduser().resolve()


def is_local(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def free_port(host: str, port: int) -> int:
    """The port, or any free one for 0.

    Raises:
        ConfigError: another program listens there, or there is no such host here.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((host, port))
            return int(one.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"--port {port}: another program listens there; give another one, or --port 0 for any that is free") from None
        if error.errno == errno.EACCES:
            raise ConfigError(f"--port {port}: this system lets you not listen there; give one above 1023") from None
        raise ConfigError(f"--host {host}: this machine cannot listen there ({error.strerror or error})") from None
