"""black_scholes: the price formulas, the rule of choice, and real pipelines."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffgraft import ConfigError, Effects, Paper, Plugin, RewardError, StepOutput, Unsupported, load_pipeline
from diffgraft.testing import Case, contract_sample
from diffgraft_black_scholes import BlackScholes, __version__, abar_of_flow
from diffgraft_black_scholes.method import LEAST_VOLATILITY, call_price, log_call, official_value, takes_second, volatility
from diffgraft_black_scholes.scorers import CLIP, ClipScore, clip, colours
from diffgraft_pipelines.tiny import make
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from PIL import Image

CASES = contract_sample("black_scholes", __version__)
"""Each check once and each family once; which meet changes with the version. All of them: ``diffgraft check``, or ``contract_cases``."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case) -> None:
    case.run()


# the formulas ---------------------------------------------------------------------------------------------------------------------


def exact(spot, rate, s, left, strike=100.0):
    """Black-Scholes written out with the error function."""
    spread = s * math.sqrt(left)
    d1 = (math.log(spot / strike) + (rate + s * s / 2) * left) / spread
    normal = [0.5 * math.erfc(-d / math.sqrt(2)) for d in (d1, d1 - spread)]
    return spot * normal[0] - strike * math.exp(-rate * left) * normal[1]


def real(value):
    return torch.tensor(value, dtype=torch.float64)


def test_the_price_is_the_closed_form():
    """Hull's textbook example (S 42, K 40, r .1, s .2, half a year: 4.76), and 500 random options."""
    assert call_price(real(42.0), 0.1, 0.2, 0.5, 40.0).item() == pytest.approx(4.7594, abs=5e-5)
    draw = torch.Generator().manual_seed(0)
    for a, b, c, d in torch.rand(500, 4, generator=draw, dtype=torch.float64).tolist():
        spot, rate, s, left = 40 + 160 * a, 0.1 * b, 0.02 + 0.5 * c, 1 + 49 * d
        assert call_price(real(spot), rate, s, left).item() == pytest.approx(exact(spot, rate, s, left), rel=1e-10, abs=1e-10)


def test_the_price_is_the_expected_pay_off():
    """exp(-r tau) E[max(S_tau - K, 0)] under dS = r S dt + s S dW, by 4 million draws."""
    spot, rate, s, left = 90.0, 0.02, 0.1, 9.0
    z = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    end = spot * torch.exp((rate - s * s / 2) * left + s * math.sqrt(left) * z)
    paid = math.exp(-rate * left) * (end - 100).clamp(min=0)
    assert abs(call_price(real(spot), rate, s, left).item() - paid.mean().item()) < 4 * paid.std().item() / 2000


def test_the_logarithm_tells_prices_apart_that_are_no_numbers():
    """CLIP's logits are a quarter of the strike: near the end of a run a price is exp(-1000) and less."""
    spots = torch.linspace(20, 30, 200, dtype=torch.float64)
    for s in (LEAST_VOLATILITY, 0.02, 0.1):
        for left in (1, 10, 100):
            found = log_call(spots, 0.01, s, left)
            assert found.isfinite().all()
            assert (found.diff() > 0).all()
    assert (call_price(spots, 0.01, 0.02, 1) == 0).all()


def test_the_cheaper_option_is_that_of_the_lower_score():
    """All else is equal for the two, and a call is worth more the more its asset is: the rule is min-score selection."""
    draw = torch.Generator().manual_seed(0)
    for i in range(200):
        spots = 1 + 150 * torch.rand(2, 64, generator=draw, dtype=torch.float64)
        s, left = 0.01 + 0.1 * float(torch.rand((), generator=draw)), 1 + i % 50
        assert torch.equal(takes_second(*log_call(spots, 1 / 50, s, left)), spots[0] >= spots[1])


def test_the_official_value_is_nothing_but_rounding():
    """S n(d1) = K exp(-r tau) n(d2) for the density n. What is left chooses as a coin does, and late in a run nothing is left."""
    table = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    table.set_timesteps(100)
    draw = torch.Generator().manual_seed(0)
    right, asked = 0, 0
    for i, t in enumerate(table.timesteps.tolist()):
        spots = 18 + 15 * torch.rand(2, 100, generator=draw, dtype=torch.float64)
        s = float(volatility(table.alphas_cumprod[t + 1], table.alphas_cumprod[t]))
        values = official_value(spots, 0.01, s, 100 - i)
        assert values.abs().max() < 4e-5  # of terms of up to 33
        differ = values[0] != values[1]
        asked += int(differ.sum())
        right += int((takes_second(*values) == (spots[0] >= spots[1]))[differ].sum())
        if i >= 96:
            assert not differ.any()
            assert takes_second(*values).all()
    assert asked > 8000
    assert 0.47 < right / asked < 0.53  # chance: 3.5 standard errors are .02


def test_the_volatility_is_the_schedulers():
    """DDIM's own posterior variance of one training step."""
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    abar = scheduler.alphas_cumprod
    for t in (0, 1, 500, 998):
        assert float(volatility(abar[t + 1], abar[t])) == pytest.approx(float(scheduler._get_variance(t + 1, t)) ** 0.5, rel=1e-6)
    assert float(volatility(real(1.0) - 1e-15, real(1.0))) == pytest.approx(LEAST_VOLATILITY)
    sigma = real(0.6)  # of a flow model: a = .4, s = .6
    assert float(abar_of_flow(sigma)) == pytest.approx(0.16 / 0.52)


# in pipelines ---------------------------------------------------------------------------------------------------------------------

STEPS = 5
B = "two green dogs"


def call(made, **changes):
    kwargs = {**made.kwargs, "output_type": "latent", "num_inference_steps": STEPS, **changes}
    return made.pipe(**{"generator": torch.Generator().manual_seed(3), **kwargs})[0]


def put(made, **knobs):
    load_pipeline(made.pipe, plugins=[BlackScholes(**{"prompt": B, "scorer": colours, **knobs})])


def records(made):
    return made.pipe.plugins.report().plugins["black_scholes"].records


def constant(images, prompts):
    return [25.0] * len(images)


class Script:
    """Scores as they are written down: one (first, second) for each step; keeps what it was asked."""

    def __init__(self, *scores):
        self.scores, self.asked = scores, []

    def __call__(self, images, prompts):
        step, which = divmod(len(self.asked), 2)
        self.asked.append((list(images), list(prompts)))
        return [self.scores[step][which]] * len(images)


@pytest.mark.parametrize("rule", ["call", "official", "alternating", "average"])
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"])
def test_the_same_prompt_twice_changes_nothing(name, rule):
    made = make(name)
    before = call(made)
    put(made, prompt=str(made.kwargs["prompt"]), rule=rule)
    assert torch.equal(call(made), before)


def test_a_constant_scorer_begins_with_the_first_and_stays_with_the_second():
    """Equal prices are the second's, as in the official code: the whole order is known beforehand."""
    made = make("StableDiffusionPipeline")
    for rule in ("call", "official"):
        put(made, scorer=constant, rule=rule)
        call(made)
        assert records(made)["second"].tolist() == [[False], *[[True]] * (STEPS - 1)]
        made.pipe.plugins.clear()


def by_hand(made, takes):
    """The pipeline called with the prompt exchanged by a callback, as a user would do it without the plugin."""
    pipe, kwargs = made.pipe, made.kwargs
    texts = [pipe.encode_prompt(text, "cpu", 1, True, kwargs["negative_prompt"])[::-1] for text in (kwargs["prompt"], B)]
    embeddings = [torch.cat(pair) for pair in texts]

    def exchange(running, step, timestep, tensors):
        return {"prompt_embeds": embeddings[int(takes[min(step + 1, len(takes) - 1)])]}

    return call(made, callback_on_step_end=exchange, callback_on_step_end_tensor_inputs=["prompt_embeds"])


@pytest.mark.parametrize("rule", ["call", "alternating"])
def test_a_run_is_the_pipelines_own_with_the_prompt_exchanged(rule):
    """The lower score is denoised with next; nothing else changes, bit for bit."""
    made, script = make("StableDiffusionPipeline"), Script((30.0, 20.0), (20.0, 30.0), (25.0, 25.0), (20.0, 21.0))
    order = [False, True, False, True, False]
    plain = by_hand(made, order)
    put(made, rule=rule, scorer=script)
    assert torch.equal(call(made), plain)
    assert records(made)["second"].flatten().tolist() == order
    if rule == "call":
        assert records(made)["spots"].shape == records(made)["prices"].shape == (STEPS - 1, 2, 1)
        assert [prompts for _, prompts in script.asked[:2]] == [[made.kwargs["prompt"]], [B]]
        assert len(script.asked) == 2 * (STEPS - 1)  # behind the last step there is nothing to choose


SCHEDULERS = [DDIMScheduler, PNDMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_forecast_leaves_the_scheduler_alone(scheduler):
    """Multistep histories, counters and noise: a run whose choices change nothing is the plain one, and ``step`` is called as often."""
    made, calls = make("StableDiffusionPipeline"), []

    class Counting(scheduler):
        def step(self, *args, **kwargs):
            calls.append(args)
            return super().step(*args, **kwargs)

    options = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
    made.pipe.scheduler = Counting.from_config(made.pipe.scheduler.config, **options)
    plain = call(made)
    asked = len(calls)
    put(made, prompt=str(made.kwargs["prompt"]))
    assert torch.equal(call(made), plain)
    assert len(calls) == 2 * asked == 2 * len(made.pipe.scheduler.timesteps)
    report = made.pipe.plugins.report()
    assert report.plugins["black_scholes"].total("previews") == STEPS - 1  # one a step of the solver, not one a call of the scheduler
    assert report.forwards == {"both": asked}  # no forward more than the plain pipeline's


def test_the_forecast_is_the_schedulers_clean_sample():
    """DDIM tells its own x0 of the same step: the pictures that are scored are those."""
    made, script, wanted = make("StableDiffusionPipeline"), Script(*[(30.0, 20.0)] * STEPS), []

    class Telling(DDIMScheduler):
        def step(self, *args, **kwargs):
            wanted.append(super().step(*args, **{**kwargs, "return_dict": True}).pred_original_sample)
            return super().step(*args, **kwargs)

    made.pipe.scheduler = Telling.from_config(made.pipe.scheduler.config)
    put(made, scorer=script)
    call(made)
    for x0, (images, _) in zip(wanted, script.asked[::2], strict=False):
        pixels = made.pipe.vae.decode(x0 / made.pipe.vae.config.scaling_factor).sample
        [image] = made.pipe.image_processor.postprocess(pixels.detach(), output_type="pil")
        assert np.abs(np.asarray(image, dtype=int) - np.asarray(images[0], dtype=int)).max() <= 1


def test_each_sample_of_a_batch_chooses_for_itself():
    made = make("StableDiffusionXLPipeline")

    def of_the_first_words(images, prompts):
        return [{"a ": 20.0, "th": 40.0, "tw": 30.0}[prompt[:2]] for prompt in prompts]

    put(made, prompt=(B, B), scorer=of_the_first_words)
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    prompts = ["a cat", "three cars"]
    both = call(made, prompt=prompts, negative_prompt=["x", "y"], generator=seeds)
    assert records(made)["second"].T.tolist() == [[False] * STEPS, [False, *[True] * (STEPS - 1)]]
    assert "second prompt: 0 of 5, 4 of 5" in str(made.pipe.plugins.report())
    made.pipe.plugins.configure("black_scholes", prompt=B)
    one = call(made, prompt=prompts[1], negative_prompt="y", generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(both[1:], one, rtol=1e-3, atol=1e-3)
    call(made, prompt=prompts, negative_prompt=["x", "y"], num_images_per_prompt=2)
    assert records(made)["second"][-1].tolist() == [False, False, True, True]


def test_the_mean_is_the_mean_of_the_embeddings():
    made = make("StableDiffusionPipeline")
    pipe, kwargs = made.pipe, made.kwargs
    (one, negative), (two, _) = (pipe.encode_prompt(text, "cpu", 1, True, kwargs["negative_prompt"]) for text in (kwargs["prompt"], B))
    plain = call(made, prompt=None, negative_prompt=None, prompt_embeds=(one + two) / 2, negative_prompt_embeds=negative)
    put(made, rule="average", scorer=None)
    torch.testing.assert_close(call(made), plain, rtol=1e-5, atol=1e-5)


def test_log_probabilities_become_percent():
    made = make("StableDiffusionPipeline")
    put(made, spot="percent", scorer=lambda images, prompts: [math.log(0.25)] * len(images))
    call(made)
    torch.testing.assert_close(records(made)["spots"], torch.full((STEPS - 1, 2, 1), 25.0, dtype=torch.float64))


def test_very_low_scores_are_told_apart():
    """100 exp(-600) is far from the strike: both prices are 0, and the lower score's prompt comes next all the same."""
    made = make("FluxPipeline")
    put(made, spot="percent", scorer=Script(*[(-600.0, -599.0)] * STEPS))
    call(made)
    assert not records(made)["second"].any(), "the first prompt has the lower score at every step"


def test_a_knob_that_the_rule_does_not_use_is_named():
    made = make("StableDiffusionPipeline")
    put(made, rule="alternating", captions=("a", "b"))
    call(made)
    assert "not used with rule = 'alternating': scorer, captions" in str(made.pipe.plugins.report())


def test_a_tiny_decoder_makes_the_previews():
    made, script = make("StableDiffusionPipeline"), Script(*[(30.0, 20.0)] * STEPS)
    put(made, scorer=script, decoder=lambda latents: torch.zeros(len(latents), 3, 8, 8))
    call(made)
    assert {image.size for images, _ in script.asked for image in images} == {(8, 8)}
    made.pipe.plugins.configure("black_scholes", decoder=lambda latents: latents, scorer=colours)
    with pytest.raises(ConfigError, match=r"decoder gave \(1, 4, 8, 8\): it must give pixels \[1, 3"):
        call(made)
    made.pipe.plugins.configure("black_scholes", decoder=lambda latents: latents[:, :3] * math.nan)
    with pytest.raises(ConfigError, match="not finite"):
        call(made)


def test_embeddings_need_captions():
    made = make("StableDiffusionPipeline")
    embedding, negative = made.pipe.encode_prompt("a cat", "cpu", 1, True, "")
    given = {"prompt": None, "negative_prompt": None, "prompt_embeds": embedding, "negative_prompt_embeds": negative}
    script = Script(*[(30.0, 20.0)] * STEPS)
    put(made, scorer=script)
    with pytest.raises(ConfigError, match="give captions"):
        call(made, **given)
    assert not script.asked
    made.pipe.plugins.configure("black_scholes", captions=("a cat", "dogs"))
    call(made, **given)
    assert [prompts for _, prompts in script.asked[:2]] == [["a cat"], ["dogs"]]
    longer = {**given, "prompt_embeds": torch.cat([embedding] * 2, 1), "negative_prompt_embeds": torch.cat([negative] * 2, 1)}
    with pytest.raises(Unsupported, match="with as many tokens as the pipeline makes itself"):
        call(made, **longer)


def test_bad_input_is_refused_with_the_way_out():
    made = make("StableDiffusionPipeline")
    with pytest.raises(ConfigError, match="rule = 'alternating'"):
        BlackScholes(prompt=B)
    with pytest.raises(ConfigError, match="decoder"):
        BlackScholes(prompt=B, scorer=colours, decoder=1)
    put(made, prompt=("a", "b", "c"))
    with pytest.raises(ConfigError, match="3 texts for a call with 1 prompts; give one for each, or one text"):
        call(made)
    for scorer, spot, told in (
        (lambda images, prompts: [-1.0] * len(images), "score", "spot = 'percent' takes log-probabilities"),
        (lambda images, prompts: [900.0] * len(images), "percent", "its exponential is no number"),
    ):
        made.pipe.plugins.configure("black_scholes", prompt=B, scorer=scorer, spot=spot)
        with pytest.raises(RewardError, match=told):
            call(made)
    made.pipe.plugins.clear()
    made.pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(Unsupported, match="EDM's epsilon"):
        put(made)
    made = make("StableDiffusionPipeline")
    made.pipe.vae = None
    with pytest.raises(Unsupported, match=r"no autoencoder.*or give decoder"):
        put(made)


class Answers(Plugin):
    """Makes the scheduler's step itself."""

    name = "answers"
    paper = Paper("none", "0000.00000", "answers")
    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}
    effects = Effects(edits=frozenset({"latents"}))

    def step(self, call, next):
        return StepOutput(call.sample)


class Searches(Answers):
    name = "searches"
    effects = Effects(needs=frozenset({"own_steps"}))

    def step(self, call, next):
        return next(call)


def test_steps_that_are_none_are_refused():
    for other, told in ((Answers, "put black_scholes first"), (Searches, "the calls of searches are no successive steps")):
        made = make("StableDiffusionPipeline")
        load_pipeline(made.pipe, plugins=[other(), BlackScholes(prompt=B, scorer=colours)])
        with pytest.raises(Unsupported, match=told):
            call(made)


def test_clip_is_the_papers_scorer(tmp_path, monkeypatch):
    """|logit| of each picture and its own text, on a random CLIP of the real layout."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = make("StableDiffusionPipeline").pipe.tokenizer
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 16}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(tmp_path)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(tmp_path)
    score = ClipScore.from_pretrained(str(tmp_path))
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green")]
    found = score(pictures, ["a cat", "a green dog"])
    inputs = score.processor(text=["a cat", "a green dog"], images=pictures, return_tensors="pt", padding=True)
    with torch.no_grad():
        image, text = (score.model.visual_projection, score.model.text_projection)
        seen = image(score.model.vision_model(inputs.pixel_values).pooler_output)
        said = text(score.model.text_model(inputs.input_ids, inputs.attention_mask).pooler_output)
        cosine = torch.cosine_similarity(seen, said) * score.model.logit_scale.exp()
    torch.testing.assert_close(torch.tensor(found), cosine.abs(), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("diffgraft_black_scholes.scorers._paper_clip", lambda: score)
    assert clip(pictures, ["a cat", "a green dog"]) == found
    assert CLIP == "openai/clip-vit-base-patch32"
    made = make("StableDiffusionPipeline")
    put(made, scorer=score)
    assert call(made).isfinite().all()


def test_colours_need_no_model():
    red, green = (Image.new("RGB", (4, 4), colour) for colour in ("red", "green"))
    assert colours([red, green, red], ["a red car", "a red car", "a car"])[::2] == [100.0, 50.0]
    assert colours([green], ["a red car"])[0] < 60


def test_a_run_that_never_took_the_second_prompt_says_so():
    made = make("StableDiffusionPipeline")
    before = call(made)
    put(made, scorer=Script(*[(20.0, 30.0)] * STEPS))
    assert torch.equal(call(made), before)
    assert "inactive: no step took the second prompt" in str(made.pipe.plugins.report())


def test_without_a_second_prompt_it_says_that_it_did_nothing():
    made = make("StableDiffusionPipeline")
    before = call(made)
    load_pipeline(made.pipe, plugins=[BlackScholes])
    assert torch.equal(call(made), before)
    [note] = made.pipe.plugins.report().plugins["black_scholes"].notes
    assert note.startswith("inactive: prompt is none")
