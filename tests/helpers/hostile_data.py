"""Makes untrusted data that demand too much memory or time: arrays, JSON, runs, checkpoints.

The first part of a name is its reader, as in `hostile_files`: npz, json, run, bucket, orbax.
"""

import json
import pathlib
import shutil
import struct
import types
import zipfile
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from varjax.checkpoints.fingerprint import dtype_and_shape
from varjax.checkpoints.saved_steps import make_record
from varjax.storage import checksums

STEP = 5  # of each checkpoint
NESTED = "[" * 10**6
LONG = "9" * 10**6
BROKEN_JSON = {
    "a_number": "5",
    "a_list": "[1]",
    "text": '"a"',
    "null": "null",
    "nothing": "",
    "nested": NESTED,
    "nested_closed": NESTED + "]" * len(NESTED),
    "nested_a_little": '{"a":' * 900 + "1" + "}" * 900,
    "a_long_number": f'{{"a": {LONG}}}',
    "no_utf8": '{"a": "\udcff"}',
    "escapes": '"\\u001b[2J' + "x" * 10**6 + '"',
}


def npy(shape: str, data: bytes = bytes(9), descr: str = "'|u1'", order: str = "False") -> bytes:
    """Returns an .npy file with an arbitrary header."""
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}".encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def arrays() -> Iterator[tuple[str, bytes]]:
    """Yields (name, content) of .npy files with false headers."""
    for name, shape in {
        "2_40_images": f"({2**40}, 1, 1, 3)",
        "one_wide_image": f"(1, {2**30}, {2**30}, 3)",
        "2_62": f"({2**62}, {2**62}, 0, 3)",
        "negative": "(-1, 1, 1, 3)",
        "65_axes": "(" + "1, " * 65 + ")",
        "nested": "(" * 4000 + ")" * 4000,
        "long": f"({LONG[:9000]},)",
        "code": "__import__('os').system('true')",
    }.items():
        yield name, npy(shape)
    yield "objects", npy("(1, 1, 1, 3)", b"\x80\x04\x95", "'|O'")
    yield "wide_text", npy("(1, 1, 1, 3)", bytes(9), "'<U268435456'")
    yield "a_long_header", b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**30) + b" " * 2**20
    yield "version_3", npy("(3, 1, 1, 3)").replace(b"\x01\x00", b"\x03\x00", 1)
    yield "nothing", b""
    yield "a_magic", b"\x93NUMPY"


def npz_files(path: pathlib.Path) -> Iterator[str]:
    """Writes hostile .npz files to `path`, one after another, and yields the name of each."""
    for name, array in arrays():
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            with zipfile.ZipFile(path, "w", method) as file:
                file.writestr("arr_0.npy", array)
            yield f"{name}_{method}"
    many = np.zeros((2**14, 64, 64, 3), np.uint8)
    np.savez_compressed(path, arr_0=many)
    yield "deflated_zeros"
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", 2**19)  # a false uncompressed size
    path.write_bytes(content)
    yield "deflated_zeros_that_claim_to_be_few"
    for name in ("mu", "sigma"):
        statistics = {"mu": np.zeros(8), "sigma": np.eye(8), name: np.zeros((2**11,) * 2)}
        np.savez_compressed(path, **statistics)
        yield f"a_large_{name}"
    np.savez(path, mu=np.full(8, np.nan), sigma=np.eye(8))
    yield "statistics_of_nan"
    with zipfile.ZipFile(path, "w") as file:
        for i in range(30000):
            file.writestr(f"{i}.npy", b"")
    yield "30000_members"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("arr_0.npy", npy("(3, 1, 1, 3)"))
        file.writestr("arr_1.npy", npy("(3, 1, 1, 3)"))
    path.write_bytes(path.read_bytes().replace(b"arr_1", b"arr_0"))
    yield "equal_names"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as file:
        file.writestr("arr_0.npy", npy("(3, 1, 1, 3)"))
    yield "another_compression"
    path.write_bytes(b"PK\x05\x06" + b"\xff" * 18)
    yield "an_end_alone"


LISTINGS = {
    "above": ["a.txt", "../../../../.bashrc"],
    "above_and_back": ["a/../../../b"],
    "absolute": ["/etc/passwd"],
    "here": ["./a"],
    "empty_parts": ["a//b"],
    "zero": ["a\0b"],
    "no_utf8": ["\udcff"],
    "one_of_many": [f"{i}.txt" for i in range(10000)] + [".."],
}


def write_run(folder: pathlib.Path, config: str, metrics: bytes = b"") -> None:
    """Writes the files of a run's directory, except its checkpoints."""
    folder.mkdir()
    (folder / "data.json").write_text("{}")
    (folder / "config.json").write_text(config, errors="surrogateescape")
    (folder / "metrics.jsonl").write_bytes(metrics)


def write_checkpoint(folder: pathlib.Path) -> None:
    """Writes a checkpoint of one small array."""
    tree = {"a": {"kernel": jax.random.normal(jax.random.key(0), (8, 16))}}
    handlers = {"params": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
        record = make_record(STEP, {"x": 1}, {"params": tree})
        items = {"params": ocp.args.StandardSave(tree), "meta": ocp.args.JsonSave(record)}
        checkpointer.save(folder.absolute() / str(STEP), args=ocp.args.Composite(**items))


def forge_record(path: pathlib.Path, claim: str) -> None:
    """Makes the record of a checkpoint agree with a false claim about its array."""
    record = checksums.unseal(json.loads(path.read_text()), path)
    record["arrays"]["params"]["a/kernel"] = f"{claim} 0"
    path.write_text(json.dumps(checksums.seal(record)))


def checkpoints(good: pathlib.Path, path: pathlib.Path) -> Iterator[str]:
    """Writes hostile checkpoints to `path`, one after another, and yields the name of each."""

    def begin() -> pathlib.Path:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(good, path)
        return path / str(STEP)

    for name, change in {
        "a_huge_array": {"shape": [2**20] * 2, "chunks": [2**10] * 2},
        "a_large_array": {"shape": [2**14] * 2, "chunks": [8, 16]},
        "a_large_chunk": {"shape": [2**14] * 2, "chunks": [2**14] * 2},
        "an_empty_huge_array": {"shape": [0, 2**60]},
        "text": {"dtype": "|S1000000"},
        "a_filter": {"filters": [{"id": "pickle"}]},
        "nothing": None,
    }.items():
        step = begin()
        base = f"file://{step / 'params'}/"
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
        header = json.loads(store["a.kernel/.zarray"]) | (change or {})
        store["a.kernel/.zarray"] = b"" if change is None else json.dumps(header).encode()
        leaf = types.SimpleNamespace(shape=header["shape"], dtype=header["dtype"])
        forge_record(step / "meta/metadata", dtype_and_shape(leaf))
        yield f"array.{name}"
    for file in ("params/_METADATA", "params/array_metadatas/process_0", "params/_sharding"):
        for name, text in BROKEN_JSON.items():
            step = begin()
            (step / file).write_text(text, errors="surrogateescape")
            yield f"{file.replace('/', '_')}.{name}"
    for name in ("nested", "a_list", "no_utf8", "a_long_number"):
        step = begin()
        (step / "meta/metadata").write_text(BROKEN_JSON[name], errors="surrogateescape")
        yield f"meta.{name}"
    about = json.loads((good / f"{STEP}/_CHECKPOINT_METADATA").read_text())
    for name, handler in {"code": "antigravity.Handler", "a_list": [1], "nested": NESTED}.items():
        step = begin()
        changed = about | {"item_handlers": {"params": handler, "meta": handler}}
        (step / "_CHECKPOINT_METADATA").write_text(json.dumps(changed))
        yield f"handlers.{name}"


def write_data(folder: pathlib.Path) -> None:
    """Writes all hostile data, and valid data of each kind."""
    np.savez(folder / "good.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8), labels=np.arange(3))
    (folder / "good.json").write_text('{"a": 1}')
    (folder / "good.bucket").write_text('["a.txt", "b/c.txt"]')
    task = '{"_type": "VARTask", "model": {}, "sampling": {}}'
    config = f'{{"batch_size": 4, "steps": 8, "task": {task}}}'
    write_run(folder / "good.run", config, b'{"step": 1, "loss": 2.5}\n')
    write_checkpoint(folder / "good.orbax")

    path = folder / "npz"
    for name in npz_files(path):
        (folder / f"npz.{name}.npz").write_bytes(path.read_bytes())
    path.unlink()
    for name, text in BROKEN_JSON.items():
        (folder / f"json.{name}").write_text(text, errors="surrogateescape")
        write_run(folder / f"run.config.{name}", text)
        line = text.encode(errors="surrogateescape")
        write_run(folder / f"run.metrics.{name}", config, line + b'\n{"step": 1}\n')
    for name, names in LISTINGS.items():
        (folder / f"bucket.{name}").write_text(json.dumps(names))
    path = folder / "orbax"
    for name in checkpoints(folder / "good.orbax", path):
        shutil.copytree(path, folder / f"orbax.{name}")
    shutil.rmtree(path)
