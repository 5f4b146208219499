"""The contract suite can fail: a correct probe passes all of it, and each planted defect is caught by the check that is named for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from diffgraft import Effects, Plugin, StepOutput
from diffgraft.testing import CHECKS, Case, Subject, contract_candidates, contract_cases, run_contract
from diffgraft.testing.cover import covering
from diffgraft.testing.trace import expect_same_trace, trace
from diffgraft_pipelines.families import FAMILIES
from mutants import (
    HELD,
    AcceptsAnyFamily,
    AcceptsAnyKnob,
    AssumesHalves,
    CountsCalls,
    CouplesTheBatch,
    DescribesNothing,
    DropsResiduals,
    GoesOn,
    HoldsTensors,
    IgnoresProcessors,
    KeepsAMask,
    KeepsOnItself,
    KnowsTheClass,
    LeavesALambda,
    LeavesForward,
    LooksUpTimesteps,
    MixesBatchedBranches,
    MixesBranches,
    NamesItself,
    NeedsIntegerTimesteps,
    NeverChanges,
    NeverFires,
    NeverSkips,
    NotNeutral,
    OneForAll,
    OwnRandom,
    PatchesAClass,
    PatchesTheDenoiser,
    PlansInCalls,
    RemembersBatch,
    RemembersBranches,
    RemembersStart,
    RemembersTotal,
    ReplacesProcessors,
    ResetsAtTheEnd,
    Reuse,
    SaysItOnlyLooks,
    Scaled,
    StaysActive,
    SwallowsExceptions,
    TunesTheImpossible,
    WritesConfig,
    WritesInPlace,
)
from mutants_outside import (
    CopiesTheDenoiser,
    DecidesAlone,
    DecidesTogether,
    HoldsTheScheduler,
    KeepsTheConditioning,
    KeepsTheLatents,
    NeedsTheLoop,
    RefusesWithoutSaying,
    SpeaksItsOwnUnit,
    TakesAnyWeights,
    TakesNeither,
    TakesOneKind,
    TakesWhatNeverRuns,
    TrustsTheFile,
    Wears,
)

SD, IMAGE, CONTROL = "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionControlNetPipeline"


FLUX, DIT, PIXART = "FluxPipeline", "DiTPipeline", "PixArtAlphaPipeline"


class OvershootsTheStep(Scaled):
    """Adds noise in every step and takes nothing away for it."""

    effects = Effects(edits=frozenset({"latents"}), stochastic=True)

    def step(self, call, next):
        out = next(call)
        return StepOutput(out.sample + 2 * call.noise(), out.x0) if call.config.interval > 1 else out


MUTANTS = [
    (NeedsTheLoop, SD, "session"),
    (RefusesWithoutSaying, SD, "refuses_what_it_says"),
    (KeepsOnItself, PIXART, "same_seed"),
    (ResetsAtTheEnd, PIXART, "interrupt"),
    (ResetsAtTheEnd, PIXART, "exception"),
    (SwallowsExceptions, PIXART, "exception"),
    (SwallowsExceptions, PIXART, "interrupt"),
    (MixesBranches, FLUX, "branches_apart"),
    (MixesBatchedBranches, SD, "guidance_cut"),
    (CountsCalls, DIT, "same_seed"),
    (RemembersTotal, DIT, "steps_change"),
    (RemembersStart, IMAGE, "strength"),
    (RemembersBranches, DIT, "guidance_off_on"),
    (RemembersBatch, PIXART, "batch_change"),
    (RemembersBatch, PIXART, "several_a_prompt"),
    (KeepsAMask, PIXART, "another_size"),
    (HoldsTensors, DIT, "memory"),
    (LeavesForward, DIT, "no_trace"),
    (ReplacesProcessors, DIT, "no_trace"),
    (PatchesAClass, DIT, "no_trace"),
    (PatchesAClass, DIT, "two_pipelines"),
    (PatchesTheDenoiser, DIT, "no_trace"),
    (PatchesTheDenoiser, DIT, "from_pipe"),
    (PatchesTheDenoiser, DIT, "offload_before"),
    (PatchesTheDenoiser, DIT, "offload_after"),
    (IgnoresProcessors, SD, "foreign_processors"),
    (IgnoresProcessors, SD, "ip_adapter"),
    (WritesConfig, DIT, "no_trace"),
    (WritesConfig, DIT, "save_reload"),
    (LeavesALambda, DIT, "pickling"),
    (NotNeutral, DIT, "neutral"),
    (OwnRandom, DIT, "same_seed"),
    (WritesInPlace, FLUX, "in_place"),
    (CouplesTheBatch, PIXART, "sample_alone"),
    (NeverFires, DIT, "fires"),
    (TakesNeither, DIT, "fires"),
    (TakesWhatNeverRuns, DIT, "fires"),
    (NeverChanges, DIT, "fires"),
    (SaysItOnlyLooks, DIT, "fires"),
    (NeverSkips, DIT, "saves_work"),
    (DecidesAlone, FLUX, "ranks_agree"),
    (LooksUpTimesteps, SD, "repeated_timesteps"),
    (NeedsIntegerTimesteps, PIXART, "scheduler_Euler"),
    (OvershootsTheStep, SD, "levels"),
    (OvershootsTheStep, FLUX, "levels"),
    (HoldsTheScheduler, PIXART, "scheduler_replaced"),
    (CopiesTheDenoiser, FLUX, "lora_after"),
    (DropsResiduals, CONTROL, "controlnet"),
    (OneForAll, DIT, "deepcopy"),
    (NamesItself, DIT, "attach_twice"),
    (StaysActive, DIT, "switches"),
    (KnowsTheClass, DIT, "compiled"),
    (AcceptsAnyKnob, DIT, "bad_knob"),
    (DescribesNothing, DIT, "declared"),
    (TunesTheImpossible, DIT, "declared"),
    (AcceptsAnyFamily, DIT, "wrong_family"),
    (PlansInCalls, SD, "plan_in_steps"),
    (AssumesHalves, "StableDiffusion3Pipeline", "further_call"),
    (GoesOn, SD, "stopped"),
    (PatchesTheDenoiser, SD, "shared_denoiser"),
    (KeepsTheLatents, SD, "latents_edited"),
    (KeepsTheConditioning, SD, "conditioning_edited"),
    (SpeaksItsOwnUnit, SD, "own_unit"),
    (TrustsTheFile, DIT, "crafted_files"),
    (TakesAnyWeights, DIT, "published_files"),
]
"""(mutant, pipeline class, name of the check that must fail)"""


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    HELD.clear()
    while PatchesAClass.undo:
        PatchesAClass.undo.pop()()


@pytest.mark.parametrize(("mutant", "class_name", "name"), MUTANTS, ids=[f"{m.__name__}-{name}" for m, _, name in MUTANTS])
def test_caught(mutant: type[Plugin], class_name: str, name: str) -> None:
    family = next(family for family in FAMILIES if class_name in family.pipelines)
    check = next(check for check in CHECKS if check.name == name)
    case = Case(mutant, family, class_name, check)
    assert check.when(Subject(mutant, family, class_name)), "the check does not apply here"
    with pytest.raises(AssertionError, match=f"^{mutant.name}.*{name}: "):
        case.run()


@pytest.mark.parametrize("mutant", dict.fromkeys(mutant for mutant, _, _ in MUTANTS), ids=lambda mutant: mutant.__name__)
def test_caught_by_the_covering_table(mutant: type[Plugin]) -> None:
    """What a push runs of a plugin, each check once on some family, still catches every planted defect."""
    named = [name for each, _, name in MUTANTS if each is mutant]
    table = sorted(covering(contract_candidates(mutant), "a seed"), key=lambda case: case.check.name not in named)
    for case in table:
        try:
            case.run()
        except AssertionError:
            return
    raise AssertionError(f"none of the {len(table)} cases of the covering table catches {mutant.__name__}")


def test_every_check_has_a_mutant() -> None:
    caught = {name for _, _, name in MUTANTS}
    assert {check.name for check in CHECKS if not check.name.startswith("scheduler_")} <= caught | {"scheduler_replaced"}
    assert any(name.startswith("scheduler_") for name in caught - {"scheduler_replaced"})


@pytest.mark.parametrize(("plugin", "family"), [(Reuse, "flux"), (Scaled, "dit")])
def test_a_correct_plugin_passes_everything(plugin: type[Plugin], family: str) -> None:
    run_contract(plugin, [family])


@pytest.mark.parametrize(("plugin", "family"), [(DecidesTogether, "flux"), (Wears, "flux"), (TakesOneKind, "dit")])
def test_one_that_only_looks_wrong_passes_a_covering_table(plugin: type[Plugin], family: str) -> None:
    for case in covering(contract_candidates(plugin, [family]), "a seed"):
        case.run()


def test_a_lora_of_each_of_two_denoisers() -> None:
    cases = contract_cases(Wears, ["wan"], ["WanPipeline@2.2"])
    for case in cases:
        if case.class_name == "WanPipeline@2.2" and case.check.name in ("neutral", "fires", "no_trace"):
            case.run()
    with pytest.raises(AssertionError, match="DiTPipeline loads no LoRA: a plugin with Need"):
        next(case for case in contract_cases(Wears, ["dit"]) if case.check.name == "fires").run()


def test_all_failures_are_named_at_once() -> None:
    with pytest.raises(AssertionError) as caught:
        run_contract(OwnRandom, ["pixel"])
    assert "cases failed" in str(caught.value)
    assert "scaled-DDPMPipeline-same_seed: " in str(caught.value)
    assert "scaled-DDPMPipeline-steps_change: " in str(caught.value)


def test_asking_a_class_for_its_annotations_leaves_no_trace() -> None:
    class Bare:
        """Without annotations of its own."""

    class Pipe(Bare):
        config: ClassVar[dict[str, Any]] = {}
        components: ClassVar[dict[str, Any]] = {}

    before = trace(Pipe(), Pipe)
    assert Bare.__annotations__ == {}  # from here on it is in the class's __dict__
    expect_same_trace(before, trace(Pipe(), Pipe), "after asking")
    Bare.left_behind = 1  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="left_behind"):
        expect_same_trace(before, trace(Pipe(), Pipe), "after writing")
