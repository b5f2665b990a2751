"""Batch norm with the functions alone: no Flax, the state passed by hand.

    python examples/pure_functions.py

Trains a small convolutional network on scikit-learn's handwritten digits in a few
seconds. Parameters and running moments are plain pytrees: they go into a jitted step,
and new ones come out. Prints the accuracy on held-out digits under running moments.
"""

import argparse
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import normjax

SEED = 0
EPOCHS = 12
BATCH = 64
LEARNING_RATE = 1.0  # of plain SGD, on raw pixels, 0 to 16: too much without the norms
MOMENTUM = 0.9  # the part of the OLD running moments that a step keeps
CHANNELS = (1, 16, 32, 64)  # of the pixels, and of each layer
CLASSES = 10
HELD_OUT = 360

optimizer = optax.sgd(LEARNING_RATE)


def init(key):
    """Returns the parameters and the running moments: two pytrees, no classes."""
    params, running = [], []
    for c_in, c_out in itertools.pairwise(CHANNELS):
        key, key_layer = jax.random.split(key)
        kernel = jax.nn.initializers.he_normal()(key_layer, (3, 3, c_in, c_out))
        scale, bias = jnp.ones(c_out), jnp.zeros(c_out)
        params.append({"kernel": kernel, "scale": scale, "bias": bias})
        running.append(normjax.RunningMoments.init((c_out,)))
    head = {"kernel": jnp.zeros((CHANNELS[-1], CLASSES)), "bias": jnp.zeros(CLASSES)}
    return {"layers": params, "head": head}, running


def conv(x, kernel, stride):
    """Convolves ``[N, H, W, C]`` with ``[3, 3, C, K]``."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def network(params, running, x, train):
    """Returns the logits, and the running moments after this batch."""
    after = []
    for i, (p, r) in enumerate(zip(params["layers"], running, strict=True)):
        x = conv(x, p["kernel"], stride=2 if i else 1)  # [N, H, W, C]
        if train:
            x, m = normjax.batch_norm(x, p["scale"], p["bias"])  # m: [C]
            r = r.update(m, momentum=MOMENTUM)
        else:
            x, _ = normjax.batch_norm(x, p["scale"], p["bias"], moments=r.read())
        x = jax.nn.relu(x)
        after.append(r)
    x = x.mean((1, 2))  # [N, C]
    return x @ params["head"]["kernel"] + params["head"]["bias"], after  # [N, 10]


def loss(params, running, x, labels):
    """Returns the mean cross entropy, and with it the running moments."""
    logits, running = network(params, running, x, train=True)
    terms = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return terms.mean(), running


@jax.jit
def step(params, running, opt_state, x, labels):
    """Takes one step of SGD: the state goes in, and the new state comes out."""
    (value, running), grads = jax.value_and_grad(loss, has_aux=True)(
        params, running, x, labels
    )
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), running, opt_state, value


@jax.jit
def accuracy(params, running, x, labels):
    """Returns the part of the labels found, normalizing by the running moments."""
    logits, _ = network(params, running, x, train=False)
    return (logits.argmax(-1) == labels).mean()


def main(argv=None):
    """Trains, prints the accuracy on held-out digits, and returns it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args(argv)

    started = time.perf_counter()
    rng = np.random.default_rng(args.seed)
    digits = load_digits()
    order = rng.permutation(len(digits.target))
    x = digits.images[order, :, :, None].astype(np.float32)  # [1797, 8, 8, 1]
    labels = digits.target[order].astype(np.int32)  # [1797]
    train_x, train_labels = x[:-HELD_OUT], labels[:-HELD_OUT]
    test_x, test_labels = x[-HELD_OUT:], labels[-HELD_OUT:]

    params, running = init(jax.random.key(args.seed))
    opt_state = optimizer.init(params)
    for epoch in range(args.epochs):
        order = rng.permutation(len(train_x))
        for i in range(0, len(order) - BATCH + 1, BATCH):
            rows = order[i : i + BATCH]
            params, running, opt_state, value = step(
                params, running, opt_state, train_x[rows], train_labels[rows]
            )
        print(f"epoch {epoch + 1:2d}  loss of the last batch {value:.4f}")

    found = float(accuracy(params, running, test_x, test_labels))
    seconds = time.perf_counter() - started
    print(f"held-out accuracy {found:.4f} under running moments, in {seconds:.1f} s")
    return found


if __name__ == "__main__":
    main()
