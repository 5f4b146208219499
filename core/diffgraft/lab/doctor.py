"""Is everything in order? Versions, devices, and every plugin, family, bundled pipeline and attention backend tried on its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from diffgraft.kernel import registry
from diffgraft.kernel.errors import BrokenPlugin
from diffgraft.lab.machine import machine, versions


@dataclass(frozen=True)
class Check:
    """One thing that was tried. ``status``: "ok", "broken" or "not allowed"."""

    name: str
    status: str
    detail: str = ""


@dataclass
class Diagnosis:
    """What ``diffgraft doctor`` found."""

    versions: dict[str, str | None]
    machine: dict[str, Any]
    plugins: list[Check] = field(default_factory=list)
    families: list[Check] = field(default_factory=list)
    pipelines: list[Check] = field(default_factory=list)
    backends: list[str] = field(default_factory=list)
    allowed: list[str] | None = None
    """Names on the allow-list ``DIFFGRAFT_PLUGINS``; None: it is not set, all may load."""

    @property
    def broken(self) -> list[Check]:
        return [check for check in self.plugins + self.families + self.pipelines if check.status == "broken"]

    @property
    def missing(self) -> list[str]:
        """What must be installed before anything can run, in words."""
        return [] if self.families else [registry.NO_FAMILY]

    @property
    def ok(self) -> bool:
        return not self.broken and not self.missing


def diagnose() -> Diagnosis:
    """Try everything; raises nothing for what is broken."""
    allow = registry.allow_list()
    return Diagnosis(
        versions=versions(),
        machine=machine(),
        plugins=check_plugins(),
        families=check_families(),
        pipelines=check_pipelines(),
        backends=attention_backends(),
        allowed=None if allow is None else sorted(allow),
    )


def check_plugins() -> list[Check]:
    """Load every allowed plugin on its own."""
    checks = []
    for name, info in registry.installed().items():
        if not info.allowed:
            checks.append(Check(name, "not allowed", f"not in {registry.ALLOW}"))
            continue
        try:
            registry.find(name)
            checks.append(Check(name, "ok", f"{info.dist} {info.version}"))
        except BrokenPlugin as error:
            checks.append(Check(name, "broken", str(error)))
        except (Exception, SystemExit) as error:  # a foreign module may do anything on import
            checks.append(Check(name, "broken", f"{info.dist} {info.version}: {type(error).__name__}: {error}"))
    return checks


def check_families() -> list[Check]:
    """Every family, and why the broken ones are."""
    known, faults = registry.load_families()
    checks = [Check(name, "ok", ", ".join(family.pipelines)) for name, family in sorted(known.items())]
    return checks + [Check(name, "broken", fault) for name, fault in sorted(faults.items())]


def check_pipelines() -> list[Check]:
    """Every bundled pipeline: is its folder there, does its judge load?"""
    from diffgraft.lab.judging import load_judge  # it brings torch, which `doctor` may find missing

    checks = []
    for entry in sorted(entry_points(group=registry.PIPELINES), key=lambda e: e.name):
        try:
            bundled = entry.load()
            if not (Path(bundled.path) / "model_index.json").is_file():
                checks.append(Check(entry.name, "broken", "its checkpoint is not there (no model_index.json); install the package again"))
                continue
            judge = load_judge(bundled)
            checks.append(Check(entry.name, "ok", "with a judge" if judge is not None else "without a judge"))
        except Exception as error:  # a foreign package may raise anything on import
            checks.append(Check(entry.name, "broken", f"{entry.value}: {type(error).__name__}: {error}"))
    return checks


def attention_backends() -> list[str]:
    """Attention backends of diffusers' dispatcher whose packages are here (whether a GPU is fit for them shows in use)."""
    from diffusers.models import attention_dispatch as dispatch

    usable = []
    for backend in dispatch._AttentionBackendRegistry.list_backends():
        try:
            dispatch._check_attention_backend_requirements(backend)
        except (RuntimeError, ImportError, ValueError):
            continue
        usable.append(backend.value)
    return sorted(usable)
