"""ConsisSR in the paper's symbols, free of diffusers: where a run begins, the hybrid prompt adapter's layer, and the colour fixes.

GAN-embedding. z = enc(SR(lq)) is noised to a level t_s < T, and only the steps below it are taken:

    x_ts = sqrt(abar_ts) z + sqrt(1 - abar_ts) n       (flows: (1 - s) z + s n): `diffgraft.methods.starts.at_level`

HPA. A layer of cross-attention with queries Q asks the text's keys and values, and those of the image tokens, and sums both:

    Z = Softmax(Q K^T / sqrt(d)) V + lambda W Softmax(Q K'^T / sqrt(d)) V'       K' = c_img W'_k,  V' = c_img W'_v

with c_img [tokens, width] made of the low-quality picture, W a small matrix (and a bias) that all heads share, zero before training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 5
"""Of the wavelet split: blurs of radius 1, 2, 4, 8, 16."""
TINY = 1e-12
"""Of a channel without contrast the variance is taken for this."""


def moments(x: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of pictures [n, channels, height, width]: [n, channels, 1, 1]; the unbiased variance."""
    return x.mean((2, 3), keepdim=True), (x.var((2, 3), keepdim=True) + eps).clamp(min=TINY).sqrt()


def adain(x: Tensor, y: Tensor, eps: float = 0.0) -> Tensor:
    """``x`` with the means and deviations of the channels of ``y``, both [n, channels, height, width].

    Args:
        eps: added to both variances (official code: 1e-5, so that the deviation of the result is not quite that of ``y``).
    """
    (mean, deviation), (wanted, spread) = moments(x, eps), moments(y, eps)
    return (x - mean) / deviation * spread + wanted


def blurred(x: Tensor, radius: int) -> Tensor:
    """The kernel [1 2 1] / 4 in both directions with holes of ``radius``; borders are repeated."""
    row = x.new_tensor([0.25, 0.5, 0.25])
    kernel = (row[:, None] * row[None]).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (radius,) * 4, mode="replicate"), kernel, groups=x.shape[1], dilation=radius)


def low_band(x: Tensor, levels: int = LEVELS) -> Tensor:
    """What an undecimated wavelet split of so many levels leaves: ``x`` blurred at radius 1, 2, 4, ..."""
    for level in range(levels):
        x = blurred(x, 2**level)
    return x


def wavelet(x: Tensor, y: Tensor, levels: int = LEVELS) -> Tensor:
    """The fine bands of ``x``, which are x - low(x), on the low band of ``y``."""
    return x - low_band(x, levels) + low_band(y, levels)


def by_heads(x: Tensor, heads: int) -> Tensor:
    """[n, tokens, heads * d] -> [n, heads, tokens, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def image_part(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """W Softmax(Q K'^T / sqrt(d)) V' [n, pixels, heads * d], to be added to what the text gave, before the output projection.

    Args:
        q: [n, pixels, heads * d]; k, v: [n, image tokens, heads * d].
        weight, bias: of W, [d, d] and [d].
    """
    Z = F.scaled_dot_product_attention(*(by_heads(x, heads) for x in (q, k, v)))
    return F.linear(Z, weight, bias).transpose(1, 2).flatten(2)


def smaller(x: Tensor, factor: int) -> Tensor:
    """A low-quality picture of pixels [n, 3, height, width] in -1 to 1: means over squares, rounded to the 256 values of a picture."""
    return ((F.avg_pool2d(x, factor) + 1) * 127.5).round() / 127.5 - 1


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels [n, 3, height, width] in another size, bicubic; made smaller without aliasing, and never beyond -1 to 1."""
    if tuple(x.shape[-2:]) == size:
        return x
    down = x.shape[-2] > size[0] or x.shape[-1] > size[1]
    return torch.clamp(F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=down), -1, 1)
