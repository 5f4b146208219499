"""DisBack: one step in closed form, the published U-Net exchanged, the path and its order, both stages of the fit, and the contract."""

from __future__ import annotations

import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, Unsupported, load_pipeline, unload
from diffgraft.methods.examples import Example
from diffgraft.methods.fitting import FitPlan, fit
from diffgraft.methods.inputs import CallSettings
from diffgraft.methods.matching import matching_gradient
from diffgraft.methods.published import Weights, spec_of
from diffgraft.testing import Case, contract_sample
from diffgraft_disback import DisBack, OneStepScheduler, __version__
from diffgraft_disback.fitting import LAYERS, DisBackFitter, point
from diffgraft_disback.method import Path
from diffgraft_disback.weights import LAYOUT
from diffgraft_pipelines.tiny import make
from diffusers import DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, LCMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

CASES = contract_sample("disback", __version__)
"""Each check once and each family once; which meet changes with the version. All of them: ``diffgraft check``, or ``contract_cases``."""
EXAMPLES = [Example(text) for text in ("an apple", "a star", "a boat")]
SETTINGS = CallSettings(steps=2, guidance_scale=2.0, height=32, width=32)
KNOBS = {"rank": 2, "path": 2, "record": 4, "stay": 1, "student_every": 2}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case) -> None:
    case.run()


# helpers ------------------------------------------------------------------------------------------------------------------------------


def small_xl():
    """A tiny SDXL whose U-Net is put together as the stock one: widths w, 2w, 4w, depths 0, m, n."""
    made = make("StableDiffusionXLPipeline")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = {**made.pipe.unet.config, "block_out_channels": (8, 16, 32), "norm_num_groups": 4, "attention_head_dim": (1, 2, 4)}
        config["projection_class_embeddings_input_dim"] = made.pipe.unet.config["projection_class_embeddings_input_dim"]
        made.pipe.unet = UNet2DConditionModel.from_config(config).eval()
    made.pipe.set_progress_bar_config(disable=True)
    return made


def draw(made, plugin=None, **call):
    """Last latents."""
    made.pipe.set_progress_bar_config(disable=True)
    kwargs = {key: value for key, value in made.kwargs.items() if key not in ("num_inference_steps", "guidance_scale")}
    if plugin is not None:
        load_pipeline(made.pipe, plugins=[plugin])
    try:
        return made.pipe(**{**kwargs, "output_type": "latent", "generator": torch.Generator().manual_seed(0), **call}).images
    finally:
        if plugin is not None:
            made.report = made.pipe.plugins.report()
            unload(made.pipe)


def learn(out, steps=8, plugin=None, made=None, resume_at=None, **knobs):
    made = made or make("StableDiffusionPipeline")

    def stop(phase, done, total):
        if done == resume_at:
            raise KeyboardInterrupt

    keep = 60.0 if resume_at is None else 0
    plan = FitPlan(steps, 2, keep_every=keep)
    return fit(made.pipe, plugin or DisBack(), EXAMPLES, SETTINGS, out, plan, knobs={**KNOBS, **knobs}, on_progress=stop)


def watching(see):
    """The plugin, whose fitter tells what it does."""

    class Watched(DisBackFitter):
        def loss(self, session, batch):
            see(self, batch, "before")
            losses = super().loss(session, batch)
            see(self, batch, "after")
            return losses

        def real(self, session, at, calls, batch):
            k = self.path.target(batch.step)
            see(self, batch, k)
            return super().real(session, at, calls, batch)

    class Watching(DisBack):
        fitting = Watched

    return Watching()


def of(fitter, name):
    return {key.replace(f".{name}.", "."): value.detach().clone() for key, value in fitter.values().items() if f".{name}." in key}


# one step ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_step_ends_at_the_clean_sample(kind):
    """For any picture and noise: what a perfect denoiser answers gives the picture."""
    scheduler = OneStepScheduler(prediction_type=kind, timestep=399)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [399]
    x0, noise = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    abar = scheduler.alphas_cumprod[399].double()
    a, s = abar.sqrt(), (1 - abar).sqrt()
    answer = {"epsilon": noise, "v_prediction": a * noise - s * x0, "sample": x0}[kind]
    out = scheduler.step(answer, scheduler.timesteps[0], a * x0 + s * noise)
    assert torch.allclose(out.prev_sample, x0, atol=1e-12)
    assert out.prev_sample is out.pred_original_sample


def test_it_is_the_published_call():
    """LCMScheduler with timesteps=[399] and guidance 0, as the authors call it; its c_out is 1 but for 2e-8."""
    made = make("StableDiffusionXLPipeline")
    mine = draw(made, DisBack(timestep=399))
    assert made.report.forwards == {"cond": 1}
    made.pipe.scheduler = LCMScheduler.from_config(made.pipe.scheduler.config)
    theirs = draw(made, None, num_inference_steps=1, guidance_scale=0.0, timesteps=[399])
    assert torch.allclose(mine, theirs, atol=2e-6 * float(theirs.abs().max()))


def test_one_call_whatever_the_pipelines_own_guidance_says():
    made = make("StableDiffusionPipeline")
    draw(made, DisBack())
    assert made.report.forwards == {"cond": 1}
    draw(made, DisBack(strict=False), num_inference_steps=20, guidance_scale=7.5)
    assert made.report.forwards == {"both": 1}
    loose = draw(made, DisBack(strict=False), num_inference_steps=20, guidance_scale=1.0)
    assert torch.equal(loose, draw(made, DisBack(), num_inference_steps=1, guidance_scale=1.0))


@pytest.mark.parametrize("own", [DDIMScheduler, EulerDiscreteScheduler, LCMScheduler])
def test_it_does_not_depend_on_the_schedulers_solver(own):
    made = make("StableDiffusionPipeline")
    plain = draw(made, DisBack(timestep=700))
    made.pipe.scheduler = own.from_config(made.pipe.scheduler.config)
    assert torch.allclose(plain, draw(made, DisBack(timestep=700)), atol=1e-5)


# the published student -----------------------------------------------------------------------------------------------------------------


def test_the_layout_is_that_of_the_stock_unet():
    with torch.device("meta"):
        stock = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    found = LAYOUT.compare({key: spec_of(value) for key, value in stock.state_dict().items()})
    assert found.whole
    assert found.sizes == {"w": 320, "c": 4, "d": 2048, "p": 2816, "m": 2, "n": 10}


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_the_unet_is_exchanged_without_trace(tmp_path, ending):
    made = small_xl()
    before = {key: value.clone() for key, value in made.pipe.unet.state_dict().items()}
    children = list(map(id, made.pipe.unet.children()))
    path = tmp_path / f"SDXL_DisBack.{ending}"
    state = LAYOUT.synthetic(path=path)
    plain = draw(made, DisBack(timestep=399))
    with_it = draw(made, DisBack(weights=str(path)))
    assert list(map(id, made.pipe.unet.children())) == children
    assert all(torch.equal(value, made.pipe.unet.state_dict()[key]) for key, value in before.items())
    assert not torch.equal(plain, with_it)
    made.pipe.unet.load_state_dict(state)  # by hand, as the authors do
    assert torch.equal(with_it, draw(made, DisBack(timestep=399)))


def test_another_unets_weights_are_refused_by_name(tmp_path):
    state = LAYOUT.synthetic()
    with pytest.raises(Unsupported, match=r"StableDiffusionPipeline.*add_embedding"):
        load_pipeline(make("StableDiffusionPipeline").pipe, plugins=[DisBack(weights=Weights(state))])
    wider = LAYOUT.synthetic({**LAYOUT.small, "d": 32})
    with pytest.raises(Unsupported, match=r"attn2.to_k.weight is \[\d+, 32\], here \[\d+, 64\]"):
        load_pipeline(small_xl().pipe, plugins=[DisBack(weights=Weights(wider))])
    del state["conv_in.bias"]
    with pytest.raises(ArtefactMismatch, match=r"conv_in\.bias"):
        load_pipeline(small_xl().pipe, plugins=[DisBack(weights=Weights(state))])


# bad input -----------------------------------------------------------------------------------------------------------------------------


class Asked(Exception):
    pass


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"guidance_scale": 7.5}, "guidance_scale = 7.5"),
        ({"num_inference_steps": 4}, "num_inference_steps = 4"),
        ({"timesteps": [399]}, "timesteps"),
        ({"sigmas": [1.0]}, "sigmas"),
    ],
)
def test_more_is_refused_before_the_denoiser(call, words):
    made = make("StableDiffusionPipeline")

    def never(*args):
        raise Asked

    handle = made.pipe.unet.register_forward_pre_hook(never)
    with pytest.raises(ConfigError, match=words):
        draw(made, DisBack(), **call)
    handle.remove()


def test_what_cannot_be_is_told():
    made = make("StableDiffusionPipeline")
    with pytest.raises(ConfigError, match="timestep = 1000"):
        draw(made, DisBack(timestep=1000))
    with pytest.raises(ConfigError, match="one of them"):
        DisBack(lora="a.safetensors", weights="b.bin")
    with pytest.raises(ConfigError, match="timestep"):
        DisBack(timestep=-1)
    made.pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(Unsupported, match="EDM"):
        draw(made, DisBack())
    zero = DDIMScheduler(prediction_type="epsilon", rescale_betas_zero_snr=True)
    made.pipe.scheduler = zero
    with pytest.raises(ConfigError, match="nothing but noise"):
        draw(made, DisBack())
    assert draw(made, DisBack(timestep=900)).isfinite().all()
    with pytest.raises(ConfigError, match="one"):
        OneStepScheduler().set_timesteps(2)


def test_a_lora_of_another_model_and_a_fused_one_are_refused(tmp_path):
    path = tmp_path / "student.safetensors"
    learn(path, steps=1, path=0)
    with pytest.raises(ArtefactMismatch, match="no LoRA of this"):
        load_pipeline(make("StableDiffusionXLPipeline").pipe, plugins=[DisBack(lora=str(path))])
    made = make("StableDiffusionPipeline")
    made.pipe.load_lora_weights(str(path), adapter_name="own")
    made.pipe.fuse_lora(adapter_names=["own"])
    with pytest.raises(Unsupported, match="unfuse_lora"):
        load_pipeline(made.pipe, plugins=[DisBack(lora=str(path))])


def test_an_empty_dict_is_refused_on_loading():
    pipe = make("StableDiffusionPipeline").pipe
    with pytest.raises(ConfigError, match=r"names no denoiser.*unet"):
        load_pipeline(pipe, {"disback": {"lora": {}}})


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler, LCMScheduler])
@pytest.mark.parametrize("t", [None, 399])
def test_a_run_is_one_call_of_the_unet_and_the_closed_form(cls, kind, t):
    """A loop of its own in plain torch: two prompts, two pictures each, from the noise of the call's generator."""
    pipe = make("StableDiffusionPipeline").pipe
    pipe.scheduler = cls(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind)
    text, at = pipe.encode_prompt(["a cat", "a dog"], "cpu", 2, False)[0], 999 if t is None else t
    z = torch.randn((4, 4, *[pipe.unet.config.sample_size] * 2), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        said = pipe.unet(z, torch.tensor(at), encoder_hidden_states=text).sample.double()
    abar = pipe.scheduler.alphas_cumprod[at].double()
    a, s = abar.sqrt(), (1 - abar).sqrt()
    x0 = {"epsilon": (z - s * said) / a, "v_prediction": a * z - s * said, "sample": said}[kind]
    load_pipeline(pipe, {"disback": {"timestep": t}})
    drawn = pipe(["a cat", "a dog"], num_images_per_prompt=2, generator=torch.Generator().manual_seed(3), output_type="latent").images
    assert (drawn - x0).abs().max() < 5e-6 * x0.abs().max()
    assert pipe.plugins.report().forwards == {"cond": 1}


def test_a_users_lora_and_published_weights_do_not_mix(tmp_path):
    from peft import LoraConfig

    made = small_xl()
    made.pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "own")
    with pytest.raises(Unsupported, match="a LoRA lies"):
        load_pipeline(made.pipe, plugins=[DisBack(weights=Weights(LAYOUT.synthetic()))])


# the path ------------------------------------------------------------------------------------------------------------------------------


def test_the_path_is_kept_forwards_and_walked_backwards():
    path = Path(points=4, record=100, stay=10)
    assert [(step, k) for step in range(200) if (k := path.kept_at(step)) is not None] == [(25, 1), (50, 2), (75, 3), (100, 4)]
    walked = [path.target(step) for step in range(100, 160)]
    assert walked == [3] * 10 + [2] * 10 + [1] * 10 + [0] * 30
    assert [path.records(step) for step in (0, 99, 100)] == [True, True, False]
    plain = Path(points=0, record=0, stay=10)
    assert not any(plain.records(step) or plain.kept_at(step) or plain.target(step) for step in range(50))


def test_the_fit_keeps_what_the_fake_was_and_goes_back(tmp_path):
    """theta_k is the fake at the k-th point; the student and its LoRA stay as they are in stage 1; targets come as N - 1, ..., 0."""
    fakes, students, targets = {}, {}, []

    def see(fitter, batch, what):
        if what == "before":
            fakes[batch.step], students[batch.step] = of(fitter, "fake"), of(fitter, "fit")
        elif what != "after":
            targets.append((batch.step, what))
        else:
            for k, step in ((1, 2), (2, 4)):
                if batch.step >= step:
                    mine = of(fitter, point(k))
                    assert mine
                    assert all(torch.equal(value, fakes[step][key]) for key, value in mine.items())

    learn(tmp_path / "student.safetensors", plugin=watching(see))
    assert targets == [(4, 1), (6, 0)]
    for step in range(5):
        assert all(torch.equal(value, students[0][key]) for key, value in students[step].items())
    assert any(not torch.equal(value, students[0][key]) for key, value in students[5].items())
    assert any(not torch.equal(value, fakes[0][key]) for key, value in fakes[1].items())


def test_without_a_path_it_is_distribution_matching_bit_for_bit(tmp_path):
    """Plain DMD, written anew: another fitter without a word of a path."""
    from diffgraft.methods.matching import MatchingConfig, MatchingFitter
    from diffgraft.methods.predictions import SignalNoise, clean_estimate

    class Plain(MatchingFitter):
        Config = MatchingConfig
        targets = LAYERS

        def factor(self, step, steps):
            return min(1.0, (step + 1) / 20)

        def sample(self, session, batch, calls):
            z = torch.randn(calls["cond"]["sample"].shape, generator=batch.generator)
            abar = self.probe.scheduler.alphas_cumprod[-1]
            prediction = self.predict(session, z, torch.full((len(z),), 999), calls["cond"], "fit")
            return clean_estimate(z, prediction, SignalNoise(abar.sqrt(), (1 - abar).sqrt()), self.kind)

    class PlainDMD(DisBack):
        fitting = Plain

    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    learn(one, steps=4, path=0)
    made = make("StableDiffusionPipeline")
    fit(made.pipe, PlainDMD(), EXAMPLES, SETTINGS, two, FitPlan(4, 2), knobs={"rank": 2, "student_every": 2})
    mine, plain = load_file(one), load_file(two)
    assert mine.keys() == plain.keys()
    assert all(torch.equal(value, plain[key]) for key, value in mine.items())
    assert any(value.any() for key, value in mine.items() if "lora_B" in key or "lora.up" in key)


class Draws(TorchFunctionMode):
    """What is drawn, in order."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.randn, torch.rand):
            self.made.append(out.clone())
        return out


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_both_stages_are_the_loop_in_plain_torch(tmp_path, kind):
    """Losses and the student's weights, by a loop written from the paper and the README: LoRA merged by hand, no peft, nothing of ours.

    Given to it are the first weights of the two LoRA, the numbers that are drawn (z, the time's u, the noise e) and the prompts.
    """
    steps, N, record, stay, every, low, high, scale, rate, fake_rate = 8, 2, 3, 2, 2, 0.1, 0.9, 3.0, 1e-3, 2e-3
    first, draws, prompts = {}, [], []

    class Seen(DisBackFitter):
        def loss(self, session, batch):
            if not first:
                first.update({n: p.detach().double() for n, p in self.trained.named_parameters() if ".fit." in n or ".fake." in n})
            with Draws() as drawn:
                losses = super().loss(session, batch)
            draws.append([each.double() for each in drawn.made[-3:]])  # before them the pipeline draws its own
            prompts.append([each.prompt for each in batch.examples])
            return losses

    class Seeing(DisBack):
        fitting = Seen

    made = make("StableDiffusionPipeline")
    pipe = made.pipe
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=kind)
    pipe.to(torch.float64)
    knobs = {"path": N, "record": record, "stay": stay, "student_every": every, "t_low": low, "t_high": high}
    knobs |= {"teacher_guidance": scale, "rate": rate, "fake_rate": fake_rate, "rank": 2}
    out = tmp_path / "student.safetensors"
    found = fit(pipe, Seeing(), EXAMPLES, SETTINGS, out, FitPlan(steps, 2), knobs=knobs)

    base = {n: p.detach() for n, p in pipe.unet.named_parameters()}
    abar = pipe.scheduler.alphas_cumprod.double()
    live = {n: p.clone().requires_grad_() for n, p in first.items()}
    groups = [{"params": [p for n, p in live.items() if f".{name}." in n], "lr": lr} for name, lr in (("fit", rate), ("fake", fake_rate))]
    adam = torch.optim.Adam(groups, betas=(0.0, 0.999))

    def words(texts):
        ids = pipe.tokenizer(texts, padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True, return_tensors="pt")
        with torch.no_grad():
            return pipe.text_encoder(ids.input_ids)[0]

    def ask(x, t, text, name=None, lora=live):
        weights = dict(base)
        for key in lora:
            if f".lora_A.{name}." in key:
                layer, down, up = key.split(".lora_A.")[0] + ".weight", lora[key], lora[key.replace(".lora_A.", ".lora_B.")]
                weights[layer] = base[layer] + (up.flatten(1) @ down.flatten(1)).view_as(base[layer])
        return torch.func.functional_call(pipe.unet, weights, (x, t, text)).sample

    def at(t):
        return abar[t].sqrt().view(-1, 1, 1, 1), (1 - abar[t]).sqrt().view(-1, 1, 1, 1)

    def clean(x, prediction, t):
        a, s = at(t)
        return (x - s * prediction) / a if kind == "epsilon" else a * x - s * prediction

    theta, losses = {}, []
    for step, ((z, u, e), texts) in enumerate(zip(draws, prompts, strict=True)):
        for k in range(1, N):
            if step == round(k * record / N):
                theta[k] = {n: p.detach().clone() for n, p in live.items()}
        text, last, moves = words(texts), torch.full((len(z),), len(abar) - 1), step >= record and (step - record) % every == 0
        with torch.set_grad_enabled(moves):
            x = clean(z, ask(z, last, text, "fit"), last)
        t = ((low + (high - low) * u) * len(abar)).long()
        a, s = at(t)
        noisy = a * x.detach() + s * e
        prediction = ask(noisy, t, text, "fake")
        loss = (prediction - (e if kind == "epsilon" else a * e - s * x.detach())).square().mean()
        if moves:
            k = max(N - 1 - (step - record) // stay, 0)
            with torch.no_grad():
                target = [ask(noisy, t, each, "fake" if k else None, theta.get(k, {})) for each in (text, words([""] * len(z)))]
                real = clean(noisy, target[1] + scale * (target[0] - target[1]), t)
                gradient = (clean(noisy, prediction, t) - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
            loss = loss + 0.5 * (x - (x - gradient).detach()).square().mean()
        for group, largest in zip(adam.param_groups, (rate, fake_rate), strict=True):
            group["lr"] = largest * min(1, (step + 1) / 20)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    assert losses == pytest.approx(found.facts["fit"]["losses"], rel=2e-6)
    learned = load_file(out)
    for name, value in live.items():
        if ".fit." in name:
            key = next(key for key in learned if key.endswith(name.replace(".fit", "")))
            assert torch.allclose(learned[key].double(), value.detach(), rtol=0, atol=5e-5), name
    moved = max(float((value.detach() - first[name]).abs().max()) for name, value in live.items() if ".fit." in name)
    assert moved > 4e-4  # of which the 5e-5 are a small part


def test_a_perfect_student_is_left_alone():
    """Where the fake and the target say the same there is no gradient, whichever point of the path says it."""
    x, clean = torch.randn(2, 2, 4, 8, 8)
    assert not matching_gradient(x, clean, clean).any()


def test_at_the_end_of_stage_1_the_two_scores_are_one(tmp_path):
    """theta_N is what the fake goes on from: against it, unguided, the gradient is zero; hence the way back begins at N - 1."""
    seen = []

    class Against(DisBackFitter):
        def real(self, session, at, calls, batch):
            own = self.clean(at, self.guided(session, at, calls, point(self.config.path)))
            fake = self.clean(at, self.predict(session, at.x, at.t, calls["cond"], "fake").detach())
            seen.append(float((own - fake).abs().max()))
            return super().real(session, at, calls, batch)

    class Watching(DisBack):
        fitting = Against

    learn(tmp_path / "student.safetensors", steps=7, plugin=Watching(), teacher_guidance=1.0)
    assert seen[0] == 0
    assert seen[1] > 0


@pytest.mark.parametrize("at", [3, 6])
def test_a_fit_that_was_stopped_ends_bit_for_bit_the_same(tmp_path, at):
    """In either stage: the points of the path are in the state."""
    whole, again = tmp_path / "whole.safetensors", tmp_path / "again.safetensors"
    learn(whole)
    with pytest.raises(KeyboardInterrupt):
        learn(again, resume_at=at)
    made = make("StableDiffusionPipeline")
    learn(again, made=made)
    assert whole.read_bytes() == again.read_bytes()
    assert not hasattr(made.pipe.unet, "peft_config")
    assert not any("path" in key or "fake" in key for key in load_file(whole))


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_what_was_learned_is_what_is_drawn(tmp_path, name):
    path = tmp_path / "student.safetensors"
    made = make(name)
    learn(path, steps=6, made=made, rate=1e-2)
    plain, student = draw(made, DisBack()), draw(made, DisBack(lora=str(path)))
    assert not torch.equal(plain, student)
    assert not hasattr(made.pipe.unet, "peft_config")
    made.pipe.load_lora_weights(str(path))  # as diffusers reads it
    assert torch.allclose(student, draw(made, DisBack()), atol=1e-4)


def test_the_student_draws_in_the_fit_what_the_run_draws(tmp_path):
    """The sample that is trained is that of a call: same noise, same timestep, same x_0."""
    made = make("StableDiffusionPipeline")
    found = []

    class Watched(DisBackFitter):
        def sample(self, session, batch, calls):
            drawn = torch.Generator().set_state(batch.generator.get_state())
            x = super().sample(session, batch, calls)
            found.append((torch.randn(x.shape, generator=drawn), x.detach(), [each.prompt for each in batch.examples]))
            return x

    class Watching(DisBack):
        fitting = Watched

    learn(tmp_path / "student.safetensors", steps=1, plugin=Watching(), made=made)
    noise, x, prompts = found[0]
    run = draw(made, DisBack(), prompt=prompts, negative_prompt=None, latents=noise, generator=None)
    assert torch.allclose(run, x, atol=1e-4 * float(x.abs().max()))
