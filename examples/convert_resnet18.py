"""A ResNet-18 of PyTorch, in Flax: its state dict converts, its outputs are the same.

    python examples/convert_resnet18.py
    python examples/convert_resnet18.py resnet18.safetensors

The state dict has torchvision's names: ``conv1``, ``bn1``, ``layer1.0.conv1``, ...,
``layer4.1.bn2``, ``fc``. Without a file, that of a narrow network of random weights is
read, and the outputs are compared with those that PyTorch gave for it. A ``.pt`` file
needs torch. Prints the largest difference, or the outputs for a grey image.
"""

import argparse
import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from normjax import linen, tools

GOLDEN = pathlib.Path(__file__).parent.parent / "tests/golden/weights"
BLOCKS = (2, 2, 2, 2)  # in each of the four layers
TORCH = tools.preset("torch", "BatchNorm")


def conv(features, size, stride, name):
    """A convolution that pads as PyTorch does: alike on both sides, whatever the size.

    Flax's "SAME" pads a strided one on the far side alone.
    """
    pad = size // 2
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=[(pad, pad), (pad, pad)],
        use_bias=False,
        name=name,
    )


class Block(nn.Module):
    """Two convolutions, and what they are added to.

    Attributes:
      features: of the output.
      stride: of the first convolution.
    """

    features: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        """x: [N, H, W, C]."""
        norm = functools.partial(linen.BatchNorm, not train, **TORCH)
        y = nn.relu(norm(name="bn1")(conv(self.features, 3, self.stride, "conv1")(x)))
        y = norm(name="bn2")(conv(self.features, 3, 1, "conv2")(y))
        if x.shape != y.shape:
            x = conv(self.features, 1, self.stride, "downsample_0")(x)
            x = norm(name="downsample_1")(x)
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """https://arxiv.org/abs/1512.03385, with torchvision's names.

    Attributes:
      classes: how many.
      width: features of the first layer.
    """

    classes: int = 1000
    width: int = 64

    @nn.compact
    def __call__(self, x, train):
        """x: [N, H, W, 3]; returns logits [N, classes]."""
        x = conv(self.width, 7, 2, "conv1")(x)
        x = nn.relu(linen.BatchNorm(not train, **TORCH, name="bn1")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
        for i, blocks in enumerate(BLOCKS):
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                name = f"layer{i + 1}_{j}"
                x = Block(self.width * 2**i, stride, name=name)(x, train)
        return nn.Dense(self.classes, name="fc")(x.mean((1, 2)))


def torch_name(path):
    """layer1_0/downsample_0 is layer1.0.downsample.0 in PyTorch."""
    return path.replace("/", ".").replace("_", ".")


def converted(weights):
    """Returns the model, and its variables, of a state dict."""
    classes, _ = np.shape(weights["fc.weight"])
    model = ResNet18(classes, width=len(weights["bn1.weight"]))
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    key = jax.random.key(0)
    # The shapes alone; nothing is computed.
    like = jax.eval_shape(lambda x: model.init(key, x, False), image)
    return model, tools.from_torch(weights, like, names=torch_name)


def main(argv=None):
    """Converts, compares, and returns the largest relative difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", nargs="?", default=GOLDEN / "resnet18.safetensors")
    args = parser.parse_args(argv)

    weights = tools.read_weights(args.weights)
    model, variables = converted(weights)
    numbers = sum(a.size for a in jax.tree.leaves(variables))
    print(f"{len(weights)} arrays converted, {numbers} numbers")
    back = tools.to_torch(variables, names=torch_name, like=weights)
    exact = all(back[k].tobytes() == weights[k].tobytes() for k in back)
    print(f"and back: {'the same bits' if exact else 'other bits'}")

    apply = jax.jit(lambda variables, x: model.apply(variables, x, False))
    if args.weights != parser.get_default("weights"):
        logits = apply(variables, jnp.full((1, 224, 224, 3), 0.5))
        print(f"largest logits of a grey image: classes {np.argsort(-logits[0])[:5]}")
        return None
    golden = np.load(GOLDEN / "resnet18.npz")
    y = apply(variables, golden["x"].astype(np.float32) / 255)
    difference = float(np.abs(y - golden["y"]).max() / np.abs(golden["y"]).max())
    print(f"largest difference to PyTorch's outputs: {difference:.1e} of the largest")
    return difference


if __name__ == "__main__":
    main()
