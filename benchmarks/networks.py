"""Networks whose steps compiled.py compiles: the published sizes, in bfloat16.

As in steps.py the norm is swapped and nothing else. Parameters are float32.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import peers
from steps import Norm


class Bottleneck(nn.Module):
    """Three convolutions and what goes past them."""

    peer: peers.Peer
    dtype: Any
    features: int
    strides: int

    @nn.compact
    def __call__(self, x):  # [N, H, W, C]
        """Adds to x, or to a projection of it; four times the features come out."""

        def conv(y, features, size, strides=1):
            size = (size, size)
            layer = nn.Conv(features, size, strides, use_bias=False, dtype=self.dtype)
            return Norm(self.peer, "batch")(layer(y))

        y = nn.relu(conv(x, self.features, 1))
        y = nn.relu(conv(y, self.features, 3, self.strides))
        y = conv(y, 4 * self.features, 1)
        if x.shape != y.shape:
            x = conv(x, 4 * self.features, 1, self.strides)
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """A ResNet-50, https://arxiv.org/abs/1512.03385."""

    peer: peers.Peer
    dtype: Any

    @nn.compact
    def __call__(self, x):  # [N, H, W, 3]
        """Returns logits [N, 1000]."""
        x = nn.Conv(64, (7, 7), 2, use_bias=False, dtype=self.dtype)(x)
        x = nn.relu(Norm(self.peer, "batch")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for i, blocks in enumerate((3, 4, 6, 3)):
            for j in range(blocks):
                strides = 2 if i and not j else 1
                x = Bottleneck(self.peer, self.dtype, 64 * 2**i, strides)(x)
        return nn.Dense(1000)(x.mean((1, 2)).astype(jnp.float32))


class Attention(nn.Module):
    """A layer of a transformer: attention, then a wide layer, each behind a norm."""

    peer: peers.Peer
    dtype: Any
    norm: str
    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x, mask=None):  # [N, T, C]
        """Returns an array of the shape of x."""
        gated = self.norm == "rms"
        options = {"use_bias": not gated, "dtype": self.dtype}
        y = Norm(self.peer, self.norm)(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, **options)(y, mask=mask)
        y = Norm(self.peer, self.norm)(x)
        if gated:
            gate = nn.silu(nn.Dense(self.hidden, **options)(y))
            y = gate * nn.Dense(self.hidden, **options)(y)
        else:
            y = nn.gelu(nn.Dense(self.hidden, **options)(y))
        return x + nn.Dense(x.shape[-1], **options)(y)


class ViTB(nn.Module):
    """A ViT-B/16, https://arxiv.org/abs/2010.11929."""

    peer: peers.Peer
    dtype: Any

    @nn.compact
    def __call__(self, x):  # [N, H, W, 3]
        """Returns logits [N, 1000]."""
        x = nn.Conv(768, (16, 16), 16, dtype=self.dtype)(x).reshape(len(x), -1, 768)
        position = self.param("position", nn.initializers.normal(0.02), x.shape[1:])
        x = x + position.astype(self.dtype)
        for _ in range(12):
            x = Attention(self.peer, self.dtype, "layer", 12, 3072)(x)
        x = Norm(self.peer, "layer")(x).mean(1)
        return nn.Dense(1000)(x.astype(jnp.float32))


class DecoderBlock(nn.Module):
    """A layer of a decoder of rms norms and gated units, 2048 wide."""

    peer: peers.Peer
    dtype: Any

    @nn.compact
    def __call__(self, x):  # [N, T, C]
        """Returns an array of the shape of x."""
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        return Attention(self.peer, self.dtype, "rms", 16, 5632)(x, mask)


class UNetBlock(nn.Module):
    """Two residual blocks of a diffusion U-Net, https://arxiv.org/abs/2006.11239."""

    peer: peers.Peer
    dtype: Any

    @nn.compact
    def __call__(self, x):  # [N, H, W, C]
        """Returns an array of the shape of x."""
        for _ in range(2):
            y = x
            for _ in range(2):
                y = nn.silu(Norm(self.peer, "group", 32)(y))
                y = nn.Conv(x.shape[-1], (3, 3), dtype=self.dtype)(y)
            x = x + y
        return x


# The network, and the shape of its input.
NETWORKS = {
    "ResNet-50": (ResNet50, (32, 224, 224, 3)),
    "ViT-B": (ViTB, (16, 224, 224, 3)),
    "decoder block": (DecoderBlock, (8, 1024, 2048)),
    "U-Net block": (UNetBlock, (4, 64, 64, 320)),
}
