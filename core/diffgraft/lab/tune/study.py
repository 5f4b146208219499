"""Optuna's side of a tuning: who comes next, and the journal (see `diffgraft.lab.tune`)."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffgraft.installed.errors import ConfigError
from diffgraft.lab.tune.goal import Candidate, Trial
from diffgraft.lab.tune.space import Space

TRIES = 64
"""How often a candidate that is not known yet is asked for before the space counts as exhausted; the second half is drawn blindly."""
STARTUP = 10
"""Trials before Optuna's sampler models anything."""


class Study:
    """Optuna's side: who comes next, and what was measured, in a journal that survives an interruption at any point."""

    def __init__(self, optuna: Any, folder: Path, space: Space, seed: int) -> None:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        self.optuna, self.space, self.seed = optuna, space, seed
        self.states = optuna.trial.TrialState
        try:
            storage = JournalStorage(JournalFileBackend(str(folder / "optuna.log")))
            self.study = optuna.create_study(storage=storage, study_name="tune", directions=["minimize", "maximize"], load_if_exists=True)
        except ValueError as error:
            raise ConfigError(f"{folder / 'optuna.log'} cannot be read ({error}): delete {folder}, or choose another --out") from error
        for lost in self.study.get_trials(states=(self.states.RUNNING,)):  # an interrupted one begins anew, with the same candidate
            self.study.tell(lost.number, state=self.states.FAIL)

    def known(self) -> list[Trial]:
        """What was measured so far."""
        found: list[Trial] = []
        for one in self.study.get_trials(states=(self.states.COMPLETE, self.states.PRUNED)):
            candidate = self.space.draw(self.optuna.trial.FixedTrial(one.params))
            found.append(Trial(number=len(found), candidate=candidate, **one.user_attrs["measured"]))
        return found

    def sampler(self, number: int, attempt: int) -> Any:
        """The sampler of one proposal. Its seed is that of the proposal: what comes next does not depend on interruptions."""
        seed = random.Random(f"{self.seed} {number} {attempt}").getrandbits(32)
        if attempt >= TRIES // 2:
            return self.optuna.samplers.RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self.optuna.exceptions.ExperimentalWarning)  # `group`: it has been one for years
            # TPE and not NSGA-II: a budget buys tens of trials, less than one population, and knobs exist only where their plugin does
            return self.optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=STARTUP)

    def ask(self, known: Sequence[Trial]) -> tuple[Any, Candidate] | None:
        """The next candidate that is not known, or None when there is none left."""
        keys = {trial.candidate.key for trial in known}
        first = self.space.first()
        if len(known) < len(first):
            if not self.study.get_trials(states=(self.states.WAITING,)):
                self.study.enqueue_trial(first[len(known)])
            trial = self.study.ask()
            return trial, self.space.draw(trial)
        for attempt in range(TRIES):
            self.study.sampler = self.sampler(len(known), attempt)
            trial = self.study.ask()
            candidate = self.space.draw(trial)
            if candidate.key not in keys:
                return trial, candidate
            self.study.tell(trial, state=self.states.FAIL)  # the sampler looks at none of these
        return None

    def tell(self, trial: Any, found: Trial) -> None:
        """Keep what was measured."""
        kept = {key: value for key, value in asdict(found).items() if key not in ("number", "candidate")}
        trial.set_user_attr("measured", kept)
        if found.reason is not None:
            self.study.tell(trial, state=self.states.PRUNED)
        else:
            self.study.tell(trial, [found.ratio, found.fidelity])
