"""The statistics that the authors published for their models, as an artefact."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffgraft import ArtefactMismatch, ConfigError, denoisers_of, find_family
from diffgraft.methods.artefacts import Artefact, MadeFor

from diffgraft_dpm_solver_v3.knobs import DPMSolverV3Config, options, settings_of
from diffgraft_dpm_solver_v3.schedulers import DPMSolverV3Scheduler

FILES = {"l.npz": ("l",), "sb.npz": ("s", "b")}
"""The authors' files in a folder, and the arrays [N + 1, C, H, W] in them."""


def published_statistics(pipe: Any, folder: str | os.PathLike[str], guidance_scale: float | None = None) -> Artefact:
    """The authors' ``l.npz`` and ``sb.npz`` in ``folder``, for ``DPMSolverV3(artefact=...)``; ``.save(path)`` makes a file of it.

    Their files do not say for which model they are: that ``pipe`` has it is the caller's word.

    Args:
        guidance_scale: at which they were measured (theirs for Stable Diffusion have one set a scale); None: without guidance.

    Raises:
        ConfigError: a file is not there.
        ArtefactMismatch: it does not hold what the authors' files hold.
        Unsupported: the pipeline's scheduler has no noise schedule that the method knows.
    """
    family = find_family(type(pipe))
    scheduler = DPMSolverV3Scheduler.from_config(settings_of(pipe.scheduler, family), **options(DPMSolverV3Config()))
    arrays = {}
    for file, names in FILES.items():
        path = Path(folder).expanduser() / file
        if not path.is_file():
            raise ConfigError(f"dpm_solver_v3: {path}: there is no such file; the authors' are {' and '.join(FILES)}, in one folder")
        try:
            with np.load(path) as found:  # without pickles
                arrays |= {name: torch.from_numpy(found[name].astype(np.float32)) for name in names}
        except (ValueError, KeyError, OSError, zipfile.BadZipFile, EOFError) as error:
            raise ArtefactMismatch(f"dpm_solver_v3: {path} does not hold {', '.join(names)} as the authors' files do: {error}") from error
    try:
        scheduler.set_statistics(arrays["l"], arrays["s"], arrays["b"])
    except ValueError as error:
        raise ArtefactMismatch(f"dpm_solver_v3: {folder}: {error}") from error
    made_for = MadeFor.describe("dpm_solver_v3", pipe, scheduler, denoisers_of(pipe, family), 1, tuple(arrays["l"].shape[1:]))
    facts = {"ends": list(scheduler.schedule.ends), "guidance_scale": guidance_scale, "source": "the authors' files"}
    return Artefact(made_for, arrays, facts)
