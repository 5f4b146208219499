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
import torch
from cli_plugins import Idle, OnlyTransformers, Rival, Sparse, install
from diffgraft import Calibrator, ConfigError, Conflict, Need, PluginConfig, Unsupported, load_pipeline
from diffgraft.cli import app
from diffgraft.lab.metrics import psnr
from diffgraft.lab.tune import tune
from diffgraft.lab.tune.goal import Candidate, Goal, Trial, TuneSettings, Tuning, front_of, ladder_of, parse_budget, ready_line
from diffgraft.lab.tune.space import Space, find_plugins
from diffgraft.lab.tune.tuner import Tuner
from diffgraft.lab.tune.view import draw, print_tuning, verdict
from diffgraft.methods.inputs import CallSettings, Sample, make_pictures
from probes import PAPER, Probe, tiny, trace
from pydantic import Field
from typer.testing import CliRunner

CALL = CallSettings(height=32, width=32, guidance_scale=5.0)
SAMPLES = tuple(Sample(i, f"picture {i}") for i in range(4))
SETTINGS = TuneSettings(Goal("psnr", 20), SAMPLES[:2], SAMPLES[2:], 4, CALL, (4, 3, 2, 1), trials=9, rounds=1, final_rounds=2, batch=2)


class SparseTuned(Sparse):
    tune: ClassVar[dict[str, Any]] = {"every": (2, 3, 4)}


class RivalTuned(Rival):
    tune: ClassVar[dict[str, Any]] = {"every": (2, 3)}


class IdleTuned(Idle):
    tune: ClassVar[dict[str, Any]] = {"off": (False,)}


class Fussy(IdleTuned):
    """Refuses runs of an odd number of steps."""

    name = "fussy"

    def denoise(self, call, next):
        if call.step.total % 2:
            raise Unsupported("fussy: an odd number of steps")
        return next(call)


PLUGINS = [SparseTuned(), RivalTuned(), IdleTuned()]


@pytest.fixture(scope="module")
def pipe():
    made = tiny("StableDiffusionPipeline")[0]
    made(prompt="x", num_inference_steps=1, height=32, width=32)  # diffusers notes things on a pipeline in its first call
    return made


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch):
    monkeypatch.setattr("diffgraft.lab.tune.tuner.gc.collect", lambda: 0)  # a quarter of a second each with torch in memory


@pytest.fixture
def clock(monkeypatch):
    """Time that follows from the settings: a step takes a second, ``every`` of them for sparse a second together; idle saves a half."""
    asked: list[Candidate] = []

    def timed(tuner: Tuner, candidate: Candidate, sample: Sample) -> tuple[float, list[str]]:
        asked.append(candidate)
        seconds = float(candidate.steps)
        for name, knobs in candidate.plugins.items():
            seconds *= 0.5 if name == "idle" else 1 / knobs.get("every", 1)
        return seconds, []

    monkeypatch.setattr(Tuner, "timed", timed)
    return asked


def run(pipe: Any, out: Any, plugins: Any = PLUGINS, settings: TuneSettings = SETTINGS, **more: Any) -> Tuning:
    return tune(pipe, plugins, settings, out, name="here", **more)


def same(trial: Trial) -> Any:
    """A trial without the time that it took itself."""
    return replace(trial, spent=0.0)


# what is asked for -------------------------------------------------------------------------------------------------------------------


def test_targets_and_budgets():
    assert Goal.parse("psnr=30") == Goal("psnr", 30.0)
    assert str(Goal.parse("judge=0.9")) == "judge 0.9"
    assert [parse_budget(text) for text in ("90s", "30m", "1.5h", "1h30m")] == [90, 1800, 5400, 5400]
    assert ladder_of(50) == (50, 35, 25, 18, 12, 9, 6, 4)
    assert ladder_of(2) == (2, 1)


@pytest.mark.parametrize("text", ["psnr", "psnr=", "psnr=much", "psnr=-1", "psnr=nan", "psnr=inf", "ssim=2", "judge=90", "lpips=0.1", "=3"])
def test_bad_targets_are_refused(text):
    with pytest.raises(ConfigError, match=r"target .*psnr=30"):
        Goal.parse(text)


@pytest.mark.parametrize("text", ["", "0s", "30", "m", "-3m", "1.2.3m", "ten minutes"])
def test_bad_budgets_are_refused(text):
    with pytest.raises(ConfigError, match="30m or 1h30m"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"trials": None}, "--budget 30m, --trials N"),
        ({"held_out": SAMPLES[1:]}, "other prompts or other seeds"),
        ({"samples": ()}, "at least one"),
        ({"steps": 0}, "steps = 0"),
        ({"ladder": (5,)}, "1 to the pipeline's own 4"),
        ({"ladder": (0,)}, "1 to the pipeline's own 4"),
        ({"reference_steps": 3}, "at least the pipeline's own 4"),
    ],
)
def test_bad_settings_are_refused(more, word):
    with pytest.raises(ConfigError, match=word):
        replace(SETTINGS, **more)


# the space ---------------------------------------------------------------------------------------------------------------------------


def test_the_space_is_legal_and_whole():
    space = Space(PLUGINS, SETTINGS.ladder)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [space.draw(study.ask()) for _ in range(300)]
    stacks = {tuple(candidate.plugins) for candidate in drawn}
    assert stacks == {(), ("sparse",), ("rival",), ("idle",), ("sparse", "idle"), ("rival", "idle")}, "sparse and rival skip the same"
    assert {candidate.steps for candidate in drawn} == {1, 2, 3, 4}
    assert {c.plugins["sparse"]["every"] for c in drawn if "sparse" in c.plugins} == {2, 3, 4}
    first = [space.draw(optuna.trial.FixedTrial(params)) for params in space.first()]
    assert [str(candidate) for candidate in first] == [
        *(f"plain, {steps} steps" for steps in (4, 3, 2, 1)),
        "sparse(every=2), 4 steps",
        "rival(every=2), 4 steps",
        "idle(off=False), 4 steps",
    ]


def test_a_knob_that_is_set_is_not_tuned():
    space = Space([SparseTuned(every=3, mode="x")], (4,))
    assert space.tables == {"sparse": {}}
    assert space.draw(optuna.trial.FixedTrial({"steps": 0, "use sparse": 1})).plugins == {"sparse": {"every": 3, "mode": "x"}}


def test_the_front():
    def trial(number: int, seconds: float, value: float) -> Trial:
        return Trial(number, Candidate(number), [seconds], [1.0], [value])

    trials = [trial(1, 1.0, 9), trial(2, 0.5, 5), trial(3, 0.6, 5), trial(4, 0.7, 4), trial(5, 0.5, 3), Trial(6, Candidate(6), reason="no")]
    assert [t.number for t in front_of(trials)] == [2, 1]


def test_which_plugins_take_part(pipe, monkeypatch, tmp_path):
    classes = {"sparse": SparseTuned, "fussy": Fussy, "only_transformers": OnlyTransformers, "idle": Idle, "gain": Gain, "wants": Wants}
    monkeypatch.setattr(OnlyTransformers, "tune", {"off": (False,)}, raising=False)
    monkeypatch.setattr("diffgraft.kernel.registry.installed", lambda: classes)
    monkeypatch.setattr("diffgraft.kernel.registry.find", classes.__getitem__)
    found, left_out = find_plugins(pipe, {"sparse": {"mode": "x"}})
    assert [(plugin.name, plugin.own_knobs) for plugin in found] == [("sparse", {"mode": "x"}), ("fussy", {}), ("gain", {})]
    assert left_out.keys() == {"only_transformers", "wants"}, "idle says nothing to tune, and nobody has named it"
    assert left_out["wants"] == "needs model: give -o wants.model=..."
    assert "StableDiffusionPipeline" in left_out["only_transformers"]
    with pytest.raises(Unsupported, match="only_transformers"):
        find_plugins(pipe, {"only_transformers": {"off": True}})


# on a pipeline -----------------------------------------------------------------------------------------------------------------------


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


def test_a_budget_ends_it(pipe, tmp_path, clock):
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


# what it says ------------------------------------------------------------------------------------------------------------------------


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


# artefacts ---------------------------------------------------------------------------------------------------------------------------


class GainConfig(PluginConfig):
    gain: float = Field(1.0, description="what predictions are multiplied with")
    artefact: Any = Field(None, description="mean squares of the predictions")


class Meter(Calibrator):
    """Records the mean square of every prediction."""

    name = "gain calibration"
    paper = PAPER
    Config = GainConfig
    asked: ClassVar[list[tuple[int, float]]] = []

    class State:
        seen: Any = ()

    def denoise(self, call, next):
        out = next(call)
        call.shared.seen = (*call.shared.seen, out.square().mean())
        return out

    def collect(self, call):
        self.asked.append((len(call.shared.seen), self.config.gain))
        return {"power": torch.stack(call.shared.seen)}

    def summarise(self, records):
        return {"power": torch.stack([r["power"] for r in records]).mean(0)}, {}


class Gain(Probe):
    """Needs an artefact for each number of steps."""

    name = "gain"
    Config = GainConfig
    needs = (Need("artefact", "artefact"),)
    calibration = Meter
    tune: ClassVar[dict[str, Any]] = {"gain": (1.0,)}

    def denoise(self, call, next):
        assert len(call.given("artefact").tensors["power"]) == call.step.total
        return next(call) * self.config.gain


class Wants(Idle):
    """Needs a second pipeline."""

    name = "wants"
    Config = type("WantsConfig", (PluginConfig,), {"__annotations__": {"model": Any}, "model": Field(None, description="a pipeline")})
    needs = (Need("pipeline", "model"),)
    tune: ClassVar[dict[str, Any]] = {"model": (None,)}


def test_artefacts_are_made_once_and_kept(pipe, tmp_path, monkeypatch):
    Meter.asked.clear()
    monkeypatch.setattr(Tuner, "timed", lambda tuner, candidate, sample: (0.5 if candidate.plugins else 1.0, []))
    made = run(pipe, tmp_path / "out", [Gain()], replace(SETTINGS, goal=Goal("psnr", 99), trials=99))
    assert all(trial.reason is None for trial in made.trials)
    assert sorted(Meter.asked) == [(steps, 1.0) for steps in (1, 2, 3, 4) for _ in SETTINGS.samples]
    knobs = made.best.candidate.plugins["gain"]
    assert knobs == {"gain": 1.0, "artefact": str(tmp_path / "out" / "gain-4.safetensors")}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gain-4.safetensors", "tune.json"]
    load_pipeline(pipe, [Gain(**knobs)])
    try:
        make_pictures(pipe, SAMPLES[:1], replace(CALL, steps=4))
    finally:
        pipe.plugins.clear()


def test_an_artefact_that_takes_too_much_of_the_budget_is_not_made(pipe, tmp_path, clock, monkeypatch):
    monkeypatch.setattr("diffgraft.lab.tune.tuner.CALIBRATION_SHARE", 0.0)
    Meter.asked.clear()
    made = run(pipe, tmp_path / "out", [Gain()], replace(SETTINGS, trials=99, budget=1e6))
    assert len(Meter.asked) == 4, "the first sample of each number of steps tells"
    assert sum("gain: its artefact takes about" in (trial.reason or "") for trial in made.trials) == 4
    assert not hasattr(pipe, "plugins")


# the command -------------------------------------------------------------------------------------------------------------------------


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
