"""The search: its loop, its fitnesses, what it keeps when it is interrupted, and the file in the end."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, Conflict, Effects, Need, Unsupported, load_pipeline
from diffgraft.cli import app
from diffgraft.installed.errors import RewardError
from diffgraft.lab.judging import verdicts_of
from diffgraft.methods.artefacts import MadeFor
from diffgraft.methods.findings import Finding
from diffgraft.methods.fitness import FEATURES, FrechetFitness, RewardFitness, TrajectoryFitness, make_outputs, read_pictures
from diffgraft.methods.inputs import CallSettings, Sample
from diffgraft.methods.named import find_callable
from diffgraft.methods.search import Plan, Searcher, search, search_call
from diffusers import EulerDiscreteScheduler
from PIL import Image
from probes import Everything, PluginConfig, Probe, generate, tiny, trace
from pydantic import Field
from typer.testing import CliRunner


class GainConfig(PluginConfig):
    gain: float = Field(1.0, description="what predictions are multiplied with")
    artefact: Any = Field(None, description="what a search found")


class GainSearchConfig(PluginConfig):
    spread: float = Field(0.5, gt=0, description="standard deviation of a mutation")


class GainSearcher(Searcher):
    """Genomes are the gain in hundredths."""

    Config = GainSearchConfig

    def prepare(self, probe):
        self.asked = probe.steps

    def first(self, rng, number, size):
        return 160 if number == 0 else self.draw(rng, 0)

    def draw(self, rng, epoch):
        return rng.randint(50, 200)

    def mutate(self, rng, parent, epoch):
        return max(1, parent + round(100 * rng.gauss(0, self.config.spread)))

    def cross(self, rng, one, other):
        return (one + other) // 2 if one != other else None

    def steps(self, genome):
        return self.asked

    def knobs(self, genome):
        return {"gain": genome / 100}


class Line(GainSearcher):
    def prepare(self, probe):
        pass


class Gain(Probe):
    """Multiplies predictions by a gain."""

    name = "gain"
    Config = GainConfig
    needs = (Need("search", "artefact", fits=frozenset({"scheduler", "steps", "guidance"})),)
    search = GainSearcher

    def denoise(self, call, next):
        artefact = call.given("artefact")
        return next(call) * (self.config.gain if artefact is None else artefact.genome / 100)


SMALL = Plan.of(5, epochs=3, seed=3)


@pytest.fixture(scope="module")
def pipe():
    made = tiny("StableDiffusionPipeline")[0]
    made.set_progress_bar_config(disable=True)
    return made


def sized(pipe: Any, **more: Any) -> CallSettings:
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return CallSettings(**{"steps": 2, "guidance_scale": 4.0, "height": side, "width": side, **more})


def samples(n: int = 2) -> list[Sample]:
    return [Sample(seed=i, prompt=f"picture {i}") for i in range(n)]


def found(pipe: Any, path: Any, **more: Any) -> Finding:
    fitness = more.pop("fitness", TrajectoryFitness(2))
    return search(pipe, Gain(), samples(), sized(pipe), path, fitness, **{"plan": SMALL, **more})


def test_a_bad_searcher_knob_is_refused(pipe, tmp_path):
    with pytest.raises(ConfigError, match=r"search of gain.*spread = 0"):
        found(pipe, tmp_path / "a.json", knobs={"spread": 0})


class Ranker(GainSearcher):
    ranks = True
    not_by = {"frechet": "it is not for gains"}  # noqa: RUF012


class Ranked(Gain):
    search = Ranker


def test_a_searcher_that_ranks_keeps_all_that_were_judged(pipe, tmp_path):
    made = search(pipe, Ranked(), samples(), sized(pipe), tmp_path / "a.json", TrajectoryFitness(2), plan=SMALL)
    ranking = made.facts["ranking"]
    losses = [loss for _, loss in ranking]
    assert len(ranking) == len({genome for genome, _ in ranking}) == made.facts["judged"]
    assert (ranking[0], losses) == ([made.genome, made.facts["fitness"]["loss"]], sorted(losses))
    assert made.facts["fitness"]["loss_of_start"] == dict(ranking)[160]
    assert Finding.load(tmp_path / "a.json", "gain").facts["ranking"] == ranking
    assert "ranking" not in found(pipe, tmp_path / "b.json").facts
    example = search_call(pipe, Ranked(), lambda: generate(pipe, {"prompt": "x", "num_inference_steps": 2}, output_type="latent"))
    assert example.facts["ranking"][0][0] == example.genome


def test_a_fitness_that_says_nothing_of_the_genomes_is_refused(pipe, tmp_path):
    fitness = FrechetFitness(lambda images: torch.zeros(len(images), 1))
    with pytest.raises(ConfigError, match="search of gain: fitness = 'frechet': it is not for gains"):
        search(pipe, Ranked(), samples(), sized(pipe), tmp_path / "a.json", fitness, plan=SMALL)


class Lister(GainSearcher):
    """Breeds nothing, and heeds no knob."""

    breeds = False
    own_noise = True

    def mutate(self, rng, parent, epoch):
        return None

    def cross(self, rng, one, other):
        return None

    def check(self, knobs):
        if knobs:
            raise ConfigError(f"not heeded: {', '.join(knobs)}")


class Listed(Gain):
    search = Lister


def test_a_searcher_of_other_noise_that_breeds_nothing(pipe, tmp_path):
    """The file says nothing of what was not used, and what would not be heeded is refused."""
    reward = RewardFitness(lambda images, prompts: [0.5] * len(images))

    def run(plugin: Any, asked: Any, fitness: Any) -> Finding:
        return search(pipe, plugin, asked, sized(pipe), tmp_path / "a.json", fitness, plan=Plan(2, 1, 0, 0, 1))

    with pytest.raises(ConfigError, match="not heeded: gain"):
        run(Listed(gain=1.5), samples(), reward)
    with pytest.raises(ConfigError, match="'picture 0' is asked for more than once"):
        run(Listed(), samples(1) * 2, reward)
    with pytest.raises(ConfigError, match=r"without reference pictures compares with the pipeline's own.*give --reference FOLDER"):
        run(Listed(), samples(), FrechetFitness(lambda images: torch.zeros(len(images), 1)))
    assert not list(tmp_path.iterdir())
    made = run(Listed(), samples(), reward)
    assert made.facts["plan"] == {"population": 2, "epochs": 1}
    assert "seeds" not in made.facts["prompts"]


def test_search_use_and_leave_no_trace(pipe, tmp_path):
    settings = sized(pipe)
    kwargs = {"prompt": "x", "num_inference_steps": 2, "guidance_scale": 4.0, "height": settings.height, "width": settings.width}
    plain = generate(pipe, kwargs, output_type="latent")
    before = trace(pipe)
    path, phases = tmp_path / "gain.json", []
    made = found(pipe, path, on_progress=lambda phase, done, total: phases.append((phase, done, total)))
    assert trace(pipe) == before
    assert not path.with_name("gain.json.partial").exists()
    assert phases[0] == ("reference", 2, 2)
    assert phases[-1] == ("search", made.facts["judged"], 15)
    fitness = made.facts["fitness"]
    assert 0 <= fitness["loss"] < fitness["loss_of_start"], "a gain of 1 is the reference itself, 1.6 is far off"
    assert (made.facts["guidance_scale"], made.made_for.steps, made.facts["prompts"]["seeds"]) == (4.0, 2, [0, 1])
    assert Finding.load(path, "gain") == Finding(made.made_for, {}, json.loads(json.dumps(made.facts)), str(path))
    load_pipeline(pipe, plugins=[Gain(artefact=path)])
    try:
        changed = generate(pipe, kwargs, output_type="latent")
        pipe.plugins.configure("gain", artefact=None, gain=made.genome / 100)
        assert torch.equal(generate(pipe, kwargs, output_type="latent"), changed)
        pipe.plugins.configure("gain", artefact=None, gain=1.0)
        assert torch.equal(generate(pipe, kwargs, output_type="latent"), plain)
    finally:
        pipe.plugins.clear()


class Stop(BaseException):
    """Comes from where Ctrl-C may come."""


def test_an_interrupted_search_goes_on_at_every_candidate_and_ends_alike(pipe, tmp_path, monkeypatch):
    whole = found(pipe, tmp_path / "whole.json")
    calls, stop = 0, -1

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise Stop
        return make_outputs(*args, **kwargs)

    monkeypatch.setattr("diffgraft.methods.search.make_outputs", counted)
    monkeypatch.setattr("diffgraft.methods.fitness.make_outputs", counted)
    path, total = tmp_path / "again.json", 0
    while True:  # every attempt makes the look, what was lost, and is stopped in its second candidate
        calls, stop = 0, 4 if total == 0 else 3
        try:
            again = found(pipe, path)
            break
        except Stop:
            total += 1
            assert not hasattr(pipe, "plugins"), "the pipeline is left as it was"
            assert len(list((tmp_path / "again.json.partial").glob("0*.json"))) == total
    assert total == whole.facts["judged"] - 1
    assert again.facts == whole.facts
    assert path.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_an_unfinished_search_of_something_else_is_refused(pipe, tmp_path):
    path = tmp_path / "gain.json"

    def broken(images, prompts):
        raise Stop

    with pytest.raises(Stop):
        found(pipe, path, fitness=RewardFitness(broken))
    with pytest.raises(ConfigError, match="unfinished search with another model, other plugins, knobs"):
        found(pipe, path)


def test_a_reward_that_is_no_number_ends_the_search_and_keeps_what_was_judged(pipe, tmp_path):
    given = iter([0.5, 0.25, math.nan])

    def fickle(images, prompts):
        value = next(given)
        return [value] * len(images)

    with pytest.raises(RewardError, match=r"fickle.*nan"):
        found(pipe, tmp_path / "gain.json", fitness=RewardFitness(fickle))
    assert not hasattr(pipe, "plugins")
    records = sorted((tmp_path / "gain.json.partial").glob("0*.json"))
    assert [json.loads(p.read_text())["loss"] for p in records] == [-0.5, -0.25]


def test_refusals_before_anything_is_made(pipe, tmp_path):
    fitness, path = TrajectoryFitness(), tmp_path / "a.json"
    with pytest.raises(Unsupported, match="cannot be searched for settings"):
        search(pipe, Everything(), samples(), sized(pipe), path, fitness)
    with pytest.raises(Unsupported, match="cannot be searched for settings"):
        search_call(pipe, Everything(), lambda: None)
    with pytest.raises(ConfigError, match="--prompts and --steps"):
        search(pipe, Gain(), [], sized(pipe), path, fitness)
    with pytest.raises(ConfigError, match="--prompts and --steps"):
        search(pipe, Gain(), samples(), sized(pipe, steps=None), path, fitness)
    load_pipeline(pipe, plugins=[Everything])
    with pytest.raises(Conflict, match="unload"):
        found(pipe, path)
    pipe.plugins.clear()
    assert not list(tmp_path.iterdir())


class Solver(Probe):
    """Brings a scheduler of its own."""

    name = "solver"
    scheduler = EulerDiscreteScheduler
    effects = Effects(replaces=frozenset({"scheduler"}))

    def make_scheduler(self, old, family):
        return EulerDiscreteScheduler.from_config(old.config)


def test_what_is_found_beside_a_solver_fits_it_alone(pipe, tmp_path):
    settings = sized(pipe)
    kwargs = {"prompt": "x", "num_inference_steps": 2, "guidance_scale": 4.0, "height": settings.height, "width": settings.width}
    path, trace_before = tmp_path / "gain.json", trace(pipe)
    alone = found(pipe, tmp_path / "alone.json")
    beside = found(pipe, path, beside=[Solver()])
    assert trace(pipe) == trace_before
    assert (beside.made_for.scheduler, alone.made_for.scheduler) == ("EulerDiscreteScheduler", "DDIMScheduler")
    assert (beside.facts["beside"], alone.facts["beside"]) == ({"solver": {}}, {})
    assert beside.facts["fitness"]["loss_of_start"] != alone.facts["fitness"]["loss_of_start"]  # the candidates ran with it
    generate(load_pipeline(pipe, plugins=[Gain(artefact=path), Solver()]), kwargs, output_type="latent")
    pipe.plugins.remove("solver")
    with pytest.raises(ArtefactMismatch, match="scheduler: made for EulerDiscreteScheduler, found DDIMScheduler"):
        generate(pipe, kwargs)
    pipe.plugins.clear()


def test_a_search_beside_what_does_not_fit_is_refused(pipe, tmp_path):
    class Other(Solver):
        name = "other"

    with pytest.raises(Conflict, match="solver and other both replace the scheduler"):
        found(pipe, tmp_path / "a.json", beside=[Solver(), Other()])
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused(pipe, tmp_path):
    settings = sized(pipe)
    kwargs = {"prompt": "x", "num_inference_steps": 2, "guidance_scale": 4.0, "height": settings.height, "width": settings.width}
    found(pipe, tmp_path / "gain.json", plan=Plan(1, 1, 0, 0, 1))
    load_pipeline(pipe, plugins=[Gain(artefact=tmp_path / "gain.json")])
    scheduler = pipe.scheduler
    try:
        with pytest.raises(ArtefactMismatch, match=r"guidance scale: made for 4.0, found 5.0; make one with `diffgraft evolve gain"):
            generate(pipe, {**kwargs, "guidance_scale": 5.0})
        with pytest.raises(ArtefactMismatch, match="steps: made for 2, found 3"):
            generate(pipe, {**kwargs, "num_inference_steps": 3})
        pipe.scheduler = EulerDiscreteScheduler.from_config(scheduler.config)
        with pytest.raises(ArtefactMismatch, match="scheduler: made for DDIMScheduler, found EulerDiscreteScheduler"):
            generate(pipe, kwargs)
    finally:
        pipe.scheduler = scheduler
        pipe.plugins.clear()
    other = tiny("StableDiffusionPipeline")[0]
    with torch.no_grad():
        for p in other.unet.parameters():
            p.mul_(1.5)
    with pytest.raises(ArtefactMismatch, match="with other weights"):
        load_pipeline(other, plugins=[Gain(artefact=tmp_path / "gain.json")])


def test_damaged_and_foreign_files_are_refused(pipe, tmp_path):
    made_for = MadeFor("gain", "P", {}, "S", {}, 2, (1,))
    path = tmp_path / "f.json"
    Finding(made_for, {}, {"genome": 120, "guidance_scale": None}).save(path)
    assert Finding.load(path, "gain").genome == 120
    with pytest.raises(ArtefactMismatch, match="made for the plugin 'gain', not for 'other'"):
        Finding.load(path, "other")
    path.write_text(path.read_text().replace("120", "121"))
    with pytest.raises(ArtefactMismatch, match="checksum is wrong; make one with `diffgraft evolve gain"):
        Finding.load(path, "gain")
    for text, why in (("[1, 2]", r"has layout \[1, 2\]"), ("{", "cannot be read as JSON")):
        path.write_text(text)
        with pytest.raises(ArtefactMismatch, match=why):
            Finding.load(path, "gain")
    with pytest.raises(ConfigError, match="no such file; make one with `diffgraft evolve gain"):
        Finding.load(tmp_path / "none.json", "gain")


def test_trajectory_is_zero_for_the_reference_itself(pipe, tmp_path):
    fitness, settings = TrajectoryFitness(3), sized(pipe, steps=3)
    fitness.prepare(pipe, samples(3), settings, 2, tmp_path, None)
    assert fitness.loss(make_outputs(pipe, samples(3), settings, 2, True), []) == 0
    other = fitness.loss(make_outputs(pipe, samples(3), sized(pipe, steps=2), 2, True), [])
    assert other > 0
    again = TrajectoryFitness(3)
    again.prepare(None, [], settings, 2, tmp_path, None)  # read back: no pipeline is needed
    assert torch.equal(again.reference, fitness.reference)
    (tmp_path / "reference.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match="cannot be read"):
        again.prepare(None, [], settings, 2, tmp_path, None)


def mean_colours(images):
    return torch.tensor([[sum(band.getdata()) / band.size[0] / band.size[1] for band in image.split()] for image in images])


def pictures(*levels: int) -> list[Image.Image]:
    return [Image.new("RGB", (4, 4), (level, 0, 0)) for level in levels]


def test_frechet_fitness(pipe, tmp_path):
    fitness = FrechetFitness(mean_colours, pictures(10, 20, 30))
    fitness.prepare(None, samples(2), CallSettings(), 2, tmp_path, None)
    assert fitness.loss(pictures(10, 20, 30), []) == pytest.approx(0)
    assert fitness.loss(pictures(40, 50, 60), []) == pytest.approx(900)
    assert fitness.describe() != FrechetFitness(mean_colours, pictures(10, 20, 31)).describe()
    own = FrechetFitness(mean_colours, reference_steps=2)
    (tmp_path / "own").mkdir()
    own.prepare(pipe, samples(2), sized(pipe), 2, tmp_path / "own", None)
    assert own.loss(make_outputs(pipe, samples(2), sized(pipe), 2, False), []) == pytest.approx(0)
    with pytest.raises(ConfigError, match="at least two"):
        own.prepare(pipe, samples(1), sized(pipe), 2, tmp_path / "own", None)
    with pytest.raises(RewardError, match="a row each"):
        FrechetFitness(lambda images: torch.zeros(1, 3)).of(pictures(1, 2))
    with pytest.raises(RewardError, match=r"gave .*a row for each picture"):
        FrechetFitness(lambda images: None).of(pictures(1, 2))
    with pytest.raises(ConfigError, match=r"features = <lambda>\(images, prompts\): it is called with \(images\)"):
        FrechetFitness(lambda images, prompts: images)
    with pytest.raises(RewardError, match="not finite"):
        FrechetFitness(lambda images: torch.full((2, 3), math.nan)).of(pictures(1, 2))


def test_features_and_pictures_are_found_or_refused(tmp_path):
    assert find_callable("features", mean_colours, FEATURES, "features", ("images",)) == ("mean_colours", mean_colours)
    assert find_callable("features", "math:fsum", FEATURES, "features", ("images",)) == ("math:fsum", math.fsum)
    for bad in ("emoji", "math:no_such", "no_such_module:f", "math:pi"):
        with pytest.raises(ConfigError, match="features = "):
            find_callable("features", bad, FEATURES, "features", ("images",))
    with pytest.raises(ConfigError, match="no picture there"):
        read_pictures(tmp_path)
    pictures(7)[0].save(tmp_path / "a.png")
    assert [p.getpixel((0, 0)) for p in read_pictures(tmp_path)] == [(7, 0, 0)]


def test_search_call_gives_an_example(pipe):
    settings = sized(pipe)
    size = {"height": settings.height, "width": settings.width}
    got = search_call(pipe, Gain(), lambda: pipe("x", num_inference_steps=2, guidance_scale=3.0, **size))
    assert got.genome == Line().draw(random.Random(0), 0)
    assert (got.made_for.steps, got.facts["guidance_scale"]) == (2, 3.0)


def test_the_command_refuses_what_it_cannot_do():
    run = CliRunner().invoke
    base = ["evolve", "autodiffusion", "--pipeline", "emoji-sd"]
    for more, why in [
        ([], "nothing to judge the candidates on: give --prompts FILE"),
        (["--prompt", "x", "--class-label", "y"], "the one or the other"),
        (["--prompt", "x"], "--steps K"),
        (["--prompt", "x", "--steps", "2", "--out", "a.safetensors"], "end in .json"),
        (["--prompt", "x", "--steps", "2", "--fitness", "trajectry"], "did you mean 'trajectory'"),
        (["--prompt", "x", "--steps", "2", "--fitness", "reward"], "--reward NAME"),
        (["--prompt", "x", "--steps", "2", "--mutations", "60"], "mutations = 60"),
        (["evolve", "deepcache", "--pipeline", "no/such"], "cannot be searched for settings; installed plugins that can: autodiffusion"),
    ]:
        done = run(app, more if more[:1] == ["evolve"] else base + more)
        assert done.exit_code == 2, done.output
        assert why in " ".join(done.output.split()), done.output


@pytest.mark.parametrize("answer", [True, [True, False], {"object": True}, {"object": [True]}, {"object": [True, False], "place": [True]}])
def test_a_judge_that_gives_no_verdicts(answer):
    class Mistaken:
        def score(self, images, prompts):
            return answer

    with pytest.raises(RewardError, match=r"judge Mistaken gave .*: score\(images, prompts\) must give .* for each of the 2 pictures"):
        verdicts_of(Mistaken(), ["one", "two"], ["a", "b"])
