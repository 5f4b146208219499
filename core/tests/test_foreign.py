"""Text, values and results: foreign text is shown as text, bad values are told in one line, and a finished picture is never lost."""

from __future__ import annotations

import errno
import math
import re
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from diffgraft.cli import mistakes, running, values
from diffgraft.community import tables
from diffgraft.installed.config import PluginConfig, build_config
from diffgraft.installed.errors import ConfigError, NeverFired, OutputError
from diffgraft.installed.foreign import brief, plain, said
from diffgraft.lab.recipes import Record, versions_of
from diffgraft.lab.terminal import coloured, console, say
from diffgraft.methods.inputs import CallSettings, Sample, call_arguments
from probes import tiny
from pydantic import ValidationError

STEERING = "\x1b]0;owned\x07\x1b[2J\u202e\n\u2028"


# text ------------------------------------------------------------------------------------------------------------------------------------


def test_plain_text():
    assert plain("Größe 数 🦊‍ a") == "Größe 数 🦊‍ a"
    assert plain(STEERING).isprintable()
    assert plain("a\r\n\tb") == "a b"
    assert plain("a\r\nb\n", lines=True) == "a\nb\n"
    assert plain("\udcff\x9b31m\u2066") == "\\udcff\\x9b31m\\u2066"
    assert said(type("E", (Exception,), {"__str__": lambda self: 1})()) == "E: its text cannot be shown"
    assert brief(10**5000) == "a int"
    assert len(brief("x" * 10_000)) < 100


def test_nothing_steers_the_terminal_and_nothing_is_markup(capsys):
    from rich.padding import Padding
    from rich.table import Table

    foreign = f"[red]{STEERING}[/nope] :bomb:"
    say(foreign, (foreign, "red"))
    screen = console()
    table = Table(title=foreign, caption=foreign)
    table.add_column(foreign)
    table.add_row(foreign)
    table.add_row(coloured(foreign, (foreign, "bold")))
    screen.print(foreign, table, Padding(foreign, 1))
    shown = capsys.readouterr().out
    assert "[red]" in shown
    assert ":bomb:" in shown
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e]", shown)


def test_every_line_goes_through_one_function():
    root = Path(tables.__file__).parent.parent
    for path in (*root.glob("cli/*.py"), *root.glob("lab/**/*.py")):
        if path.name != "terminal.py":
            found = re.findall(r"\btyper\.s?echo\(|\bprint\((?!\))|\bConsole\(|\bText\(|from_markup", path.read_text(encoding="utf-8"))
            found = [one for one in found if one != "print("] + re.findall(r"(?<![.\w])print\(", path.read_text(encoding="utf-8"))
            assert not found, f"{path.name}: {found}: print by diffgraft.lab.terminal"


def test_markdown_has_no_html_and_no_links_of_others():
    assert tables.as_markdown("a<b, 1 < 2, <script>x</script> &lt; R&D") == "a&lt;b, 1 < 2, &lt;script>x&lt;/script> &amp;lt; R&D"
    assert "](" not in tables.as_markdown("![x](http://e) [y][z]").replace("\\](", "")
    assert tables.code("a`b") == "`` a`b ``"
    assert tables.table_row(tables.as_markdown("a\\|b")).count("\\|") == 1


# values, errors, pictures ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "[1, NaN]", "9" * 5000, "[" * 90_000, '{"a": -1e999}'])
def test_values_that_nothing_takes(text):
    with pytest.raises(ConfigError, match=r"^-a x=.{1,200}") as raised:
        values.parse_assignments([f"x={text}"], "-a")
    assert len(str(raised.value)) < 250


class Knobs(PluginConfig):
    size: float = 1.0
    count: int = 1


@pytest.mark.parametrize("knobs", [{"size": math.nan}, {"size": math.inf}, {"size": "nan"}, {"count": "x" * 9999}, {"size": 10**5000}])
def test_knobs_are_finite_and_told_in_short(knobs):
    with pytest.raises(ConfigError, match=r"size|count") as raised:
        build_config("p", Knobs, knobs)
    assert len(str(raised.value)) < 300


class Forms(PluginConfig):
    weights: Literal["even", "late"] | tuple[float, ...] = "even"
    ends: tuple[int, int] = (0, 1)
    side: int | None = None


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"weights": "early"}, "weights = 'early': give 'even' | 'late' or array."),
        ({"weights": 3}, "weights = 3: give 'even' | 'late' or array."),
        ({"weights": [1, "x"]}, "weights.1 = 'x': Input should be a valid number, unable to parse string as a number."),
        ({"ends": [1, "x"]}, "ends.1 = 'x': Input should be a valid integer, unable to parse string as an integer."),
        ({"side": "x"}, "side = 'x': Input should be a valid integer, unable to parse string as an integer."),
        ({"weigths": 1}, "unknown knob 'weigths'; did you mean 'weights'?"),
    ],
)
def test_a_knob_of_several_forms_is_told_in_one_sentence(knobs, told):
    with pytest.raises(ConfigError) as raised:
        build_config("p", Forms, knobs)
    assert str(raised.value).startswith(f"plugin 'p': {told}")


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_guidance_is_finite(scale):
    with pytest.raises(ConfigError, match=r"--guidance-scale -?(nan|inf): it must be a finite number"):
        values.call_settings(None, scale, None, None, None, None, {})


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**23])
def test_seeds_have_64_bits(seed):
    with pytest.raises(ConfigError, match="64 bits"):
        Sample(seed)
    for fine in (2**64 - 1, -(2**63), 0):
        torch.Generator().manual_seed(Sample(fine).seed)


@pytest.mark.parametrize("extra", [{"output_type": "latent"}, {"return_dict": False}, {"prompt": "x"}, {"num_images_per_prompt": 2}])
def test_arguments_that_would_lose_the_picture_are_refused_first(sd, extra):
    with pytest.raises(ConfigError, match=next(iter(extra))):
        call_arguments(sd[0], [Sample(0, "a")], CallSettings(extra=extra))


def test_errors_of_compiled_code_are_foreign_and_slips_of_ours_are_not():
    def raised(act):
        with pytest.raises(Exception) as caught:
            act()
        return caught.value

    theirs = [lambda: torch.Generator().manual_seed(10**23), lambda: torch.ones(2) @ torch.ones(3), Path("/no/such").read_bytes]
    assert [mistakes.is_foreign(raised(act)) for act in theirs] == [True] * 3
    ours = KeyError("x")
    ours.__traceback__ = None
    assert not mistakes.is_foreign(ours)


def test_a_pipelines_own_check_is_told_by_the_one_boundary():
    class SomePipeline:
        def check_inputs(self):
            raise ValueError("`height` has to be divisible by 8\nbut is 9")

    with pytest.raises(ValueError) as caught:
        SomePipeline().check_inputs()
    shown = mistakes.translated(caught.value, {"height": "--height 9"})
    assert str(shown) == "SomePipeline refused the call: `height` has to be divisible by 8 but is 9"
    assert isinstance(shown, ConfigError)


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    from diffgraft.methods.files import write_atomic

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space") as caught:
        write_atomic(tmp_path / "a.bin", b"")
    assert str(mistakes.translated(caught.value, {})) == f"{tmp_path / 'a.bin'}: No space left on device"


def test_a_picture_that_its_format_cannot_hold_is_kept_as_another():
    def write(path):
        if path.suffix != ".png":
            raise ValueError("too large for this format")
        path.write_bytes(b"x")

    with pytest.raises(OutputError, match="too large for this format; the result is kept in") as raised:
        mistakes.kept(write, Path("no/a.webp"), ".png")
    assert (Path(str(raised.value).rpartition("kept in ")[2]) / "a.png").read_bytes() == b"x"


@pytest.mark.parametrize("fault", ["NeverFired", "record", "report"])
def test_a_finished_picture_is_in_its_file_whatever_comes_after(call, tmp_path, monkeypatch, fault):
    folder = tmp_path / "sd"
    tiny("StableDiffusionPipeline")[0].save_pretrained(folder)
    if fault == "NeverFired":
        from diffgraft.methods import inputs

        def make(pipe, samples, settings):
            raise NeverFired("a hook was never reached", pipe(**call_arguments(pipe, samples, settings)))

        monkeypatch.setattr(inputs, "make_pictures", make)
    elif fault == "record":
        monkeypatch.setattr(running, "record_of", lambda *_: 1 / 0)
    else:
        monkeypatch.setattr("diffgraft.kernel.stack.PluginStack.report", lambda self: 1 / 0)
    words = ["--prompt", "a", "--height", 32, "--width", 32, "--steps", 1, "-p", "idle"]
    done = call("run", folder, *words, "--out", "a.png")
    assert (done.exit_code, "wrote a.png" in done.stdout, Path("a.png").exists()) == (2, True, True), done.output
    assert re.search("NeverFired|OutputError: the picture is there", done.stderr)
    assert "Traceback" not in done.output


def test_an_ascii_terminal_shows_what_it_can(monkeypatch):
    import io

    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(mistakes.TyperGroup, "main", lambda self, *args, **kwargs: print("Größe"))
    mistakes.Group(name="x").main()
    stream.flush()
    assert stream.buffer.getvalue() == b"Gr\\xf6\\xdfe\n"


RECORD = {"recipe": {"pipeline": "p"}, "kind": "K", "scheduler": "S", "size": [8, 8], "versions": {}}


@pytest.mark.parametrize("change", [{"picture": 1}, {"picture": -1}, {"recipe": {"pipeline": "p", "num_images": 10**9}}, {"more": 1}])
def test_crafted_records_are_refused_before_anything_is_made(change):
    Record.model_validate(RECORD)
    with pytest.raises(ValidationError):
        Record.model_validate({**RECORD, **change})


def test_a_record_names_packages_that_may_not_be_here():
    made = Record.model_validate({**RECORD, "versions": {"nobody's\x1b[2J": "1"}})
    assert "diffgraft ?" in made.line()
    assert versions_of(["nobody's\x1b[2J", ""])["nobody's\x1b[2J"] == "not installed"


def test_pictures_without_numbers_are_told(call, tmp_path, monkeypatch):
    folder = tmp_path / "sd"
    tiny("StableDiffusionPipeline")[0].save_pretrained(folder)
    monkeypatch.setattr("diffgraft.methods.inputs.make_pictures", lambda *_: np.full((1, 1, 8, 8, 3), np.nan, np.float32))
    done = call("run", folder, "--prompt", "a", "--steps", 1, "--no-metadata", "--out", "a.png", "-p", "idle")
    assert done.exit_code == 2, done.output
    assert "1 of 1 pictures hold no numbers (NaN)" in done.stderr
    assert Path("a.png").exists()
