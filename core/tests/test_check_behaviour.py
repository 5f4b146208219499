"""`diffgraft check`: what a plugin declares is held against what it is seen to do."""

from __future__ import annotations

import pytest
from diffgraft.community.check import open_project
from diffgraft.community.check.effects import Observed, contract_problems, overdeclared
from diffgraft.installed.plugin import Effects
from workshop import BODY, FAMILY, RETURN

EFFECTS = 'effects = Effects(edits=frozenset({"prediction"}))'


def declares(text):
    return ("py", EFFECTS, f"effects = Effects({text})")


def body(*lines):
    return ("py", BODY + RETURN, "".join(f"        {line}\n" for line in lines))


PREDICTION = 'edits=frozenset({"prediction"})'


BEHAVIOUR = {
    # what it does: (hook, changes, word of the reason)
    "clean": ("denoise", [], None),
    "edits the prediction": ("denoise", [declares("")], "edits prediction"),
    "edits the latents in denoise": (
        "denoise",
        [declares(PREDICTION), body("return next(call.with_latents(call.latents * 1.01))")],
        "edits latents",
    ),
    "edits the latents, said": (
        "denoise",
        [
            declares('edits=frozenset({"latents"})'),
            body("if not self.config.strength:", "    return next(call)", "return next(call.with_latents(call.latents * 1.01))"),
        ],
        None,
    ),
    "edits the latents in step": ("step", [("py", 'Effects(edits=frozenset({"latents"}))', "Effects()")], "edits latents"),
    "edits the timestep": ("denoise", [body("return next(call.replace(timestep=call.timestep * 0 + 1))")], "edits timestep"),
    "edits the conditioning": (
        "denoise",
        [body("return next(call.replace(encoder_hidden_states=call['encoder_hidden_states'] * 0.5))")],
        "edits conditioning",
    ),
    "edits the schedule": ("schedule", [("py", 'Effects(edits=frozenset({"schedule"}))', "Effects()")], "edits schedule"),
    "edits attention": ("attention", [("py", 'Effects(edits=frozenset({"attention"}))', "Effects()")], "edits attention"),
    "edits a block": ("block", [declares("")], "edits prediction"),
    "skips the denoiser": (
        "denoise",
        [body("if call.step.index == 2:", "    return call.sample[:, :4].repeat(1, 2, 1, 1)", "return next(call)")],
        "skips denoiser",
    ),
    "skips blocks": ("block", [("py", "out = next(call)\n", 'out = call["hidden_states"]\n')], "skips blocks"),
    "says it skips and does not": ("denoise", [declares(PREDICTION + ', skips=frozenset({"denoiser"})')], "computes everything"),
    "draws noise": (
        "denoise",
        [
            ("py", "from torch import Tensor", "import torch\nfrom torch import Tensor"),
            (
                "py",
                RETURN,
                "        return prediction + 0.1 * torch.randn_like(prediction)\n",
            ),
        ],
        "draws noise",
    ),
    "asks the pipeline for another prompt": (
        "run",
        [
            ("py", "from pydantic import Field", "from diffgraft.methods.conditioning import own_conditioning\nfrom pydantic import Field"),
            (
                "py",
                "        return next(call.replace(",
                "        own_conditioning(call.pipe, call.arguments())\n        return next(call.replace(",
            ),
        ],
        None,
    ),
    "says it draws and does not": ("denoise", [declares(PREDICTION + ", stochastic=True")], "draws none"),
    "couples the batch": ("denoise", [("py", RETURN, "        return prediction + 0.1 * prediction.mean()\n")], "couples the samples"),
    "asks twice": ("denoise", [("py", BODY, BODY + "        next(call)\n")], "needs extra_forwards"),
    "waits for the device": (
        "denoise",
        [("py", BODY, BODY + "        if prediction.max() > 1000:\n            pass\n")],
        "a value is read from a tensor",
    ),
    "has a scheduler": ("scheduler", [("py", 'Effects(replaces=frozenset({"scheduler"}))', "Effects()")], "has a scheduler"),
}


@pytest.mark.parametrize("what", BEHAVIOUR)
def test_effects_are_seen(workshop, what):
    hook, changes, word = BEHAVIOUR[what]
    verdict = workshop.check(changes, hook, behaviour=True)
    reasons = [f"{finding.rule}: {finding.problem.reason}" for finding in verdict.problems]
    if word is None:
        assert verdict.ok, str(verdict)
    else:
        assert any(word in reason for reason in reasons), reasons
        assert all(finding.rule in ("effects", "host_sync") for finding in verdict.problems), reasons
        assert all(finding.problem.line > 0 for finding in verdict.problems), reasons


def test_what_is_declared_for_nothing_is_told_unless_it_was_inactive():
    seen = Observed({}, {}, {}, {}, {}, "", "", [])
    assert [p.reason for _, p in overdeclared(Effects(stochastic=True), seen, "f", 1)] != []
    assert list(overdeclared(Effects(), seen, "f", 1)) == []


def test_a_broken_contract_is_caught(workshop):
    project = open_project(str(workshop.make([("py", RETURN, "        return prediction * 1.5\n")])))
    name, problem = next(contract_problems(project, [FAMILY]))  # the first that fails; the whole suite is run elsewhere
    assert name == "contract"
    assert "neutral" in problem.reason
