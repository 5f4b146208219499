"""What each of two ranks runs in `test_ranks.py`, in a process of its own: small runs whose outputs and reports it leaves in a file."""

from __future__ import annotations

import datetime
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from diffgraft import Effects, Paper, Plugin, PluginConfig, load_pipeline
from diffgraft_pipelines.tiny import flux
from diffusers import ContextParallelConfig
from torch.distributed.fsdp import fully_shard

STEPS = 6
CACHE = {"diffusers_cache": {"method": "first_block", "threshold": 0.395}}
"""At the second step the first rank has changed by 0.388 and the other by 0.406: alone, one would skip and the other wait for it."""


class Knobs(PluginConfig):
    on: bool = True


@dataclass
class Kept:
    output: Any = None


class OfOneRank(Plugin):
    """Reuses the last block's output, as only the first rank wants to."""

    name = "of_one_rank"
    paper = Paper("a probe", "0000.00000", "one block reused")
    families: ClassVar[tuple[str, ...]] = ("*",)
    Config = Knobs
    State = Kept
    neutral: ClassVar[dict[str, Any]] = {"on": False}
    effects = Effects(skips=frozenset({"blocks"}))

    def select_blocks(self, blocks: Any) -> Any:
        return [block for block in blocks if not block.is_layer][-1:]

    def block(self, call: Any, next: Any) -> Any:
        wanted = call.step.index % 2 == 1 and dist.get_rank() == 0
        if not call.agree(wanted):
            call.state.output = next(call)
        else:
            call.count("skipped")
        return call.state.output


def ulysses(pipe: Any) -> None:
    """Each rank has half of the tokens, and all heads' halves go round in attention."""
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))


def sharded(pipe: Any) -> None:
    """Each rank has half of the weights of each block."""
    for block in [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks, pipe.transformer]:
        fully_shard(block)


def one_picture(spread: Any, plugins: Any, seed: int = 0, late: bool = False) -> dict[str, Any]:
    """A run of a tiny Flux, and what of it can be compared. ``late``: it is spread over the ranks when the plugins are on already."""
    tiny = flux.make("FluxPipeline")
    pipe: Any = tiny.pipe
    if spread is not None and not late:
        spread(pipe)
    load_pipeline(pipe, plugins=plugins)
    if spread is not None and late:
        spread(pipe)
    kwargs = {**tiny.kwargs, "num_inference_steps": STEPS, "output_type": "latent"}
    output = pipe(**kwargs, generator=torch.Generator().manual_seed(seed))[0]
    counts = {name: dict(part.counts) for name, part in pipe.plugins.report().plugins.items()}
    return {"output": output.detach().clone(), "counts": counts}


ADAPTIVE = {"dpm_solver": {"mode": "adaptive", "order": 2, "atol": 10.0, "rtol": 1.0}}
TOGETHER = {
    "nothing": (ulysses, []),
    "of_one_rank": (ulysses, [OfOneRank()]),
    "of_one_rank, sharded": (sharded, [OfOneRank()]),
    "diffusers_cache": (ulysses, CACHE),
    "diffusers_cache, late": (ulysses, CACHE),
    "dpm_solver": (ulysses, ADAPTIVE),
    "time_shift": (ulysses, ["time_shift"]),
}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers divides by the number of accelerators, which a machine may lack
    alone = {name: one_picture(None, plugins) for name, (_, plugins) in TOGETHER.items() if "one_rank" not in name and "late" not in name}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    found = {name: one_picture(*case, late="late" in name) for name, case in TOGETHER.items()}
    apart = [one_picture(None, CACHE, seed) for seed in range(rank + 1)]  # data parallel: one has a picture more to make
    torch.save({"alone": alone, "together": found, "apart": apart}, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
