"""What switching LoRA at every denoiser call costs: this plugin against peft's `set_adapters`, the same picture.

    python plugins/segment_lora/benchmarks/switching.py            # half a minute of a core
    python plugins/segment_lora/benchmarks/switching.py --sizes    # and on SD 1.5's, SDXL's and Flux's modules, without weights

Times are of the switching alone, medians of repeats in turns; on a GPU they are the same, since it is Python that runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Annotated, Any

import torch
import typer
from diffgraft import load_pipeline, unload
from diffgraft.kernel.onion import running
from diffgraft.methods.adapters import adapter_layers, beside
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from peft import LoraConfig

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def skeletons() -> dict[str, Callable[[], Any]]:
    """The large models' modules, on the meta device."""
    sdxl = {
        "cross_attention_dim": 2048,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
    }
    return {
        "SD 1.5": lambda: UNet2DConditionModel(cross_attention_dim=768),
        "SDXL": lambda: UNet2DConditionModel(**sdxl),
        "Flux": FluxTransformer2DModel,
    }


class Run:
    """A run in progress, as far as adapters ask."""

    def __init__(self) -> None:
        self.forms: dict[Any, Any] = {}


def spent(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * median(times)


def measure(name: str, model: Any, repeats: int) -> None:
    for adapter in ("a", "b"):
        model.add_adapter(LoraConfig(r=8, target_modules=TARGETS), adapter)

    def shown() -> None:
        with beside(model, {"b": 0.7}):
            pass

    def by_peft() -> None:
        model.set_adapters(["a", "b"], [1.0, 0.7])
        model.set_adapters(["a"], [1.0])

    model.set_adapters(["a"], [1.0])
    with running(Run()):
        shown()
        mine = spent(shown, repeats)
    walking = spent(lambda: [shown() for _ in range(1)], repeats)  # outside of a run: the modules are walked each time
    there_and_back = spent(by_peft, repeats)
    number = sum(1 for _ in model.modules())
    print(
        f"{name:10} {number:6} modules, {len(adapter_layers(model)):4} LoRA layers: shown and taken back {mine:7.2f} ms; "
        f"walking the modules each time {walking:7.2f} ms; set_adapters there and back {there_and_back:7.2f} ms",
        flush=True,
    )


def main(sizes: Annotated[bool, typer.Option(help="the large models' modules too")] = False, repeats: int = 21) -> None:
    torch.set_num_threads(1)
    with nullcontext():
        measure("emoji-sd", unload(load_pipeline("emoji-sd")).unet, repeats)
    for name, make in skeletons().items() if sizes else ():
        with torch.device("meta"):
            measure(name, make(), repeats)


if __name__ == "__main__":
    typer.run(main)
