"""The tuning: its space, its trials, what it keeps when it is interrupted, and what it says in the end."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from typing import Any, ClassVar

import diffgraft.lab.tune.tuner as tuner_module
import optuna
import pytest
from cli_plugins import Idle, OnlyTransformers, Sparse, install
from diffgraft import ConfigError, Conflict, Unsupported, load_pipeline
from diffgraft.cli import app
from diffgraft.lab.metrics import psnr
from diffgraft.lab.tune.goal import Candidate, Goal, Trial, ready_line
from diffgraft.lab.tune.space import find_plugins
from diffgraft.lab.tune.tuner import Tuner
from diffgraft.lab.tune.view import draw, print_tuning, verdict, write_winner
from diffgraft.methods.inputs import Sample, make_pictures
from diffgraft.stacks.reading import read_stack
from probes import trace
from tuning import CALL, PLUGINS, SAMPLES, SETTINGS, Gain, IdleTuned, SparseTuned, Wants, run
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("no_collection")


class Fussy(IdleTuned):
    """Refuses runs of an odd number of steps."""

    name = "fussy"

    def denoise(self, call, next):
        if call.step.total % 2:
            raise Unsupported("fussy: an odd number of steps")
        return next(call)


def same(trial: Trial) -> Any:
    """A trial without the time that it took itself."""
    return replace(trial, spent=0.0)


def test_which_plugins_take_part(pipe, monkeypatch, tmp_path):
    classes = {"sparse": SparseTuned, "fussy": Fussy, "only_transformers": OnlyTransformers, "idle": Idle, "gain": Gain, "wants": Wants}
    monkeypatch.setattr(OnlyTransformers, "tune", {"off": (False,)}, raising=False)
    monkeypatch.setattr("diffgraft.installed.registry.installed", lambda: classes)
    monkeypatch.setattr("diffgraft.installed.registry.find", classes.__getitem__)
    found, left_out = find_plugins(pipe, {"sparse": {"mode": "x"}})
    assert [(plugin.name, plugin.own_knobs) for plugin in found] == [("sparse", {"mode": "x"}), ("fussy", {}), ("gain", {})]
    assert left_out.keys() == {"only_transformers", "wants"}, "idle says nothing to tune, and nobody has named it"
    assert left_out["wants"] == "needs model: give -o wants.model=..."
    assert "StableDiffusionPipeline" in left_out["only_transformers"]
    with pytest.raises(Unsupported, match="only_transformers"):
        find_plugins(pipe, {"only_transformers": {"off": True}})


@pytest.fixture(scope="module")
def result(pipe, tmp_path_factory):
    """With real times."""
    before, phases = trace(pipe), []
    out = tmp_path_factory.mktemp("tune") / "out"
    made = run(pipe, out, left_out={"other": "why"}, on_progress=lambda *told: phases.append(told))
    assert trace(pipe) == before
    assert not out.with_name("out.partial").exists()
    return made, json.loads((out / "tune.json").read_text()), phases


def test_trials_and_file(result):
    made, raw, phases = result
    assert [str(t.candidate) for t in made.trials[:4]] == [f"plain, {n} steps" for n in (4, 3, 2, 1)]
    assert len(made.trials) == len({t.candidate.key for t in made.trials}) == 9
    assert made.trials[0].values == [100.0, 100.0]
    assert all(len(t.seconds) == len(t.beside) == 1 and t.seconds[0] > 0 and t.spent > 0 for t in made.trials)
    assert raw["schema"] == 1
    assert raw["front"] == [t.number for t in made.front]
    assert raw["trials"][4]["candidate"] == {"steps": 4, "plugins": {"sparse": {"every": 2}}}
    assert raw["trials"][4]["fidelity"] == pytest.approx(made.trials[4].fidelity)
    assert raw["left_out"] == {"other": "why"}
    assert raw["environment"]["versions"]["optuna"] == optuna.__version__
    assert raw["ready"] == made.best.ready == ready_line("here", made.best.candidate, CALL)
    assert phases[-1] == ("rounds", 3 * len(made.finals), 3 * len(made.finals))
    assert ("search", 9, 9) in phases


def test_fidelity_against_pictures_made_by_hand(result, pipe):
    made, _, _ = result
    trial = made.trials[4]
    call = replace(CALL, steps=4)
    plain = make_pictures(pipe, SAMPLES[:2], call)
    load_pipeline(pipe, [Sparse(every=2)])
    try:
        assert trial.values == pytest.approx(psnr(make_pictures(pipe, SAMPLES[:2], call), plain))
    finally:
        pipe.plugins.clear()


def test_the_end_is_on_other_pictures(result, pipe):
    made, _, _ = result
    assert [final.kind for final in made.finals[:2]] == ["plain", "fewer_steps"]
    fewer = made.fewer_steps
    plain = make_pictures(pipe, SAMPLES[2:], replace(CALL, steps=4))
    near = {n: sum(min(v, 100) for v in psnr(make_pictures(pipe, SAMPLES[2:], replace(CALL, steps=n)), plain)) / 2 for n in (1, 2, 3, 4)}
    assert near[fewer.candidate.steps] >= 20
    assert fewer.candidate.steps == 1 or near[fewer.candidate.steps - 1] < 20
    assert fewer.fidelity.mean == pytest.approx(near[fewer.candidate.steps])
    assert draw(made, "here").axes[0].get_title()


def test_the_clock_is_that_of_real_calls(pipe, tmp_path):
    tuner = Tuner(pipe, [IdleTuned()], SETTINGS, tmp_path, None, lambda *told: None)
    seconds, notes = tuner.timed(Candidate(2, {"idle": {}}), SAMPLES[0])
    assert seconds > 0
    assert notes == ["idle: inactive: there was nothing to do"]


def test_same_seed_same_trials(pipe, tmp_path, clock):
    one, other = run(pipe, tmp_path / "a"), run(pipe, tmp_path / "b")
    assert [same(t) for t in one.trials] == [same(t) for t in other.trials]
    third = run(pipe, tmp_path / "c", settings=replace(SETTINGS, seed=1))
    assert [t.candidate for t in third.trials[:7]] == [t.candidate for t in one.trials[:7]], "the first are not drawn"
    assert [t.candidate for t in third.trials] != [t.candidate for t in one.trials]


class Stop(BaseException):
    """Comes from where Ctrl-C may come."""


def test_an_interrupted_run_goes_on_at_every_trial_and_ends_alike(pipe, tmp_path, clock, monkeypatch):
    whole = run(pipe, tmp_path / "whole")
    measure, left = Tuner.measure, 0

    def stopped(tuner: Tuner, number: int, candidate: Candidate) -> Trial:
        nonlocal left
        left -= 1
        if left < 0:
            raise Stop
        return measure(tuner, number, candidate)

    monkeypatch.setattr(Tuner, "measure", stopped)
    stops = 0
    while True:
        left = 1
        try:
            again = run(pipe, tmp_path / "again")
            break
        except Stop:
            stops += 1
            assert not hasattr(pipe, "plugins")
    assert stops == 8
    assert [same(t) for t in again.trials] == [same(t) for t in whole.trials]
    assert [(f.candidate, f.fidelity, f.of_plain) for f in again.finals] == [(f.candidate, f.fidelity, f.of_plain) for f in whole.finals]
    assert not (tmp_path / "again.partial").exists()


def test_another_run_in_the_same_folder_is_refused(pipe, tmp_path, clock, monkeypatch):
    monkeypatch.setattr(Tuner, "finish", lambda *a: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        run(pipe, tmp_path / "out")
    for plugins, settings in [(PLUGINS[:2], SETTINGS), (PLUGINS, replace(SETTINGS, seed=3)), (PLUGINS, replace(SETTINGS, steps=5))]:
        with pytest.raises(ConfigError, match=r"out\.partial holds an unfinished tuning with another model, other plugins"):
            run(pipe, tmp_path / "out", plugins, settings)
    monkeypatch.undo()
    again = run(pipe, tmp_path / "out", settings=replace(SETTINGS, trials=10, budget=1e6))
    assert len(again.trials) == 10, "more time for the same run is no other run"


def test_refusals_in_a_run_are_results(pipe, tmp_path, clock, capsys):
    made = run(pipe, tmp_path / "out", [Fussy()], replace(SETTINGS, trials=99))
    assert made.exhausted
    assert len(made.trials) == 8, "four numbers of steps with and without it are all that there is"
    reasons = {t.candidate.steps: t.reason for t in made.trials if t.candidate.plugins}
    assert reasons == {4: None, 2: None, 3: "Unsupported: fussy: an odd number of steps", 1: "Unsupported: fussy: an odd number of steps"}
    assert not hasattr(pipe, "plugins")
    print_tuning(made)
    said = capsys.readouterr().out
    assert "2 refused" in said
    assert "the whole space" in said
    assert "fussy: an odd number of steps" in said


class Picky(SparseTuned):
    """Reads the prompts of the search only."""

    name = "picky"
    tune: ClassVar[dict[str, Any]] = {"every": (2,)}
    readable = tuple(sample.prompt for sample in SETTINGS.samples)

    def run(self, call, next):
        prompts = call.kwargs["prompt"]
        if not set([prompts] if isinstance(prompts, str) else prompts) <= set(self.readable):
            raise Unsupported(f"picky: {prompts}: cannot be read")
        return next(call)


def test_a_stack_that_refuses_a_prompt_of_the_end_is_refused_and_the_next_moves_up(pipe, tmp_path, clock, capsys):
    made = run(pipe, tmp_path / "out", [Picky(), IdleTuned()], replace(SETTINGS, goal=Goal("psnr", 1), ladder=(4, 2), trials=99))
    finals = [final.candidate for final in made.finals if final.kind == "stack"]
    assert {tuple(candidate.plugins) for candidate in finals} == {("idle",)}
    refused = [trial for trial in made.trials if trial.reason]
    assert refused
    assert all("picky" in trial.candidate.plugins for trial in refused)
    assert all("on a prompt of the end: Unsupported: picky" in trial.reason for trial in refused)
    assert json.loads((tmp_path / "out" / "tune.json").read_text())["front"] == [trial.number for trial in made.front]
    assert not any(trial.reason for trial in made.front)
    print_tuning(made)
    assert "cannot be read" in capsys.readouterr().out


def test_what_the_plain_pipeline_refuses_is_an_error(pipe, tmp_path):
    with pytest.raises(ConfigError, match="takes no eyes"):
        run(pipe, tmp_path / "out", settings=replace(SETTINGS, call=replace(CALL, extra={"eyes": 2})))
    assert not hasattr(pipe, "plugins")


def test_refusals_before_anything_is_made(pipe, tmp_path):
    with pytest.raises(Unsupported, match="only_transformers"):
        run(pipe, tmp_path / "out", [OnlyTransformers()])
    with pytest.raises(ConfigError, match="brings no judge"):
        run(pipe, tmp_path / "out", settings=replace(SETTINGS, goal=Goal("judge", 0.5)))
    load_pipeline(pipe, [Idle()])
    with pytest.raises(Conflict, match="unload"):
        run(pipe, tmp_path / "out")
    pipe.plugins.clear()
    assert not list(tmp_path.iterdir())


def test_a_budget_too_short_for_anything_is_refused(pipe, tmp_path, clock):
    before = trace(pipe)
    with pytest.raises(ConfigError, match=r"budget 0\.001 s: .* a picture; .* take about \d+ s: give twice that"):
        run(pipe, tmp_path / "out", settings=replace(SETTINGS, trials=None, budget=1e-3))
    assert trace(pipe) == before
    assert not list(tmp_path.iterdir())


def test_a_budget_ends_it(pipe, tmp_path, clock, monkeypatch):
    monkeypatch.setattr(Tuner, "ensure_enough", lambda tuner: None)  # who goes on with an interrupted run comes here with none left
    made = run(pipe, tmp_path / "out", settings=replace(SETTINGS, trials=None, budget=1e-3))
    assert len(made.trials) == 1
    assert [final.kind for final in made.finals] == ["plain", "fewer_steps"]


@pytest.mark.parametrize(("budget", "pace"), [(400.0, 0.05), (900.0, 0.2), (3000.0, 0.05)])
def test_a_budget_is_kept(pipe, tmp_path, monkeypatch, budget, pace):
    """On a clock of its own: what pictures and calls take is known, and the whole, end included, stays within a tenth."""
    now = [0.0]
    monkeypatch.setattr("diffgraft.lab.tune.tuner.time.monotonic", lambda: now[0])
    real = tuner_module.make_pictures

    def pictures(pipe: Any, samples: Any, call: Any) -> Any:
        now[0] += pace * len(samples) * call.steps * 10
        return real(pipe, samples, call)

    def timed(tuner: Tuner, candidate: Candidate, sample: Sample) -> tuple[float, list[str]]:
        now[0] += pace * candidate.steps * 10
        return pace * candidate.steps * 10, []

    monkeypatch.setattr(tuner_module, "make_pictures", pictures)
    monkeypatch.setattr(Tuner, "timed", timed)
    made = run(pipe, tmp_path / "out", settings=replace(SETTINGS, trials=40, budget=budget, final_rounds=7))
    assert made.spent <= 1.1 * budget
    assert made.exhausted or len(made.trials) == 40 or made.spent >= 0.5 * budget


def test_a_winner_is_written_as_a_stack_file(pipe, tmp_path, clock, call):
    high = replace(SETTINGS, goal=Goal("psnr", 99))
    made = run(pipe, tmp_path / "a", [IdleTuned()], high)
    path = write_winner(made, "here", "diffgraft tune here", tmp_path / "a")
    file = read_stack(path).file
    assert ([member.name for member in file.plugins], file.family, file.plugins[0].knobs) == (["idle"], "sd", {"off": False})
    assert file.measured.call == {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 32, "width": 32}
    assert file.measured.figures["times as fast as 4 plain steps"] == (2.0, 2.0, 2.0)
    assert file.measured.command == "diffgraft tune here"
    load_pipeline(pipe, plugins=path).plugins.clear()
    made.winner = None
    assert write_winner(made, "here", "diffgraft tune here", tmp_path / "a") is None
    assert not path.exists(), "that of an earlier tuning is not this one's"


def test_a_winner_is_faster_in_every_round(pipe, tmp_path, clock, monkeypatch, capsys):
    high = replace(SETTINGS, goal=Goal("psnr", 99))
    made = run(pipe, tmp_path / "a", [IdleTuned()], high)
    assert made.winner is made.best
    assert made.winner.candidate == Candidate(4, {"idle": {"off": False}})
    assert (made.winner.faster, made.winner.against_fewer.p50, made.fewer_steps.candidate.steps) == (True, 2.0, 4)
    assert "2.00x as fast as the plain pipeline's 4 steps" in verdict(made)
    draws = iter([1.0, 9.0] * 99)  # now faster, now slower
    monkeypatch.setattr(Tuner, "timed", lambda *a: (next(draws), []))
    made = run(pipe, tmp_path / "b", [IdleTuned()], high)
    assert made.winner is None
    assert "no stack beats fewer steps here: 4 plain steps reach psnr 99 dB" in verdict(made)
    print_tuning(made)
    assert "num_inference_steps=4" in capsys.readouterr().out


class FirstIsRight:
    """Finds every first picture of a call right."""

    def score(self, images, prompts):
        if "unknown" in prompts:
            raise ValueError("what is that?")
        return {"object": [i == 0 for i in range(len(images))]}


def test_other_measures(pipe, tmp_path, clock):
    few = replace(SETTINGS, trials=2)
    judged = run(pipe, tmp_path / "a", settings=replace(few, goal=Goal("judge", 0.5)), judge=FirstIsRight())
    assert [t.values for t in judged.trials] == [[1.0, 0.0]] * 2
    assert judged.fewer_steps.candidate.steps == 1
    assert (judged.fewer_steps.fidelity.mean, judged.fewer_steps.surely) == (0.5, False)
    odd = (Sample(0, "unknown"),)
    with pytest.raises(ConfigError, match=r"does not understand a prompt: what is that\?"):
        run(pipe, tmp_path / "b", settings=replace(few, goal=Goal("judge", 0.5), samples=odd), judge=FirstIsRight())
    similar = run(pipe, tmp_path / "c", settings=replace(few, goal=Goal("ssim", 0.5), reference_steps=6))
    assert 0 < similar.trials[0].fidelity < 1


@pytest.fixture
def call(tmp_path, monkeypatch, pipe):
    (tmp_path / "site").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.syspath_prepend(str(install(tmp_path / "site")))
    monkeypatch.chdir(tmp_path / "work")
    pipe.save_pretrained(tmp_path / "sd")
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*words: Any) -> Any:
        line = [str(word) for word in words]
        monkeypatch.setattr(sys, "argv", ["diffgraft", *line])
        return CliRunner().invoke(app, line)

    return invoke


def test_the_command_and_its_ready_line(call, tmp_path, clock):
    words = ["tune", tmp_path / "sd", "--target", "psnr=99", "--trials", 6, "--steps", 4, "-p", "idle", "--prompt", "a", "--num-prompts", 1]
    done = call(*words, "-o", "idle.off=false", "--height", 64, "--width", 64, "--out", "found")
    assert done.exit_code == 0, done.output
    assert "wrote found/tune.png and found/tune.json" in done.stdout
    raw = json.loads((tmp_path / "work" / "found" / "tune.json").read_text())
    assert shlex.split(raw["command"])[:2] == ["diffgraft", "tune"]
    assert raw["ready"] in done.stdout
    load, _, use = raw["ready"].partition("; ")
    scope: dict[str, Any] = {"load_pipeline": load_pipeline}
    exec(load, scope)
    assert (scope["pipe"].plugins.list(), scope["pipe"].plugins["idle"].own_knobs) == (("idle",), {"off": False})
    assert use == "pipe(..., num_inference_steps=4, height=64, width=64)"


def test_bad_commands_and_missing_packages(call, tmp_path, monkeypatch):
    words = ["tune", str(tmp_path / "sd"), "--target", "psnr=30", "--prompt", "a"]
    for more, word in [
        ([], "give --budget 30m, --trials N"),
        (["--budget", "soon"], "90s, 30m or 1h30m"),
        (["--trials", 3, "-p", "sparze"], "did you mean 'sparse'"),
        (["--trials", 3, "-p", "sparse", "-o", "sparse.evry=2"], "'evry'"),
        (["--trials", 3, "-p", "only_transformers"], "StableDiffusionPipeline"),
    ]:
        done = call(*words, *more)
        assert (done.exit_code, word in done.stderr) == (2, True), done.output
    for package in ("optuna", "matplotlib.figure", "torchmetrics"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, package, None)
            done = call(*words, "--trials", 3)
            assert done.exit_code == 2
            assert "pip install 'diffgraft[lab]'" in done.stderr
    assert not list((tmp_path / "work").iterdir())
