"""What tests of tuning share: settings, plugins to tune, one that wants an artefact."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from cli_plugins import Idle, Rival, Sparse
from diffgraft import Calibrator, Need, PluginConfig
from diffgraft.lab.tune import tune
from diffgraft.lab.tune.goal import Goal, TuneSettings, Tuning
from diffgraft.methods.inputs import CallSettings, Sample
from probes import PAPER, Probe
from pydantic import Field

CALL = CallSettings(height=32, width=32, guidance_scale=5.0)


SAMPLES = tuple(Sample(i, f"picture {i}") for i in range(4))


SETTINGS = TuneSettings(Goal("psnr", 20), SAMPLES[:2], SAMPLES[2:], 4, CALL, (4, 3, 2, 1), trials=9, rounds=1, final_rounds=2, batch=2)


class SparseTuned(Sparse):
    tune: ClassVar[dict[str, Any]] = {"every": (2, 3, 4)}


class RivalTuned(Rival):
    tune: ClassVar[dict[str, Any]] = {"every": (2, 3)}


class IdleTuned(Idle):
    tune: ClassVar[dict[str, Any]] = {"off": (False,)}


PLUGINS = [SparseTuned(), RivalTuned(), IdleTuned()]


def run(pipe: Any, out: Any, plugins: Any = PLUGINS, settings: TuneSettings = SETTINGS, **more: Any) -> Tuning:
    return tune(pipe, plugins, settings, out, name="here", **more)


class GainConfig(PluginConfig):
    gain: float = Field(1.0, description="what predictions are multiplied with")
    artefact: Any = Field(None, description="mean squares of the predictions")


class Meter(Calibrator):
    """Records the mean square of every prediction."""

    name = "gain calibration"
    paper = PAPER
    Config = GainConfig
    asked: ClassVar[list[tuple[int, float]]] = []

    class State:
        seen: Any = ()

    def denoise(self, call, next):
        out = next(call)
        call.shared.seen = (*call.shared.seen, out.square().mean())
        return out

    def collect(self, call):
        self.asked.append((len(call.shared.seen), self.config.gain))
        return {"power": torch.stack(call.shared.seen)}

    def summarise(self, records):
        return {"power": torch.stack([r["power"] for r in records]).mean(0)}, {}


class Gain(Probe):
    """Needs an artefact for each number of steps."""

    name = "gain"
    Config = GainConfig
    needs = (Need("artefact", "artefact"),)
    calibration = Meter
    tune: ClassVar[dict[str, Any]] = {"gain": (1.0,)}

    def denoise(self, call, next):
        assert len(call.given("artefact").tensors["power"]) == call.step.total
        return next(call) * self.config.gain


class Wants(Idle):
    """Needs a second pipeline."""

    name = "wants"
    Config = type("WantsConfig", (PluginConfig,), {"__annotations__": {"model": Any}, "model": Field(None, description="a pipeline")})
    needs = (Need("pipeline", "model"),)
    tune: ClassVar[dict[str, Any]] = {"model": (None,)}
