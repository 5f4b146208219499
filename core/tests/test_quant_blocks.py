"""Calibration by blocks, ranges of activations, and attention on grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from diffgraft import ConfigError, NotFinite, Unsupported
from diffgraft.methods.calibration import calibrate, calibrate_call
from diffgraft.methods.inputs import CallSettings, Sample
from diffgraft.methods.quant import blocks
from diffgraft.methods.quant.affine import UniformAffine, nearest_scale
from diffgraft.methods.quant.attention import attention, with_rounded_softmax
from diffgraft.methods.quant.blocks import Asked, Keeping, OnDisk, asked_in, learned, recorded, units_of
from diffgraft.methods.quant.export import kernel_weight
from diffgraft.methods.quant.kept import keep
from diffgraft.methods.quant.layers import Rounder, layers_of, put, quantised
from diffgraft.methods.quant.ranges import measure
from diffgraft.methods.quant.rounding import Recipe, learn_rounding
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from probes import PAPER, Probe, generate, tiny
from torch import nn

SD = "StableDiffusionPipeline"


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# calls ----------------------------------------------------------------------------------------------------------------------------------


def asked(seed, rows=2, timestep=7):
    more = {"text_embeds": seeded(rows, 3, seed=seed + 1), "flags": (True, None, "x", 0.5)}
    return Asked(
        "unet",
        {"sample": seeded(rows, 4, 5, seed=seed), "timestep": torch.tensor(timestep), "more": more, "frames": seeded(rows * 3, 2)},
        rows,
    )


def test_calls_come_back_as_they_were_kept_those_of_one_form_joined():
    record = recorded([asked(0), asked(5, timestep=3), asked(9, rows=1)])
    assert all(isinstance(x, torch.Tensor) for x in record.values())
    [found] = list(asked_in(record, 99))
    assert found.rows == 5
    assert torch.equal(
        found.arguments["sample"], torch.cat([asked(0).arguments["sample"], asked(5).arguments["sample"], asked(9, 1).arguments["sample"]])
    )
    assert found.arguments["timestep"].tolist() == [7, 7, 3, 3, 7]
    assert found.arguments["more"]["flags"] == (True, None, "x", 0.5)
    assert found.arguments["frames"].shape == (15, 2)  # each row has three parts of it
    parts = list(asked_in(record, 2))
    assert [one.rows for one in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([one.arguments["more"]["text_embeds"] for one in parts]), found.arguments["more"]["text_embeds"])
    other = Asked("unet", {**asked(0).arguments, "sample": seeded(2, 4, 6)}, 2)
    assert len(list(asked_in(recorded([asked(0), other]), 99))) == 2


def test_what_no_file_can_hold_is_refused():
    with pytest.raises(Unsupported, match="given a Linear"):
        recorded([Asked("unet", {"sample": seeded(2, 3), "net": nn.Linear(1, 1)}, 2)])
    with pytest.raises(Unsupported, match=r"2 rows holds a tensor of shape \(3, 3\)"):
        recorded([Asked("unet", {"sample": seeded(2, 3), "odd": seeded(3, 3)}, 2)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_rows_on_disk(tmp_path, dtype):
    disk, values = OnDisk(tmp_path, 5), (seeded(5, 2, 3) * 9).to(dtype)
    disk.put("a", 0, values[:3])
    disk.put("a", 3, values[3:])
    assert torch.equal(disk.get("a", [4, 0, 4], torch.device("cpu")), values[[4, 0, 4]].flatten(0, 1))
    assert (tmp_path / "a").stat().st_size == values.nbytes
    with pytest.raises(Unsupported, match="calibrate at one size"):
        disk.put("a", 0, seeded(1, 2, 4).to(dtype))


# blocks ---------------------------------------------------------------------------------------------------------------------------------


class Learning(Keeping):
    """Learns the rounding of all layers in 3 bits for a few steps."""

    name = "learning"
    paper = PAPER
    fail_at: ClassVar[int | None] = None
    under: ClassVar[str] = ""
    learned: ClassVar[list[str]] = []

    def modules(self, call, next):
        for layer in [layer for layer in layers_of(call.denoisers) if self.under in layer.path]:
            new = quantised(layer.module, UniformAffine(3, "channel"))
            new.active = False
            put(call.swap, layer, new)
        next(call)

    def keeps(self, call):
        return call.step.index % 2 == 0

    def summarise(self, records, target):
        layers = {m.key: m for d in target.denoisers.values() for m in d.modules() if hasattr(m, "see")}
        self.learned.clear()
        losses = learned(records, target, units_of(target, layers), "weights", self.learn, batch=4)
        tensors, facts = keep(layers)
        return {name: x for name, x in tensors.items() if x.numel()}, {
            **facts,
            "losses": {k: [x.before, x.after] for k, x in losses.items() if x.kept},
        }

    def learn(self, unit, outputs, targets, count):
        if len(self.learned) == self.fail_at:
            raise KeyboardInterrupt
        self.learned.append(unit.key)
        return learn_rounding(outputs, targets, count, list(unit.layers.values()), Recipe(steps=3, batch=4, lr=1e-2))


class Learns(Probe):
    name = "learns"
    calibration = Learning


@pytest.fixture
def pipe(monkeypatch):
    monkeypatch.setattr(Learning, "fail_at", None)
    return tiny(SD)[0]


def sized(pipe: Any) -> CallSettings:
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return CallSettings(steps=3, guidance_scale=4.0, height=side, width=side)


def samples(n: int = 2) -> list[Sample]:
    return [Sample(seed=i, prompt=f"picture {i}") for i in range(n)]


def test_blocks_are_learned_in_running_order_and_none_is_worse(pipe, tmp_path):
    order: Sequence[str] = []
    blocks_in = {"mid_block.resnets.0", "up_blocks.0.resnets.0", "down_blocks.1.attentions.0", "conv_in", "conv_out"}
    handles = [m.register_forward_hook(lambda *_, p=p: order.append(f"unet.{p}")) for p, m in pipe.unet.named_modules() if p in blocks_in]
    plain = generate(pipe, {"prompt": "x", "num_inference_steps": 1, "output_type": "pt"})
    for handle in handles:
        handle.remove()
    told: list[tuple[str, int, int]] = []
    made = calibrate(pipe, Learns(), samples(), sized(pipe), tmp_path / "a.safetensors", on_progress=lambda *told_as: told.append(told_as))
    found = [key for key in Learning.learned if key in order]
    assert found == list(dict.fromkeys(order))
    assert all(after <= before for before, after in made.facts["losses"].values())
    assert sum(after < before for before, after in made.facts["losses"].values()) > len(Learning.learned) / 2
    assert told[:2] == [("calibration", 1, 2), ("calibration", 2, 2)]
    assert told[2:] == [("weights", i + 1, len(Learning.learned)) for i in range(len(Learning.learned))]
    assert all(p.grad is None for p in pipe.unet.parameters())
    assert torch.equal(generate(pipe, {"prompt": "x", "num_inference_steps": 1, "output_type": "pt"}), plain)
    assert not [m for m in pipe.unet.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert list(tmp_path.iterdir()) == [tmp_path / "a.safetensors"]


def test_an_interrupted_calibration_goes_on_with_the_next_block(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(Learning, "under", "down_blocks.1")
    whole = calibrate(pipe, Learns(), samples(), sized(pipe), tmp_path / "whole.safetensors")
    names = list(Learning.learned)
    monkeypatch.setattr(Learning, "fail_at", 2)
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, Learns(), samples(), sized(pipe), tmp_path / "b.safetensors")
    monkeypatch.setattr(Learning, "fail_at", None)
    with pytest.raises(ConfigError, match="blocks of an unfinished calibration with other prompts"):
        calibrate(pipe, Learns(), samples(3), sized(pipe), tmp_path / "b.safetensors")
    made = calibrate(pipe, Learns(), samples(), sized(pipe), tmp_path / "b.safetensors")
    assert Learning.learned == names[2:]
    assert made.facts == whole.facts
    assert all(torch.equal(made.tensors[name], whole.tensors[name]) for name in whole.tensors)


def test_a_block_learns_from_what_the_quantised_blocks_before_it_give(pipe, monkeypatch):
    """And towards what it gives in floats."""
    seen: dict[str, Any] = {}

    def learn(self, unit, outputs, targets, count):
        if unit.key == "unet.conv_out":
            [layer] = unit.layers.values()
            layer.see = lambda x: seen.update(x=x)
            seen.update(y=targets([0]), z=outputs([0]))
            layer.see = None
        return blocks.Losses(0, 0, False)

    monkeypatch.setattr(Learning, "learn", learn)
    heard: list[torch.Tensor] = []  # what comes to the last convolution, first in the run in floats
    handle = pipe.unet.conv_act.register_forward_hook(lambda m, args, out: heard.append(out))
    kwargs = {"prompt": "x", "num_inference_steps": 1, "output_type": "pt"}
    calibrate_call(pipe, Learns(), lambda: generate(pipe, kwargs))
    handle.remove()
    assert torch.allclose(seen["y"], pipe.unet.conv_out(heard[0][:1]), atol=1e-4)
    assert torch.equal(seen["x"], heard[-1][:1])
    assert not torch.allclose(seen["x"], heard[0][:1], atol=1e-2)


def test_blocks_that_are_not_finite_are_named(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(Learning, "under", "mid_block")
    with torch.no_grad():
        pipe.unet.mid_block.resnets[0].conv1.bias[0] = torch.inf
    with pytest.raises(NotFinite, match=r"outputs of unet\.mid_block\.resnets\.0"):
        calibrate(pipe, Learns(), samples(1), sized(pipe), tmp_path / "a.safetensors")


def test_no_call_to_learn_from(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(Learning, "under", "mid_block")
    monkeypatch.setattr(Learning, "keeps", lambda self, call: False)
    with pytest.raises(ConfigError, match="no denoiser call was kept"):
        calibrate(pipe, Learns(), samples(1), sized(pipe), tmp_path / "a.safetensors")


# ranges and attention -------------------------------------------------------------------------------------------------------------------


def test_ranges_are_those_of_what_comes_unrounded():
    layer = quantised(nn.Conv2d(8, 6, 1), UniformAffine(8, "channel"), UniformAffine(8), split=4)
    layer.outputs = Rounder(UniformAffine(8))
    x = torch.cat([seeded(2, 4, 5, 5), 100 * seeded(2, 4, 5, 5)], 1)
    measure({"a": layer}, lambda: layer(x), "probe", nearest_scale)
    first, second = (rounder.fixed for rounder in layer.inputs)
    assert torch.isclose(first.delta, (x[:, :4].max() - x[:, :4].min()) / 255)
    assert torch.isclose(second.delta, (x[:, 4:].max() - x[:, 4:].min()) / 255)
    assert layer.outputs.fixed is not None
    with pytest.raises(NotFinite, match="probe: the inputs of a hold"):
        measure({"a": layer}, lambda: layer(x / 0), "probe")
    assert isinstance(layer.inputs[0], Rounder)


def test_the_softmax_is_rounded_in_every_processor_as_written_out():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attn = Attention(16, heads=2, dim_head=8)
    x, grid = seeded(2, 7, 16), UniformAffine(4)
    plain = attn(x)
    attn.to_q = quantised(attn.to_q, None)
    assert torch.equal(with_rounded_softmax(attn, lambda: attn(x)), plain)
    attn.to_q.softmax = Rounder(grid)
    q, k, v = (layer(x).reshape(2, 7, 2, 8).transpose(1, 2) for layer in (attn.to_q, attn.to_k, attn.to_v))
    w = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
    wanted = attn.to_out[0]((grid.rounded(w, nearest_scale(w, grid)) @ v).transpose(1, 2).reshape(2, 7, 16))
    assert float((wanted - plain).norm() / plain.norm()) > 1e-3
    for processor in (AttnProcessor(), AttnProcessor2_0()):
        attn.set_processor(processor)
        assert torch.allclose(with_rounded_softmax(attn, lambda: attn(x)), wanted, atol=1e-5)
        assert torch.allclose(attn(x), plain, atol=1e-5)
    attn.to_q.active = False
    assert torch.allclose(with_rounded_softmax(attn, lambda: attn(x)), plain, atol=1e-6)
    attn.to_q.active = True
    with pytest.raises(Unsupported, match="AttnProcessor2_0 cannot be reached"):
        with_rounded_softmax(attn, lambda: x)


def test_attention_written_out_is_torchs():
    q, k, v = (seeded(2, 3, n, 8, seed=n) for n in (5, 7, 7))
    masks = [None, seeded(5, 7), seeded(5, 7) > -1]
    for mask in masks:
        assert torch.allclose(attention(lambda x: x, q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask), atol=1e-6)
    assert torch.allclose(attention(lambda x: x, q, k, v, scale=0.3), F.scaled_dot_product_attention(q, k, v, scale=0.3), atol=1e-6)
    with pytest.raises(Unsupported, match="neither causal"):
        attention(lambda x: x, q, k, v, is_causal=True)


def test_the_softmaxes_zero_stays_zero():
    """Its range begins at 0, so no level is below: the official ``always_zero``."""
    w = seeded(3, 9).softmax(-1)
    assert float(nearest_scale(w, UniformAffine(8)).zero) == 0


def test_rounded_outputs_have_no_kernel():
    layer = quantised(nn.Linear(8, 8), UniformAffine(8, "channel", symmetric=True))
    layer.round_activations(UniformAffine(8, "token"), outputs=UniformAffine(8))
    with pytest.raises(Unsupported, match=r"blocks\.0 rounds what comes out of it too"):
        kernel_weight("blocks.0", layer)
