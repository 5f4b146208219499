"""``diffgraft check``: for every rule a plugin that breaks it and is caught, with its line, and one that is clean."""

from __future__ import annotations

import json

import pytest
from diffgraft import cli
from diffgraft.community.check import RULES, check, open_project
from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError, PluginNotFound
from typer.testing import CliRunner
from workshop import carded, helper, in_hook

PRESET = "diffgraft_preset: 1\nmodels: m-.*\nknobs: %s\nsource: {kind: paper, where: x}\ntested: false\n"
STATIC = {
    # rule: breaks it, each with a word of the reason
    "names": [
        ([("pyproject.toml", 'name = "diffgraft-chk', 'name = "other-chk')], "distribution"),
        ([("README.md", "# chk", "# other")], "title"),
        ([("py", 'name = "chk', 'name = "other')], "class attribute"),
    ],
    "versions": [
        ([("pyproject.toml", ">=0.1,<0.2", "==0.1.0")], "pin"),
        ([("pyproject.toml", "diffgraft>=0.1,<0.2", "diffgraft>=0.1")], "open"),
        ([("pyproject.toml", "diffgraft>=0.1,<0.2", "diffgraft<0.2")], "open"),
        ([("pyproject.toml", "diffgraft>=0.1,<0.2", "numpy>=1")], "does not depend on diffgraft"),
        ([("pyproject.toml", '<0.2"', '<0.2", "numpy==2.0.0"')], "pin"),
        ([("pyproject.toml", '<0.2"', '<0.2", "not a name!"')], "not a name!"),
    ],
    "imports": [
        ([("py", "from typing import", "import diffgraft_deepcache\nfrom typing import")], "imports diffgraft_deepcache"),
        ([("py", "from typing import", "import pytest\nfrom typing import")], "imports pytest"),
    ],
    "licence": [
        ([("pyproject.toml", 'license = "Apache-2.0"\n', "")], "nobody may use it"),
        (["no LICENSE"], "LICENSE"),
    ],
    "readme_sections": [([("README.md", "## Limits", "## Other")], "'Limits'")],
    "readme_knobs": [
        ([("README.md", "| `0.1` |", "| `0.2` |")], "not what Config says"),
        ([("README.md", "<!-- knobs:begin", "<!-- begin"), ("README.md", "`strength`", "strength")], "does not name strength"),
    ],
    "presets": [
        ([("preset", "append", PRESET % "{strength: 7}")], "strength = 7"),
        ([("preset", "append", PRESET % "{weight: 0.5}")], "unknown knob 'weight'"),
        ([("preset", "append", "diffgraft_preset: 1\n")], "models"),
        ([("preset", "append", PRESET.replace("m-.*", "'('") % "{strength: 0.5}")], "no regular expression"),
        ([("preset", "append", PRESET.replace("paper, where: x", "paper") % "{strength: 0.5}")], "source.where"),
    ],
    "state_on_self": [
        (in_hook("self.last = prediction"), "self.last"),
        (in_hook("self.count += 1"), "self.count"),
        (in_hook("self.seen[call.step.index] = prediction"), "self.seen"),
        (in_hook("self.seen.append(prediction)"), "self.seen"),
        (in_hook("global LAST"), "LAST"),
    ],
    "foreign_writes": [
        (in_hook("call.model.forward = None"), "forward"),
        (in_hook("call.pipe.flag = True"), "call.pipe.flag"),
        (in_hook("setattr(call.pipe, 'flag', True)"), "setattr"),
        (in_hook("object.__setattr__(call, 'args', ())"), "__setattr__"),
        (in_hook("call.pipe.__dict__['flag'] = 1"), "__dict__"),
        (in_hook("call.model.register_forward_hook(print)"), "register_forward_hook"),
        (in_hook("unet = call.model; unet.flag = 1"), "unet.flag"),
        ([("py", "append", "\n\nimport torch\n\ntorch.backends.flag = True\n")], "torch.backends.flag"),
        (helper("\n\ndef mark(model):\n    for part in model.modules():\n        part.flag = 1\n", "mark(call.model)"), "part.flag"),
    ],
    "host_sync": [
        (in_hook("prediction.max().item()"), ".item()"),
        (in_hook("prediction.tolist()"), ".tolist()"),
        (in_hook("prediction.cpu()"), ".cpu()"),
        (in_hook("prediction.to('cpu')"), ".to('cpu')"),
        (in_hook("float(call.timestep)"), "float("),
        (in_hook("float(call.sample.mean())"), "float("),
        (helper("\n\ndef size(x: Tensor) -> float:\n    return float(x.abs().max())\n", "size(prediction)"), "size (called from"),
    ],
    "unpickling": [
        (in_hook("torch.load('x')"), "torch.load"),
        ([("py", "from typing import", "import pickle\nfrom typing import")], "pickle"),
    ],
    "knobs_documented": [
        (
            [("py", 'description="TODO, the paper\'s symbol: how strong it is, 0 to 1; 0 is off, bit for bit"', 'description="strength"')],
            "'strength'",
        ),
        (
            [
                (
                    "py",
                    '0.1, ge=0, le=1, description="TODO, the paper\'s symbol: how strong it is, 0 to 1; 0 is off, bit for bit"',
                    '0.1, description="how strong it is"',
                )
            ],
            "no range",
        ),
        ([("py", "TODO, the paper's symbol: how strong it is, 0 to 1; 0 is off, bit for bit", "how strong it shall be made")], "symbol"),
    ],
    "neutral_declared": [
        ([("py", '{"strength": 0.0}', "{}")], "neutral is empty"),
        ([("py", '{"strength": 0.0}', '{"strength": -1.0}')], "refused by Config"),
    ],
    "paper_told": [
        ([("py", 'title="A title"', 'title=" "')], "paper.title"),
        ([("py", 'arxiv="2401.00000"', 'arxiv="none"')], "no arXiv number"),
    ],
    "import": [([("py", "from typing import", "raise RuntimeError('its own fault')\nfrom typing import")], "its own fault")],
    "quality": [
        ([("toml", 'gpu_timing = "todo"', 'gpu_timing = "done"')], "without evidence"),
        (
            [("toml", 'equation_test = "todo"', 'equation_test = { status = "done", evidence = ["tests/test_x.py::test_y"] }')],
            "is not there",
        ),
        ([("toml", 'readme = "todo"', 'readme = "done"')], "still to be written"),
        ([("toml", 'static = "todo"', 'static = "done"'), *in_hook("prediction.cpu()")], "host_sync"),
        ([("toml", 'contract = "todo"\n', "")], "says nothing of contract"),
        ([("toml", 'contract = "todo"', 'contract = "perhaps"')], "perhaps"),
        ([*carded("2x", "README.md#Nowhere")], "is not there"),
        ([*carded("2.5x, 3/4", "README.md#Measured here"), ("README.md", "figures of your own", "2.50x, 13/4")], "2.5, 3/4 stand nowhere"),
        ([*carded("7.1x", "README.md#Measured here"), ("README.md", "## Limits", "7.1x\n\n## Limits")], "7.1 stands nowhere"),
    ],
}


CASES = [(rule, i) for rule, cases in STATIC.items() for i in range(len(cases))]


def test_the_skeleton_is_clean(workshop):
    for hook in ("denoise", "scheduler", "modules"):
        verdict = workshop.check(hook=hook)
        assert verdict.ok, str(verdict)
        assert verdict.met == {"installs": True, "static": True, "readme": False, "two_families": True}


@pytest.mark.parametrize(("rule", "number"), CASES)
def test_a_plugin_that_breaks_a_rule_is_caught(workshop, rule, number):
    changes, word = STATIC[rule][number]
    folder = workshop.make([change for change in changes if change != "no LICENSE"])
    if "no LICENSE" in changes:
        (folder / "LICENSE").unlink()
    verdict = check(open_project(str(folder)), behaviour=False, contract=False)
    found = [finding for finding in verdict.problems if finding.rule == rule and word in finding.problem.reason]
    assert found, f"{rule} was not found in:\n{verdict}"
    assert found[0].problem.remedy
    if found[0].problem.line:
        assert (folder / found[0].problem.file).is_file()
    follows = {"quality", "host_sync"} | ({"readme_knobs"} if rule == "knobs_documented" else set())  # the table no longer fits
    assert {finding.rule for finding in verdict.problems} <= {rule, *follows}, str(verdict)


def test_every_rule_is_tried():
    assert {rule.name for rule in RULES} - {"readme_written"} <= set(STATIC)


OWN = """

class Store:
    last: Any = None


class Layer:
    def __init__(self) -> None:
        self.kept: list[Any] = []

    def add(self, x: Any) -> None:
        self.last = x
        self.kept.append(x)


def keep(store: Store, x: Any) -> None:
    store.last = x


def build(x: Any) -> Layer:
    layer = Layer()
    layer.last = x
    return layer


MyStore = Store
Store.kind = "a store"
"""


def test_a_preset_that_holds_is_no_finding(workshop):
    verdict = workshop.check([("preset", "append", PRESET % "{strength: 0.5}")])
    assert verdict.ok, str(verdict)


def test_what_is_the_plugins_own_may_be_written(workshop):
    lines = "call.shared.last = prediction; shared = call.shared; shared.last = 1; keep(shared, 2); build(3).last = 4"
    verdict = workshop.check([("py", "append", OWN), *in_hook(lines)])
    assert verdict.ok, str(verdict)


def test_values_are_read_freely_outside_the_steps(workshop):
    text = "\n\ndef once(x: Tensor) -> float:\n    return float(x.max().item())\n"
    verdict = workshop.check([("py", "append", text), *in_hook("int(call.step.index); float(self.config.strength)")])
    assert verdict.ok, str(verdict)


def test_the_line_is_right(workshop):
    folder = workshop.make(in_hook("prediction.cpu()"))
    [finding] = check(open_project(str(folder)), behaviour=False, contract=False).problems
    text = (folder / finding.problem.file).read_text().splitlines()
    assert text[finding.problem.line - 1].strip() == "prediction.cpu()"


def test_an_allowed_line_is_shown_with_its_reason(workshop):
    verdict = workshop.check(in_hook("prediction.cpu()  # check: allow host_sync because the picture is small"))
    assert verdict.ok
    [finding] = verdict.findings
    assert (finding.rule, finding.allowed) == ("host_sync", "the picture is small")
    assert verdict.met["static"]
    for comment in ("# check: allow foreign_writes because it is", "# check: allow host_sync"):
        assert not workshop.check(in_hook(f"prediction.cpu()  {comment}")).ok


def test_the_folder_in_a_repository_of_plugins_has_the_plugins_name(workshop):
    (workshop.home / "plugins").mkdir()
    workshop.make(name="chk_folder").rename(workshop.home / "plugins" / "other")
    verdict = check(open_project(str(workshop.home / "plugins" / "other")), behaviour=False, contract=False)
    assert [finding.rule for finding in verdict.problems] == ["names"]
    assert "folder is called 'other'" in str(verdict)


def test_what_is_no_plugin_is_refused(tmp_path, workshop):
    with pytest.raises(ConfigError, match=r"no pyproject\.toml"):
        open_project(str(tmp_path))
    with pytest.raises(PluginNotFound, match="did you mean 'deepcache'"):
        open_project("deepcach")
    folder = workshop.make([("pyproject.toml", '[project.entry-points."diffgraft.plugins"]', "[tool.other]")])
    with pytest.raises(ConfigError, match="names 0 plugins"):
        open_project(str(folder))
    folder = workshop.make([("py", "append", "\ndef broken(:\n")])
    with pytest.raises(ConfigError, match=r"__init__\.py:\d+"):
        check(open_project(str(folder)))


@pytest.fixture
def call(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *words: CliRunner().invoke(cli.app, [str(word) for word in words])


def test_fix_repairs_what_can_be_repaired(workshop, call):
    broken = [
        ("pyproject.toml", ">=0.1,<0.2", "==0.1.0"),
        ("README.md", "# chk", "# My own "),
        ("README.md", "## Limits", "## Other"),
        ("README.md", "| `0.1` |", "| `0.2` |"),
        ("toml", 'contract = "todo"\n', ""),
        ("toml", 'gpu_timing = "todo"', 'gpu_timing = { status = "exempt", reason = "no such device" }'),
    ]
    folder = workshop.make([*broken])
    before = call("check", folder, "--json", "--no-contract", "--no-behaviour")
    assert before.exit_code == 1
    rules = {problem["rule"] for problem in json.loads(before.stdout)["problems"]}
    assert rules == {"names", "versions", "readme_sections", "readme_knobs", "quality"}
    fixed = call("check", folder, "--fix", "--json", "--no-contract", "--no-behaviour")
    assert fixed.exit_code == 0, fixed.output
    assert len(json.loads(fixed.stdout)["written"]) == 3
    assert "no such device" in (folder / f"diffgraft_{folder.name}" / "quality.toml").read_text()
    assert "<0.2" in (folder / "pyproject.toml").read_text()
    again = call("check", folder, "--fix", "--json", "--no-contract", "--no-behaviour")
    assert json.loads(again.stdout)["written"] == [], "a second --fix finds nothing to do"


def test_fix_brings_the_repositorys_licence(workshop, call):
    folder = workshop.make()
    (folder / "LICENSE").unlink()
    (folder.parent / ".git").mkdir()
    (folder.parent / "LICENSE").write_text("theirs")
    verdict = check(open_project(str(folder)), behaviour=False, contract=False)
    assert [(finding.rule, "--fix" in finding.problem.remedy) for finding in verdict.problems] == [("licence", True)]
    assert call("check", folder, "--fix", "--no-contract", "--no-behaviour").exit_code == 0
    assert (folder / "LICENSE").read_text() == "theirs"


def test_fix_puts_the_table_where_knobs_are_not_named(workshop, call):
    folder = workshop.make()
    text = (folder / "README.md").read_text()
    head, rest = text.split("<!-- knobs:begin")
    (folder / "README.md").write_text(head + "TODO\n" + rest.split("<!-- knobs:end -->")[1])
    assert call("check", folder, "--fix", "--no-contract", "--no-behaviour").exit_code == 0
    assert "| `strength` |" in (folder / "README.md").read_text()


def test_the_json_is_stable(workshop, call):
    result = call("check", workshop.make(in_hook("prediction.cpu()")), "--json", "--no-contract", "--no-behaviour")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert set(found) == {"name", "dist", "ok", "tier", "todo", "problems", "allowed", "open", "skipped", "met", "written"}
    assert set(found["problems"][0]) == {"rule", "file", "line", "reason", "remedy", "allowed"}
    assert set(found["skipped"]) == {"effects", "contract"}


def test_the_text_names_place_reason_and_remedy(workshop, call):
    folder = workshop.make(in_hook("prediction.cpu()"))
    text = call("check", folder, "--no-contract", "--no-behaviour").output
    assert f"diffgraft_{folder.name}/__init__.py:" in text
    assert "-> stay on tensors" in text
    assert "1 to repair" in text
    text = call("check", workshop.make(), "--no-contract", "--no-behaviour").output
    assert "tier: none yet" in text
    assert "for bronze: installs, static, contract, readme, equation_test" in text


def test_bad_options(workshop, call):
    assert "ConfigError" in call("check", workshop.make(), "--badge", "x.png").output
    result = call("check", workshop.make(), "--family", "flux", "--no-contract")
    assert result.exit_code == 2
    assert "none of flux" in result.output


def test_an_installed_wheel_is_checked_without_its_source_folder(workshop, monkeypatch):
    """Its README is in the metadata, its tests are not there."""
    folder = workshop.make(name="chk_wheel")
    monkeypatch.syspath_prepend(str(folder))
    (folder / "pyproject.toml").unlink()
    info = folder / "diffgraft_chk_wheel-0.1.0.dist-info"
    info.mkdir()
    text = "Metadata-Version: 2.1\nName: diffgraft-chk-wheel\nVersion: 0.1.0\nLicense: Apache-2.0\nRequires-Dist: diffgraft<0.2,>=0.1\n\n"
    (info / "METADATA").write_text(text + (folder / "README.md").read_text())
    (info / "entry_points.txt").write_text("[diffgraft.plugins]\nchk_wheel = diffgraft_chk_wheel:ChkWheel\n")
    assert registry.installed()["chk_wheel"].broken is None
    verdict = check(open_project("chk_wheel"), behaviour=False, contract=False)
    assert verdict.ok, str(verdict)
    assert "evidence" in verdict.skipped
    assert open_project("chk_wheel").root is None
