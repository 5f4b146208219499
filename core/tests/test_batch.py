"""Batches: every line is drawn once, whoever draws it, whatever is lost on the way, and the same command goes on."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import sys
import types
from pathlib import Path

import pytest
from diffgraft.batch import lines
from diffgraft.batch.lines import LONGEST, Broken, check_prompts
from diffgraft.batch.results import Results, differing
from diffgraft.batch.tasks import Task, Tasks
from diffgraft.batch.work import carried_out, here, surveyed
from diffgraft.cli import batching, running
from diffgraft.installed.errors import ConfigError, Conflict, ForeignError, OutputError
from diffgraft.lab.recipes import Recipe, read_record
from diffgraft.methods import inputs
from diffgraft_pipelines.tiny import make
from drawers import Draws, begun


def written(path: Path, *values: object) -> Path:
    path.write_text("".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values), encoding="utf-8")
    return path


def of_prompts(folder: Path, *prompts: str) -> Tasks:
    """The tasks of a file with these prompts."""
    return Tasks(written(folder / "prompts.jsonl", *({"prompt": prompt} for prompt in prompts)), Recipe(pipeline="none"), ".png", {})


def gone_through(tasks: Tasks, out: Path, notes: Path, pool=here):
    """The batch of one command, at its end."""
    notes.mkdir(exist_ok=True)
    results = Results(out)
    with results.claimed():
        state = surveyed(tasks, results)
        for _ in carried_out(state, tasks, results, Draws(notes), pool):
            pass
    return state


def pictures(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.png"))}


def marks(out: Path) -> dict[str, tuple[int, int]]:
    """What changes with every writing of a file."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("*.png")}


# lines ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "no JSON: Expecting property name"),
        ('"a panda"', "'a panda' is no object"),
        ("[" * 100_000, "no JSON"),
        ('{"prompt": NaN}', "NaN is no number here"),
        ('{"promt": "a panda"}', "'promt': no key of a line; did you mean 'prompt'"),
        ('{"prompt": 3}', "prompt = 3: Input should be a valid string"),
        ('{"seed": -9223372036854775809}', "seed = -9223372036854775809: Input should be greater than"),
        ('{"seed": true}', "seed = True"),
        ('{"steps": 0}', "steps = 0"),
        ('{"id": "../x"}', "id = '../x'"),
        ('{"id": "Line-7"}', "begins with 'line-'"),
        ('{"id": "A"}', "'A' is that of line 1"),
        ('{"prompt": "' + "x" * LONGEST + '"}', "longer than"),
        (b"\xff", "no UTF-8"),
    ],
)
def test_a_broken_line_is_named_and_the_rest_goes_on(line, why, tmp_path):
    path = tmp_path / "prompts.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'\xef\xbb\xbf{"id": "a"}\n\n' + line + b'\n{"prompt": "b"}')
    first, broken, last = Tasks(path, Recipe(pipeline="none"), ".png", {})
    assert isinstance(broken, Broken)
    assert broken.number == 3
    assert why in broken.why
    assert (first.number, first.name, last.number, last.name) == (1, "a.png", 4, "line-000004.png")


def test_a_line_overrides_the_command_and_its_seed_follows_from_its_number(tmp_path):
    path = written(tmp_path / "p", {"prompt": "a"}, "", {"prompt": "b", "seed": 0, "steps": 7, "class_label": "cat", "args": {"eta": 1}})
    base = Recipe(pipeline="none", seed=40, steps=5, args={"eta": 0, "clip_skip": 1})
    first, second = (task.recipe for task in Tasks(path, base, ".png", {}))
    assert (first.seed, first.steps, first.prompt, first.args) == (40, 5, "a", {"eta": 0, "clip_skip": 1})
    assert (second.seed, second.steps, second.class_label, second.args) == (0, 7, ["cat"], {"eta": 1, "clip_skip": 1})
    unsaid = written(tmp_path / "p", {"prompt": "a"}, "", {"prompt": "b"})
    assert [task.recipe.seed for task in Tasks(unsaid, base, ".png", {})] == [40, 42]


def test_seeds_are_those_of_a_generator():
    assert (lines.LEAST_SEED, lines.LARGEST_SEED) == (inputs.LEAST_SEED, inputs.LARGEST_SEED)


def test_no_file_and_no_line(tmp_path):
    for path, fault in ((tmp_path / "none", "no such file"), (tmp_path, "no file"), (written(tmp_path / "p", "", " "), "no line")):
        with pytest.raises(ConfigError, match=fault):
            check_prompts(path)


# in this process --------------------------------------------------------------------------------------------------------------------------


def test_a_stop_a_broken_line_and_more_lines(tmp_path):
    """Each later command draws what is missing, and leaves alone what is there."""
    out, notes = tmp_path / "out", tmp_path / "notes"
    with pytest.raises(KeyboardInterrupt):
        gone_through(of_prompts(tmp_path, "a", "b", "stop", "fail"), out, notes)
    before = marks(out)
    assert set(before) == {"line-000001.png", "line-000002.png"}
    state = gone_through(of_prompts(tmp_path, "a", "b", "stop", "fail"), out, notes)
    assert (state.there, state.drawn, state.failed) == ({1, 2}, 1, {4: "it would not"})
    assert json.loads((out / "failed.jsonl").read_text()) == {"line": 4, "why": "it would not"}
    state = gone_through(of_prompts(tmp_path, "a", "b", "stop", "c", "d"), out, notes)
    assert (state.there, state.drawn, state.failed) == ({1, 2, 3}, 2, {})
    assert not (out / "failed.jsonl").exists()
    assert marks(out).items() >= before.items()
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert rows[3] == {"file_name": "line-000004.png", "line": 4, "seed": 3, "prompt": "c"}
    assert len(rows) == 5
    assert gone_through(of_prompts(tmp_path, "a", "b", "stop", "c", "d"), out, notes).drawn == 0
    assert [len(begun(notes, number)) for number in range(1, 6)] == [1, 1, 2, 2, 1]


def test_what_was_made_otherwise_is_never_written_over(tmp_path):
    out, notes = tmp_path / "out", tmp_path / "notes"
    gone_through(of_prompts(tmp_path, "a", "b"), out, notes)
    before = marks(out)
    with pytest.raises(ConfigError, match=r"line 2: .*line-000002\.png was made from another line.* \(prompt: there 'b', here 'c'\)"):
        gone_through(of_prompts(tmp_path, "a", "c", "d"), out, notes)
    (out / "line-000003.png").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"line 3: .* cannot be read as a picture"):
        gone_through(of_prompts(tmp_path, "a", "b", "d"), out, notes)
    assert marks(out).items() >= before.items()
    assert (out / "line-000003.png").read_bytes() == b"mine"
    assert not begun(notes, 3)


def test_what_differs_is_named():
    there = Recipe(pipeline="a", prompt="p", steps=25, guidance_scale=7.5, plugins=[("deepcache", {"interval": 3})])  # as a picture has it
    here = Recipe(pipeline="a", prompt="p", plugins=[("deepcache", {"interval": 5})])
    assert differing(there, here) == ["deepcache.interval: there 3, here 5"]
    assert differing(there, here.model_copy(update={"steps": 8, "plugins": there.plugins})) == ["steps: there 25, here 8"]
    assert differing(there, here.model_copy(update={"plugins": there.plugins})) == [
        "steps: there 25, here not said",
        "guidance_scale: there 7.5, here not said",
    ]
    assert differing(there, there) == []


def test_two_commands_in_one_folder(tmp_path):
    with Results(tmp_path).claimed(), pytest.raises(Conflict, match="another `diffgraft batch`"), Results(tmp_path).claimed():
        pass


def killed_in_writing(tasks: Tasks, out: Path, notes: Path) -> None:
    """A command whose process is killed while it writes its second result."""
    os.replace = lambda part, path: os.kill(os.getpid(), signal.SIGKILL) if "000002" in str(path) else os.rename(part, path)
    gone_through(tasks, out, notes)


def test_a_command_that_is_killed(tmp_path):
    out, notes = tmp_path / "out", tmp_path / "notes"
    tasks = of_prompts(tmp_path, "a", "b", "c")
    process = multiprocessing.get_context("fork").Process(target=killed_in_writing, args=(tasks, out, notes))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    before = marks(out)
    assert [path.name for path in out.glob(".*.part")]
    assert set(before) == {"line-000001.png"}
    assert gone_through(tasks, out, notes).drawn == 2
    assert marks(out).items() >= before.items()
    assert not list(out.glob(".*.part"))


@pytest.fixture
def quota(monkeypatch):
    """A disk that is full after so many pictures: the next one is written in half."""

    def full_after(count: int) -> None:
        whole, left = Path.write_bytes, [count]

        def write(path: Path, data: bytes) -> int:
            if ".png" in path.name:
                left[0] -= 1
                if left[0] < 0:
                    whole(path, data[: len(data) // 2])
                    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
            return whole(path, data)

        monkeypatch.setattr(Path, "write_bytes", write)

    yield full_after
    monkeypatch.undo()


def test_a_full_disk(tmp_path, quota, monkeypatch):
    out, notes = tmp_path / "out", tmp_path / "notes"
    tasks = of_prompts(tmp_path, *"abcde")
    quota(2)
    with pytest.raises(OutputError, match=r"line-000003\.png: Disk quota exceeded.*same command goes on"):
        gone_through(tasks, out, notes)
    before = marks(out)
    assert {path.name for path in out.iterdir()} == {"line-000001.png", "line-000002.png", ".batch.lock"}
    monkeypatch.undo()
    assert gone_through(tasks, out, notes).drawn == 3
    assert marks(out).items() >= before.items()


# workers ----------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workers():
    """Two of them on a cluster of this module's own."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'diffgraft[ray]'")
    from diffgraft.batch.rays import Cluster

    cluster = Cluster(workers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # workers find the stand-ins there
        with cluster.connected(ray):
            yield cluster


def test_workers_draw_what_one_process_draws(workers, tmp_path, caplog):
    tasks = of_prompts(tmp_path, *"abcdefg", "warn", "fail")
    one = gone_through(tasks, tmp_path / "one", tmp_path / "notes")
    caplog.clear()
    two = gone_through(tasks, tmp_path / "two", tmp_path / "notes2", workers)
    assert "line 8 is a strange one" in caplog.text  # said in another process
    assert (one.drawn, one.failed) == (two.drawn, two.failed) == (8, {9: "it would not"})
    assert pictures(tmp_path / "one") == pictures(tmp_path / "two")
    assert (tmp_path / "one/metadata.jsonl").read_bytes() == (tmp_path / "two/metadata.jsonl").read_bytes()
    assert str(os.getpid()) not in {begun(tmp_path / "notes2", number)[0] for number in range(1, 10)}


def test_a_killed_worker(workers, tmp_path, caplog):
    """What it was at is drawn by another one; a line that kills every worker is given up and named, and the others are there."""
    out, notes = tmp_path / "out", tmp_path / "notes"
    state = gone_through(of_prompts(tmp_path, "a", "die once", "b", "die", "c", "d"), out, notes, workers)
    assert set(state.failed) == {4}
    assert "3 workers were lost over it" in state.failed[4]
    assert sorted(pictures(out)) == [f"line-{number:06}.png" for number in (1, 2, 3, 5, 6)]
    assert [len(begun(notes, number)) for number in range(1, 7)] == [1, 2, 1, 3, 1, 1]
    assert "line 2: its worker was lost" in caplog.text
    assert len(set(begun(notes, 2))) == 2


def test_a_full_disk_ends_the_workers(workers, tmp_path, quota, monkeypatch):
    out, notes = tmp_path / "out", tmp_path / "notes"
    tasks = of_prompts(tmp_path, *"abcdef")
    quota(2)
    with pytest.raises(OutputError, match="Disk quota exceeded"):
        gone_through(tasks, out, notes, workers)
    monkeypatch.undo()
    before = marks(out)
    assert len(before) == 2
    assert gone_through(tasks, out, notes, workers).drawn == 4
    assert marks(out).items() >= before.items()


@pytest.mark.parametrize(
    ("loading", "error"), [("refuses", "Unsupported: this pipeline cannot be had"), ("dies", "3 workers in a row were lost")]
)
def test_a_pipeline_that_cannot_be_loaded(workers, loading, error, tmp_path):
    from diffgraft.installed.errors import DiffgraftError

    tasks = iter(of_prompts(tmp_path, "a"))
    with pytest.raises(DiffgraftError) as found:
        next(workers(Draws(tmp_path, loading), tasks))
    assert error in f"{type(found.value).__name__}: {found.value}"
    assert isinstance(next(tasks), Task)  # nobody has begun it


def test_a_worker_that_lacks_a_package(workers, tmp_path, monkeypatch):
    """Told once, and as what it is."""
    monkeypatch.setitem(sys.modules, "only_here", types.ModuleType("only_here"))
    opening = type("Opening", (), {"__module__": "only_here", "__call__": lambda self: None})
    monkeypatch.setattr(sys.modules["only_here"], "Opening", opening, raising=False)
    with pytest.raises(ForeignError, match=r"a worker cannot begin .*only_here"):
        next(workers(opening(), iter(of_prompts(tmp_path, "a"))))


def test_the_room_of_a_cluster(workers, tmp_path, caplog):
    from diffgraft.batch.rays import Cluster

    machines = [{"CPU": 6.0, "GPU": 1.0}, {"CPU": 6.0}, {"CPU": 3.0}]
    assert Cluster(gpu=False, threads=4).room(machines) == (2, 0)  # not 15 // 4
    assert Cluster().room(machines) == (1, 1)
    assert Cluster().room(machines[1:]) == (9, 0)
    with pytest.raises(ConfigError, match="no room for a worker of 3 cores"):
        next(Cluster("auto", 2, threads=3)(Draws(tmp_path), iter(())))
    tasks = of_prompts(tmp_path, *"abc")
    assert gone_through(tasks, tmp_path / "out", tmp_path / "notes", Cluster("auto", 3)).drawn == 3
    assert "of 3 workers of 1 cores each the cluster has room for 2" in caplog.text


# the command ------------------------------------------------------------------------------------------------------------------------------

SMALL = ("--steps", 2, "--height", 32, "--width", 32)


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "sd"
    make("StableDiffusionPipeline").pipe.save_pretrained(folder)
    return folder


def test_ctrl_c_says_how_far_it_came(call, sd_folder, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    written(Path("p.jsonl"), {"prompt": "a"}, {"prompt": "b"})
    monkeypatch.setattr("diffgraft.batch.work.carried_out", stopped)
    told = call("batch", "p.jsonl", "--pipeline", sd_folder, "--out", "out", *SMALL)
    assert told.exit_code == 130
    assert "stopped: 0 drawn, 0 were there; the same command goes on" in told.output


def test_sigterm_says_how_far_it_came_too(call, sd_folder, monkeypatch):
    def terminated(*_):
        signal.raise_signal(signal.SIGTERM)
        yield

    written(Path("p.jsonl"), {"prompt": "a"}, {"prompt": "b"})
    monkeypatch.setattr("diffgraft.batch.work.carried_out", terminated)
    before = signal.getsignal(signal.SIGTERM)
    told = call("batch", "p.jsonl", "--pipeline", sd_folder, "--out", "out", *SMALL)
    assert told.exit_code == 143
    assert "stopped: 0 drawn, 0 were there; the same command goes on" in told.output
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_log_is_told_each_tenth_and_each_minute(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with batching.logged() as log:
        for done in range(1, 41):
            now[0] += 1 if done < 30 else 61
            log(done, 40)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["4 of 40 pictures, 0:00:04", "8 of 40 pictures, 0:00:08"]
    assert len(lines) == 7 + 11
    assert lines[-1] == "40 of 40 pictures, 0:11:40"


def test_the_command_goes_on_and_any_number_of_workers_draws_the_same(call, sd_folder, workers, monkeypatch):
    words = ["batch", "p.jsonl", "--pipeline", sd_folder, "-p", "deepcache", "-o", "deepcache.interval=2", *SMALL]
    written(
        Path("p.jsonl"), {"prompt": "a"}, "{", {"prompt": "b", "seed": 5, "id": "b"}, {"class_label": 3, "prompt": "c"}, {"prompt": "d"}
    )
    asked = []  # the packages are looked through once, and not for each picture
    monkeypatch.setattr(running, "origins_of", lambda *given, found=running.origins_of: asked.append(1) or found(*given))
    first = call(*words, "--out", "one")
    assert asked == [1]
    assert first.exit_code == 1, first.output
    assert "wrote 3 to one, 0 were there, 2 lines have none" in first.stdout
    assert "line 2: no JSON" in first.stderr
    assert "line 4: ConfigError: StableDiffusionPipeline takes no class label" in first.stderr
    assert sorted(pictures(Path("one"))) == ["b.png", "line-000001.png", "line-000005.png"]
    assert [read_record(Path("one") / name).recipe.seed for name in ("line-000001.png", "b.png", "line-000005.png")] == [0, 5, 4]

    two = call(*words, "--out", "two", "--ray", "auto", "--json")
    assert two.exit_code == 1, two.output
    assert json.loads(two.stdout)["drawn"] == 3
    assert pictures(Path("two")) == pictures(Path("one"))
    assert "the same, bit for bit" in call("again", "two/b.png").stdout

    written(Path("p.jsonl"), {"prompt": "a"}, "", {"prompt": "b", "seed": 5, "id": "b"}, "", {"prompt": "d"})
    monkeypatch.setattr("diffgraft.cli.running.prepared", lambda *_: pytest.fail("there is nothing to draw"))
    before = marks(Path("one"))
    assert call(*words, "--out", "one").exit_code == 0
    assert marks(Path("one")) == before
    other = call(*words, "--out", "one", "--seed", 1)
    assert other.exit_code == 2
    assert "was made from another line, or with other settings" in other.stderr


def test_without_ray_there_is_no_ray(call, sd_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    written(Path("p.jsonl"), {"prompt": "a"})
    words = ["batch", "p.jsonl", "--pipeline", sd_folder, "--out", "out", *SMALL]
    for more in (["--workers", 2], ["--ray", "auto"]):
        refused = call(*words, *more)
        assert refused.exit_code == 2
        assert "pip install 'diffgraft[ray]'" in refused.stderr
    assert not Path("out").exists()
    assert call(*words).exit_code == 0
    assert len(pictures(Path("out"))) == 1


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--format", "bmp"], "--format bmp: no format of pictures"),
        (["-p", "deepcach"], "deepcache"),
        (["-p", "deepcache", "-o", "deepcache.interval=0"], "interval"),
        (["--height", 32], "--height and --width go together"),
        (["--workers", 2, "--device", "cuda:1"], "write --device cuda"),
    ],
)
def test_a_mistake_in_the_command_is_told_before_anything(words, error, call, sd_folder):
    written(Path("p.jsonl"), {"prompt": "a"})
    told = call("batch", "p.jsonl", "--pipeline", sd_folder, "--out", "out", *words)
    assert told.exit_code == 2
    assert error in told.stderr
    assert not Path("out").exists()
