"""Golden seeds: a seed's noise is that of its own generator, rankings find what is planted, and what does not fit is refused."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any, ClassVar

import diffusers
import numpy as np
import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, Conflict, Effects, Paper, Plugin, RewardError, find_family, load_pipeline
from diffgraft.cli import app
from diffgraft.methods.conditioning import number_of_pictures
from diffgraft.methods.findings import Finding
from diffgraft.methods.fitness import Fitness, FrechetFitness, RewardFitness, TrajectoryFitness
from diffgraft.methods.inputs import CallSettings, Sample
from diffgraft.methods.search import Plan, evolve, search
from diffgraft.testing import Case, contract_sample
from diffgraft_golden_seed import GoldenSeed, __version__
from diffgraft_golden_seed.method import border, chosen, colourfulness, default_k, generators, spread
from diffgraft_golden_seed.scores import borderless, colourful
from diffgraft_golden_seed.searcher import SeedSearcher
from diffgraft_pipelines.tiny import make
from PIL import Image
from typer.testing import CliRunner

CASES = contract_sample("golden_seed", __version__)
"""Each check once and each family once; which meet changes with the version. All of them: ``diffgraft check``, or ``contract_cases``."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case) -> None:
    case.run()


# helpers ------------------------------------------------------------------------------------------------------------------------------


class Watch(Plugin):
    """Innermost: keeps the latents that the first denoiser call of a run is given."""

    name = "watch"
    paper = Paper("none", "", "watches")
    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}
    effects = Effects(edits={"latents"})
    seen: ClassVar[list[torch.Tensor]] = []

    def denoise(self, call, next):
        if not self.seen:
            self.seen[:] = [call.latents.clone()]
        return next(call)


def tiny(name: str = "StableDiffusionPipeline", scheduler: str | None = None) -> tuple[Any, dict[str, Any]]:
    made = make(name)
    if scheduler is not None:
        made.pipe.scheduler = getattr(diffusers, scheduler).from_config(made.pipe.scheduler.config)
    made.pipe.set_progress_bar_config(disable=True)
    kwargs = {**made.kwargs, "num_inference_steps": 2}
    if name not in ("DiTPipeline", "DDPMPipeline"):
        kwargs["output_type"] = "latent"
    return made.pipe, kwargs


def out(pipe: Any, kwargs: dict[str, Any], **more: Any) -> torch.Tensor:
    found = pipe(**{**kwargs, **more})[0]
    return found if isinstance(found, torch.Tensor) else torch.as_tensor(np.stack([np.asarray(each) for each in found]))


def notes(pipe: Any) -> list[str]:
    return list(pipe.plugins.report().plugins["golden_seed"].notes)


def several(kwargs: dict[str, Any], n: int) -> dict[str, Any]:
    """The same asked for n times."""
    more: dict[str, Any] = {}
    for name in ("prompt", "negative_prompt"):
        if isinstance(kwargs.get(name), str):
            more[name] = [kwargs[name]] * n
    if "class_labels" in kwargs:
        more["class_labels"] = list(kwargs["class_labels"])[:1] * n
    if not more:
        more["batch_size"] = n
    return more


def begun(pipe: Any, kwargs: dict[str, Any], **more: Any) -> torch.Tensor:
    """The latents that a run begins with; the plugin is on ``pipe`` with a watch inside."""
    Watch.seen.clear()
    pipe(**{**kwargs, **more})
    return Watch.seen[0]


def ranked(pipe: Any, kwargs: dict[str, Any], seeds: list[int], steps: int = 2) -> Finding:
    """A ranking that was made for this call, of these seeds, best first."""
    from diffgraft.methods.search import search_call

    plain = {**kwargs, "num_inference_steps": steps}
    made = search_call(pipe, GoldenSeed(), lambda: pipe(**plain, generator=torch.Generator().manual_seed(0)))
    return replace(made, facts={**made.facts, "genome": seeds[0], "ranking": [[seed, float(i)] for i, seed in enumerate(seeds)]})


POOL = [11, 5, 7, 3, 2, 19, 23, 29]


# one seed is its generator --------------------------------------------------------------------------------------------------------------

FAMILIES = ["StableDiffusionPipeline", "FluxPipeline", "StableDiffusion3Pipeline", "DiTPipeline", "DDPMPipeline", "WanPipeline"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_single_seed_is_that_generator_bit_for_bit(name):
    pipe, kwargs = tiny(name)
    wanted = out(pipe, kwargs, generator=torch.Generator().manual_seed(17))
    load_pipeline(pipe, plugins={"golden_seed": {"seed": 17}})
    assert torch.equal(out(pipe, kwargs), wanted)
    assert torch.equal(out(pipe, kwargs, generator=torch.Generator().manual_seed(4)), wanted)
    pipe.plugins.clear()
    two = several(kwargs, 2)
    wanted = out(pipe, kwargs, **two, generator=[torch.Generator().manual_seed(17) for _ in range(2)])
    load_pipeline(pipe, plugins={"golden_seed": {"seed": 17}})
    assert torch.equal(out(pipe, kwargs, **two), wanted)


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_the_noise_of_stochastic_steps_goes_on_from_the_seed(scheduler):
    pipe, kwargs = tiny(scheduler=scheduler)
    wanted = out(pipe, kwargs, generator=torch.Generator().manual_seed(17))
    load_pipeline(pipe, plugins={"golden_seed": {"seed": 17}})
    assert torch.equal(out(pipe, kwargs), wanted)
    assert torch.equal(out(pipe, kwargs, generator=torch.Generator().manual_seed(1)), wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_neither_the_place_in_the_batch_nor_its_size_matters_to_a_seeds_noise(name):
    """The forbidden toy draws the noise of the whole batch at once: there it depends on both."""
    pipe, kwargs = tiny(name)
    found = ranked(pipe, kwargs, POOL)
    load_pipeline(pipe, plugins=[GoldenSeed(artefact=found, k=4), Watch])
    together = begun(pipe, kwargs, **several(kwargs, 4))
    assert len({row.sum().item() for row in together}) == 4, "every picture has another seed"
    pipe.plugins.configure("golden_seed", use="worst", k=8)
    backwards = begun(pipe, kwargs, **several(kwargs, 8))
    assert torch.equal(backwards[4:].flip(0), together), "places 7 to 4 of 8, against 0 to 3 of 4"
    for i, seed in enumerate(POOL[:4]):
        pipe.plugins.configure("golden_seed", artefact=None, seed=seed, use="best", k=None)
        assert torch.equal(begun(pipe, kwargs)[:1], together[i : i + 1])
        pipe.plugins.configure("golden_seed", artefact=found, seed=None, k=4)
    shape = together.shape
    if name == "StableDiffusionPipeline":
        assert torch.equal(together[2], torch.randn((1, *shape[1:]), generator=torch.Generator().manual_seed(POOL[2]))[0])
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(POOL[0]))
        assert not torch.equal(whole[1], together[1]), "the toy's second picture"


def test_noise_is_drawn_on_the_cpu_and_half_precision_only_rounds_it():
    assert {generator.device.type for generator in generators([1, 2])} == {"cpu"}
    shape = (1, 4, 8, 8)
    whole = torch.randn(shape, generator=generators([5])[0])
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(torch.randn(shape, generator=generators([5])[0], dtype=dtype), whole.to(dtype))
    pipe, kwargs = tiny()
    pipe.to(torch.bfloat16)
    load_pipeline(pipe, plugins=[GoldenSeed(seed=5), Watch])
    first = begun(pipe, kwargs)
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, torch.randn(first.shape, generator=generators([5])[0]).bfloat16())


def test_it_costs_no_forward():
    pipe, kwargs = tiny()
    load_pipeline(pipe, plugins=[GoldenSeed(seed=5)])
    out(pipe, kwargs, num_inference_steps=3)
    assert pipe.plugins.report().forwards == {"both": 3}


def test_pictures_of_a_call_are_counted_as_pipelines_count_them():
    def count(name: str, **arguments: Any) -> int:
        return number_of_pictures(arguments, find_family(getattr(diffusers, name)))

    assert count("StableDiffusionPipeline", prompt="a") == 1
    assert count("StableDiffusionPipeline", prompt=["a", "b"], num_images_per_prompt=3) == 6
    assert count("StableDiffusionPipeline", prompt_embeds=torch.zeros(2, 7, 8), num_images_per_prompt=None) == 2
    assert count("StableDiffusionImg2ImgPipeline", prompt="a", image=[1, 2]) == 1
    assert count("DiTPipeline", class_labels=[1, 2, 3]) == 3
    assert count("DDPMPipeline", batch_size=5) == 5
    assert count("DDPMPipeline") == 1
    assert count("StableVideoDiffusionPipeline", image=torch.zeros(2, 3, 8, 8), num_videos_per_prompt=2) == 4
    assert count("CogVideoXPipeline", prompt=["a", "b"], num_videos_per_prompt=2) == 2


@pytest.mark.parametrize("name", ["CogVideoXPipeline", "AnimateDiffPipeline"])
def test_pipelines_that_heed_no_number_of_videos(name):
    pipe, kwargs = tiny(name)
    load_pipeline(pipe, plugins=[GoldenSeed(seed=5), Watch])
    assert len(begun(pipe, kwargs, num_videos_per_prompt=2)) == 1


# which seeds, and who gets which ------------------------------------------------------------------------------------------------------


def test_the_ends_of_a_ranking():
    assert chosen(POOL, "best", 3) == (11, 5, 7)
    assert chosen(POOL, "worst", 3) == (29, 23, 19)
    assert chosen(POOL, "worst", 8) == tuple(reversed(POOL))
    assert chosen(POOL, "none") == ()
    assert [default_k(n) for n in (1, 19, 20, 1024)] == [1, 1, 2, 102]
    assert chosen(range(40), "best") == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="k = 9 of 8"):
        chosen(POOL, "best", 9)


def test_lots_are_drawn_without_repetition_and_every_seed_as_often():
    generator = torch.Generator().manual_seed(0)
    draws = [spread(POOL, 3, generator, by_lot=True) for _ in range(4000)]
    assert all(len(set(draw)) == 3 for draw in draws)
    counts = np.array([sum(seed in draw for draw in draws) for seed in POOL])
    expected = 4000 * 3 / 8
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # chi^2, 7 degrees of freedom: 0.001
    assert spread(POOL, 8) == POOL
    with pytest.raises(ValueError, match="9 pictures, 8 seeds"):
        spread(POOL, 9)


def test_what_the_calls_generator_means():
    """By rank nothing; by lot it draws them, and goes on, so that the next call of the same generator draws anew."""
    pipe, kwargs = tiny()
    found = ranked(pipe, kwargs, POOL)
    load_pipeline(pipe, plugins=[GoldenSeed(artefact=found, k=8)])

    def seeds(generator: Any, n: int = 4) -> list[int]:
        out(pipe, kwargs, **several(kwargs, n), generator=generator)
        return pipe.plugins.report().plugins["golden_seed"].records["seeds"].tolist()

    assert seeds(None) == seeds(torch.Generator().manual_seed(3)) == POOL[:4]
    assert notes(pipe) == ["seeds 11, 5, 7, 3; the call's own generator is not used"]
    seeds(None)
    assert notes(pipe) == ["seeds 11, 5, 7, 3"]
    pipe.plugins.configure("golden_seed", order="lot")
    one = torch.Generator().manual_seed(3)
    first, second = seeds(one), seeds(one)
    assert first != second
    assert seeds(torch.Generator().manual_seed(3)) == first
    assert notes(pipe)[0].endswith("; drawn by the call's generator")
    assert seeds([torch.Generator().manual_seed(3 + i) for i in range(4)]) == first, "of a list the first one draws"
    torch.manual_seed(8)
    loose = seeds(None)
    torch.manual_seed(8)
    assert seeds(None) == loose
    assert notes(pipe)[0].endswith("; drawn by torch's own generator")


@pytest.mark.parametrize("knobs", [{"seed": 5}, {"order": "rank"}, {"order": "lot"}])
@pytest.mark.parametrize(
    ("given", "said"), [(5, "5"), ([], "a list of 0"), (1, "a list of 1"), (3, "a list of 3"), (["a", "b"], "a list of 2")]
)
def test_what_is_no_generator_is_refused_before_anything_runs(knobs, given, said):
    pipe, kwargs = tiny()
    if "order" in knobs:
        knobs = {**knobs, "artefact": ranked(pipe, kwargs, POOL), "k": 8}
    if given in (1, 3):
        given = [torch.Generator() for _ in range(given)]
    load_pipeline(pipe, plugins=[GoldenSeed(**knobs)])
    with pytest.raises(
        ConfigError, match=f"generator = {said} for a call of 2 picture.*give one torch.Generator, a list with one for each"
    ):
        out(pipe, kwargs, **several(kwargs, 2), generator=given)
    assert pipe.plugins.report().forwards == {}


def test_a_refused_call_leaves_the_generator_as_it_was():
    pipe, kwargs = tiny()
    kwargs |= {"guidance_scale": 3.0}
    load_pipeline(pipe, plugins=[GoldenSeed(artefact=ranked(pipe, kwargs, POOL), k=8, order="lot")])
    for more in ({"guidance_scale": 5.0}, {"width": 2 * kwargs["width"]}, {"num_images_per_prompt": 9}):
        for generator in (torch.Generator().manual_seed(5), torch.default_generator):
            before = generator.get_state()
            with pytest.raises((ArtefactMismatch, ConfigError)):
                out(pipe, kwargs, **more, generator=None if generator is torch.default_generator else generator)
            assert torch.equal(generator.get_state(), before), more
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    out(pipe, kwargs, generator=generator)
    assert not torch.equal(generator.get_state(), before)


class Beside(Watch):
    name = "beside"


def test_what_a_ranking_does_not_know_is_noted():
    pipe, kwargs = tiny()
    found = ranked(pipe, kwargs, POOL)
    load_pipeline(pipe, plugins=[GoldenSeed(artefact=found, k=8)])
    out(pipe, kwargs, eta=0.5)
    assert "eta = 0.5: a ranking does not keep the eta it was made at" in notes(pipe)[1]
    pipe.plugins.clear()
    load_pipeline(pipe, plugins=[GoldenSeed(artefact=found, k=8), Beside])
    out(pipe, kwargs)
    assert notes(pipe)[1].startswith("the seeds were ranked without beside")
    pipe.plugins.clear()
    for facts, told in (({"beside": {"beside": {}}}, 1), ({"beside": {"beside": {}}, "ranking": [[s, -0.5] for s in POOL]}, 2)):
        load_pipeline(pipe, plugins=[GoldenSeed(artefact=replace(found, facts={**found.facts, **facts}), k=8), Beside])
        out(pipe, kwargs)
        assert len(notes(pipe)) == told
        pipe.plugins.clear()


def test_num_images_per_prompt_gives_each_its_seed():
    pipe, kwargs = tiny()
    load_pipeline(pipe, plugins=[GoldenSeed(artefact=ranked(pipe, kwargs, POOL), k=8), Watch])
    assert torch.equal(begun(pipe, kwargs, num_images_per_prompt=4), begun(pipe, kwargs, **several(kwargs, 4)))


def test_more_pictures_than_golden_seeds_are_told_in_a_sentence():
    pipe, kwargs = tiny()
    load_pipeline(pipe, plugins=[GoldenSeed(artefact=ranked(pipe, kwargs, POOL), k=3)])
    with pytest.raises(
        ConfigError, match=r"makes 4 pictures, and k = 3 seeds are used.*twice: make no more than 3 a call, set k = 4, or.*seed = 11"
    ):
        out(pipe, kwargs, **several(kwargs, 4))
    out(pipe, kwargs, **several(kwargs, 3))
    with pytest.raises(ConfigError, match=r"k = 9 of 8 ranked seeds: give a smaller k"):
        pipe.plugins.configure("golden_seed", k=9)


class Latents(Plugin):
    """Gives the run its latents."""

    name = "latents_given"
    paper = Paper("none", "", "latents")
    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}
    effects = Effects(edits={"latents"})

    def run(self, call, next):
        shape = (
            1,
            call.pipe.unet.config.in_channels,
            call["height"] // call.pipe.vae_scale_factor,
            call["width"] // call.pipe.vae_scale_factor,
        )
        return next(call.replace(latents=torch.ones(shape)))


def test_latents_that_are_given_leave_nothing_to_a_seed_and_are_told():
    pipe, kwargs = tiny()
    load_pipeline(pipe, plugins=[GoldenSeed(seed=5), Watch])
    first = begun(pipe, kwargs)
    with pytest.raises(ConfigError, match=r"the call gives its own latents.*leave latents out, or take the plugin off"):
        out(pipe, kwargs, latents=torch.zeros_like(first))
    pipe.plugins.configure("golden_seed", use="none")
    out(pipe, kwargs, latents=torch.zeros_like(first))
    for order, where in (([Latents, GoldenSeed(seed=5)], "further out"), ([GoldenSeed(seed=5), Latents], "further in")):
        pipe.plugins.clear()
        load_pipeline(pipe, plugins=order)
        with pytest.raises(Conflict, match=f"a plugin {where} gives the run its latents"):
            out(pipe, kwargs)


class Twice(Plugin):
    """Runs the pipeline twice; the second pass may be of another number of pictures."""

    name = "twice"
    paper = Paper("none", "", "two passes")
    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}
    effects = Effects(edits={"latents"})
    later: ClassVar[dict[str, Any]] = {}

    def run(self, call, next):
        next(call)
        return next(call.replace(**self.later))


def test_a_second_pass_goes_on_with_the_same_generators():
    pipe, kwargs = tiny()
    load_pipeline(pipe, plugins=[Twice, GoldenSeed(seed=5)])
    twice = out(pipe, kwargs)
    pipe.plugins.clear()
    generator = torch.Generator().manual_seed(5)
    out(pipe, kwargs, generator=generator)
    assert torch.equal(twice, out(pipe, kwargs, generator=generator))
    Twice.later = {**several(kwargs, 2), "generator": [torch.Generator().manual_seed(i) for i in range(2)]}
    try:
        load_pipeline(pipe, plugins=[Twice, GoldenSeed(seed=5)])
        out(pipe, kwargs)
    finally:
        Twice.later = {}
    assert any("goes on with 2 of 1 pictures" in note for note in pipe.plugins.report().plugins["golden_seed"].notes)


def test_off_and_nothing_given_are_the_baseline():
    pipe, kwargs = tiny()
    generator = torch.Generator().manual_seed(1)
    state = generator.get_state()
    wanted = out(pipe, kwargs, generator=generator)
    for knobs, said in (({"seed": 5, "use": "none"}, False), ({}, True)):
        load_pipeline(pipe, plugins={"golden_seed": knobs})
        generator.set_state(state)
        assert torch.equal(out(pipe, kwargs, generator=generator), wanted)
        notes = pipe.plugins.report().plugins["golden_seed"].notes
        assert any(note.startswith("inactive: neither a seed nor a ranking") for note in notes) is said
        pipe.plugins.clear()


# ranking --------------------------------------------------------------------------------------------------------------------------------


def sized(pipe: Any, **more: Any) -> CallSettings:
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return CallSettings(**{"steps": 2, "guidance_scale": 3.0, "height": side, "width": side, **more})


class Planted(Fitness):
    """How far the first rows are from what one seed makes of the same prompts: a pool in which one seed is better."""

    name = "planted"
    wants_latents = True

    def __init__(self, wanted: torch.Tensor) -> None:
        self.wanted = wanted

    def loss(self, outputs, prompts):
        return float((torch.as_tensor(outputs) - self.wanted).square().mean())


def planted(tmp_path: Any, batch: int = 16, prompts: tuple[str, ...] = ("a red apple", "two dogs", "a tree")) -> Finding:
    pipe, _ = tiny()
    settings = sized(pipe)
    kwargs = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": settings.height, "width": settings.width, "output_type": "latent"}
    wanted = torch.cat([pipe(prompt=each, **kwargs, generator=torch.Generator().manual_seed(106))[0] for each in prompts])
    samples = [Sample(seed=i, prompt=each) for i, each in enumerate(prompts)]
    plan = Plan.of(5, epochs=2, seed=0)
    return search(pipe, GoldenSeed(), samples, settings, tmp_path / "r.json", Planted(wanted), plan=plan, knobs={"first": 100}, batch=batch)


def test_a_planted_good_seed_is_found_and_the_whole_pool_is_ranked(tmp_path):
    made = planted(tmp_path)
    ranking = made.facts["ranking"]
    assert sorted(seed for seed, _ in ranking) == list(range(100, 110)), "population x epochs seeds, each once"
    assert (made.genome, ranking[0][0], made.facts["judged"]) == (106, 106, 10)
    assert "seeds" not in made.facts["prompts"], "the noise is the candidate's"
    assert made.facts["plan"] == {"population": 5, "epochs": 2}, "nothing is bred"
    assert ranking[0][1] < 1e-9
    assert ranking[1][1] > 1e-3
    losses = [loss for _, loss in ranking]
    assert losses == sorted(losses)
    assert Finding.load(tmp_path / "r.json", "golden_seed").facts["ranking"] == json.loads(json.dumps(ranking))


def test_the_ranking_is_the_same_whatever_the_order_of_the_prompts_and_the_batch(tmp_path):
    """More prompts than memory holds are judged in batches."""
    one, other = planted(tmp_path), planted(tmp_path, batch=2, prompts=("a tree", "a red apple", "two dogs"))
    assert [seed for seed, _ in one.facts["ranking"]] == [seed for seed, _ in other.facts["ranking"]]
    assert [loss for _, loss in one.facts["ranking"]] == pytest.approx([loss for _, loss in other.facts["ranking"]], abs=1e-5)


def test_planted_good_seeds_are_recovered_from_noisy_judgements():
    """20 of 200 seeds are better by one deviation of a picture; the mean over 16 prompts is known to a quarter of it."""
    good = set(random.Random(1).sample(range(200), 20))
    noise = np.random.default_rng(0).normal(size=(200, 16)).mean(1)
    searcher = SeedSearcher()
    found = evolve(searcher, lambda seed: float(noise[seed]) - (seed in good), Plan.of(50, epochs=4))
    assert found.judged == 200
    top = set(chosen([seed for seed, _ in found.ranking], "best"))
    assert len(top & good) >= 18
    blank = evolve(SeedSearcher(), lambda seed: float(noise[seed]), Plan.of(200, epochs=1))
    assert len(set(chosen([seed for seed, _ in blank.ranking], "best")) & good) <= 6, "nothing planted, nothing found"


def test_a_fitness_that_compares_with_other_noise_is_refused(tmp_path):
    pipe, _ = tiny()
    with pytest.raises(ConfigError, match=r"fitness = 'trajectory'.*says nothing of a seed: take --fitness reward"):
        search(pipe, GoldenSeed(), [Sample(seed=0, prompt="a")], sized(pipe), tmp_path / "r.json", TrajectoryFitness(2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("knobs", "prompts", "fitness", "why"),
    [
        ({"seed": 5}, "ab", None, "seed = 5: a candidate is one seed of the pool.*leave them out"),
        ({"use": "worst", "k": 2}, "ab", None, "k = 2, use = worst: "),
        ({"use": "none"}, "ab", None, "use = none: "),
        ({"artefact": "r.json"}, "ab", None, "artefact = r.json: "),
        ({}, "aba", None, "'a' is asked for more than once.*--samples 2"),
        ({}, "ab", FrechetFitness(lambda images: torch.zeros(len(images), 1)), "of their noise would be the nearer: give --reference"),
    ],
)
def test_what_a_ranking_would_not_heed_is_refused(knobs, prompts, fitness, why, tmp_path):
    pipe, _ = tiny()
    samples = [Sample(seed=i, prompt=each) for i, each in enumerate(prompts)]
    with pytest.raises(ConfigError, match=why):
        search(pipe, GoldenSeed(**knobs), samples, sized(pipe), tmp_path / "r.json", fitness or RewardFitness(colourful))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--mutations", "3", "--top", "1"], "--top 1, --mutations 3: the search of golden_seed breeds nothing"),
        (["--seed", "7"], "--seed 7: each candidate of golden_seed says which noise it draws"),
        (["--fitness", "trajectory"], "--fitness trajectory: it compares with what other noise makes"),
    ],
)
def test_the_command_refuses_before_the_pipeline_is_loaded(words, why, monkeypatch):
    monkeypatch.setattr("diffgraft.cli.values.load_bare", None)
    told = ["evolve", "golden_seed", "--pipeline", "emoji-sd", "--prompt", "a", "--steps", "2", "--fitness", "reward"]
    done = CliRunner().invoke(app, [*told, "--reward", "diffgraft_golden_seed.scores:colourful", *words])
    assert done.exit_code != 0
    assert why in " ".join((done.output + str(done.exception)).split())


def constant(images, prompts):
    return [0.5] * len(images)


def test_the_command(tmp_path, monkeypatch):
    pipe, kwargs = tiny()
    pipe.save_pretrained(tmp_path / "pipe")
    path = tmp_path / "seeds.json"
    done = CliRunner().invoke(
        app,
        [
            *("evolve", "golden_seed", "--pipeline", str(tmp_path / "pipe"), "--prompt", "a red apple", "--steps", "2", "--device", "cpu"),
            *("--fitness", "reward", "--reward", "diffgraft_golden_seed.scores:colourful", "--population", "3", "--epochs", "1"),
            *("--guidance-scale", "2", "--set", "first=7", "--out", str(path)),
        ],
    )
    assert done.exit_code == 0, done.output
    assert "3 candidates: loss (reward)" in done.output
    assert "have the same loss" not in done.output
    monkeypatch.setattr("diffgraft_golden_seed.scores.colourful", constant)
    words = ["evolve", "golden_seed", "--pipeline", str(tmp_path / "pipe"), "--prompt", "a red apple", "--steps", "1", "--device", "cpu"]
    words += ["--fitness", "reward", "--reward", "diffgraft_golden_seed.scores:colourful", "--population", "2", "--epochs", "1"]
    alike = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "alike.json")])
    assert "all 2 have the same loss: the fitness does not tell them apart" in " ".join(alike.output.split())
    made = Finding.load(path, "golden_seed")
    assert {seed for seed, _ in made.facts["ranking"]} == {7, 8, 9}
    pipe, kwargs = tiny()
    kwargs = {key: value for key, value in kwargs.items() if key not in ("height", "width")} | {"guidance_scale": 2.0}
    load_pipeline(pipe, plugins={"golden_seed": {"artefact": path}})
    out(pipe, kwargs)
    assert pipe.plugins.report().plugins["golden_seed"].records["seeds"].tolist() == [made.genome]


# what a ranking fits ------------------------------------------------------------------------------------------------------------------


def test_a_ranking_of_something_else_is_refused_by_name(tmp_path):
    pipe, kwargs = tiny()
    kwargs |= {"guidance_scale": 3.0}
    path = tmp_path / "seeds.json"
    ranked(pipe, kwargs, POOL).save(path)
    load_pipeline(pipe, plugins={"golden_seed": {"artefact": path, "k": 8}})
    out(pipe, kwargs)
    out(pipe, kwargs, num_inference_steps=4)
    assert "ranked in runs of 2 steps, this one makes 4" in pipe.plugins.report().plugins["golden_seed"].notes[-1]
    with pytest.raises(ArtefactMismatch, match=r"guidance scale: made for 3.0, found 5.0.*diffgraft evolve golden_seed"):
        out(pipe, kwargs, guidance_scale=5.0)
    with pytest.raises(ArtefactMismatch, match="shape of the latents: made for"):
        out(pipe, kwargs, width=2 * kwargs["width"])
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ArtefactMismatch, match=r"scheduler: made for .*, found DPMSolverMultistepScheduler"):
        out(pipe, kwargs)
    assert pipe.plugins.report().forwards == {}, "nothing was computed"
    other, _ = tiny("FluxPipeline")
    with pytest.raises(ArtefactMismatch, match="pipeline: made for StableDiffusionPipeline, found FluxPipeline"):
        load_pipeline(other, plugins={"golden_seed": {"artefact": path}})
    changed = make("StableDiffusionPipeline", 1).pipe
    with pytest.raises(ArtefactMismatch, match="unet: found UNet2DConditionModel with other weights"):
        load_pipeline(changed, plugins={"golden_seed": {"artefact": path}})
    assert not hasattr(changed, "plugins")


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"ranking": []}, "ranking"),
        ({"ranking": [[11, 0.0], [11, 1.0]]}, "a seed twice"),
        ({"ranking": [[11, 1.0], [5, 0.0]]}, "not in the order of its losses"),
        ({"ranking": [[5, 0.0], [11, 1.0]]}, "best seed is said to be 11"),
        ({"ranking": [[-1, 0.0]]}, "the seed -1"),
        ({"ranking": [["11", 0.0]]}, "the seed '11'"),
        ({"ranking": [[11, "good"]]}, "the loss 'good'"),
        ({"ranking": [[11]]}, "ranking"),
        ({"genome": None}, "genome"),
    ],
)
def test_a_ranking_that_makes_no_sense_is_refused(facts, why):
    pipe, kwargs = tiny()
    found = ranked(pipe, kwargs, POOL)
    with pytest.raises(ArtefactMismatch, match=why):
        load_pipeline(pipe, plugins=[GoldenSeed(artefact=replace(found, facts={**found.facts, **facts}))])
    assert not hasattr(pipe, "plugins")


@pytest.mark.parametrize(
    ("knobs", "why"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": True}, "True is no number"),
        ({"seed": 3, "k": 2}, "k = 2 beside seed = 3"),
        ({"seed": 3, "use": "worst", "order": "lot"}, "use = worst, order = lot beside seed = 3"),
        ({"k": 0}, "k"),
        ({"use": "some"}, "use"),
        ({"order": "random"}, "order"),
        ({"seed": 1, "artefact": "a.json"}, "seed and artefact exclude each other"),
        ({"seeds": 1}, "seed"),
    ],
)
def test_bad_knobs_are_refused_before_anything_is_loaded(knobs, why):
    with pytest.raises(ConfigError, match=why):
        load_pipeline("no-such-pipeline", plugins=[("golden_seed", knobs)])


# scorers ------------------------------------------------------------------------------------------------------------------------------


def test_scorers_know_grey_pictures_and_frames():
    grey = torch.rand(1, 1, 32, 32).expand(1, 3, 32, 32)
    red = torch.zeros(1, 3, 32, 32)
    red[:, 0] = 0.5
    framed = red.clone()
    framed[:, :, 2:-2, 2:-2] = 0.9
    half = red.clone()
    half[:, :, 2:] = 0.9
    assert colourfulness(torch.cat([grey, red])).tolist() == [0, 0.5]
    assert border(torch.cat([red, framed, half])).tolist() == pytest.approx([0, 0.8, 0], abs=0.12)
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("white", "red")]
    assert colourful(pictures, ["", ""]) == [0, 1]
    assert borderless(pictures, ["", ""]) == [0, 0]


def test_scorers_take_pictures_of_every_form_or_refuse_them():
    grey = Image.new("L", (32, 32), 100)
    red = np.zeros((32, 32, 3), np.float32)
    red[..., 0] = 1
    video = [red, red * 0]
    forms = [grey, Image.new("RGBA", (8, 8), "red"), red, np.stack(video), video, torch.rand(16, 16), torch.rand(16, 16, 1)]
    assert colourful(forms, [""] * 7) == [0, 1, 1, 1, 1, 0, 0]
    assert borderless(forms[:3], [""] * 3) == [0, 0, 0]
    for wrong in (torch.rand(3, 32, 32), torch.rand(2, 3, 32, 32), torch.rand(3)):
        with pytest.raises(RewardError, match=r"a picture of shape .*: give \[height, width, 3\]"):
            colourful([wrong], [""])
    with pytest.raises(RewardError, match="1 x 1 pixels has no frame to look for: at least 4 a side"):
        borderless([Image.new("RGB", (1, 1))], [""])


def test_what_it_says_it_does_follows_the_knobs():
    assert GoldenSeed().effects == GoldenSeed(seed=5, use="none").effects == Effects()
    assert GoldenSeed(seed=5).effects == Effects(replaces={"noise"})
    assert GoldenSeed(artefact="a.json").effects == Effects(replaces={"noise"}, couples_batch=True)
