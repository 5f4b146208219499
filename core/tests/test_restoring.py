"""`diffgraft restore`: a picture from its measurement; measurements from files; what is told of a result."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffgraft.cli.pictures import flat, open_picture
from diffgraft.cli.restoring import read_measurement
from diffgraft.lab import restoration
from diffgraft.methods.measurements import Identity, Phase, downsample
from diffgraft.methods.problems import Problem
from diffgraft_pipelines.tiny import make
from PIL import Image
from safetensors.torch import save_file

SIDE = 16
"""Of the tiny pixel pipeline's pictures."""
RUN = ["restore", "{pixel}", "--steps", "2", "-p", "solver", "--out", "x/a.png"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    make("DDPMPipeline").pipe.save_pretrained(home / "pixel")
    make("StableDiffusionPipeline").pipe.save_pretrained(home / "sd")
    ramp = np.linspace(0, 255, SIDE * SIDE * 3).reshape(SIDE, SIDE, 3).astype(np.uint8)
    Image.fromarray(ramp).save(home / "truth.png")
    Image.fromarray(ramp).resize((SIDE // 2, SIDE // 2), Image.Resampling.BOX).save(home / "small.png")
    Image.fromarray(ramp).resize((48, 40)).save(home / "wide.png")
    np.save(home / "y.npy", np.zeros((3, SIDE // 2, SIDE // 2), np.float32))
    np.save(home / "bytes.npy", np.full((3, SIDE // 2, SIDE // 2), 200.0, np.float32))
    (home / "empty.npy").write_bytes(b"")
    np.save(home / "words.npy", np.array(["a", "b"]))
    save_file({"y": torch.zeros(1, 3, SIDE // 2, SIDE // 2)}, home / "y.safetensors")
    save_file({"y": torch.zeros(1), "z": torch.zeros(1)}, home / "two.safetensors")
    (home / "text.png").write_text("no picture")
    return home


def run(call, home, *words):
    return call(*[str(word).format(pixel=home / "pixel", sd=home / "sd", home=home) for word in words])


def good(result):
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def test_a_picture_is_found_and_told_of(call, home, tmp_path):
    words = ["--problem", "downsample(2) + noise(0.05)", "--from-truth", "{home}/truth.png", "--sheet", "s.png", "--json"]
    told = json.loads(good(run(call, home, *RUN, *words)).stdout)
    with Image.open(home / "truth.png") as truth, Image.open(tmp_path / "work/x/a.png") as found:
        there, here = (np.asarray(each, float) / 255 for each in (truth, found))
    assert here.shape == there.shape
    guess, result = told["pictures"]
    assert (guess["what"], result["what"]) == ("pseudo-inverse", "result")
    # the solver gives the pseudo-inverse, and the file has what is told of it, up to its bytes
    assert result["psnr"] == pytest.approx(guess["psnr"], abs=0.05)
    assert result["psnr"] == pytest.approx(-10 * np.log10(np.square(here - there).mean()), abs=0.05)
    assert 0 < result["ssim"] < 1
    assert guess["residual"] < 1e-6, "all of y is explained, its noise too"
    assert told["noise"] == 0.05
    with Image.open(tmp_path / "work/s.png") as sheet:
        assert sheet.width > 4 * sheet.height / 2, "four pictures in a row"


def test_for_people_and_several(call, home, tmp_path):
    words = ["--problem", "mask(0.5)", "--from-truth", "{home}/wide.png", "--num-images", 2]
    result = good(run(call, home, *RUN, *words))
    assert "48x40, scaled and cropped to 16x16" in result.stderr
    for text in ("PSNR, dB", "pseudo-inverse", "result 0", "result 1", "solver: called", "wrote x/a-1.png"):
        assert text in result.stdout
    assert sorted(file.name for file in (tmp_path / "work/x").iterdir()) == ["a-0.png", "a-1.png"]


@pytest.mark.parametrize("file", ["small.png", "y.npy", "y.safetensors"])
def test_measurements_from_files(call, home, file):
    told = json.loads(good(run(call, home, *RUN, "--problem", "downsample(2)", "--measurement", f"{{home}}/{file}", "--json")).stdout)
    assert [list(row) for row in told["pictures"]] == [["what", "residual"]] * 2, "nobody knows the truth"
    assert told["pictures"][1]["residual"] < 0.01, "what a picture's bytes round"


def test_what_a_file_holds(home):
    small = read_measurement(home / "small.png")
    assert small.shape == (1, 3, SIDE // 2, SIDE // 2)
    with Image.open(home / "small.png") as image:
        assert torch.equal(small[0], torch.from_numpy(np.asarray(image, np.float32)).permute(2, 0, 1) / 127.5 - 1)
    Image.new("L", (4, 6), 255).save(home / "grey.png")
    assert torch.equal(read_measurement(home / "grey.png"), torch.ones(1, 1, 6, 4))


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    wanted = torch.tensor([0, 1, 128, 255]) / 127.5 - 1
    torch.testing.assert_close(read_measurement(tmp_path / "deep.png"), wanted.view(1, 1, 1, 4))
    given = flat(open_picture(str(tmp_path / "deep.png"), "--image"), "deep.png")
    assert np.asarray(given)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_measurement_without_inverse_is_shown_and_judged():
    truth = torch.rand(1, 1, 8, 8) * 2 - 1
    problem = Problem(Phase(2), Phase(2).A(truth))
    made = restoration.pictures_of(truth)[:, :]
    (row,) = restoration.judged(problem, truth, made)
    assert row["residual"] < 1e-5
    assert row["psnr"] > 100
    assert row["ssim"] is None, "smaller than SSIM's window"
    assert restoration.sheet_of(problem, truth, made, "phase").width > 3 * 100


def test_the_noise_is_not_that_of_the_run():
    draws = [torch.randn(64, generator=generator) for generator in (restoration.draws(3), torch.Generator().manual_seed(3))]
    assert not torch.equal(*draws)
    assert torch.equal(draws[0], torch.randn(64, generator=restoration.draws(3)))


def test_videos():
    x = torch.rand(1, 3, 4, 8, 8) * 2 - 1
    problem = Problem(Identity(), x)
    made = restoration.pictures_of(x)
    assert made.shape == (1, 4, 8, 8, 3)
    torch.testing.assert_close(restoration.samples_of(made, problem), x)
    (_, row) = restoration.judged(problem, None, made)
    assert row["residual"] < 1e-6
    assert restoration.shown(x).size == (8, 8)
    assert downsample(2).A(x).shape == (1, 3, 4, 4, 4)


TRUTH = ["--problem", "downsample(2)", "--from-truth", "{home}/truth.png"]
BAD = {
    "nothing": ([*RUN, "--problem", "identity"], ["ConfigError", "--measurement FILE", "--from-truth FILE"]),
    "both": ([*RUN, *TRUTH, "--measurement", "{home}/y.npy"], ["ConfigError", "one of the two"]),
    "no such operator": ([*RUN, *TRUTH[2:], "--problem", "downsampel(2)"], ["ConfigError", "downsampel", "downsample"]),
    "no solver": (["restore", "{pixel}", *TRUTH, "-p", "idle"], ["ConfigError", "idle", "solver"]),
    "no plugin": (["restore", "{pixel}", *TRUTH], ["ConfigError", "no --plugin", "solver"]),
    "two solvers": (["restore", "{pixel}", *TRUTH, "-p", "solver,second_solver"], ["ConfigError", "keep one"]),
    "no such file": ([*RUN, "--problem", "identity", "--measurement", "no.npy"], ["ConfigError", "no.npy", "cannot be read"]),
    "no such truth": ([*RUN, "--problem", "identity", "--from-truth", "no.png"], ["ConfigError", "no.png"]),
    "no picture": ([*RUN, "--problem", "identity", "--measurement", "{home}/text.png"], ["ConfigError", "text.png", ".safetensors"]),
    "words": ([*RUN, "--problem", "identity", "--measurement", "{home}/words.npy"], ["ConfigError", "save real ones"]),
    "an empty file": ([*RUN, "--problem", "identity", "--measurement", "{home}/empty.npy"], ["ConfigError", "empty.npy", "cannot be read"]),
    "two arrays": ([*RUN, "--problem", "identity", "--measurement", "{home}/two.safetensors"], ["ConfigError", "2 arrays (y, z)"]),
    "bytes": ([*RUN, "--problem", "downsample(2)", "--measurement", "{home}/bytes.npy"], ["ConfigError", "y reaches 200", "127.5"]),
    "another size": ([*RUN, "--problem", "identity", "--measurement", "{home}/y.npy"], ["ConfigError", "8x8", "16x16"]),
    "a size that was asked for": (
        ["restore", "{sd}", "--problem", "identity", "--measurement", "{home}/y.npy", "-p", "solver", "--height", "64", "--width", "64"],
        ["ConfigError", "8x8", "64x64"],
    ),
    "a sheet of another kind": ([*RUN, *TRUTH, "--sheet", "s.txt"], ["ConfigError", "--sheet s.txt"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(call, home, tmp_path, case):
    words, expected = BAD[case]
    result = run(call, home, *words)
    assert result.exit_code == 2, result.output
    for text in expected:
        assert text in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert not list((tmp_path / "work").iterdir())
