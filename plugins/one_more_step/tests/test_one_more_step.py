"""One More Step: the posterior from abar = 0, the network without a time and its files, where runs begin, the fit, and the contract."""

from __future__ import annotations

import math

import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, Unsupported, load_pipeline, unload
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.examples import Example
from diffgraft.methods.fitting import FitPlan, fit, fit_call
from diffgraft.methods.inputs import CallSettings
from diffgraft.methods.layouts import Spec
from diffgraft.methods.published import Weights
from diffgraft.testing import Case, contract_sample
from diffgraft.testing.watch import FirstLatents
from diffgraft_one_more_step import OneMoreStep, __version__
from diffgraft_one_more_step.method import clean, guided, share_of_noise
from diffgraft_one_more_step.network import LAYOUT, TIME, network, network_of, predict
from diffgraft_pipelines.tiny import make
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EDMEulerScheduler, EulerDiscreteScheduler, PNDMScheduler
from PIL import Image

CASES = contract_sample("one_more_step", __version__)
"""Each check once and each family once; which meet changes with the version. All of them: ``diffgraft check``, or ``contract_cases``."""

MEAN = torch.tensor([0.9, -0.5, 0.7, -1.1])
"""Of toy latents, by channel."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case) -> None:
    case.run()


# helpers ------------------------------------------------------------------------------------------------------------------------------


def tensors(seed: int = 0, **changed: torch.Tensor) -> dict[str, torch.Tensor]:
    """A small network's, of text width 32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = network(8, 4, 32).state_dict()
    return {key: changed.get(key.replace(".", "_"), value) for key, value in state.items() if not TIME.match(key)}


def constant(x0: torch.Tensor) -> dict[str, torch.Tensor]:
    """A network that tells x_0 = ``x0`` [channels] everywhere, of any noise and text."""
    return tensors(conv_out_weight=torch.zeros(4, 8, 3, 3), conv_out_bias=-x0)


def first_latents(state, made=None, scheduler=None, seeds=(0,), call=None, **knobs) -> torch.Tensor:
    """x_T [seeds, ...] of a run on a tiny pipeline, of which nothing is left on it."""
    made = made or make("StableDiffusionPipeline")
    if scheduler is not None:
        made.pipe.scheduler = scheduler
    made.pipe.set_progress_bar_config(disable=True)
    arguments = {**made.kwargs, "prompt": ["a red apple"] * len(seeds), "negative_prompt": None, "num_inference_steps": 4, **(call or {})}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    given = {} if state is None else {"weights": Weights(state)}
    load_pipeline(made.pipe, plugins=[OneMoreStep(**given, **knobs), FirstLatents])
    made.pipe(**{**arguments, "generator": generators, "output_type": "latent"})
    unload(made.pipe)
    return FirstLatents.seen[0]


def drawn(seeds, shape=(4, 8, 8)) -> tuple[torch.Tensor, torch.Tensor]:
    """What the generators give first and second."""
    both = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        both.append([torch.randn((1, *shape), generator=generator) for _ in range(2)])
    first, second = zip(*both, strict=True)
    return torch.cat(first), torch.cat(second)


def abar_of(scheduler, steps: int = 4) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    return scheduler.alphas_cumprod[int(scheduler.timesteps[0])]


# the equations ------------------------------------------------------------------------------------------------------------------------


def test_it_is_ddpms_posterior_from_pure_noise():
    """As abar falls to 0: mean sqrt(abar') (1 - A) / (1 - abar) x_0 + sqrt(A) (1 - abar') / (1 - abar) n with A = abar / abar',
    variance (1 - abar') (1 - A) / (1 - abar)."""
    n, n2, v, after = torch.randn(3), torch.randn(3), torch.randn(3), torch.tensor(0.3)
    for abar, tolerance in ((0.0, 1e-6), (1e-10, 1e-4)):
        A = abar / after
        x0 = math.sqrt(abar) * n - math.sqrt(1 - abar) * v
        mean = after.sqrt() * (1 - A) / (1 - abar) * x0 + A.sqrt() * (1 - after) / (1 - abar) * n
        x = mean + ((1 - after) * (1 - A) / (1 - abar)).sqrt() * n2
        torch.testing.assert_close(x, after.sqrt() * clean(v) + (1 - after).sqrt() * n2, atol=tolerance, rtol=0)


def test_guidance_at_one_is_the_prediction_and_at_zero_that_without_a_text():
    v0, v = torch.randn(5), torch.randn(5)
    torch.testing.assert_close(guided(v0, v, 1.0), v)
    assert guided(v0, v, 0.0).equal(v0)


def test_the_officials_deviation_is_a_variance():
    abar = torch.tensor(0.3)
    a, s = abar.sqrt(), (1 - abar).sqrt()
    assert share_of_noise(a, s, "deviation") == 1
    torch.testing.assert_close(s * share_of_noise(a, s, "variance"), 1 - abar)
    sigma = s / a  # the same sample in the unit of Euler's schedulers
    torch.testing.assert_close(a * sigma * share_of_noise(torch.tensor(1.0), sigma, "variance"), 1 - abar)


# where a run begins -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", ["deviation", "variance"])
def test_without_a_picture_it_is_noise_of_the_levels_own_deviation(std):
    seeds = range(40)
    made = make("StableDiffusionPipeline")
    abar = abar_of(made.pipe.scheduler)
    x = first_latents(constant(torch.zeros(4)), made, seeds=seeds, std=std)
    deviation = (1 - abar).sqrt() if std == "deviation" else 1 - abar
    torch.testing.assert_close(x, deviation * drawn(seeds)[1])
    assert abs(float(x.std()) / float(deviation) - 1) < 0.02
    assert abs(float(x.mean())) < 0.03


def test_with_the_exact_mean_of_the_data_the_start_has_the_mean_of_the_trainings_noisiest_samples():
    """Data N(m, S): the start N(a m, 1 - abar) against q(x_T) = N(a m, abar S + 1 - abar), and plain noise N(0, 1)."""
    seeds = range(60)
    made = make("StableDiffusionPipeline")
    abar, S = abar_of(made.pipe.scheduler), 0.3
    x = first_latents(constant(MEAN), made, seeds=seeds).transpose(0, 1).flatten(1)
    wanted, variance = abar.sqrt() * MEAN, abar * S + 1 - abar
    error = 4 * (variance / x.shape[1]).sqrt()
    assert torch.all((x.mean(1) - wanted).abs() < error)
    assert torch.all(wanted.abs() > error), "the toy shows nothing"
    near = (math.log(variance / (1 - abar)) + (1 - abar) / variance - 1) / 2
    far = (wanted.square() / variance + math.log(variance) + 1 / variance - 1) / 2
    assert torch.all(near < far / 3)


def test_under_euler_the_network_is_told_unit_noise_and_the_start_has_eulers_unit():
    made = make("StableDiffusionPipeline")
    vp = first_latents(tensors(), made, seeds=(0, 1))
    abar = abar_of(made.pipe.scheduler)
    euler = EulerDiscreteScheduler.from_config(made.pipe.scheduler.config, timestep_spacing="leading")
    ve = first_latents(tensors(), made, euler, seeds=(0, 1))
    assert euler.init_noise_sigma > 3
    torch.testing.assert_close(ve * abar.sqrt(), vp, atol=2e-4, rtol=1e-4)


def test_the_start_is_what_the_equations_say_of_the_networks_answer():
    made = make("StableDiffusionPipeline")
    state, (n, n2) = tensors(), drawn((3, 4))
    x = first_latents(state, made, seeds=(3, 4), call={"prompt": ["a red apple", "two dogs"]}, guidance_scale=1.7)
    abar = abar_of(made.pipe.scheduler)
    psi = network_of(state, torch.device("cpu"), torch.float32)
    text = [made.pipe.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in (["a red apple", "two dogs"], ["", ""])]
    with torch.no_grad():
        v, v0 = (predict(psi, n, each) for each in text)
    torch.testing.assert_close(x, -abar.sqrt() * (v0 + 1.7 * (v - v0)) + (1 - abar).sqrt() * n2)
    assert (v - v0).abs().max() > 1e-3


def test_its_prompt_is_the_calls_where_none_is_named_and_encoder_may_be_the_pipelines_own():
    made = make("StableDiffusionPipeline")
    own = made.pipe.tokenizer, made.pipe.text_encoder
    call = {"prompt": "two dogs", "num_images_per_prompt": 2}
    ways = ({}, {"prompt": "two dogs"}, {"encoder": own}, {"encoder": own, "prompt": ("two dogs",)}, {"prompt": "a blue sky"})
    found = [first_latents(tensors(), made, seeds=(0, 1), call=call, **knobs) for knobs in ways]
    for other in found[1:4]:
        torch.testing.assert_close(other, found[0])
    assert not torch.allclose(found[4], found[0])


def test_a_schedule_that_has_no_single_step():
    """PNDM with its Runge-Kutta steps cannot make a schedule of one step, in which another prompt might be asked for."""
    made = make("StableDiffusionPipeline")
    load_pipeline(made.pipe, plugins=[OneMoreStep(weights=Weights(tensors()), guidance_scale=2.0, prompt="red")])
    made.pipe.scheduler = PNDMScheduler.from_config(made.pipe.scheduler.config, skip_prk_steps=False)
    made.pipe(**{**made.kwargs, "num_inference_steps": 4})
    assert made.pipe.plugins.report().plugins["one_more_step"].counts["more steps"]


def test_a_sample_in_a_batch_is_the_sample_alone():
    together = first_latents(tensors(), seeds=(0, 1, 2), call={"prompt": ["a", "b", "c"]}, guidance_scale=2.0)
    for i in range(3):
        alone = first_latents(tensors(), seeds=(i,), call={"prompt": "abc"[i]}, guidance_scale=2.0)
        torch.testing.assert_close(alone, together[i : i + 1])


def test_the_calls_own_guidance_has_no_say_in_it():
    on, off = (first_latents(tensors(), call={"guidance_scale": scale}, guidance_scale=2.0) for scale in (7.5, 1.0))
    torch.testing.assert_close(on, off)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline"])
def test_off_and_without_a_network_are_the_plain_pipeline(name):
    made = make(name)
    made.pipe.set_progress_bar_config(disable=True)

    def run():
        return made.pipe(**{**made.kwargs, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}).images

    plain = run()
    for plugin in (OneMoreStep(one_more=False), OneMoreStep()):
        load_pipeline(made.pipe, plugins=[plugin])
        assert run().equal(plain)
        unload(made.pipe)
    width = made.pipe.unet.config.cross_attention_dim
    load_pipeline(made.pipe, plugins=[OneMoreStep(weights=Weights(LAYOUT.synthetic({**LAYOUT.small, "d": width})), one_more=False)])
    assert run().equal(plain)
    made.pipe.plugins.configure("one_more_step", one_more=True)
    assert not run().equal(plain)
    assert made.pipe.plugins.report().plugins["one_more_step"].counts


def test_a_pipeline_of_half_precision():
    made = make("StableDiffusionPipeline")
    full = first_latents(tensors(), made)
    made.pipe.to(torch.bfloat16)
    half = first_latents(tensors(), made)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, atol=0.05, rtol=0.05)


# refusals -----------------------------------------------------------------------------------------------------------------------------


def refuses(error, words, scheduler=None, made=None, **knobs):
    made = made or make("StableDiffusionPipeline")
    if scheduler is not None:
        made.pipe.scheduler = scheduler
    with pytest.raises(error, match=words):
        load_pipeline(made.pipe, plugins=[OneMoreStep(**{"weights": Weights(tensors()), **knobs})])


def test_a_schedule_without_a_mismatch_is_refused():
    config = make("StableDiffusionPipeline").pipe.scheduler.config
    refuses(Unsupported, "ends in pure noise", DDIMScheduler.from_config(config, rescale_betas_zero_snr=True, timestep_spacing="trailing"))
    refuses(Unsupported, "ends in pure noise", DDIMScheduler.from_config(config, beta_schedule="squaredcos_cap_v2"))
    refuses(Unsupported, "no alphas_cumprod", EDMEulerScheduler())
    refuses(Unsupported, "use_flow_sigmas", DPMSolverMultistepScheduler.from_config(config, use_flow_sigmas=True))


def test_a_network_of_something_else_is_refused():
    refuses(Unsupported, "text of width 48", weights=Weights(LAYOUT.synthetic({**LAYOUT.small, "d": 48})))
    refuses(Unsupported, "no multiple of 4", weights=Weights(LAYOUT.synthetic({**LAYOUT.small, "w": 6})))
    refuses(Unsupported, "latents of 8 channels", weights=Weights(LAYOUT.synthetic({**LAYOUT.small, "c": 8})))
    made = make("StableDiffusionPipeline")
    wide = make("StableDiffusionXLPipeline").pipe
    refuses(
        Unsupported,
        "encoder gives",
        made=made,
        encoder=(wide.tokenizer, wide.text_encoder_2),
        weights=Weights(LAYOUT.synthetic({**LAYOUT.small, "d": 48})),
    )
    learned = fit_call(made.pipe, OneMoreStep(), lambda pipe: pipe(**{**made.kwargs, "num_inference_steps": 2}))
    refuses(ConfigError, "give one of them", made=made, artefact=learned)
    refuses(
        ConfigError, "leave encoder out", made=made, artefact=learned, weights=None, encoder=(made.pipe.tokenizer, made.pipe.text_encoder)
    )


def test_a_call_that_says_where_it_begins_is_refused():
    made = make("StableDiffusionPipeline")
    load_pipeline(made.pipe, plugins=[OneMoreStep(weights=Weights(tensors()))])
    with pytest.raises(Unsupported, match="latents were given"):
        made.pipe(**made.kwargs, latents=torch.randn(1, 4, 8, 8))
    with pytest.raises(Unsupported, match="begins with a noised picture"):
        load_pipeline(make("StableDiffusionImg2ImgPipeline").pipe, plugins=[OneMoreStep()])
    with pytest.raises(Unsupported, match="one_more_step does not work"):
        load_pipeline(make("FluxPipeline").pipe, plugins=[OneMoreStep()])


class Nudge(FirstLatents):
    """Further out or further in: edits the first latents."""

    name = "nudge"

    def denoise(self, call, next):
        return next(call.with_latents(call.latents + 0.1))


def test_it_stands_before_plugins_that_edit_latents():
    made = make("StableDiffusionPipeline")
    made.pipe.set_progress_bar_config(disable=True)
    plugin = OneMoreStep(weights=Weights(tensors()))
    load_pipeline(made.pipe, plugins=[plugin, Nudge])
    made.pipe(**made.kwargs)
    unload(made.pipe)
    load_pipeline(made.pipe, plugins=[Nudge, plugin])
    with pytest.raises(Unsupported, match="name one_more_step before it"):
        made.pipe(**made.kwargs)


def test_prompts_that_do_not_go_with_the_call_are_refused():
    made = make("StableDiffusionPipeline")
    made.pipe.set_progress_bar_config(disable=True)
    load_pipeline(made.pipe, plugins=[OneMoreStep(weights=Weights(tensors()), prompt=("a", "b"))])
    with pytest.raises(ConfigError, match="2 texts for a call with 1 prompts"):
        made.pipe(**made.kwargs)
    embeddings = made.pipe.encode_prompt("a", "cpu", 1, False)[0]
    own = made.pipe.tokenizer, made.pipe.text_encoder
    made.pipe.plugins.configure("one_more_step", prompt=None, encoder=own)
    arguments = {key: value for key, value in made.kwargs.items() if "prompt" not in key}
    with pytest.raises(ConfigError, match="as embeddings"):
        made.pipe(**arguments, prompt_embeds=embeddings, negative_prompt_embeds=embeddings)
    made.pipe.plugins.configure("one_more_step", prompt=None, encoder=None)
    made.pipe(**arguments, prompt_embeds=embeddings, negative_prompt_embeds=embeddings)


# the network and its files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes", [{"w": 8, "d": 32, "c": 4}, {"w": 160, "d": 1024, "c": 4}, {"w": 320, "d": 2048, "c": 4, "m": 2, "n": 10}]
)
def test_the_layout_is_the_stock_class_without_a_time(sizes):
    with torch.device("meta"):
        state = network(**sizes).state_dict()
    file = {key: Spec(tuple(value.shape), "float32") for key, value in state.items() if not TIME.match(key)}
    comparison = LAYOUT.compare(file)
    assert comparison.whole, comparison.faults
    assert comparison.sizes == {"m": 1, "n": 1, **sizes}
    assert file.keys() == comparison.used.keys()


def test_it_computes_what_a_network_without_a_time_computes():
    """Against its blocks, called one by one with no time embedding, whose layers in the residual blocks are gone."""
    psi = network_of(tensors(), torch.device("cpu"), torch.float32)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    v = predict(psi, x, text)
    assert v.equal(psi(x, torch.full((1,), 981.0), text, return_dict=False)[0])
    for module in psi.modules():
        if hasattr(module, "time_emb_proj"):
            module.time_emb_proj = None
    h = psi.conv_in(x)
    kept = [h]
    for block in psi.down_blocks:
        h, more = block(h, None, **({"encoder_hidden_states": text} if hasattr(block, "attentions") else {}))
        kept += more
    h = psi.mid_block(h, None, encoder_hidden_states=text)
    for block in psi.up_blocks:
        kept, skips = kept[: -len(block.resnets)], tuple(kept[-len(block.resnets) :])
        h = block(h, skips, None, **({"encoder_hidden_states": text} if hasattr(block, "attentions") else {}))
    torch.testing.assert_close(psi.conv_out(psi.conv_act(psi.conv_norm_out(h))), v)


def test_a_published_file_is_read_also_with_projections_that_are_convolutions(tmp_path):
    from safetensors.torch import save_file

    state = tensors()
    as_published = {
        key: value[..., None, None] if key.endswith(("proj_in.weight", "proj_out.weight")) else value for key, value in state.items()
    }
    save_file({key: value.half() for key, value in as_published.items()}, tmp_path / "oms.fp16.safetensors")
    made = make("StableDiffusionPipeline")
    read = first_latents(None, made, weights=str(tmp_path / "oms.fp16.safetensors"))
    torch.testing.assert_close(read, first_latents(state, made), atol=2e-3, rtol=2e-3)
    assert not torch.allclose(read, first_latents(None, made), atol=0.1)


def test_all_that_is_wrong_in_a_file_is_told_at_once():
    state = LAYOUT.synthetic()
    gone, renamed, turned = (
        "mid_block.resnets.0.norm1.bias",
        "conv_in.bias",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    )
    state["first.bias"] = state.pop(renamed)
    del state[gone]
    state[turned] = state[turned].T.contiguous()
    state["time_embedding.linear_1.weight"] = torch.zeros(16, 4)
    with pytest.raises(ArtefactMismatch) as error:
        load_pipeline(make("StableDiffusionPipeline").pipe, plugins=[OneMoreStep(weights=Weights(state))])
    for words in (gone, renamed, "first.bias", f"{turned}: is", "looks transposed", "time_embedding.linear_1.weight"):
        assert words in str(error.value)


def test_the_command_line_checks_a_published_file(tmp_path):
    from diffgraft.cli import app
    from typer.testing import CliRunner

    LAYOUT.synthetic(path=tmp_path / "oms.safetensors")
    said = CliRunner().invoke(app, ["weights", "check", "one_more_step", str(tmp_path / "oms.safetensors")])
    assert said.exit_code == 0, said.output


# the fit ------------------------------------------------------------------------------------------------------------------------------


def test_a_fit_learns_the_mean_and_its_file_serves_the_model_and_its_siblings(tmp_path):
    made = make("StableDiffusionPipeline")
    pipe = made.pipe
    pipe.set_progress_bar_config(disable=True)
    examples = [Example("a red picture", Image.new("RGB", (32, 32), (220, 30, 30))), Example("a dark one", Image.new("RGB", (32, 32)))]
    path = tmp_path / "oms.safetensors"
    learned = fit(pipe, OneMoreStep(), examples, CallSettings(height=32, width=32), path, FitPlan(60, batch=4))
    losses = learned.facts["fit"]["losses"]
    assert losses[-1] < 0.3 * losses[0]
    assert not [key for key in learned.tensors if TIME.match(key)]
    assert first_latents(None, made, artefact=path).equal(first_latents(None, made, weights=path))
    sibling = make("StableDiffusionPipeline", seed=1)
    with pytest.raises(ArtefactMismatch, match="other weights"):
        load_pipeline(sibling.pipe, plugins=[OneMoreStep(artefact=path)])
    first_latents(None, sibling, weights=path)


def test_an_artefact_that_is_not_a_network_is_refused():
    made = make("StableDiffusionPipeline")
    learned = fit_call(made.pipe, OneMoreStep(), lambda pipe: pipe(**{**made.kwargs, "num_inference_steps": 2}))
    lacking = {key: value for key, value in learned.tensors.items() if "up_blocks.1.attentions.2" not in key}
    with pytest.raises(ArtefactMismatch, match=r"up_blocks\.1\.attentions\.2"):
        load_pipeline(made.pipe, plugins=[OneMoreStep(artefact=Artefact(learned.made_for, lacking, learned.facts, kind="fit"))])
