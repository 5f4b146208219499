"""Is everything in order? Versions, devices, and every plugin, family, bundled pipeline and attention backend tried on its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffgraft.installed import registry
from diffgraft.installed.errors import BrokenPlugin, DiffgraftError
from diffgraft.installed.family import Bundled
from diffgraft.installed.offers import FAMILIES, PIPELINES, PLUGINS, Offer, offers
from diffgraft.lab.checkup import remember
from diffgraft.lab.machine import machine, versions


@dataclass(frozen=True)
class Check:
    """One thing that was tried. ``status``: "ok", "broken", "not allowed", or "incomplete" (a package that part of it needs is missing)."""

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
    not_kept: str | None = None
    """Why `diffgraft list` will not know what was found of the plugins; None: it will."""
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
    plugins, faults = check_plugins()
    return Diagnosis(
        versions=versions(),
        machine=machine(),
        plugins=plugins,
        not_kept=remember(faults),
        families=check_families(),
        pipelines=check_pipelines(),
        backends=attention_backends(),
        allowed=None if allow is None else sorted(allow),
    )


def check_plugins() -> tuple[list[Check], list[tuple[Offer, str | None]]]:
    """Load every allowed plugin on its own: what to say of each, and what is wrong with those that were tried."""
    checks, tried = [], []
    for offer in offers(PLUGINS):
        if not offer.allowed:
            checks.append(Check(offer.name, "not allowed", f"not in {registry.ALLOW}"))
            continue
        fault = None
        try:
            if offer.broken:
                offer.load()  # raises
            registry.find(offer.name)
        except DiffgraftError as error:
            fault = str(error)
        tried.append((offer, fault))
        checks.append(Check(offer.name, "broken" if fault else "ok", fault or f"{offer.dist} {offer.version}"))
    return checks, tried


def check_families() -> list[Check]:
    """Every family, and why the broken ones are; a package that some of its pipelines cannot do without."""
    known, faults = registry.load_families()
    checks = []
    for name, family in sorted(known.items()):
        lacking = {package: [p for p in family.pipelines if package in registry.missing_packages(family, p)] for package in family.packages}
        needs = [f"{', '.join(needy)} cannot run without {package}: `pip install {package}`" for package, needy in lacking.items() if needy]
        checks.append(Check(name, "incomplete" if needs else "ok", "; ".join([", ".join(family.pipelines), *needs])))
    checks += [Check(offer.name, "not allowed", f"not in {registry.ALLOW}") for offer in offers(FAMILIES) if not offer.allowed]
    return checks + [Check(name, "broken", fault) for name, fault in sorted(faults.items())]


def check_pipelines() -> list[Check]:
    """Every bundled pipeline: is its folder there, does its judge load?"""
    from diffgraft.lab.judging import load_judge  # it brings torch, which `doctor` may find missing

    checks = []
    for offer in offers(PIPELINES):
        if not offer.allowed:
            checks.append(Check(offer.name, "not allowed", f"not in {registry.ALLOW}"))
            continue
        try:
            bundled = registry.checked(offer, offer.load(), Bundled)
            if not (Path(bundled.path) / "model_index.json").is_file():
                raise BrokenPlugin("its checkpoint is not there (no model_index.json); install the package again")
            judge = load_judge(bundled)
            checks.append(Check(offer.name, "ok", "with a judge" if judge is not None else "without a judge"))
        except DiffgraftError as error:
            checks.append(Check(offer.name, "broken", str(error)))
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
