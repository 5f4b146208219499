"""ZOODiP against its equations and closed forms, and what must not happen."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, Unsupported, load_pipeline, unload
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.examples import Example
from diffgraft.methods.fitting import FitPlan, fit
from diffgraft.methods.inputs import CallSettings
from diffgraft.methods.quant.layers import QuantConv2d, QuantLinear
from diffgraft_pipelines.tiny import make
from diffgraft_zoodip import ZOODiP, said
from diffgraft_zoodip import method as m
from diffgraft_zoodip.fitter import ZerothOrder
from diffgraft_zoodip.token import knowing
from PIL import Image
from safetensors.torch import load_file

SD = "StableDiffusionPipeline"


def seeded(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def examples(token="<zoodip>"):
    pixels = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    return [Example(f"a {token} on the left", Image.fromarray(pixels[0])), Example(None, Image.fromarray(pixels[1]))]


def learned(made, folder, steps=3, plan=None, data=None, **knobs):
    settings = CallSettings(steps=2, height=64, width=64)
    return fit(made.pipe, ZOODiP(), data or examples(), settings, folder / "z.safetensors", plan or FitPlan(steps, 1), knobs=knobs)


def picture(pipe, made, **kwargs):
    return np.asarray(pipe(**{**made.kwargs, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), **kwargs})[0])


# the equations ------------------------------------------------------------------------------------------------------------------------


def test_the_estimate_is_unbiased_on_a_quadratic():
    d = 6
    A = seeded(d, d, dtype=torch.float64)
    H, b, e = A @ A.T, seeded(d, seed=1, dtype=torch.float64), seeded(d, seed=2, dtype=torch.float64)

    def loss(rows):
        return ((rows @ H * rows).sum(1) / 2 + rows @ b)[:, None]

    z = seeded(20_000, d, seed=3, dtype=torch.float64)
    g, here = m.estimate(loss, e, z, 1e-3)
    true = H @ e + b
    slopes = z @ true
    error = (slopes[:, None] * z).std(0) / math.sqrt(len(z))  # of a mean of so many
    assert bool(((g - true).abs() < 5 * error).all())
    assert float(here) == pytest.approx(float(loss(e[None])))


def test_the_scale_makes_the_norm_that_of_the_gradient():
    d, n = 12, 3
    true = seeded(d, dtype=torch.float64)
    norms = []
    for seed in range(4000):
        g, _ = m.estimate(lambda rows: (rows @ true)[:, None], torch.zeros(d, dtype=torch.float64), seeded(n, d, seed=seed).double(), 1e-3)
        norms.append(float((g * m.shrink(n, d)).square().sum()))
    expected = float(true.square().sum()) * (d + n + 1) / n / ((d + n - 1) / n)  # the paper's d + n - 1 is that of unit directions
    assert np.mean(norms) == pytest.approx(expected, rel=0.06)


def test_a_projected_gradient_is_orthogonal_to_the_still_directions():
    history = (seeded(20, 4) @ seeded(4, 9, seed=1)).cumsum(0) + 1e-4 * seeded(20, 9, seed=2)
    V = m.still_directions(history, 1e-3)
    assert 0 < len(V) < 9
    assert torch.allclose(V @ V.T, torch.eye(len(V)), atol=1e-5)
    g = m.projected(seeded(9, seed=3), V)
    assert float((V @ g).abs().max()) < 1e-6
    assert torch.allclose(m.projected(g, V), g, atol=1e-6)
    assert torch.equal(m.projected(g, torch.zeros(4, 9)), g)


def test_the_still_directions_are_those_behind_the_share():
    history = seeded(40, 5).cumsum(0)
    x = ((history - history.mean(0)) / history.std(0, correction=0)).double()
    values, vectors = torch.linalg.eigh(x.T @ x)
    share = (values.flip(0) / values.sum()).cumsum(0)
    for nu in (0.5, 0.1, 0.01, 1e-3):
        kept = int((share <= 1 - nu).sum()) + 1
        V = m.still_directions(history, nu)
        assert len(V) == 5 - kept
        wanted = vectors.flip(1)[:, kept:].float()
        assert torch.allclose(V.T @ V, wanted @ wanted.T, atol=1e-4)
    assert len(m.still_directions(history, 0)) == 0
    assert len(m.still_directions(torch.ones(8, 5), 1e-3)) <= 4  # a row that never moved: no NaN
    assert bool(m.still_directions(torch.ones(8, 5), 1e-3).isfinite().all())


# the fit ------------------------------------------------------------------------------------------------------------------------------


def test_what_is_learned_loads_as_a_textual_inversion_and_does_what_the_plugin_does(tmp_path):
    made = make(SD)
    plain = picture(made.pipe, made)
    artefact = learned(made, tmp_path, initial="a", rate=1.0)
    assert np.array_equal(picture(made.pipe, made), plain)
    tensors = load_file(tmp_path / "z.safetensors")
    assert list(tensors) == ["<zoodip>"]
    assert tensors["<zoodip>"].dtype == torch.float32
    assert torch.equal(tensors["<zoodip>"], artefact.tensors["<zoodip>"])
    prompt = "a red <zoodip> on the left"
    pipe = load_pipeline(made.pipe, plugins=[("zoodip", {"artefact": tmp_path / "z.safetensors"})])
    ours = picture(pipe, made, prompt=prompt)
    pipe.plugins.configure("zoodip", word="apple")
    assert np.array_equal(picture(pipe, made, prompt="a red apple on the left"), ours)
    twin = copy.deepcopy(pipe)
    assert np.array_equal(picture(twin, made, prompt=prompt), ours)
    pipe.plugins.configure("zoodip", artefact=artefact)
    assert np.array_equal(picture(pipe, made, prompt=prompt), ours)
    unload(pipe)
    assert "<zoodip>" not in made.pipe.tokenizer.get_vocab()
    assert "forward" not in made.pipe.text_encoder.get_input_embeddings().__dict__
    made.pipe.load_textual_inversion(str(tmp_path / "z.safetensors"))
    assert np.array_equal(picture(made.pipe, made, prompt=prompt), ours)
    assert not np.array_equal(ours, plain)


def test_a_row_that_did_not_move_is_the_initial_word(tmp_path):
    made = make(SD)
    plain = picture(made.pipe, made, prompt="a dog b")
    [number] = made.pipe.tokenizer("b", add_special_tokens=False)["input_ids"]  # the tiny tokenizer knows letters
    with knowing(made.pipe, "<zoodip>", made.pipe.text_encoder.get_input_embeddings().weight[number]):
        assert np.array_equal(picture(made.pipe, made, prompt="a dog <zoodip>"), plain)
        assert np.array_equal(picture(made.pipe, made, prompt="a dog b"), plain)


def test_nothing_goes_backward_through_the_model(tmp_path, monkeypatch):
    made = make(SD)
    grads, seen = [], []
    made.pipe.unet.register_forward_pre_hook(lambda *_: grads.append(torch.is_grad_enabled()))
    plain = ZerothOrder.asked

    def asked(self, session, batch):
        loss = plain(self, session, batch)
        kinds = {type(x) for x in made.pipe.unet.modules()}
        seen.append(({QuantLinear, QuantConv2d} <= kinds, torch.nn.Conv2d in kinds))
        return loss

    monkeypatch.setattr(ZerothOrder, "asked", asked)
    learned(made, tmp_path)
    assert grads[-9:] == [False] * 9  # three steps of n + 1 forwards
    assert seen == [(True, False)] * 3  # all on grids
    assert not any(isinstance(x, (QuantLinear, QuantConv2d)) for x in made.pipe.unet.modules())


def test_the_step_is_adams_on_the_projected_estimate(tmp_path):
    """The row after one step, written out from the loss alone."""
    made = make(SD)
    calls = []
    plain = m.estimate

    def watched(loss, e, z, mu):
        g, here = plain(loss, e, z, mu)
        calls.append((e.clone(), z.clone(), g.clone()))
        return g, here

    from diffgraft_zoodip import fitter

    fitter.estimate, before = watched, fitter.estimate
    try:
        artefact = learned(made, tmp_path, steps=1, rate=0.1)
    finally:
        fitter.estimate = before
    [(e, z, g)] = calls
    g = g * m.shrink(len(z), len(e))
    assert torch.allclose(artefact.tensors["<zoodip>"][0], e - 0.1 * g / (g.abs() + 1e-3), atol=1e-6)  # Adam's first step


def test_together_and_one_by_one_are_the_same_to_rounding(tmp_path):
    rows = []
    for together in (False, True):
        folder = tmp_path / str(together)
        folder.mkdir()
        made = make(SD)
        rows.append(learned(made, folder, plan=FitPlan(2, 2), together=together, mu=0.1).tensors["<zoodip>"])
    assert torch.allclose(*rows, atol=1e-4)


def test_the_history_and_its_directions_survive_an_interruption(tmp_path):
    made = make(SD)
    whole = learned(made, tmp_path, plan=FitPlan(6, 1), tau=2, nu=0.3)
    folders = [tmp_path / name for name in ("other", "free")]
    for folder in folders:
        folder.mkdir()
    other, free = folders
    assert not torch.equal(learned(make(SD), free, plan=FitPlan(6, 1), tau=2, nu=0).tensors["<zoodip>"], whole.tensors["<zoodip>"])

    class Stop(Exception):
        pass

    def stop(what, done, total):
        if done == 3:
            raise Stop

    settings, plan = CallSettings(steps=2, height=64, width=64), FitPlan(6, 1, keep_every=0)
    with pytest.raises(Stop):
        fit(made.pipe, ZOODiP(), examples(), settings, other / "z.safetensors", plan, knobs={"tau": 2, "nu": 0.3}, on_progress=stop)
    again = fit(made.pipe, ZOODiP(), examples(), settings, other / "z.safetensors", plan, knobs={"tau": 2, "nu": 0.3})
    assert [*again.tensors] == [*whole.tensors] == ["<zoodip>"]
    assert torch.equal(again.tensors["<zoodip>"], whole.tensors["<zoodip>"])


def test_timesteps_are_those_of_the_part(tmp_path):
    made = make(SD)
    times = []
    made.pipe.unet.register_forward_pre_hook(lambda _, args, kwargs: times.append(args[1] if len(args) > 1 else None), with_kwargs=True)
    learned(made, tmp_path, steps=12, first=600, last=620)
    asked = [int(t) for t in times[-36:]]
    assert all(600 <= t <= 620 for t in asked)
    assert len(set(asked)) > 5
    assert all(asked[i] == asked[i + 1] == asked[i + 2] for i in range(0, 36, 3))  # the same for the two losses of a difference


def test_the_row_stays_float32_beside_a_half_text_encoder(tmp_path):
    made = make(SD)
    made.pipe.to(torch.bfloat16)
    artefact = learned(made, tmp_path, initial="a")
    row = artefact.tensors["<zoodip>"]
    assert row.dtype == torch.float32
    assert not torch.equal(row, row.bfloat16().float())  # finer than the table's


# what must not happen -----------------------------------------------------------------------------------------------------------------


def test_no_prompt_with_the_word_is_said(tmp_path):
    made = make(SD)
    plain = picture(made.pipe, made)
    learned(made, tmp_path)
    pipe = load_pipeline(made.pipe, plugins=[("zoodip", {"artefact": tmp_path / "z.safetensors"})])
    assert np.array_equal(picture(pipe, made), plain)
    assert pipe.plugins.report().plugins["zoodip"].notes == ["inactive: no prompt holds '<zoodip>'"]
    assert said("a pineapple, an apple", "apple", "<z>") == "a pineapple, an <z>"
    assert said(["Apple", "x"], "apple", "<z>") == ["<z>", "x"]


@pytest.mark.parametrize(
    ("knobs", "why"),
    [
        ({"token": "two words"}, "token = 'two words'"),
        ({"initial": "red apple"}, r"initial = 'red apple' is \d tokens"),
        ({"first": 900, "last": 800}, "first = 900 is after last = 800"),
        ({"last": 1000}, "last = 1000: this model was trained with timesteps 0 to 999"),
        ({"bits": "w1a8"}, "write wXaY"),
        ({"token": "apple</w>"}, "the caption .* does not name"),
        ({"nu": 1.0}, "nu = 1"),
    ],
)
def test_knobs_of_the_fit_that_are_refused(knobs, why, tmp_path):
    made = make(SD)
    with pytest.raises(ConfigError, match=why):
        learned(made, tmp_path, **knobs)
    assert not list(tmp_path.iterdir())


def test_a_caption_that_is_cut_off_before_its_token_is_refused(tmp_path):
    made = make(SD)
    late = replace(examples()[0], prompt="a " * 100 + "<zoodip>")
    with pytest.raises(ConfigError, match=r"the caption 'a a .*<zoodip>' is cut off before '<zoodip>': 77 tokens are read"):
        learned(made, tmp_path, data=[examples()[0], late])
    with pytest.raises(ConfigError, match="is cut off before"):
        learned(made, tmp_path, data=examples()[1:], template="a " * 100 + "{}")
    assert not list(tmp_path.iterdir())


def test_files_of_others_and_known_tokens_are_refused(tmp_path):
    made = make(SD)
    artefact = learned(made, tmp_path)
    wide = Artefact(artefact.made_for, {"<zoodip>": torch.zeros(1, 5)}, artefact.facts)
    with pytest.raises(ArtefactMismatch, match=r"the row of '<zoodip>' has 5 numbers, this text encoder's have 32"):
        load_pipeline(made.pipe, plugins=[ZOODiP(artefact=wide)])
    other = Artefact(artefact.made_for, {"<other>": torch.zeros(1, 32)}, artefact.facts)
    with pytest.raises(ArtefactMismatch, match="holds no row of its token '<zoodip>'"):
        load_pipeline(made.pipe, plugins=[ZOODiP(artefact=other)])
    made.pipe.load_textual_inversion(str(tmp_path / "z.safetensors"))
    with pytest.raises(ConfigError, match="knows '<zoodip>' already"):
        load_pipeline(made.pipe, plugins=[ZOODiP(artefact=artefact)])


def test_a_model_that_takes_more_than_latents_is_refused(tmp_path):
    made = make(SD)
    made.pipe.unet.register_to_config(out_channels=3)  # so that, as of one that inpaints, the two numbers differ
    with pytest.raises(Unsupported, match=r"takes 4 channels and gives 3: .* no example says"):
        learned(made, tmp_path)
