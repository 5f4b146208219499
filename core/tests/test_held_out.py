"""What benchmarks of calibrated methods begin with."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffgraft import ConfigError
from diffgraft.lab.held_out import FIRST_SEED, HeldOut, decibels, feature_error
from diffgraft.lab.nearest import Nearest
from diffgraft.methods.quant.layers import quantised_in
from PIL import Image
from torch import nn


@pytest.fixture(scope="module")
def bench():
    return HeldOut.load("emoji-pixel", 2, None, 2, 1)


def test_nothing_that_is_measured_is_calibrated_on():
    made = HeldOut.load("emoji-sd", 3, None, 5, 4)
    assert [sample.seed for sample in made.tested] == list(range(5))
    assert [sample.seed for sample in made.teaching] == list(range(FIRST_SEED, FIRST_SEED + 4))
    assert not {sample.prompt for sample in made.tested} & {sample.prompt for sample in made.teaching}
    assert [sample.seed for sample in made.from_seed(7).teaching] == [7, 8, 9, 10]
    with pytest.raises(ConfigError, match="24 prompts for 20 samples and 5 to calibrate on: give more"):
        HeldOut.load("emoji-sd", 3, None, 20, 5)


def test_pictures_are_each_their_own(bench):
    alone = HeldOut(bench.name, bench.pipe, bench.settings, bench.tested[1:], ())
    assert np.array_equal(bench.pictures()[1], alone.pictures()[0])


def test_plugins_are_off_again_after_an_error(bench):
    plain = bench.pictures()
    with pytest.raises(ZeroDivisionError), bench.grafted(Nearest("w2a2")):
        raise ZeroDivisionError
    assert all(np.array_equal(a, b) for a, b in zip(bench.pictures(), plain, strict=True))


def test_fewer_bits_are_further_off_and_every_layer_is_on_a_grid(bench):
    plain = bench.pictures()
    layers = [name for name, module in bench.pipe.unet.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]
    found = {}
    for bits in ("w16a16", "w8a8", "w4a8"):
        with bench.grafted(Nearest(bits, ends=8)):
            quantised = quantised_in(bench.denoisers)
            assert len(quantised) == len(layers)
            assert quantised["unet.conv_out"].weights[0].grid.bits == max(8, int(bits[1:].split("a")[0]))
            found[bits] = decibels(bench.pictures(), plain)
    assert found["w16a16"]["mean"] > found["w8a8"]["mean"] > found["w4a8"]["mean"] >= found["w4a8"]["worst"]


def test_outputs_of_layers_are_kept_and_compared(bench):
    layers = {"in": bench.pipe.unet.conv_in}
    pictures, found = bench.seeing(layers)
    assert len(pictures) == 2
    assert found["in"].shape[0] == 2 * 2  # steps, pictures
    assert feature_error(found, found) == pytest.approx({"error": 0, "cosine": 1}, abs=1e-6)
    assert feature_error({"in": 1.1 * found["in"]}, found)["error"] == pytest.approx(0.1, rel=1e-4)
    assert not bench.pipe.unet.conv_in._forward_hooks


def test_figures_are_written_with_what_belongs_to_them(bench, tmp_path):
    bench.write(tmp_path / "a.json", lines=[1])
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["lines"] == [1]
    assert told["pipeline"] == "emoji-pixel"
    assert told["steps"] == 2
    assert told["versions"]["torch"] == torch.__version__


def test_a_grid_of_the_ways_lies_beside_the_figures(bench, tmp_path):
    plain = bench.pictures()
    rows = {"floats": plain, "darker": [0.9 * each for each in plain]}
    bench.draw(None, "w4a8", rows)
    bench.draw(tmp_path / "a.json", "w4a8", rows)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with Image.open(tmp_path / "a.png") as grid:
        assert grid.height > 2 * 128
        assert grid.width > 2 * 128
