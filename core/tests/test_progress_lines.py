"""Progress where there is no terminal."""

from __future__ import annotations

import pytest
from diffgraft.lab import terminal


@pytest.mark.parametrize(("seconds", "more"), [(0.0, ["weights: 2 of 9"]), (3600.0, [])])
def test_a_log_has_a_line_a_phase_and_more_while_it_lasts(seconds, more, capsys, monkeypatch):
    monkeypatch.setattr(terminal, "LINES", seconds)
    with terminal.progress() as told:
        for phase, done in (("weights", 1), ("weights", 2), ("inputs", 1)):
            told(phase, done, 9)
    assert capsys.readouterr().err.splitlines() == ["weights...", *more, "inputs..."]
