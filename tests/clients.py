"""Public models with their norms swapped for normjax's, and every tool on each.

    python tests/clients.py                    # says which checkouts there may be
    python tests/clients.py FOLDER             # make test-clients CLIENTS=FOLDER
    python tests/clients.py FOLDER --only vit  # rows whose name has this in it

FOLDER holds a checkout of each repository under its own name. A model runs as its
authors wrote it, first with Flax's norms and then with those of normjax in their place,
at the same parameters, in float64 where it lets a dtype through; outputs, gradients and
statistics must agree to rounding. Then each tool gets the model as it is. Rows whose
checkout, or what that imports, is missing are skipped, and say so.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import traceback
import warnings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all the time is that of compiling, which takes a third so.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)

ALGOPERF = "algoperf.workloads"
BONSAI = "bonsai.models"
LM = "dtype=wide, emb_dim=16, num_heads=2, num_layers=2, qkv_dim=16, mlp_dim=32"
LM += ", max_len=16"
VIT = "hidden_size=16, transformer=dict(num_layers=2, mlp_dim=32, num_heads=2"
IMAGES = "normal(4, 32, 32, 3)"


@dataclasses.dataclass(frozen=True)
class Row:
    """A model: in which repository it is, and how to make a small one.

    Attributes:
      name: of the row.
      repository: on GitHub; FOLDER holds a checkout of it by its last part.
      root: the folder of the checkout to import from.
      module: what to import.
      make: an expression of the model, in the names of the module, with nnx's ``rngs``.
      inputs: an expression of the tuple of inputs.
      train, infer: keyword arguments of the call.
      axis: a device axis that must be bound around the call.
      kinds: an expression of ``kinds``, of a model whose norms are its own.
    """

    name: str
    repository: str
    root: str
    module: str
    make: str
    inputs: str = f"({IMAGES},)"
    train: str = "{}"
    infer: str = "{}"
    axis: str | None = None
    kinds: str = "None"


def _row(
    name, repository, root, module, make, inputs=f"({IMAGES},)", mode=None, **more
):
    """A row; ``mode`` is the expression of keyword arguments, of a boolean `t`."""
    if mode is not None:
        train, infer = (f"(lambda t: dict({mode}))({t})" for t in (True, False))
        more |= {"train": train, "infer": infer}
    return Row(name, repository, root, module, make, inputs, **more)


TOKENS = "(integers(4, 8),)"
FLAX, VISION = "google/flax", "google-research/vision_transformer"
BIG, PERF, JAX_BONSAI = (
    "google-research/big_vision",
    "mlcommons/algorithmic-efficiency",
    "jax-ml/bonsai",
)
ROWS = [
    _row(
        "flax-imagenet",
        FLAX,
        "examples/imagenet",
        "models",
        "ResNet(stage_sizes=[1, 1], block_cls=ResNetBlock, num_classes=5,"
        " num_filters=8, dtype=wide)",
        mode="train=t",
        axis="batch",
    ),
    _row(
        "flax-nlp",
        FLAX,
        "examples/nlp_seq",
        "models",
        f"Transformer(TransformerConfig(11, 11, {LM}))",
        "()",
        "inputs=integers(4, 8), train=t",
    ),
    _row(
        "flax-lm1b",
        FLAX,
        "examples/lm1b",
        "models",
        f"TransformerLM(TransformerConfig(11, 11, deterministic=True, {LM}))",
        TOKENS,
    ),
    _row(
        "flax-wmt",
        FLAX,
        "examples/wmt",
        "models",
        f"Transformer(TransformerConfig(11, 11, deterministic=True, {LM}))",
        "(integers(4, 8), integers(4, 8))",
    ),
    _row(
        "vit",
        VISION,
        ".",
        "vit_jax.models_vit",
        "VisionTransformer(num_classes=5, patches=types.SimpleNamespace(size=(8, 8)),"
        f" {VIT}))",
        mode="train=t",
    ),
    _row(
        "vit-hybrid",
        VISION,
        ".",
        "vit_jax.models_vit",
        "VisionTransformer(num_classes=5, patches=types.SimpleNamespace(size=(1, 1)),"
        " resnet=types.SimpleNamespace(width_factor=0.5, num_layers=(1, 1)),"
        f" {VIT}))",
        mode="train=t",
    ),
    _row(
        "mixer",
        VISION,
        ".",
        "vit_jax.models_mixer",
        "MlpMixer(patches=types.SimpleNamespace(size=(8, 8)), num_classes=5,"
        " num_blocks=2, hidden_dim=16, tokens_mlp_dim=8, channels_mlp_dim=32)",
        mode="train=t",
    ),
    _row(
        "big-vision-vit",
        BIG,
        ".",
        "big_vision.models.vit",
        "Model(5, patch_size=(8, 8), width=16, depth=2, num_heads=2, mlp_dim=32,"
        " dtype_mm=wide)",
        mode="train=t",
    ),
    _row(
        "big-vision-vit-scan",
        BIG,
        ".",
        "big_vision.models.vit",
        "Model(5, patch_size=(8, 8), width=16, depth=2, num_heads=2, mlp_dim=32,"
        " scan=True, pool_type='map', dtype_mm=wide)",
        mode="train=t",
    ),
    _row(
        "big-vision-mixer",
        BIG,
        ".",
        "big_vision.models.mlp_mixer",
        "MlpMixer(patch_size=(8, 8), num_classes=5, num_blocks=2, hidden_dim=16,"
        " tokens_mlp_dim=8, channels_mlp_dim=32)",
        mode="train=t",
    ),
    _row(
        "big-vision-bit",
        BIG,
        ".",
        "big_vision.models.bit",
        "Model(5, width=0.5, depth=(1, 1))",
        mode="train=t",
    ),
    _row(
        "big-vision-bit-own-norm",
        BIG,
        ".",
        "big_vision.models.bit_paper",
        "Model(5, width=1, depth=(1, 1))",
        mode="train=t",
        kinds='{GroupNorm: "GroupNorm"}',
    ),
    _row(
        "jax-resnet",
        "n2cholas/jax-resnet",
        ".",
        "jax_resnet.resnet",
        "ResNet(block_cls=ResNetBlock, stage_sizes=[1, 1], n_classes=5,"
        " hidden_sizes=(8, 16))",
    ),
    _row(
        "jax-resnest",
        "n2cholas/jax-resnet",
        ".",
        "jax_resnet.resnet",
        "ResNet(block_cls=ResNeStBottleneckBlock, stage_sizes=[1, 1], n_classes=5,"
        " hidden_sizes=(8, 16), stem_cls=partial(ResNetDStem, stem_width=8))",
    ),
    _row(
        "algoperf-resnet",
        PERF,
        ".",
        f"{ALGOPERF}.imagenet_resnet.imagenet_jax.models",
        "ResNet((1, 1), BottleneckResNetBlock, 5, num_filters=8, dtype=wide)",
        mode="update_batch_norm=t",
    ),
    _row(
        "algoperf-cifar",
        PERF,
        ".",
        f"{ALGOPERF}.cifar.cifar_jax.models",
        "ResNet((1, 1), ResNetBlock, 5, num_filters=8, dtype=wide)",
        mode="update_batch_norm=t",
    ),
    _row(
        "algoperf-vit",
        PERF,
        ".",
        f"{ALGOPERF}.imagenet_vit.imagenet_jax.models",
        "ViT(5, (8, 8), width=16, depth=2, mlp_dim=32, num_heads=2)",
        mode="train=t",
    ),
    _row(
        "algoperf-vit-map",
        PERF,
        ".",
        f"{ALGOPERF}.imagenet_vit.imagenet_jax.models",
        "ViT(5, (8, 8), width=16, depth=2, mlp_dim=32, num_heads=2, use_map=True)",
        mode="train=t",
    ),
    _row(
        "algoperf-unet",
        PERF,
        ".",
        f"{ALGOPERF}.fastmri.fastmri_jax.models",
        "UNet(num_channels=4, num_pool_layers=2, use_layer_norm=True)",
        "(normal(4, 16, 16),)",
        "train=t",
    ),
    _row(
        "algoperf-dlrm",
        PERF,
        ".",
        f"{ALGOPERF}.criteo1tb.criteo1tb_jax.models",
        "DlrmSmall(vocab_size=64, mlp_bottom_dims=(8, 8), mlp_top_dims=(16, 1),"
        " embed_dim=8, use_layer_norm=True)",
        "(jnp.concatenate([normal(8, 13), integers(8, 26).astype(float)], 1),)",
        "train=t",
    ),
    _row(
        "algoperf-wmt",
        PERF,
        ".",
        f"{ALGOPERF}.wmt.wmt_jax.models",
        f"Transformer(TransformerConfig(vocab_size=11, deterministic=True, {LM}))",
        "(integers(4, 8), integers(4, 8))",
    ),
    _row(
        "algoperf-conformer",
        PERF,
        ".",
        f"{ALGOPERF}.librispeech_conformer.librispeech_jax.models",
        "Conformer(ConformerConfig(vocab_size=11, encoder_dim=16,"
        " num_attention_heads=2, num_encoder_layers=1, use_specaug=False,"
        " dtype=wide))",
        "(normal(2, 4000), jnp.zeros((2, 4000)))",
        "train=t",
        kinds='{LayerNorm: "LayerNorm", BatchNorm: "BatchNorm"}',
    ),
    _row(
        "nanodo",
        "google-deepmind/nanodo",
        ".",
        "nanodo.model",
        "TransformerDo(DoConfig(D=16, H=2, L=8, N=2, V=11, F=32, dtype=wide,"
        " fsdp_enabled=False))",
        TOKENS,
    ),
    _row(
        "bonsai-convnext",
        JAX_BONSAI,
        ".",
        f"{BONSAI}.convnext.modeling",
        "ConvNeXt(ModelConfig((1, 1), (8, 16), 0.0, 5), rngs=rngs)",
        mode="train=t, rngs=None",
    ),
    _row(
        "bonsai-efficientnet",
        JAX_BONSAI,
        ".",
        f"{BONSAI}.efficientnet.modeling",
        "EfficientNet(ModelConfig(0.25, 0.25, 32, 0.0, 1, 0.99, 1e-5,"
        " BlockConfigs.default_block_config(), 5), rngs=rngs)",
        mode="training=t",
    ),
    _row(
        "bonsai-resnet",
        JAX_BONSAI,
        ".",
        f"{BONSAI}.resnet.modeling",
        "ResNet(ModelConfig([1, 1, 1, 1], 5), rngs=rngs)",
    ),
    _row(
        "bonsai-densenet",
        JAX_BONSAI,
        ".",
        f"{BONSAI}.densenet121.modeling",
        "DenseNet(ModelConfig(5, [1, 1, 1, 1], 8), rngs=rngs)",
    ),
    _row(
        "bonsai-vit",
        JAX_BONSAI,
        ".",
        f"{BONSAI}.vit.modeling",
        "ViTClassificationModel(ModelConfig((32, 32), (8, 8), 3, 16, 0.0, 0.0, 2, 32,"
        " 1e-6, 2, 5), rngs=rngs)",
        mode="rngs=None",
    ),
    _row(
        "bonsai-dinov3",
        JAX_BONSAI,
        ".",
        f"{BONSAI}.dinov3.modeling",
        "Dinov3ViTModel(ModelConfig((8, 8), 16, 32, 2, 2, image_size=32), rngs)",
        "(normal(4, 3, 32, 32),)",
    ),
]


# One row, in a process of its own.


def _names(module):
    """What the expressions of a row may use."""
    import types

    import jax
    import jax.numpy as jnp
    from flax import nnx

    def normal(*shape):
        return 2 * jax.random.normal(jax.random.key(len(shape)), shape, float) + 1

    def integers(*shape):
        return jax.random.randint(jax.random.key(7), shape, 1, 11)

    tools = {"types": types, "jnp": jnp, "normal": normal, "integers": integers}
    wide = jnp.result_type(float)
    return {**vars(module), **tools, "wide": wide, "rngs": nnx.Rngs(0)}


def _made(row, folder):
    """Imports a row's module anew, and makes its model, inputs, arguments and kinds."""
    root = str(folder / row.repository.partition("/")[2] / row.root)
    for name, module in list(sys.modules.items()):
        if folder in pathlib.Path(getattr(module, "__file__", None) or "").parents:
            del sys.modules[name]
    if root not in sys.path:
        sys.path.insert(0, root)
    names = _names(importlib.import_module(row.module))
    parts = (row.make, row.inputs, row.train, row.infer, row.kinds)
    return [eval(text, dict(names)) for text in parts]


@contextlib.contextmanager
def _exact():
    """Within it, Flax's norms take their statistics in float64, in two passes.

    Else what is compared is their rounding: they take them in float32 wherever x is,
    and by the difference of two large numbers.
    """
    import flax.linen.normalization as of_linen
    import flax.nnx.nn.normalization as of_nnx
    import jax.numpy as jnp

    def exact(own, x, axes, dtype, *args, use_fast_variance, **kwargs):
        wide = jnp.promote_types(dtype or jnp.result_type(x), jnp.float64)
        return own(x, axes, wide, *args, use_fast_variance=False, **kwargs)

    before = [(of, of._compute_stats) for of in (of_linen, of_nnx)]
    for of, own in before:
        of._compute_stats = functools.partial(exact, own)
    try:
        yield
    finally:
        for of, own in before:
            of._compute_stats = own


def _swap():
    import flax.linen
    import flax.nnx

    import normjax.linen
    import normjax.nnx

    for theirs, ours in (
        (flax.linen, normjax.linen),
        (flax.nnx, normjax.nnx),
    ):
        for name in ours.__all__:
            setattr(theirs, name, getattr(ours, name))


def _bound(row, f):
    """Calls f within the device axis that a row's model needs."""
    import jax

    if row.axis is None:
        return f

    def call(*arguments):
        one = jax.vmap(lambda _: f(*arguments), axis_name=row.axis, axis_size=1)
        return jax.tree.map(lambda a: a[0], one(jax.numpy.zeros(1)))

    return call


def _moved(tree):
    """Arrays in float64, with numbers of their own, that do not depend on the norms."""
    import jax
    import numpy as np

    def moved(path, a):
        seed = sum(map(ord, jax.tree_util.keystr(path)))
        noise = np.random.default_rng(seed).uniform(-0.1, 0.1, np.shape(a))
        return jax.numpy.asarray(np.asarray(a, np.float64) + noise)

    def each(path, a):
        floating = jax.numpy.issubdtype(jax.numpy.result_type(a), np.floating)
        return moved(path, a) if floating else a

    return jax.tree_util.tree_map_with_path(each, tree)


def _narrows(program) -> bool:
    """Whether a program makes less of arrays of float64, on its own account."""
    import jax
    import numpy as np

    for equation in program.eqns:
        for a, b in zip(equation.invars, equation.outvars, strict=False):
            a, b = a.aval, b.aval
            if (
                equation.primitive.name == "convert_element_type"
                and a.dtype == np.float64
                and jax.numpy.issubdtype(b.dtype, np.floating)
                and b.dtype.itemsize < 8
                and b.size > 1
            ):
                return True
        for parameter in jax.tree.leaves(list(equation.params.values())):
            within = getattr(parameter, "jaxpr", parameter)
            if hasattr(within, "eqns") and _narrows(within):
                return True
    return False


def results(row, made):
    """Outputs, gradients and statistics of a model, as a flat dictionary, and in which
    dtype its program computes."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    from flax import nnx

    model, inputs, train, infer, _ = made
    key = jax.random.key(3)

    def loss(tree):
        floating = [
            a for a in jax.tree.leaves(tree) if jnp.isdtype(a.dtype, "real floating")
        ]
        return sum((jnp.sin(a) * a).sum() for a in floating)

    if isinstance(model, nn.Module):
        rngs = {"params": key, "dropout": key}
        variables = jax.jit(_bound(row, lambda: model.init(rngs, *inputs, **infer)))()
        variables = nn.meta.unbox(_moved(variables))
        state = {k: v for k, v in variables.items() if k != "params"}

        def run(params, arguments):
            y, after = model.apply(
                {"params": params, **state},
                *inputs,
                **arguments,
                rngs={"dropout": key},
                mutable=list(state),
            )
            return loss(y), (y, after)

        params = variables["params"]
    else:
        graph, params, state = nnx.split(model, nnx.Param, ...)
        params, state = _moved(params), _moved(state)

        def run(params, arguments):
            copy = nnx.merge(graph, params, state, copy=True)
            y = copy(*inputs, **arguments)
            after = nnx.split(copy, nnx.Param, ...)[2]
            return loss(y), (y, after)

    found, narrow = {}, False
    for mode, arguments in (("train", train), ("infer", infer)):
        grad = jax.grad(lambda p, a=arguments: run(p, a), has_aux=True)
        program = jax.jit(_bound(row, grad))
        narrow |= _narrows(program.trace(params).jaxpr.jaxpr)
        gradients, (y, after) = program(params)
        parts = {"y": y, "gradients": gradients, "state": after}
        for path, a in jax.tree_util.tree_leaves_with_path(parts):
            if jnp.issubdtype(a.dtype, jnp.number):
                found[mode + jax.tree_util.keystr(path)] = a
    return found, "less" if narrow else "float64"


def compare(ours, theirs):
    """The largest difference of each kind, as a part of the largest value of all."""
    import numpy as np

    if ours.keys() != theirs.keys():
        only = sorted(ours.keys() ^ theirs.keys())
        raise AssertionError(f"other arrays: {only[:5]}")
    worst = {}
    for name, b in theirs.items():
        a, b = (np.asarray(v, np.float64) for v in (ours[name], b))
        kind = re.match(r"\w+\['(\w+)'\]", name)[1]
        size = max(1.0, np.abs(b).max(initial=0))
        off = float(np.abs(a - b).max(initial=0) / size)
        worst[kind] = max(worst.get(kind, 0.0), off if off == off else np.inf)
    return worst


def tools_on(row, made):
    """How many norms are normjax's, and what each tool says of a model as it is.

    That is "ok", a refusal, or a fault.
    """
    import flax.linen as nn
    import jax
    from flax import nnx

    from normjax import tools

    model, inputs, train, infer, kinds = made
    key, is_linen = jax.random.key(3), isinstance(model, nn.Module)
    variables = None
    if is_linen:
        init = jax.jit(
            _bound(
                row,
                lambda: model.init({"params": key, "dropout": key}, *inputs, **infer),
            )
        )
        variables = _moved(init())
    else:
        nnx.update(model, _moved(nnx.state(model)))
    given = {"variables": variables} if is_linen else {}
    first = (variables, *inputs) if is_linen else inputs
    seen = {"rngs": {"dropout": key}} if is_linen else {}
    called = {"kinds": kinds, **infer}
    norms = _quietly(tools.find_norms, model, *inputs, **called)
    of = {norm.kind: norm.kind.removesuffix("Norm").lower() for norm in norms}
    old = next((of[k] for k in ("BatchNorm", "LayerNorm") if k in of), "any")
    new, fields = ("group", {"num_groups": 1}) if old == "batch" else ("rms", {})

    def recalibrate():
        if is_linen:

            def apply(variables, batch):
                return model.apply(
                    variables,
                    *batch,
                    **train,
                    rngs=seen["rngs"],
                    mutable=["batch_stats"],
                )

            what = apply, variables
        else:
            what = lambda model, batch: model(*batch, **train), model
        return tools.recalibrate(*what, [inputs], kinds=kinds, progress=False)

    def decay_mask():
        norms = tools.find_norms(model, *inputs, **called)
        params = variables["params"] if is_linen else nnx.state(model, nnx.Param)
        return tools.decay_mask(params, norms)

    calls = {
        "find_norms": lambda: tools.find_norms(model, *inputs, **called),
        "look": lambda: tools.look(model, *first, **called, **seen),
        "doctor": lambda: tools.doctor(model, *inputs, kinds=kinds, **train, **given),
        "recalibrate": recalibrate,
        "fold": lambda: tools.fold(model, *first, **called, **seen, seconds=0.0),
        "freeze": lambda: tools.freeze(model, kinds=kinds),
        "replace": lambda: tools.replace(model, old, new, kinds=kinds, **fields),
        "decay_mask": decay_mask,
        "norm_table": lambda: tools.norm_table(variables if is_linen else model),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
            said[name] = "ok"
        except Exception as error:
            text = " ".join(str(error).split())
            # A refusal has the house form: function: the rule. Got ... What to do.
            house = re.match(r"[\w.]+: .*\. Got .*\. .*\.$", text)
            what = "refused" if house else f"FAULT {type(error).__name__}"
            said[name] = f"{what}: {text[:300]}"
    swapped = [n for n in norms if type(n.module).__module__.startswith("normjax.")]
    return len(swapped), said


def _quietly(f, *args, **kwargs):
    try:
        return f(*args, **kwargs)
    except Exception:
        return []


def run_row(row, folder) -> dict:
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    warnings.simplefilter("ignore")
    if not (folder / row.repository.partition("/")[2] / row.root).is_dir():
        return {"skipped": f"no checkout of github.com/{row.repository}"}
    with jax.enable_x64(True):
        try:
            made = _made(row, folder)
        except ImportError as error:
            return {"skipped": f"it imports what is not here: {error}"}
        with _exact():
            theirs, dtype = results(row, made)
        _swap()
        ours, _ = results(row, _made(row, folder))
        worst = compare(ours, theirs)
    swapped, tools = tools_on(row, _made(row, folder))
    return {"worst": worst, "dtype": dtype, "norms": swapped, "tools": tools}


# All rows.


def rounding(found) -> float:
    """What rounding adds up to in models of some ten layers.

    Of those in float64 an EfficientNet comes to 1e-12. In a vision transformer with
    parts in float32 the last digit of one parameter moves gradients by 2e-7, and Flax's
    own statistics, which are not used here, by 6e-7.
    """
    return 1e-11 if found["dtype"] == "float64" else 5e-6


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=pathlib.Path, help="of the checkouts")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    rows = [row for row in ROWS if options.only in row.name]
    if options.folder is None:
        print("Give a folder that holds, each under its own name, checkouts of")
        for repository in sorted({row.repository for row in rows}):
            print(f"  git clone --depth 1 https://github.com/{repository}")
        return 2
    folder = options.folder.resolve()
    if options.row:
        row = next(r for r in ROWS if r.name == options.row)
        try:
            found = run_row(row, folder)
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            found = {"failed": text[:500], "where": traceback.format_exc(limit=-4)}
        print("\n" + json.dumps(found))
        return 0
    faults = ran = 0
    for row in rows:
        command = [sys.executable, __file__, str(folder), "--row", row.name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=900)
            found = json.loads(done.stdout.splitlines()[-1])
        except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
            found = {"failed": f"the process ended: {type(error).__name__}"}
        faults += say(row, found)
        ran += "worst" in found
    print(f"{ran} of {len(rows)} models ran, {faults} faults")
    return 1 if faults or not ran else 0


def say(row, found) -> int:
    """Prints what came of a row; returns how many faults it has."""
    if "skipped" in found:
        print(f"{row.name:24} skipped: {found['skipped']}", flush=True)
        return 0
    if "failed" in found:
        print(f"{row.name:24} FAILED: {found['failed']}", flush=True)
        return 1
    bad = {k: v for k, v in found["worst"].items() if not v <= rounding(found)}
    parts = " ".join(f"{k} {v:.0e}" for k, v in found["worst"].items())
    short = {k: v.partition(":")[0] for k, v in found["tools"].items()}
    refused = " ".join(k for k, v in short.items() if v == "refused")
    said = "NOT EQUAL" if bad else "equal"
    norms = f"{found['norms']} norms" if found["norms"] else "no norm of Flax's"
    print(f"{row.name:24} {said} ({norms}, {found['dtype']}): {parts}", end="")
    print(f"; refused: {refused}" if refused else "", flush=True)
    faults = {k: v for k, v in found["tools"].items() if v.startswith("FAULT")}
    for name, text in faults.items():
        print(f"    {name}: {text}", flush=True)
    return len(bad) + len(faults)


if __name__ == "__main__":
    sys.exit(main())
