"""A batch from the first line to the last: what is there already, then the rest, each result written as it comes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

from diffgraft.batch.lines import Broken
from diffgraft.batch.results import Results
from diffgraft.batch.tasks import Task, Tasks


@dataclass(frozen=True)
class Drawn:
    """A result: the bytes of its file."""

    data: bytes


@dataclass(frozen=True)
class Failed:
    """There is none, and why."""

    why: str


Outcome = Drawn | Failed
Draw = Callable[[Task], Outcome]
"""Draws a task. What goes wrong with one task is its outcome; what it raises ends the batch."""
Open = Callable[[], Draw]
"""Loads a pipeline, in the process that will draw with it; can be pickled."""
Outcomes = Generator[tuple[Task, Outcome], None, None]
Pool = Callable[[Open, Iterator[Task]], Outcomes]
"""Draws tasks in any order, taking each from the iterator only when somebody is free for it."""


@dataclass
class Batch:
    """Where a batch stands.

    there   numbers of the lines whose results were there before
    todo    how many are to be drawn
    done    how many were tried
    drawn   how many were drawn
    failed  lines that have no result: number -> why
    """

    there: set[int] = field(default_factory=set)
    todo: int = 0
    done: int = 0
    drawn: int = 0
    failed: dict[int, str] = field(default_factory=dict)


def surveyed(tasks: Iterable[Task | Broken], results: Results) -> Batch:
    """What is there, and what is to be done. Nothing is loaded or written.

    Raises:
        ConfigError: a result that belongs to another batch.
    """
    batch = Batch()
    for task in tasks:
        if isinstance(task, Broken):
            batch.failed[task.number] = task.why
        elif results.has(task):
            batch.there.add(task.number)
        else:
            batch.todo += 1
    return batch


def carried_out(batch: Batch, tasks: Tasks, results: Results, open: Open, pool: Pool) -> Iterator[Batch]:
    """Draw and write what is to be done; where the batch stands after each.

    Raises:
        OutputError: a result cannot be written. Those before it are whole.
    """
    todo = (task for task in tasks if isinstance(task, Task) and task.number not in batch.there)
    if batch.todo:
        with closing(pool(open, todo)) as outcomes:  # so that the workers end with it, whatever ends it
            for task, outcome in outcomes:
                batch.done += 1
                if isinstance(outcome, Drawn):
                    results.write(task, outcome.data)
                    batch.drawn += 1
                else:
                    batch.failed[task.number] = outcome.why
                yield batch
    results.tell(tasks, batch.failed)


def here(open: Open, tasks: Iterator[Task]) -> Outcomes:
    """In this process, one after the other."""
    draw = open()
    for task in tasks:
        yield task, draw(task)
