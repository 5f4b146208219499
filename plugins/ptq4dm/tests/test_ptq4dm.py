"""PTQ4DM against its equations, and what must not happen."""

from __future__ import annotations

import importlib
import re
import shlex
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, NotFinite, Unsupported, load_pipeline, unload
from diffgraft.cli import app
from diffgraft.installed import registry
from diffgraft.methods.calibration import calibrate
from diffgraft.methods.inputs import CallSettings, Sample
from diffgraft.methods.quant.affine import UniformAffine
from diffgraft.methods.quant.blocks import asked_in
from diffgraft.methods.quant.layers import quantised_in
from diffgraft_ptq4dm import PTQ4DM, calibration
from diffgraft_ptq4dm import method as m
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from typer.testing import CliRunner

CLASSES = {"sd": "StableDiffusionPipeline", "pixel": "DDPMPipeline"}


def tiny(family="pixel"):
    module, function = registry.families()[family].tiny.split(":")
    made = getattr(importlib.import_module(module), function)(CLASSES[family], 0)
    if family != "pixel":
        made.kwargs["output_type"] = "latent"
    return made


def picture(made, **kwargs):
    """The result as an array, from equal noise."""
    return np.asarray(made.pipe(**{**made.kwargs, "generator": torch.Generator().manual_seed(0), "output_type": "np", **kwargs})[0])


def artefact_for(made, path, steps=4, samples=2, **knobs):
    """A calibration on this very pipeline."""
    extra = {k: v for k, v in made.kwargs.items() if k not in ("prompt", "num_inference_steps", "output_type")}
    asked = [Sample(seed, prompt=made.kwargs.get("prompt")) for seed in range(samples)]
    return calibrate(made.pipe, PTQ4DM(**knobs), asked, CallSettings(steps=steps, extra=extra), path / "a.safetensors")


def calls_of(pipe, monkeypatch, path, steps, samples, **knobs):
    """What a calibration keeps, without the rest of it."""
    found = []
    monkeypatch.setattr(calibration, "replay", lambda records, target: found.extend(x for r in records for x in asked_in(r, 1)))
    asked = [Sample(seed) for seed in range(samples)]
    calibrate(pipe, PTQ4DM(**knobs), asked, CallSettings(steps=steps), path / "a.safetensors")
    return found


def far(found, plain):
    return float(np.linalg.norm(found - plain) / np.linalg.norm(plain))


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# timesteps ----------------------------------------------------------------------------------------------------------------------------


def kolmogorov_smirnov(t, cdf):
    """sup |F_n - F|, times the square root of n."""
    empirical = torch.bincount(t, minlength=len(cdf)).double().cumsum(0) / len(t)
    return float((empirical - cdf).abs().max()) * len(t) ** 0.5


def test_timesteps_are_a_clamped_normals():
    """At 1.63 one right sampler in a hundred is rejected (the seeds are fixed)."""
    t = m.drawn(20_000, 250, 0.4, 0.4, torch.Generator().manual_seed(0))
    assert kolmogorov_smirnov(t, m.distribution(250, 0.4, 0.4)) < 1.63
    assert kolmogorov_smirnov(t, m.distribution(250, 0.5, 0.4)) > 10
    assert kolmogorov_smirnov(t, m.distribution(250, 0.4, 0.35)) > 5
    assert abs(float((t == 0).double().mean()) - 0.1587) < 0.02  # 16 % of the draws are below 0
    assert abs(float((t == 249).double().mean()) - 0.0668) < 0.01
    even = m.uniform(20_000, 250, torch.Generator().manual_seed(0))
    assert kolmogorov_smirnov(even, torch.arange(1, 251).double() / 250) < 1.63


def test_the_runs_of_a_calibration_keep_calls_at_these_timesteps(monkeypatch, tmp_path):
    pipe = tiny().pipe
    total, draws = 10, 60
    found = calls_of(pipe, monkeypatch, tmp_path, total, 4, draws=draws)
    assert len(found) == 4 * draws
    t = torch.cat([x.arguments["timestep"] for x in found]) // (1000 // total)
    assert kolmogorov_smirnov(t, m.distribution(total, 0.4, 0.4)) < 1.63
    assert kolmogorov_smirnov(t, torch.arange(1, total + 1).double() / total) > 1.63
    again = calls_of(pipe, monkeypatch, tmp_path, total, 1, draws=draws)
    assert all(torch.equal(a.arguments["sample"], b.arguments["sample"]) for a, b in zip(found[:draws], again, strict=True))


SPREAD = 0.3
"""Standard deviation of the data of the toy."""


class Exact(UNet2DModel):
    """The best prediction of the noise for data N(0, SPREAD^2): x_t sqrt(1 - a) / (a SPREAD^2 + 1 - a)."""

    alphas = DDIMScheduler().alphas_cumprod

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        a = self.alphas[timestep].reshape(-1, 1, 1, 1)
        eps = sample * (1 - a).sqrt() / (a * SPREAD**2 + 1 - a)
        return (eps,) if not return_dict else type("Out", (), {"sample": eps})()


@pytest.mark.parametrize("official_compat", [False, True])
def test_a_state_has_the_variance_of_its_timestep(official_compat, monkeypatch, tmp_path):
    """The official code pairs it with the mirrored one."""
    unet = Exact(
        sample_size=16,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
    )
    pipe = DDIMPipeline(unet=unet, scheduler=DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    found = calls_of(pipe, monkeypatch, tmp_path, 40, 3, draws=30, official_compat=official_compat)
    worst = 0.0
    for asked in found:
        a = Exact.alphas[asked.arguments["timestep"]]
        expected = float(a * SPREAD**2 + 1 - a)
        worst = max(worst, abs(float(asked.arguments["sample"].var()) / expected - 1))
    assert (worst > 1) if official_compat else (worst < 0.25)


# ranges -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["tensor", "channel"])
def test_the_search_beats_the_whole_range_and_knows_one_sided_tensors(over):
    grid, x = UniformAffine(4, over), seeded(6, 500).pow(3)
    most = x.abs().amax(1, keepdim=True) if over == "channel" else x.abs().max().reshape(1, 1)

    def error(scale):
        return float((grid.rounded(x, scale) - x).abs().pow(2.4).mean())

    assert error(m.searched(x, grid)) < 0.9 * error(grid.scale(-most, most))
    assert float(m.searched(x.abs(), grid).zero.max()) == 0
    assert float(m.searched(-x.abs(), grid).zero.min()) == 15


# on pipelines -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "plans"), [("pixel", ("w16a16", "w8a8", "w4a8", "w2a8")), ("sd", ("w8a8", "w3a8"))])
def test_more_bits_are_nearer_and_off_is_the_plain_pipeline(family, plans, tmp_path):
    made = tiny(family)
    plain = picture(made)
    errors = []
    for bits in plans:
        artefact = artefact_for(made, tmp_path, bits=bits, ends=2, draws=8)
        assert np.array_equal(picture(made), plain)
        load_pipeline(made.pipe, plugins=[("ptq4dm", {"bits": bits, "ends": 2, "artefact": tmp_path / "a.safetensors"})])
        errors.append(far(picture(made), plain))
        made.pipe.plugins.configure("ptq4dm", artefact=artefact)
        assert far(picture(made), plain) == errors[-1]  # the file is what was found
        assert "calibrated;" in made.pipe.plugins.report().plugins["ptq4dm"].notes[0]
        made.pipe.plugins.configure("ptq4dm", artefact=None)
        if bits == "w16a16":  # nothing is cut off where each tensor has its own range
            assert far(picture(made), plain) < 1e-3
        made.pipe.plugins.configure("ptq4dm", bits="w32a32")
        assert np.array_equal(picture(made), plain)
        unload(made.pipe)
    assert errors[plans.index("w8a8")] < (3e-2 if family == "pixel" else 5e-2)  # of a whole run; guidance makes it more
    assert all(a < b for a, b in pairwise(errors))


@pytest.mark.parametrize("family", CLASSES)
def test_every_layer_is_quantised_and_the_ends_have_eight_bits(family):
    made = tiny(family)
    load_pipeline(made.pipe, plugins=[("ptq4dm", {"bits": "w4a6"})])
    assert not [name for name, module in made.pipe.unet.named_modules() if type(module) in (torch.nn.Linear, torch.nn.Conv2d)]
    layers = quantised_in({"unet": made.pipe.unet})
    bits = {key: (layer.weights[0].grid.bits, layer.inputs[0].grid.bits) for key, layer in layers.items()}
    assert {key for key, found in bits.items() if found == (8, 8)} == {"unet.conv_in", "unet.conv_out"}
    assert set(bits.values()) == {(8, 8), (4, 6)}


# what must not happen -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "why"),
    [
        ({"bits": "w1a8"}, "bits = 'w1a8': write wXaY"),
        ({"ends": 1}, "ends = 1: Input should be greater than or equal to 2"),
        ({"mu": 2}, "mu = 2"),
        ({"sd": 0}, "sd = 0"),
        ({"keep": ("conv_outt",)}, "did you mean 'conv_out'"),
        ({"timesteps": "normall"}, "timesteps = 'normall'"),
    ],
)
def test_knobs_that_are_refused(knobs, why):
    made = tiny()
    with pytest.raises(ConfigError, match=why):
        load_pipeline(made.pipe, plugins=[("ptq4dm", knobs)])
    assert not hasattr(made.pipe, "plugins")


def test_artefacts_of_others_and_numbers_that_are_none(tmp_path):
    artefact = artefact_for(tiny(), tmp_path)
    with pytest.raises(ArtefactMismatch, match=r"bits = 'w4a8', and it was made for 'w8a8'.*-o ptq4dm.bits=w4a8"):
        load_pipeline(tiny().pipe, plugins=[("ptq4dm", {"artefact": artefact, "bits": "w4a8"})])
    with pytest.raises(ArtefactMismatch):
        load_pipeline(tiny("sd").pipe, plugins=[("ptq4dm", {"artefact": artefact})])
    made = tiny()
    with torch.no_grad():
        made.pipe.unet.mid_block.resnets[0].conv1.bias[0] = torch.nan
    with pytest.raises(NotFinite, match=r"the inputs of unet\.\S+ hold values"):
        artefact_for(made, tmp_path)


def test_a_lora_loaded_later_is_refused():
    peft = pytest.importorskip("peft")
    made = tiny("sd")
    load_pipeline(made.pipe, plugins=["ptq4dm"])
    made.pipe.unet.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]))
    with pytest.raises(Unsupported, match=r"a LoRA was loaded over unet\.\S+to_q"):
        picture(made)


def test_the_command_quantises_and_says_how_to_run_it(tmp_path):
    """`diffgraft quantise` is a calibration with the knob bits said, and what comes of it; its last line runs."""
    out = tmp_path / "q.safetensors"
    words = [
        "quantise",
        "emoji-pixel",
        "--plugin",
        "ptq4dm",
        "--bits",
        "w6a8",
        "--samples",
        "1",
        "--steps",
        "2",
        "--out",
        str(out),
        "-o",
        "ptq4dm.draws=2",
    ]
    done = CliRunner().invoke(app, [*words, "-o", 'ptq4dm.keep=["conv_in"]'])
    assert done.exit_code == 0, done.output
    assert re.search(r"simulated, no speed: w6a8; the weights of \d+ layers would be \d", done.output)
    line = done.output.strip().splitlines()[-1]
    made = CliRunner().invoke(app, [*shlex.split(line)[1:], "--out", str(tmp_path / "x.png")])
    assert made.exit_code == 0, made.output
    assert "w6a8, calibrated" in made.output
    assert "--steps 2" in line
    assert "scatter" not in done.output
    assert "from 1 sample\n" in done.output
    wrong = CliRunner().invoke(app, [*words[:5], "w6b8", *words[6:]])
    assert wrong.exit_code == 2
    assert "bits = 'w6b8': write wXaY" in wrong.output
    number = CliRunner().invoke(app, [*words[:5], "4", *words[6:]])
    assert "bits = 4: write wXaY" in number.output
    other = CliRunner().invoke(app, [*words[:3], "deepcache", *words[4:]])
    assert other.exit_code == 2
    told = " ".join(other.output.split())
    assert "plugins that do: " in told
    assert "ptq4dm" in told
    assert "accvideo" not in told
