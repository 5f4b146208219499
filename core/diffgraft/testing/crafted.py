"""Files with wrong content: an artefact, an inversion, a finding that somebody made by hand with a right checksum; published weights with a
key too few, too many, renamed or transposed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_type_hints

import torch
from torch import Tensor
from typing_extensions import is_typeddict

from diffgraft.installed.errors import ArtefactMismatch, DiffgraftError
from diffgraft.installed.plugin import Need
from diffgraft.kernel.loading import unload
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.inputs import CallSettings, Sample
from diffgraft.methods.inversion import invert
from diffgraft.methods.layouts import Comparison, Layout
from diffgraft.methods.published import Weights, spec_of
from diffgraft.testing.case import check
from diffgraft.testing.runs import artefacts, call
from diffgraft.testing.setting import PROMPTS, STEPS, USUAL
from diffgraft.testing.subject import Subject

FILES = ("artefact", "inversion", "search", "fit")
WRONG: tuple[Any, ...] = (None, "x", [], {}, -1, 1e300, float("nan"))
"""What a fact is set to."""


def file_needs(s: Subject) -> list[Need]:
    """What the plugin reads from files."""
    return [need for need in s.plugin.needs if need.kind in FILES]


@check("kind", when=lambda s: bool(file_needs(s)))
def crafted_files(s: Subject) -> None:
    """A file with a right checksum and wrong content is refused before anything runs, or does no harm (75 of 217 ended in raw errors)."""
    pipe = s.make()
    for need in file_needs(s):
        assert need.holds is not None, f"Need({need.kind!r}, {need.knob!r}) says no holds=: what is in the file must be declared"
        made = inversion(s) if need.kind == "inversion" else artefacts(s.plugin, s.family, s.class_name, USUAL)[need.knob]
        assert (why := need.holds.fault(made.tensors, made.facts)) is None, f"what the plugin itself makes is refused: {why}"
        for what, artefact in bent_tensors(made):
            with_it = outcome(s, pipe, need.knob, artefact)
            assert with_it is not None, f"{what}: accepted"
        for what, artefact in bent_facts(made, need.holds.facts):
            with_it = outcome(s, pipe, need.knob, artefact, runs=True)
            assert with_it is None or isinstance(with_it, DiffgraftError), f"{what}: {type(with_it).__name__}: {with_it}"


@check("plugin", when=lambda s: bool(weight_needs(s)))
def published_files(s: Subject) -> None:
    """A file with the published keys is read; one with a key too few, too many, renamed or transposed is refused, and the key named."""
    pipe = s.make()
    for need in weight_needs(s):
        assert isinstance(need.holds, Layout), f"Need('weights', {need.knob!r}) says no holds=Layout(...): its keys must be declared"
        whole = need.holds.synthetic()
        comparison = compare_state(need.holds, whole)
        assert comparison.whole, f"a file with the published keys is refused: {comparison.faults}"
        for what, key, state in bent_states(need.holds, whole):
            error = outcome(s, pipe, need.knob, Weights(state))
            assert isinstance(error, ArtefactMismatch), f"{key} {what}: accepted"
            assert key in str(error), f"{key} {what}: not named in {error}"


def weight_needs(s: Subject) -> list[Need]:
    """The published files that the plugin reads."""
    return [need for need in s.plugin.needs if need.kind == "weights"]


def bent_states(layout: Layout, whole: dict[str, Tensor], most: int = 10) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """(what was done, the key, a state dict) for some keys of a layout."""
    yield "of no use", "no_such_key", {**whole, "no_such_key": torch.zeros(1)}
    without = {key: {name: value for name, value in whole.items() if name != key} for key in list(whole)[:: -(-len(whole) // most)]}
    needed = {key: others for key, others in without.items() if not compare_state(layout, others).whole}
    assert needed, "the layout lets every key be missing"
    for key, others in needed.items():
        yield "missing", key, others
        yield "renamed", key, {**others, f"{key}_renamed": whole[key]}
        yield "of another shape", key, {**others, key: whole[key].unsqueeze(-1).repeat(*[1] * whole[key].ndim, 3)}
        turned = {**others, key: whole[key].T} if whole[key].ndim == 2 else whole
        if not compare_state(layout, turned).whole:  # where no other key has its letters, nobody can know
            yield "transposed", key, turned


def compare_state(layout: Layout, state: dict[str, Tensor]) -> Comparison:
    """A state dict, held against a layout."""
    return layout.compare({key: spec_of(value) for key, value in state.items()})


def outcome(s: Subject, pipe: Any, knob: str, artefact: Artefact | Weights, runs: bool = False) -> BaseException | None:
    """The error that comes when the plugin is put on with this file (and run), or None."""
    one_student = {need.knob: None for need in s.plugin.needs if need.kind == "adapter"} if isinstance(artefact, Weights) else {}
    try:
        s.attach(pipe, **{**one_student, knob: artefact})
        if runs:
            call(pipe, s.family, s.class_name, USUAL)
    except DiffgraftError as error:
        return error
    except Exception as error:
        if runs:
            return error
        raise AssertionError(f"{type(error).__name__}: {error}") from error
    finally:
        unload(pipe)
    return None


def inversion(s: Subject) -> Artefact:
    """The code of a tiny picture."""
    own = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "output_type", s.family.guidance.scale)
    extra = {name: value for name, value in s.facts.kwargs.items() if name not in own}
    settings = CallSettings(steps=STEPS, guidance_scale=None, extra=extra)
    return invert(s.make(), s.plugin(**s.plugin.active), s.baseline(), Sample(seed=0, prompt=PROMPTS[0]), settings)


def bent_tensors(made: Artefact, most: int = 10) -> Iterator[tuple[str, Artefact]]:
    """(what was done, artefact) for some tensors: missing, of another name, dtype, shape, or with values that are no numbers."""

    def having(name: str, value: Tensor | None) -> Artefact:
        others = {key: tensor for key, tensor in made.tensors.items() if key != name}
        return replace(made, tensors=others if value is None else {**others, name: value})

    yield "a tensor that has no place in it", having("no_such_tensor", torch.zeros(1))
    for name in list(made.tensors)[:: -(-len(made.tensors) // most) or 1]:
        value = made.tensors[name]
        yield f"{name} of integers", having(name, torch.zeros(value.shape, dtype=torch.int32))
        yield f"{name} of complex numbers", having(name, value.to(torch.complex64))
        if value.is_floating_point():
            yield f"{name} with NaN", having(name, torch.full_like(value, float("nan")))
            yield f"{name} with minus infinity", having(name, torch.full_like(value, -torch.inf))
        if value.ndim:
            yield f"{name} with no values", having(name, value[:0])
            yield f"{name} of one number", having(name, value.reshape(-1)[0])
        if len(made.tensors) > 1:
            yield f"without {name}", having(name, None)
            if value.ndim:
                yield f"{name} with one row more", having(name, torch.cat([value, value[:1]]))
            yield f"{name} with an axis more", having(name, value.unsqueeze(-1).repeat(*[1] * value.ndim, 2))


def bent_facts(made: Artefact, declared: Any) -> Iterator[tuple[str, Artefact]]:
    """(what was done, artefact): every fact that is ``declared`` (a TypedDict) missing, or something else; all others missing."""

    def having(facts: dict[str, Any]) -> Artefact:
        return replace(made, facts=facts)

    known = declared_in(declared)
    yield "without what is not declared", having({name: fact for name, fact in made.facts.items() if name in known})
    for key in sorted(known.keys() & made.facts.keys()):
        value = made.facts[key]
        yield f"without {key}", having({name: fact for name, fact in made.facts.items() if name != key})
        for wrong in WRONG:
            yield f"{key} = {wrong!r}", having({**made.facts, key: wrong})
        for inner in sorted(declared_in(known[key])):
            for wrong in WRONG:
                yield f"{key}.{inner} = {wrong!r}", having({**made.facts, key: {**value, inner: wrong}})


def declared_in(declared: Any) -> dict[str, Any]:
    """The keys of a TypedDict and their types; nothing of another type."""
    return get_type_hints(declared) if is_typeddict(declared) else {}
