"""Bria 3.2 and FIBO: text to image; FIBO gives each of its blocks a layer of the text encoder. FIBO Edit: with a picture to go by."""

from __future__ import annotations

from dataclasses import replace

from diffgraft import BlockGroup, Family, Guidance

TAKES = ("hidden_states", "encoder_hidden_states", "temb")
RETURNS = ("encoder_hidden_states", "hidden_states")

family = Family(
    name="bria",
    pipelines=("BriaPipeline",),
    denoisers=("transformer",),
    kind="dit",
    blocks=(
        BlockGroup("transformer_blocks", "double", TAKES, RETURNS),
        BlockGroup("single_transformer_blocks", "single", TAKES, RETURNS),
    ),
    guidance=Guidance("batched", active="do_classifier_free_guidance"),
    prediction="flow",
    latents="packed",
    common=("img_ids", "txt_ids"),
    tiny="diffgraft_pipelines.tiny.bria:make",
)

fibo = replace(
    family,
    name="bria_fibo",
    pipelines=("BriaFiboPipeline",),
    blocks=(family.blocks[0], BlockGroup("single_transformer_blocks", "single", ("hidden_states", "temb"), joined="front")),
    guidance=Guidance("batched"),
    conditioning=("encoder_hidden_states", "text_encoder_layers", "joint_attention_kwargs"),  # the mask of the texts is in the last
)

edit = replace(fibo, name="bria_fibo_edit", pipelines=("BriaFiboEditPipeline",), appended="tokens", branch_prediction="first_tokens")
