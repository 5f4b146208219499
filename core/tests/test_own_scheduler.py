"""The base of schedulers that plugins bring."""

from __future__ import annotations

import torch
from diffgraft.methods.own_scheduler import OwnScheduler


def test_a_run_begins_where_the_pipeline_says_or_where_its_first_timestep_lies() -> None:
    """By place, not by value: equal timesteps confuse nobody, and a number or a copy says nothing."""
    scheduler = OwnScheduler()
    scheduler.timesteps = torch.tensor([9.0, 5.0, 5.0, 1.0])
    cut = scheduler.timesteps[1:]
    assert [scheduler._place(t) for t in scheduler.timesteps] == [0, 1, 2, 3]
    assert [scheduler._place(t) for t in cut] == [1, 2, 3]
    assert scheduler._place(5.0) == scheduler._place(torch.tensor(5.0)) == scheduler._place(cut[0].clone()) == 0
    scheduler.set_begin_index(3)
    assert scheduler._place(scheduler.timesteps[0]) == scheduler._place(1.0) == 3
