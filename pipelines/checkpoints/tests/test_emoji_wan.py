"""The bundled checkpoint emoji-wan: a plain small WanPipeline that follows its prompts."""

from __future__ import annotations

import json
from pathlib import Path

import diffgraft_checkpoints
import numpy as np
import pytest
import torch
from diffgraft_checkpoints.emoji import motion
from diffgraft_checkpoints.emoji.motion_judge import FIELDS, load_bundled
from diffgraft_checkpoints.train import wan_runs
from diffusers import UniPCMultistepScheduler, WanPipeline

FOLDER = Path(diffgraft_checkpoints.__file__).parent / "bundled" / "emoji-wan"
CALL = {"num_frames": 9, "height": 64, "width": 64, "max_sequence_length": 16}
pytestmark = pytest.mark.skipif(not (FOLDER / "model_index.json").exists(), reason="emoji-wan is not bundled yet")


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    pipe = WanPipeline.from_pretrained(FOLDER, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_folder_is_small_and_has_its_notices_and_figures() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40e6
    assert {"README.md", "evaluation.json", "LICENSE-APACHE-2.0.txt", "LICENSE-OFL-1.1.txt"} <= {path.name for path in files}
    assert json.loads((FOLDER / "model_index.json").read_text())["_class_name"] == "WanPipeline"
    assert set(json.loads((FOLDER / "evaluation.json").read_text())["scores"]) == {*FIELDS, "all four"}


def test_every_caption_fits_into_the_tokens_and_every_word_is_known(pipe: WanPipeline) -> None:
    captions = [motion.fill(template, labels) for labels in motion.split()[1] for template, _ in motion.TEMPLATES]
    rows = pipe.tokenizer(captions).input_ids
    assert max(map(len, rows)) <= CALL["max_sequence_length"]
    assert pipe.tokenizer.unk_token_id not in {token for row in rows for token in row}
    assert rows == [[*pipe.tokenizer.convert_tokens_to_ids(words(text)), pipe.tokenizer.eos_token_id] for text in captions]


def words(text: str) -> list[str]:
    """A caption as the tokens it should have: a word each, and commas."""
    return [piece for word in text.split() for piece in ([f"▁{word[:-1]}", ","] if word.endswith(",") else [f"▁{word}"])]


def test_clips_show_what_their_prompts_say(pipe: WanPipeline) -> None:
    prompts = [f"a small apple {phrase} on a blue background" for phrase in motion.MOTION_PHRASES.values()]
    guidance = json.loads((FOLDER / "evaluation.json").read_text())["guidance"]
    generator = torch.Generator().manual_seed(0)
    videos = pipe(prompts, num_inference_steps=20, guidance_scale=guidance, generator=generator, **CALL).frames
    assert videos.shape == (len(prompts), 9, 64, 64, 3)
    right = {name: sum(map(bool, row)) for name, row in load_bundled().score(list(videos), prompts).items()}
    assert right["background"] == len(prompts), right
    assert all(right[name] >= len(prompts) - 1 for name in FIELDS), right


def test_works_with_wans_usual_scheduler(pipe: WanPipeline) -> None:
    euler = pipe.scheduler
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    pipe.scheduler = UniPCMultistepScheduler.from_config(euler.config, **flow)
    prompt = "a small apple moves to the left on a blue background"
    try:
        video = pipe(prompt, num_inference_steps=12, guidance_scale=3.0, generator=torch.Generator().manual_seed(0), **CALL).frames[0]
    finally:
        pipe.scheduler = euler
    assert np.isfinite(video).all()
    assert load_bundled().score([video], [prompt])["background"] == [True]


def test_runs_of_benchmarks_count_forwards_and_tell_a_run_from_itself() -> None:
    wan = wan_runs.WanRuns(8)
    made, forwards = wan.make(wan.texts[:2], 3, [], num_inference_steps=2)
    assert len(made) == 2
    assert forwards == 4, "guided: two a step"
    torch.testing.assert_close(wan.make(wan.texts[1:2], 4, [], num_inference_steps=2)[0], made[1:], rtol=1e-3, atol=1e-3)  # its own seed
    assert wan.make(wan.texts[:1], 0, [], num_inference_steps=2, guidance_scale=1.0)[1] == 2
    assert set(wan.judged(wan.clips(made))) == {*FIELDS, "all"}
    x = torch.randn(32, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    same = wan_runs.distances(x, x, x, x)
    assert same["end"] == (0.0, 0.0, 0.0)
    assert same["frechet"][0] == pytest.approx(0, abs=1e-6)
    assert same["diversity"][0] == pytest.approx(2**0.5, rel=0.05)
    assert wan_runs.distances(x + 1, x, x, x)["frechet"][1] > same["frechet"][2]
