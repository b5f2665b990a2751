"""What exact accumulation of gradients keeps, beside one big batch.

    python benchmarks/accumulate.py

A network of six residual blocks, 256 images. The batch as one, as eight micro-batches
that one name merges, and one micro-batch alone; each as it is, and with `nn.remat`
about its blocks. Prints the MiB that a gradient allocates beside its arguments and
results, as XLA plans it; nothing is run.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from normjax import linen

IMAGES, MICRO, WIDTH, BLOCKS = 256, 8, 16, 6


class Block(nn.Module):
    """Two convolutions with batch norm, added to what comes in."""

    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns as many features as x has."""
        y = x
        for _ in range(2):
            norm = linen.BatchNorm(False, axis_name=self.axis_name)
            y = nn.silu(norm(nn.Conv(WIDTH, (3, 3), use_bias=False)(y)))
        return x + y


class Net(nn.Module):
    """Six such blocks."""

    axis_name: str | None
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits [N, 10] for images [N, 8, 8, 1]."""
        block = nn.remat(Block) if self.remat else Block
        x = nn.Conv(WIDTH, (3, 3))(x)
        for i in range(BLOCKS):
            x = block(self.axis_name, name=f"block_{i}")(x)
        return nn.Dense(10)(x.mean((1, 2)))


def loss_of(remat: bool, axis_name: str | None = None) -> Callable:
    """The loss of a batch, whose statistics are those of all that have the name."""

    def loss(variables, images, labels):
        net = Net(axis_name, remat)
        logits, _ = net.apply(variables, images, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


def ways(remat: bool) -> dict[str, Callable]:
    """The losses to compare."""
    one, big = loss_of(remat, "micro"), loss_of(remat)

    def micro(variables, images, labels):
        parts = jax.tree.map(
            lambda a: a.reshape(MICRO, -1, *a.shape[1:]), (images, labels)
        )
        return jax.vmap(one, (None, 0, 0), axis_name="micro")(variables, *parts).mean()

    def alone(variables, images, labels):
        return big(variables, images[: IMAGES // MICRO], labels[: IMAGES // MICRO])

    return {"one big batch": big, "micro-batches, one name": micro, "one alone": alone}


def main() -> None:
    """Compiles each and prints the table."""
    images = jax.ShapeDtypeStruct((IMAGES, 8, 8, 1), jnp.float32)
    labels = jax.ShapeDtypeStruct((IMAGES,), jnp.int32)
    variables = jax.eval_shape(Net(None, False).init, jax.random.key(0), images)
    print(f"jax {jax.__version__}, MiB\n| | as it is | nn.remat |\n|---|---|---|")
    for name in ways(False):
        sizes = []
        for remat in (False, True):
            gradient = jax.jit(jax.grad(ways(remat)[name]))
            plan = gradient.lower(variables, images, labels).compile().memory_analysis()
            sizes.append(f"{plan.temp_size_in_bytes / 2**20:.1f}")
        print(f"| {name} | {' | '.join(sizes)} |")


if __name__ == "__main__":
    main()
