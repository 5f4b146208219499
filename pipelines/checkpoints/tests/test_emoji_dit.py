"""emoji-dit: its training from end to end on a tiny scale, and the parts of it that can be wrong without a word."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffgraft import load_pipeline
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.train import common, dit, unet
from diffgraft_checkpoints.train import evaluate as measuring
from diffgraft_checkpoints.train.recipe import BASE
from diffusers import DDPMScheduler, DiTPipeline
from torch.distributions import Normal, kl_divergence


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = measuring.generate
    monkeypatch.setattr(measuring, "generate", lambda *arguments: generate(*arguments[:4], steps=1))
    monkeypatch.setattr(common, "AVERAGE_EVERY", 1)
    for module in (dit, unet):
        monkeypatch.setattr(module, "BATCH", 4)
    for name, value in {"BLOCKS": 2, "HELD_OUT_SCENES": 8, "GUIDANCES": (1.0, 1.5)}.items():
        monkeypatch.setattr(dit, name, value)


def train(out: Path) -> DiTPipeline:
    dit.emoji_dit(out, 4, BASE, 24, 0, "cpu", each=2)
    return DiTPipeline.from_pretrained(out / dit.NAME, local_files_only=True)


def test_one_command_trains_resumes_exports_and_measures(tmp_path: Path, artwork: None, tiny: None, resumed: Any) -> None:
    resumed(dit, "dit", lambda: train(tmp_path), ["transformer"])
    folder = tmp_path / dit.NAME
    pipe = load_pipeline(str(folder), plugins=[])
    assert pipe.plugins.family.name == "dit"
    assert pipe.get_label_ids(["apple", "christmas tree"]) == [22, 63]
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["scores"]["object"]["total"] == 2 * len(scenes.OBJECTS)
    assert set(result["variance_bits"]) == {"learned", "larger", "smaller"}
    assert "{" not in (folder / "README.md").read_text()
    assert {path.name for path in (tmp_path / f"grids-{dit.NAME}").iterdir()} == {"objects.png", "seeds.png"}


def test_the_whole_checkpoint_is_small_and_begins_as_the_identity() -> None:
    transformer = dit.build_transformer()
    assert sum(p.numel() for p in transformer.parameters()) * 2 < 12e6
    x = torch.randn(2, 4, 16, 16)
    assert not transformer(x, timestep=torch.tensor([1, 500]), class_labels=torch.tensor([3, dit.NULL])).sample.any()


def test_a_prepared_transformer_computes_what_the_exported_one_does() -> None:
    torch.manual_seed(0)
    transformer = dit.build_transformer()
    for parameter in transformer.parameters():  # nothing at zero, so that every part counts
        torch.nn.init.normal_(parameter, std=0.1)
    inputs: dict[str, Any] = {"timestep": torch.tensor([7, 900]), "class_labels": torch.tensor([5, dit.NULL])}
    x = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        expected = transformer.eval()(x, **inputs).sample
        dit.prepare(transformer)
        torch.testing.assert_close(transformer.train()(x, **inputs).sample, expected, rtol=1e-4, atol=1e-4)


def test_variance_and_its_cost_are_those_of_the_scheduler() -> None:
    config = unet.build_scheduler().config
    learned, fixed = (DDPMScheduler.from_config(config, variance_type=name) for name in ("learned_range", "fixed_small"))
    variances = dit.Variances(fixed.alphas_cumprod)
    noisy, v, error, spread = torch.randn(4, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0)).unbind()
    for t in (1, 10, 500, 999):
        steps = [fixed.step(each, t, noisy, generator=torch.Generator().manual_seed(1)).prev_sample for each in (v, v + error)]
        deviations = [fixed._get_variance(t).sqrt(), (learned._get_variance(t, predicted_variance=spread) / 2).exp()]
        nats = kl_divergence(Normal(torch.zeros_like(noisy), deviations[0]), Normal(steps[1] - steps[0], deviations[1]))
        bits = variances.bits(spread, error, torch.tensor([t]))
        torch.testing.assert_close(bits, nats / math.log(2), rtol=1e-3, atol=1e-4)
