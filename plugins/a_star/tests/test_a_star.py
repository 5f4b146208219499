"""A-STAR: its losses in closed form, the concepts' tokens, and what it does to a run."""

from __future__ import annotations

import math

import pytest
import torch
from diffgraft import ConfigError, Paper, Plugin, Unsupported, load_pipeline, unload
from diffgraft_a_star import AStar
from diffgraft_a_star.maps import choose, probabilities, side_lengths, token_weights
from diffgraft_a_star.method import binarised, concept_maps, retention, segregation, sharpened, smoothed, step_size
from diffgraft_a_star.tokens import nouns
from diffgraft_pipelines.tiny import make
from diffusers import EulerDiscreteScheduler

SD, XL, PIXART = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "PixArtAlphaPipeline"
PROMPT = "a cat face on the left and a star on the right"


def tiny(name=SD, prompt=PROMPT):
    made = make(name)
    made.kwargs["prompt"] = prompt
    longer = {"max_sequence_length": 64} if name == PIXART else {}
    negative = {"negative_prompt": [""] * len(prompt)} if isinstance(prompt, list) else {}
    return made.pipe, {**made.kwargs, "num_inference_steps": 3, "output_type": "latent", **longer, **negative}


def generate(pipe, kwargs, seed=0, **more):
    call = {**kwargs, **more}
    count = len(call["prompt"]) if isinstance(call.get("prompt"), list) else 1
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count * call.get("num_images_per_prompt", 1))]
    return pipe(**call, generator=generators)[0]


class Recording(AStar):
    """Keeps the losses and the concepts' tokens."""

    name = "a_star"

    def run(self, call, next):
        result = super().run(call, next)
        self.concepts = call.shared.concepts
        self.losses_of_steps = call.shared.losses[:]
        return result


def recorded(pipe, kwargs, seed=0, call=(), **knobs):
    """(latents, losses [steps, batch], concepts)."""
    plugin = Recording(**knobs)
    load_pipeline(pipe, plugins=[plugin])
    try:
        latents = generate(pipe, kwargs, seed, **dict(call))
    finally:
        unload(pipe)
    return latents, torch.stack(plugin.losses_of_steps) if plugin.losses_of_steps else None, plugin.concepts


# the equations ---------------------------------------------------------------------------------------------------------------------


def maps(*concepts):
    """[1, M, h, w]."""
    return torch.tensor(concepts, dtype=torch.float32)[None]


ALL = torch.tensor([[True, True]])
LEFT, RIGHT = [[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]


def test_segregation_is_half_for_equal_maps_and_nought_for_disjoint_ones():
    assert float(segregation(maps(LEFT, LEFT), ALL)) == 0.5
    assert float(segregation(maps(LEFT, RIGHT), ALL)) == 0
    assert float(segregation(maps(LEFT), ALL[:, :1])) == 0, "one concept"
    # by hand: min = .1 + .2, sum = .1 + .4 + .3 + .2
    assert float(segregation(maps([[0.1, 0.4]], [[0.3, 0.2]]), ALL)) == pytest.approx(0.3 / 1.0)
    assert float(segregation(0.01 * maps([[0.1, 0.4]], [[0.3, 0.2]]), ALL)) == pytest.approx(0.3), "it does not depend on the maps' scale"


def test_segregation_sums_over_pairs():
    A = maps(LEFT, RIGHT, LEFT)
    assert float(segregation(A, torch.tensor([[True] * 3]))) == 0.5
    assert float(segregation(A, torch.tensor([[True, True, False]]))) == 0, "a concept that the prompt does not have"


def test_retention_is_at_least_half_for_each_concept():
    A = maps(LEFT, RIGHT)
    assert float(retention(A, A, ALL)) == 1.0, "two concepts, each kept exactly"
    assert float(retention(A, A.flip(-1), ALL)) == 2.0, "both lost"
    assert float(retention(A, A.flip(-1), torch.tensor([[True, False]]))) == 1.0
    random = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    there = torch.ones(5, 3, dtype=torch.bool)
    assert bool((retention(random, binarised(random, "mean"), there) >= 1.5).all())


def test_masks():
    A = maps([[0.1, 0.2], [0.3, 0.8]])
    assert binarised(A, "mean").tolist() == [[[[0, 0], [0, 1]]]]
    assert binarised(A * 0 + maps([[0.1, 0.4], [0.45, 0.8]]), "half_max").tolist() == [[[[0, 0], [1, 1]]]]


def test_step_size_is_attend_and_excites():
    N, scale = 50, torch.linspace(1.0, 0.5, 50, dtype=torch.float64)
    for i in (0, 7, 49):
        assert step_size(20, 0.5, i, N) == pytest.approx(20 * float(scale[i].sqrt()))
    assert step_size(20, 1.0, 30, N) == 20
    assert step_size(20, 0.5, 0, 1) == 20


def test_tokens_of_a_concept_are_averaged():
    P = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0))
    W = token_weights([[(1,), (2, 3)], [(5,)]], 2, 6)
    A = concept_maps(P, W)
    torch.testing.assert_close(A[0, 1], P[0, :, 2:4].mean(-1))
    torch.testing.assert_close(A[1, 0], P[1, :, 5])
    assert float(A[1, 1].abs().max()) == 0
    assert token_weights([[(1,)], [(2,)]], 6, 3).argmax(-1)[:, 0].tolist() == [1, 1, 1, 2, 2, 2], "several pictures a prompt stay together"


def test_sharpening_and_smoothing_are_attend_and_excites():
    P = torch.rand(1, 4, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)
    out = sharpened(P, 100.0, 1)
    torch.testing.assert_close(out[..., 1:-1], (100 * P[..., 1:-1]).softmax(-1))
    assert float(out[..., [0, -1]].abs().max()) == 0
    spot = torch.zeros(1, 1, 5, 5)
    spot[..., 2, 2] = 1
    g = torch.tensor([math.exp(-2.0), 1.0, math.exp(-2.0)])
    torch.testing.assert_close(smoothed(spot, 0.5)[0, 0, 1:4, 1:4], torch.outer(g, g) / g.sum() ** 2)
    torch.testing.assert_close(smoothed(torch.ones(2, 3, 4, 4), 1.0), torch.ones(2, 3, 4, 4))


# which maps ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "found", "expected"),
    [
        ((64, 64), [4096, 1024, 256, 64], 256),  # Stable Diffusion 1.x, 512 pixels: the paper's
        ((96, 96), [9216, 2304, 576, 144], 576),  # 2.x, 768
        ((128, 128), [4096, 1024], 1024),  # SDXL, 1024
        ((128, 128), [4096], 4096),  # PixArt
        ((64, 128), [8192, 2048, 512, 128], 512),
        ((16, 16), [64, 16], 64),  # emoji-sd
        ((18, 30), [540, 135, 40], 540),  # odd sides are rounded up
    ],
)
def test_the_default_resolution(size, found, expected):
    assert choose(found, size, None) == expected


def test_a_resolution_that_the_model_does_not_have():
    assert side_lengths(40, (18, 30)) == (5, 8)
    assert side_lengths(77, (18, 30)) is None
    assert choose([4096, 1024], (128, 128), 64) == 4096
    with pytest.raises(ConfigError, match=r"resolution = 16.*they have: 32, 64"):
        choose([4096, 1024], (128, 128), 16)
    pipe, kwargs = tiny()
    load_pipeline(pipe, plugins={"a_star": {"resolution": 7}})
    with pytest.raises(ConfigError, match=r"resolution = 7.*they have: 2, 4, 8"):
        generate(pipe, kwargs)
    pipe.plugins.configure("a_star", resolution=8)
    generate(pipe, kwargs)


@pytest.mark.parametrize("name", [SD, XL, PIXART])
def test_maps_are_the_attention_of_the_layer(name):
    """Put in the place of the layer's own attention they give its output (PixArt with padding masked)."""

    class Replay(Plugin):
        paper, families, neutral = Paper("a probe", "0000.00000", "replays"), ("*",), {}
        worst, seen = 0.0, 0

        def attention(self, call, next):
            out = next(call)
            if call.info.is_cross:
                attn, text = call.attn, call["encoder_hidden_states"]
                one = type(self).heads_apart(call, attn, text)
                self.worst = max(self.worst, float((attn.to_out[0](one) - out).abs().max()))
                self.seen += 1
            return out

        @staticmethod
        def heads_apart(call, attn, text):
            """Attention by maps, one head at a time: the mean over one head is that head."""
            d, heads = attn.to_v.out_features // attn.heads, []
            for h in range(attn.heads):
                rows = slice(h * d, (h + 1) * d)
                head = Head(attn, rows)
                given = call.replace(**({"attention_mask": call["attention_mask"]} if call.get("attention_mask") is not None else {}))
                given.info = type("Info", (), {"module": head})
                heads.append(probabilities(given) @ attn.to_v(text)[..., rows])
            return torch.cat(heads, -1)

    class Head:
        """One head of an attention layer as a layer of one head."""

        def __init__(self, attn, rows):
            self.heads, self.scale = 1, attn.scale
            self.norm_cross, self.group_norm, self.norm_q, self.norm_k = None, None, None, None
            self.to_q, self.to_k = (lambda x, m=m: m(x)[..., rows] for m in (attn.to_q, attn.to_k))

        def prepare_attention_mask(self, mask, length, rows):
            assert mask.shape[-1] == length
            return mask

    pipe, kwargs = tiny(name)
    plugin = type("Named", (Replay,), {"name": "replay"})()
    load_pipeline(pipe, plugins=[plugin])
    generate(pipe, kwargs, num_inference_steps=2)
    assert plugin.seen > 0
    assert plugin.worst < 1e-5


# which tokens ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (PROMPT, ["cat face", "star"]),
        ("a cat and a dog", ["cat", "dog"]),
        ("A small red apple at the top and an alarm clock at the bottom, blue background", ["apple", "alarm clock"]),
        ("two lions and a bird and the moon", ["lions", "bird", "moon"]),
        ("a cat", ["cat"]),
        ("a black and white cat", []),
    ],
)
def test_nouns_joined_by_and(prompt, expected):
    assert nouns(prompt) == expected


@pytest.mark.parametrize("name", [SD, XL, PIXART])
def test_words_are_found_in_the_prompt(name):
    """The tiny tokenizers have a token a character: CLIP's leave spaces out and begin with a special token, T5's begins words with one."""
    pipe, kwargs = tiny(name)
    clip = name != PIXART
    text = "^" + PROMPT.replace(" ", "") if clip else "_" + PROMPT.replace(" ", "_")

    def tokens(word):
        word = word.replace(" ", "") if clip else "_" + word.replace(" ", "_")
        return tuple(range(text.index(word), text.index(word) + len(word)))

    _, _, concepts = recorded(pipe, kwargs, alpha=1e-9)
    assert concepts == [[tokens("cat face"), tokens("star")]]
    _, _, concepts = recorded(pipe, kwargs, alpha=1e-9, objects=["Star", 3, (4, 5)])
    assert concepts == [[tokens("star"), (3,), (4, 5)]]


@pytest.mark.parametrize("objects", [None, ["<mycat>", "dog"]])
def test_a_learned_word_of_several_tokens(objects):
    """Textual inversion: diffusers writes out "<mycat>" as "<mycat> <mycat>_1"."""
    pipe, kwargs = tiny(prompt="a red <mycat> and a dog")
    pipe.tokenizer.add_tokens(["<mycat>", "<mycat>_1"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    _, _, concepts = recorded(pipe, kwargs, alpha=1e-9, objects=objects)
    ids = pipe.tokenizer("a red <mycat> <mycat>_1 and a dog").input_ids
    cat = [ids.index(pipe.tokenizer.convert_tokens_to_ids(token)) for token in ("<mycat>", "<mycat>_1")]
    assert concepts == [[tuple(cat), tuple(range(len(ids) - 4, len(ids) - 1))]]


def test_a_word_inside_a_token_is_refused():
    pipe, kwargs = tiny(prompt="a <mycat> and a dog")
    pipe.tokenizer.add_tokens(["<mycat>"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    with pytest.raises(ConfigError, match=r"mycat.*give their indices"):
        recorded(pipe, kwargs, objects=["mycat", "dog"])


def test_a_word_asked_for_twice_is_its_two_occurrences():
    pipe, kwargs = tiny(prompt="a cat and a cat in a catalogue")
    _, _, concepts = recorded(pipe, kwargs, alpha=1e-9)
    text = "acatandacat"
    assert concepts[0] == [tuple(range(2, 5)), tuple(range(text.rindex("cat") + 1, text.rindex("cat") + 4))]
    with pytest.raises(ConfigError, match="3 times"):
        recorded(pipe, kwargs, objects=["cat"] * 3)


@pytest.mark.parametrize(
    ("prompt", "objects", "words"),
    [
        ("a red apple", None, ["a red apple", "two objects", "objects="]),
        (["a cat and a dog", "a star"], None, ["a star", "star"]),
        (PROMPT, ["cat face", "dog"], ["dog", PROMPT]),
        (PROMPT, ["cat", "sta"], ["sta"]),
        (PROMPT, [3, 77], ["77", "0 to 76"]),
        (40 * "very " + "nice cat and a dog", ["cat", "dog"], ["dog", "0 to 76"]),
    ],
)
def test_prompts_without_the_objects_are_refused_before_anything_runs(prompt, objects, words):
    pipe, kwargs = tiny(prompt=prompt)
    load_pipeline(pipe, plugins={"a_star": {"objects": objects}})
    encoded = []
    pipe.text_encoder.register_forward_pre_hook(lambda *_: encoded.append(1))
    with pytest.raises(ConfigError) as error:
        generate(pipe, kwargs)
    assert all(word in str(error.value) for word in ["a_star", *words]), str(error.value)
    assert not encoded
    pipe.plugins.disable("a_star")
    generate(pipe, kwargs)


def test_embeddings_take_indices():
    pipe, kwargs = tiny()
    embeds, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True, "")
    given = {**kwargs, "prompt": None, "negative_prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    with pytest.raises(ConfigError, match="prompt_embeds"):
        recorded(pipe, given)
    with pytest.raises(ConfigError, match="0 to 76"):
        recorded(pipe, given, objects=[2, 80])
    by_words, _, concepts = recorded(pipe, {**kwargs, "negative_prompt": ""})
    by_index, _, _ = recorded(pipe, given, objects=concepts[0])
    torch.testing.assert_close(by_index, by_words)


@pytest.mark.parametrize("objects", ["cat", [], 3, [1.5], [None]])
def test_bad_objects(objects):
    with pytest.raises(ConfigError, match="objects"):
        AStar(objects=objects)


@pytest.mark.parametrize(
    ("knob", "value"), [("alpha", -1), ("threshold", "median"), ("last", 0), ("smoothing", -1), ("sharpen", 0), ("alpha_end", 2)]
)
def test_bad_knobs(knob, value):
    with pytest.raises(ConfigError, match=knob):
        AStar(**{knob: value})


# what it does to a run -------------------------------------------------------------------------------------------------------------


class Twice(Recording):
    """Looks at the loss before and after every step's correction; the masks stay those of the step before."""

    def denoise(self, call, next):
        memory = call.shared

        def look(inner):
            now = memory.now
            with torch.no_grad():
                self.after.append(self.losses(inner, inner.latents))
            memory.now, memory.collector = now, None
            return next(inner)

        return super().denoise(call, look)


@pytest.mark.parametrize("name", [SD, XL, PIXART])
def test_one_gradient_step_lowers_the_loss(name):
    pipe, kwargs = tiny(name, [PROMPT, "a dog and a cat"])
    plugin = Twice(alpha=5.0)
    plugin.after = []
    load_pipeline(pipe, plugins=[plugin])
    generate(pipe, kwargs)
    before, after = torch.stack(plugin.losses_of_steps), torch.stack(plugin.after)
    assert before.shape == after.shape == (3, 2)
    assert bool((after < before).all()), (before, after)


def test_the_losses_over_a_run():
    pipe, kwargs = tiny()
    _, plain, _ = recorded(pipe, kwargs, alpha=1e-9)
    _, led, _ = recorded(pipe, kwargs, alpha=20.0)
    assert float(plain[0]) == pytest.approx(float(led[0])), "nothing was corrected before the first step"
    assert float(plain[0]) <= 0.5, "no masks yet: L_seg alone"
    assert float(plain[1]) >= 1.0, "L_ret of two concepts joins"
    assert float(led[1:].sum()) < float(plain[1:].sum())
    _, only, _ = recorded(pipe, kwargs, alpha=1e-9, retention=0)
    assert float(only.max()) <= 0.5
    _, only, _ = recorded(pipe, kwargs, alpha=1e-9, segregation=0)
    assert float(only[0]) == 0


def test_a_single_concept_is_retained_only():
    pipe, kwargs = tiny()
    _, losses, _ = recorded(pipe, kwargs, alpha=1e-9, objects=["star"])
    assert float(losses[0]) == 0
    assert 0.5 <= float(losses[1]) <= 1


def test_the_latents_move_by_alpha_times_the_gradient():
    """Seen from the neighbour inside it, at every step; the scheduler gets the same latents as the denoiser."""

    class Inner(Plugin):
        paper, families, neutral, name = Paper("a probe", "0000.00000", "sees"), ("*",), {}, "inner"
        inputs, samples = [], []

        def denoise(self, call, next):
            self.inputs.append(call.latents)
            return next(call)

        def step(self, call, next):
            self.samples.append(call.sample)
            return next(call)

    pipe, kwargs = tiny()
    inner = Inner()
    load_pipeline(pipe, plugins=[AStar(alpha=2.0), inner])
    generate(pipe, kwargs)
    assert all(torch.equal(a, b) for a, b in zip(inner.inputs, inner.samples, strict=True))


def test_only_the_first_steps():
    pipe, kwargs = tiny()
    load_pipeline(pipe, plugins={"a_star": {"last": 2}})
    generate(pipe, kwargs)
    assert pipe.plugins.report().plugins["a_star"].total("gradient passes") == 2


def test_scaled_latents_get_the_same_step():
    """Under a scheduler that keeps x0 + sigma eps the correction is that of unit-variance latents, scaled up with them."""
    moves = {}
    for name in ("ddim", "euler"):
        pipe, kwargs = tiny()
        if name == "euler":
            pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)

        class Inner(Plugin):
            paper, families, neutral, name = Paper("a probe", "0000.00000", "sees"), ("*",), {}, "inner"
            got: list = []  # noqa: RUF012

            def denoise(self, call, next):
                if call.step.index == 0:
                    self.got.append(call.sample.chunk(2)[0])
                return next(call)

        inner = Inner()
        inner.got = []
        for alpha in (0.0, 5.0):
            load_pipeline(pipe, plugins=[AStar(alpha=alpha), inner])
            start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
            generate(pipe, kwargs, latents=start)
            unload(pipe)
        moves[name] = inner.got[1] - inner.got[0]
    size = float(moves["ddim"].norm())
    assert size > 0
    assert float(moves["euler"].norm()) == pytest.approx(size, rel=0.2)
    assert float(torch.cosine_similarity(moves["ddim"].flatten(), moves["euler"].flatten(), 0)) > 0.9


def test_samples_are_corrected_each_for_itself():
    """Prompts with two and with three objects in a batch, two pictures each, against each prompt alone."""
    prompts = [PROMPT, "a cat and a dog and a bird"]
    pipe, kwargs = tiny(prompt=prompts)
    both, losses, _ = recorded(pipe, kwargs, call={"num_images_per_prompt": 2})
    assert losses.shape == (3, 4)
    for p, prompt in enumerate(prompts):
        alone, own, _ = recorded(pipe, {**kwargs, "prompt": prompt, "negative_prompt": ""}, 2 * p, call={"num_images_per_prompt": 2})
        torch.testing.assert_close(both[2 * p : 2 * p + 2], alone, rtol=0, atol=1e-4)
        torch.testing.assert_close(losses[:, 2 * p : 2 * p + 2], own, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [SD, PIXART])
@pytest.mark.parametrize("knobs", [{"checkpointing": True}, {"sharpen": 100.0}, {"smoothing": 0.5}, {"threshold": "half_max"}])
def test_options(name, knobs):
    pipe, kwargs = tiny(name)
    usual, losses, _ = recorded(pipe, kwargs)
    other, changed, _ = recorded(pipe, kwargs, **knobs)
    if "checkpointing" in knobs:
        torch.testing.assert_close(other, usual, rtol=0, atol=1e-4)
        torch.testing.assert_close(changed, losses, rtol=0, atol=1e-5)
    else:
        assert not torch.equal(other, usual)
        assert float((changed - losses).abs().max()) > 1e-6


def test_the_denoiser_call_for_the_maps_ends_early():
    """After the last layer with maps of the wanted size nothing more runs, from the second step on."""
    pipe, kwargs = tiny()
    calls = []
    pipe.unet.conv_out.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    recorded(pipe, kwargs)
    assert calls.count(False) == 3
    assert calls.count(True) == 1


def test_beside_a_cache():
    """DeepCache saves as much beside it as alone, and learns nothing from its gradient passes: with a vanishing step nothing changes."""
    pytest.importorskip("diffgraft_deepcache")
    pipe, kwargs = tiny()
    outputs = {}
    for names in (["deepcache"], ["a_star", "deepcache"], ["deepcache", "a_star"]):
        load_pipeline(pipe, plugins=[(name, {"alpha": 1e-12} if name == "a_star" else {"interval": 2}) for name in names])
        outputs[tuple(names)] = generate(pipe, kwargs)
        assert pipe.plugins.report().plugins["deepcache"].total("skipped") == 1
        assert all("past deepcache" in text for text in pipe.plugins.plan.warnings)
        unload(pipe)
    first, *others = outputs.values()
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-5)


def test_parameters_are_left_alone():
    pipe, kwargs = tiny()
    pipe.unet.requires_grad_(True)
    recorded(pipe, kwargs)
    assert all(p.requires_grad and p.grad is None for p in pipe.unet.parameters())


def test_inference_mode_is_refused_and_the_pipeline_usable_afterwards():
    pipe, kwargs = tiny()
    plain = generate(pipe, kwargs)
    load_pipeline(pipe, plugins={"a_star": {}})
    with torch.inference_mode(), pytest.raises(Unsupported, match="inference_mode"):
        generate(pipe, kwargs)
    assert torch.equal(generate(unload(pipe), kwargs), plain)
