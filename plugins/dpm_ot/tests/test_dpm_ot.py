"""DPM-OT: the semi-discrete map against quantiles, a linear program and plain loops, its fit, where runs begin, and the contract."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, Unsupported, load_pipeline, unload
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.examples import Example
from diffgraft.methods.fitting import FitPlan, fit, fit_call
from diffgraft.methods.inputs import CallSettings
from diffgraft.testing import Case, contract_sample
from diffgraft.testing.watch import FirstLatents
from diffgraft_dpm_ot import DpmOt, __version__
from diffgraft_dpm_ot import method as m
from diffgraft_dpm_ot.fitter import MapFitter, mark_of
from diffgraft_dpm_ot.knobs import ANY
from diffgraft_pipelines.tiny import make
from diffusers import DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, PNDMScheduler
from PIL import Image
from torch.distributions import Normal

CASES = contract_sample("dpm_ot", __version__)
"""Each check once and each family once; which meet changes with the version. All of them: ``diffgraft check``, or ``contract_cases``."""
STEPS, START = 8, 700.0
NAMES = ("DDPMPipeline", "DDIMPipeline", "DiTPipeline")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case) -> None:
    case.run()


# helpers ------------------------------------------------------------------------------------------------------------------------------


def pictures(number, labels=None, side=64):
    """Pictures of noise, with classes in turn."""
    rng = np.random.default_rng(0)
    made = [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(number)]
    return [Example(None, each, None if labels is None else labels[i % len(labels)]) for i, each in enumerate(made)]


def tiny(name="DDIMPipeline", labels=(1,), scheduler=None):
    made = make(name)
    made.pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        made.pipe.scheduler = scheduler.from_config(made.pipe.scheduler.config)
    made.kwargs["num_inference_steps"] = STEPS
    if name == "DiTPipeline":
        made.kwargs["class_labels"] = list(labels)
    return made


def example(made, J=6, labels=None, seed=0, **knobs) -> Artefact:
    """A map of random targets and heights."""
    found = fit_call(made.pipe, DpmOt(start=START, **knobs), lambda pipe: pipe(**made.kwargs))
    generator = torch.Generator().manual_seed(seed)
    shape = found.tensors["targets"].shape[1:]
    tensors = {
        "targets": torch.randn(J, *shape, generator=generator),
        "heights": torch.randn(J, generator=generator),
        "unit": torch.tensor(30.0),
        "labels": torch.full((J,), ANY) if labels is None else torch.tensor(labels),
        "pictures": torch.arange(J),
        "filled": torch.tensor(J),
    }
    return replace(found, tensors=tensors, facts={**found.facts, "off": 0.0})


def run(made, artefact=None, seeds=(0,), start=START, **knobs):
    """(the result, the latents it began with); of the plugin nothing is left."""
    size = {} if "DiT" in type(made.pipe).__name__ else {"batch_size": len(seeds)}
    load_pipeline(made.pipe, plugins=[DpmOt(artefact=artefact, start=start, **knobs), FirstLatents])
    try:
        out = made.pipe(**{**made.kwargs, **size, "generator": [torch.Generator().manual_seed(seed) for seed in seeds]})
        report = made.pipe.plugins.report()
    finally:
        unload(made.pipe)
    return np.asarray(out.images), FirstLatents.seen[0], report


def drawn(seeds, shape):
    """Unit noise [seeds, d]."""
    return torch.cat([torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]).flatten(1)


def descend(y, cells, steps=1500, n=2000, rate=0.05, seed=0):
    """h by Adam on E, without the core's loop."""
    generator, h = torch.Generator().manual_seed(seed), torch.zeros(len(y), requires_grad=True)
    adam = torch.optim.Adam([h], lr=rate)
    for step in range(steps):
        adam.param_groups[0]["lr"] = rate * (1 - step / steps) + rate / 100
        u = m.values(torch.randn(n, y.shape[1], generator=generator), y, h)
        adam.zero_grad()
        m.energy(u, h, cells).backward()
        adam.step()
    return h.detach()


def one(J):
    return torch.zeros(J, dtype=torch.long)


# the map ------------------------------------------------------------------------------------------------------------------------------


def test_a_cell_is_the_nearest_target_by_power_distance():
    x, y, h = torch.randn(200, 5).double(), torch.randn(7, 5).double(), torch.randn(7).double()
    w = y.square().sum(1) + 2 * h
    power = (x[:, None] - y).square().sum(2) - w
    assert m.cell_of(m.values(x, y, h)).equal(power.argmin(1))


def test_the_energys_gradient_is_the_histogram_less_nu_in_each_class():
    x, y, cells = torch.randn(500, 4), torch.randn(9, 4), torch.tensor([0, 1, 0, 2, 2, 1, 0, 0, 2])
    h = torch.randn(9, requires_grad=True)
    m.energy(m.values(x, y, h), h, cells).backward()
    counts = torch.zeros(9)
    for each in x:  # a plain loop
        for c in range(3):
            members = [j for j in range(9) if cells[j] == c]
            counts[max(members, key=lambda j: float(each @ y[j] + h[j]))] += 1
    torch.testing.assert_close(h.grad, counts / 500 - m.nu(cells))
    assert m.histogram(m.values(x, y, h), cells).equal(counts.long())
    torch.testing.assert_close(m.nu(cells), torch.tensor([1 / 4, 1 / 2, 1 / 4, 1 / 3, 1 / 3, 1 / 2, 1 / 4, 1 / 4, 1 / 3]))


def test_the_energy_is_that_of_the_definition_and_convex():
    x, y, cells = torch.randn(300, 3).double(), torch.randn(5, 3).double(), one(5)

    def value(h):
        u = m.values(x, y, h)
        assert m.energy(u, h, cells).isclose(u.max(1).values.mean() - h.mean())
        return m.energy(u, h, cells)

    a, b = torch.randn(5).double(), torch.randn(5).double()
    assert value((a + b) / 2) <= (value(a) + value(b)) / 2
    assert value(a).isclose(value(a + 3)), "heights matter up to a constant"


def test_in_one_dimension_it_is_the_quantile_map():
    """Cells of y_(1) < ... < y_(J) end at Phi^-1(j / J): there h_(j+1) - h_(j) = -Phi^-1(j / J) (y_(j+1) - y_(j))."""
    y, J = torch.tensor([[0.3], [-1.2], [2.5], [0.9], [-0.4]]), 5
    order = y[:, 0].argsort()
    ends = Normal(0.0, 1.0).icdf(torch.arange(1, J) / J)
    sorted_h = torch.cat([torch.zeros(1), (-ends * y[order, 0].diff()).cumsum(0)])
    exact = torch.zeros(J).index_put((order,), sorted_h)
    x = torch.linspace(-3, 3, 2001)[:, None]
    quantile = order[(Normal(0.0, 1.0).cdf(x[:, 0]) * J).long().clamp(max=J - 1)]
    assert m.cell_of(m.values(x, y, exact)).equal(quantile)
    found = descend(y, one(J))
    torch.testing.assert_close(found - found.mean(), exact - exact.mean(), atol=0.03, rtol=0)
    assert (m.cell_of(m.values(x, y, found)) != quantile).float().mean() < 0.02


def test_fitted_cells_have_equal_measures_within_chance_and_nearest_neighbours_have_not():
    """What may not be called optimal transport: the nearest target, by plain distance or by <x, y>."""
    generator = torch.Generator().manual_seed(0)
    y, J, n = 1.5 * torch.randn(16, 3, generator=generator) + torch.tensor([1.0, 0, 0]), 16, 60000
    h, fresh = descend(y, one(J)), torch.randn(n, 3, generator=generator)
    off = m.off_by(m.histogram(m.values(fresh, y, h), one(J)), one(J))
    assert off < 0.02 + m.chance(n, one(J))
    nearest = torch.bincount(torch.cdist(fresh, y).argmin(1), minlength=J)
    assert m.off_by(nearest, one(J)) > 0.3
    assert m.off_by(m.histogram(m.values(fresh, y, torch.zeros(J)), one(J)), one(J)) > 0.3


def test_chance_is_what_exact_cells_are_off_by():
    J, n = 10, 500
    draws = [torch.bincount(torch.randint(J, (n,), generator=torch.Generator().manual_seed(i)), minlength=J) for i in range(200)]
    assert abs(np.mean([m.off_by(each, one(J)) for each in draws]) / m.chance(n, one(J)) - 1) < 0.05


def test_it_costs_what_a_linear_program_says():
    """POT's exact plan between as many samples and the targets: the same duals, the same cost, the same cells but for those at a wall."""
    ot = pytest.importorskip("ot")
    generator = torch.Generator().manual_seed(1)
    y, n, J = 1.5 * torch.randn(8, 2, generator=generator), 4000, 8
    x = torch.randn(n, 2, generator=generator)
    h = descend(y, one(J))
    j = m.cell_of(m.values(x, y, h))
    cost = (x[:, None] - y).square().sum(2).double().numpy()
    plan, log = ot.emd(np.full(n, 1 / n), np.full(J, 1 / J), cost, log=True, numItermax=10**7)
    assert (plan.argmax(1) != j.numpy()).mean() < 0.03
    assert abs(cost[np.arange(n), j].mean() / (plan * cost).sum() - 1) < 0.03
    duals = torch.from_numpy(log["v"]).float()  # <x, y> + h: |x - y|^2 - v falls as -2 (<x, y> - |y|^2 / 2 + v / 2)
    exact = (duals - y.square().sum(1)) / 2
    torch.testing.assert_close(h - h.mean(), exact - exact.mean(), atol=0.1, rtol=0)


def test_the_officials_loop_finds_the_same_heights():
    """Histogram by targets' batches, Adam without its bias correction, mean of h taken off: written anew, from normal samples."""
    generator = torch.Generator().manual_seed(2)
    y, J, n = torch.randn(6, 3, generator=generator), 6, 2000
    h, first, second = torch.zeros(J), torch.zeros(J), torch.zeros(J)
    for step in range(1500):
        x = torch.randn(n, 3, generator=generator)
        best, which = torch.full((n,), -1e30), torch.zeros(n, dtype=torch.long)
        for begin in (0, 3):
            value, place = (y[begin : begin + 3] @ x.T + h[begin : begin + 3, None]).max(0)
            which, best = torch.where(value > best, place + begin, which), torch.maximum(value, best)
        g = torch.bincount(which, minlength=J) / n - 1 / J
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        h = h - 0.05 * (1 - step / 1500) * first / (second.sqrt() + 1e-8)
        h = h - h.mean()
    found = descend(y, one(J))
    torch.testing.assert_close(h, found - found.mean(), atol=0.05, rtol=0)


def test_one_target_is_a_constant_map():
    x, y = torch.randn(50, 4), torch.randn(1, 4)
    assert not m.cell_of(m.values(x, y, torch.randn(1))).any()
    assert m.off_by(m.histogram(m.values(x, y, torch.zeros(1)), one(1)), one(1)) == 0


def test_the_officials_source_is_uniform():
    noise = torch.randn(40000, 2, generator=torch.Generator().manual_seed(0))
    x = m.source_of(noise, "uniform")
    torch.testing.assert_close(x, Normal(0.0, 1.0).cdf(noise))
    torch.testing.assert_close(x.quantile(torch.arange(1, 10) / 10), torch.arange(1, 10) / 10, atol=0.01, rtol=0)
    assert m.source_of(noise, "normal").equal(noise)


# where a run begins -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["normal", "uniform"])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_begins_with_the_image_of_its_noise_at_level_m(name, source):
    seeds = range(8)
    made = tiny(name, labels=[1] * len(seeds))
    artefact = example(made, source=source)
    _, x, report = run(made, artefact, seeds, source=source)
    y, h = artefact.tensors["targets"], artefact.tensors["heights"]
    noise = m.source_of(drawn(seeds, y.shape[1:]), source)
    j = (noise @ y.flatten(1).T + 30 * h).argmax(1)
    assert x.equal(y[j])
    assert len(j.unique()) > 1
    made.pipe.scheduler.set_timesteps(STEPS)
    late = sum(t <= START for t in made.pipe.scheduler.timesteps.tolist())
    assert report.steps == late < STEPS
    assert set(report.forwards.values()) == {late}, "the map costs none"
    assert "noised training pictures" in str(report)


def test_under_euler_the_noise_has_unit_scale():
    made = tiny("DiTPipeline", labels=[1, 1], scheduler=EulerDiscreteScheduler)
    artefact = example(made)
    y = artefact.tensors["targets"]
    j = (drawn((3, 4), y.shape[1:]) @ y.flatten(1).T + 30 * artefact.tensors["heights"]).argmax(1)
    assert run(made, artefact, (3, 4))[1].equal(y[j])


def test_each_class_has_its_own_targets():
    made = tiny("DiTPipeline", labels=[5, 2, 5, 2, 2, 5])
    artefact = example(made, J=8, labels=[2, 5, 5, 2, 5, 2, 7, 2])
    x = run(made, artefact, range(6))[1]
    which = [int((artefact.tensors["targets"] == each).flatten(1).all(1).nonzero()) for each in x]
    assert artefact.tensors["labels"][which].tolist() == [5, 2, 5, 2, 2, 5]
    with pytest.raises(Unsupported, match=r"no target of class 3, only of \[2, 5, 7\]"):
        run(tiny("DiTPipeline", labels=[2, 3]), artefact, (0, 1))


@pytest.mark.parametrize("name", NAMES)
def test_at_t_without_a_map_and_off_with_one_it_is_the_plain_pipeline_bit_for_bit(name):
    made = tiny(name)
    plain = np.asarray(made.pipe(**{**made.kwargs, "generator": [torch.Generator().manual_seed(0)]}).images)
    for artefact, start in ((None, 1000.0), (example(made), None)):
        found, _, report = run(made, artefact, start=start)
        assert np.array_equal(found, plain)
        assert "inactive" in str(report)


def test_of_one_target_all_runs_begin_alike_and_a_sampler_without_noise_ends_alike():
    made = tiny("DDIMPipeline")
    out, x, _ = run(made, example(made, J=1), range(3))
    assert x[0].equal(x[1])
    assert np.abs(out - out[0]).max() < 1e-4


def test_a_sample_in_a_batch_is_the_sample_alone():
    made = tiny()
    artefact = example(made)
    together = run(made, artefact, (0, 1, 2))[1]
    for i in range(3):
        assert run(made, artefact, (i,))[1][0].equal(together[i])


# the fit ------------------------------------------------------------------------------------------------------------------------------


def learned(tmp_path, name="DDIMPipeline", J=6, labels=None, steps=60, batch=4, examples=None, plugin=None, **knobs):
    made = tiny(name)
    examples = pictures(J, labels) if examples is None else examples
    settings = CallSettings(steps=STEPS)
    plan = FitPlan(steps=steps, batch=batch)
    out = tmp_path / "map.safetensors"
    return made, fit(made.pipe, plugin or DpmOt(start=START), examples, settings, out, plan, knobs={"targets": J, "samples": 400, **knobs})


@pytest.mark.parametrize(("name", "labels"), [("DDPMPipeline", None), ("DiTPipeline", (2, 5))])
def test_targets_are_training_pictures_noised_to_the_level_and_cells_are_equal(tmp_path, name, labels):
    from diffgraft import find_family
    from diffgraft.methods.decoding import to_latents
    from diffgraft.methods.examples import pixels_of
    from diffgraft.methods.variants import own_size

    made, found = learned(tmp_path, name, J=8, labels=labels, steps=100)
    pipe, examples = made.pipe, pictures(8, labels)
    pixels = pixels_of(examples, *own_size(pipe))
    with torch.no_grad():
        z0 = to_latents(pipe, find_family(type(pipe)), pixels)
    y, marks = found.tensors["targets"], [mark_of(each) for each in pixels]
    rows = [marks.index(mark) for mark in found.tensors["pictures"].tolist()]
    assert sorted(rows) == list(range(8))
    assert [examples[row].class_label for row in rows] == ([None] * 8 if labels is None else found.tensors["labels"].tolist())
    abar = pipe.scheduler.alphas_cumprod[int(found.facts["timestep"])]
    noise = (y - abar.sqrt() * z0[rows]) / (1 - abar).sqrt()
    assert abs(float(noise.mean())) < 4 / noise.numel() ** 0.5
    assert abs(float(noise.std()) - 1) < 4 / noise.numel() ** 0.5
    assert found.facts["off"] < found.facts["chance"] + 0.03
    assert found.facts["empty"] == 0
    groups = [y[found.tensors["labels"] == each] for each in found.tensors["labels"].unique()]
    spread = torch.cat([(each - each.mean(0)).flatten(1) for each in groups]).square().sum(1).mean().sqrt()
    torch.testing.assert_close(found.tensors["unit"], spread)
    made.kwargs.update({} if labels is None else {"class_labels": [labels[0]]})
    begun = run(made, str(tmp_path / "map.safetensors"))[1]
    assert bool((y == begun).flatten(1).all(1).any())


def test_an_interrupted_fit_ends_where_the_whole_one_does(tmp_path):
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    _, whole = learned(tmp_path / "whole", steps=12)

    class Stop(Exception):
        pass

    def stop(_, done, __):
        if done == stop.at:
            raise Stop

    for at in (1, 5):  # while pictures are read, and after
        stop.at = at
        with pytest.raises(Stop):
            fit(tiny().pipe, DpmOt(start=START), pictures(6), CallSettings(steps=STEPS), tmp_path / "parts/map.safetensors",
                FitPlan(steps=12, batch=4, keep_every=0), knobs={"targets": 6, "samples": 400}, on_progress=stop)  # fmt: skip
    made = fit(tiny().pipe, DpmOt(start=START), pictures(6), CallSettings(steps=STEPS), tmp_path / "parts/map.safetensors",
               FitPlan(steps=12, batch=4, keep_every=0), knobs={"targets": 6, "samples": 400})  # fmt: skip
    for key, value in whole.tensors.items():
        assert made.tensors[key].equal(value), key


def test_a_fit_needs_as_many_different_pictures_as_targets_and_steps_to_read_them(tmp_path):
    twice = pictures(3) + pictures(3)
    with pytest.raises(ConfigError, match=r"targets = 6, and only 3 of the pictures are different.*--set targets=3"):
        learned(tmp_path, J=6, examples=twice, batch=3)
    with pytest.raises(ConfigError, match=r"read 4 of 6 pictures.*--steps"):
        learned(tmp_path, J=6, steps=1, batch=4)
    with pytest.raises(ConfigError, match=r"read 6 of 6 pictures, and fit nothing"):
        learned(tmp_path, J=6, steps=2, batch=3)
    assert not list(tmp_path.iterdir()), "the way out that they name leads to no unfinished fit"
    found = learned(tmp_path, J=3, examples=twice, batch=1, steps=20)[1]
    assert len(found.tensors["pictures"].unique()) == 3
    made = tiny("DiTPipeline")
    with pytest.raises(ConfigError, match="class"):
        fit(made.pipe, DpmOt(start=START), pictures(4), CallSettings(steps=STEPS), tmp_path / "dit.safetensors", FitPlan(steps=1))


def test_a_level_that_no_step_has_and_none_are_refused():
    made = tiny()
    made.pipe.scheduler = DDIMScheduler(timestep_spacing="trailing")  # ends at 124
    for start, words in (
        (50.0, "start = 50: none of the 8 timesteps of a run is that low"),
        (1001.0, "start = 1001.*1000 timesteps"),
        (None, "start = None is off"),
    ):
        with pytest.raises(ConfigError, match=words):
            fit_call(made.pipe, DpmOt(start=start), lambda pipe: pipe(**made.kwargs))


@pytest.mark.parametrize(
    ("scheduler", "words"), [(PNDMScheduler, "follows no schedule but its own"), (EDMEulerScheduler, "counts levels by sigma")]
)
def test_schedulers_without_timesteps_to_begin_at_are_refused_in_fits_and_runs(scheduler, words):
    made = tiny("DiTPipeline")
    artefact = example(made)
    made.pipe.scheduler = scheduler.from_config(made.pipe.scheduler.config)
    with pytest.raises(Unsupported, match=f"{scheduler.__name__} {words}.*DDIM, DDPM, DPM\\+\\+ or UniPC"):
        fit_call(made.pipe, DpmOt(start=START), lambda pipe: pipe(**made.kwargs))
    with pytest.raises(Unsupported, match=words):
        load_pipeline(made.pipe, plugins=[DpmOt(artefact=artefact, start=START)])


def test_a_map_is_judged_by_its_worst_class():
    """Two cells of one class are 0.3 off, another class has one; chance is that of the class with more targets."""
    cells = torch.tensor([0, 1, 1])
    assert m.off_by(torch.tensor([1000, 800, 200]), cells) == pytest.approx(0.3)
    assert m.chance(1000, cells) == pytest.approx(m.chance(1000, one(2)))


# bad input ----------------------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_before_the_pipeline_is_touched():
    made = tiny()
    artefact = example(made)
    for knobs, error, words in (
        ({"start": 1001.0, "artefact": artefact}, ConfigError, r"start = 1001.*1000 timesteps"),
        ({"start": 500.0, "artefact": artefact}, ArtefactMismatch, r"fitted with start = 700.*start = 500"),
        ({"start": START, "artefact": artefact, "source": "uniform"}, ArtefactMismatch, r"source = normal.*source = uniform"),
    ):
        with pytest.raises(error, match=words):
            load_pipeline(made.pipe, plugins=[DpmOt(**knobs)])
        assert not hasattr(made.pipe, "plugins")
    tensors = {**artefact.tensors, "labels": torch.tensor([1, ANY, 1, 1, 1, 1])}
    with pytest.raises(ArtefactMismatch, match="any class"):
        load_pipeline(made.pipe, plugins=[DpmOt(artefact=replace(artefact, tensors=tensors), start=START)])
    with pytest.raises(ConfigError, match="start"):
        DpmOt(start=0)


def test_a_late_start_without_a_map_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match=r"start = 500 and artefact = None.*diffgraft fit dpm_ot.*start = None"):
        run(tiny(), None, start=500.0)


def test_another_number_of_steps_has_another_level():
    made = tiny()
    artefact = example(made)
    made.kwargs["num_inference_steps"] = 11
    with pytest.raises(ArtefactMismatch, match=r"this run would begin at .*num_inference_steps=8"):
        run(made, artefact)


def test_a_map_that_is_not_fitted_is_said_to_be_so():
    made = tiny()
    artefact = example(made)
    bad = replace(artefact, facts={**artefact.facts, "off": 0.6, "empty": 2})
    assert "not fitted well: its cells are 0.60" in str(run(made, bad)[2])
    assert "not fitted well" not in str(run(made, artefact)[2])
    assert "not fitted well: its cells are 0.60" in MapFitter.told(bad.facts)
    assert MapFitter.told(artefact.facts) == "cells are 0.000 from equal measures (0.000 by chance alone), none is empty"


def test_the_report_counts_the_targets_of_the_classes_asked_for():
    artefact = example(tiny("DiTPipeline"), J=4, labels=[5, 2, 5, 5])
    for asked, words in (
        ([5, 5], "3 of them are in the map for class 5"),
        ([2], "1 of them are in the map for class 2"),
        ([5, 2], "4 of them are in the map for the 2 classes asked for, 1 for class 2"),
    ):
        assert words in str(run(tiny("DiTPipeline", labels=asked), artefact, range(len(asked)))[2])
