"""``fit``: learns what was asked, goes on where it stopped bit for bit, and leaves the pipeline as it was."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffgraft import BrokenPlugin, ConfigError, Conflict, Unsupported, load_pipeline, unload
from diffgraft.installed.errors import NotFinite, OutputError
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.examples import Example, read_examples
from diffgraft.methods.fitting import FitPlan, Learning, fit, fit_call
from fitters import SETTINGS, GateFitter, GateUser, LoraUser, Nothing, bare, pictures, run
from PIL import Image
from probes import Everything, generate, tiny, trace


class Stop(Exception):
    pass


def stop_at(step):
    def on_progress(phase, done, total):
        if done == step:
            raise Stop

    return on_progress


def everything_of(pipe):
    """Its looks, weights, and switches of gradients."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    weights = {f"{name}.{key}": value.clone() for name, part in parts.items() for key, value in part.state_dict().items()}
    grads = [(value.requires_grad, value.grad) for part in parts.values() for value in part.parameters()]
    return trace(pipe), dict(pipe.scheduler.__dict__), weights, grads, torch.get_rng_state().tolist()


def same(before, after):
    assert [before[i] for i in (0, 1, 3, 4)] == [after[i] for i in (0, 1, 3, 4)]
    assert all(torch.equal(value, after[2][key]) for key, value in before[2].items())


def equal(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "gate.safetensors"
    run(out)
    return out


def test_it_learns_and_the_plugin_takes_it(whole, tmp_path):
    found = Artefact.load(whole, "gate", "fit")
    losses = found.facts["fit"]["losses"]
    assert len(losses) == 6
    assert set(found.tensors) == {"factor", "seen"}
    assert float(found.tensors["seen"]) == 6
    assert not Path(f"{whole}.partial").exists()
    pipe, kwargs = tiny("StableDiffusionPipeline")
    plain = generate(pipe, kwargs)
    load_pipeline(pipe, plugins=[GateUser(artefact=str(whole))])
    assert not torch.equal(generate(pipe, kwargs), plain)


@pytest.mark.parametrize("how", ["whole", "stopped"])
def test_a_fit_leaves_the_pipeline_as_it_was(how, tmp_path):
    pipe, kwargs = tiny("StableDiffusionPipeline")
    plain = generate(pipe, kwargs)
    before = everything_of(pipe)
    examples = [Example(f"picture {i}") for i in range(5)]
    if how == "whole":
        run(tmp_path / "n.safetensors", 2, Nothing(), examples, pipe)
    else:

        def interrupt(*args):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "n.safetensors", 2, Nothing(), examples, pipe, on_progress=interrupt)
    same(before, everything_of(pipe))
    assert torch.equal(generate(pipe, kwargs), plain)


def test_going_on_comes_to_the_same(whole, tmp_path):
    out = tmp_path / "gate.safetensors"
    for step in (1, 4):
        with pytest.raises(Stop):
            run(out, on_progress=stop_at(step))
    assert not out.exists()
    with pytest.raises(ConfigError, match="unfinished fit with other knobs"):
        run(out, steps=7)
    run(out)
    assert equal(out, whole)


def test_killed_it_goes_on_to_the_same(whole, tmp_path):
    out = tmp_path / "gate.safetensors"
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), *sys.path])
    child = subprocess.Popen(
        [sys.executable, str(here / "fitters.py"), str(out)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == "3":
            child.send_signal(signal.SIGKILL)
            break
    assert child.wait() == -signal.SIGKILL
    assert not out.exists()
    done = []
    run(out, on_progress=lambda phase, step, total: done.append(step))
    assert 3 <= done[0] <= 6, done
    assert equal(out, whole)


@pytest.mark.parametrize("part", ["value.factor", "value.seen", "average", "optimizer", "losses"])
def test_a_state_that_lacks_a_part_would_be_seen(part, whole, tmp_path, monkeypatch):
    """The comparison with the uninterrupted fit is no empty one: weights, buffers, average, optimizer and losses all count in it."""
    go_on = Learning.go_on

    def forgetful(self, tensors, facts):
        fresh, kept = self.state()[0], {name: value for name, value in tensors.items() if not name.startswith(part)}
        go_on(self, kept | {name: value for name, value in fresh.items() if name.startswith(part)}, facts)

    monkeypatch.setattr(Learning, "go_on", forgetful)
    out = tmp_path / "gate.safetensors"
    with pytest.raises(Stop):
        run(out, on_progress=stop_at(3))
    run(out)
    assert not equal(out, whole)


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["the order of the data", "the batch's generator", "torch's own"])
def test_draws_that_do_not_follow_from_the_step_would_be_seen(kind, tmp_path, monkeypatch):
    """They are counted from the beginning of the process here, as a generator would that no state holds."""
    drawn = FitPlan.drawn

    def in_a_new_process(out, **more):
        count = itertools.count()
        monkeypatch.setattr(FitPlan, "drawn", lambda self, *what: next(count) if what[0] == kind else drawn(self, *what))
        run(out, **more)

    in_a_new_process(whole := tmp_path / "whole.safetensors")
    out = tmp_path / "gate.safetensors"
    with pytest.raises(Stop):
        in_a_new_process(out, on_progress=stop_at(3))
    in_a_new_process(out)
    assert not equal(out, whole)


def test_a_full_disk_leaves_the_last_good_state(whole, tmp_path, monkeypatch):
    out = tmp_path / "gate.safetensors"
    with pytest.raises(Stop):
        run(out, on_progress=stop_at(2))
    state = (Path(f"{out}.partial") / "state.safetensors").read_bytes()

    half = Path.write_bytes

    def full(path, data):
        if kept_at in path.name:
            half(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return half(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    for kept_at, says in (("state", "the state after 2 steps is kept"), ("gate", r"all that was learned is kept in .*partial")):
        pipe = bare()
        before = everything_of(pipe)
        with pytest.raises(OutputError, match=f"No space left on device; {says}. Make room: the same call goes on"):
            run(out, pipe=pipe)
        same(before, everything_of(pipe))
        assert [path.name for path in tmp_path.iterdir()] == ["gate.safetensors.partial"]
        assert [path.name for path in Path(f"{out}.partial").iterdir()] == ["state.safetensors"]
        if kept_at == "state":
            assert (Path(f"{out}.partial") / "state.safetensors").read_bytes() == state
    monkeypatch.undo()
    done = []
    run(out, on_progress=lambda *seen: done.append(seen))
    assert not done, "nothing is learned again"
    assert equal(out, whole)


def test_a_first_state_that_cannot_be_written_is_told_before_anything_is_learned(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(GateFitter, "loss", lambda *args: pytest.fail("begun"))
    with pytest.raises(OutputError, match=r"state\.safetensors: No space left on device; nothing was learned yet"):
        run(tmp_path / "gate.safetensors")


def test_a_loss_that_is_no_number_is_named(tmp_path):
    out = tmp_path / "gate.safetensors"
    with pytest.raises(NotFinite, match=r"gate: the loss is nan at step 2, batch: 'picture \d'.*after 2 steps is kept"):
        run(out, knobs={"bad_at": 2})
    assert Artefact.load(Path(f"{out}.partial") / "state.safetensors", "gate").facts["step"] == 2


def test_a_fit_leaves_no_accelerator_in_the_process(tmp_path):
    """Accelerate keeps the precision of a process's first Accelerator and refuses another: a fit makes none, so the user's may follow."""
    before = dict(AcceleratorState._shared_state)
    run(tmp_path / "n.safetensors", 1, Nothing(), [Example("a")])
    assert AcceleratorState._shared_state == before


def test_a_fit_is_the_work_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process, not of 2"):
        run(tmp_path / "n.safetensors", 1, Nothing(), [Example("a")])


def test_a_fitter_says_what_calls_its_result_is_for(tmp_path, monkeypatch):
    monkeypatch.setattr(GateFitter, "suits", lambda self, settings: replace(settings, steps=2))
    assert run(tmp_path / "gate.safetensors", steps=1).made_for.steps == 2


def test_bad_input_is_refused_before_anything_runs(tmp_path, monkeypatch):
    out = tmp_path / "gate.safetensors"
    monkeypatch.setattr(GateFitter, "build", lambda *args: pytest.fail("begun"))
    with pytest.raises(ConfigError, match="fit: steps = 0: at least 1"):
        FitPlan(0)
    with pytest.raises(ConfigError, match=r"gate learns from pictures, and there are none: give --data FOLDER"):
        run(out, examples=[])
    with pytest.raises(ConfigError, match=r"gate learns from pictures, and 'a dog' has none"):
        run(out, examples=[Example("a dog")])
    with pytest.raises(ConfigError, match=r"gate.bin: the name must end in .safetensors"):
        run(tmp_path / "gate.bin")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"a.txt is a file, not a folder"):
        run(tmp_path / "a.txt" / "gate.safetensors")
    with pytest.raises(Unsupported, match="gate does not work on FluxPipeline"):
        run(out, pipe=unload(tiny("FluxPipeline")[0]))
    with pytest.raises(Unsupported, match="everything cannot be fitted"):
        run(out, plugin=Everything())
    with pytest.raises(ConfigError, match="unknown knob 'rat'"):
        run(out, knobs={"rat": 1})
    with pytest.raises(Conflict, match=r"everything on this pipeline; diffgraft.unload\(pipe\) first"):
        run(out, pipe=load_pipeline(bare(), plugins=[Everything]))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("build", "loss", "says"),
    [
        (lambda self, probe: torch.nn.Identity(), None, "build gave a module without weights"),
        (lambda self, probe: probe.target.denoisers["unet"].conv_in, None, "gave weight, a weight of the pipeline itself"),
        (None, lambda self, session, batch: torch.zeros(()), r"loss gave a tensor of shape \(\); wanted is \[4\]"),
        (None, lambda self, session, batch: torch.zeros(4), r"wanted is \[4\], with gradients"),
    ],
)
def test_a_fitter_that_is_wrong_is_blamed(build, loss, says, tmp_path, monkeypatch):
    if build:
        monkeypatch.setattr(GateFitter, "build", build)
    if loss:
        monkeypatch.setattr(GateFitter, "loss", loss)
    pipe = bare()
    before = everything_of(pipe)
    with pytest.raises(BrokenPlugin, match=says):
        run(tmp_path / "gate.safetensors", pipe=pipe)
    same(before, everything_of(pipe))


def test_a_lora_is_learned_on_a_copy(tmp_path):
    pipe, kwargs = tiny("StableDiffusionPipeline")
    plain = generate(pipe, kwargs)
    before = everything_of(pipe)
    out = tmp_path / "lora.safetensors"
    fit(pipe, LoraUser(), [Example("a"), Example("b")], SETTINGS, out, FitPlan(2, batch=2))
    same(before, everything_of(pipe))
    assert torch.equal(generate(pipe, kwargs), plain)
    pipe.load_lora_weights(str(out), adapter_name="x")
    assert not torch.equal(generate(pipe, kwargs), plain)
    for change in (pipe.enable_lora, pipe.disable_lora):  # beside one that is there peft would learn without it, or nothing at all
        change()
        before = everything_of(pipe)
        with pytest.raises(Unsupported, match=r"has a LoRA already.*fuse_lora"):
            fit(pipe, LoraUser(), [Example("a"), Example("b")], SETTINGS, out, FitPlan(2, batch=2))
        same(before, everything_of(pipe))


def test_an_example_without_learning():
    pipe, kwargs = tiny("StableDiffusionPipeline")
    found = fit_call(pipe, GateUser(), lambda it: it(**kwargs))
    assert (set(found.tensors), found.kind) == ({"factor", "seen"}, "fit")
    load_pipeline(pipe, plugins=[GateUser(artefact=found)])


def test_every_example_comes_once_before_any_comes_again():
    plan = FitPlan(10, batch=4)
    taken = [row for step in range(6) for row in plan.rows(step, 6)]
    assert [sorted(taken[i : i + 6]) for i in (0, 6, 12, 18)] == [list(range(6))] * 4
    assert taken[:6] != taken[6:12]
    assert plan.rows(3, 6) == taken[12:16]


def test_folders_of_pictures(tmp_path):
    with pytest.raises(ConfigError, match="there is no such folder"):
        read_examples(tmp_path / "none")
    with pytest.raises(ConfigError, match="no picture there"):
        read_examples(tmp_path)
    for name in ("b.png", "a.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("an apple\n")
    assert [(each.prompt, Path(each.picture).name) for each in read_examples(tmp_path)] == [("an apple", "a.png"), (None, "b.png")]
    lines = tmp_path / "metadata.jsonl"
    lines.write_text('{"file_name": "b.png", "text": "a ball", "label": 3}\n\n')
    assert [(each.prompt, each.class_label) for each in read_examples(tmp_path)] == [("a ball", 3)]
    wrong = {
        "nonsense": "line 1",
        '{"text": "x"}': "says no file_name",
        '{"file_name": "c.png"}': "is no picture in",
        '{"file_name": "../a.png"}': "is no picture in",
        '{"file_name": "a.png", "text": 5}': "text = 5",
    }
    for line, says in wrong.items():
        lines.write_text(line)
        with pytest.raises(ConfigError, match=says):
            read_examples(tmp_path)
    lines.write_text('{"file_name": "a.png"}')
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"a\.png"):
        run(tmp_path / "out.safetensors", examples=read_examples(tmp_path))


def test_unlabelled_pictures_have_no_prompt():
    assert [each.label for each in pictures(1)] == ["'picture 0'"]


@pytest.fixture
def call(tmp_path, monkeypatch):
    """The command line with `gate` installed."""
    from cli_plugins import dist
    from diffgraft.cli import app
    from typer.testing import CliRunner

    (tmp_path / "site").mkdir()
    dist(tmp_path / "site", "diffgraft-gate", {"gate": "fitters:GateUser"})
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return lambda *words: CliRunner().invoke(app, ["fit", *map(str, words)])


def test_the_command(call, tmp_path):
    folder, data, out = tmp_path / "sd", tmp_path / "data", tmp_path / "gate.safetensors"
    bare().save_pretrained(folder)
    data.mkdir()
    for number, each in enumerate(pictures(2)):
        each.picture.save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(each.prompt)
    size = ["--height", "32", "--width", "32", "--inference-steps", "2", "--out", out]
    refused = {
        "learns from pictures: give --data FOLDER": ["--steps", "2"],
        "fit: steps = 0: at least 1": ["--steps", "0", "--data", data],
        "there is no such folder": ["--steps", "2", "--data", tmp_path / "none"],
        "give one of them": ["--steps", "2", "--data", data, "--prompt", "x"],
        "unknown knob 'rat'": ["--steps", "2", "--data", data, "--set", "rat=1"],
    }
    for says, words in refused.items():
        done = call("gate", "--pipeline", folder, *size, *words)
        assert (done.exit_code, says in done.output) == (2, True), done.output
    assert not out.exists()
    done = call("gate", "--pipeline", folder, "--data", data, "--steps", "2", "--batch", "2", *size)
    assert done.exit_code == 0, done.output
    assert "2 steps of 2 examples: loss" in done.output
    assert Artefact.load(out, "gate", "fit").made_for.steps == 2
