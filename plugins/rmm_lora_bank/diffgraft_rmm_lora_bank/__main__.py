"""``python -m diffgraft_rmm_lora_bank``: a bank file of LoRA files, or a table of what each p and rank would cost and lose."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from diffgraft import ConfigError, DiffgraftError, load_pipeline, unload
from diffgraft.methods.files import check_file
from rich.console import Console
from rich.table import Table

from diffgraft_rmm_lora_bank.bank import mean
from diffgraft_rmm_lora_bank.build import build_bank

console = Console(width=140)


def named(loras: list[str]) -> dict[str, str]:
    """Task -> file, of "name=file" or a file alone, which gives its own name.

    Raises:
        typer.BadParameter: two of one name.
    """
    found: dict[str, str] = {}
    for each in loras:
        name, equals, file = each.partition("=")
        name, file = (name, file) if equals else (Path(each).stem, each)
        if name in found:
            raise typer.BadParameter(f"two LoRA are called {name!r}; name them: {name}=FILE other={each}")
        found[name] = file
    return found


def main(
    loras: Annotated[list[str], typer.Argument(help="LoRA files, as FILE or TASK=FILE.")],
    pipeline: Annotated[str, typer.Option(help="Bundled name, folder or Hub id of the pipeline that they are for.")],
    p: Annotated[int | None, typer.Option("-p", help="Number of basis updates; without it the table of all is printed.")] = None,
    rank: Annotated[str | None, typer.Option(help="Most rank of a basis update: a number or 'full'; by default the LoRA's own.")] = None,
    out: Annotated[Path | None, typer.Option(help="The bank file.")] = None,
    denoiser: Annotated[str | None, typer.Option(help="Where there are two: which.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; by default that of the LoRA.")] = None,
    larger: Annotated[bool, typer.Option("--larger", help="Also a bank that is larger than the LoRA.")] = False,
) -> None:
    """Put N LoRA into one bank."""
    try:
        if out is not None:
            check_file(out, {".safetensors"})
        if p is None and (ignored := [option for option, given in (("--rank", rank), ("--out", out), ("--larger", larger)) if given]):
            raise ConfigError(f"{', '.join(ignored)} without -p: the table is of every p and writes nothing; say which bank with -p")
        pipe, files = unload(load_pipeline(pipeline)), named(loras)
        if p is None:
            console.print(table(pipe, files, denoiser, dtype))
            return
        most = int(rank) if rank is not None and rank.isdigit() else rank
        bank = build_bank(pipe, files, p, most, denoiser=denoiser, dtype=dtype, larger=larger)
    except DiffgraftError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    about = bank.table.about
    console.print(bank.table.told(), highlight=False)
    for task, error, cut in zip(about.tasks, about.errors, about.alone, strict=True):
        console.print(f"  {task}: {error:.1%} (cut alone: {cut:.1%})", highlight=False)
    if mean(about.alone) < mean(about.errors):
        console.print(
            "  at this size each LoRA by itself, cut by its own SVD, is nearer: these LoRA have little in common", highlight=False
        )
    if out is not None:
        bank.save(out)
        console.print(f"{out}: {out.stat().st_size:,} bytes", highlight=False)


def table(pipe: object, files: dict[str, str], denoiser: str | None, dtype: str | None) -> Table:
    """Bytes and mean errors of every p, at the LoRA's own rank and at full rank."""
    shown = Table("p", "rank", "bytes", "of the LoRA", "error", "each cut alone", title=f"{len(files)} LoRA")
    for p in range(1, len(files) + 1):
        for rank in (None, "full"):
            made = build_bank(pipe, files, p, rank, denoiser=denoiser, dtype=dtype, larger=True).table
            about = made.about
            shown.add_row(
                str(p), rank or "own", f"{made.bytes:,}", f"{made.bytes / about.lora_bytes:.0%}", f"{mean(about.errors):.1%}",
                f"{mean(about.alone):.1%}",
            )  # fmt: skip
    return shown


if __name__ == "__main__":
    typer.run(main)
