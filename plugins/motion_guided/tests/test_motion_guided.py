"""Motion guidance against torch's own warping and autograd, closed forms, a loop in plain torch, and what must not change anything."""

from __future__ import annotations

import importlib
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from diffgraft import ConfigError, DiffgraftError, Effects, Unsupported, load_pipeline, unload
from diffgraft.methods.predictions import SignalNoise
from diffgraft.testing import Case, contract_sample
from diffgraft_motion_guided import MotionGuided, __version__, as_clips, as_sample, power
from diffgraft_motion_guided.flows import Flows, dis, estimated, pan, read_clip, read_flow, resized
from diffgraft_motion_guided.method import (
    loss_and_gradient,
    motion_of,
    occluded,
    posterior_variance,
    scale_of,
    warped,
    warped_back,
    warping,
)
from diffusers import (
    AutoencoderKLWan,
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionUpscalePipeline,
    UniPCMultistepScheduler,
)
from PIL import Image
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

CASES = contract_sample("motion_guided", __version__)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def smooth(frames: int, h: int, w: int, size: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Flows [frames - 1, 2, h, w] that vary slowly, and that nearly lead back."""
    forward = interpolate(drawn(frames - 1, 2, 3, 3, seed=seed), (h, w), mode="bicubic") * size
    return forward, -forward + 0.2 * interpolate(drawn(frames - 1, 2, 3, 3, seed=seed + 1), (h, w), mode="bicubic")


def torchs_warp(x: Tensor, flow: Tensor) -> Tensor:
    """Bilinear, zeros outside, through coordinates of -1 to 1 with aligned corners."""
    h, w = x.shape[-2:]
    y, xs = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    at = torch.stack([2 * (xs + flow[:, 0]) / (w - 1) - 1, 2 * (y + flow[:, 1]) / (h - 1) - 1], -1).to(x.dtype)
    return grid_sample(x, at, mode="bilinear", padding_mode="zeros", align_corners=True)


def clip_with(shift: tuple[int, int], frames: int = 4, h: int = 8, w: int = 10) -> tuple[Tensor, Flows]:
    """Latents [1, frames, 4, h, w] of a picture that moves by whole pixels, and the flow."""
    wide = drawn(4, 60, 60)
    z = torch.stack([wide[:, 30 - i * shift[1] :, 30 - i * shift[0] :][:, :h, :w] for i in range(frames)])
    return z[None], pan(float(shift[0]), float(shift[1]), frames - 1, h, w)


def clear(flows: Flows) -> tuple[Tensor, Tensor]:
    """Nothing is hidden."""
    n, _, h, w = flows.forward.shape
    return torch.zeros(n, h, w), torch.zeros(n, h, w)


# the maths -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.4, 3.0, 40.0])
def test_warping_is_torchs(size: float) -> None:
    flow, _ = smooth(4, 9, 12, size)
    x = drawn(2, 3, 5, 9, 12, seed=2)
    wanted = torch.stack([torchs_warp(each, flow) for each in x])
    torch.testing.assert_close(warped(x, warping(flow)), wanted, rtol=0, atol=1e-12)


def test_whole_pixels_are_exact_where_torch_rounds() -> None:
    flow = torch.tensor([2.0, -1.0]).view(1, 2, 1, 1).expand(1, 2, 9, 11)
    x = drawn(1, 1, 3, 9, 11, dtype=torch.float32)
    assert warped(x, warping(flow))[..., 1:, :-2].equal(x[..., :-1, 2:])
    assert not torchs_warp(x[0], flow)[..., 1:, :-2].equal(x[0, ..., :-1, 2:])


def test_the_way_back_is_the_transpose() -> None:
    flow, _ = smooth(3, 7, 6, 2.0)
    by, x, y = warping(flow), drawn(2, 2, 3, 7, 6), drawn(2, 2, 3, 7, 6, seed=1)
    torch.testing.assert_close((warped(x, by) * y).sum(), (x * warped_back(y, by)).sum())


@pytest.mark.parametrize("pairs", ["neighbours", "official"])
@pytest.mark.parametrize("frames", [2, 3, 6])
def test_loss_and_gradient_are_autograds_of_the_loops(frames: int, pairs: str) -> None:
    """Written out as sums over frames, with torch's warping and gradient."""
    forward, backward = smooth(frames, 8, 9, 1.0)
    hidden = occluded(forward, backward, 0.01, 0.5)
    z = drawn(2, frames, 4, 8, 9, seed=4).requires_grad_()

    def at(i: int, flow: Tensor) -> Tensor:
        return torchs_warp(z[:, i], flow.expand(2, -1, -1, -1))

    loss = torch.zeros(2, dtype=z.dtype)
    for i in range(frames - 1):
        if pairs == "neighbours":
            later, earlier = at(i + 1, forward[i : i + 1]), at(i, backward[i : i + 1])
        else:  # what the authors' loop carries from one frame to the next: 0 at first
            later = at(i + 1, forward[i + 1 : i + 2]) if i < frames - 2 else torch.zeros_like(z[:, i])
            earlier = at(i, backward[i - 1 : i]) if i > 0 else torch.zeros_like(z[:, i])
        loss = loss + ((1 - hidden[0][i]) * (later - z[:, i])).abs().mean((1, 2, 3))
        loss = loss + ((1 - hidden[1][i]) * (earlier - z[:, i + 1])).abs().mean((1, 2, 3))
    (wanted,) = torch.autograd.grad(loss.sum(), z)
    found, gradient = loss_and_gradient(z.detach(), motion_of(forward, backward, hidden, pairs))  # type: ignore[arg-type]
    torch.testing.assert_close(found, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)


def test_official_pairs_are_another_loss() -> None:
    """On a clip whose motion changes, the authors' loop sees an error where there is none, and its first comparisons are with 0."""
    z, flows = clip_with((1, 0))
    for pairs, least in (("neighbours", 0.0), ("official", 0.5)):
        loss, _ = loss_and_gradient(z, motion_of(*flows, occluded(*flows, 0.01, 0.5), pairs))  # type: ignore[arg-type]
        assert float(loss) >= least
        assert (float(loss) == 0) == (pairs == "neighbours")


@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (-2, 1), (3, -3)])
def test_a_shift_of_whole_pixels_has_no_loss_and_no_gradient(shift: tuple[int, int]) -> None:
    z, flows = clip_with(shift)
    loss, gradient = loss_and_gradient(z, motion_of(*flows, occluded(*flows, 0.01, 0.5)))
    assert float(loss) == 0
    assert not gradient.any()
    moved = z + 0.1 * drawn(*z.shape, seed=5)
    assert float(loss_and_gradient(moved, motion_of(*flows, occluded(*flows, 0.01, 0.5)))[0]) > 0


def test_what_leaves_the_picture_is_hidden() -> None:
    """The check sees 0 where a flow leads outside, so that a shift of a pixel hides a column and one of less than beta does not."""
    for u, columns in ((1.0, 1), (-2.0, 2), (0.4, 0)):
        flows = pan(u, 0.0, 1, 6, 8)
        for hidden, side in zip(occluded(*flows, 0.01, 0.5), (u > 0, u < 0), strict=True):
            assert hidden.sum() == 6 * columns
            if columns:
                assert bool(hidden[0][:, -columns:].all() if side else hidden[0][:, :columns].all())


def test_an_occlusion_is_seen() -> None:
    """A square goes 3 to the right over a still ground: what it covers next is hidden in the first frame, what it leaves in the second."""
    forward, backward = torch.zeros(1, 2, 10, 12), torch.zeros(1, 2, 10, 12)
    forward[0, 0, 3:6, 2:5], backward[0, 0, 3:6, 5:8] = 3.0, -3.0
    ahead, behind = occluded(forward, backward, 0.01, 0.5)
    wanted = torch.zeros(2, 10, 12)
    wanted[0, 3:6, 5:8] = wanted[1, 3:6, 2:5] = 1
    assert ahead[0].equal(wanted[0])
    assert behind[0].equal(wanted[1])


def test_what_is_hidden_has_no_say() -> None:
    z, flows = clip_with((1, 1))
    z, everything = drawn(*z.shape), (torch.ones(3, 8, 10), torch.ones(3, 8, 10))
    loss, gradient = loss_and_gradient(z, motion_of(*flows, everything))
    assert float(loss) == 0
    assert not gradient.any()


@pytest.mark.parametrize("seed", range(3))
def test_the_step_goes_downhill(seed: int) -> None:
    """A short step lowers L by g |dL/dz|^2: finite differences."""
    forward, backward = smooth(5, 8, 8, 1.5, seed)
    motion = motion_of(forward, backward, occluded(forward, backward, 0.01, 0.5))
    z = drawn(1, 5, 4, 8, 8, seed=seed + 9)
    loss, gradient = loss_and_gradient(z, motion)
    g = 1e-6 / float(gradient.abs().max())
    less = loss_and_gradient(z - g * gradient, motion)[0]
    torch.testing.assert_close((loss - less) / g, gradient.square().sum()[None], rtol=1e-3, atol=0)
    assert float(less) < float(loss)


def test_each_clip_has_its_own_loss() -> None:
    forward, backward = smooth(3, 8, 8, 1.0)
    motion = motion_of(forward, backward, occluded(forward, backward, 0.01, 0.5))
    z = drawn(2, 3, 4, 8, 8)
    loss, gradient = loss_and_gradient(z, motion)
    for i in range(2):
        alone = loss_and_gradient(z[i : i + 1], motion)
        assert alone[0].equal(loss[i : i + 1])
        assert alone[1].equal(gradient[i : i + 1])


def test_a_step_shrinks_with_the_picture() -> None:
    """L1 is a mean: of a frame of four times the pixels each pixel's gradient is a fourth."""
    z = drawn(1, 3, 4, 8, 8)
    flows, large = pan(0.0, 0.0, 2, 8, 8), pan(0.0, 0.0, 2, 16, 16)
    _, one = loss_and_gradient(z, motion_of(*flows, clear(flows)))
    _, four = loss_and_gradient(z.repeat(1, 1, 1, 2, 2), motion_of(*large, clear(large)))
    torch.testing.assert_close(four[..., :8, :8] * 4, one)


def test_the_posteriors_variance_is_the_schedulers() -> None:
    scheduler = DDPMScheduler(variance_type="fixed_small_log")
    scheduler.set_timesteps(50)
    abar = scheduler.alphas_cumprod.double()
    for t in scheduler.timesteps.tolist()[:-1]:
        variance = posterior_variance(abar[t], abar[t - 20])
        torch.testing.assert_close(variance.sqrt(), scheduler._get_variance(t).double(), rtol=1e-4, atol=0)
        torch.testing.assert_close(scale_of("neg_log_var", abar[t], abar[t - 20]), -variance.log())
        torch.testing.assert_close(scale_of("sigma", abar[t], abar[t - 20]), variance.sqrt())


def test_the_ends_of_the_scale_are_finite() -> None:
    one, none, half = torch.tensor(1.0), torch.tensor(0.0), torch.tensor(0.5)
    assert float(scale_of("neg_log_var", half, one)) == pytest.approx(20 * math.log(10))  # the last step: the official 46
    assert float(scale_of("sigma", half, one)) == 0
    for kind in ("neg_log_var", "sigma", "const"):
        for before, after in ((none, none), (none, half), (half, half), (one, one)):
            assert bool(scale_of(kind, before, after).isfinite())  # type: ignore[arg-type]
    assert float(scale_of("const", none, half)) == 1


def test_power_is_of_any_unit() -> None:
    a, s = torch.tensor(0.6), torch.tensor(0.8)
    assert float(power(SignalNoise(a, s))) == pytest.approx(0.36)
    assert float(power(SignalNoise(a / a, s / a))) == pytest.approx(0.36)
    assert float(power(SignalNoise(a / (a + s), s / (a + s)))) == pytest.approx(0.36)


# flows -----------------------------------------------------------------------------------------------------------------------------------


def test_a_resized_pan_is_the_pan_of_that_size() -> None:
    for h, w in ((8, 8), (4, 16), (30, 20)):
        torch.testing.assert_close(resized(pan(3.0, -2.0, 2, 16, 16).forward, h, w), pan(3.0 * w / 16, -2.0 * h / 16, 2, h, w).forward)


def test_layouts_go_there_and_back() -> None:
    video, batch = drawn(2, 4, 3, 5, 6), drawn(6, 4, 5, 6)
    assert as_clips(video, 3).shape == as_clips(batch, 3).shape == (2, 3, 4, 5, 6)
    assert as_sample(as_clips(video, 3), video).equal(video)
    assert as_sample(as_clips(batch, 3), batch).equal(batch)
    assert as_clips(video, 3)[1, 2].equal(video[1, :, 2])
    assert as_clips(batch, 3)[1, 2].equal(batch[5])


def shifted(frames: int = 3, side: int = 64, by: int = 3) -> list[Image.Image]:
    """Smooth pictures that go to the right."""
    grain = interpolate(torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(0)), (160, 160), mode="bicubic").clamp(0, 1)
    wide = (grain[0].permute(1, 2, 0) * 255).byte().numpy()
    return [Image.fromarray(wide[40 : 40 + side, 60 - by * i : 60 - by * i + side]) for i in range(frames)]


def test_dis_finds_a_shift() -> None:
    pytest.importorskip("cv2")
    flows = estimated(read_clip(shifted()), dis)
    assert flows.forward.shape == flows.backward.shape == (2, 2, 64, 64)
    for flow, u in ((flows.forward, 3.0), (flows.backward, -3.0)):
        inner = flow[:, :, 12:-12, 12:-12]
        assert float((inner[:, 0] - u).abs().median()) < 0.1
        assert float(inner[:, 1].abs().median()) < 0.1


def test_clips_in_all_forms_are_the_same() -> None:
    frames = shifted()
    array = np.stack([np.asarray(frame) for frame in frames])
    wanted = read_clip(frames)
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    for form in (array, array.astype(np.float32) / 255, list(array), tensor, tensor / 255, list(tensor), tensor / 127.5 - 1):
        torch.testing.assert_close(read_clip(form), wanted)
    assert wanted.shape == (3, 3, 64, 64)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (torch.zeros(2, 2, 8, 8), "give 'dis'"),
        ((torch.zeros(2, 2, 8, 8),), "give 'dis'"),
        ((torch.zeros(2, 2, 8, 8), torch.zeros(3, 2, 8, 8)), r"forward is \[2, 2, 8, 8\] and backward \[3, 2, 8, 8\]"),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)), r"forward is \[2, 3, 8, 8\]"),
        ((torch.zeros(2, 2, 8), torch.zeros(2, 2, 8)), r"not \[T - 1, 2, H, W\]"),
        ((torch.zeros(0, 2, 8, 8), torch.zeros(0, 2, 8, 8)), r"not \[T - 1, 2, H, W\]"),
        ((torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2, 2), float("nan"))), "backward has 8 values that are not finite"),
        (("a", "b"), "forward is a str"),
        ((1.0, float("inf")), "two finite numbers"),
        ((True, False), "forward is a bool"),
        ({"forward": torch.zeros(1, 2, 2, 2)}, "keys forward and backward"),
        ("raft", "give 'dis'"),
        (lambda first: first, "called with"),
    ],
)
def test_what_is_no_flow(value: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        MotionGuided(flow=value)
    assert "flow" in str(error.value)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([], "is no clip"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))], "different sizes"),
        ([np.zeros((8, 8, 3)), np.zeros((8, 9, 3))], "different shapes"),
        (torch.zeros(3, 1, 8, 8), r"\[3, 1, 8, 8\] is no clip"),
        (torch.full((2, 3, 8, 8), 7.0), "values go from 7 to 7"),
        (torch.full((2, 3, 8, 8), float("nan")), "values go from nan"),
    ],
)
def test_what_is_no_clip(value: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        MotionGuided(source=value)
    assert "source" in str(error.value)


def test_flows_in_all_forms() -> None:
    both = torch.zeros(2, 2, 4, 4), torch.ones(2, 2, 4, 4)
    for form in (both, list(both), {"forward": both[0], "backward": both[1]}, tuple(each.numpy() for each in both), Flows(*both)):
        found = read_flow(form)
        assert found.forward.equal(both[0])
        assert found.backward.equal(both[1])
    assert read_flow((1, -2)) == (1.0, -2.0)
    assert read_flow(None) is None
    assert read_flow(dis) is dis


# runs ------------------------------------------------------------------------------------------------------------------------------------


def tiny(name: str, module: str = "sd", steps: int = 4) -> Any:
    made = importlib.import_module(f"diffgraft_pipelines.tiny.{module}").make(name)
    made.kwargs.update(num_inference_steps=steps, output_type="latent")
    return made


def frames_of(made: Any, n: int) -> dict[str, Any]:
    """The arguments of a call that makes n frames."""
    prompts = {key: [made.kwargs[key]] * n for key in ("prompt", "negative_prompt")}
    pictures = {"image": [made.kwargs["image"]] * n} if "image" in made.kwargs else {}
    return {**made.kwargs, **prompts, **pictures}


def run(made: Any, knobs: dict[str, Any] | None, same: bool = False, frames: int = 4, **extra: Any) -> Tensor:
    """Latents of a run of n frames, each of a noise of its own unless it is the ``same``."""
    pipe = load_pipeline(made.pipe, plugins=[] if knobs is None else [MotionGuided(**knobs)])
    try:
        arguments = {**(frames_of(made, frames) if frames > 1 else made.kwargs), **extra}
        draws = [torch.Generator().manual_seed(0 if same else i) for i in range(frames)] if frames > 1 else torch.Generator().manual_seed(0)
        return pipe(**arguments, generator=draws)[0]
    finally:
        if knobs is not None:
            run.report = pipe.plugins.report()  # type: ignore[attr-defined]
            unload(pipe)


def told() -> Any:
    return run.report.plugins["motion_guided"]  # type: ignore[attr-defined]


def test_nothing_is_changed_without_strength_motion_or_neighbours() -> None:
    made = tiny("StableDiffusionPipeline")
    plain, alike = run(made, None), run(made, None, same=True)
    assert run(made, {"flow": (3.0, 1.0), "g": 0}).equal(plain)
    assert run(made, {"flow": None}).equal(plain)
    assert run(made, {"flow": (0.0, 0.0)}, same=True).equal(alike)  # identical frames that do not move
    assert float(told().records["loss"].abs().max()) == 0
    assert told().counts["guided steps"]["run"] == 4
    far = torch.full((3, 2, 8, 8), 100.0)  # all leads outside: everything is hidden
    assert run(made, {"flow": (far, -far)}).equal(plain)
    assert not run(made, {"flow": (0.0, 0.0)}).equal(plain)
    one = run(made, None, frames=1)
    assert run(made, {"flow": (3.0, 1.0)}, frames=1).equal(one)
    assert any("inactive: one frame" in note for note in told().notes)


def in_plain_torch(made: Any, flows: Flows, g: float, frames: int, kind: str = "neg_log_var") -> Tensor:
    """The pipeline's own callback moves the latents, by autograd through torch's warping."""
    scheduler, hidden = made.pipe.scheduler, occluded(*flows, 0.01, 0.5)

    def guided(pipe: Any, i: int, t: Tensor, kept: dict[str, Any]) -> dict[str, Any]:
        times = scheduler.timesteps
        abar = scheduler.alphas_cumprod[times[i]].double()
        after = (scheduler.alphas_cumprod[times[i + 1]] if i + 1 < len(times) else scheduler.final_alpha_cumprod).double()
        variance = max(float((1 - after) / (1 - abar) * (1 - abar / after)), 1e-20)
        scale = {"neg_log_var": -math.log(variance), "sigma": math.sqrt(variance), "const": 1.0}[kind]
        with torch.enable_grad():
            z = kept["latents"].double().requires_grad_()
            there = (1 - hidden[0][:, None].double()) * (torchs_warp(z[1:], flows.forward.double()) - z[:-1])
            back = (1 - hidden[1][:, None].double()) * (torchs_warp(z[:-1], flows.backward.double()) - z[1:])
            loss = sum(each.abs().mean((1, 2, 3)).sum() for each in (there, back))
            (gradient,) = torch.autograd.grad(loss, z)
        return {"latents": (z.detach() - g * scale * gradient).float()}

    draws = [torch.Generator().manual_seed(i) for i in range(frames)]
    return made.pipe(**frames_of(made, frames), generator=draws, callback_on_step_end=guided)[0]


@pytest.mark.parametrize("kind", ["neg_log_var", "sigma", "const"])
def test_a_run_is_the_loop(kind: str) -> None:
    made = tiny("StableDiffusionPipeline")
    flows = Flows(*(each.float() for each in smooth(3, 8, 8, 0.8)))
    wanted = in_plain_torch(made, flows, 2.0, 3, kind)
    torch.testing.assert_close(run(made, {"flow": flows, "g": 2.0, "scale_fn": kind}, frames=3), wanted, rtol=0, atol=2e-4)
    assert not run(made, None, frames=3).sub(wanted).abs().max() < 0.05


def test_the_unit_of_the_scheduler_has_no_say() -> None:
    """DDIM and Euler keep the same samples in other units, and make the same step: so do guided ones, but for the last."""
    made = tiny("StableDiffusionPipeline", steps=5)
    made.pipe.scheduler = DDIMScheduler.from_config(made.pipe.scheduler.config, timestep_spacing="leading", steps_offset=0)
    ends = []
    for knobs in (None, {"flow": (4.0, 0.0), "below": 1.0}, {"flow": (4.0, 0.0), "below": 0.3}):
        outs = []
        for cls in (DDIMScheduler, EulerDiscreteScheduler):
            made.pipe.scheduler = cls.from_config(made.pipe.scheduler.config)
            latents = drawn(3, 4, 8, 8, dtype=torch.float32)
            outs.append(run(made, knobs, frames=3, latents=latents))
        ends.append(float((outs[0] - outs[1]).abs().mean()))
    assert ends[1] < 3 * ends[0] + 0.1


def test_below_is_a_noise_level() -> None:
    made = tiny("StableDiffusionPipeline")
    plain = run(made, None)
    assert run(made, {"flow": (4.0, 0.0), "below": 1e-6}).equal(plain)
    assert not run(made, {"flow": (4.0, 0.0), "below": 0.8}).equal(run(made, {"flow": (4.0, 0.0)}))


def test_elements_fix_the_step() -> None:
    made = tiny("StableDiffusionPipeline")
    own = run(made, {"flow": (4.0, 0.0), "g": 8.0})
    assert run(made, {"flow": (4.0, 0.0), "g": 8.0, "elements": 256}).equal(own)  # 4 x 8 x 8
    torch.testing.assert_close(run(made, {"flow": (4.0, 0.0), "g": 32.0, "elements": 1024}), own)


def test_guidance_lowers_the_loss_and_a_second_order_solver_is_guided_once_a_step() -> None:
    made = tiny("StableDiffusionPipeline", steps=8)
    for scheduler, steps in ((DDIMScheduler, 8), (HeunDiscreteScheduler, 8), (PNDMScheduler, 8)):
        made.pipe.scheduler = scheduler.from_config(made.pipe.scheduler.config)
        losses = []
        for g in (1e-9, 3.0):
            run(made, {"flow": (0.0, 0.0), "g": g})
            losses.append(float(told().records["loss"][-1]))
            assert told().counts["guided steps"]["run"] == steps
        assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("StableDiffusionImg2ImgPipeline", "sd"),
        ("StableDiffusionUpscalePipeline", "sd"),
        ("StableDiffusionControlNetPipeline", "sd"),
        ("LDMSuperResolutionPipeline", "latent"),
        ("StableDiffusion3Img2ImgPipeline", "sd3"),
    ],
)
def test_frames_in_a_batch(name: str, module: str) -> None:
    made = tiny(name, module)
    if module == "latent":
        made.kwargs.pop("output_type")
        made.pipe(**made.kwargs)
        made.kwargs["image"] = torch.cat([torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(4)]) * 2 - 1
        outs = []
        for knobs in ({"flow": (2.0, 0.0), "g": 0.0}, {"flow": (2.0, 0.0), "g": 10.0}):
            pipe = load_pipeline(made.pipe, plugins=[MotionGuided(**knobs)])
            outs.append(pipe(**made.kwargs, output_type="np", generator=torch.Generator().manual_seed(0)).images)
            report = pipe.plugins.report()
            unload(pipe)
        assert np.abs(outs[0] - outs[1]).max() > 0
        assert report.plugins["motion_guided"].records["loss"].shape == (4, 1)
        return
    plain, guided = run(made, None), run(made, {"flow": (2.0, 0.0)})
    assert guided.shape == plain.shape
    assert not guided.equal(plain)
    assert told().records["loss"].shape[1] == 1


def test_a_video_is_what_its_frames_are() -> None:
    """[b, c, T, h, w]: all frames of a clip, and each clip of a batch by itself."""
    made = tiny("AnimateDiffPipeline", "animatediff")
    plain, guided = run(made, None, frames=1), run(made, {"flow": (3.0, 0.0)}, frames=1)
    assert guided.shape == plain.shape
    assert not guided.equal(plain)
    flows = pan(3.0, 0.0, 3, 32, 32)
    torch.testing.assert_close(run(made, {"flow": flows}, frames=1), guided, rtol=0, atol=1e-5)


def test_several_clips_in_a_batch() -> None:
    made = tiny("StableDiffusionPipeline")
    run(made, {"flow": (2.0, 0.0), "frames": 3}, frames=6)
    assert told().records["loss"].shape == (4, 2)
    run(made, {"flow": pan(2.0, 0.0, 2, 32, 32)}, frames=6)  # the flow says how many
    assert told().records["loss"].shape == (4, 2)


def test_flow_is_found_in_what_the_call_was_given() -> None:
    made = tiny("StableDiffusionImg2ImgPipeline")
    seen = []

    def known(first: Tensor, second: Tensor) -> Tensor:
        seen.append((first, second))
        return pan(2.0, 0.0, len(first), *first.shape[-2:]).forward * (1 if len(seen) == 1 else -1)

    frames = shifted(4)
    by_function = run(made, {"flow": known}, image=frames)
    clip = read_clip(frames)
    assert seen[0][0].equal(clip[:-1])
    assert seen[0][1].equal(clip[1:])
    assert seen[1][0].equal(clip[1:])
    assert by_function.equal(run(made, {"flow": pan(2.0, 0.0, 3, 64, 64)}, image=frames))
    pytest.importorskip("cv2")
    found = run(made, {"flow": "dis"}, image=frames)
    assert found.equal(run(made, {"flow": "dis", "source": frames}, image=frames))
    assert found.equal(run(made, {"flow": tuple(estimated(clip, dis))}, image=frames))


# refused ---------------------------------------------------------------------------------------------------------------------------------


def refused(made: Any, knobs: dict[str, Any], error: type[DiffgraftError], text: str, **extra: Any) -> None:
    """Before the denoiser computes anything."""
    asked: list[int] = []
    handle = made.pipe.unet.register_forward_hook(lambda *_: asked.append(1))
    try:
        with pytest.raises(error, match=text):
            run(made, knobs, **extra)
    finally:
        handle.remove()
        unload(made.pipe)
    assert not asked


def test_a_flow_of_another_clip() -> None:
    made = tiny("StableDiffusionPipeline")
    refused(made, {"flow": pan(1.0, 0.0, 4, 8, 8)}, ConfigError, r"flow is of 5 frames, frames = None, and this run makes 4 frame\(s\)")
    refused(made, {"flow": pan(1.0, 0.0, 2, 8, 8), "frames": 4}, ConfigError, "flow is of 3 frames, frames = 4")
    refused(made, {"flow": (1.0, 0.0), "frames": 3}, ConfigError, "flow is a pan, frames = 3")
    refused(made, {"flow": (1.0, 0.0), "frames": 8}, ConfigError, "this run makes 4")
    video = tiny("AnimateDiffPipeline", "animatediff")
    refused(video, {"flow": pan(1.0, 0.0, 1, 8, 8)}, ConfigError, "flow is of 2 frames", frames=1)


def test_rows_that_are_no_clip() -> None:
    made = tiny("StableDiffusionPipeline")
    refused(made, {"flow": (1.0, 0.0)}, ConfigError, "num_images_per_prompt", num_images_per_prompt=2)


def test_a_clip_to_find_a_flow_in() -> None:
    made = tiny("StableDiffusionPipeline")
    refused(made, {"flow": lambda first, second: first}, ConfigError, "no video or image: give source")
    refused(made, {"flow": lambda a, b: a, "source": shifted(1)}, ConfigError, "a single frame")
    refused(made, {"flow": lambda a, b: a, "source": shifted(4)}, ConfigError, r"what the function gives is \[3, 3, 64, 64\]")
    wrong = pan(1.0, 0.0, 3, 8, 8).forward
    refused(made, {"flow": lambda a, b: wrong, "source": shifted(4)}, ConfigError, r"gives \[3, 2, 8, 8\] for frames \[3, 3, 64, 64\]")
    refused(made, {"flow": lambda a, b: wrong * math.nan, "source": shifted(4)}, ConfigError, "not finite")
    still = tiny("StableDiffusionImg2ImgPipeline")
    refused(still, {"flow": lambda a, b: a}, ConfigError, "flow is found in the call's image: .* is no clip", image=torch.zeros(3, 64, 64))


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (UniPCMultistepScheduler, "a sample of its own"),
        (DPMSolverSinglestepScheduler, "a sample of its own"),
        (DDIMInverseScheduler, "from the picture"),
    ],
)
def test_schedulers_that_are_refused(cls: Any, text: str) -> None:
    made = tiny("StableDiffusionPipeline")
    made.pipe.scheduler = cls.from_config(made.pipe.scheduler.config)
    refused(made, {"flow": (1.0, 0.0)}, Unsupported, text)


def test_without_opencv_the_pip_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(Unsupported, match=r"pip install 'diffgraft-motion-guided\[opencv\]'"):
        load_pipeline(tiny("StableDiffusionPipeline").pipe, plugins=[MotionGuided(flow="dis")])


@pytest.mark.parametrize(
    ("name", "module"), [("WanPipeline", "wan"), ("LTXPipeline", "ltx"), ("CogVideoXVideoToVideoPipeline", "cogvideox")]
)
def test_videos_whose_time_is_packed(name: str, module: str) -> None:
    with pytest.raises(Unsupported, match=f"motion_guided does not work on {name}"):
        load_pipeline(
            importlib.import_module(f"diffgraft_pipelines.tiny.{module}").make(name).pipe, plugins=[MotionGuided(flow=(1.0, 0.0))]
        )


def test_an_autoencoder_that_packs_time_is_told_by_its_layers() -> None:
    made = tiny("AnimateDiffPipeline", "animatediff")
    made.pipe.register_modules(vae=importlib.import_module("diffgraft_pipelines.tiny.wan").make("WanPipeline").pipe.vae)
    assert isinstance(made.pipe.vae, AutoencoderKLWan)
    with pytest.raises(Unsupported, match="packs several frames into one"):
        load_pipeline(made.pipe, plugins=[MotionGuided(flow=(1.0, 0.0))])


# declared --------------------------------------------------------------------------------------------------------------------------------


def test_it_says_what_it_does() -> None:
    assert MotionGuided(flow=(1.0, 0.0)).effects == Effects(edits={"latents"}, couples_batch=True)
    assert MotionGuided().effects == MotionGuided(flow=(1.0, 0.0), g=0).effects == Effects()


def test_the_defaults_are_the_official_ones() -> None:
    config = MotionGuided().config
    assert (config.g, config.scale_fn, config.below, config.alpha, config.beta, config.elements) == (10, "neg_log_var", 1, 0.01, 0.5, None)


def test_nothing_is_asked_of_autograd() -> None:
    made = tiny("StableDiffusionPipeline")
    seen = []
    made.pipe.unet.register_forward_hook(lambda module, args, out: seen.append((torch.is_grad_enabled(), out[0].requires_grad)))
    with torch.inference_mode():
        assert not run(made, {"flow": (2.0, 0.0)}).requires_grad
    assert set(seen) == {(False, False)}
    assert run.report.forwards == {"both": 4}  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case) -> None:
    case.run()


def test_the_emoji_upscaler_flickers_less() -> None:
    """Four frames of one still picture, enlarged with noises of their own: guided ones differ less."""
    pytest.importorskip("diffgraft_checkpoints_more")
    pipe = load_pipeline("emoji-sr")
    assert isinstance(pipe, StableDiffusionUpscalePipeline)
    picture = Image.open(next(iter(sys.modules["diffgraft_checkpoints_more"].__path__)) + "/bundled/emoji-sr/start.png").convert("RGB")
    spread = []
    for knobs in ({"g": 0.0}, {"g": 10.0, "flow": (0.0, 0.0)}):
        pipe.plugins.clear()
        load_pipeline(pipe, plugins=[MotionGuided(**knobs)])
        draws = [torch.Generator().manual_seed(i) for i in range(4)]
        frames = pipe([""] * 4, image=[picture] * 4, num_inference_steps=8, generator=draws, output_type="np").images
        spread.append(float(frames.std(0).mean()))
    assert spread[1] < 0.85 * spread[0]


def test_a_clip_that_dis_cannot_take_is_named_and_an_undershoot_is_none_of_minus_one() -> None:
    with pytest.raises(ConfigError, match="12 pixels at least"):
        dis(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4))
    clip = torch.linspace(-0.001, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    assert torch.equal(read_clip(clip), clip.clamp(0, 1))
