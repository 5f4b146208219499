"""One thread: tiny tensors do not profit from more."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
