"""The benchmark package: its cases can be run, its rows say what happened, its page opens."""

from __future__ import annotations

import csv
import json
import shutil
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffgraft import Paper, Plugin, load_pipeline
from diffgraft.installed import registry
from diffgraft_bench import findings, stacks
from diffgraft_bench.__main__ import app, last_words, on_gpu
from diffgraft_bench.bout import How, fight
from diffgraft_bench.cases import PEERS, Bout, Method, all_bouts, peer, plain, plugin
from diffgraft_bench.cuda import SMALL, Clock, all_arms, run_arms
from diffgraft_bench.layouts import CONFIGS
from diffgraft_bench.methods import own_copy
from diffgraft_bench.models import LayoutModel
from diffgraft_bench.quality import TRUE_FEATURES, render_true_features
from diffgraft_bench.report import write_report
from diffgraft_bench.rows import Store, key_of, way
from diffgraft_bench.syncs import TOLD, Syncs
from safetensors.torch import load_file
from typer.testing import CliRunner

ALL = [*all_bouts(True), *all_bouts(False)]
ON_GPU = [arm.bout for arm in all_arms(Path(), False, 1)]
HOW = {"rounds": 1, "device": "cpu"}


# cases -----------------------------------------------------------------------------------------------------------------------------------


def bout_id(bout):
    return f"{bout.arm}-{bout.pipeline}-{bout.methods[0].label}-{bout.methods[0].setting}"


@pytest.mark.parametrize("bout", [*ALL, *ON_GPU], ids=bout_id)
def test_a_bout_names_what_there_is(bout):
    assert bout.env in ("", *PEERS)
    assert bout.pipeline in (CONFIGS if bout.arm == "speed" else registry.bundled())
    assert all(method.kind != "peer" or method.name == bout.env for method in bout.methods)
    for method in bout.methods:
        if method.kind == "diffgraft":
            for name, knobs in method.knobs.items():
                registry.find(name)(**knobs)  # every knob is one, and in its range
    labels = {method.label for method in bout.methods}
    assert {method.ours for method in bout.methods} <= labels | {""}
    assert Bout.from_json(json.loads(json.dumps(bout.to_json()))) == bout


@pytest.mark.parametrize("quick", [True, False])
def test_no_measurement_twice(quick):
    keys = [key_of(bout, method, HOW) for bout in all_bouts(quick) for method in bout.methods]
    assert len(set(keys)) == len(keys)


def test_a_key_tells_settings_apart():
    bout = Bout("quality", "emoji-sd", 50, plain(5, 6))
    keys = {key_of(bout, method, HOW) for method in bout.methods}
    keys |= {key_of(replace(bout, steps=40), bout.methods[0], HOW), key_of(bout, bout.methods[0], {"rounds": 2, "device": "cpu"})}
    assert len(keys) == 4


def test_settings_in_words():
    assert plugin("a", 5, t_stitch={"model": "x", "fraction": 0.2}).setting == "5 steps, fraction=0.2"
    assert plugin("deepcache", deepcache={"interval": 3}).setting == peer("DeepCache", interval=3).setting == "interval=3"
    assert plugin("faster_diffusion", faster_diffusion={}).setting == "default"


# findings --------------------------------------------------------------------------------------------------------------------------------


def row(label, kind, speedup, psnr, **more):
    common = {"error": None, "arm": "quality", "pipeline": "p", "setting": "s", "steps": 5, "session": "1", "ours": ""}
    return {**common, "label": label, "kind": kind, "speedup": speedup, "psnr_mean": psnr, "psnr_reference_mean": psnr, **more}


def test_ours_at_the_points_that_others_reach():
    rows = [
        row("fewer steps", "plain", 2.0, 40.0),
        row("slow", "peer", 1.5, 39.0),  # beaten by fewer steps: no point of the front
        row("cache", "cache", 4.0, 30.0),
        row("broken", "peer", 9.0, 60.0, error="it broke"),
        row("mine", "diffgraft", 3.0, 39.6),
        row("mine", "diffgraft", 6.0, 29.4),
    ]
    found = {each.other["label"]: each for each in findings.against_others(rows, "p", "psnr_mean")}
    assert set(found) == {"fewer steps", "cache"}
    assert found["fewer steps"].ratio == 1.5  # 39.6 is within half a dB of 40
    assert found["cache"].ours["psnr_mean"] == 39.6  # 29.4 is not
    assert found["cache"].ratio == 0.75


def test_duels_are_of_one_process_and_one_setting():
    theirs = row("DeepCache", "peer", 2, 40, ours="deepcache", seconds=[1.0, 2.0, 4.0], peak_bytes=100)
    ours = row("deepcache", "diffgraft", 2, 40, seconds=[0.5, 2.0, 2.0], peak_bytes=50)
    others = [dict(ours, session="2"), dict(ours, setting="t"), dict(ours, label="x")]
    (duel,) = findings.duels([theirs, ours, *others])
    assert (duel.ratio, duel.low, duel.high, duel.memory) == (0.5, 0.5, 1.0, 0.5)


def test_solvers_by_steps():
    solvers = [row("A", "scheduler", 2, 30), row("dpm_solver_v3", "diffgraft", 2, 31)]
    rows = [*solvers, row("deepcache", "diffgraft", 2, 50), row("B", "plain", 2, 9, steps=20)]
    assert {k: [r["label"] for r in v] for k, v in findings.solver_errors(rows, "p").items()} == {5: ["dpm_solver_v3", "A"]}


def test_every_solver_of_the_cases_is_compared():
    methods = [method for bout in ALL if bout.arm == "quality" for method in bout.methods]
    alone = {method.label for method in methods if method.kind == findings.OURS and method.steps and " + " not in method.label}
    assert alone == set(findings.SOLVERS)


def test_last_words_hold_the_reason():
    text = "Traceback\nRuntimeError: the reason\n  raise X\nModuleNotFoundError: what followed\n"
    assert last_words(text) == "ModuleNotFoundError: what followed (before that: RuntimeError: the reason)"
    assert last_words("killed\n") == "killed"
    assert last_words("") == "no message"


def test_the_ways_of_a_gpu():
    speed = How("out", rounds=1, warmup=0, samples=0, batch=1, reference_steps=0, device="cuda")
    assert [way(each.circumstances) for each in on_gpu(speed, ["native", "flash"])] == ["", "batch 4", "compiled", "flash"]
    assert len({json.dumps(each.circumstances) for each in on_gpu(speed, ["xformers", "flash"])}) == 5


def stack_row(label, kind, speedup, near, batch=8, samples=48, **more):
    plain_seconds = [10.0, 12.0, 11.0]
    common = {"error": None, "arm": "quality", "pipeline": "emoji-sd", "setting": "s", "env": "", "session": "1", "command": "c"}
    figures = {"psnr_reference_mean": near, "judged": 48, "right": 48, "plain_right": 48, "speedup": speedup, "denoiser_share": 0.5}
    seconds = [p / speedup for p in plain_seconds]
    who = {"label": label, "kind": kind, "timed_batch": batch, "samples": samples, "seconds": seconds, "plain_denoiser_share": 0.9}
    return {**common, **figures, **who, "plain_seconds": plain_seconds, **more}


def test_the_fastest_stack_at_each_level():
    rows = [
        stack_row("mine", findings.OURS, 6.0, 36.0),
        stack_row("quick", findings.OURS, 9.0, 28.0, right=40),
        stack_row("UniPC", "scheduler", 4.0, 35.5),
        stack_row("DPM++", "scheduler", 5.0, 31.0),
        stack_row("broken", "peer", 99.0, 50.0, error="no"),
        stack_row("mine", findings.OURS, 3.0, 10.0, batch=1, samples=2),  # nearness is that of the row with most pictures
    ]
    found = {each.level: each for each in stacks.levels(rows, "emoji-sd", 8)}
    assert [found[level].ours["label"] for level in ("25 dB", "30 dB", "35 dB")] == ["quick", "mine", "mine"]
    assert [found[level].peer["label"] for level in ("25 dB", "30 dB", "35 dB")] == ["DPM++", "DPM++", "UniPC"]
    assert found["40 dB"].ours is found["40 dB"].peer is None
    assert (found["35 dB"].ratio, found["35 dB"].low, found["35 dB"].high) == pytest.approx((1.5, 1.5, 1.5))
    assert found["judge: 100% of plain"].ours["label"] == "mine"
    assert stacks.levels(rows, "emoji-sd", 1)[2].ours["speedup"] == 3.0
    assert "| emoji-sd, 8 | 35 dB | mine, s | 6.00x | UniPC, s | 4.00x | **1.50 (1.50 to 1.50)** |" in stacks.table(rows)
    assert "outside the denoiser 10% of a plain call, 50% of quick (s)" in stacks.shares(rows)
    models = [stack_row("fit", "fitted", 20.0, 20.0), stack_row("lcm", "bundled", 15.0, 20.0)]
    found = stacks.levels([*rows, *models], "emoji-sd", 8)[-1]
    assert (found.ours["label"], found.peer["label"]) == ("fit", "lcm")


def test_a_tuned_stack_is_a_method(tmp_path, monkeypatch):
    monkeypatch.setattr(stacks, "TUNED", tmp_path)
    front = [{"steps": 8, "plugins": {"dpm_solver_v3": {"corrector": "pseudo"}}}, {"steps": 20, "plugins": {}}]
    (tmp_path / "emoji-sd.json").write_text(json.dumps({"front": front}))
    assert [(each.label, each.steps, each.knobs) for each in stacks.tuned("emoji-sd")] == [
        ("dpm_solver_v3", 8, {"dpm_solver_v3": {"artefact": "calibrate", "corrector": "pseudo"}})
    ]
    assert stacks.tuned("emoji-wan") == ()
    methods = [method.label for bout in stacks.stack_bouts() for method in bout.methods]
    assert not stacks.BEHIND & set(methods)
    assert {"emoji-sd-lcm", "t_stitch on emoji-sd-lcm", "emoji-flux-4step", "accvideo on emoji-wan-4step"} <= set(methods)


# a real bout -----------------------------------------------------------------------------------------------------------------------------

OTHER = Method("other", "fitted", "emoji-sd-lcm", {"deepcache": {"interval": 2}}, steps=2)
METHODS = (*plain(2), plugin("deepcache", deepcache={"interval": 2}), OTHER, Method("bad", "scheduler", "NoSuchScheduler"))
BOUT = Bout("quality", "emoji-sd", 3, METHODS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    fight(BOUT, How(str(out), rounds=2, warmup=0, samples=2, batch=2, reference_steps=5, command="the command"))
    speed = How(str(out), rounds=1, warmup=0, samples=0, batch=1, reference_steps=0)
    for how in (speed, replace(speed, timed_batch=2, attention="_native_math")):
        fight(Bout("speed", "flux", 2, plain(1), shape=SMALL["flux"]), how)
    return out


@pytest.mark.slow
def test_rows_are_measured(folder):
    rows = {one["label"]: one for one in Store(folder) if one["arm"] == "quality"}
    few = rows["fewer steps"]
    assert (len(few["seconds"]), len(few["plain_seconds"]), few["judged"], few["error"]) == (2, 2, 2, None)
    assert few["plain_seconds"] == rows["deepcache"]["plain_seconds"]
    assert 1 < few["mac_limit"] < 1.5  # two of three denoiser calls, the text encoder and the decoder stay
    assert few["psnr_reference_mean"] < 60
    assert rows["deepcache"]["psnr_mean"] > 10
    assert rows["other"]["mac_limit"] > 1.5, "two calls without guidance, one of them short, of three with it"
    assert 0.1 < rows["other"]["denoiser_share"] < 1, "measured on its own denoiser"
    assert rows["deepcache"]["peak_bytes"] is None  # on a CPU memory is counted in the speed arm
    fast = {way(one): one for one in Store(folder) if one["arm"] == "speed"}
    assert set(fast) == {"", "batch 2, _native_math"}
    assert 0 < fast[""]["peak_bytes"] < fast["batch 2, _native_math"]["peak_bytes"]
    assert few["frechet"] > 0
    assert 0.3 < few["denoiser_share"] < 1
    assert "NoSuchScheduler" in rows["bad"]["error"]
    assert few["command"] == "the command"
    assert (folder / "pictures" / f"{few['key']}.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_second_call_measures_what_is_missing(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "again")
    store = Store(tmp_path / "again")
    before = {one["key"]: one for one in store}
    lost = next(key for key in before if "fewer_steps" in key and key.startswith("quality"))
    store.path(lost).unlink()
    store.forget_failures()
    fight(BOUT, How(str(tmp_path / "again"), rounds=2, warmup=0, samples=2, batch=2, reference_steps=5))
    after = {one["key"]: one for one in store}
    assert set(after) == set(before)
    kept = [key for key in before if key != lost and not before[key]["error"]]
    assert kept
    assert all(after[key] == before[key] for key in kept)
    assert after[lost]["session"] != before[lost]["session"]
    assert after[lost]["psnr"] == before[lost]["psnr"]


@pytest.mark.slow
def test_the_page_shows_every_row(folder):
    page = write_report(Store(folder), folder).read_text()
    for one in Store(folder):
        assert one["label"] in page
    assert "has no attribute NoSuchScheduler" in page
    assert page.count("data:image/png;base64,") >= 6
    assert "http" not in page.replace("http-equiv", "")
    with (folder / "rows.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(list(Store(folder)))


@pytest.mark.slow
def test_the_page_opens_in_a_browser(folder):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    write_report(Store(folder), folder)
    faults: list[str] = []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(Path(folder / "report.html").as_uri())
        sizes = page.eval_on_selector_all("img", "all => all.map(each => each.naturalWidth)")
        browser.close()
    assert not faults
    assert len(sizes) >= 6
    assert all(sizes)


def test_true_features_are_those_of_the_judge():
    from diffgraft.lab.judging import load_judge
    from diffgraft_checkpoints.emoji import scenes

    try:
        scenes.find_font()
    except scenes.ArtworkMissing as missing:
        pytest.skip(str(missing))
    kept = load_file(TRUE_FEATURES)["features"]
    made = render_true_features(load_judge(registry.find_bundled("emoji-sd")))
    torch.testing.assert_close(kept.float(), made, atol=2e-3, rtol=2e-3)  # kept in half precision


# a GPU's few minutes, on a CPU ------------------------------------------------------------------------------------------------------------


class Peeks(Plugin):
    """Reads a number out of every prediction."""

    name = "peeks"
    paper = Paper("none", "0000.00000", "nothing")
    families = ("*",)
    neutral = {}  # noqa: RUF012

    def denoise(self, call, next):
        prediction = next(call)
        prediction.sum().item()
        return prediction


def test_a_planted_wait_is_found():
    model = LayoutModel("flux", 3, "cpu", torch.float32, False, shape=SMALL["flux"])

    def waits(*plugins):
        pipe = load_pipeline(own_copy(model.pipe, share_weights=True), plugins=plugins)
        assert next(pipe.transformer.parameters()) is next(model.pipe.transformer.parameters())
        with Syncs(torch.device("cpu")) as syncs:
            model.run(partial(pipe, callback_on_step_end=syncs.mark), None, [0])
        return syncs.by_step

    assert waits() == [0, 0]
    assert waits(Peeks) == [1, 1]


def test_waits_on_cuda_are_those_that_torch_tells(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    with Syncs(torch.device("cuda")) as syncs:
        for count in (3, 1, 0):  # the same line warns again and again
            for text in [TOLD] * count + ["something else"]:
                warnings.warn(text, stacklevel=1)
            assert syncs.mark(None, 0, None, {"latents": 1}) == {"latents": 1}
    assert syncs.by_step == [1, 0]
    assert modes == ["warn", 0]


def test_the_clock_leaves_out_what_does_not_fit(tmp_path):
    arms = zip(all_arms(tmp_path, True, 1), (10, 1000, 20), strict=False)
    first, second, third = (replace(arm, estimate=seconds) for arm, seconds in arms)
    played = []

    def play(bout, how):
        played.append(bout)
        assert time.time() + 30 < how.until < time.time() + 100
        return "it broke"

    record = run_arms([first, second, third], 100, play)
    found = json.loads((tmp_path / "cuda.json").read_text())
    assert [arm["state"] for arm in found["arms"]] == ["failed", "left out", "failed"]
    assert found["left_out"] == [second.name]
    assert "100 s were left" in record.arms[1]["why"]
    assert played == [first.bout, third.bout]
    assert {(row["pipeline"], row["error"]) for row in found["rows"]} == {("sd15", "it broke"), ("emoji-sd", "it broke")}
    again = run_arms([first, second, third], 0, play).arms  # without any time: what is there is kept
    assert [arm["state"] for arm in again] == ["kept", "left out", "kept"]


def test_the_clock_learns_how_long_things_take():
    clock = Clock(time.time() + 100)
    assert clock.fits(90)
    clock.count(10, 20)
    assert not clock.fits(60)
    assert clock.fits(40)


def test_a_bout_ends_in_time(tmp_path):
    """No time for anything: rows that say so. Time for one round of many: one round."""
    arm = all_arms(tmp_path, True, 1)[0]
    bout = replace(arm.bout, methods=arm.bout.methods[:1])
    fight(bout, replace(arm.how, until=time.time() - 1))
    (row,) = Store(tmp_path)
    assert "left out: the time is up" in row["error"]
    Store(tmp_path).forget_failures()
    fight(bout, replace(arm.how, rounds=1000, until=time.time() + 4))
    (row,) = Store(tmp_path)
    assert row["error"] is None
    assert 1 <= len(row["seconds"]) == len(row["plain_seconds"]) < 1000


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    out = tmp_path_factory.mktemp("cuda")
    done = CliRunner().invoke(app, ["cuda", "--dry", "--one-process", "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out, json.loads((out / "cuda.json").read_text())


@pytest.mark.slow
def test_a_dry_run_has_a_row_for_everything(dry):
    out, found = dry
    arms = all_arms(out, True, 1)
    assert [(arm["name"], arm["state"]) for arm in found["arms"]] == [(arm.name, "done") for arm in arms]
    wanted = {(arm.bout.arm, arm.bout.pipeline, arm.how.compile, method.label) for arm in arms for method in arm.bout.methods}
    rows = {(row["arm"], row["pipeline"], row["compile"], row["label"]): row for row in found["rows"]}
    assert set(rows) == wanted
    assert {row["label"] for row in rows.values() if row["error"]} == {"DeepCache", "cache-dit"}, "packages are not installed for it"
    assert rows["speed", "sd15", False, "deepcache"]["mac_limit"] > 2
    assert rows["speed", "flux", True, "ertacache"]["speedup"] > 0
    assert rows["device", "emoji-sd", False, "deepcache"]["identical"] == 2
    assert (out / "cuda.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_answers_of_a_dry_run(dry):
    _, found = dry
    about = {"schema", "command", "limit_s", "spent_s", "machine", "versions", "arms", "left_out", "rows"}
    assert set(found) == about | {"host_syncs_of_ours", "host_syncs", "idle", "pairs", "against_cpu"}
    assert (found["schema"], found["left_out"]) == (1, [])
    waits = found["host_syncs_of_ours"]
    by_data = waits.pop("diffusers_cache first_block")
    assert by_data == 2, "its decision is diffusers' own, which looks at the residual: once a branch"
    assert set(waits.values()) == {0}
    assert {(each["pipeline"], each["compile"]) for each in found["idle"]} == {(name, False) for name in SMALL} | {("flux", True)}
    assert {(each["pipeline"], each["theirs"]) for each in found["pairs"]} == {
        ("flux", "FirstBlockCache"), ("flux", "TaylorSeer"), ("wan", "FirstBlockCache"),
    }  # fmt: skip
    assert {each["pipeline"] for each in found["against_cpu"]} == {"emoji-sd", "emoji-flux", "emoji-wan"}


def test_without_a_gpu_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = CliRunner().invoke(app, ["cuda", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert not list(tmp_path.iterdir())


# the README's figures --------------------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent
PART = (ROOT / "examples/benchmarks/README.md").read_text().split("<!-- bench:begin", 1)[1].split("<!-- bench:end -->")[0]


def test_every_number_of_the_readme_is_in_the_rows():
    with (ROOT / "examples/benchmarks/rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    measured = set()
    for one in rows:
        if one["psnr_reference_mean"]:
            figures = f"{float(one['speedup']):.2f}", f"{float(one['psnr_reference_mean']):.1f}", f"{one['right']}/{one['judged']}"
            measured.add((one["pipeline"], one["label"], one["setting"], *figures))
    lines = [line.strip("| ").split(" | ") for line in PART.splitlines() if line.startswith("| emoji")]
    assert lines
    for pipeline, label, setting, speedup, near, judged in lines:
        assert (pipeline, label.strip("*"), setting, speedup.split("x")[0], near, judged) in measured
    assert all(one["error"][:100] in PART for one in rows if one["error"])
