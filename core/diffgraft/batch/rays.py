"""Workers on a Ray cluster, each a process with a pipeline of its own. Ray places and watches them; here is who draws what.

A worker has one task at a time, so that one which takes it down takes no other along. Lost workers are replaced, and what they were at is
drawn by whoever is free: nothing of a result depends on who that is. Results come back as bytes; only the command's process writes.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffgraft.batch.tasks import Task
from diffgraft.batch.work import Draw, Failed, Open, Outcome, Outcomes
from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError, ForeignError
from diffgraft.installed.foreign import said
from diffgraft.methods.extras import imported

_log = logging.getLogger(__name__)

TRIES = 3
"""How often a task is begun whose worker is lost, and how many workers in a row may be lost while they load."""


@dataclass(frozen=True)
class Cluster:
    """Where to work.

    address  of a running cluster, "auto" for that of this machine, or None: a cluster of our own, here, for as long as it takes
    workers  how many, or None: as many as there is room for
    threads  processor cores of a worker
    gpu      a worker has a GPU of its own; None: where the cluster has any
    """

    address: str | None = None
    workers: int | None = None
    threads: int = 1
    gpu: bool | None = None

    def __call__(self, open: Open, tasks: Iterator[Task]) -> Outcomes:
        """Draw the tasks; they come back in the order in which they are finished.

        Raises:
            Unsupported: Ray is not installed.
            ConfigError: no cluster answers, or it has no room for any worker.
            ForeignError: workers are lost before they can draw anything.
        """
        ray = imported("ray", "`diffgraft batch` with --ray or --workers")
        with self.connected(ray):
            room, gpus = self.room([node["Resources"] for node in ray.nodes() if node["Alive"]])
            wanted = self.workers or room
            each = f"{self.threads} cores" + " and a GPU" * gpus
            if not room:
                raise ConfigError(f"the cluster has no room for a worker of {each}: fewer --threads, or another --device")
            if room < wanted:
                _log.warning("of %d workers of %s each the cluster has room for %d; the others wait for more", wanted, each, room)
            options = {"num_cpus": self.threads, "num_gpus": gpus, "max_restarts": 0}
            yield from Pool(ray, options, open, tasks).outcomes(wanted)

    @contextmanager
    def connected(self, ray: Any) -> Iterator[None]:
        """With a connection to the cluster; one that this process has already is used, and left as it is."""
        if ray.is_initialized():
            yield
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
        own = {} if self.address else {"num_cpus": (self.workers or 1) * self.threads, "include_dashboard": False}
        heard = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=self.address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
        except Exception as error:  # Ray raises that itself where a cluster does not start in time
            raise ConfigError(f"--ray {self.address or 'local'}: no cluster answers ({said(error)}); `ray status` shows yours") from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, heard)  # Ray takes it for itself
        try:
            yield
        finally:
            ray.shutdown()

    def room(self, machines: list[dict[str, float]]) -> tuple[int, int]:
        """(how many workers the machines of a cluster can hold, GPUs of each)."""
        gpus = int(any(machine.get("GPU", 0) >= 1 for machine in machines) if self.gpu is None else self.gpu)
        places = [int(machine.get("CPU", 0)) // self.threads for machine in machines]
        return sum(min(cores, int(machine.get("GPU", 0))) if gpus else cores for cores, machine in zip(places, machines, strict=True)), gpus


class Worker:
    """What runs in a worker's process.

    Args:
        folder: that of the command, which relative paths start from; where there is none such, they start from the worker's own.
        allowed: the command's list of plugins that may load, or None.
    """

    def __init__(self, folder: str, allowed: str | None) -> None:
        if Path(folder).is_dir():
            os.chdir(folder)
        if allowed is not None:
            os.environ[registry.ALLOW] = allowed
        self.draw: Draw | None = None
        self.ears = Ears()
        logging.getLogger("diffgraft").addHandler(self.ears)

    def load(self, open: Open) -> list[str]:
        """Get ready to draw; what was warned of."""
        self.draw = open()
        return self.ears.emptied()

    def work(self, task: Task) -> tuple[Outcome, list[str]]:
        """The outcome of a task, and what was warned of."""
        assert self.draw is not None
        return self.draw(task), self.ears.emptied()


class Ears(logging.Handler):
    """Keeps the warnings of a process for another."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())

    def emptied(self) -> list[str]:
        heard, self.heard = self.heard, []
        return heard


class Pool:
    """Workers, and what each of them is at."""

    def __init__(self, ray: Any, options: dict[str, Any], open: Open, tasks: Iterator[Task]) -> None:
        self.ray, self.tasks = ray, tasks
        self.kind = ray.remote(Worker).options(**options)
        self.open = ray.put(open)
        lost = ray.exceptions
        self.losses = lost.RayActorError, lost.WorkerCrashedError, lost.OutOfMemoryError, lost.ObjectLostError
        self.running: dict[Any, tuple[Any, Task | None]] = {}  # the promise of a result -> (worker, its task; None: it loads)
        self.idle: list[Any] = []
        self.again: deque[Task] = deque()
        self.begun: Counter[int] = Counter()
        self.lost_loading = 0
        self.more = True

    def outcomes(self, workers: int) -> Outcomes:
        """Each task with its outcome. At the end no worker is left, however it came."""
        try:
            for _ in range(workers):
                self.start()
            while self.more or self.again or any(task for _, task in self.running.values()):
                [promise], _ = self.ray.wait(list(self.running), num_returns=1)
                worker, task = self.running.pop(promise)
                try:
                    found = self.ray.get(promise)
                except self.losses as error:
                    self.ray.kill(worker)  # one that is only out of reach may not come back and draw on
                    yield from self.lost(task, error)
                    continue
                except self.ray.exceptions.RayError as error:
                    raise self.told(error) from None
                if task is None:
                    self.lost_loading = 0
                    self.warn(found)
                else:
                    outcome, warnings = found
                    self.warn(warnings)
                    yield task, outcome
                self.occupy(worker)
        finally:
            for worker in [*self.idle, *(worker for worker, _ in self.running.values())]:
                self.ray.kill(worker)

    def start(self) -> None:
        """One more worker. Ray may be long in finding a place for it; it holds no task meanwhile."""
        worker = self.kind.remote(str(Path.cwd()), os.environ.get(registry.ALLOW))
        self.running[worker.load.remote(self.open)] = worker, None

    def occupy(self, worker: Any) -> None:
        """Give a free worker what is to be done next."""
        task = self.again.popleft() if self.again else next(self.tasks, None)
        if task is None:
            self.more = False
            self.idle.append(worker)
            return
        self.begun[task.number] += 1
        self.running[worker.work.remote(task)] = worker, task

    def lost(self, task: Task | None, error: Exception) -> Outcomes:
        """A worker is gone: what it was at is begun again by another, unless it has taken too many along."""
        if task is None:
            self.lost_loading += 1
            if self.lost_loading >= TRIES:
                raise ForeignError(f"{TRIES} workers in a row were lost while they loaded the pipeline: {said(error)}") from error
        elif self.begun[task.number] >= TRIES:
            yield task, Failed(f"{TRIES} workers were lost over it, the last so: {said(error)}")
        else:
            _log.warning("line %d: its worker was lost; another one draws it", task.number)
            self.again.append(task)
        self.start()
        if self.again and self.idle:
            self.occupy(self.idle.pop())

    def told(self, error: Any) -> Exception:
        """What a worker raised, or what kept it from beginning."""
        cause: Exception = getattr(error, "cause", error)
        if isinstance(cause, self.ray.exceptions.RayError):
            return ForeignError(f"a worker cannot begin (are the same packages installed where it runs?): {said(cause)}")
        return cause

    @staticmethod
    def warn(warnings: list[str]) -> None:
        for text in warnings:
            _log.warning("%s", text)
