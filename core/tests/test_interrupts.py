"""Whatever interrupts a run, attaching or taking off, and wherever: the next entry leaves nothing behind. Copies, forks, threads."""

from __future__ import annotations

import copy
import os
import pickle
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffgraft import load_pipeline, unload
from diffgraft.kernel import slots
from diffgraft.kernel.slots import Slot, method_slot
from diffusers import EulerDiscreteScheduler
from probes import Everything, Probe, generate, tiny, trace
from torch import nn

KERNEL = str(Path(slots.__file__).parent)
VISITS = 3


class Replacing(Everything):
    """Another scheduler, an exchanged module, and a hook at every point."""

    name = "replacing"
    scheduler = EulerDiscreteScheduler

    def modules(self, call, next):
        unet = call.denoisers["unet"]
        twin = nn.Conv2d(unet.conv_out.in_channels, unet.conv_out.out_channels, 3, padding=1)
        twin.load_state_dict(unet.conv_out.state_dict())
        call.swap(unet, "conv_out", twin)


class Solver(Probe):
    """Another scheduler and a few hooks, so that there are not too many lines to try."""

    name = "solver"
    scheduler = EulerDiscreteScheduler

    def denoise(self, call, next):
        return next(call)


def interrupted(action: Any, at: int, *files: str) -> bool:
    """Whether a KeyboardInterrupt came at line number ``at`` of those that ``action`` executes in these files of the kernel. Of a line that
    a loop comes back to, its first visits count: a walk through all modules is not interrupted at each."""
    count = 0
    visits: Counter[tuple[Any, int]] = Counter()

    def local(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        if event == "line":
            visits[frame, frame.f_lineno] += 1
            count += visits[frame, frame.f_lineno] <= VISITS
            if count == at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return local

    def enter(frame: Any, event: str, arg: Any) -> Any:
        path = frame.f_code.co_filename
        return local if path.startswith(KERNEL) and path.endswith(files) else None

    before = sys.gettrace()
    try:
        sys.settrace(enter)
        action()
    except ValueError:
        pass
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def gate_is_free() -> bool:
    found = []

    def other() -> None:
        found.append(Slot.gate.acquire(timeout=0.5))
        if found[0]:
            Slot.gate.release()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    return found[0]


def test_an_interrupt_at_any_line_of_a_run_leaves_nothing_after_the_next_entry(sd):
    pipe, kwargs = sd
    generate(pipe, kwargs, num_inference_steps=1)
    own = pipe.scheduler
    load_pipeline(pipe, plugins=[Solver])
    before = trace(pipe)
    at, hits = 0, 0
    while True:
        at += 1
        hit = interrupted(lambda: pipe(**{**kwargs, "height": -1}), at, "stack.py", "slots.py", "claim.py", "onion.py")
        if not hit:
            break
        hits += 1
        pipe.plugins.enable()
        assert pipe.scheduler is own, f"line {at}: the plugin's scheduler is left"
        assert not pipe.plugins._busy.locked(), f"line {at}: still busy"
        assert pipe.plugins._open is None, f"line {at}: something is open"
        assert trace(pipe) == before, f"line {at}"
    assert hits > 50
    assert gate_is_free()
    plain = generate(unload(pipe), kwargs)
    assert torch.equal(plain, generate(tiny("StableDiffusionPipeline")[0], kwargs))


@pytest.mark.parametrize("taking_off", [False, True])
def test_an_interrupt_at_any_line_of_attaching_or_taking_off_is_undone_by_unload(sd, taking_off):
    pipe, kwargs = sd
    generate(pipe, kwargs, num_inference_steps=1)
    before = trace(pipe)
    at = 0
    while True:
        at += 1
        if taking_off:
            load_pipeline(pipe, plugins=[Replacing])
        action = (lambda: unload(pipe)) if taking_off else (lambda: load_pipeline(pipe, plugins=[Replacing]))
        hit = interrupted(action, at, "stack.py", "slots.py", "surgery.py", "claim.py", "grafted.py")
        unload(pipe)
        assert trace(pipe) == before, f"line {at}"
        if not hit:
            break
    assert at > 20
    assert gate_is_free()


def test_slots_open_and_close_again_without_harm():
    class Thing:
        def act(self) -> int:
            return 1

    thing = Thing()
    low, high = method_slot(thing, "act"), method_slot(thing, "act")
    for slot in (low, high):
        slot.put(lambda slot=slot: slot.inner() + 1)
        slot.open()
    low.open()  # an earlier pass has opened it, and another pipeline's lies over it
    assert thing.act() == 3
    low.close()
    low.close()
    assert thing.act() == 2
    high.close()
    assert thing.__dict__ == {}


def test_opening_and_closing_are_atomic_between_threads():
    """Three threads open and close on one module, with thread switches everywhere; what each has opened is there until it closes it."""
    module, lost = nn.Linear(1, 1), []
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work() -> None:
        slot = method_slot(module, "forward")
        slot.put(lambda *args: slot.inner(*args))
        for _ in range(100):
            slot.open()
            with Slot.gate:
                if not slot.is_open and slot._over() is None:
                    lost.append(slot)
            slot.close()

    threads = [threading.Thread(target=work) for _ in range(3)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    finally:
        sys.setswitchinterval(before)
    assert not lost
    assert "forward" not in module.__dict__


def in_mid_run(pipe: Any, kwargs: dict[str, Any], action: Any) -> tuple[Any, torch.Tensor]:
    """(what ``action(pipe)`` gave in a step callback, the run's output)."""
    found = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            found.append(action(pipe))
        return tensors

    return found, generate(pipe, kwargs, num_inference_steps=3, callback_on_step_end=callback, output_type="latent")


class Copied(Everything):
    """Another scheduler, and a hook at every point."""

    name = "copied"
    scheduler = EulerDiscreteScheduler


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda pipe: pickle.loads(pickle.dumps(pipe)),
    "components": lambda pipe: type(pipe).__mro__[1](**pipe.components),
    "from_pipe": lambda pipe: type(pipe).__mro__[1].from_pipe(pipe),
    "of the parts": lambda pipe: type(pipe).__mro__[1](**{**pipe.components, "unet": copy.deepcopy(pipe.unet)}),
}


@pytest.mark.parametrize("how", COPIES)
def test_what_is_copied_in_a_run_is_plain(sd, how):
    pipe, kwargs = sd
    own = type(pipe.scheduler)
    plain = generate(pipe, kwargs, num_inference_steps=3, output_type="latent")
    load_pipeline(pipe, plugins=[Copied])
    want = generate(pipe, kwargs, num_inference_steps=3, output_type="latent")
    (twin,), output = in_mid_run(pipe, kwargs, COPIES[how])
    assert torch.equal(output, want), "the run that was copied"
    if how == "deepcopy":
        assert torch.equal(generate(twin, kwargs, num_inference_steps=3, output_type="latent"), want)
        assert not any("forward" in module.__dict__ for module in twin.unet.modules())
        unload(twin)
    assert type(twin.scheduler) is own
    assert not {"step", "set_timesteps"} & twin.scheduler.__dict__.keys() or twin.scheduler.step.__self__ is twin.scheduler
    assert torch.equal(generate(twin, kwargs, num_inference_steps=3, output_type="latent"), plain)
    assert torch.equal(generate(unload(pipe), kwargs, num_inference_steps=3, output_type="latent"), plain)


def test_what_is_saved_in_a_run_is_plain(sd, tmp_path):
    pipe, kwargs = sd
    own = type(pipe.scheduler)
    load_pipeline(pipe, plugins=[Copied])
    in_mid_run(pipe, kwargs, lambda pipe: pipe.save_pretrained(tmp_path))
    assert own.__name__ in (tmp_path / "scheduler" / "scheduler_config.json").read_text()


class Waiting(Probe):
    """Stops in its first denoiser call until it may go on."""

    name = "waiting"
    scheduler = EulerDiscreteScheduler
    there = threading.Event()
    go_on = threading.Event()

    def denoise(self, call, next):
        self.there.set()
        self.go_on.wait(20)
        return next(call)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="cuda")
def test_a_child_forked_while_another_thread_runs_starts_clean(sd):
    pipe, kwargs = sd
    own = pipe.scheduler
    load_pipeline(pipe, plugins=[Waiting])
    Waiting.there.clear()
    Waiting.go_on.clear()
    thread = threading.Thread(target=lambda: generate(pipe, kwargs, num_inference_steps=1))
    thread.start()
    Waiting.there.wait(20)
    assert pipe.plugins._busy.locked()
    Slot.gate.acquire()  # as a thread does that is just opening a slot
    child = os.fork()
    if child == 0:
        clean = pipe.scheduler is own and not pipe.plugins._busy.locked() and "forward" not in pipe.unet.__dict__
        os._exit(0 if clean and gate_is_free() else 1)
    Slot.gate.release()
    _, status = os.waitpid(child, 0)
    Waiting.go_on.set()
    thread.join()
    assert status == 0
