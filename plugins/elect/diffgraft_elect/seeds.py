"""Where each candidate's noise begins: a state of a generator for each picture, all its noise its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Starts:
    """``states[i][row]`` is where candidate i of a picture begins.

    given   the caller's generators, one for each picture, whose own noise is candidate 0; None where there are no such
    seeds   [candidates, rows] int64, what ``manual_seed`` makes these states of; -1 where it is the caller's own
    """

    states: Sequence[Sequence[Tensor]]
    device: torch.device
    given: Sequence[Generator] | None
    seeds: Tensor
    single: Generator | None = None
    """The caller's only generator, where that is not in a list."""

    @property
    def candidates(self) -> int:
        return len(self.states)

    def of(self, candidates: Iterable[int]) -> Any:
        """New generators for these candidates, picture by picture of each: a list, or the only one."""
        made = [self._at(state) for i in candidates for state in self.states[i]]
        return made[0] if len(made) == 1 else made

    def resume(self, winners: Sequence[int]) -> Any:
        """Generators for the winners alone: the caller's own, put to where they begin, or new ones."""
        states = [self.states[winner][row] for row, winner in enumerate(winners)]
        if self.given is None:
            made = [self._at(state) for state in states]
            return made[0] if len(made) == 1 else made
        for generator, state in zip(self.given, states, strict=True):
            generator.set_state(state)
        return self.single if self.single is not None else list(self.given)

    def words(self, candidate: int, row: int) -> str:
        """ "seed 123", for people."""
        seed = int(self.seeds[candidate, row])
        return "the call's own noise" if seed < 0 else f"seed {seed}"

    def _at(self, state: Tensor) -> Generator:
        generator = Generator(self.device)
        generator.set_state(state)
        return generator


def starts_of(generator: Any, rows: int, candidates: int) -> Starts:
    """Where the candidates of a call with this ``generator`` begin.

    With a generator of its own for each picture the first candidate is what the plain call makes, and the others' seeds follow from its
    state, so that it does not move before the winner is known. Pictures that share one (or torch's global one, on None) cannot each go on
    with another candidate's noise, so there all seeds are drawn from it.
    """
    single = generator if isinstance(generator, Generator) else None
    listed = [single] if single is not None else list(generator or ())
    device = listed[0].device if listed else torch.device("cpu")
    own = len(listed) == rows and len({id(each) for each in listed}) == rows
    if own:
        seeds = torch.tensor([[-1 if i == 0 else following(each, i) for each in listed] for i in range(candidates)])
    else:
        given = listed[0] if listed else None
        seeds = torch.randint(LARGEST, (candidates, rows), generator=given, device=device).cpu()
    states = [
        [listed[row].get_state() if seed < 0 else Generator(device).manual_seed(seed).get_state() for row, seed in enumerate(of_one)]
        for of_one in seeds.tolist()
    ]
    return Starts(states, device, listed if own else None, seeds, single if own else None)


def following(generator: Generator, number: int) -> int:
    """A seed, another for each ``number``, that is the same whenever the generator is in the same state; nothing is drawn."""
    state = generator.get_state().cpu().numpy().tobytes()
    return int.from_bytes(hashlib.sha256(state + number.to_bytes(8, "little")).digest()[:8], "little") % LARGEST
