"""The bundled LoRA emoji-sd-lcm: emoji-sd in four steps without guidance, and emoji-sd again without it."""

from __future__ import annotations

import json
from pathlib import Path

import diffgraft_checkpoints
import pytest
import torch
from diffgraft import load_pipeline
from diffgraft_checkpoints.bundled import emoji_sd
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.emoji.judge import load_bundled
from diffgraft_checkpoints.train.lcm import Point, build_lcm_scheduler, consistency
from diffusers import LCMScheduler

FOLDER = Path(diffgraft_checkpoints.__file__).parent / "bundled" / "emoji-sd-lcm"
bundled = pytest.mark.skipif(not FOLDER.exists(), reason="emoji-sd-lcm is not in this checkout")
PROMPTS = [f"a big apple {phrase} on a blue background" for phrase in scenes.PLACE_PHRASES.values()]


def test_the_consistency_function_is_the_schedulers_and_the_identity_at_the_end() -> None:
    scheduler = build_lcm_scheduler()
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 4, 8, 8, generator=generator)
    t = scheduler.timesteps[1]
    abar = scheduler.alphas_cumprod[t].view(1, 1, 1, 1)
    ours = consistency(Point(x, t.view(1), abar.sqrt(), (1 - abar).sqrt()), v)
    scheduler._step_index = 1
    torch.testing.assert_close(scheduler.step(v, t, x).denoised, ours)
    at_zero = Point(x, torch.zeros(1), torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    torch.testing.assert_close(consistency(at_zero, v), x)


@bundled
def test_four_steps_without_guidance_follow_the_prompt() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40e6
    assert {"README.md", "LICENSE-APACHE-2.0.txt", "LICENSE-OFL-1.1.txt"} <= {path.name for path in files}
    assert set(json.loads((FOLDER / "evaluation.json").read_text())["scores"]) == {"object", "background", "size", "place", "all four"}
    pipe = load_pipeline("emoji-sd-lcm")
    assert isinstance(pipe.scheduler, LCMScheduler)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 4, "guidance_scale": 1.0, "generator": torch.Generator().manual_seed(0)}
    scores = load_bundled().score(pipe(PROMPTS, **call).images, PROMPTS)
    for name in ("background", "size", "place"):
        assert scores[name] == [True] * len(PROMPTS), name
    assert sum(scores["object"]) >= len(PROMPTS) - 1


@bundled
def test_with_the_lora_off_it_is_emoji_sd() -> None:
    def draw(pipe, guidance_scale: float = 2.0):
        pipe.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": 3, "guidance_scale": guidance_scale, "output_type": "latent"}
        return pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), **call).images

    plain, distilled = load_pipeline(emoji_sd.path), load_pipeline("emoji-sd-lcm")
    distilled.scheduler = plain.scheduler
    assert not torch.allclose(draw(distilled), draw(plain), atol=1e-2)
    distilled.disable_lora()
    torch.testing.assert_close(draw(distilled), draw(plain))
