"""ELECT: the score, what is chosen and by what, the winner's run, its noise, the count of forwards, what is refused."""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffgraft import ConfigError, Conflict, Effects, NotFinite, Paper, Plugin, Unsupported, load_pipeline
from diffgraft.lab.instruments import LiveBytes
from diffgraft.methods.decoding import to_pixels
from diffgraft.testing import Case, contract_sample
from diffgraft_elect import Elect, __version__, best, share_of
from diffgraft_elect.method import difference, inconsistency, scaled, step_map, weight
from diffgraft_elect.seeds import starts_of
from diffgraft_pipelines.tiny import make
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    UniPCMultistepScheduler,
)

SD, SDXL = "StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline"
ANCESTRAL = EulerAncestralDiscreteScheduler
CASES = contract_sample("elect", __version__)
"""Each check once and each family once; which meet changes with the version. All of them: ``diffgraft check``, or ``contract_cases``."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case) -> None:
    case.run()


# helpers ------------------------------------------------------------------------------------------------------------------------------


class Watch(Plugin):
    """Innermost: keeps what the denoiser and the scheduler were asked and gave; may spoil the prediction of one pass."""

    name = "watch"
    paper = Paper("none", "", "watches")
    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}
    effects = Effects(edits=frozenset({"latents", "prediction"}))
    asked: ClassVar[list[tuple[int, int]]] = []
    """(step, rows) of each forward."""
    branches: ClassVar[list[tuple[torch.Tensor, ...]]] = []
    stepped: ClassVar[list[tuple[torch.Tensor, torch.Tensor]]] = []
    image: ClassVar[list[torch.Tensor]] = []
    spoiled: ClassVar[set[int]] = set()
    """Numbers of passes in which the predictions are NaN."""
    passes: ClassVar[list[int]] = []

    def schedule(self, call, next):
        self.passes.append(len(self.passes))
        return next(call)

    def denoise(self, call, next):
        out = next(call)
        if len(self.passes) - 1 in self.spoiled:
            out = out * math.nan
        self.asked.append((call.step.call, len(call.latents)))
        self.branches.append(out.chunk(len(call.branches)))
        self.image[:] = [call.only("cond").sample[:, call.latents.shape[1] :]]
        return out

    def step(self, call, next):
        self.stepped.append((call.sample, call.model_output))
        return next(call)

    @classmethod
    def forget(cls):
        for kept in (cls.asked, cls.branches, cls.stepped, cls.image, cls.passes):
            kept.clear()
        cls.spoiled.clear()


def new(name: str = SD, scheduler: Any = None, **config: Any) -> Any:
    made = make(name)
    if scheduler is not None:
        made.pipe.scheduler = scheduler.from_config(made.pipe.scheduler.config, **config)
    made.pipe.set_progress_bar_config(disable=True)
    made.kwargs |= {"num_inference_steps": 6, "output_type": "latent"}
    return made


def call(made: Any, knobs: dict[str, Any] | None, seeds: Any = 0, watched: bool = False, **changes: Any) -> tuple[torch.Tensor, Any, Any]:
    """(latents, the plugin's report or None, the generator after the run)."""
    plugins = [*([] if knobs is None else [Elect(**knobs)]), *([Watch] if watched or knobs is None else [])]
    pipe = load_pipeline(made.pipe, plugins=plugins)
    generator: Any = seeds
    if isinstance(seeds, int):
        generator = torch.Generator().manual_seed(seeds)
    elif isinstance(seeds, (list, tuple)):
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    try:
        out = pipe(**{**made.kwargs, **changes}, generator=generator)[0]
        return out, pipe.plugins.report(), generator
    finally:
        pipe.plugins.clear()


def mine(report: Any) -> Any:
    return report.plugins["elect"]


def winners(report: Any) -> list[int]:
    return [int(i) for i in mine(report).records["bis"].argmin(0)]


def near(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


# the score ----------------------------------------------------------------------------------------------------------------------------


def numbers(rows: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, 4, 8, 8)).astype(np.float32), rng.normal(size=(rows, 4, 8, 8)).astype(np.float32) ** 3


def plain_difference(text: np.ndarray, image: np.ndarray) -> np.ndarray:
    """One sample [channels, height, width], in numpy."""
    d = np.abs(text - image).sum(0)
    first, third = np.percentile(d, [25, 75], method="midpoint")
    d = np.minimum(d, third + 1.5 * (third - first))
    return (d - d.min()) / (d.max() - d.min())


def unit(m: np.ndarray) -> np.ndarray:
    return (m - m.min()) / (m.max() - m.min())


@pytest.mark.parametrize("space", ["latent", "pixel"])
def test_the_score_is_the_one_written_out_in_numpy(space):
    steps = [numbers(seed=seed) for seed in range(4)]
    x0, source = (torch.from_numpy(values) for values in numbers(seed=9))
    totals = [difference(torch.from_numpy(t), torch.from_numpy(i)) for t, i in steps]
    M = torch.stack([step_map(d.mean(0, keepdim=True), space) for d in totals]).mean(0)
    theirs = [np.mean([plain_difference(t, i) for t, i in zip(*pair, strict=True)], axis=0) for pair in steps]
    whole = np.mean([unit(m**2 if space == "pixel" else m) for m in theirs], axis=0)
    assert np.abs(M[0].numpy() - whole).max() < 1e-6
    w = 1 - whole if space == "pixel" else 1 - whole**2
    error = np.abs(x0.numpy() - source.numpy()).mean(1)
    assert np.allclose(inconsistency(x0, source, M, space), (error * w).sum((1, 2)) / w.sum(), rtol=1e-6)


def test_maps_have_no_scale():
    """So epsilon, v and x0 predictions at one level have one map: their differences are multiples of each other."""
    text, image = map(torch.from_numpy, numbers())
    assert torch.allclose(difference(text, image), difference(0.01 * text, 0.01 * image), atol=1e-6)
    assert torch.allclose(difference(text, image), difference(-7 * text, -7 * image), atol=1e-6)


def test_an_outlier_does_not_hide_the_rest():
    text = torch.rand(1, 4, 8, 8)
    spoiled = text.clone()
    spoiled[0, 0, 0, 0] = 1e6
    assert difference(spoiled, torch.zeros_like(text)).mean() > 0.1
    assert scaled(spoiled.sum(1)).mean() < 0.02


def test_one_value_everywhere_is_relevant_nowhere():
    """The official code divides 0 by 0 there."""
    flat = torch.ones(2, 4, 8, 8)
    assert not difference(flat, 0 * flat).any()
    assert not difference(math.nan * flat, flat).any()


def test_weights_in_pixels_are_resized_between_the_centres():
    M = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    assert torch.allclose(weight(M, "pixel", (2, 4))[0, 0], torch.tensor([1.0, 0.75, 0.25, 0.0]))
    assert torch.equal(weight(M, "latent", (2, 2)), 1 - M)


@pytest.mark.parametrize("space", ["latent", "pixel"])
def test_who_changes_only_where_the_instruction_acts_wins(space):
    """Four seeds: one edits inside a box alone, the others change all, or elsewhere."""
    source, box = torch.zeros(1, 4, 8, 8), torch.zeros(8, 8)
    box[2:7, 2:7] = 1
    M = step_map(difference(box.expand(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)), space)
    x0 = torch.stack([torch.ones(8, 8), 5 * box, 1 - box, 0.3 * torch.ones(8, 8)])[:, None].expand(4, 4, 8, 8)
    assert inconsistency(x0, source, M, space).argmin() == 1


# what is chosen -----------------------------------------------------------------------------------------------------------------------


def by_hand(made: Any, seeds: list[int], steps: int, window: int, space: str, scheduler: Any) -> list[float]:
    """BIS of plain runs of these seeds in epsilon's own formulas, for schedulers of Euler's kind, in numpy."""
    maps, last = [], []
    for seed in seeds:
        Watch.forget()
        call(made, None, seed)
        maps.append([plain_difference(b[0][0].numpy(), b[1][0].numpy()) for b in Watch.branches])
        sample, eps = Watch.stepped[steps - 1]
        last.append(sample - scheduler.sigmas[steps - 1] * eps)
        encoded = Watch.image[0]
    m = [unit(np.mean([of[t] for of in maps], axis=0) ** (2 if space == "pixel" else 1)) for t in range(window)]
    M = np.mean(m, axis=0)
    vae = made.pipe.vae
    with torch.no_grad():
        if space == "latent":
            source, seen = encoded * vae.config.scaling_factor, last
        else:
            source, seen = vae.decode(encoded)[0], [vae.decode(x0 / vae.config.scaling_factor)[0] for x0 in last]
    w = 1 - M**2
    if space == "pixel":
        w = torch.nn.functional.interpolate(torch.from_numpy(1 - M)[None, None], source.shape[-2:], mode="bilinear")[0, 0].numpy()
    errors = [(x0 - source).abs().mean(1)[0].numpy() for x0 in seen]
    return [float((error * w).sum() / w.sum()) for error in errors]


@pytest.mark.parametrize("space", ["latent", "pixel"])
@pytest.mark.parametrize(("name", "stop"), [(SD, 0.5), (SD, 1.0), (SDXL, 0.5)])
def test_scores_are_those_of_plain_runs_at_that_step(name, stop, space):
    """At s = T: best of N by BIS."""
    made = new(name, ANCESTRAL)
    _, report, _ = call(made, {"candidates": 4, "stop": stop, "window": 0.34, "space": space})
    seeds = [0 if seed < 0 else seed for seed in mine(report).records["seeds"][:, 0].tolist()]
    wanted = by_hand(made, seeds, share_of(stop, 6), 2, space, made.pipe.scheduler)
    assert np.allclose(mine(report).records["bis"][:, 0], wanted, rtol=2e-4)
    assert winners(report) == [int(np.argmin(wanted))]


def test_the_choice_is_not_made_by_the_final_picture():
    """X: of some seeds another is best after a step than at the end; then the plugin takes the first of these."""
    made = new(scheduler=ANCESTRAL)
    found = []
    for seed in range(3):
        early, late = (call(made, {"candidates": 5, "stop": stop}, seed, num_inference_steps=4)[1] for stop in (0.2, 1.0))
        assert mine(early).records["seeds"].equal(mine(late).records["seeds"])
        found.append((winners(early), winners(late)))
    assert any(early != late for early, late in found)


# the winner's run ---------------------------------------------------------------------------------------------------------------------

SCHEDULERS: list[tuple[Any, dict[str, Any]]] = [
    (None, {}),
    (ANCESTRAL, {}),
    (EulerDiscreteScheduler, {}),
    (HeunDiscreteScheduler, {}),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    (DPMSolverMultistepScheduler, {"solver_order": 3}),
    (UniPCMultistepScheduler, {"solver_order": 3}),
]


@pytest.mark.parametrize(
    ("name", "scheduler", "config"), [*((SD, *each) for each in SCHEDULERS), *((SDXL, *each) for each in SCHEDULERS[:2])], ids=str
)
def test_the_winner_is_what_its_seed_alone_makes_bit_for_bit(name, scheduler, config):
    """And the caller's generator is then where the winner alone leaves it."""
    made = new(name, scheduler, **config)
    found, report, generator = call(made, {"candidates": 5})
    [winner] = winners(report)
    seed = int(mine(report).records["seeds"][winner, 0])
    alone, _, after = call(made, None, max(seed, 0))
    assert torch.equal(found, alone)
    assert torch.equal(generator.get_state(), after.get_state())
    assert winner > 0 or seed < 0


def test_some_other_seed_than_the_callers_won():
    """So that the test before says something."""
    assert any(winners(call(new(), {"candidates": 5}, seed)[1]) != [0] for seed in range(3))


@pytest.mark.parametrize("at_once", [2, 3, 8])
@pytest.mark.parametrize("name", [SD, SDXL])
def test_candidates_beside_each_other_are_what_they_are_one_by_one(name, at_once):
    """X: a batch that shared its ancestral noise would have other scores, and other winners."""
    made = new(name, ANCESTRAL)
    one, first, generator = call(made, {"candidates": 5}, 4)
    several, second, other = call(made, {"candidates": 5, "at_once": at_once}, 4)
    assert near(mine(second).records["bis"], mine(first).records["bis"]) < 1e-5
    assert winners(first) == winners(second)
    assert near(several, one) < 1e-5
    assert torch.equal(generator.get_state(), other.get_state())
    assert len(set(mine(first).records["bis"][:, 0].tolist())) == 5


def test_one_candidate_is_the_plain_run_bit_for_bit():
    made = new(scheduler=ANCESTRAL)
    plain, _, before = call(made, None)
    for knobs in ({"candidates": 1}, {"candidates": 1, "stop": 1.0, "space": "pixel"}):
        found, report, after = call(made, knobs)
        assert torch.equal(found, plain)
        assert torch.equal(before.get_state(), after.get_state())
        assert any("inactive" in note for note in mine(report).notes)


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_solvers_of_order_three_are_asked_at_the_points_of_the_whole_schedule(scheduler):
    """A schedule that ends at step s would take its last steps at a lower order, and what was recorded there belongs to another path."""
    made = new(scheduler=scheduler, solver_order=3)
    Watch.forget()
    call(made, {"candidates": 2, "stop": 0.7}, watched=True)
    tried = [sample for sample, _ in Watch.stepped[:4]]
    Watch.forget()
    call(made, None)
    assert all(torch.equal(a, b) for a, (b, _) in zip(tried, Watch.stepped, strict=False))


# pictures and prompts -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("name", [SD, SDXL])
def test_each_prompt_of_a_batch_has_its_own_winner(name, at_once):
    made = new(name, ANCESTRAL)
    first = made.kwargs["image"]
    prompts, images, seeds = ["a red apple", "a blue sea"], [first, first.rotate(180)], (5, 1)
    many = {"prompt": prompts, "image": images, "negative_prompt": ["", "grey"]}
    found, report, generators = call(made, {"candidates": 4, "at_once": at_once}, seeds, **many)
    own = []
    for row in range(2):
        one = {"prompt": prompts[row], "image": images[row], "negative_prompt": many["negative_prompt"][row]}
        alone, of_one, generator = call(made, {"candidates": 4}, seeds[row], **one)
        assert near(found[row : row + 1], alone) < 2e-5
        assert torch.equal(generators[row].get_state(), generator.get_state())
        own += winners(of_one)
    assert winners(report) == own


def test_the_winners_of_a_batch_differ_somewhere():
    made = new()
    many = {"prompt": ["a", "b"], "negative_prompt": ["", ""], "num_inference_steps": 3}
    both = [winners(call(made, {"candidates": 4}, (seed, seed + 50), **many)[1]) for seed in range(3)]
    assert any(a != b for a, b in both)


@pytest.mark.parametrize("at_once", [1, 2])
def test_several_pictures_a_prompt_choose_each_for_itself(at_once):
    """One generator for several pictures: every candidate of each is seeded from it, and it moves on."""
    made = new(scheduler=ANCESTRAL)
    found, report, generator = call(made, {"candidates": 3, "at_once": at_once}, 2, num_images_per_prompt=2)
    seeds = mine(report).records["seeds"]
    assert seeds.shape == (3, 2)
    assert (seeds >= 0).all()
    assert len(set(seeds.flatten().tolist())) == 6
    for row, winner in enumerate(winners(report)):
        alone, _, _ = call(made, None, int(seeds[winner, row]))
        assert near(found[row : row + 1], alone) < 1e-5
    assert not torch.equal(generator.get_state(), torch.Generator().manual_seed(2).get_state())


def test_embeddings_are_repeated_as_the_prompts_are():
    made = new(scheduler=ANCESTRAL)
    with torch.no_grad():
        embeds = made.pipe._encode_prompt(["a", "b"], "cpu", 1, False)
        negative = made.pipe._encode_prompt(["", "grey"], "cpu", 1, False)
    given = {"prompt": None, "negative_prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    one, _, _ = call(made, {"candidates": 3}, (0, 1), **given)
    several, _, _ = call(made, {"candidates": 3, "at_once": 2}, (0, 1), **given)
    texts, _, _ = call(made, {"candidates": 3}, (0, 1), prompt=["a", "b"], negative_prompt=["", "grey"])
    assert near(several, one) < 1e-5
    assert near(texts, one) < 1e-5


def test_without_a_generator_seeds_come_from_the_global_one():
    made = new(scheduler=ANCESTRAL)
    torch.manual_seed(7)
    first, report, _ = call(made, {"candidates": 3}, None)
    torch.manual_seed(7)
    again, _, _ = call(made, {"candidates": 3}, None)
    other, _, _ = call(made, {"candidates": 3}, None)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    alone, _, _ = call(made, None, int(mine(report).records["seeds"][winners(report)[0], 0]))
    assert torch.equal(first, alone)


def test_candidates_follow_from_the_state_of_the_callers_generator():
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    few, many = starts_of(generator, 1, 3), starts_of(generator, 1, 6)
    assert torch.equal(generator.get_state(), before)
    assert few.seeds.equal(many.seeds[:3])
    assert few.seeds[0] == -1
    assert len(set(many.seeds.flatten().tolist())) == 6
    torch.randn(1, generator=generator)
    assert not starts_of(generator, 1, 3).seeds[1:].eq(few.seeds[1:]).any()
    shared = starts_of([generator, generator], 2, 3)  # one generator twice is nobody's own
    assert shared.given is None
    assert (shared.seeds >= 0).all()


# cost ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("candidates", "stop", "at_once"), [(4, 0.5, 1), (3, 1.0, 1), (5, 0.34, 2), (4, 0.5, 4)])
def test_forwards_are_n_s_and_the_rest_of_one_run(candidates, stop, at_once):
    made = new()
    Watch.forget()
    _, report, _ = call(made, {"candidates": candidates, "stop": stop, "at_once": at_once}, watched=True)
    s = share_of(stop, 6)
    assert sum(rows for _, rows in Watch.asked) == candidates * s + (6 - s)
    assert report.forwards == {"cond+image+uncond": math.ceil(candidates / at_once) * s + (6 - s)}
    assert {rows for step, rows in Watch.asked if step >= s} <= {1}


def test_heun_counts_two_calls_a_step():
    _, report, _ = call(new(scheduler=HeunDiscreteScheduler), {"candidates": 3, "stop": 0.5})
    assert sum(report.forwards.values()) == 3 * 6 + (11 - 6)


def test_memory_of_the_rows_that_end_is_free():
    """Bytes alive at the worst moment after the choice: with 8 candidates beside each other within 5 % of a plain run's."""
    made = new()
    peaks: dict[str, int] = {}

    class Meter(Plugin):
        name = "meter"
        paper = Paper("none", "", "measures")
        families = ("*",)
        neutral: ClassVar[dict[str, Any]] = {}
        effects = Effects(edits=frozenset({"latents"}))
        live: ClassVar[Any] = None

        def denoise(self, call, next):
            first = call.step.call == 3  # the first forward after the choice
            if first:
                self.live.peak = self.live.now
            out = next(call)
            if first:
                peaks["last"] = self.live.peak
            return out

    def peak(plugins: list[Any]) -> int:
        pipe = load_pipeline(made.pipe, plugins=plugins)
        known = {p.untyped_storage()._cdata for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()}
        Meter.live = LiveBytes(known)
        try:
            with Meter.live:
                pipe(**made.kwargs, generator=torch.Generator().manual_seed(0))
        finally:
            pipe.plugins.clear()
        return peaks["last"]

    plain = peak([Meter])
    assert peak([Elect(candidates=8, stop=0.5, at_once=8), Meter]) < 1.05 * plain
    assert peak([Elect(candidates=8, stop=0.5), Meter]) < 1.05 * plain


# what is refused, and what is not a number ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["latent", "pixel"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_candidate_that_is_not_finite_never_wins(space, at):
    made = new()
    wanted = mine(call(made, {"candidates": 3, "space": space})[1]).records["bis"][:, 0]
    Watch.forget()
    Watch.spoiled.add(at)
    found, report, _ = call(made, {"candidates": 3, "space": space}, watched=True)
    Watch.forget()
    bis = mine(report).records["bis"][:, 0]
    assert bis[at].isnan()
    assert bis.isfinite().sum() == 2
    assert found.isfinite().all()
    assert wanted.isfinite().all()


def test_no_finite_candidate_is_an_error_of_ours():
    made = new()
    Watch.forget()
    Watch.spoiled |= {0, 1, 2}
    with pytest.raises(NotFinite, match=r"elect: after 2 step\(s\) no candidate of picture 1 has a finite score.*check_finite"):
        call(made, {"candidates": 3}, watched=True)
    Watch.forget()
    assert best("elect", [math.nan, 2.0, 1.0, math.inf], 0, 3) == 2


def test_the_callers_generator_has_not_moved_after_an_error():
    made = new()
    Watch.forget()
    Watch.spoiled |= {0, 1, 2}
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(NotFinite):
        call(made, {"candidates": 3}, generator, watched=True)
    Watch.forget()
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())


def test_given_latents_are_refused():
    with pytest.raises(Unsupported, match=r"candidates = 3, but the call gives latents.*set candidates = 1"):
        call(new(), {"candidates": 3}, latents=torch.zeros(1, 4, 8, 8))


def test_guidance_off_is_said():
    made = new()
    for changes in ({"guidance_scale": 1.0}, {"image_guidance_scale": 0.9}):
        plain = made.pipe(**{**made.kwargs, **changes}, generator=torch.Generator().manual_seed(0))[0]
        found, report, _ = call(made, {"candidates": 3}, **changes)
        assert torch.equal(found, plain)
        assert "inactive: guidance was off" in mine(report).notes[0]


@pytest.mark.parametrize("knobs", [{"candidates": 0}, {"stop": 0}, {"stop": 1.1}, {"window": 0.0}, {"space": "image"}, {"at_once": 0}])
def test_bad_knobs(knobs):
    with pytest.raises(ConfigError, match=next(iter(knobs))):
        Elect(**knobs)


def test_schedulers_that_cannot_be_run_twice_are_refused():
    made = new()

    class Noisy(EulerDiscreteScheduler):
        noise_sampler = None

    made.pipe.scheduler = Noisy.from_config(made.pipe.scheduler.config)
    with pytest.raises(Unsupported, match=r"draws its noise past the call's generator.*use another scheduler"):
        load_pipeline(made.pipe, plugins=[Elect(candidates=2)])


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler, KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler])
def test_schedulers_whose_clean_picture_is_not_known_are_refused_with_a_way_out(scheduler):
    made = new()
    made.pipe.scheduler = scheduler()
    with pytest.raises(Unsupported, match=f"elect: {scheduler.__name__} .*use another scheduler .*or set candidates = 1"):
        load_pipeline(made.pipe, plugins=[Elect(candidates=2)])
    load_pipeline(made.pipe, plugins=[Elect(candidates=1)])


@pytest.mark.parametrize("generator", [5, ["no", "generator"]])
def test_what_is_no_generator_is_refused(generator):
    pipe = load_pipeline((made := new()).pipe, plugins=[Elect(candidates=2)])
    with pytest.raises(ConfigError, match=r"elect: generator is .*no torch.Generator: give"):
        pipe(**{**made.kwargs, "prompt": ["a", "b"], "negative_prompt": None}, generator=generator)


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("wrong", [
    {"prompt": ["a", "b"], "negative_prompt": ["x"]},
    {"prompt": "a", "negative_prompt": ["x"]},
    {"prompt": ["a", "b"], "negative_prompt": "x"},
    {"prompt": ["a", "b", "c"], "negative_prompt": None, "image": torch.rand(2, 3, 64, 64)},
    {"prompt": "a", "negative_prompt": None, "image": [torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64)]},
], ids=lambda wrong: "+".join(wrong))  # fmt: skip
def test_lengths_that_do_not_fit_are_said_before_the_first_forward(wrong, at_once):
    """X: beside each other three prompts, twice, would fit two pictures, and some candidates be judged against another's picture."""
    made = new()
    Watch.forget()
    with pytest.raises((ValueError, TypeError, RuntimeError)) as plain:
        made.pipe(**{**made.kwargs, **wrong})
    with pytest.raises(plain.type, match=re.escape(str(plain.value)[:40])):
        call(made, {"candidates": 4, "at_once": at_once}, watched=True, **wrong)
    assert not Watch.asked


def test_two_pictures_for_four_are_tried_alone_first():
    """Lengths that do not look alike, and yet fit."""
    made = new(scheduler=ANCESTRAL)
    many = {"image": torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), "num_images_per_prompt": 4}
    one, first, _ = call(made, {"candidates": 4}, (0, 1, 2, 3), **many)
    several, report, _ = call(made, {"candidates": 4, "at_once": 3}, (0, 1, 2, 3), **many)
    assert winners(report) == winners(first)
    assert near(several, one) < 2e-5
    assert report.forwards == {"cond+image+uncond": 2 * 2 + 4}


class Reseeds(Plugin):
    """Gives each pass a noise of its own, and does not say so."""

    name = "reseeds"
    paper = Paper("none", "", "draws")
    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}
    effects = Effects(edits=frozenset({"prediction"}))
    generator: ClassVar[torch.Generator] = torch.Generator().manual_seed(162)

    def run(self, call, next):
        return next(call.replace(generator=self.generator))


def test_a_winners_run_from_other_noise_is_refused():
    made = new()
    pipe = load_pipeline(made.pipe, plugins=[Elect(candidates=2), Reseeds])
    with pytest.raises(Conflict, match="elect: the run that takes its first steps from a record began at other noise"):
        pipe(**made.kwargs, generator=torch.Generator().manual_seed(0))


def test_who_else_decides_the_noise_is_refused():
    class Starts(Reseeds):
        name = "starts"
        effects = Effects(replaces=frozenset({"noise"}))

    for plugins in ([Elect(candidates=2), Starts], [Starts, Elect(candidates=2)]):
        with pytest.raises(Conflict, match="both replace the noise"):
            load_pipeline(new().pipe, plugins=plugins)
    load_pipeline(new().pipe, plugins=[Elect(candidates=1), Starts])


def test_generators_of_a_wrong_number_are_the_pipelines_matter():
    with pytest.raises(ValueError, match="generators"):
        call(new(), {"candidates": 2}, (0, 1, 2))


def test_cosxl_editors_give_their_picture_in_scale():
    """So the same source as latents and as pixels: the encoder's, decoded."""
    made = new(SDXL)
    made.pipe.is_cosxl_edit = True
    _, report, _ = call(made, {"candidates": 2, "space": "pixel"}, watched=True)
    with torch.no_grad():
        source = to_pixels(made.pipe, load_pipeline(made.pipe, plugins=[]).plugins.family, Watch.image[0], {})
        again = made.pipe.vae.decode(Watch.image[0] / made.pipe.vae.config.scaling_factor)[0]
    assert torch.allclose(source, again)
    assert mine(report).records["bis"].isfinite().all()
