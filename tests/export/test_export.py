"""Tests that exported folders draw the images of their model, without varjax."""

import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from PIL import Image

import varjax
from tests.helpers import runs
from tests.helpers.imports import imported_modules
from varjax.checkpoints.class_names import ClassNames
from varjax.cli.info import facts_table, read_facts
from varjax.errors import InputError
from varjax.export import __main__ as command
from varjax.export import exported_model, folder, run
from varjax.export.__main__ import main
from varjax.export.folder import export_model, option_facts
from varjax.export.sampler import ExportedSampler, load_exported
from varjax.mar import masking
from varjax.mar.sample import MAROptions
from varjax.storage.image_files import to_uint8
from varjax.storage.safetensors_io import read_safetensors
from varjax.var.sample import VAROptions

LABELS = [3, 1, 10]
PICTURES = np.random.default_rng(0).integers(256, size=(2, 8, 8, 1), dtype=np.uint8)
NEEDED = {"jax", "numpy", "safetensors"}


@functools.cache
def model(family):
    return varjax.load(runs.untrained_var() if family == "var" else runs.untrained_mar())


class HashableDict(dict):
    __hash__ = object.__hash__  # pyright: ignore


NO_GUIDANCE, ONE_STEP = HashableDict(guidance=1.0), HashableDict(steps=1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Returns a cached function that exports a tiny model of a family."""

    @functools.cache
    def export(family, **settings):
        out = tmp_path_factory.mktemp("exported") / family
        location = runs.untrained_var() if family == "var" else runs.untrained_mar()
        export_model(location, out, **({"platforms": ["cpu"]} | settings))
        return out

    return export


def edited_about(source, out, **changes):
    """Copies an exported folder, and replaces entries of its model.json."""
    shutil.copytree(source, out)
    about = json.loads((out / "model.json").read_text())
    (out / "model.json").write_text(json.dumps(about | changes))
    return out


@pytest.mark.slow
def test_samples_are_bit_identical(exported):
    sampler = load_exported(exported("var"))
    assert "8x8 pixels, 1 channel" in repr(sampler) and "guidance=1.5" in repr(sampler)
    for given in (
        {"labels": LABELS, "seed": 2**32 - 1, "index": [5, 2**32 - 1, 0]},
        {"labels": LABELS, "guidance": 2.5, "top_k": 3, "top_p": 0.9, "temperature": 0.7},
    ):
        expected = np.asarray(model("var").sample(**given))
        np.testing.assert_array_equal(sampler.sample(**given), expected)
    assert len(np.unique(expected)) > 50  # the images are not uniform


@pytest.mark.slow
def test_encoding_decoding_and_edits_are_bit_identical(exported):
    own, sampler = model("var"), load_exported(exported("var"))
    token_BL = sampler.encode(PICTURES)
    np.testing.assert_array_equal(token_BL, own.encode(PICTURES))
    images = sampler.decode(token_BL)
    np.testing.assert_array_equal(images, own.decode(token_BL))
    np.testing.assert_array_equal(sampler.encode(images), own.encode(images))
    keep = np.arange(4)[:, None] >= np.full(4, 2)
    edited = sampler.edit(PICTURES[:1], keep, seed=3, index=[4, 9])
    np.testing.assert_array_equal(edited, own.edit(PICTURES[:1], keep, seed=3, index=[4, 9]))


@pytest.mark.slow
def test_mar_edits_are_bit_identical_for_any_number_of_kept_tokens(exported, monkeypatch):
    monkeypatch.setattr(masking, "MAX_GROUPS", 2)  # fewer programs
    own = model("mar")
    sampler = load_exported(exported("mar", what=("edit",), options=ONE_STEP))
    keep_Nhw = np.arange(16).reshape(4, 4) < np.array([0, 0, 13, 13])[:, None, None]
    # In one call, images with different numbers of kept tokens run different programs.
    numbers = {"guidance": 2.0, "temperature": 0.9, "seed": 5}
    edited = sampler.edit(PICTURES[:1], keep_Nhw, [3, 1, 3, 1], index=range(4), **numbers)
    for rows in (slice(0, 2), slice(2, 4)):
        index = np.arange(4)[rows]
        given = numbers | ONE_STEP | {"labels": [3, 1], "index": index}
        expected = own.edit(PICTURES[:1], keep_Nhw[rows], **given)
        np.testing.assert_array_equal(edited[rows], expected)


BLOCKED = """
import importlib.metadata, runpy, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(name)

BLOCKED = {"varjax", *importlib.metadata.packages_distributions()}
BLOCKED -= {"jax", "jaxlib", "ml_dtypes", "numpy", "opt_einsum", "scipy"}  # those of JAX
BLOCKED -= {"safetensors", "flatbuffers"}  # the latter is in the folder
assert len(BLOCKED) > 20
folder, *arguments = sys.argv[1:]
sys.path.insert(0, folder)
sys.meta_path.insert(0, Blocker())
sys.argv = ["run.py", *arguments]
try:
    runpy.run_path(f"{folder}/run.py", run_name="__main__")
finally:
    assert sys.modules["flatbuffers"].__file__.startswith(folder)
"""


@pytest.mark.slow
def test_run_py_needs_only_jax_numpy_and_safetensors(exported, tmp_path):
    picture = tmp_path / "x.png"
    command = [sys.executable, "-c", BLOCKED, str(exported("var"))]
    command += ["--labels=3,1,10", "--seed=7", "--guidance=2", f"--out={picture}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"{picture}: 3 images\n", done.stderr
    images_NHWC = to_uint8(np.asarray(model("var").sample(LABELS, seed=7, guidance=2.0)))
    with Image.open(picture) as image:
        np.testing.assert_array_equal(
            np.asarray(image)[..., None], np.concatenate([*images_NHWC], axis=1)
        )


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--count=0", "count=0: must be 1 or more"),
        ("--out=x.npz", "out=x.npz: must end in .png"),
        ("--out=none/x.png", "out=none/x.png: the folder does not exist"),
        ("--out=folder.png", "out=folder.png: is a folder"),
    ],
)
def test_run_py_refuses_bad_flags_before_drawing(flag, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    model = types.SimpleNamespace(about={"options": {}})  # without `sample`
    fake = types.SimpleNamespace(ExportedModel=lambda: model)
    monkeypatch.setitem(sys.modules, "exported_model", fake)
    monkeypatch.setattr(sys, "argv", ["run.py", "--labels=3", flag])
    assert run.main() == 1
    assert message in capsys.readouterr().err


def test_digits_are_class_numbers_even_if_classes_have_digits_as_names():
    own = object.__new__(exported_model.ExportedModel)
    own.about = {"class_names": ["1", "10", "2", "two"], "classes": 4}
    np.testing.assert_array_equal(own._numbers(["2", "1", "two", 0]), [2, 1, 3, 0])


@pytest.mark.parametrize("images_BHWC", [PICTURES.astype(int), PICTURES.astype(np.float32)])
def test_encode_refuses_images_of_another_dtype_or_range(images_BHWC):
    with pytest.raises(ValueError, match=f"images are {images_BHWC.dtype}, 0.* … 24.*; give uint8"):
        object.__new__(exported_model.ExportedModel).encode(images_BHWC)


class WithoutPrograms(exported_model.ExportedModel):
    """Checks arguments like an exported model, but runs no program."""

    def __init__(self, **about):
        option = {"least": 1, "most": 9.0, "whole": False}
        programs = [{"name": name, "platform": "cpu"} for name in ("sample", "decode", "edit")]
        programs += [{"name": "encode_uint8", "platform": "cpu"}]
        self.about = {"classes": 10, "class_names": [], "edit_shape": [4, 4], "vocab": 16}
        self.about |= {"programs": programs, "options": {"guidance": option}, "numbers": {}} | about
        self.platform = "cpu"

    def _run(self, programs, batch, seed=0, options=None, kept_B=None):
        self._options(options or {})
        return batch[-1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": [8]}, "1 labels; needed are 2"),
        ({"labels": [8, 7, 6]}, "3 labels; needed are 2"),
        ({"index": [0, 1, 2]}, "2 images and 3 of index"),
        ({"index": [0.5, 1]}, "needed are 2 whole numbers"),
        ({"keep": True}, r"keep has shape \(\); allowed are \(4, 4\), \(2, 4, 4\)"),
        ({"keep": np.ones(4, bool)}, r"keep has shape \(4,\)"),
        ({"keep": np.ones((2, 1, 1), bool)}, r"keep has shape \(2, 1, 1\)"),
        ({"guidance": "2"}, "guidance=2: allowed are 1 … 9.0"),
        ({"guidance": None}, "guidance=None: allowed are"),
        ({"guidance": [2.0]}, "guidance=.*: allowed are"),
    ],
)
def test_bad_edits_are_refused_before_a_program_runs(given, message):
    own, keep_hw = WithoutPrograms(), np.ones((4, 4), bool)
    assert own.edit(PICTURES, keep_hw, labels=[8, 7], guidance=2).shape == (2, 4, 4)
    assert own.edit(PICTURES[:1], np.ones((3, 4, 4), bool), index=[4, 5, 6]).shape == (3, 4, 4)
    with pytest.raises(ValueError, match=message):
        own.edit(PICTURES, **{"keep": keep_hw} | given)


def test_a_single_label_draws_one_image():
    own = WithoutPrograms(classes=20)
    for label in ("12", 12, np.int64(12)):
        np.testing.assert_array_equal(own._numbers(label), [12])
    assert len(own.sample("12")) == 1


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[0, 16]], "tokens are outside of 0 … 15"),
        ([[0, -1]], "tokens are outside of 0 … 15"),
        ([[0, 0.9]], "tokens are float64; give integers"),
        ([[False]], "tokens are bool; give integers"),
        (3, r"tokens have shape \(\)"),
    ],
)
def test_decode_refuses_tokens_outside_the_vocabulary(tokens, message):
    np.testing.assert_array_equal(WithoutPrograms().decode([[0, 15]]), [[0, 15]])
    with pytest.raises(ValueError, match=message):
        WithoutPrograms().decode(tokens)


def test_latents_have_no_vocabulary():
    codes = varjax.load(runs.untrained_mar_over_codes())
    found = [folder.model_facts(x)["vocab"] for x in (model("var"), model("mar"), codes)]
    assert found == [runs.TOKENIZER.vocab, None, runs.TOKENIZER.vocab]
    latents = np.array([[[0.5], [-20.0]]])
    np.testing.assert_array_equal(WithoutPrograms(vocab=None).decode(latents), latents)


def test_class_names_are_resolved_as_in_varjax():
    names = "crane", "Dog", "crane", "cat", "Cat"
    own = object.__new__(exported_model.ExportedModel)
    synsets = "n0", "n1", "n2", "n3", "n4"
    own.about = {"class_names": names, "synsets": synsets, "classes": 5}
    labels = [" 2", "Dog", "dog ", "Cat", "cat", 5, "n4"]
    np.testing.assert_array_equal(own._numbers(labels), [2, 1, 1, 4, 3, 5, 4])
    assert ClassNames(names, synsets).numbers(labels) == [2, 1, 1, 4, 3, 5, 4]
    for label in ("crane", "CAT"):  # names of several classes
        with pytest.raises(ValueError, match=f"'{label}'"):
            own._numbers([label])
        with pytest.raises(InputError, match=f"'{label}' names several .*; give a number"):
            ClassNames(names).numbers([label])


def test_exports_that_draw_different_images_have_different_identities():
    facts = {"classes": 10, "class_names": [], "synsets": [], "weights_digest": "a"}
    facts |= {"image_shape": (8, 8, 1), "edit_shape": (4, 4), "options": {"seed": {"value": 0}}}
    facts |= {"fixed_options": {}, "varjax": "1", "jax": "1"}
    found = []
    for dtype, draft_scales in (("float32", 2), ("bfloat16", 2), ("float32", 1)):
        identity = {"compute": {"dtype": dtype}, "weights": "a", "draft_scales": draft_scales}
        about = facts | {"identity": {"cpu": identity}}
        found.append(ExportedSampler(types.SimpleNamespace(about=about, platform="cpu")).identity())
    assert found[0] != found[1] and found[0] != found[2]


@pytest.mark.parametrize(
    ("flags", "draws"),
    [
        ([], True),
        (["--what=encode,decode"], False),
        (["--platforms=cuda,tpu"], False),
        (["--what=sample", "--platforms=cpu"], True),
    ],
)
def test_the_drawing_command_is_printed_only_if_it_works_here(flags, draws, monkeypatch, capsys):
    monkeypatch.setattr(command, "export_model", lambda *_, **__: None)
    assert main(["--weights=runs/x", "--out=out", *flags]) == 0
    assert capsys.readouterr().out.startswith("out is written; draw: python out/run.py") == draws


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_grid_has_its_images_in_rows(channels):
    images_NHWC = np.random.default_rng(0).random((6, 4, 5, channels), np.float32)
    with Image.open(io.BytesIO(run.grid_png(images_NHWC, columns=2))) as picture:
        pixels = np.asarray(picture).reshape(12, 10, channels)
    np.testing.assert_array_equal(pixels[4:8, 5:], to_uint8(images_NHWC[3]))
    with pytest.raises(ValueError, match="NaN"):
        run.grid_png(np.full_like(images_NHWC, np.nan))


def test_exported_scripts_are_short_and_import_little():
    lines = {}
    for name in folder.SCRIPTS:
        text = (pathlib.Path(exported_model.__file__).parent / name).read_text()
        lines[name] = len(text.splitlines())
        assert imported_modules(text) <= NEEDED | {"exported_model"} | sys.stdlib_module_names
    assert lines["run.py"] <= 100


def test_a_guide_is_refused_if_guidance_is_off(tmp_path):
    weak = str(runs.untrained_var())
    with pytest.raises(InputError, match="guidance is 1, which turns the guide off"):
        export_model(weak, tmp_path / "out", guide=weak, options=NO_GUIDANCE, platforms=["cpu"])


def licensed(folder, license):
    """Copies a tiny model, and adds a license unless it is None."""
    shutil.copytree(runs.untrained_var(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"license": license} if license else config)
    )
    return folder


@pytest.mark.slow
def test_an_export_states_the_licenses_of_all_weights_in_it(tmp_path):
    free, strict, none = (
        licensed(tmp_path / name, license)
        for name, license in (("free", "MIT"), ("strict", "CC BY-NC 4.0"), ("none", None))
    )
    small = {"what": ("sample",), "platforms": ["cpu"], "batch_sizes": (1,)}
    export_model(free, tmp_path / "out", guide=str(strict), **small)
    assert (
        json.loads((tmp_path / "out" / "model.json").read_text())["license"] == "MIT; CC BY-NC 4.0"
    )
    _, metadata = read_safetensors(tmp_path / "out" / "weights.safetensors")
    assert metadata["license"] == "MIT; CC BY-NC 4.0"
    assert folder.joined_licenses([free, none, str(free)]) == {"license": "MIT"}
    assert folder.joined_licenses([none, none]) == {}
    export_model(free, tmp_path / "decode", guide=str(strict), **small | {"what": ("decode",)})
    about = json.loads((tmp_path / "decode" / "model.json").read_text())
    assert about["license"] == "MIT"  # it has no weights of the guide


@pytest.mark.slow
def test_model_json_describes_the_model(exported):
    out = exported("var")
    about = json.loads((out / "model.json").read_text())
    assert about["image_shape"] == [8, 8, 1] and about["classes"] == 10
    assert about["class_names"] == [str(i) for i in range(10)]
    assert about["jax"] == jax.__version__ and about["weights_digest"]
    assert about["identity"] == {"cpu": model("var").identity()}
    assert about["options"].keys() == {"seed", "guidance", "top_k", "top_p", "temperature"}
    assert about["options"]["top_k"]["value"] == 7 and about["options"]["top_k"]["whole"]
    assert about["fixed_options"]["smooth"] is False
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert about["sha256"].keys() == files - {"model.json"}
    assert "Apache License" in (out / "flatbuffers" / "LICENSE").read_text()
    facts = facts_table(read_facts(str(out)))
    assert "exported model" in facts and "top_k=7" in facts and jax.__version__ in facts
    for name, digest in about["sha256"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "given, message",
    [
        ({"labels": [11]}, "allowed are 0 … 9, and 10"),
        ({"labels": ["3:0.5+1:0.5"]}, "no mixes"),
        ({"labels": ["volcano"]}, "no class of this name"),
        ({"labels": [1], "seed": -1}, "seed=-1"),
        ({"labels": [1], "index": [1, 2]}, "expected 1"),
        ({"labels": [1], "guidance": 1}, "guidance=1: .*1.01"),
        ({"labels": [1], "top_p": 1.5}, "top_p=1.5"),
        ({"labels": [1], "smooth": True}, "smooth: not an option"),
        ({"labels": [1], "every_step": True}, "no steps"),
    ],
)
def test_bad_requests_are_refused(exported, given, message):
    with pytest.raises(InputError, match=message):
        load_exported(exported("var")).sample(**given)


def test_the_guidance_timestep_range_is_fixed():
    """The ends are inputs of the program, but nothing in the folder could check their order."""
    options = MAROptions(guidance_timestep_from=200, guidance_timestep_to=800)
    ends = {"guidance_timestep_from": 200, "guidance_timestep_to": 800}
    facts = option_facts(options, {"guidance", *ends})
    assert facts["options"].keys() == {"seed", "guidance"}
    assert (
        ends.items() <= facts["fixed_options"].items() and ends.items() <= facts["numbers"].items()
    )


@pytest.mark.parametrize(("guidance", "least"), [(1.005, 1.005), (3.0, 1.01)])
def test_the_default_guidance_is_within_its_limits(guidance, least):
    facts = option_facts(VAROptions(guidance=guidance), {"guidance"})
    about = facts["options"]["guidance"]
    assert about["value"] == guidance and about["least"] == least
    assert f"{least} or more" in about["help"]


@pytest.mark.slow
def test_the_exported_script_refuses_bad_requests(exported):
    own = exported_model.ExportedModel(exported("var"))
    for given in ({"labels": [11]}, {"labels": ["volcano"]}, {"labels": [1], "seed": 2**32}):
        with pytest.raises(ValueError, match="allowed are (whole numbers )?0 …"):
            own.sample(**given)
    with pytest.raises(ValueError, match="top_k=2.5"):
        own.sample([1], top_k=2.5)
    with pytest.raises(ValueError, match="smooth: not one of"):
        own.sample([1], smooth=True)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"jax": "99.0"}, {"calling_convention": 99}])
def test_an_incompatible_jax_version_is_refused(exported, tmp_path, change):
    out = edited_about(exported("var"), tmp_path / "out", **change)
    with pytest.raises(InputError, match=f"these programs need JAX.*this is jax {jax.__version__}"):
        load_exported(out)


@pytest.mark.parametrize("suffix", ["", "rc1", ".dev20260101", ".dev20260101+0a1b2c3"])
def test_the_jax_version_of_an_export_is_compared_with_the_installed_one(
    suffix, tmp_path, monkeypatch
):
    convention = exported_model.export.maximum_supported_calling_convention_version
    about = {"jax": f"1.10.2{suffix}", "calling_convention": convention, "programs": []}
    about |= {"sha256": {}, "readable_by": "these programs need JAX 1.10.2"}
    (tmp_path / "model.json").write_text(json.dumps(about))
    for newer in ("1.10.2", "1.10.10", "2.0.0rc1"):
        monkeypatch.setattr(jax, "__version__", newer)
        exported_model.ExportedModel(tmp_path)
    for older in ("1.10.1", "1.9.3.dev20260101", "0.11.0"):
        monkeypatch.setattr(jax, "__version__", older)
        with pytest.raises(ValueError, match=f"need JAX 1.10.2; this is jax {older}"):
            exported_model.ExportedModel(tmp_path)


@pytest.mark.slow
def test_damaged_and_missing_files_are_refused(exported, tmp_path):
    out = edited_about(exported("var"), tmp_path / "out")
    model = load_exported(os.path.relpath(out))
    os.chdir("/")  # files are read at first use, by absolute paths
    for name in ("programs/sample.cpu.bin", "weights.safetensors"):
        whole = (out / name).read_bytes()
        flipped = bytes([whole[-100] ^ 1])
        (out / name).write_bytes(whole[:-100] + flipped + whole[-99:])
        with pytest.raises(InputError, match=f"{name} is damaged"):
            model.sample([1])
        (out / name).unlink()
        with pytest.raises(InputError, match=f"{name} is missing"):
            model.sample([1])
        (out / name).write_bytes(whole)
    assert model.sample([1]).shape[0] == 1
    for text in ("{}", "[]", "{"):
        (out / "model.json").write_text(text)
        with pytest.raises(InputError, match=str(out)):
            load_exported(out)


@pytest.mark.slow
def test_accelerators_get_their_own_programs_and_bfloat16_weights(exported):
    out = exported("var", platforms=("cuda", "tpu"), what=("sample",), batch_sizes=(2,))
    tensors, _ = read_safetensors(out / "weights.safetensors")
    kernels = {
        x.dtype.name for path, x in tensors.items() if "var/blocks" in path and "kernel" in path
    }
    assert kernels == {"bfloat16"}
    assert not [path for path in tensors if "encoder" in path]
    programs = sorted(path.name for path in (out / "programs").iterdir())
    assert programs == ["sample.cuda.batch2.bin", "sample.tpu.batch2.bin"]
    with pytest.raises(InputError, match="no program sample for cpu"):
        load_exported(out).sample([1])


@pytest.mark.slow
def test_fixed_batch_sizes_without_guidance_draw_the_same_images(exported):
    own = model("var")
    out = exported("var", what=("sample",), batch_sizes=(2,), options=NO_GUIDANCE)
    sampler = load_exported(out)
    assert "guidance" not in dataclasses.asdict(sampler.options())
    parts = (
        own.sample(labels, index=index, guidance=1.0)
        for labels, index in (([3, 1], [0, 1]), ([4, 4], [2, 2]))
    )
    expected = np.concatenate([*parts])[:3]
    np.testing.assert_array_equal(sampler.sample([3, 1, 4]), expected)
    with pytest.raises(InputError, match="no program edit"):
        sampler.edit(PICTURES, np.zeros((4, 4), bool))


@pytest.mark.parametrize("kind", [VAROptions, MAROptions])
def test_limits_of_options_match_their_checks(kind):
    count = 0
    for field in dataclasses.fields(kind):
        if field.metadata["limits"] is None:
            continue
        count += 1
        least, most = field.metadata["limits"]
        for value in (least, most):
            assert getattr(kind(**{field.name: value}).check(), field.name) == value
        for value in (least - 1, most * 2 + 1):
            with pytest.raises(InputError, match=field.name):
                kind(**{field.name: value}).check()
    assert count >= 4


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--what=draw", "what=draw: allowed are sample, encode, decode, edit"),
        ("--platforms=rocm", "platforms=rocm: allowed are cpu, cuda, tpu"),
        ("--dtype=int8", "dtype=int8: allowed are auto, float32, bfloat16"),
        ("--batch_size=0", "batch_size=0: must be 1 or more"),
        ("--batch_size=x", "batch_size=x: give numbers such as 1,8, or any"),
    ],
)
def test_the_command_refuses_bad_flags(tmp_path, capsys, flag, message):
    assert main([f"--weights={runs.untrained_var()}", f"--out={tmp_path / 'out'}", flag]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder_is_refused_before_compiling(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(folder, "exported_programs", None)
    (tmp_path / "file").write_text("")
    assert main([f"--weights={runs.untrained_var()}", f"--out={tmp_path / 'file' / 'x'}"]) == 1
    assert f"cannot write to {tmp_path / 'file'}" in capsys.readouterr().err


def test_a_folder_with_other_files_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("")
    assert main([f"--weights={runs.untrained_var()}", f"--out={tmp_path}"]) == 1
    assert "mine.txt, which would be lost" in capsys.readouterr().err
