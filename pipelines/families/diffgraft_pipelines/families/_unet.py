"""Block groups of the U-Nets of diffusers: down blocks, mid block, up blocks."""

from __future__ import annotations

from diffgraft import BlockGroup


def unet_blocks(*inner: str, text: bool = True) -> tuple[BlockGroup, ...]:
    """The three groups of a U-Net whose blocks interleave the lists ``inner`` (``resnets``, ``attentions``...).

    What a block lacks is skipped: without attention no ``encoder_hidden_states``, in the last one no ``upsamplers``.
    """
    cond = ("encoder_hidden_states",) if text else ()
    return (
        BlockGroup(
            "down_blocks",
            "down",
            ("hidden_states", "temb", *cond),
            ("hidden_states", "res_samples"),
            (*inner, "downsamplers"),
        ),
        BlockGroup("mid_block", "mid", ("hidden_states", "temb", *cond), ("hidden_states",), inner),
        BlockGroup(
            "up_blocks",
            "up",
            ("hidden_states", "res_hidden_states_tuple", "temb", *cond),
            ("hidden_states",),
            (*inner, "upsamplers"),
        ),
    )
