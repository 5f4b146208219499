"""Slots: open, close in any order, survive foreign hands, never touch a class."""

from __future__ import annotations

import itertools

import pytest
from diffgraft.kernel.slots import Slot, method_slot, wraps_method
from torch import nn


class Thing:
    def act(self, x: int) -> int:
        return x


def adding(slot: Slot, n: int):
    def wrapper(x: int) -> int:
        return slot.inner(x) + n

    return wrapper


def opened(thing: Thing, n: int) -> Slot:
    slot = method_slot(thing, "act")
    slot.put(adding(slot, n))
    slot.open()
    return slot


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_slots_stack_and_close_in_any_order(order):
    thing = Thing()
    slots = [opened(thing, 10**i) for i in range(3)]
    assert thing.act(0) == 111
    left = 111
    for i in order:
        slots[i].close()
        left -= 10**i
        assert thing.act(0) == left
    assert thing.__dict__ == {}
    assert Thing().act(1) == 1


def test_what_was_in_the_instance_comes_back():
    thing = Thing()
    own = thing.__dict__["act"] = lambda x: x * 2
    slot = opened(thing, 1)
    assert thing.act(3) == 7
    slot.close()
    assert thing.__dict__["act"] is own


def test_a_foreign_replacement_stays():
    """accelerate's offload hooks put their own forward in place at the end of every run."""
    thing = Thing()
    slot = opened(thing, 1)
    theirs = thing.__dict__["act"] = lambda x: -x
    assert not slot.is_open
    slot.close()
    assert thing.__dict__["act"] is theirs


def test_opening_twice_and_closing_twice_change_nothing():
    thing = Thing()
    slot = opened(thing, 1)
    slot.open()
    assert thing.act(0) == 1
    slot.close()
    slot.close()
    assert thing.__dict__ == {}
    assert thing.act(0) == 0


def test_a_wrapper_that_somebody_kept_still_gets_through():
    thing = Thing()
    slot = opened(thing, 1)
    kept = thing.act
    slot.close()
    assert kept(5) == 6
    assert thing.act(5) == 5


def test_reopening_sits_on_what_is_there_now():
    thing = Thing()
    slot = opened(thing, 1)
    slot.close()
    thing.__dict__["act"] = lambda x: x + 100
    slot.open()
    assert thing.act(0) == 101
    slot.close()
    assert thing.act(0) == 100


def test_signature_is_kept():
    import inspect

    thing = Thing()
    wrapped = wraps_method(thing, "act", lambda *a, **k: None)
    assert list(inspect.signature(wrapped).parameters) == ["x"]
    assert wrapped.__name__ == "act"


def test_a_module_can_be_exchanged_in_its_parent():
    parent = nn.Sequential(nn.Linear(2, 2))
    old, new = parent[0], nn.Identity()
    slot = Slot(parent._modules, "0", lambda: parent._modules["0"])
    slot.put(new)
    slot.open()
    assert parent[0] is new
    slot.close()
    assert parent[0] is old
