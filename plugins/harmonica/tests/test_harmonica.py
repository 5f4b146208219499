"""HarmoniCa against its formulas, against the official code's order of doing things written anew, and against what must not happen."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, Effects, Paper, Plugin, Unsupported, load_pipeline, unload
from diffgraft.installed import registry
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.examples import Example
from diffgraft.methods.fitting import FitPlan, fit, fit_call
from diffgraft.methods.inputs import CallSettings
from diffgraft_harmonica import HarmoniCa
from diffgraft_harmonica import method as m
from diffgraft_harmonica.fitter import RouterFitter
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, HeunDiscreteScheduler

FAMILIES = {"dit": "DiTPipeline", "pixart": "PixArtAlphaPipeline"}
T, L, ROUTED = 5, {"dit": 6, "pixart": 9}, ("attn1", "attn2", "ff")
"""Steps of a run here, routed layers of the tiny pipelines (three blocks), and their names in a block."""


def tiny(family="dit"):
    module, function = registry.families()[family].tiny.split(":")
    made = getattr(importlib.import_module(module), function)(FAMILIES[family], 0)
    made.kwargs["num_inference_steps"] = T
    if family == "pixart":
        made.kwargs["output_type"] = "latent"
    return made


def picture(made, **kwargs):
    """The result as an array, from equal noise."""
    return np.asarray(made.pipe(**{**made.kwargs, "generator": torch.Generator().manual_seed(0), **kwargs})[0])


def router(made, logits=None):
    """What a fit begins with, or that with these logits."""
    found = fit_call(made.pipe, HarmoniCa(), lambda pipe: pipe(**made.kwargs))
    return found if logits is None else replace(found, tensors={**found.tensors, "logits": logits})


def grafted(made, artefact, threshold=0.5):
    load_pipeline(made.pipe, plugins=[("harmonica", {"router": artefact, "threshold": threshold})])
    return made


def part(made):
    return made.pipe.plugins.report().plugins["harmonica"]


def layers_of(pipe):
    """(place, module) of each routed layer, in running order."""
    return [
        (f"transformer_blocks.{i}.{name}", module)
        for i, block in enumerate(pipe.transformer.transformer_blocks)
        for name in ROUTED
        if (module := getattr(block, name, None)) is not None
    ]


@contextlib.contextmanager
def hooked(pipe, change):
    """``change(place, output)`` stands for the output of each routed layer, by torch's own hooks."""
    handles = [module.register_forward_hook(lambda module, args, out, place=place: change(place, out)) for place, module in layers_of(pipe)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def running(pipe):
    """The places of the routed layers that really run, in order: told by a layer inside each."""
    ran = []
    inside = [(place, module.to_q if "attn" in place else module.net[0].proj) for place, module in layers_of(pipe)]
    handles = [inner.register_forward_pre_hook(lambda module, args, place=place: ran.append(place)) for place, inner in inside]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


# the formulas ---------------------------------------------------------------------------------------------------------------------------


def test_a_layer_computes_where_its_score_is_above_tau_and_always_at_first():
    logits = torch.tensor([[-5.0, -5.0], [0.0, 1.0], [-2.0, 3.0], [1e-3, -1.0]])
    assert m.computed(logits, 0.5) == [(True, False, False, True), (True, True, True, False)]
    assert m.computed(logits, 1.0) == [(True, False, False, False)] * 2
    assert m.computed(logits, 0.0) == [(True,) * 4] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_mix_of_score_one_is_the_fresh_output_bit_for_bit(dtype):
    cached, fresh = torch.randn(2, 3, 64).to(dtype)
    out = m.mixed(cached, fresh, torch.tensor(1.0))
    assert torch.equal(out, fresh)
    assert out.dtype == dtype
    half = m.mixed(cached, fresh, torch.tensor(0.25))
    torch.testing.assert_close(half.float(), 0.75 * cached.float() + 0.25 * fresh.float(), rtol=0.02, atol=0.02)


def test_lambda_is_what_each_steps_routing_adds():
    """On a "model" whose final latents are a sum over the table, the differences are known."""
    scores = torch.tensor([[0.5, 0.5], [0.25, 0.5], [1.0, 1.0], [0.0, 1.0]])
    seen = []

    def final(table):
        seen.append(table.clone())
        return table.sum() * torch.ones(3, 2)

    found = m.image_error_proxy(scores, final)
    assert torch.equal(found, torch.tensor([0.0, 1.25**2, 0.0, 1.0]))
    assert [int((table != 1).any(1).sum()) for table in seen] == [0, 1, 1, 2]
    assert torch.equal(seen[-1][0], torch.ones(2)), "the first step is not routed"


def test_lambda_without_a_cache_is_zero():
    assert torch.equal(m.image_error_proxy(torch.ones(4, 3), lambda table: table.sum() * torch.ones(1, 2)), torch.zeros(4))


# a run ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_all_scores_one_is_the_baseline_bit_for_bit(family):
    made = tiny(family)
    plain = picture(made)
    grafted(made, router(made, torch.full((T, L[family]), 5.0)), 0.1)
    assert np.array_equal(picture(made), plain)
    assert part(made).counts == {"computed": {"both": T * L[family]}}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("logit", [-5.0, 5.0])
def test_at_tau_one_the_first_step_is_reused_everywhere(family, logit):
    """Whatever the router says: every layer runs once, and the run is one whose layers give what they gave first."""
    made = tiny(family)
    artefact = router(made, torch.full((T, L[family]), logit))
    first = {}

    def change(place, out):
        return first.setdefault(place, out)

    with hooked(made.pipe, change):
        frozen = picture(made)
    grafted(made, artefact, 1.0)
    with running(made.pipe) as ran:
        assert np.array_equal(picture(made), frozen)
    assert ran == [place for place, _ in layers_of(made.pipe)], "the cost of one whole step"
    assert part(made).counts == {"computed": {"both": L[family]}, "reused": {"both": (T - 1) * L[family]}}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_skipped_is_what_the_router_says(family):
    """Layers that are reused do not run, and the picture is that of a run with the cache written by hand."""
    made = tiny(family)
    artefact = router(made)
    plan = dict(zip(artefact.facts["layers"], m.computed(artefact.tensors["logits"], 0.5), strict=True))
    assert list(plan) == [place for place, _ in layers_of(made.pipe)]
    kept, calls = {}, dict.fromkeys(plan, 0)

    def by_hand(place, out):
        i = calls[place]
        calls[place] += 1
        if plan[place][i]:
            kept[place] = out
        return kept[place]

    with hooked(made.pipe, by_hand):
        wanted = picture(made)
    grafted(made, artefact)
    with running(made.pipe) as ran:
        assert np.array_equal(picture(made), wanted)
    computed = sum(map(sum, plan.values()))
    assert 0 < computed < T * L[family]
    assert sorted(ran) == sorted(place for place, steps in plan.items() for _ in range(sum(steps)))
    assert part(made).counts == {"computed": {"both": computed}, "reused": {"both": T * L[family] - computed}}


def test_only_outputs_that_the_next_step_reuses_are_kept():
    made = tiny()
    logits = torch.full((T, L["dit"]), 5.0)
    grafted(made, router(made, logits), 0.1)
    picture(made)
    nothing = part(made).state_bytes
    logits[2, 0] = -5.0
    made.pipe.plugins.configure("harmonica", router=router(tiny(), logits))
    held = []
    with hooked(made.pipe, lambda place, out: held.append(sum(len(s.kept) for s in states(made.pipe)))):
        picture(made)
    assert max(held) == 1
    assert part(made).state_bytes == nothing, "and let go when they were used"


def states(pipe):
    """The plugin's states of the run in progress."""
    from diffgraft.kernel.onion import active_run

    run = active_run()
    return [state for (entry, branch), state in run._states.items() if entry.plugin.name == "harmonica" and branch is not None]


class Again(Plugin):
    """Asks the denoiser twice in each step, first for other latents, and gives the second answer."""

    name = "again"
    paper = Paper("a test", "0000.00000", "nothing")
    families = ("*",)
    neutral = {}  # noqa: RUF012
    effects = Effects(needs=frozenset({"extra_forwards"}))

    def denoise(self, call, next):
        answer = next(call)
        next(call.replace(hidden_states=call.sample + 1))
        return answer


def test_what_another_plugin_asks_beside_is_computed_and_not_kept():
    made = tiny()
    artefact = router(made)
    grafted(made, artefact)
    wanted = picture(made)
    load_pipeline(unload(made.pipe), plugins=[Again(), ("harmonica", {"router": artefact, "threshold": 0.5})])
    assert np.array_equal(picture(made), wanted)


def test_a_router_has_a_row_for_each_denoiser_call():
    """Heun asks twice a step but the last: these are rows of their own."""
    made = tiny("pixart")
    made.pipe.scheduler = HeunDiscreteScheduler.from_config(made.pipe.scheduler.config)
    artefact = router(made)
    assert len(artefact.tensors["logits"]) == 2 * T - 1
    grafted(made, artefact)
    assert np.isfinite(picture(made)).all()
    assert sum(count["both"] for count in part(made).counts.values()) == (2 * T - 1) * L["pixart"]


def test_guidance_off_has_a_router_of_its_own():
    made = tiny()
    made.kwargs["guidance_scale"] = 1.0
    grafted(made, router(made))
    picture(made)
    assert set(part(made).counts["reused"]) == {"cond"}


# what does not fit -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "word"),
    [({"num_inference_steps": 4}, "steps"), ({"guidance_scale": 3.0}, "guidance"), ({"guidance_scale": 1.0}, "guidance")],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_router_for_other_calls_is_refused(family, change, word):
    made = tiny(family)
    grafted(made, router(made))
    with running(made.pipe) as ran, pytest.raises(ArtefactMismatch, match=f"{word}.*diffgraft fit harmonica"):
        picture(made, **change)
    assert not ran, "before anything is computed"
    picture(made)


def test_a_router_for_another_scheduler_or_size_is_refused():
    made = tiny("pixart")
    grafted(made, router(made))
    with pytest.raises(ArtefactMismatch, match="shape"):
        picture(made, height=2 * made.kwargs["height"])
    made.pipe.scheduler = DDIMScheduler()
    with pytest.raises(ArtefactMismatch, match="made for DPMSolverMultistepScheduler, found DDIMScheduler"):
        picture(made)


def test_no_router_is_refused_with_the_command_that_makes_one():
    made = tiny()
    load_pipeline(made.pipe, plugins=["harmonica"])
    with pytest.raises(ConfigError, match=r"router = None: .*diffgraft fit harmonica"):
        picture(made)


def test_a_tau_that_is_not_the_fits_is_told():
    made = tiny()
    grafted(made, router(made), threshold=0.3)
    picture(made)
    notes = made.pipe.plugins.report().plugins["harmonica"].notes
    assert [note for note in notes if "the router was learned with" in note]


def test_a_fit_at_tau_zero_is_refused():
    made = tiny()
    with pytest.raises(ConfigError, match="threshold = 0 reuses nothing"):
        fit_call(made.pipe, HarmoniCa(threshold=0), lambda pipe: pipe(**{**made.kwargs, "num_inference_steps": 2}))


def test_columns_of_other_layers_are_refused():
    made = tiny()
    artefact = router(made)
    facts = {**artefact.facts, "layers": artefact.facts["layers"][::-1]}
    with pytest.raises(
        ArtefactMismatch,
        match=r"column 0 of the router .in memory. is for 'transformer_blocks.2.ff', and layer 0 .* 'transformer_blocks.0.attn1'",
    ):
        grafted(made, replace(artefact, facts=facts))
    with pytest.raises(ArtefactMismatch, match="6 columns for 5 layers"):
        grafted(made, replace(artefact, facts={**facts, "layers": facts["layers"][1:]}))
    longer = {"logits": torch.zeros(T + 1, L["dit"]), "lambdas": torch.zeros(T + 1)}
    grafted(made, replace(artefact, tensors=longer))
    with pytest.raises(ArtefactMismatch, match="6 rows, this run 5"):
        picture(made)


def test_other_families_are_refused():
    module, function = registry.families()["sd3"].tiny.split(":")
    pipe = getattr(importlib.import_module(module), function)("StableDiffusion3Pipeline", 0).pipe
    with pytest.raises(Unsupported, match="dit, pixart"):
        load_pipeline(pipe, plugins=["harmonica"])


# the fit ----------------------------------------------------------------------------------------------------------------------------------

SETTINGS = CallSettings(steps=T, guidance_scale=2.0)
LABELS = [Example(class_label=label) for label in (1, 7, 207)]


def learn(pipe, out, steps=2, batch=2, plugin=None, examples=LABELS, settings=SETTINGS, **knobs):
    plan = FitPlan(steps, batch, keep_every=knobs.pop("keep_every", 60.0))
    on_progress = knobs.pop("on_progress", None)
    knobs = {"l1": 1e-3, "rate": 0.1, **knobs}
    return fit(pipe, plugin or HarmoniCa(threshold=0.5), examples, settings, out, plan, knobs=knobs, on_progress=on_progress)


def test_a_router_is_written_and_read(tmp_path):
    made = tiny()
    made.kwargs["guidance_scale"] = 2.0
    plain = picture(made)
    found = learn(made.pipe, tmp_path / "r.safetensors")
    read = Artefact.load(tmp_path / "r.safetensors", "harmonica", "fit")
    assert all(torch.equal(read.tensors[name], value) for name, value in found.tensors.items())
    assert read.facts == found.facts
    assert (read.made_for.steps, read.facts["guidance_scale"]) == (T, 2.0)
    assert read.tensors["logits"].dtype == torch.float32
    assert torch.equal(read.tensors["logits"][0], torch.full((L["dit"],), 5.0)), "the first step is not learned"
    assert float(read.tensors["lambdas"][0]) == 0
    assert bool((read.tensors["lambdas"][1:] > 0).all())
    assert np.array_equal(picture(made), plain), "the pipeline stays as it was"
    ours = picture(grafted(made, str(tmp_path / "r.safetensors")))
    assert np.array_equal(picture(grafted(tiny_guided(), found)), ours)


def tiny_guided():
    made = tiny()
    made.kwargs["guidance_scale"] = 2.0
    return made


def test_a_fit_goes_on_where_it_stopped(tmp_path):
    class Stop(Exception):
        pass

    def stop(phase, done, total):
        if done == 2:
            raise Stop

    one = learn(tiny().pipe, tmp_path / "one.safetensors", 3, lambda_every=3)
    with pytest.raises(Stop):
        learn(tiny().pipe, tmp_path / "two.safetensors", 3, lambda_every=3, keep_every=0, on_progress=stop)
    two = learn(tiny().pipe, tmp_path / "two.safetensors", 3, lambda_every=3, keep_every=0)
    assert all(torch.equal(two.tensors[name], value) for name, value in one.tensors.items()), "lambda too, which is measured seldom"


def test_a_shorter_fit_is_the_beginning_of_a_longer_one(tmp_path):
    """Nothing in a step depends on how many there will be."""
    seen = []
    short = learn(tiny().pipe, tmp_path / "short.safetensors", 1)
    learn(tiny().pipe, tmp_path / "long.safetensors", 2, plugin=keeping(seen)(threshold=0.5))
    assert torch.equal(seen[1], short.tensors["logits"])
    assert not torch.equal(seen[0], seen[1])


def keeping(seen):
    """The plugin, whose fitter keeps the logits before each step."""

    class Kept(RouterFitter):
        def rollout(self, pipe, batch):
            seen.append(self.trained.logits.detach().clone())
            return super().rollout(pipe, batch)

    return type("Keeping", (HarmoniCa,), {"fitting": Kept})


def test_logits_stay_in_their_range(tmp_path):
    found = learn(tiny().pipe, tmp_path / "r.safetensors", 8, 1, l1=1e3, rate=1.0)
    assert torch.equal(found.tensors["logits"][1:], torch.full((T - 1, L["dit"]), -5.0))


def test_the_fit_takes_prompts_where_the_pipeline_does(tmp_path):
    made = tiny("pixart")
    extra = {k: v for k, v in made.kwargs.items() if k in ("clean_caption", "use_resolution_binning", "max_sequence_length")}
    settings = CallSettings(steps=T, guidance_scale=4.5, negative_prompt="", height=32, width=32, extra=extra)
    found = learn(made.pipe, tmp_path / "r.safetensors", 1, examples=[Example("a cat"), Example("a dog")], settings=settings)
    assert found.tensors["logits"].shape == (T, L["pixart"])
    with pytest.raises(ConfigError, match="harmonica learns from prompts"):
        learn(made.pipe, tmp_path / "none.safetensors", 1, examples=[], settings=settings)


class Noted(RouterFitter):
    """Notes what it asks the pipeline for."""

    seen: list = []  # noqa: RUF012

    def arguments(self, batch):
        found = super().arguments(batch)
        seeds = [g.initial_seed() for g in (found["generator"] if isinstance(found["generator"], list) else [found["generator"]])]
        self.seen.append((batch.step, found["class_labels"], seeds))
        return found


class Watched(HarmoniCa):
    fitting = Noted


def restated(pipe, logits, asked, l1, rate, tau, lambda_every, scale):
    """The official code's training written anew from its formulas: an optimizer step and rows of their own for each sampling step,
    indexed from the end of the run as there, sequential trajectories, plain loops, and torch's own hooks for the layers.

    Different from it on purpose, as the README says: all four channels are guided, and the learned variance has no part in the loss.
    """
    T, L = logits.shape
    routers = [torch.nn.Parameter(row.clone()) for row in logits.flip(0)]  # the last is that of the first sampling step
    optimizer = torch.optim.AdamW(routers[:-1], lr=rate, weight_decay=0)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(T)
    places = [place for place, _ in layers_of(pipe)]
    cache, mode = {}, {}

    def change(place, out):
        if mode["teacher"]:
            return None
        k = places.index(place)
        if place in cache and mode["weights"] is not None:
            r = mode["weights"][k]
            out = cache[place] * (1 - r) + out * r
        if place not in cache or mode["weights"] is None or mode["weights"][k] > tau:
            cache[place] = out.detach()
        return out

    def predict(x, t, labels):
        out = pipe.transformer(torch.cat([x, x]), timestep=t.expand(2 * len(x)), class_labels=labels).sample[:, :4]
        cond, uncond = out.chunk(2)
        return uncond + scale * (cond - uncond)

    def start(labels, seeds):
        x = torch.cat([torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        return x, torch.tensor([*labels, *[1000] * len(labels)])

    def final(masks, labels, seeds):
        cache.clear()
        x, labels = start(labels, seeds)
        with torch.no_grad():
            for i in reversed(range(T)):
                mode.update(teacher=False, weights=masks[i])
                t = scheduler.timesteps[T - 1 - i]
                x = scheduler.step(predict(x, t, labels), t, x).prev_sample
        return x

    for parameter in pipe.transformer.parameters():
        parameter.requires_grad_(False)
    lambdas = [0.0] * T
    with hooked(pipe, change):
        for epoch, labels, seeds in asked:
            if epoch % lambda_every == 0:
                masks = [torch.ones(L) for _ in range(T)]
                before = final(masks, labels, seeds)
                for i in range(T - 2, -1, -1):
                    masks[i] = routers[i].detach().sigmoid()
                    now = final(masks, labels, seeds)
                    lambdas[i] = float(((now - before) ** 2).mean())
                    before = now
            cache.clear()
            x, both = start(labels, seeds)
            for i in reversed(range(T)):
                t = scheduler.timesteps[T - 1 - i]
                if i == T - 1:
                    mode.update(teacher=False, weights=None)
                    with torch.no_grad():
                        x = scheduler.step(predict(x, t, both), t, x).prev_sample
                    continue
                mode.update(teacher=True)
                with torch.no_grad():
                    wanted = predict(x, t, both)
                scores = routers[i].sigmoid()
                mode.update(teacher=False, weights=scores)
                given = predict(x, t, both)
                loss = lambdas[i] * ((wanted - given) ** 2).mean() + l1 * scores.sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    routers[i].clamp_(-5, 5)
                x = scheduler.step(given.detach(), t, x).prev_sample
    return torch.stack([r.detach() for r in routers]).flip(0), torch.tensor(lambdas).flip(0)


def test_the_fit_is_that_of_the_official_code(tmp_path):
    """Logits and lambda after four trajectories, lambda measured twice."""
    Noted.seen.clear()
    made, knobs = tiny_guided(), {"l1": 1e-2, "rate": 0.05, "lambda_every": 2}
    found = learn(made.pipe, tmp_path / "r.safetensors", 4, 2, plugin=Watched(threshold=0.5), **knobs)
    begin = fit_call(tiny_guided().pipe, HarmoniCa(), lambda pipe: pipe(**made.kwargs)).tensors["logits"]
    asked = list({step: (step, labels, seeds) for step, labels, seeds in Noted.seen}.values())
    assert [step for step, _, _ in asked] == [0, 1, 2, 3]
    logits, lambdas = restated(tiny().pipe, begin, asked, tau=0.5, scale=2.0, **knobs)
    assert float((logits - begin).abs().max()) > 0.1
    torch.testing.assert_close(found.tensors["lambdas"], lambdas, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.tensors["logits"], logits, rtol=0, atol=1e-4)


def two_blocks():
    torch.manual_seed(3)
    transformer = DiTTransformer2DModel(
        sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8
    )
    made = tiny_guided()
    pipe = DiTPipeline(transformer=transformer.eval(), vae=made.pipe.vae, scheduler=DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_fit_beats_a_uniform_interval_of_equal_compute(tmp_path):
    """Two random blocks, 8 steps, half of the layers computed: from noise that the fit has not seen, nearer to the uncached latents."""
    pipe, settings = two_blocks(), CallSettings(steps=8, guidance_scale=2.0)
    found = learn(pipe, tmp_path / "r.safetensors", 60, 2, plugin=HarmoniCa(threshold=0.1), settings=settings, l1=LITTLE)
    logits = found.tensors["logits"]
    call = {"class_labels": [1, 7, 207, 3], "num_inference_steps": 8, "guidance_scale": 2.0, "output_type": "latent"}

    def final(artefact):
        load_pipeline(pipe, plugins=[("harmonica", {"router": artefact, "threshold": 0.5})])
        generator = [torch.Generator().manual_seed(1000 + i) for i in range(4)]
        made = np.asarray(pipe(**call, generator=generator)[0])
        counts = pipe.plugins.report().plugins["harmonica"].counts
        unload(pipe)
        return made, counts["computed"]["both"]

    uniform = torch.full_like(logits, -5.0)
    uniform[::2] = 5.0
    wanted, _ = final(replace(found, tensors={**found.tensors, "logits": torch.full_like(logits, 5.0)}))
    by_hand, cost = final(replace(found, tensors={**found.tensors, "logits": uniform}))
    bar = logits[1:].flatten().sort(descending=True).values[cost - logits.shape[1] - 1 : cost - logits.shape[1] + 1].mean()
    ours, our_cost = final(replace(found, tensors={**found.tensors, "logits": (logits - bar).clamp(-5, 5)}))
    assert our_cost == cost
    errors = [float(((made - wanted) ** 2).mean()) for made in (ours, by_hand)]
    assert errors[0] < errors[1], errors


LITTLE = 1e-5
"""l1 at which the scores of two random blocks spread."""


def test_the_run_goes_on_with_the_students_output(tmp_path, monkeypatch):
    """The states that a row is learned on are those of a run whose layers are mixed by the scores, not the teacher's."""
    made = tiny_guided()
    ends = []

    class Ends(RouterFitter):
        def trajectory(self, pipe, batch, scores, learns=False):
            found = super().trajectory(pipe, batch, scores, learns)
            ends.append((learns, scores.clone(), found["end"].clone()))
            return found

    class Kept(HarmoniCa):
        fitting = Ends

    learn(made.pipe, tmp_path / "r.safetensors", 1, plugin=Kept(threshold=0.5))
    plain, (learns, scores, routed), student = ends[0], ends[-2], ends[-1]
    assert (learns, student[0]) == (False, True)
    assert torch.equal(scores[1:], student[1][1:]), "the last run for lambda has all rows routed"
    assert torch.equal(routed, student[2])
    assert not torch.equal(plain[2], student[2])
