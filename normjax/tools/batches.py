"""Batches of any size, as batches of one size and a mask; of all processes, as one."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normjax import _check


def pad_batch(batch: Any, size: int) -> tuple[Any, np.ndarray]:
    """Pads a batch with zeros to a size, and says which samples are real.

    Hosts with batches of their own sizes, the last batch of an epoch, a host that has
    run out of data: padded, all have one shape, which is what compiled programs and
    collectives want; and with the mask, statistics are those of the real samples.

    Args:
      batch: a tree of arrays ``[n, ...]`` of one n, of 0 or more samples. What is no
        JAX array stays on the host.
      size: the number of samples that is wanted, n or more.

    Returns:
      The tree of arrays ``[size, ...]``, and a boolean mask ``[size]``, which a norm
      takes as ``mask[:, None, None, None]`` for ``x`` of shape ``[N, H, W, C]``.

    Raises:
      TypeError: if ``size`` is no integer.
      ValueError: if arrays disagree about n, one has no axis, or n is above ``size``.

    Example:
      >>> import numpy as np
      >>> from normjax import tools
      >>> padded, mask = tools.pad_batch({"x": np.ones((2, 3))}, 4)
      >>> padded["x"].shape, mask
      ((4, 3), array([ True,  True, False, False]))
    """
    if not _check.is_integer(size):
        raise _check.error(
            TypeError,
            "pad_batch",
            "size must be an integer, the number of samples that is wanted",
            f"size={size!r}",
            "Pass the size of the largest batch of all hosts",
        )
    found = _shapes("pad_batch", batch)
    sizes = {path: shape[0] for path, shape in found.items()}
    first, n = next(iter(sizes.items()))
    other = next((path for path, m in sizes.items() if m != n), None)
    if other is not None:
        raise _check.error(
            ValueError,
            "pad_batch",
            "all arrays of a batch must have as many samples",
            f"{n} in {first}, {sizes[other]} in {other}",
            "Take both from the same samples",
        )
    if not n <= size:
        raise _check.error(
            ValueError,
            "pad_batch",
            "a batch must not have more samples than it is padded to",
            f"{n} samples, size={size}",
            f"Pass size={n} or more, the same on all hosts",
        )

    def padded(a):
        if _is_key(a):
            return _wrapped(padded(jax.random.key_data(a)), a)
        widths = [(0, size - n)] + [(0, 0)] * (np.ndim(a) - 1)
        return jnp.pad(a, widths) if isinstance(a, jax.Array) else np.pad(a, widths)

    return jax.tree.map(padded, batch), np.arange(size) < n


def _shapes(name: str, batch: Any) -> dict[str, tuple]:
    """The shape of each array of a batch, all of which have an axis of samples."""
    found = {
        jax.tree_util.keystr(path) or "the batch": np.shape(a)
        for path, a in jax.tree_util.tree_leaves_with_path(batch)
    }
    scalars = [path for path, shape in found.items() if not shape]
    if scalars or not found:
        raise _check.error(
            ValueError,
            name,
            "a batch is a tree of arrays whose first axis is that of the samples",
            f"{scalars[0]} of shape ()" if scalars else "no arrays",
            "Leave out of the batch what is not of samples",
        )
    return found


def global_batch(batch: Any, sharding: jax.sharding.Sharding) -> Any:
    """Makes global arrays of what each process has of a batch.

    First the shapes of all processes are compared, in two small all-gathers: where one
    differs, every process raises, instead of waiting for the others in its next step.

    Args:
      batch: a tree of arrays ``[n, ...]``, those of this process, of the same names,
        shapes and dtypes as those of the others: `pad_batch` pads them.
      sharding: of the global arrays, their first axis over the processes.

    Returns:
      The tree of arrays ``[processes * n, ...]``.

    Raises:
      ValueError: on every process, if two processes disagree, or if an array has no
        axis.

    Example:
      >>> import jax
      >>> import numpy as np
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> from normjax import tools
      >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
      >>> over = NamedSharding(mesh, PartitionSpec("data"))
      >>> tools.global_batch({"x": np.ones((2, 3))}, over)["x"].shape
      (2, 3)
    """
    if jax.process_count() > 1:
        _agree(batch)
    _shapes("global_batch", batch)

    def whole(a):
        if _is_key(a):
            return _wrapped(whole(jax.random.key_data(a)), a)
        return jax.make_array_from_process_local_data(sharding, np.asarray(a))

    return jax.tree.map(whole, batch)


def _is_key(a: Any) -> bool:
    """Whether an array is one of keys of ``jax.random``."""
    return isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key)


def _wrapped(data: jax.Array, like: jax.Array) -> jax.Array:
    """The keys that their data is of."""
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))


def _agree(batch: Any) -> None:
    """Refuses a batch whose arrays are not like those of every other process."""
    mine = {
        jax.tree_util.keystr(path) or "the batch": f"{np.shape(a)} {jnp.result_type(a)}"
        for path, a in jax.tree_util.tree_leaves_with_path(batch)
    }
    first, *others = _of_processes(json.dumps(mine))
    for number, text in enumerate(others, 1):
        if text == first:
            continue
        one, other = json.loads(first), json.loads(text)
        paths = {**one, **other}
        path = next((p for p in paths if one.get(p) != other.get(p)), "their order")
        if path not in paths:
            one, other = ({path: ", ".join(names)} for names in (one, other))
        raise _check.error(
            ValueError,
            "global_batch",
            "all processes must have arrays of the same names, shapes and dtypes, in"
            " one order",
            f"{path}: {one.get(path, 'none')} on process 0, {other.get(path, 'none')}"
            f" on process {number}",
            "Pad each batch with pad_batch, to one size on all of them",
        )


def _of_processes(text: str) -> list[str]:
    """The texts of all processes, on each of them."""
    from jax.experimental import multihost_utils

    raw = text.encode()
    sizes = multihost_utils.process_allgather(np.asarray([len(raw)], np.int32))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(raw)] = np.frombuffer(raw, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [
        row[:size].tobytes().decode()
        for row, size in zip(rows, sizes[:, 0], strict=True)
    ]
