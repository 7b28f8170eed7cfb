"""Makes small pickles that demand much memory or time from their reader."""

import pickle
import pickletools
import struct
from collections.abc import Iterator

from tests.helpers.checkpoint_files import entries, stored, tensor

MERSENNE = 2**61 - 1  # all its multiples have the same hash
WIDE = tensor((2**17,), (0,))  # one stored number, expanded by a stride of 0
WIDER = tensor((2**24,), (0,))


def plain(value) -> bytes:
    """Returns the opcodes of plain data, which do not change the memo."""
    return pickletools.optimize(pickle.dumps(value, 2))[2:-1]


def doubling(last: bytes, levels: int = 60) -> bytes:
    """Returns a pickle whose memo entry 0, used by the opcodes `last`, is deeply nested pairs."""
    return b"\x80\x02]q\x00" + b"".join(b"(h\x00h\x00tq\x00" for _ in range(levels)) + last


def again_and_again(function: bytes, argument: bytes, call: bytes, times: int) -> bytes:
    """Returns a pickle of a list of calls; memo entry 1 is the function, entry 2 an argument."""
    return b"\x80\x02" + function + b"q\x01" + argument + b"q\x02](" + call * times + b"e."


def pickles() -> Iterator[tuple[str, bytes]]:
    """Yields pickles for the zip format, named by their fault."""
    rebuild = b"ctorch._utils\n_rebuild_tensor\n"
    for name, arguments in {
        "size_is_a_tensor": plain(0) + WIDE + plain((1,)),
        "stride_is_a_tensor": plain(0) + plain((1,)) + WIDE,
        "offset_is_a_tensor": WIDE + plain((1,)) + plain((1,)),
        "rank_20000": plain(0) + plain((1,) * 20000) + plain((1,) * 20000),
        "rank_65": plain(0) + plain((1,) * 65) + plain((1,) * 65),
        "empty_but_huge": plain(0) + plain((2**47, 2**47, 0)) + plain((1, 1, 1)),
        "huge_size": plain(0) + plain((2**2000,)) + plain((1,)),
        "true_is_a_size": plain(0) + plain((True,)) + plain((1,)),
        "stride_0": plain(0) + plain((10**9,)) + plain((0,)),
    }.items():
        yield name, entries(x=rebuild + b"(" + stored() + arguments + b"tR")
    expanded = b"(" + stored() + plain(0) + plain((2**15,)) + plain((0,)) + b"t"
    of_rank_64 = b"(" + stored() + plain(0) + plain((1,) * 64) + plain((1,) * 64) + b"t"
    yield "many_of_rank_64", again_and_again(rebuild, of_rank_64, b"h\x01h\x02R", 170000)
    yield "many_expanded", again_and_again(rebuild, expanded, b"h\x01h\x02R", 20000)
    for function in ("torch\nSize", "collections\nOrderedDict", "builtins\nset", "torch\ndevice"):
        call = b"\x80\x02c" + function.encode() + b"\n" + WIDE + b"\x85R."
        yield f"{function.split()[1]}_of_a_tensor", call
        yield f"{function.split()[1]}_of_a_wide_tensor", call.replace(WIDE, WIDER)
    yield "arguments_are_a_tensor", b"\x80\x02ctorch\nSize\n" + WIDE + b"R."
    yield "storage_is_a_tensor", b"\x80\x02" + WIDE + b"Q."
    dense = tensor((2,) * 17, (0,) * 17)  # with axes too short for NumPy to abbreviate
    kind = b"ctorch\nFloatStorage\n"
    rest = plain("cpu") + b"K\x01tQ."
    yield "kind_is_a_tensor", b"\x80\x02(" + dense + kind + plain("0") + rest
    yield "key_is_a_tensor", b"\x80\x02(" + plain("storage") + kind + dense + rest
    yield "tensor_among_settings", entries(x=tensor((1,), (1,)), y=b"](" + dense + b"e")

    # Written as opcodes, because building a dict of these keys is as slow as reading one.
    keys = [b"\x8a\x0b" + (k * MERSENNE).to_bytes(11, "little") for k in range(20000)]
    yield "equal_hashes", b"\x80\x02}(" + b"".join(k + b"N" for k in keys) + b"u."
    yield "equal_hashes_in_a_set", b"\x80\x04\x8f(" + b"".join(keys) + b"\x90."
    pairs = plain([[i, i] for i in range(2000)])
    ordered, encode = b"ccollections\nOrderedDict\n", b"c_codecs\nencode\n"
    yield "copied_dicts", again_and_again(ordered, pairs, b"h\x01h\x02\x85R", 20000)
    yield (
        "copied_sets",
        again_and_again(b"cbuiltins\nset\n", plain(list(range(2000))), b"h\x01h\x02\x85R", 20000),
    )
    text = plain(("x" * 2**17, "latin1"))
    yield "copied_bytes", again_and_again(encode, text, b"h\x01h\x02R", 20000)
    settings = plain({f"k{i}": i for i in range(2000)})
    build = b"h\x01)\x81h\x02b"
    yield "copied_settings", again_and_again(b"cargparse\nNamespace\n", settings, build, 20000)

    for name, last in {
        "nested_key": b"}h\x00K\x01s.",
        "nested_device": b"ctorch\ndevice\nh\x00\x85R.",
        "nested_name": b"ctorch\nSize\nh\x00\x93.",
        "nested_size": b"ctorch\nSize\nh\x00\x85R.",
        "nested_kind": b"(h\x00h\x00h\x00h\x00h\x00tQ.",
        "nested_encoding": encode + plain("x") + b"h\x00\x86R.",
        "nested_dtype": b"cnumpy\ndtype\nh\x00K\x00K\x00\x87R.",
        "nested_entries": b"}" + plain("x") + b"h\x00s.",
        "nested_state_dict": b"}(" + plain("model") + b"}" + plain("x") + b"h\x00su.",
    }.items():
        yield name, doubling(last)
    yield "lists_100000_deep", b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."
    yield "tuples_100000_deep", b"\x80\x02)" + b"\x85" * 10**5 + b"."
    yield "a_list_of_itself", b"\x80\x02]q\x00h\x00a."
    loop = b"\x80\x02}q\x00(" + b"".join(plain(key) + b"h\x00" for key in ("model", "trainer"))
    yield "a_dict_of_itself", loop + plain("var_wo_ddp") + b"h\x00u."
    tree = b"\x80\x02}q\x00" + b"".join(b"}(K\x00h\x00K\x01h\x00uq\x00" for _ in range(60))
    yield "a_tree_of_shared_dicts", tree + b"."

    yield "a_million_sets", b"\x80\x04" + b"\x8f" * 10**6 + b"."
    yield "a_million_memos", b"\x80\x04N" + b"\x94" * 10**6 + b"."
    long = "x" * 2**19
    yield "a_long_name", b"\x80\x02c" + long.encode() + b"\nx\n."
    yield "a_long_stack_name", b"\x80\x02" + plain(long) + plain(long) + b"\x93."
    yield "a_long_storage", entries(x=tensor((1,), (1,), storage=stored(key=long)))
    yield "a_long_kind", entries(x=stored().replace(plain("storage"), plain(long)))
    yield "a_long_string", b"\x80\x02S" + long.encode() + b"\n."
    yield "a_long_integer", b"\x80\x02I" + b"9" * 2**19 + b"\n."
    yield "a_long_entry", entries(**{long: plain(1)})
    yield "a_huge_count", entries(x=tensor((1,), (1,), storage=stored(count=2**70)))
    x = tensor((1,), (1,))
    yield "names_of_prefixes", entries(**{"module." * 80000: x})
    yield "a_name_of_escapes", entries(**{"\x1b[2J": x})
    yield "names_are_numbers", b"\x80\x02}K\x00" + x + b"s."
    names = ["word_embed.weight", *(f"{i}.x" for i in range(100000))]
    named = [b"X" + struct.pack("<I", len(name)) + name.encode() for name in names]
    yield (
        "100000_names",
        b"\x80\x02}(" + named[0] + x + b"q\x00" + b"h\x00".join([b"", *named[1:]])[2:] + b"h\x00u.",
    )
    yield "trainer_s_arrays", entries(var_wo_ddp=tensor((2,), (1,)))
