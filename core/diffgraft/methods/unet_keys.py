"""The keys of a three-level U-Net of diffusers as Stable Diffusion XL has it, for layouts of published files."""

from __future__ import annotations

from diffgraft.methods.axes import Axes


def axis(factor: int, letter: str = "w") -> str:
    """So many times the width."""
    return letter if factor == 1 else f"{factor}*{letter}"


def affine(name: str, out: str, *into: int | str) -> dict[str, Axes]:
    """A weight and a bias; without ``into`` those of a norm."""
    return {f"{name}.weight": (out, *into), f"{name}.bias": (out,)}


def resnet(name: str, out: int, into: int, time: bool) -> dict[str, Axes]:
    """A residual block from ``into`` times the width to ``out`` times, with what it takes of the time."""
    keys = affine(f"{name}.norm1", axis(into)) | affine(f"{name}.conv1", axis(out), axis(into), 3, 3)
    keys |= affine(f"{name}.time_emb_proj", axis(out), "4*w") if time else {}
    keys |= affine(f"{name}.norm2", axis(out)) | affine(f"{name}.conv2", axis(out), axis(out), 3, 3)
    return keys if out == into else keys | affine(f"{name}.conv_shortcut", axis(out), axis(into), 1, 1)


def attention(name: str, factor: int, depth: str) -> dict[str, Axes]:
    """A transformer of as many blocks as the letter ``depth`` counts."""
    c, block = axis(factor), f"{name}.transformer_blocks.{{{depth}}}"
    keys = affine(f"{name}.norm", c) | affine(f"{name}.proj_in", c, c) | affine(f"{name}.proj_out", c, c)
    for number, width in ((1, c), (2, "d")):
        keys |= {f"{block}.attn{number}.to_q.weight": (c, c)}
        keys |= {f"{block}.attn{number}.to_{part}.weight": (c, width) for part in "kv"}
        keys |= affine(f"{block}.attn{number}.to_out.0", c, c)
    keys |= affine(f"{block}.ff.net.0.proj", axis(8 * factor), c) | affine(f"{block}.ff.net.2", c, axis(4 * factor))
    return {**keys, **{key: value for number in (1, 2, 3) for key, value in affine(f"{block}.norm{number}", c).items()}}


def unet_keys(time: bool = False) -> dict[str, Axes]:
    """All keys and their axes: w the width, c the latent channels, d the width of the text, m and n blocks of the lower two levels.

    Args:
        time: with the embeddings of the time, and of pooled text with sizes and crops, as wide as p.
    """
    keys = affine("conv_in", "w", "c", 3, 3) | affine("conv_norm_out", "w") | affine("conv_out", "c", "w", 3, 3)
    for name, letter in (("time_embedding", "w"), ("add_embedding", "p")) if time else ():
        keys |= affine(f"{name}.linear_1", "4*w", letter) | affine(f"{name}.linear_2", "4*w", "4*w")
    depths = {1: "m", 2: "n"}
    into = 1
    for level, width in enumerate((1, 2, 4)):
        for number in (0, 1):
            keys |= resnet(f"down_blocks.{level}.resnets.{number}", width, width if number else into, time)
            keys |= attention(f"down_blocks.{level}.attentions.{number}", width, depths[level]) if level else {}
        if level < 2:
            keys |= affine(f"down_blocks.{level}.downsamplers.0.conv", axis(width), axis(width), 3, 3)
        into = width
    keys |= resnet("mid_block.resnets.0", 4, 4, time) | attention("mid_block.attentions.0", 4, "n")
    keys |= resnet("mid_block.resnets.1", 4, 4, time)
    for block, (width, inputs) in enumerate(((4, (8, 8, 6)), (2, (6, 4, 3)), (1, (3, 2, 2)))):  # with what the way down had kept
        for number, each in enumerate(inputs):
            keys |= resnet(f"up_blocks.{block}.resnets.{number}", width, each, time)
            keys |= attention(f"up_blocks.{block}.attentions.{number}", width, depths[2 - block]) if block < 2 else {}
        if block < 2:
            keys |= affine(f"up_blocks.{block}.upsamplers.0.conv", axis(width), axis(width), 3, 3)
    return keys
