"""Gradients in the middle of a run, and denoiser calls that hold one guidance branch alone."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from diffgraft import Conflict, Unsupported, load_pipeline, unload
from diffgraft.installed import registry
from diffgraft.installed.planner import Part, plan
from diffgraft.methods.gradients import LossScale, jvp_alone, latent_gradient, predict_alone, vjp_alone
from diffusers import EulerDiscreteScheduler
from probes import Effects, Probe, generate, tiny, trace

SD, PIXART = "StableDiffusionPipeline", "PixArtAlphaPipeline"
PLAIN = Effects(edits=frozenset({"latents"}), needs=frozenset({"plain_gradients"}))


def energy(call):
    """Mean square of the conditional prediction, a number a sample."""
    return lambda z: predict_alone(call.only("cond").with_input(z)).float().square().flatten(1).mean(1)


def probe(denoise_of, **members):
    """A plugin of one ``denoise`` hook that edits latents."""
    return type("Gradients", (Probe,), {"name": "gradients", "effects": PLAIN, "denoise": denoise_of, **members})


def observing(look, pipe, kwargs, **more):
    """Run with a plugin that calls ``look(call)`` in every denoiser call and changes nothing; what it returned, by call."""
    seen = []

    def denoise(self, call, next):
        seen.append(look(call))
        return next(call)

    load_pipeline(pipe, plugins=[probe(denoise)])
    try:
        return generate(pipe, kwargs, **more), seen
    finally:
        unload(pipe)


# one branch alone ------------------------------------------------------------------------------------------------------------------

ALONE = [(name, f.pipelines) for name, f in registry.families().items() if f.guidance.layout == "batched" and not f.guidance.bound]


@pytest.mark.parametrize(("family", "name"), [(name, cls) for name, classes in ALONE for cls in classes])
def test_a_branch_alone_predicts_what_it_does_in_the_batch(family, name):
    """Whatever the family passes per row (time ids, masks, ControlNet residuals) is cut, what rows share (rotary tables) is not."""

    class Apart(Probe):
        name = "apart"
        differences: list[float]
        rows: list[int]

        def denoise(self, call, next):
            whole = next(call)
            assert len(call.branches) > 1, "guidance is on"
            for branch, part in zip(call.branches, whole.chunk(len(call.branches)), strict=True):
                one = call.only(branch)
                assert one.branches == (branch,)
                self.rows.append(one.sample.shape[0])
                self.differences.append(float((next(one) - part).abs().max() / part.abs().max()))
            return whole

    pipe, kwargs = tiny(name)
    plugin = Apart()
    plugin.differences, plugin.rows = [], []
    load_pipeline(pipe, plugins=[plugin])
    generate(pipe, {**kwargs, **({} if "image_latents" in kwargs else {"num_inference_steps": 2})})  # DiffEdit's are one a step
    assert len(set(plugin.rows)) == 1
    assert len(plugin.rows) >= 2
    rough = family == "svd"  # a rounding unit in the input of its tiny U-Net already changes the prediction by 3e-3
    assert max(plugin.differences) < (2e-2 if rough else 1e-4)


def test_a_branch_that_is_not_there_is_refused():
    def look(call):
        with pytest.raises(KeyError, match="it holds cond"):
            call.only("uncond")
        assert call.only("cond").arguments().keys() == call.arguments().keys()

    observing(look, *tiny(SD), guidance_scale=1.0)


def test_nested_arguments_are_cut_and_common_ones_stay():
    pipe, kwargs = tiny("StableDiffusionXLControlNetPipeline")

    def look(call):
        one = call.replace(cross_attention_kwargs={"scale": 0.5, "boxes": call["encoder_hidden_states"]}).only("cond")
        assert torch.equal(one["added_cond_kwargs"]["time_ids"], call["added_cond_kwargs"]["time_ids"].chunk(2)[1])
        assert all(
            torch.equal(part, whole.chunk(2)[1])
            for part, whole in zip(one["down_block_additional_residuals"], call["down_block_additional_residuals"], strict=True)
        )
        assert one["cross_attention_kwargs"]["scale"] == 0.5
        assert torch.equal(one["cross_attention_kwargs"]["boxes"], call["encoder_hidden_states"].chunk(2)[1])
        assert one["timestep"] is call["timestep"]
        assert torch.equal(one.latents, call.latents)

    observing(look, pipe, kwargs)


# the gradient ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SD, PIXART])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_is_the_gradient(name, checkpointing):
    """Along a random direction it is the difference quotient, also where the scheduler scales its input; nothing else changes."""
    pipe, kwargs = tiny(name)
    if name == SD:
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.to(torch.float64)

    def look(call):
        found = latent_gradient(call, energy(call), checkpointing=checkpointing)
        z = call.latents
        assert found.gradient.shape == z.shape
        assert found.gradient.dtype == z.dtype
        assert not found.losses.requires_grad
        assert not torch.is_grad_enabled()
        along = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype)
        h = 1e-4 * z.std()
        up, down = (energy(call)(z + sign * h * along) for sign in (1, -1))
        quotient = float((up - down).sum()) / float(2 * h)
        assert float((found.gradient * along).sum()) == pytest.approx(quotient, rel=2e-2, abs=1e-6)

    plain = generate(pipe, kwargs, num_inference_steps=2)
    before = trace(pipe)
    output, seen = observing(look, pipe, kwargs, num_inference_steps=2)
    assert len(seen) >= 2
    assert torch.equal(output, plain), "a gradient that nobody follows changes nothing"
    assert trace(pipe) == before


def test_samples_do_not_mix():
    pipe, kwargs = tiny(SD)

    def look(call):
        every = latent_gradient(call, energy(call))
        first = latent_gradient(call, lambda z: energy(call)(z)[:1])
        assert float(first.gradient[1:].abs().max()) == 0
        torch.testing.assert_close(first.gradient[0], every.gradient[0])

    observing(look, pipe, {**kwargs, "prompt": ["a cat", "a dog"], "negative_prompt": ["", ""]}, num_inference_steps=1)


def test_parameters_are_as_they_were_and_collect_nothing():
    pipe, kwargs = tiny(SD)
    pipe.unet.requires_grad_(True)
    pipe.unet.conv_in.requires_grad_(False)
    before = {name: p.requires_grad for name, p in pipe.unet.named_parameters()}

    def look(call):
        def losses(z):
            assert not any(p.requires_grad for p in pipe.unet.parameters())
            return energy(call)(z)

        latent_gradient(call, losses)
        with pytest.raises(ZeroDivisionError):
            latent_gradient(call, lambda z: energy(call)(z) / 0 if 1 // 0 else z, checkpointing=True)

    observing(look, pipe, kwargs, num_inference_steps=1)
    assert {name: p.requires_grad for name, p in pipe.unet.named_parameters()} == before
    assert all(p.grad is None for p in pipe.unet.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_its_memory_is_freed(fails):
    pipe, kwargs = tiny(SD)

    def look(call):
        assert call.step.total  # made when it is first asked for
        gc.collect()
        held = sum(isinstance(x, torch.Tensor) for x in gc.get_objects())
        try:
            found = latent_gradient(call, (lambda z: [energy(call)(z), 1 / 0]) if fails else energy(call))
        except ZeroDivisionError:
            found = None
        graph = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.grad_fn is not None]
        del found
        gc.collect()
        assert not graph
        assert sum(isinstance(x, torch.Tensor) for x in gc.get_objects()) <= held

    observing(look, pipe, kwargs, num_inference_steps=2)


def test_a_loss_that_does_not_depend_on_the_latents_is_refused():
    def look(call):
        with pytest.raises(Unsupported, match="does not depend on the latents"):
            latent_gradient(call, lambda z: z.detach().flatten(1).sum(1))

    observing(look, *tiny(SD), num_inference_steps=1)


def test_half_precision_stays_in_range():
    """float16 with a loss that would vanish, and one that would overflow, against float32."""
    pipe, kwargs = tiny(SD)
    gradients = {}
    for dtype in (torch.float32, torch.float16):
        pipe.to(dtype)

        def look(call, dtype=dtype):
            scale = LossScale()
            found = [latent_gradient(call, lambda z: 1e-4 * energy(call)(z), scale=scale).gradient for _ in range(2)]
            gradients.setdefault(dtype, found[1].float())

        observing(look, pipe, kwargs, num_inference_steps=1, output_type="latent")
    cosine = torch.nn.functional.cosine_similarity(*(g.flatten() for g in gradients.values()), dim=0)
    assert float(cosine) > 0.98
    scale = LossScale()
    scale.on(torch.device("cpu"))
    assert float(scale.undone(torch.tensor([1.0, float("inf")])).abs().max()) == 0, "an overflow is no step"
    assert float(scale.value) == LossScale.START / 8
    assert float(scale.undone(torch.tensor([LossScale.START / 8]))) == 1


# beside others ---------------------------------------------------------------------------------------------------------------------


class Skipper(Probe):
    """Another plugin: counts its block and attention hooks, and spoils what the blocks give."""

    name = "skipper"
    effects = Effects(skips=frozenset({"blocks"}))

    def block(self, call, next):
        call.count("block")
        out = next(call)
        return tuple(x * 0 if isinstance(x, torch.Tensor) else x for x in out) if isinstance(out, tuple) else out * 0

    def attention(self, call, next):
        call.count("attention")
        return next(call)


class Own(Probe):
    name = "own"
    effects = PLAIN

    def denoise(self, call, next):
        before = call.run.report_of(call.entry).fired["attention"] if call.step.index else 0
        self.found = latent_gradient(call, energy(call), checkpointing=self.checkpointing).gradient
        self.mine = call.run.report_of(call.entry).fired["attention"] - before
        return next(call)

    def attention(self, call, next):
        return next(call)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_goes_past_the_other_plugins(order, checkpointing):
    pipe, kwargs = tiny(SD)
    counts = []
    gradients = []
    for gradient in (False, True):
        own = Own()
        own.checkpointing = checkpointing
        plugins = [own, Skipper()] if gradient else [Skipper()]
        load_pipeline(pipe, plugins=plugins[:: 1 if order == 0 else -1])
        generate(pipe, kwargs, num_inference_steps=1)
        counts.append({key: pipe.plugins.report().plugins["skipper"].total(key) for key in ("block", "attention")})
        unload(pipe)
        if gradient:
            layers = sum(callable(getattr(m, "processor", None)) for m in pipe.unet.modules())
            assert own.mine == layers * (2 if checkpointing else 1), "its own hooks do fire, and again when a block is computed again"
            gradients.append(own.found)
    assert counts[0] == counts[1] != {"block": 0, "attention": 0}
    alone = Own()
    alone.checkpointing = False
    load_pipeline(pipe, plugins=[alone])
    generate(pipe, kwargs, num_inference_steps=1)
    torch.testing.assert_close(gradients[0], alone.found, rtol=1e-3, atol=1e-7)


def test_hooks_fire_in_a_second_computation_in_another_thread():
    """Autograd runs the backward of a GPU in a thread of its own, which knows no run."""
    from diffgraft.methods.gradients import alone, checkpointed, frozen

    def look(call):
        with alone(call), frozen(call.model), checkpointed(call.model, call.run), torch.enable_grad():
            z = call.latents.clone().requires_grad_()
            loss = energy(call)(z).sum()
            found = []
            thread = threading.Thread(target=lambda: found.append(torch.autograd.grad(loss, z)[0]))
            thread.start()
            thread.join()
        torch.testing.assert_close(found[0], latent_gradient(call, energy(call)).gradient)

    pipe, kwargs = tiny(SD)
    load_pipeline(pipe, plugins=[probe(lambda self, call, next: (look(call), next(call))[1],
                                       attention=lambda self, call, next: next(call.replace(temb=call.get("temb"))))])  # fmt: skip
    generate(pipe, kwargs, num_inference_steps=1)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_denoiser_is_differentiated_in_its_eager_form(in_place):
    pipe, kwargs = tiny(PIXART)
    _, eager = observing(lambda call: latent_gradient(call, energy(call)).gradient, pipe, kwargs, num_inference_steps=2)
    unload(pipe)

    def forbidden(gm, inputs):
        def forward(*args):
            assert not torch.is_grad_enabled(), "the compiled graph was asked for a gradient"
            return gm(*args)

        return forward

    torch._dynamo.reset()
    if in_place:
        pipe.transformer.compile(backend=forbidden)
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend=forbidden)
    _, compiled = observing(lambda call: latent_gradient(call, energy(call)).gradient, pipe, kwargs, num_inference_steps=2)
    torch._dynamo.reset()
    assert torch.equal(eager[0], compiled[0])


# where there is none ---------------------------------------------------------------------------------------------------------------


def follow(self, call, next):
    if call.branch == "uncond":
        return next(call)
    return next(call.with_latents(call.latents - latent_gradient(call, energy(call)).gradient))


@pytest.fixture
def pipe_and_kwargs():
    pipe, kwargs = tiny(SD)
    load_pipeline(pipe, plugins=[probe(follow)])
    return pipe, kwargs


def test_inference_mode_is_refused(pipe_and_kwargs):
    pipe, kwargs = pipe_and_kwargs
    with torch.inference_mode(), pytest.raises(Unsupported, match="inference_mode"):
        generate(pipe, kwargs)
    generate(pipe, kwargs)


def test_weights_that_are_not_there_are_refused(pipe_and_kwargs):
    from accelerate import cpu_offload

    pipe, kwargs = pipe_and_kwargs
    cpu_offload(pipe.unet, torch.device("cpu"))
    with pytest.raises(Unsupported, match="sequential CPU offload"):
        generate(pipe, kwargs)


def test_layerwise_casting_is_refused(pipe_and_kwargs):
    pipe, kwargs = pipe_and_kwargs
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with pytest.raises(Unsupported, match="layerwise_casting"):
        generate(pipe, kwargs)


def test_a_cache_of_diffusers_is_refused():
    from diffusers import FirstBlockCacheConfig

    pipe, kwargs = tiny("FluxPipeline")
    load_pipeline(pipe, plugins=[probe(follow)])
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(Conflict, match="disable_cache"):
        generate(pipe, kwargs)
    pipe.transformer.disable_cache()
    generate(pipe, kwargs)


def test_the_planner_lets_a_gradient_past_a_cache_and_says_so():
    cache, other = Part("cache", Effects(skips=frozenset({"blocks"}))), Part("small", Effects(replaces=frozenset({"denoiser"})))
    mine, through = Part("mine", PLAIN), Part("through", Effects(needs=frozenset({"gradients"})))
    for pair in ((mine, cache), (cache, mine)):
        assert not plan(pair).conflicts
        assert "past cache" in plan(pair).warnings[0]
        assert plan((through, cache)).conflicts, "gradients through the stack's own calls still clash"
    assert "own denoiser" in plan((other, mine)).warnings[0]


# Jacobian products ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SD, "StableDiffusionXLPipeline", PIXART, "FluxPipeline", "WanPipeline"])
def test_jacobian_products_agree_with_each_other_and_with_differences(name):
    """u (J v) = (J^T u) v, and J v is what a small step shows. In double precision, so that a wrong product cannot hide in rounding."""
    pipe, kwargs = tiny(name)
    pipe.to(torch.float64)
    draw = torch.Generator().manual_seed(3)

    def look(call):
        if call.step.call != 1 or call.branch not in ("both", "cond"):
            return None
        alone = call.only("cond")
        z = call.latents
        v = torch.randn(z.shape, generator=draw, dtype=torch.float64).to(z.dtype)
        out = predict_alone(alone.with_input(z))
        u = torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out.dtype)
        jv, ju = jvp_alone(alone, v), vjp_alone(alone, u)
        h = 1e-4
        differences = (predict_alone(alone.with_input(z + h * v)) - predict_alone(alone.with_input(z - h * v))) / (2 * h)
        return float((u * jv).sum()), float((ju * v).sum()), float((jv - differences).norm() / differences.norm())

    _, seen = observing(look, pipe, kwargs)
    [(forwards, backwards, error)] = [found for found in seen if found]
    assert forwards == pytest.approx(backwards, rel=1e-4)
    assert error < 1e-3


@pytest.mark.parametrize(("refused", "way", "error"), [(1, "two backward passes", 1e-5), (2, "central differences", 2e-2)])
def test_without_a_forward_mode_another_way_is_taken_and_said(sd, monkeypatch, refused, way, error):
    pipe, kwargs = sd

    def refuse(*args):
        raise NotImplementedError("not for this")

    for name in ("_forward_mode", "_two_backward_passes")[:refused]:
        monkeypatch.setattr(f"diffgraft.methods.gradients.{name}", refuse)
    v, found = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), {}

    def denoise(self, call, next):
        if call.step.call == 1:
            alone = call.only("cond")
            found["forwards"] = float(jvp_alone(alone, v).sum())
            found["backwards"] = float((vjp_alone(alone, torch.ones_like(call.latents)) * v).sum())
        return next(call)

    load_pipeline(pipe, plugins=[probe(denoise)])
    generate(pipe, kwargs)
    assert found["forwards"] == pytest.approx(found["backwards"], rel=error)
    assert f"by {way}: UNet2DConditionModel has no forward mode (not for this)" in str(pipe.plugins.report())


def test_jacobian_products_at_another_point(sd):
    """``at`` is where they are taken: not at the run's latents."""

    def look(call):
        alone, draw = call.only("cond"), torch.Generator().manual_seed(1)
        z, v, u = (torch.randn(call.latents.shape, generator=draw) for _ in range(3))
        jv = jvp_alone(alone, v, at=z)
        assert float((u * jv).sum()) == pytest.approx(float((vjp_alone(alone, u, at=z) * v).sum()), rel=1e-3)
        assert not torch.allclose(jv, jvp_alone(alone, v), rtol=1e-2)

    observing(look, *sd, num_inference_steps=1)
