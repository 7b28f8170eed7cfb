"""Makes small files that demand much memory or time from their reader, and valid ones to damage."""

import io
import json
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Iterator

import jax
import numpy as np

from tests.helpers import hostile_images, hostile_pickles
from tests.helpers.checkpoint_files import (
    DATA,
    archive,
    entries,
    legacy_file,
    mapping,
    stored,
    tensor,
)
from varjax.checkpoints.weights import abstract_params
from varjax.convert.apply_map import official_buffers, to_official
from varjax.convert.pth.read import MAGIC
from varjax.convert.pth.write import write_pth
from varjax.mar.heads import DiffusionHead
from varjax.mar.model import MARConfig
from varjax.storage.safetensors_io import write_safetensors
from varjax.tokenizers.kl.model import KLConfig
from varjax.tokenizers.vq.model import VQConfig
from varjax.var.model import VARConfig

VAR = VARConfig(2, 8, 2, classes=3, scales=(1, 2), vocab=8, code_channels=4)
VQ = VQConfig((1, 2), width=8, channel_mult=(1, 2), blocks=1, groups=4, vocab=8, code_channels=4)
KL = KLConfig(8, width=8, channel_mult=(1, 2), blocks=1, groups=4, latent_channels=4)
MAR = MARConfig(
    8, 1, 1, 2, 2, DiffusionHead(channels=4, depth=1, width=8), 3, (2, 2), buffer_size=1
)  # fmt: skip


def official(config) -> dict[str, np.ndarray]:
    """Returns a model's tensors by their official names, all zero."""
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_params(config))
    tensors = {**to_official(config, params), **official_buffers(config)}
    return {name: np.asarray(x) for name, x in tensors.items()}


def write_legacy(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a state dict as PyTorch before 1.6 did."""
    kinds = {"float32": "FloatStorage", "int64": "LongStorage"}

    def opcodes(i, x) -> bytes:
        strides = tuple(step // x.itemsize for step in x.strides)
        return tensor(x.shape, strides, 0, stored(kinds[x.dtype.name], str(i), x.size))

    named = {name: opcodes(i, x) for i, (name, x) in enumerate(tensors.items())}
    keys = [str(i) for i in range(len(tensors))]
    counts = [x.size.to_bytes(8, "little") + x.tobytes() for x in tensors.values()]
    path.write_bytes(legacy_file(mapping(named), keys) + b"".join(counts))


def write_good(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Writes a VAR in each format; returns the paths by format."""
    paths = {name: folder / f"good.{name}" for name in ("pth", "legacy", "safetensors")}
    tensors = official(VAR)
    write_pth(paths["pth"], tensors)
    write_legacy(paths["legacy"], tensors)
    write_safetensors(paths["safetensors"], tensors, {})
    return paths


def mutations(good: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Yields `count` damaged copies of a file, with bytes changed, cut off or inserted.

    Most damage is in the first and last 8 kB, where headers, pickles and lists of members are.
    """
    rng = np.random.default_rng(seed)

    def position() -> int:
        near = int(rng.integers(2**13))
        positions = (near, len(good) - 1 - near, int(rng.integers(len(good))))
        return positions[rng.choice(3, p=[0.55, 0.3, 0.15])] % len(good)

    for _ in range(count):
        damaged = bytearray(good)
        match rng.choice(4, p=[0.55, 0.2, 0.1, 0.15]):
            case 0:
                for _ in range(rng.integers(1, 4)):
                    damaged[position()] ^= 1 << int(rng.integers(8))
            case 1:
                damaged[position()] = int(rng.choice([0, 1, 127, 128, 255]))
            case 2:
                del damaged[position() :]
            case 3:
                start, target, size = position(), position(), int(rng.integers(1, 64))
                damaged[target:target] = good[start : start + size]
        yield bytes(damaged)


def repacked(path: pathlib.Path, pickled: bytes) -> bytes:
    """Returns a zip file with another pickle and its correct checksum."""
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w") as new:
        for member in old.infolist():
            is_pickle = member.filename.endswith("data.pkl")
            new.writestr(member.filename, pickled if is_pickle else old.read(member))
    return packed.getvalue()


def write_damaged(folder: pathlib.Path, count: int) -> None:
    """Writes `count` damaged copies of a VAR in each format, and of its pickle in a zip file."""
    paths = write_good(folder)
    for seed, (name, path) in enumerate(paths.items()):
        for i, damaged in enumerate(mutations(path.read_bytes(), count, seed)):
            (folder / f"var.damaged.{i}.{name}").write_bytes(damaged)
    with zipfile.ZipFile(paths["pth"]) as file:
        pickled = file.read("archive/data.pkl")
    for i, damaged in enumerate(mutations(pickled, count, len(paths))):
        (folder / f"var.damaged.{i}.pickle").write_bytes(repacked(paths["pth"], damaged))


def state_dicts() -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yields named state dicts of impossible models, or of models that take long to describe."""
    var, vq, kl, mar = (official(config) for config in (VAR, VQ, KL, MAR))
    number, level = np.zeros(1, np.float32), np.int8(0)
    for name, levels in {
        "a_large_level": [[200000000]],
        "large_levels": [[0, 1, 1, 1, 2**62]],
        "a_negative_level": [[-1, 1, 1, 1, 1]],
        "levels_of_nothing": [],
        "a_level": 0,
        "levels_not_finite": [[0, 1, np.nan, 1, 1]],
        "complex_levels": np.zeros((1, 5), np.complex64),
    }.items():
        yield f"var_{name}", var | {"lvl_1L": np.array(levels)}
    long = {"pos_1LC": np.zeros((1, 40000, 1), np.float32), "lvl_1L": np.full((1, 40000), level)}
    yield "var_40000_tokens", var | long
    long = {"pos_1LC": np.zeros((1, 10**6, 1), np.int8), "lvl_1L": np.full((1, 10**6), level)}
    yield "var_1000000_tokens", var | long
    ones = {"pos_1LC": np.zeros((1, 3000, 8), np.float32), "lvl_1L": np.arange(3000)[None]}
    ones |= {"lvl_embed.weight": np.zeros((3000, 8), np.float32)}
    yield "var_3000_scales", var | ones
    yield "var_3000_scales_of_a_tokenizer", {f"quantize.quant_resi.{i}.weight": number
        for i in range(3000)} | vq  # fmt: skip
    wide = {"word_embed.weight": np.zeros((2**18, 1), np.int8)}
    wide |= {"blocks.0.attn.scale_mul_1H11": np.zeros((1, 8, 1, 1), np.int8)}
    yield "var_262144_channels", var | wide
    heads = {"word_embed.weight": np.zeros((2**15, 1), np.int8)}
    heads |= {"blocks.0.attn.scale_mul_1H11": np.zeros((1, 2**15, 1, 1), np.int8)}
    yield "var_32768_heads", var | heads
    blocks = {f"blocks.{i}.x": number for i in range(10000)}
    yield "var_10000_blocks", var | blocks
    for name in ("head.weight", "class_emb.weight", "word_embed.weight", "pos_1LC"):
        rank = var[name].ndim
        yield f"var_no_{name}", var | {name: np.zeros((0,) * rank, np.float32)}
        wide = np.zeros((2**30,) * (rank - 1) + (0,), np.float32)
        yield f"var_huge_{name}", var | {name: wide}
        yield f"var_numbers_{name}", var | {name: number}
    yield "var_heads_of_nothing", var | {"blocks.0.attn.scale_mul_1H11": np.zeros((0, 1))}

    for name in ("class_emb.weight", "z_proj.weight", "diffusion_pos_embed_learned"):
        yield f"mar_no_{name}", mar | {name: np.zeros((0,) * mar[name].ndim, np.float32)}
    wide = {"class_emb.weight": np.zeros((4, 2**18), np.int8)}
    wide |= {"diffusion_pos_embed_learned": np.zeros((1, 4, 2**18), np.int8)}
    yield "mar_262144_channels", mar | wide
    blocks = {f"encoder_blocks.{i}.x": number for i in range(10000)}
    yield "mar_10000_blocks", mar | blocks

    yield "vq_hits_of_nothing", vq | {"quantize.ema_vocab_hit_SV": np.zeros((), np.float32)}
    for kind, tensors in (("vq", vq), ("kl", kl)):
        for name, x in {
            "encoder.conv_in.weight": np.zeros((0, 3, 3, 3), np.float32),
            "encoder.down.1.block.0.conv1.weight": np.zeros((0, 8, 3, 3), np.float32),
        }.items():
            yield f"{kind}_no_{name}", tensors | {name: x}
        conv = tensors["encoder.down.0.block.0.conv1.weight"]
        levels = {f"encoder.down.{i}.block.0.conv1.weight": conv for i in range(200)}
        yield f"{kind}_200_levels", tensors | levels
        block = {f"encoder.down.0.block.{i}.conv1.weight": conv for i in range(2000)}
        yield f"{kind}_2000_blocks", tensors | block
        none = {n: x for n, x in tensors.items() if not n.startswith("encoder.down.")}
        yield f"{kind}_no_levels", none


def headers() -> Iterator[tuple[str, bytes]]:
    """Yields named headers of .safetensors files that have 16 bytes of data, or none."""
    one = '{"x":{"dtype":"F32","shape":[%s],"data_offsets":[0,%d]}}'
    long = "x" * 2**19
    for name, text in {
        "80000_axes": one % ("1," * 79999 + "4", 16),
        "65_axes": one % ("1," * 64 + "4", 16),
        "strings": one % ('"4","x"', 16),
        "a_huge_number": one % ("9" * 5000, 16),
        "a_huge_side": one % (2**64 - 1, 16),
        "fractions": one % ("1e400", 16),
        "empty_but_huge": one % (f"0,{2**62},{2**62}", 0),
        "empty_and_huge": one % (f"{2**63},0", 0),
        "many_zeros": one % ("0," * 10**6 + "0", 0),
        "nested": '{"x":' + "[" * 10**6,
        "a_type_of_escapes": one.replace("F32", "\\u001b[2J") % (4, 16),
        "a_long_type": one.replace("F32", long) % (4, 16),
        "a_long_shape": one.replace("[%s]", f'"{long}"') % 16,
        "a_long_name": one.replace("x", long, 1) % (4, 16),
        "a_name_of_escapes": one.replace("x", "\\u001b[2J", 1) % (4, 16),
        "prefixes": one.replace("x", "module." * 80000, 1) % (4, 16),
    }.items():
        yield name, text.encode()
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    yield (
        "70000_tensors",
        json.dumps({f"{i}": entry for i in range(70000)}, separators=(",", ":")).encode(),
    )
    some = {f"{i}": entry for i in range(10000)}
    yield (
        "unexpected_tensors",
        json.dumps(some | {"word_embed.weight": entry}, separators=(",", ":")).encode(),
    )


def zip_files(path: pathlib.Path) -> Iterator[str]:
    """Writes hostile zip files to `path`, one after another, and yields the name of each."""
    good = entries(x=tensor((24,), (1,)))
    content = archive(path, good).read_bytes()
    start, end = content.index(b"PK\x01\x02"), content.rindex(b"PK\x05\x06")
    member = content[end - 46 - len("net/data/0") : end - len("net/data/0")]
    members = b"".join(member + b"%010d" % i for i in range(80000))
    size = struct.pack("<I", end - start + len(members))
    end_record = content[end : end + 12] + size + content[end + 16 :]
    path.write_bytes(content[:end] + members + end_record)
    yield "80000_members"
    archive(path, good)
    content = path.read_bytes()
    end = content.rindex(b"PK\x05\x06")
    claimed = content[: end + 12] + struct.pack("<I", 2**31) + content[end + 16 :]
    path.write_bytes(claimed)
    yield "a_long_list_of_members"
    for name, field, value in (
        ("claimed_unpacked", 24, 2**32 - 2),
        ("claimed_packed", 20, 2**32 - 2),
        ("a_far_member", 42, 2**32 - 2),
        ("unpacked_to_nothing", 24, 0),
    ):
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            content = archive(path, good, method=method).read_bytes()
            for i, member in enumerate(("data.pkl", "byteorder", "data/0")):
                at = content.index(b"PK\x01\x02")
                for _ in range(i):
                    at = content.index(b"PK\x01\x02", at + 4)
                changed = content[: at + field] + struct.pack("<I", value)
                path.write_bytes(changed + content[at + field + 4 :])
                yield f"{name}_{member.replace('/', '_')}_{method}"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("net/data.pkl", good)
        file.writestr("net/byteorder", bytes(2**24))
        file.writestr("net/data/0", bytes(2**24))
    yield "zeros"
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    for size in (len(good), 6, 96):  # false uncompressed sizes
        content[at + 24 : at + 28] = struct.pack("<I", size)
        at = content.find(b"PK\x01\x02", at + 4)
    path.write_bytes(content)
    yield "zeros_that_claim_to_be_few"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("net/data.pkl", b"\x80\x02" + b"]" * (2**24 - 10) + b".")
    yield "a_pickle_of_zeros"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("net/data.pkl", "net/data/0", "net/data/1"):
            file.writestr(name, good)
    path.write_bytes(path.read_bytes().replace(b"net/data/1", b"net/data/0"))
    yield "equal_names"


def legacy_files() -> Iterator[tuple[str, bytes]]:
    """Yields named files in the format before PyTorch 1.6."""
    old = stored()[:-2] + b"NtQ"
    for name, count in (("2_70", 2**70), ("2_62", 2**62), ("2_40", 2**40), ("2_1000", 2**1000)):
        huge = tensor((1,), (1,), storage=stored(count=count)[:-2] + b"NtQ")
        yield f"a_count_of_{name}", legacy_file(huge, ["0"], DATA)
    x = tensor((24,), (1,), storage=old)
    keys = ["0"]
    for _ in range(60):
        keys = [keys, keys]
    yield "nested_keys", legacy_file(x, keys, DATA)
    yield "keys_twice", legacy_file(x, ["0", "0"], DATA, DATA)
    yield (
        "keys_of_numbers",
        legacy_file(x, [k * hostile_pickles.MERSENNE for k in range(10000)], DATA),
    )
    nested = hostile_pickles.doubling(b".")
    yield "nested_version", MAGIC + nested
    yield "nested_machine", MAGIC + pickle.dumps(1001, 2) + nested
    yield "a_long_key", legacy_file(x, ["0" * 2**19], DATA)
    yield "many_operations", MAGIC + b"]" * 2**22 + b"."


def graphs() -> Iterator[tuple[str, bytes]]:
    """Yields named TensorFlow graphs."""

    def field(number: int, content: bytes) -> bytes:
        length, rest = b"", len(content)
        while rest > 127:
            length, rest = length + bytes([rest & 127 | 128]), rest >> 7
        return bytes([number << 3 | 2]) + length + bytes([rest]) + content

    def constant(name: bytes, tensor: bytes) -> bytes:
        value = field(1, b"value") + field(2, field(8, b"\x08\x01" + tensor))
        return field(1, field(1, name) + field(2, b"Const") + field(5, value))

    shape = field(2, b"".join(field(2, b"\x08\xff\xff\xff\xff\x0f") for _ in range(3)))
    yield "a_wide_constant", constant(b"softmax/weights", shape + b"\x2d\0\0\0\0")
    negative = field(2, field(2, b"\x08" + b"\xff" * 9 + b"\x01"))
    yield "a_negative_constant", constant(b"softmax/weights", negative + b"\x2d\0\0\0\0")
    many = 4 * 10**6
    yield "many_axes", constant(b"x", field(2, b"\x12\x00" * many))
    yield "many_nodes", b"\x0a\x00" * many
    yield "many_attributes", field(1, b"\x2a\x00" * many)
    yield "many_inputs", field(1, b"\x1a\x00" * many)
    yield "many_numbers", constant(b"x", b"\x2d\0\0\0\0" * many)
    yield "a_long_text", constant(b"\xff" * 2**22, b"")
    yield "numbers_for_messages", b"\x08\x01" + field(1, b"\x08\x01\x10\x01\x28\x01")
    yield "no_end", b"\xff" * 100


def write_corpus(folder: pathlib.Path) -> None:
    """Writes all hostile files; the first part of a name is the flag that reads the file."""
    for name, content in hostile_pickles.pickles():
        archive(folder / f"var.pickle.{name}", content)
    for name, tensors in state_dicts():
        flag = {"vq": "tokenizer"}.get(kind := name.partition("_")[0], kind)
        write_safetensors(folder / f"{flag}.tensors.{name}", tensors, {})
    for name, header in headers():
        content = struct.pack("<Q", len(header)) + header + bytes(0 if b"0,0]" in header else 16)
        (folder / f"var.safetensors.{name}").write_bytes(content)
    path = folder / "zip"
    for name in zip_files(path):
        (folder / f"var.zip.{name}").write_bytes(path.read_bytes())
    path.unlink()
    for name, content in legacy_files():
        (folder / f"var.legacy.{name}").write_bytes(content)
    for name, content in hostile_images.images():
        (folder / f"image.{name}").write_bytes(content)
    for name, content in graphs():
        (folder / f"inception.graph.{name}.pb").write_bytes(content)
