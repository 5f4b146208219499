"""The playground's logic, without Gradio: controls from schemas, what a browser may name, verdicts, lines to copy, and a run's events."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffgraft import load_pipeline
from diffgraft.cli.mistakes import Command
from diffgraft.cli.ui import ensure_folder, free_port, is_local
from diffgraft.installed import registry
from diffgraft.installed.config import PluginConfig
from diffgraft.installed.errors import ConfigError, PipelineNotFound, PluginNotFound
from diffgraft.installed.plugin import Need, Paper, Plugin
from diffgraft.lab.compare import Bench
from diffgraft.ui.access import Access
from diffgraft.ui.controls import controls_of, read, set_knobs, typed, value_of
from diffgraft.ui.preview import Previewer, as_places
from diffgraft.ui.running import Outcome, Playground, Progress, Stopped, ensure_in_range, newest
from diffgraft.ui.stacks import Asked, as_command, as_python, as_yaml, judge, menu, moved, pipeline_class, specs_of
from PIL import Image
from pydantic import Field
from typer.testing import CliRunner

HERE = Access((), (), True, ("emoji-sd", "emoji-sd-small"))
ASKED = Asked("emoji-sd-small", "a small crown at the top on a gray background", steps=4, seed=3)


class Config(PluginConfig):
    many: int = Field(3, ge=1, description="N of eq. 6")
    share: float = Field(0.5, ge=0, le=1, description="s of eq. 2")
    few: int = Field(2, ge=1, le=9)
    perhaps: float | None = Field(None, gt=0)
    way: Literal["a", "b"] = "a"
    on: bool = False
    numbers: tuple[float, ...] = (1.0, 2.0)
    words: str | tuple[str, ...] | None = None
    file: str | Path | None = Field(None, description="a calibration")
    other: Any = None
    scorer: Any = None


class Made(Plugin):
    name = "made"
    paper = Paper("t", "", "i")
    families = ("*",)
    Config = Config
    neutral = {"many": 1}  # noqa: RUF012
    needs = (Need("artefact", "file"), Need("pipeline", "other"), Need("reward", "scorer"))


# controls ---------------------------------------------------------------------------------------------------------------------------------


def test_controls_have_the_kind_range_and_words_of_the_schema() -> None:
    made = {knob.name: knob for knob in controls_of(Made)}
    assert {name: knob.kind for name, knob in made.items()} == {
        "many": "number",
        "share": "slider",
        "few": "slider",
        "perhaps": "text",
        "way": "choice",
        "on": "switch",
        "numbers": "text",
        "words": "text",
        "file": "file",
        "other": "pipeline",
        "scorer": "fixed",
    }
    assert (made["share"].low, made["share"].high, made["share"].step) == (0, 1, 0.01)
    assert (made["few"].low, made["few"].high, made["few"].step, made["few"].whole) == (1, 9, 1, True)
    assert made["many"].description == "N of eq. 6"
    assert made["many"].allowed == "integer, >= 1"
    assert made["way"].choices == ("a", "b")
    assert made["perhaps"].optional
    assert set_knobs(Made, {"perhaps": "0.5"}) == {"perhaps": 0.5}
    assert not made["many"].optional


def test_only_what_was_turned_is_set() -> None:
    shown = {"many": 5.0, "share": 0.5, "perhaps": "", "numbers": "[1, 3]", "words": "a cat", "file": "", "strange": 1}
    assert set_knobs(Made, shown) == {"many": 5, "numbers": [1, 3], "words": "a cat"}
    assert Made(**set_knobs(Made, shown)).config.numbers == (1.0, 3.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="finite"):
        set_knobs(Made, {"share": value})


def test_texts_are_bounded_and_objects_are_for_python() -> None:
    made = {knob.name: knob for knob in controls_of(Made)}
    with pytest.raises(ConfigError, match="5000 characters"):
        value_of(made["words"], "x" * 5000)
    with pytest.raises(ConfigError, match="in Python"):
        value_of(made["scorer"], "os:system")
    assert read("words", "9" * 30) == int("9" * 30)
    with pytest.raises(ConfigError):
        read("words", "[" * 3000)
    assert read("words", typed([1, "a"])) == [1, "a"]


def test_every_installed_plugin_has_controls_and_its_defaults_set_nothing() -> None:
    for name in registry.installed():
        cls = registry.find(name)
        made = controls_of(cls)
        assert [knob.name for knob in made] == [*cls.Config.model_fields]
        shown = {knob.name: typed(knob.default) if knob.kind == "text" else knob.default for knob in made if knob.kind != "fixed"}
        assert set_knobs(cls, shown) == {}, name


# access -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/etc", "..", ".", "~", "plugins", "emoji", "../x/y", "a/b/c", "", None, 3, ["emoji-sd"], "/a", "a/../b"])
def test_a_browser_names_no_folder(name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugins").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PipelineNotFound, match="emoji-sd"):
        HERE.pipeline(name)


def test_hub_ids_are_for_this_machine_only_and_no_folder_goes_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert HERE.pipeline("owner/name") == "owner/name"
    with pytest.raises(PipelineNotFound):
        Access(hub=False).pipeline("owner/name")
    assert Access(("owner/name",), hub=False).pipeline("owner/name") == "owner/name"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PipelineNotFound):
        HERE.pipeline("owner/name")


def test_knobs_read_files_in_allowed_folders_only(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    for folder in (inside, outside):
        (folder / "a.safetensors").write_bytes(b"")
    (inside / "link.safetensors").symlink_to(outside / "a.safetensors")
    allowed = Access((), (inside,), True, ())
    assert allowed.files() == [str(inside / "a.safetensors")]
    good = str(inside / "a.safetensors")
    assert allowed.ensure("made", "file", good, True) == good
    for bad in (outside / "a.safetensors", inside / ".." / "out" / "a.safetensors", inside / "link.safetensors"):
        with pytest.raises(ConfigError, match="--allow"):
            allowed.ensure("made", "file", str(bad), True)
    with pytest.raises(ConfigError, match="--allow"):
        specs_of(["t_stitch"], {"t_stitch": {"model": "/etc"}}, HERE)


def test_a_text_is_a_text_and_a_path_in_one_is_refused() -> None:
    assert HERE.ensure("made", "words", ["a cat/dog", "red"], False) == ["a cat/dog", "red"]
    for text in ("/etc/passwd", "~/x", "../x", os.path.basename(__file__) if os.path.exists(os.path.basename(__file__)) else "./x"):
        with pytest.raises(ConfigError):
            HERE.ensure("made", "words", {"deep": [text]}, False)


# verdicts and what is copied --------------------------------------------------------------------------------------------------------------


def test_the_menu_lists_without_importing() -> None:
    import subprocess
    import sys

    code = "import sys; from diffgraft.ui.stacks import menu; assert len(menu()) > 5; print('diffgraft_deepcache' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
    assert {name for _, name in menu()} == {name for name, offer in registry.installed().items() if not offer.broken}
    assert [label for label, _ in menu() if "time shift" in label and "time_shift" in label], "both are typed"


def test_a_clash_is_said_with_the_planners_reason_and_a_wrong_family_with_its_own() -> None:
    clash = judge(["deepcache", "faster_diffusion"], {}, HERE, "StableDiffusionPipeline")
    assert not clash.runs
    assert "deepcache and faster_diffusion both skip blocks" in clash.clashes[0]
    assert judge(["deepcache", "time_shift"], {}, HERE, "StableDiffusionPipeline").runs
    assert judge(["deepcache", "faster_diffusion"], {"deepcache": {"interval": 1}}, HERE, "StableDiffusionPipeline").runs  # neutral
    wrong = judge(["deepcache"], {"deepcache": {"interval": 0}}, HERE, None)
    assert "interval = 0" in wrong.faults[0]
    assert "does not work on FluxPipeline" in judge(["deepcache"], {}, HERE, "FluxPipeline").faults[0]
    assert "nonsense" in judge(["nonsense"], {}, HERE, None).faults[0]
    assert pipeline_class("emoji-sd") == "StableDiffusionPipeline"


def test_plugins_change_places() -> None:
    assert moved("abc", "b", -1) == ["b", "a", "c"]
    assert moved("abc", "a", -1) == ["a", "b", "c"]
    assert moved("abc", "b", 1) == ["a", "c", "b"]
    assert moved("abc", "x", 1) == ["a", "b", "c"]


def test_yaml_is_a_stack_file_and_the_command_says_the_stack(tmp_path: Path) -> None:
    asked = Asked("emoji-sd", "a 'big' cat", 4, 3.5, 7, [("deepcache", {"interval": 5}), ("time_shift", {})])
    file = tmp_path / "stack.yaml"
    file.write_text(as_yaml(asked))
    stack = load_pipeline("emoji-sd", plugins=file).plugins
    assert [(name, stack[name].own_knobs) for name in stack] == asked.specs
    assert "family: sd" in file.read_text()
    assert "pipeline: StableDiffusionPipeline" in file.read_text()
    assert "package: diffgraft-deepcache" in file.read_text()  # what a reader without it is to install
    command = as_command(asked)
    assert "--plugins deepcache,time_shift -o deepcache.interval=5 --steps 4 --guidance-scale 3.5 --seed 7" in command
    assert asked.title == "deepcache(interval=5) + time_shift"


# a run ------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ground() -> Playground:
    return Playground(load_plain, HERE)


def load_plain(name: str) -> Any:
    pipe = load_pipeline(name)
    pipe.plugins.clear()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_run_tells_its_steps_shows_both_pictures_and_its_line_makes_the_same_picture(ground: Playground) -> None:
    asked = Asked(ASKED.pipeline, ASKED.prompt, 6, None, 3, [("deepcache", {"interval": 3})])
    events = [*ground.run(asked)]
    outcomes = [event for event in events if isinstance(event, Outcome)]
    for phase in ("baseline", "stack", "again", "counting"):  # again: the first baseline of a pipeline is a cold one, and is timed anew
        steps = [event.done for event in events if isinstance(event, Progress) and event.phase == phase]
        assert steps == sorted(steps) or phase == "counting", phase  # it has both sides in turn
        assert steps[-1] == 6, phase
    assert events[0] == Progress("loading")
    assert [found.macs for found in outcomes] == [False, True]
    found = outcomes[-1]
    assert found.stack is not None
    assert 5 < found.stack.fidelity.psnr_worst < 60
    assert found.stack.skipped == {"deepcache: skipped": 4}
    assert 0.2 < found.stack.macs.per_run / found.baseline.macs.per_run < 0.9
    assert "watched" not in found.report
    assert "deepcache" in found.report
    assert "plugins" not in vars(ground.loaded[1])  # type: ignore[index]
    line = as_python(asked, found.takes).replace("print(", "(")
    made: dict[str, Any] = {}
    exec(line, made)
    side = found.pictures[1].width // 64
    again = np.asarray(made["result"].images[0])
    assert np.array_equal(np.asarray(found.pictures[1])[::side, ::side], again)
    assert not np.array_equal(np.asarray(found.pictures[0])[::side, ::side], again)
    bare = ground.loaded[1](ASKED.prompt, num_inference_steps=6, generator=torch.Generator().manual_seed(3)).images[0]  # type: ignore[index]
    assert np.array_equal(np.asarray(found.pictures[0])[::side, ::side], np.asarray(bare))


def test_of_what_is_told_at_once_the_newest_is_shown() -> None:
    picture, stop = Image.new("RGB", (1, 1)), ValueError()
    told = [
        Progress("baseline", 1, 4),
        Progress("baseline", 2, 4, picture),
        Progress("baseline", 3, 4),
        Progress("stack", 1, 4),
        stop,
        None,
    ]
    assert newest(told) == [Progress("baseline", 3, 4, picture), Progress("stack", 1, 4), stop, None]
    assert newest([]) == []


def test_the_baseline_alone_is_a_run_too_and_a_second_count_is_remembered(ground: Playground, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, found = ground.run(ASKED)
    assert isinstance(found, Outcome)
    assert found.stack is None
    monkeypatch.setattr(Bench, "count_macs", None)  # not called again
    *_, again = ground.run(ASKED)
    assert isinstance(again, Outcome)
    assert again.baseline.macs.per_run == found.baseline.macs.per_run > 0


def test_a_run_that_is_left_ends_at_its_next_step_and_the_next_one_is_clean(ground: Playground) -> None:
    events = ground.run(Asked(ASKED.pipeline, ASKED.prompt, 900, None, 0))
    while not (isinstance(event := next(events), Progress) and event.done):
        pass
    events.close()
    *_, found = ground.run(ASKED, macs=False)  # waits for the one before, which would take minutes
    assert isinstance(found, Outcome)
    assert not found.macs


def test_faults_come_out_of_a_run_as_they_are(ground: Playground) -> None:
    for asked, kind in (
        (Asked(ASKED.pipeline, "", 4), ConfigError),
        (Asked(ASKED.pipeline, "x", 4, specs=[("nonsense", {})]), PluginNotFound),
        (Asked(ASKED.pipeline, "x", 4, specs=[("deepcache", {"interval": 0})]), ConfigError),
    ):
        with pytest.raises(kind):
            [*ground.run(asked)]
    for wrong in (Asked("emoji-sd", steps=0), Asked("emoji-sd", steps=10**9), Asked("emoji-sd", guidance_scale=math.nan)):
        with pytest.raises(ConfigError):
            ensure_in_range(wrong)
    assert issubclass(Stopped, Exception)


def test_previews_look_like_the_picture(ground: Playground) -> None:
    """The matrix of a made-up picture shows the colours of a true one."""
    pipe, previewer = ground.pipeline(ASKED.pipeline)
    latents: list[torch.Tensor] = []

    def keep(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        latents.append(kwargs["latents"])
        return {}

    call = {"num_inference_steps": 12, "generator": torch.Generator().manual_seed(3), "output_type": "pt"}
    picture = pipe(ASKED.prompt, callback_on_step_end=keep, **call).images
    wanted = torch.nn.functional.adaptive_avg_pool2d(picture, 16)[0].permute(1, 2, 0).numpy()
    preview = previewer(latents[-1])
    assert preview is not None
    assert preview.shape == wanted.shape
    assert np.corrcoef(preview.ravel(), wanted.ravel())[0, 1] > 0.85


def test_places_of_each_layout() -> None:
    assert as_places(torch.zeros(1, 16, 64), "packed").shape == (1, 64, 4, 4)  # type: ignore[union-attr]
    assert as_places(torch.zeros(1, 15, 64), "packed") is None
    assert as_places(torch.zeros(1, 4, 3, 5, 6), "bcfhw").shape == (1, 4, 5, 6)  # type: ignore[union-attr]
    assert as_places(torch.zeros(1, 3, 4, 5, 6), "bfchw").shape == (1, 4, 5, 6)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["emoji-flux", "emoji-wan"])
def test_other_layouts_have_previews(name: str) -> None:
    if name not in registry.bundled_names():
        pytest.skip("not installed")
    pipe = load_plain(name)
    assert Previewer(pipe, registry.find_family(type(pipe))).works


# the command ------------------------------------------------------------------------------------------------------------------------------


def command(*words: str) -> tuple[int, str]:
    from diffgraft.cli import app

    done = CliRunner().invoke(app, ["ui", *words])
    return done.exit_code, done.output


def test_the_command_refuses_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Command is not None
    code, said = command("nonsense")
    assert (code, "PipelineNotFound" in said) == (2, True), said
    code, said = command("--allow", str(tmp_path / "none"))
    assert (code, "there is no such folder" in said) == (2, True), said
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, said = command("--port", str(port))
        assert (code, f"--port {port}: another program listens there" in said) == (2, True), said
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    code, said = command("--port", "0")
    assert (code, "pip install 'diffgraft[ui]'" in said) == (2, True), said


def test_hosts_and_ports(tmp_path: Path) -> None:
    assert [is_local(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "192.168.0.2", "box")] == [True] * 3 + [False] * 3
    assert free_port("127.0.0.1", 0) > 0
    with pytest.raises(ConfigError, match="cannot listen"):
        free_port("203.0.113.1", 0)
    assert ensure_folder(tmp_path) == tmp_path.resolve()
