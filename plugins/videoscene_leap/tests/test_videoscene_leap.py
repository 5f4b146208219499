"""The leap: its equations, where a run begins, both ends of its level, drafts in all their forms, what is refused, and the contract."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffgraft import ConfigError, Effects, Paper, Plugin, Unsupported, find_family, load_pipeline, unload
from diffgraft.methods.decoding import to_pixels
from diffgraft.methods.predictions import SignalNoise
from diffgraft.methods.starts import at_level
from diffgraft.testing import Case, contract_sample
from diffgraft_pipelines.tiny import make
from diffgraft_videoscene_leap import VideosceneLeap, __version__, moving_square
from diffgraft_videoscene_leap.drafts import Size, encode, ensure_size, grid_of, videos_of
from diffgraft_videoscene_leap.method import clean_of_flow, clean_of_v, flow_level
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

CASES = contract_sample("videoscene_leap", __version__)
"""Each check once and each family once; which meet changes with the version. All of them: ``diffgraft check``, or ``contract_cases``."""
FOUR = ("WanPipeline", "CogVideoXPipeline", "LTXPipeline", "AnimateDiffPipeline")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case) -> None:
    case.run()


# helpers ------------------------------------------------------------------------------------------------------------------------------


class Watch(Plugin):
    """Innermost: keeps what the denoiser is given and what it answers, call by call."""

    name = "watch"
    paper = Paper("none", "", "watches")
    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}
    effects = Effects(edits=frozenset({"latents"}))
    seen: ClassVar[list[Any]] = []

    def denoise(self, call, next):
        out = next(call)
        self.seen.append((call.latents.clone(), call.sample.clone(), float(call.step.t), out.clone()))
        return out


def run(name: str, scheduler: Any = None, call: dict[str, Any] | None = None, **knobs: Any) -> tuple[Any, torch.Tensor]:
    """(the pipeline, its result as latents) of a run of a tiny pipeline."""
    made = make(name)
    if scheduler is not None:
        made.pipe.scheduler = scheduler
    made.pipe.set_progress_bar_config(disable=True)
    Watch.seen.clear()
    load_pipeline(made.pipe, plugins=[VideosceneLeap(**knobs), Watch] if knobs else [Watch])
    given = without(made.kwargs, "num_inference_steps") | ({} if "steps" in knobs else {"num_inference_steps": 2})
    given |= {"output_type": "latent", "generator": torch.Generator().manual_seed(0), **(call or {})}
    return made.pipe, made.pipe(**given)[0]


def without(kwargs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key not in names}


def draft_for(name: str, n: int = 1) -> np.ndarray:
    """Videos [n, frames, height, width, 3] in the size of a tiny pipeline."""
    frames = {"WanPipeline": 5, "WanImageToVideoPipeline": 5, "AnimateDiffPipeline": 4}.get(name, 9)
    return np.stack([np.roll(moving_square(None, frames, 32, 32), 5 * i, 2) for i in range(n)])


def latents_of(name: str, draft: Any) -> torch.Tensor:
    pipe = make(name).pipe
    return encode(pipe, find_family(type(pipe)), torch.stack(videos_of(draft)))


def plain_flow() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


# the equations ------------------------------------------------------------------------------------------------------------------------


def test_what_a_right_prediction_gives_is_the_draft():
    """v = a eps - s z and u = eps - z at x_t = a z + s eps lead back to z."""
    z, eps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for abar in (0.9, 0.18, 0.01):
        a, s = torch.tensor(abar).sqrt(), torch.tensor(1 - abar).sqrt()
        torch.testing.assert_close(clean_of_v(at_level(z, eps, SignalNoise(a, s)), a * eps - s * z, a, s), z, rtol=0, atol=2e-6)
    for level in (0.1, 0.68, 0.99):
        s = torch.tensor(level)
        torch.testing.assert_close(clean_of_flow(at_level(z, eps, SignalNoise(1 - s, s)), eps - z, s), z, rtol=0, atol=1e-6)


@pytest.mark.parametrize("t", [549, 459, 99])
def test_it_is_the_schedulers_velocity_of_prediction_and_sample(t):
    """``video_gen`` calls ``get_velocity(v, x_t, t)``, with v in the place of the clean sample and x_t in that of the noise."""
    scheduler = make("CogVideoXPipeline").pipe.scheduler
    x, v, abar = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4), scheduler.alphas_cumprod[t]
    expected = scheduler.get_velocity(v, x, torch.tensor([t]))
    torch.testing.assert_close(clean_of_v(x, v, abar.sqrt(), (1 - abar).sqrt()), expected, rtol=0, atol=1e-6)


def test_the_level_of_flows_is_as_noisy_as_the_authors():
    """CogVideoX-5B at t = 549: 0.681."""
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True, "snr_shift_scale": 1.0}
    abar = CogVideoXDDIMScheduler(**settings).alphas_cumprod[549]
    s = flow_level(abar)
    assert float(s) == pytest.approx(0.681, abs=1e-3)
    assert float(s / (1 - s)) == pytest.approx(float(((1 - abar) / abar).sqrt()), rel=1e-5)
    assert float(flow_level(torch.tensor(0.5))) == 0.5


# where a run begins -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOUR)
def test_a_run_begins_at_the_noised_draft(name):
    draft = draft_for(name)
    pipe, _ = run(name, draft=draft, level=0.55)
    x, _, t, _ = Watch.seen[0]
    _, _ = run(name)
    eps = Watch.seen[0][0]  # LTX, Wan: sigma = 1; DDIM: unit noise
    flow = name in ("WanPipeline", "LTXPipeline")
    assert abs(t - (550 if flow else 549)) <= 1
    abar = torch.tensor(0.0) if flow else pipe.scheduler.alphas_cumprod[549]
    a, s = (torch.tensor(0.45), torch.tensor(0.55)) if flow else (abar.sqrt(), (1 - abar).sqrt())
    torch.testing.assert_close(x, a * latents_of(name, draft) + s * eps, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_the_first_step_is_at_t_however_a_scheduler_spaces_its_steps(spacing, steps):
    for kind in (DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler):
        pipe, _ = run("AnimateDiffPipeline", kind(timestep_spacing=spacing), draft=moving_square, level=0.55, steps=steps)
        assert float(pipe.scheduler.timesteps[0]) == 549, kind.__name__
        assert pipe.plugins.report().steps == steps


@pytest.mark.parametrize("name", ["CogVideoXPipeline", "WanPipeline", "LTXPipeline"])
def test_one_step_is_the_clean_video_that_the_prediction_says(name):
    """The v -> x0 identity."""
    call = {"guidance_scale": 1.0}
    scheduler = plain_flow() if name == "WanPipeline" else None
    pipe, out = run(name, scheduler, call, draft=draft_for(name), level=0.55, steps=1)
    ((x, _, _, prediction),) = Watch.seen
    if name == "CogVideoXPipeline":
        abar = pipe.scheduler.alphas_cumprod[549]
        expected = clean_of_v(x, prediction, abar.sqrt(), (1 - abar).sqrt())
    else:
        expected = clean_of_flow(x, prediction, torch.tensor(0.55))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_under_lcm_it_is_the_same_step():
    pipe, out = run("CogVideoXPipeline", LCMScheduler.from_config(make("CogVideoXPipeline").pipe.scheduler.config), {"guidance_scale": 1.0},
                    draft=draft_for("CogVideoXPipeline"), level=0.55, steps=1)  # fmt: skip
    ((x, _, t, v),) = Watch.seen
    abar = pipe.scheduler.alphas_cumprod[549]
    assert t == 549
    torch.testing.assert_close(out, clean_of_v(x, v, abar.sqrt(), (1 - abar).sqrt()), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), [(LCMScheduler, "CogVideoXPipeline"), (TCDScheduler, "AnimateDiffPipeline")])
@pytest.mark.parametrize(
    ("level", "times"),
    [(0.46, [459]), (0.46, [459, 239]), (0.55, [549, 279]), (0.099, [98, 59]), (0.05, [49, 39]), (0.999, [998, 499]), (0.02, [19])],
)
def test_under_lcm_and_tcd_a_run_begins_at_t_and_goes_on_their_own_grid(kind, name, level, times):
    """Their grid is 19, 39, ... 999 at all levels: the authors' 459 is on it, and their 549 is not."""
    scheduler = kind.from_config(make(name).pipe.scheduler.config)
    pipe, _ = run(name, scheduler, {"guidance_scale": 1.0}, draft=draft_for(name), level=level, steps=len(times))
    assert pipe.scheduler.timesteps.tolist() == times
    assert [t for _, _, t, _ in Watch.seen] == times


@pytest.mark.parametrize(
    "kind", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler]
)
def test_there_are_as_many_steps_as_are_asked_for(kind):
    """diffusers makes one too many where no float is M / n: 600 / 7."""
    pipe, _ = run("AnimateDiffPipeline", kind(), {"guidance_scale": 1.0}, draft=moving_square, level=0.6, steps=7)
    assert pipe.plugins.report().steps == 7
    assert pipe.scheduler.timesteps.tolist()[:: 2 if kind is HeunDiscreteScheduler else 1][-1] >= 0


def test_more_steps_than_are_left_are_refused_before_the_text_and_at_the_load_where_the_knobs_say_it():
    for scheduler, level, way in (
        (None, 0.02, "20 training steps are left, fewer than the 30 that are asked for; take level = 0.03 or more"),
        (LCMScheduler(), 0.06, "3 training steps are left of the 50 that LCMScheduler goes by, .*; take level = 0.581 or more"),
    ):
        made = make("AnimateDiffPipeline")
        made.pipe.scheduler = scheduler or made.pipe.scheduler
        texts = []
        made.pipe.text_encoder.register_forward_pre_hook(lambda *_: texts.append(1))  # noqa: B023
        load_pipeline(made.pipe, plugins=[VideosceneLeap(draft=moving_square, level=level)])
        with pytest.raises(ConfigError, match=way):
            made.pipe(**{**made.kwargs, "num_inference_steps": 30})
        assert not texts
        unload(made.pipe)
        with pytest.raises(ConfigError, match=way):
            load_pipeline(made.pipe, plugins=[VideosceneLeap(draft=moving_square, level=level, steps=30)])


def test_a_first_level_below_1_is_said():
    """The leap level is a share of the scheduler's own first level."""

    class Low(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            self.sigmas, self.timesteps = 0.99 * self.sigmas, 0.99 * self.timesteps

    pipe, _ = run("WanPipeline", Low(shift=3.0), draft=draft_for("WanPipeline"), level=0.6, steps=2)
    assert float(pipe.scheduler.sigmas[0]) == pytest.approx(0.594)
    assert "so the leap is to 0.594 = level x 0.99" in str(pipe.plugins.report())


# both ends of the level ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOUR)
def test_towards_0_the_draft_comes_out(name):
    """Its own latents, up to what the last level of noise leaves; nearer and nearer."""
    z = latents_of(name, draft_for(name))
    apart = [float((run(name, draft=draft_for(name), level=level, steps=1)[1] - z).abs().max()) for level in (0.1, 0.01, 0.001)]
    assert apart[0] > apart[1] >= apart[2]
    assert apart[2] < (0.02 if name in ("WanPipeline", "LTXPipeline") else 0.25)  # betas begin at t = 0 with s = 0.03 to 0.04


def test_towards_0_the_pixels_are_the_autoencoders_round_trip():
    pipe = load_pipeline("emoji-wan", plugins=[])
    pipe.set_progress_bar_config(disable=True)
    draft, family = moving_square(None, 9, 64, 64), find_family(type(pipe))
    z = encode(pipe, family, torch.stack(videos_of(draft)))
    with torch.no_grad():
        wanted = to_pixels(pipe, family, z, {})[0].movedim(1, 0) / 2 + 0.5
    load_pipeline(pipe, plugins=[VideosceneLeap(draft=draft, level=1e-4, steps=1)])
    found = pipe("a small owl stays still on a yellow background", output_type="pt", generator=torch.Generator().manual_seed(0)).frames[0]
    assert float((found - wanted.clamp(0, 1)).abs().max()) < 5e-3


@pytest.mark.parametrize("name", FOUR)
def test_at_1_a_run_is_the_plain_one_bit_for_bit(name):
    assert run(name, draft=draft_for(name), level=1.0)[1].equal(run(name)[1])
    eps = torch.randn(1, 4, 3)
    assert at_level(torch.randn(1, 4, 3), eps, SignalNoise(torch.tensor(0.0), torch.tensor(1.0))).equal(eps)


def test_at_1_what_has_no_effect_is_refused_or_said():
    with pytest.raises(ConfigError, match="steps = 4 has no effect at level = 1"):
        VideosceneLeap(draft=moving_square, level=1.0, steps=4)
    pipe, _ = run("WanPipeline", draft=draft_for("WanPipeline"), level=1.0)
    assert "size, frames and steps are the call's, and not the draft's" in str(pipe.plugins.report())
    load_pipeline(unload(pipe), plugins=[VideosceneLeap(steps=4)])
    pipe(**make("WanPipeline").kwargs)
    assert "steps = 4 is not applied" in str(pipe.plugins.report())


def test_with_one_step_ddim_ends_at_its_first_abar():
    """AnimateDiff's usual DDIM (``set_alpha_to_one=False``): sqrt(abar_0) x_0 + sqrt(1 - abar_0) eps, not x_0."""
    pipe, out = run("AnimateDiffPipeline", DDIMScheduler(beta_schedule="linear", set_alpha_to_one=False, clip_sample=False),
                    {"guidance_scale": 1.0}, draft=moving_square, level=0.55, steps=1)  # fmt: skip
    ((x, _, t, eps),) = Watch.seen
    abar, abar_0 = pipe.scheduler.alphas_cumprod[int(t)], pipe.scheduler.alphas_cumprod[0]
    x0 = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
    torch.testing.assert_close(out, abar_0.sqrt() * x0 + (1 - abar_0).sqrt() * eps, rtol=0, atol=1e-5)


def test_without_a_draft_a_run_is_the_plain_one_and_says_so():
    pipe, out = run("WanPipeline", level=0.5)
    assert "no draft is given" in str(pipe.plugins.report())
    assert out.equal(run("WanPipeline")[1])
    assert not VideosceneLeap(level=0.5).effects.edits
    assert not VideosceneLeap(draft=moving_square, level=1).effects.edits


# latents ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOUR)
def test_latents_are_what_the_pipelines_own_end_decodes(name):
    """Scale and layout: its own decoding gives the autoencoder's round trip."""
    pipe, video = make(name).pipe, torch.stack(videos_of(draft_for(name)))
    z = latents_of(name, draft_for(name))
    frames, vae = video.shape[2], pipe.vae
    with torch.no_grad():
        if name == "AnimateDiffPipeline":
            flat = video[0].movedim(1, 0)
            wanted = vae.decode(vae.encode(flat).latent_dist.mode())[0].movedim(0, 1)[None]
            found = pipe.decode_latents(z)
        else:
            wanted = vae.decode(vae.encode(video).latent_dist.mode(), return_dict=False)[0]
            if name == "CogVideoXPipeline":
                found = pipe.decode_latents(z)
            elif name == "WanPipeline":
                mean, std = (torch.tensor(vae.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
                found = vae.decode(z * std + mean, return_dict=False)[0]
            else:
                side, time = 32 // pipe.vae_spatial_compression_ratio, (frames - 1) // pipe.vae_temporal_compression_ratio + 1
                maps = pipe._unpack_latents(z, time, side, side, 1, 1)
                found = vae.decode(pipe._denormalize_latents(maps, vae.latents_mean, vae.latents_std), return_dict=False)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_a_start_picture_stays_what_it_is():
    """Image to video: the channels behind the latents are those of the plain run."""
    name = "WanImageToVideoPipeline"
    run(name, draft=draft_for(name), level=0.6)
    leaps = Watch.seen[0]
    run(name)
    plain = Watch.seen[0]
    channels = leaps[0].shape[1]
    assert leaps[1][:, channels:].equal(plain[1][:, channels:])
    assert not leaps[1][:, :channels].equal(plain[1][:, :channels])


# drafts -------------------------------------------------------------------------------------------------------------------------------


def test_the_forms_of_a_draft_are_one(tmp_path: Path):
    array = moving_square(None, 5, 32, 32)
    wanted = torch.from_numpy(array).movedim(-1, 1).movedim(1, 0) / 127.5 - 1
    pictures = [Image.fromarray(frame) for frame in array]
    tensor = torch.from_numpy(array).movedim(-1, 1) / 255
    np.save(tmp_path / "draft.npy", array)
    for i, picture in enumerate(pictures):
        (tmp_path / "frames").mkdir(exist_ok=True)
        picture.save(tmp_path / "frames" / f"{i:03d}.png")
    pictures[0].save(tmp_path / "draft.gif", save_all=True, append_images=pictures[1:], duration=100)
    forms = [array, array / 255, array[None], tensor, tensor[None], list(tensor), list(array), pictures, [pictures], tuple(pictures),
             tmp_path / "draft.npy", str(tmp_path / "frames"), tmp_path / "draft.gif"]  # fmt: skip
    for form in forms:
        (video,) = videos_of(VideosceneLeap(draft=form).config.draft)
        torch.testing.assert_close(video, wanted.float(), rtol=0, atol=1e-2)  # a .gif has 256 colours
    assert len(videos_of([pictures, pictures])) == len(videos_of([tensor, array])) == len(videos_of([tmp_path / "draft.npy"] * 2)) == 2


def test_a_function_renders_in_the_size_of_the_call_for_each_prompt():
    asked = []

    def render(prompt, frames, height, width):
        asked.append((prompt, frames, height, width))
        return moving_square(prompt, frames, height, width)

    run("WanPipeline", call={"prompt": ["a", "b"], "negative_prompt": ["c", "c"], "width": 16, "generator": None}, draft=render)
    assert asked == [("a", 5, 32, 16), ("b", 5, 32, 16)]
    asked.clear()
    made = make("CogVideoXPipeline")
    load_pipeline(made.pipe, plugins=[VideosceneLeap(draft=render)])
    given = without(made.kwargs, "height", "width", "num_frames", "num_inference_steps", "output_type")
    made.pipe(**given, num_inference_steps=1, output_type="latent")
    assert [size[1:] for size in asked] == [(9, 32, 32)], "the pipeline's own size"


def test_a_draft_brings_its_size():
    made = make("WanPipeline")
    load_pipeline(made.pipe, plugins=[VideosceneLeap(draft=moving_square(None, 9, 16, 48), steps=1)])
    given = without(made.kwargs, "height", "width", "num_frames", "num_inference_steps", "output_type")
    assert made.pipe(**given, output_type="pt").frames.shape == (1, 9, 3, 16, 48)


def test_a_draft_for_each_prompt_and_one_for_all():
    drafts = draft_for("WanPipeline", 2)
    call = {"prompt": ["a dog", "two cats"], "negative_prompt": ["", ""]}

    def seeds(*numbers):
        return [torch.Generator().manual_seed(i) for i in numbers]

    _, both = run("WanPipeline", call={**call, "generator": seeds(0, 1)}, draft=list(drafts))
    _, second = run("WanPipeline", call={"prompt": "two cats", "negative_prompt": "", "generator": seeds(1)}, draft=drafts[1])
    torch.testing.assert_close(both[1:], second, rtol=0, atol=1e-4)
    _, same = run("WanPipeline", call={**call, "generator": seeds(0, 1)}, draft=drafts[1])
    torch.testing.assert_close(same[1:], second, rtol=0, atol=1e-4)
    _, several = run("WanPipeline", call={**call, "num_videos_per_prompt": 2, "generator": seeds(0, 2, 1, 3)}, draft=list(drafts))
    torch.testing.assert_close(several[2:3], second, rtol=0, atol=1e-4)
    assert len(several) == 4


@pytest.mark.parametrize("name", FOUR)
def test_it_costs_one_forward_a_step(name):
    pipe, _ = run(name, call={"guidance_scale": 1.0}, draft=draft_for(name), steps=3)
    assert sum(pipe.plugins.report().forwards.values()) == 3


def test_a_live_draft_goes_with_copies_and_other_settings():
    made = make("WanPipeline")
    draft = torch.from_numpy(draft_for("WanPipeline")[0]).movedim(-1, 1)
    pipe = load_pipeline(made.pipe, plugins=[VideosceneLeap(draft=draft, level=0.5)])
    pipe.plugins.configure("videoscene_leap", level=0.7)
    assert pipe.plugins["videoscene_leap"].config.level == 0.7
    copy.deepcopy(pipe)
    pipe.plugins.configure("videoscene_leap", level=1.0)
    assert pipe.plugins["videoscene_leap"].is_neutral


def test_in_half_precision():
    made = make("WanPipeline")
    made.pipe.to(torch.bfloat16).set_progress_bar_config(disable=True)
    load_pipeline(made.pipe, plugins=[VideosceneLeap(draft=draft_for("WanPipeline"))])
    assert made.pipe(**{**made.kwargs, "output_type": "latent"})[0].isfinite().all()


# refusals -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draft", "why"),
    [
        (draft_for("WanPipeline", 3), "draft has 3 videos, and the call has 1 prompts"),
        (moving_square(None, 9, 32, 32), "num_frames = 5, and the draft has 9"),
        (moving_square(None, 5, 48, 32), "height = 32, and the draft has 48"),
        (draft_for("WanPipeline")[0] * 2.0 / 255 - 1.0, "its values go from -0.686 to 0.882"),
        (draft_for("WanPipeline")[0][..., :2], "three colours are expected"),
        ([Image.new("RGB", (32, 32))] * 4 + [Image.new("RGB", (32, 16))], "its frames have different sizes"),
        (["no/such/film.mp4", 3], "no such file"),
        ([3], "int is no video"),
        ([moving_square], "a function is given alone"),
        (lambda *asked: None, "NoneType is no video"),
        (lambda prompt, frames, height, width: moving_square(prompt, frames + 4, height, width), "num_frames = 5, and the draft has 9"),
        (torch.full((5, 3, 32, 32), torch.nan), "its values go from nan"),
        (torch.zeros(0, 3, 32, 32), "three colours are expected"),
        ("no/such/draft.npy", "no such file"),
        (lambda prompt, frames, height, width: 1 / 0, "the function that renders it raised ZeroDivisionError for 5 frames of 32 x 32"),
    ],
)
def test_drafts_that_do_not_fit_are_refused_before_anything_runs(draft, why):
    with pytest.raises(ConfigError, match=why):
        run("WanPipeline", draft=draft)
    assert not Watch.seen


def test_frames_and_sides_that_the_autoencoder_does_not_keep_are_refused():
    pipe = make("WanPipeline").pipe
    grid = grid_of(pipe, find_family(type(pipe)))
    for size in (Size(6, 32, 32), Size(5, 40, 32)):
        with pytest.raises(ConfigError, match=r"1 \+ a multiple of 4 frames"):
            ensure_size(size, grid, {})
    ensure_size(Size(5, 32, 48), grid, {"height": 32})


def test_files_and_forms_that_are_none_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no pictures are in this folder"):
        run("WanPipeline", draft=tmp_path)
    (tmp_path / "draft.npy").write_bytes(b"not an array")
    with pytest.raises(ConfigError, match=r"draft\.npy"):
        run("WanPipeline", draft=tmp_path / "draft.npy")
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"a\.mp4"):
        run("WanPipeline", draft=tmp_path / "a.mp4")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match=r"objects\.npy.*it holds no plain array"):
        run("WanPipeline", draft=tmp_path / "objects.npy")
    (tmp_path / "a.txt").write_text("no film")
    with pytest.raises(ConfigError, match=r"a\.txt.*give a folder of pictures"):
        run("WanPipeline", draft=tmp_path / "a.txt")
    with pytest.raises(ConfigError, match="there is no such file or folder"):
        load_pipeline(make("WanPipeline").pipe, plugins=[VideosceneLeap(draft=["nope.mp4"])])
    with pytest.raises(ConfigError, match="a function is called as draft"):
        VideosceneLeap(draft=lambda prompt: None)
    for form in (3, "", [], torch.zeros(3, 8, 8), {"a": 1}):
        with pytest.raises(ConfigError, match="draft"):
            VideosceneLeap(draft=form)


def test_what_the_call_says_itself_is_not_ignored():
    with pytest.raises(ConfigError, match="steps = 3, and the call says num_inference_steps = 2"):
        run("WanPipeline", call={"num_inference_steps": 2}, draft=draft_for("WanPipeline"), steps=3)
    with pytest.raises(ConfigError, match="the call says timesteps itself"):
        run("CogVideoXPipeline", call={"timesteps": [900, 500]}, draft=draft_for("CogVideoXPipeline"))
    with pytest.raises(ConfigError, match="2 that are asked for"):
        run("CogVideoXPipeline", draft=draft_for("CogVideoXPipeline"), level=0.001)


def test_pipelines_and_schedulers_without_a_leap_are_refused_with_the_reason():
    for name in ("WanVideoToVideoPipeline", "CogVideoXVideoToVideoPipeline", "AnimateDiffVideoToVideoPipeline"):
        with pytest.raises(Unsupported, match="its strength is the leap level"):
            load_pipeline(make(name).pipe, plugins=[VideosceneLeap(draft=moving_square)])
    with pytest.raises(Unsupported, match="PNDMScheduler follows no schedule but its own"):
        run("AnimateDiffPipeline", PNDMScheduler(skip_prk_steps=True), draft=moving_square)
    karras = EulerDiscreteScheduler(use_karras_sigmas=True, sigma_max=80.0)
    with pytest.raises(Unsupported, match="spreads its levels between sigma_min and sigma_max"):
        run("AnimateDiffPipeline", karras, draft=moving_square)
    pipe = make("WanImageToVideoPipeline").pipe
    pipe.register_to_config(expand_timesteps=True)
    with pytest.raises(Unsupported, match="puts its picture into the latents"):
        load_pipeline(pipe, plugins=[VideosceneLeap(draft=moving_square)])
    unload(load_pipeline(pipe, plugins=[VideosceneLeap]))


def test_knobs_are_refused_with_their_range():
    for knobs in ({"level": 0}, {"level": 1.5}, {"steps": 0}, {"levels": 0.5}):
        with pytest.raises(ConfigError, match=next(iter(knobs))):
            VideosceneLeap(**knobs)


def test_the_splatting_front_end_is_not_claimed():
    """The forbidden toy: no renderer of scenes is here, and nothing says so."""
    paper = VideosceneLeap.paper
    assert "splatting" in paper.omitted
    assert "splatting" not in paper.implemented
    assert "policy" in paper.omitted
