"""Classes of diffusers that were looked at and have no family, and why."""

from __future__ import annotations

REFUSED = {
    "ChromaInpaintPipeline": "asks its transformer for `guidance_embeds`, which it does not have: it cannot run in diffusers 0.42",
}
