"""NAG: its equations, a plain re-implementation of whole runs, and what it does to a pipeline."""

from __future__ import annotations

import inspect
import math
from typing import ClassVar

import diffusers
import pytest
import torch
from diffgraft import ConfigError, Effects, Paper, Plugin, Unsupported, load_pipeline, unload
from diffgraft.installed import registry
from diffgraft_nag import NAG
from diffgraft_nag.method import extrapolated, guided, length, normalized
from diffgraft_pipelines.tiny import make

SD, XL, WAN, LTX, PIXART = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "WanPipeline", "LTXPipeline", "PixArtAlphaPipeline"
LCM, MOTION, SANA, ALLEGRO = "LatentConsistencyModelPipeline", "AnimateDiffPipeline", "SanaPipeline", "AllegroPipeline"
OLDER = ["StableDiffusionModelEditingPipeline", "StableUnCLIPPipeline", "StableDiffusionGLIGENPipeline", "LDMTextToImagePipeline",
         "VersatileDiffusionTextToImagePipeline", "StableDiffusionUpscalePipeline"]  # fmt: skip
KNOBS = {"negative_prompt": "a green dog", "scale": 6.0, "tau": 1.5, "alpha": 0.5}


def tiny(name=SD, **more):
    made = make(name)
    longer = {"max_sequence_length": 64} if name == PIXART else {}
    off = {"guidance_scale": 1.0} if "guidance_scale" in made.kwargs or name in (SD, XL, WAN, LTX, PIXART, MOTION) else {}
    made.pipe.set_progress_bar_config(disable=True)
    made.kwargs.pop("negative_prompt", None)
    return made.pipe, {**made.kwargs, **off, "num_inference_steps": 2, "output_type": "latent", **longer, **more}


def generate(pipe, kwargs, plugins=(), seed=0, **more):
    call = {**kwargs, **more}
    count = len(call["prompt"]) if isinstance(call.get("prompt"), list) else 1
    each = call.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count * each)]
    load_pipeline(pipe, plugins=plugins)
    try:
        return torch.as_tensor(pipe(**call, generator=generators if len(generators) > 1 else generators[0])[0])
    finally:
        unload(pipe)


def nag(**knobs):
    return {"nag": {**KNOBS, **knobs}}


# the equations ---------------------------------------------------------------------------------------------------------------------


def plain(Zp, Zn, scale, tau, alpha):
    """Token by token, in Python's floats."""
    out = torch.empty_like(Zp)
    for at in torch.cartesian_prod(*map(torch.arange, Zp.shape[:-1])).view(-1, Zp.ndim - 1).tolist():
        p, n = Zp[tuple(at)].tolist(), Zn[tuple(at)].tolist()
        far = [a + (scale - 1) * (a - b) for a, b in zip(p, n, strict=True)]
        ratio = math.fsum(map(abs, far)) / math.fsum(map(abs, p))
        held = [alpha * f * min(ratio, tau) / ratio + (1 - alpha) * a for f, a in zip(far, p, strict=True)]
        out[tuple(at)] = torch.tensor(held, dtype=Zp.dtype)
    return out


@pytest.mark.parametrize(("scale", "tau", "alpha"), [(5.0, 2.5, 0.25), (2.0, 1.1, 0.5), (11.0, 2.5, 1.0), (1.5, 100.0, 0.3)])
def test_the_equations_token_by_token(scale, tau, alpha):
    Zp, Zn = torch.randn(2, 2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(guided(Zp, Zn, scale, tau, alpha), plain(Zp, Zn, scale, tau, alpha), rtol=1e-12, atol=1e-12)


def test_no_token_is_longer_than_tau_and_shorter_ones_are_left_alone():
    Zp, Zn = torch.randn(2, 4, 50, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    far = extrapolated(Zp, Zn, 4.0)
    held = normalized(far, Zp, 2.5)
    ratio = length(held) / length(Zp)
    clipped = length(far) > 2.5 * length(Zp)
    assert 0 < int(clipped.sum()) < clipped.numel()
    assert float(ratio.max()) <= 2.5 + 1e-12
    assert torch.equal(held[(~clipped).expand_as(held)], far[(~clipped).expand_as(held)])


def test_the_same_text_twice_changes_nothing_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        Z = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert torch.equal(guided(Z, Z.clone(), 5.0, 2.5, 0.25), Z)


def test_tokens_of_nothing_stay_finite():
    Zp, Zn = torch.ones(1, 3, 4), torch.zeros(1, 3, 4)
    Zp[0, 0], Zn[0, 1] = 0, 2.0  # Z+ = 0; Z~ = 2 * 1 - 1 * 2 = 0
    out = guided(Zp, Zn, 2.0, 2.5, 0.5)
    assert out.isfinite().all()
    torch.testing.assert_close(out[0, :2], torch.tensor([[0.0] * 4, [0.5] * 4]))


# whole runs ------------------------------------------------------------------------------------------------------------------------


class Reference:
    """A cross-attention processor of its own for a U-Net: explicit softmax, the negative text from outside, rows given by ``rows``."""

    def __init__(self, negative, rows, scale, tau, alpha):
        self.negative, self.rows, self.knobs = negative, rows, (scale, tau, alpha)

    def features(self, attn, x, text):
        q, k, v = (each.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for each in (attn.to_q(x), attn.to_k(text), attn.to_v(text)))
        return ((q @ k.transpose(-1, -2) * attn.scale).softmax(-1) @ v).transpose(1, 2).flatten(2)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        scale, tau, alpha = self.knobs
        Zp = self.features(attn, hidden_states, encoder_hidden_states)
        Zn = self.features(attn, hidden_states[self.rows], self.negative)
        P = Zp[self.rows]
        far = scale * P - (scale - 1) * Zn
        ratio = far.abs().sum(-1, keepdim=True) / P.abs().sum(-1, keepdim=True)
        Zp[self.rows] = alpha * far * ratio.clamp(max=tau) / ratio + (1 - alpha) * P
        return attn.to_out[0](Zp)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", [SD, XL])
def test_a_run_is_the_plain_reimplementations(name, guidance):
    pipe, kwargs = tiny(name, prompt=["a cat", "two dogs"], guidance_scale=guidance, num_images_per_prompt=2)
    ours = generate(pipe, kwargs, nag(scale=8.0))
    assert not torch.equal(ours, generate(pipe, kwargs))
    texts = pipe.encode_prompt(prompt=["a green dog"] * 2, device="cpu", num_images_per_prompt=2, do_classifier_free_guidance=False)[0]
    rows = slice(0, 4) if guidance == 1 else slice(4, 8)
    before = pipe.unet.attn_processors
    reference = Reference(texts, rows, 8.0, 1.5, 0.5)
    pipe.unet.set_attn_processor({k: reference if "attn2" in k else v for k, v in before.items()})
    torch.testing.assert_close(ours, generate(pipe, kwargs), rtol=1e-4, atol=1e-5)


def test_wan_is_the_plain_reimplementation():
    """The text goes through the model's own projection, as the positive one does."""
    pipe, kwargs = tiny(WAN)
    ours = generate(pipe, kwargs, nag())
    long = kwargs.get("max_sequence_length", 512)
    raw = pipe.encode_prompt("a green dog", do_classifier_free_guidance=False, max_sequence_length=long, device="cpu")[0]
    model = pipe.transformer
    text = model.condition_embedder.text_embedder(raw.to(model.dtype))

    class OfWan(Reference):
        def features(self, attn, x, text):
            q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(text)), attn.to_v(text)
            q, k, v = (each.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for each in (q, k, v))
            return ((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
            return super().__call__(attn, hidden_states, encoder_hidden_states)

    for block in model.blocks:
        block.attn2.processor = OfWan(text, slice(None), 6.0, 1.5, 0.5)
    torch.testing.assert_close(ours, generate(pipe, kwargs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_sana_is_the_plain_reimplementation(guidance):
    """The negative text without its padding, through the model's own projection and norm."""
    pipe, kwargs = tiny(SANA, guidance_scale=guidance)
    ours = generate(pipe, kwargs, nag())
    said = {key: kwargs[key] for key in ("max_sequence_length", "complex_human_instruction")}
    raw, mask, *_ = pipe.encode_prompt("a green dog", do_classifier_free_guidance=False, device="cpu", **said)
    model = pipe.transformer
    text = model.caption_norm(model.caption_projection(raw[:, mask[0].bool()]))

    class OfSana(Reference):
        def features(self, attn, x, text):
            q, k, v = (each.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for each in (attn.to_q(x), attn.to_k(text), attn.to_v(text)))
            bias = self.bias[:, None] if text.shape[1] == self.bias.shape[-1] else 0
            return ((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            self.bias = attention_mask
            return super().__call__(attn, hidden_states, encoder_hidden_states)

    for block in model.transformer_blocks:
        block.attn2.processor = OfSana(text, slice(None) if guidance == 1 else slice(1, 2), 6.0, 1.5, 0.5)
    torch.testing.assert_close(ours, generate(pipe, kwargs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [SD, XL, LCM, MOTION, WAN, LTX, PIXART, SANA, ALLEGRO, "ChronoEditPipeline", *OLDER])
def test_the_positive_text_as_the_negative_one_changes_nothing(name):
    """Which also holds the widened text, its masks and its rows against the plain run."""
    pipe, kwargs = tiny(name)
    same = generate(pipe, kwargs, nag(negative_prompt=kwargs["prompt"], scale=9.0))
    torch.testing.assert_close(same, generate(pipe, kwargs), rtol=1e-4, atol=1e-4)
    assert float((generate(pipe, kwargs, nag(scale=9.0)) - same).abs().max()) > 1e-3  # it can fail


@pytest.mark.parametrize("name", [LTX, PIXART, SANA, ALLEGRO])
def test_padding_of_the_negative_text_has_no_say(name):
    """Texts of other lengths have other masks: what the padding's embeddings are must not matter."""
    pipe, kwargs = tiny(name)
    seen = []

    class Look(Plugin):
        name, paper, families = "look", Paper("a probe", "0000.00000", "looks"), ("*",)
        neutral: ClassVar = {}

        def attention(self, call, next):
            if call.info.is_cross:
                seen.append(call["attention_mask"])
            return next(call)

    generate(pipe, kwargs, [NAG(**{**KNOBS, "negative_prompt": "dog"}), Look()])
    negative, positive = seen[0], seen[1]
    assert negative.shape == positive.shape
    said = [int((mask > -1).sum()) for mask in (negative, positive)]
    assert said[0] == len(pipe.tokenizer("dog").input_ids) != said[1]


@pytest.mark.parametrize("name", [SD, WAN])
def test_scale_one_is_the_plain_pipeline_and_computes_nothing(name):
    pipe, kwargs = tiny(name)
    before = generate(pipe, kwargs)
    load_pipeline(pipe, plugins=nag(scale=1.0))
    after = pipe(**kwargs, generator=torch.Generator().manual_seed(0))[0]
    report = pipe.plugins.report().plugins["nag"]
    assert torch.equal(before, after)
    assert not report.counts
    assert "attention" not in report.fired


def test_guidance_cut_off_in_mid_run_leaves_sana_the_mask_of_its_prompt():
    """The pipeline hands on both branches' mask, whose first row is the other text's."""
    pipe, kwargs = tiny(SANA, guidance_scale=4.5)

    def cut(pipe, step, t, tensors):
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": tensors["prompt_embeds"][-1:]}

    kwargs |= {"callback_on_step_end": cut, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    seen = []

    class Look(Plugin):
        name, paper, families = "look", Paper("a probe", "0000.00000", "looks"), ("*",)
        neutral: ClassVar = {}

        def denoise(self, call, next):
            seen.append((len(call["encoder_hidden_states"]), call["encoder_attention_mask"]))
            return next(call)

    assert generate(pipe, kwargs, [NAG(**KNOBS), Look()]).isfinite().all()
    (two, guided), (one, unguided) = seen
    assert (two, one, len(unguided)) == (2, 1, 1)
    assert torch.equal(unguided[0], guided[1])


def test_pipelines_without_a_prompt_are_those_that_are_not_claimed():
    for family in filter(NAG.claims, registry.families().values()):
        for name in family.pipelines:
            takes = "prompt" in inspect.signature(getattr(diffusers, name).__call__).parameters
            assert takes == (NAG.why_not_on(name) is None), name


def test_a_step_stays_one_denoiser_call():
    pipe, kwargs = tiny(SD, num_inference_steps=3)
    load_pipeline(pipe, plugins=nag())
    pipe(**kwargs, generator=torch.Generator().manual_seed(0))
    assert pipe.plugins.report().forwards == {"cond": 3}
    unload(pipe)


def test_only_a_share_of_the_steps():
    pipe, kwargs = tiny(SD, num_inference_steps=4)
    load_pipeline(pipe, plugins=nag(start=0.25, end=0.75))
    pipe(**kwargs, generator=torch.Generator().manual_seed(0))
    assert pipe.plugins.report().plugins["nag"].counts["guided"]["cond"] == 2
    unload(pipe)


def test_the_calls_own_negative_prompt_where_the_knob_says_none():
    """Which the pipeline itself ignores without guidance."""
    pipe, kwargs = tiny(SD)
    said = generate(pipe, kwargs, nag(negative_prompt=None), negative_prompt="a green dog")
    assert torch.equal(said, generate(pipe, kwargs, nag()))
    empty = generate(pipe, kwargs, nag(negative_prompt=None))
    assert torch.equal(empty, generate(pipe, kwargs, nag(negative_prompt="")))
    assert not torch.equal(empty, said)


def test_each_prompt_has_its_own_negative_one():
    pipe, kwargs = tiny(SD)
    both = generate(pipe, kwargs, nag(negative_prompt=("red", "blue")), prompt=["a cat", "a dog"], num_images_per_prompt=2)
    alone = generate(pipe, kwargs, nag(negative_prompt="blue"), seed=2, prompt="a dog", num_images_per_prompt=2)
    torch.testing.assert_close(both[2:], alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="negative_prompt has 2 texts for a call with 1"):
        generate(pipe, kwargs, nag(negative_prompt=("red", "blue")))


def test_prompt_embeddings():
    pipe, kwargs = tiny(SD, prompt="a cat")
    embeds = pipe.encode_prompt("a cat", "cpu", 1, False)[0]
    torch.testing.assert_close(generate(pipe, kwargs, nag()), generate(pipe, kwargs, nag(), prompt=None, prompt_embeds=embeds))
    with pytest.raises(ConfigError, match="as text"):
        generate(pipe, kwargs, nag(negative_prompt=None), negative_prompt_embeds=embeds)


def test_bfloat16_runs_in_its_own_kind():
    pipe, kwargs = tiny(SD)
    pipe.to(torch.bfloat16)
    assert generate(pipe, kwargs, nag()).dtype == torch.bfloat16


def test_beside_a_feature_cache():
    pipe, kwargs = tiny(SD, num_inference_steps=4)
    out = generate(pipe, kwargs, {"deepcache": {"interval": 2}, **nag()})
    assert out.isfinite().all()
    assert not torch.equal(out, generate(pipe, kwargs, {"deepcache": {"interval": 2}}))


class Asks(Plugin):
    """Takes a gradient past all other plugins."""

    name, paper, families = "asks", Paper("a probe", "0000.00000", "asks"), ("*",)
    neutral: ClassVar = {}
    effects = Effects(edits={"prediction"}, needs={"plain_gradients"})

    def denoise(self, call, next):
        return next(call)


def test_a_denoiser_that_is_asked_past_our_layers_must_be_asked_further_out():
    """There it would read both texts as one."""
    pipe, kwargs = tiny(PIXART)
    with pytest.raises(Unsupported, match="put asks before nag"):
        generate(pipe, kwargs, [NAG(**KNOBS), Asks()])
    assert generate(pipe, kwargs, [Asks(), NAG(**KNOBS)]).isfinite().all()


class AsksOnePart(Plugin):
    """Asks the denoiser again, for the conditional rows alone."""

    name, paper, families = "asks_one_part", Paper("a probe", "0000.00000", "asks"), ("*",)
    neutral: ClassVar = {}
    effects = Effects(edits={"prediction"}, needs={"extra_forwards"})
    got: ClassVar[list] = []

    def denoise(self, call, next):
        prediction = next(call)
        self.got.append(next(call.only("cond")))
        return prediction


@pytest.mark.parametrize("name", [SD, PIXART, MOTION])
@pytest.mark.parametrize("prompts", [1, 2])
def test_one_part_asked_for_further_in_is_not_guided(name, prompts):
    """Nor cut into parts that it does not have, nor shown the negative text."""
    pipe, kwargs = tiny(name, prompt=["a cat", "a dog"][:prompts], guidance_scale=4.0)
    AsksOnePart.got.clear()
    plain = generate(pipe, kwargs, [AsksOnePart()])
    beside = generate(pipe, kwargs, [NAG(**KNOBS), AsksOnePart()])
    assert torch.equal(beside, generate(pipe, kwargs, nag()))
    assert not torch.equal(beside, plain)
    torch.testing.assert_close(*AsksOnePart.got[::2], rtol=1e-4, atol=1e-4)  # of the first step, where the latents are the same


def test_a_text_embedding_beside_the_layers_reads_the_positive_text_alone():
    """emoji-sd's U-Net pools the text for its time embedding: only the layers may see the negative one."""
    pipe = load_pipeline("emoji-sd-lcm")
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a big fox on the left", "output_type": "latent", "num_inference_steps": 2}
    ours = generate(pipe, call, {"nag": {"negative_prompt": "a red background"}})
    text = pipe.encode_prompt("a red background", "cpu", 1, False)[0]
    reference = Reference(text, slice(None), 5.0, 2.5, 0.25)
    pipe.unet.set_attn_processor({k: reference if "attn2" in k else v for k, v in pipe.unet.attn_processors.items()})
    torch.testing.assert_close(ours, generate(pipe, call), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("knobs", "key"),
    [
        ({"scale": 0.5}, "scale"),
        ({"scale": True}, "scale"),
        ({"tau": 0}, "tau"),
        ({"alpha": 1.5}, "alpha"),
        ({"alpha": "0.5"}, "alpha"),
        ({"start": 0.5, "end": 0.5}, "end"),
        ({"negative_prompt": 3}, "negative_prompt"),
    ],
)
def test_bad_knobs(knobs, key):
    with pytest.raises(ConfigError, match=key):
        NAG(**knobs)


def test_models_without_a_text_are_refused():
    with pytest.raises(Unsupported):
        load_pipeline(make("DiTPipeline").pipe, plugins=nag())


def test_start_and_end_without_a_step_between_them_are_refused_before_the_denoiser_runs():
    pipe, kwargs = tiny(SD)
    load_pipeline(pipe, plugins=nag(start=0.1, end=0.4))
    with pytest.raises(ConfigError, match="none of the 2 steps"):
        pipe(**kwargs)
    assert not pipe.plugins.report().forwards
    unload(pipe)


# what a fresh reader of the joint part found --------------------------------------------------------------------------------------------


def test_several_pictures_of_each_of_several_negative_texts_are_what_each_is_alone():
    """Qwen-Image repeats the masks of several texts in another order than the texts."""
    pipe, kwargs = tiny("QwenImagePipeline")
    call = {**kwargs, "prompt": ["a small owl"] * 2, "true_cfg_scale": 1.0, "num_inference_steps": 2}
    with_nag = nag(negative_prompt=("dull", "a long text of what is not wanted at all"), scale=9.0)
    once = [generate(pipe, call, with_nag, seed=seed) for seed in (0, 10)]
    load_pipeline(pipe, plugins=with_nag)
    draws = [torch.Generator().manual_seed(seed) for seed in (0, 10, 1, 11)]  # two of each text
    found = pipe(**call, num_images_per_prompt=2, generator=draws)[0]
    unload(pipe)
    wanted = [once[0][0], once[1][0], once[0][1], once[1][1]]
    for got, want in zip(found, wanted, strict=True):
        assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusion3Pipeline"])
def test_the_calls_negative_texts_for_further_encoders_are_taken(name):
    pipe, kwargs = tiny(name)
    call = {**kwargs, "true_cfg_scale": 1.0} if name == "FluxPipeline" else kwargs
    one, same, other = (
        generate(pipe, call, nag(negative_prompt=None), negative_prompt="a green dog", **more)
        for more in ({}, {"negative_prompt_2": "a green dog"}, {"negative_prompt_2": "three blue cars"})
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    knob = generate(pipe, call, nag(), negative_prompt="a car", negative_prompt_2="three blue cars")
    assert torch.equal(knob, one)  # the knob's text is for all encoders


def test_models_that_part_the_rows_by_the_sizes_of_their_pictures():
    pipe, kwargs = tiny("QwenImagePipeline")
    config = {**pipe.transformer.config, "zero_cond_t": True}
    torch.manual_seed(0)
    pipe.register_modules(transformer=diffusers.QwenImageTransformer2DModel.from_config(config).eval())
    call = {**kwargs, "prompt": ["a red apple", "a small owl"], "true_cfg_scale": 1.0}
    plain = generate(pipe, call)
    same = generate(pipe, call, nag(negative_prompt=("a red apple", "a small owl"), tau=100.0))
    assert float((same - plain).abs().max()) < 1e-5
    assert float((generate(pipe, call, nag()) - plain).abs().max()) > 1e-4
