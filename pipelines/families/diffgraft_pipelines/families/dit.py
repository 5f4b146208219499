"""DiT, class-conditional: the conditional half comes first and both halves go through ``scheduler.step``."""

from __future__ import annotations

from diffgraft import BlockGroup, Family, Guidance

family = Family(
    name="dit",
    pipelines=("DiTPipeline",),
    denoisers=("transformer",),
    kind="dit",
    blocks=(BlockGroup("transformer_blocks", "block", ("hidden_states", "timestep", "class_labels"), layers=("attn1", "ff")),),
    guidance=Guidance("batched", ("cond", "uncond"), doubled=True),
    conditioning=("class_labels",),
    branch_prediction="drop_sigma",
    unit_start=True,
    tiny="diffgraft_pipelines.tiny.dit:make",
)
