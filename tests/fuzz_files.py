"""Damages files of weights and checkpoints at random, and reads them.

    python tests/fuzz_files.py --minutes 60
    python tests/fuzz_files.py --count 100000 --seed 1

A reader must return or raise in the house form: it must not hang, end the process, or
take more than 200 MB or twice the file. A process of its own reads, and is watched.
``--only KIND/NUMBER`` reads one case again, with its error.
"""

import argparse
import collections
import contextlib
import errno
import io
import json
import os
import pathlib
import pickle
import re
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

import ml_dtypes
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
# Out of a hundred: how many cases are of a kind.
SHARES = {
    "h5": 15,  # as Keras and h5py write it
    "h5-latest": 5,
    "h5-unsummed": 15,  # the same, whose checksums are not looked at: all else is
    "keras": 5,
    "keras-inside": 10,  # changed within the zip, whose checksum is right
    "npz": 5,
    "npz-inside": 10,
    "safetensors": 10,
    "index": 4,
    "msgpack": 10,
    "ckpt": 3,
    "pt": 2,
    "orbax": 3,
    "zarr": 3,
}
SECONDS = 20  # that a file may take
MEGABYTES = 200  # that reading may take, or twice the file


# Files that are whole.

TREE = {
    "params": {
        "norm": {"scale": np.arange(3, dtype=np.float32)},
        "fc": {"kernel": np.ones((2, 3), ml_dtypes.bfloat16)},
    },
    "batch_stats": {"norm": {"mean": np.ones(3), "var": np.ones(3)}},
    "step": np.array(7),
}
FLAT = {
    "params/norm/scale": np.arange(3, dtype=np.float32),
    "params/fc/kernel": np.ones((2, 3), ml_dtypes.bfloat16),
    "batch_stats/norm/mean": np.ones(3),
    "batch_stats/norm/var": np.ones(3),
    "step": np.array(7),
    "on": np.array([True, False]),
    "c": np.ones(2, np.complex64),
}


def write_all(folder):
    """Whole files of every kind that can be written here, each in a folder."""
    import h5py
    from flax.serialization import to_bytes

    from normjax import tools

    for kind in SHARES:
        (folder / kind).mkdir()
    tools.write_weights(folder / "h5" / "a.h5", FLAT)
    for kind, count in (("h5-latest", 9), ("h5-unsummed", 60)):  # 60 take two blocks
        with h5py.File(folder / kind / "a.h5", "w", libver="latest") as file:
            many = {f"many/{i}": np.ones(1) for i in range(count)}
            for name, a in {**FLAT, **many}.items():
                file[name] = a
            file["params/fc/kernel"].attrs["dtype"] = "bfloat16"
    for kind in ("keras", "keras-inside"):
        with zipfile.ZipFile(folder / kind / "a.keras", "w") as archive:
            archive.writestr("config.json", "{}")
            archive.write(folder / "h5" / "a.h5", "model.weights.h5")
    np.savez(folder / "npz" / "a.npz", **FLAT)
    np.savez_compressed(folder / "npz-inside" / "a.npz", **FLAT)
    tools.write_weights(folder / "safetensors" / "a.safetensors", FLAT)
    places = {name: f"{'ab'[i % 2]}.safetensors" for i, name in enumerate(FLAT)}
    for file in ("a.safetensors", "b.safetensors"):
        part = {k: FLAT[k] for k, place in places.items() if place == file}
        tools.write_weights(folder / "index" / file, part)
    index = folder / "index" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "msgpack" / "a.msgpack").write_bytes(to_bytes(TREE))
    (folder / "ckpt" / "a.ckpt").write_bytes(pickle.dumps(FLAT))
    with contextlib.suppress(ImportError):
        import torch

        torch.save({"w": torch.ones(3), "b": torch.ones(2)}, folder / "pt" / "a.pt")
    with contextlib.suppress(ImportError):
        import orbax.checkpoint as ocp

        for kind, ocdbt in (("orbax", True), ("zarr", False)):
            handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)
            with ocp.Checkpointer(handler) as checkpointer:
                checkpointer.save(folder / kind / "tree", TREE)
    for kind in list(SHARES):
        if not any((folder / kind).iterdir()):
            (folder / kind).rmdir()


# Damage.

EXTREMES = (0, 1, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63)
EXTREMES += (2**64 - 1, 2**40, 100_000, 10_000_000)


def damaged(data, rng):
    """The bytes with one to three changes, mostly one."""
    data = bytearray(data)
    for _ in range(1 + min(2, rng.geometric(0.7) - 1)):
        if not data:
            break
        place, other = rng.integers(0, len(data), 2)
        count = int(min(rng.geometric(0.1), 64))
        what = rng.integers(0, 8)
        if what == 0:
            data[place] = rng.integers(0, 256)
        elif what == 1:
            data[place] ^= 1 << rng.integers(0, 8)
        elif what == 2:
            del data[place:]
        elif what == 3:
            data[place:place] = rng.bytes(count)
        elif what == 4:
            del data[place : place + count]
        elif what == 5:  # a part that lies elsewhere
            data[place : place + count] = data[other : other + count]
        else:
            wide = int(rng.choice([1, 2, 4, 8]))
            value = int(EXTREMES[rng.integers(len(EXTREMES))]) % 2 ** (8 * wide)
            order = "little" if rng.random() < 0.7 else "big"
            data[place : place + wide] = value.to_bytes(wide, order)
    return bytes(data)


def damaged_inside(data, rng):
    """A zip of which one member is damaged, and all else is right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        members = old.infolist()
        chosen = rng.integers(len(members))
        for i, member in enumerate(members):
            text = old.read(member)
            text = damaged(text, rng) if i == chosen else text
            new.writestr(member.filename, text, member.compress_type)
    return file.getvalue()


def damage(whole, folder, kind, rng):
    """Copies the files of a kind and damages one; returns what is to be read."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole / kind, folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    path = files[rng.integers(len(files))]
    change = damaged_inside if kind.endswith("-inside") else damaged
    path.write_bytes(change(path.read_bytes(), rng))
    if len(files) > 1 and rng.random() < 0.02:  # a pipe in its place, or a loop
        path.unlink()
        if rng.random() < 0.5:
            os.mkfifo(path)
        else:
            path.symlink_to(path.name)
    if kind in ("orbax", "zarr"):
        return folder / "tree"
    return folder / "model.safetensors.index.json" if kind == "index" else files[0]


# The process that reads.


def house(fault):
    form = r"(read_weights|checkpoint|norm_table): .+\. Got .+\. .+\."
    return re.fullmatch(form, str(fault), re.DOTALL) is not None


def read(kind, path):
    """Reads a file by all that read its kind."""
    from normjax import tools
    from normjax.tools import checkpoints

    weights = kind.startswith(("h5", "keras", "safetensors", "index", "pt"))
    readers = [tools.read_weights] if weights else []
    if not kind.startswith(("h5", "keras", "pt")):
        readers.append(lambda path: tools.norm_table(checkpoints.load(path)))
    said = "read"
    for reader in readers:
        try:
            reader(path)
        except (ValueError, OSError) as fault:
            looped = isinstance(fault, OSError) and fault.errno == errno.ELOOP
            if not house(fault) and not looped:
                raise
            said = "refused"
    return said


def unsummed(self, address, count, signature):
    from normjax.tools.hdf5_parts import Fields

    return Fields(self.signed(address, count, signature).data[:-4])


def kind_of(number, kinds):
    """The kinds in turn, by their shares."""
    turns = [k for i in range(max(SHARES.values())) for k in kinds if SHARES[k] > i]
    return turns[number % len(turns)]


def held():
    """The memory of this process in bytes, now and at most since `forget`."""
    if not sys.platform.startswith("linux"):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most, most
    status = pathlib.Path("/proc/self/status").read_text()
    words = ("VmRSS", "VmHWM")
    return [1024 * int(re.search(rf"{w}:\s+(\d+)", status)[1]) for w in words]


def forget():
    """The largest memory is from now on that from now on, where Linux can do it."""
    if sys.platform.startswith("linux"):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def work(whole, seed, first):
    """Reads cases one after another, and says what became of each in a line."""
    from normjax.tools import hdf5

    kinds = [k for k in SHARES if (whole / k).exists()]
    summed = hdf5._Reader.summed
    for kind in kinds:  # what is imported when it is first read
        rng = np.random.default_rng(0)
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(ValueError):
            read(kind, damage(whole, pathlib.Path(folder) / "files", kind, rng))
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as scratch:
        folder = pathlib.Path(scratch) / "files"
        for number in range(first, sys.maxsize):
            kind = kind_of(number, kinds)
            rng = np.random.default_rng([seed, number])
            path = damage(whole, folder, kind, rng)
            size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
            hdf5._Reader.summed = unsummed if kind == "h5-unsummed" else summed
            before, largest = held()
            if largest - before > 20 * 10**6:
                forget()
            try:
                said = read(kind, path)
            except Exception as fault:  # what a reader must not raise
                said = f"odd {type(fault).__name__}: {fault}"
            taken = held()[1] - before
            if taken > max(MEGABYTES * 10**6, 2 * size):
                said = f"memory {taken / 1e6:.0f} MB"
            print(number, kind, taken, *said.split(), flush=True)


# The process that watches.


class Watched:
    """A process that reads; it is ended where it hangs, and started again."""

    def __init__(self, whole, seed):
        self.whole, self.seed, self.process = whole, seed, None

    def lines(self, first):
        """The number of each case and what became of it, in words."""
        self.start(first)
        number, rest = first, b""
        while True:
            limit = SECONDS if number > first else 10 * SECONDS  # it imports jax
            ready, _, _ = select.select([self.process.stdout], [], [], limit)
            part = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                words = line.decode(errors="replace").split(" ")
                number = int(words[0]) + 1
                yield number - 1, words[1], int(words[2]), " ".join(words[3:])
            if not part:
                said = f"death {self.process.wait()}" if ready else "hang"
                yield number, "", 0, said
                self.end()
                number, rest, first = number + 1, b"", number + 1
                self.start(first)

    def start(self, first):
        command = [sys.executable, __file__, "--work", str(self.whole)]
        command += ["--seed", str(self.seed), "--first", str(first)]
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment | {"JAX_PLATFORMS": "cpu"},
        )

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def main(argv=None):
    """Returns 1 where a file hangs, kills, takes too much or ends in odd words."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, help="that it runs")
    parser.add_argument("--count", type=int, help="of files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the first case")
    parser.add_argument("--work", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        return work(args.work, args.seed, args.first)
    count = args.count or (sys.maxsize if args.minutes else 1000)
    end = time.monotonic() + 60 * (args.minutes or 10**6)
    with tempfile.TemporaryDirectory(prefix="fuzz-whole-") as whole:
        write_all(pathlib.Path(whole))
        return watch(Watched(whole, args.seed), args.first, count, end)


def watch(watched, first, count, end):
    """Counts what becomes of the cases, and prints it."""
    seen, faults = collections.Counter(), collections.Counter()
    largest, slowest, last = 0, 0.0, None
    for number, kind, taken, said in watched.lines(first):
        now = time.monotonic()
        if last is not None and number > first:
            slowest = max(slowest, now - last)
        last = now
        largest = max(largest, taken)
        what = said.split()[0]
        seen[kind, what] += 1
        if seen.total() % 10_000 == 0:
            print(f"{seen.total()} mutations so far", flush=True)
        if what not in ("read", "refused"):
            faults[what] += 1
            print(f"case {number} {kind}: {said[:500]}", flush=True)
        if number + 1 >= first + count or now > end:
            break
    watched.end()
    made = sum(seen.values())
    for kind in SHARES:
        parts = [f"{n} {what}" for (k, what), n in sorted(seen.items()) if k == kind]
        print(f"{kind:12} {', '.join(parts)}")
    print(
        f"{made} mutations: {faults['hang']} hangs, {faults['death']} deaths,"
        f" {faults['memory']} above the bound of memory, {faults['odd']} odd errors;"
        f" the largest memory {largest / 1e6:.0f} MB, the longest {slowest:.2f} s"
    )
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
