"""NAG in joint attention: whole runs against plain forwards that carry one picture and two texts, written out block by block."""

from __future__ import annotations

import inspect
from typing import ClassVar

import pytest
import torch
from diffgraft import Effects, Paper, Plugin, Unsupported, load_pipeline, unload
from diffgraft_nag import NAG
from diffgraft_pipelines.tiny import make
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

KNOBS = {"scale": 6.0, "tau": 1.2, "alpha": 0.5}
FLUX, SD3, QWEN = "FluxPipeline", "StableDiffusion3Pipeline", "QwenImagePipeline"
CHROMA, AURA, COGVIEW, COGVIDEO = "ChromaPipeline", "AuraFlowPipeline", "CogView3PlusPipeline", "CogVideoXPipeline"
KLEIN, FLUX2, BRIA, OVIS, LONGCAT = "Flux2KleinPipeline", "Flux2Pipeline", "BriaPipeline", "OvisImagePipeline", "LongCatImagePipeline"
EASY, HUNYUAN = "EasyAnimatePipeline", "HunyuanVideoPipeline"
FLUX_KIN = [FLUX, "FluxKontextPipeline", "FluxFillPipeline", "FluxControlPipeline", "FluxControlNetPipeline"]
PROMPTS, NEGATIVES = ["a cat", "two dogs"], ["a green dog on the right", "ugly"]


def tiny(name, **more):
    made = make(name)
    made.pipe.set_progress_bar_config(disable=True)
    for argument in ("negative_prompt", "true_cfg_scale"):
        made.kwargs.pop(argument, None)
    return made.pipe, {**made.kwargs, "num_inference_steps": 2, "output_type": "latent", "prompt": PROMPTS, **more}


def generate(pipe, kwargs, **knobs):
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    load_pipeline(pipe, plugins={"nag": {**KNOBS, "negative_prompt": NEGATIVES, **knobs}} if knobs.pop("on", True) else [])
    try:
        return pipe(**kwargs, generator=generators)[0]
    finally:
        unload(pipe)


def plainly(pipe, kwargs, forward):
    """A run in which ``forward(model, arguments)`` stands for the denoiser."""
    model = pipe.transformer
    model.forward = lambda **arguments: (forward(model, arguments),)
    try:
        return generate(pipe, kwargs, on=False)
    finally:
        del model.forward


def heard(pipe, kwargs):
    """What the denoiser is given for the negative prompts."""
    found = {}

    class Enough(Exception):
        pass

    def ear(**arguments):
        found.update(arguments)
        raise Enough

    pipe.transformer.forward = ear
    try:
        pipe(**{**kwargs, "prompt": NEGATIVES})
    except Enough:
        return found
    finally:
        del pipe.transformer.forward


def guided(Zp, Zn, norm, scale, tau, alpha):
    far = scale * Zp - (scale - 1) * Zn
    ratio = far.norm(norm, -1, keepdim=True) / Zp.norm(norm, -1, keepdim=True)
    return alpha * far * ratio.clamp(max=tau) / ratio + (1 - alpha) * Zp


def softmax_of(q, k, v):
    """Z [rows, tokens, heads x width] of q, k, v [rows, tokens, heads, width]."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return ((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


def heads_of(attn, names, x):
    q, k, v = (getattr(attn, name)(x).unflatten(-1, (attn.heads, -1)) for name in names)
    added = names[0].startswith("add")
    norms = (attn.norm_added_q, attn.norm_added_k) if added else (attn.norm_q, attn.norm_k)
    return (norms[0](q), norms[1](k), v) if norms[0] is not None else (q, k, v)


OWN, ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


def double(block, x, texts, tembs, turn, norm):
    """One block of two streams (Flux, SD3): the picture x and the two texts after it. ``turn`` rotates queries and keys."""
    attn = block.attn
    y, gate, shift, size, gate_ff = block.norm1(x, emb=tembs[0])
    found, rest, cut = [], [], texts[0].shape[1]
    for text, temb in zip(texts, tembs, strict=True):
        normed = block.norm1_context(text, temb) if block.context_pre_only else block.norm1_context(text, emb=temb)
        rest.append(() if block.context_pre_only else normed[1:])
        parts = [heads_of(attn, ADDED, normed if block.context_pre_only else normed[0]), heads_of(attn, OWN, y)]
        q, k, v = (torch.cat(each, 1) for each in zip(*parts, strict=True))
        found.append(softmax_of(turn(q), turn(k), v))
    x = x + gate[:, None] * attn.to_out[0](guided(found[0][:, cut:], found[1][:, cut:], norm, **KNOBS))
    x = x + gate_ff[:, None] * block.ff(block.norm2(x) * (1 + size[:, None]) + shift[:, None])
    after = []
    for text, Z, more in zip(texts, found, rest, strict=True):
        if more:
            gate, shift, size, gate_ff = more
            text = text + gate[:, None] * attn.to_add_out(Z[:, :cut])
            text = text + gate_ff[:, None] * block.ff_context(block.norm2_context(text) * (1 + size[:, None]) + shift[:, None])
        after.append(text)
    return x, after


def flux(model, a, negative, norm, pooled):
    t, g = a["timestep"] * 1000, a["guidance"] * 1000
    tembs = [model.time_text_embed(t, g, each) for each in (a["pooled_projections"], pooled)]
    x = model.x_embedder(a["hidden_states"])
    texts = [model.context_embedder(each) for each in (a["encoder_hidden_states"], negative["encoder_hidden_states"])]
    table = model.pos_embed(torch.cat([a["txt_ids"], a["img_ids"]]))
    turn = lambda y: apply_rotary_emb(y, table, sequence_dim=1)  # noqa: E731
    for block in model.transformer_blocks:
        block.context_pre_only = False
        x, texts = double(block, x, texts, tembs, turn, norm)
        del block.context_pre_only
    cut, streams = texts[0].shape[1], [torch.cat([text, x], 1) for text in texts]
    for block in model.single_transformer_blocks:
        normed = [block.norm(stream, emb=temb) for stream, temb in zip(streams, tembs, strict=True)]
        found = []
        for y, _ in normed:
            q, k, v = heads_of(block.attn, OWN, y)
            found.append(softmax_of(turn(q), turn(k), v))
        picture = guided(found[0][:, cut:], found[1][:, cut:], norm, **KNOBS)
        for i, (y, gate) in enumerate(normed):
            Z = torch.cat([found[i][:, :cut], picture], 1)
            streams[i] = streams[i] + gate[:, None] * block.proj_out(torch.cat([Z, block.act_mlp(block.proj_mlp(y))], 2))
    return model.proj_out(model.norm_out(streams[0][:, cut:], tembs[0]))


@pytest.mark.parametrize(("norm", "whose"), [("L1", "negative"), ("L2", "negative"), ("L1", "positive")])
def test_flux_is_the_plain_forward_of_one_picture_and_two_texts(norm, whose):
    pipe, kwargs = tiny(FLUX)
    negative = heard(pipe, kwargs)

    def forward(model, a):
        return flux(model, a, negative, int(norm[1]), (negative if whose == "negative" else a)["pooled_projections"])

    expected = plainly(pipe, kwargs, forward)
    torch.testing.assert_close(generate(pipe, kwargs, norm=norm, pooled=whose), expected, rtol=1e-4, atol=1e-5)
    rest = {("L1", "negative"), ("L2", "negative"), ("L1", "positive")} - {(norm, whose)}
    others = [generate(pipe, kwargs, norm=n, pooled=p) for n, p in sorted(rest)]
    assert all(float((other - expected).abs().max()) > 1e-4 for other in others)  # the settings differ, so the comparison can fail


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sd3_is_the_plain_forward_of_one_picture_and_two_texts(guidance):
    """With guidance the unconditional rows are the plain model's."""
    pipe, kwargs = tiny(SD3, guidance_scale=guidance)
    negative, own = heard(pipe, {**kwargs, "guidance_scale": 1.0}), type(pipe.transformer).forward

    def forward(model, a):
        n = len(PROMPTS)
        rows = {k: v[-n:] if isinstance(v, torch.Tensor) else v for k, v in a.items()}
        tembs = [model.time_text_embed(rows["timestep"], each["pooled_projections"]) for each in (rows, negative)]
        x = model.pos_embed(rows["hidden_states"])
        texts = [model.context_embedder(each["encoder_hidden_states"]) for each in (rows, negative)]
        for block in model.transformer_blocks:
            x, texts = double(block, x, texts, tembs, lambda y: y, 1)
        x = model.proj_out(model.norm_out(x, tembs[0]))
        side, p = rows["hidden_states"].shape[-1] // model.config.patch_size, model.config.patch_size
        cond = x.view(n, side, side, p, p, -1).permute(0, 5, 1, 3, 2, 4).reshape(rows["hidden_states"].shape)
        if guidance == 1:
            return cond
        plain = own(model, **{k: v[:-n] if isinstance(v, torch.Tensor) else v for k, v in a.items()})
        return torch.cat([plain[0], cond])

    torch.testing.assert_close(generate(pipe, kwargs), plainly(pipe, kwargs, forward), rtol=1e-4, atol=1e-5)


def test_qwen_image_is_the_plain_forward_of_one_picture_and_two_texts_of_other_lengths():
    """The reference pads nothing: each prompt alone, its negative one at its own length."""
    pipe, kwargs = tiny(QWEN, prompt=["a cat"])
    negative = heard(pipe, kwargs)

    def forward(model, a):
        temb = model.time_text_embed(a["timestep"], a["hidden_states"])
        x = model.img_in(a["hidden_states"])
        texts = []
        for each in (a, {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in negative.items()}):
            text, mask = each["encoder_hidden_states"], each.get("encoder_hidden_states_mask")
            text = text if mask is None else text[:, : int(mask.sum())]
            texts.append(model.txt_in(model.txt_norm(text)))
        assert texts[0].shape != texts[1].shape
        tables = [model.pos_embed(a["img_shapes"], max_txt_seq_len=text.shape[1], device=x.device) for text in texts]
        for block in model.transformer_blocks:
            (i1, i2), (t1, t2) = (mod(temb).chunk(2, -1) for mod in (block.img_mod, block.txt_mod))
            y, gate = block._modulate(block.img_norm1(x), i1)
            found, gates = [], []
            for text, (seen, said) in zip(texts, tables, strict=True):
                z, text_gate = block._modulate(block.txt_norm1(text), t1)
                parts = [[*heads_of(block.attn, ADDED, z), said], [*heads_of(block.attn, OWN, y), seen]]
                turned = [[*(apply_rotary_emb_qwen(each, table, use_real=False) for each in (q, k)), v] for q, k, v, table in parts]
                found.append(softmax_of(*(torch.cat(each, 1) for each in zip(*turned, strict=True))))
                gates.append(text_gate)
            pictures = [Z[:, text.shape[1] :] for Z, text in zip(found, texts, strict=True)]
            x = x + gate * block.attn.to_out[0](guided(*pictures, 1, **KNOBS))
            y, gate = block._modulate(block.img_norm2(x), i2)
            x = x + gate * block.img_mlp(y)
            for i, (Z, text_gate) in enumerate(zip(found, gates, strict=True)):
                texts[i] = texts[i] + text_gate * block.attn.to_add_out(Z[:, : texts[i].shape[1]])
                z, text_gate = block._modulate(block.txt_norm2(texts[i]), t2)
                texts[i] = texts[i] + text_gate * block.txt_mlp(z)
        return model.proj_out(model.norm_out(x, temb))

    def alone(**more):
        load_pipeline(pipe, plugins=more)
        try:
            return pipe(**kwargs, generator=torch.Generator().manual_seed(0))[0]
        finally:
            unload(pipe)

    ours = alone(nag={**KNOBS, "negative_prompt": NEGATIVES[0]})
    negative = {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in negative.items()}
    model = pipe.transformer
    model.forward = lambda **arguments: (forward(model, arguments),)
    try:
        expected = alone()
    finally:
        del model.forward
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert float((alone() - ours).abs().max()) > 1e-3


class Everywhere:
    """Scaled dot products of a batch with the negative rows behind it: the last ``rows`` rows and those before them get one picture.

    ``text`` tokens stand before the picture, or behind it; attention among the text's tokens alone is as it is.
    """

    def __init__(self, own, rows, text, behind):
        self.own, self.rows, self.text, self.behind = own, rows, text, behind

    def __call__(self, *args, **kwargs):
        out = self.own(*args, **kwargs)  # [rows, heads, tokens, width]
        Z, n, tokens = out.transpose(1, 2).flatten(2), self.rows, out.shape[2] - self.text
        if tokens == 0:
            return out
        at = slice(0, tokens) if self.behind else slice(self.text, None)
        Z[-2 * n : -n, at] = Z[-n:, at] = guided(Z[-2 * n : -n, at], Z[-n:, at], 1, **KNOBS)
        return Z.unflatten(2, (out.shape[1], -1)).transpose(1, 2)


DOUBLED = [CHROMA, AURA, COGVIEW, COGVIDEO, KLEIN, FLUX2, BRIA, OVIS, LONGCAT, EASY, HUNYUAN, FLUX]


@pytest.mark.parametrize("name", DOUBLED)
def test_without_a_pooled_text_it_is_a_doubled_batch_with_one_picture(name, monkeypatch):
    """Nothing but the attention tells the rows' pictures apart there, so that guided dot products alone are the method.

    A model that pools the text too (HunyuanVideo, Flux) gives the negative rows the prompt's.
    """
    off = {} if name in (FLUX2, FLUX) else {"true_cfg_scale" if name == HUNYUAN else "guidance_scale": 1.0}
    pipe, kwargs = tiny(name, **off)
    own, dot = type(pipe.transformer).forward, torch.nn.functional.scaled_dot_product_attention
    names = list(inspect.signature(own).parameters)[1:]
    negative, ours = {}, generate(pipe, kwargs, pooled="positive")
    plain = generate(pipe, kwargs, on=False)
    registers = 8 if name == AURA else 0

    class Enough(Exception):
        pass

    def ear(*args, **arguments):
        negative.update(dict(zip(names, args, strict=False)) | arguments)
        raise Enough

    def doubled(*args, **arguments):
        a, n = dict(zip(names, args, strict=False)) | arguments, len(PROMPTS)
        text = a["encoder_hidden_states"].shape[1]
        behind = {**a, **{k: v for k, v in negative.items() if k in ("encoder_hidden_states", "attention_mask", "encoder_attention_mask")}}
        has_rows = {k for k, v in a.items() if isinstance(v, torch.Tensor) and v.shape[:1] == (n,)}
        wide = {k: torch.cat([v, behind[k]]) if k in has_rows else v for k, v in a.items()}
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", Everywhere(dot, n, text + registers, name == HUNYUAN))
            return (own(pipe.transformer, **wide)[0][:n],)

    try:
        pipe.transformer.forward = ear
        with pytest.raises(Enough):
            pipe(**{**kwargs, "prompt": NEGATIVES})
        pipe.transformer.forward = doubled
        expected = generate(pipe, kwargs, on=False)
    finally:
        del pipe.transformer.forward
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    assert float((plain - expected).abs().max()) > 5 * float((ours - expected).abs().max())


@pytest.mark.parametrize("name", [*FLUX_KIN, SD3, QWEN, FLUX2, BRIA, OVIS, LONGCAT, EASY, HUNYUAN])
def test_the_positive_text_as_the_negative_one_changes_nothing(name):
    video = {EASY: {"prompt": ["a cat"] * 2, "guidance_scale": 1.0}, HUNYUAN: {"num_videos_per_prompt": 2}}
    pipe, kwargs = tiny(name, **{"prompt": "a cat", **video.get(name, {"num_images_per_prompt": 2})})
    same, plain, other = (generate(pipe, kwargs, **more) for more in (
        {"negative_prompt": "a cat"}, {"on": False}, {"negative_prompt": "two green dogs on the right"}))  # fmt: skip
    torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-4)
    assert float((other - plain).abs().max()) > 1e-3


@pytest.mark.parametrize(("name", "scale"), [(FLUX, "true_cfg_scale"), (SD3, "guidance_scale")])
def test_beside_true_guidance(name, scale):
    """After one step x(w) = a + b (u + w (c - u)), so 3 x(2) - 2 x(3) is x(0), of the unconditional prediction alone: it is as before."""
    pipe, kwargs = tiny(name, num_inference_steps=1, negative_prompt=["dull", "grey"])
    ours, plain = ({w: generate(pipe, {**kwargs, scale: w}, on=on) for w in (2.0, 3.0)} for on in (True, False))
    torch.testing.assert_close(*(3 * each[2.0] - 2 * each[3.0] for each in (ours, plain)), rtol=1e-3, atol=1e-4)
    assert float((ours[2.0] - plain[2.0]).abs().max()) > 1e-3


def test_qwen_image_runs_beside_true_guidance():
    pipe, kwargs = tiny(QWEN, negative_prompt=["dull", "grey"], true_cfg_scale=3.0)
    assert float((generate(pipe, kwargs) - generate(pipe, kwargs, on=False)).abs().max()) > 1e-3
    assert torch.equal(generate(pipe, kwargs, scale=1.0), generate(pipe, kwargs, on=False))


def test_a_step_is_one_call_of_twice_the_conditional_rows():
    pipe, kwargs = tiny(FLUX)
    seen = []
    hook = pipe.transformer.proj_out.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    load_pipeline(pipe, plugins={"nag": {**KNOBS, "negative_prompt": NEGATIVES, "end": 0.5}})
    pipe(**kwargs, generator=torch.Generator().manual_seed(0))
    hook.remove()
    assert pipe.plugins.report().forwards == {"cond": 2}
    assert seen == [4, 2]
    unload(pipe)


def test_texts_of_other_lengths_without_a_mask_are_refused():
    pipe, kwargs = tiny(FLUX, prompt=None)
    embeds, pooled, _ = pipe.encode_prompt(PROMPTS, PROMPTS, max_sequence_length=24)
    kwargs |= {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    with pytest.raises(Unsupported, match=r"24 tokens and the negative one 40"):
        generate(pipe, kwargs)
    assert generate(pipe, {**kwargs, "max_sequence_length": 24}).isfinite().all()


def test_a_padded_prompt_beside_a_negative_one_without_padding():
    """The mask of the prompts says nothing of the negative text, which has none."""
    pipe, kwargs = tiny(QWEN)
    both = generate(pipe, {**kwargs, "prompt": ["a cat", "two big dogs in a park"]}, negative_prompt="a green dog on the right")
    load_pipeline(pipe, plugins={"nag": {**KNOBS, "negative_prompt": "a green dog on the right"}})
    alone = pipe(**{**kwargs, "prompt": ["a cat"]}, generator=torch.Generator().manual_seed(0))[0]
    unload(pipe)
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-4)


class Again(Plugin):
    name, paper, families = "again", Paper("a probe", "0000.00000", "asks again"), ("*",)
    neutral: ClassVar = {}
    effects = Effects(edits={"prediction"}, needs={"extra_forwards"})

    def denoise(self, call, next):
        next(call.only("cond")) if "cond" in call.branches else None
        return next(call)


class Keeps(Again):
    name = "keeps"
    effects = Effects(skips={"blocks"})

    def denoise(self, call, next):
        return next(call)


def test_plugins_that_would_read_the_further_rows_wrongly_are_refused():
    pipe, kwargs = tiny(SD3, guidance_scale=3.0, prompt="a cat")

    def refused(plugins, match):
        load_pipeline(pipe, plugins=plugins)
        with pytest.raises(Unsupported, match=match):
            pipe(**kwargs)
        assert not pipe.plugins.report().forwards
        unload(pipe)

    refused([NAG(**KNOBS), Again()], "put again before nag")
    for order in (1, -1):
        refused([NAG(**KNOBS, end=0.5), Keeps()][::order], "end = 0.5: keeps keeps")
        for plugins in ([Again(), NAG(**KNOBS)], [NAG(**KNOBS), Keeps()][::order]):
            load_pipeline(pipe, plugins=plugins)
            assert pipe(**kwargs)[0].isfinite().all()
            unload(pipe)
