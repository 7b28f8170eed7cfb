"""Tests loading published models by name, with a stand-in for the Hugging Face Hub."""

import concurrent.futures
import dataclasses
import hashlib
import pathlib
import re
import shutil
import sys
import threading
import time
import types

import numpy as np
import pytest

import varjax
from tests.golden import weights
from tests.helpers import golden_cases as golden
from varjax.checkpoints.license import license_of
from varjax.checkpoints.weights import open_weights
from varjax.cli import train
from varjax.convert import convert, pretrained, resolve_weights
from varjax.convert.apply_map import official_buffers
from varjax.convert.from_torch import published_name
from varjax.convert.name_maps import RELEASES, kinds
from varjax.convert.name_maps.name_map import Source
from varjax.convert.name_maps.release import PublishedFile, Release
from varjax.convert.pth.write import write_pth
from varjax.convert.weights_dir import sha256_of
from varjax.data.sources import Digits
from varjax.errors import InputError
from varjax.evaluation.published import released_sizes
from varjax.models import open_model, read_model, read_tokenizer
from varjax.storage import files
from varjax.storage.safetensors_io import read_safetensors
from varjax.training.experiment import Experiment
from varjax.var.cca import CCAConfig
from varjax.var.sample import VAROptions
from varjax.var.task import VARTask
from varjax.weight_files import convert_to_torch

COMMIT = "0123456789" * 4
FILES = {"tokenizer": "vae.pth", "var": "tiny.pth"}
REPO = "someone/models"
RELEASE = Release({flag: PublishedFile(name, REPO, COMMIT) for flag, name in FILES.items()}, "MIT")


class Hub:
    """Serves files of a folder as huggingface_hub does, and records the requests."""

    def __init__(self, folder):
        self.folder, self.asked, self.broken = folder, [], False

    def hf_hub_download(self, repo, name, revision):
        self.asked.append((repo, name, revision))
        if self.broken:
            raise ConnectionError("no route\nto host")
        return str(self.folder / name)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    tokenizer, var = golden.configs("base")
    write_pth(folder / "vae.pth", weights.state_dict("base", "vae"))
    write_pth(folder / "tiny.pth", weights.state_dict("base", "var") | official_buffers(var))
    return folder


@pytest.fixture
def hub(repository, tmp_path, monkeypatch):
    """Returns the stand-in; "tiny" is a published model, and cache and working folder are empty."""
    hub = Hub(repository)
    library = types.SimpleNamespace(hf_hub_download=hub.hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    monkeypatch.setitem(pretrained.RELEASES, "tiny", RELEASE)
    monkeypatch.setenv("VARJAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return hub


def test_the_first_use_downloads_and_converts_and_later_ones_are_offline(hub, tmp_path):
    _, config, params, _ = read_model("tiny")
    assert config == golden.configs("base")[1]
    np.testing.assert_array_equal(params["head"]["bias"], golden.var_params("base")["head"]["bias"])
    assert hub.asked == [("someone/models", name, COMMIT) for name in ("vae.pth", "tiny.pth")]
    hub.broken = True
    assert read_tokenizer("tiny")[0] == varjax.load_tokenizer("tiny").config
    model = varjax.load("tiny")
    assert (model.tokenizer, model.var) == golden.configs("base")
    assert len(hub.asked) == 2
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"tiny", ".lock", "downloads"}


def test_a_local_path_takes_precedence_over_a_published_model(hub, tmp_path):
    read_model("tiny")
    shutil.copytree(tmp_path / "cache/tiny", "tiny")
    shutil.rmtree(tmp_path / "cache")
    assert read_model("tiny")[1] == golden.configs("base")[1]
    assert len(hub.asked) == 2 and not (tmp_path / "cache").exists()


def test_load_reads_config_json_once(hub, monkeypatch):
    varjax.load("tiny")
    paths, read_json = [], files.read_json
    monkeypatch.setattr(files, "read_json", lambda path: paths.append(path) or read_json(path))
    varjax.load("tiny")
    assert [path.name for path in paths] == ["config.json"]


def test_training_fetches_initial_weights_and_keeps_their_name(hub, tmp_path):
    tokenizer, var = golden.configs("base")
    task = VARTask(var, tokenizer, tokenizer_weights="tiny")
    with pytest.raises(
        InputError, match="task.tokenizer_weights: tiny does not exist; .* .varjax models"
    ):
        task.frozen()
    run = Experiment(task, Digits(), str(tmp_path / "run"), batch_size=1, steps=1, init_from="tiny")
    train.fetch_weights(run)
    assert len(hub.asked) == 2 and run.init_from == task.tokenizer_weights == "tiny"
    shutil.rmtree(tmp_path / "cache/downloads")
    np.testing.assert_array_equal(
        task.frozen()["quantizer"]["codebook"],
        golden.tokenizer_params("base")["quantizer"]["codebook"],
    )
    assert task.pretrained("tiny")[0]["head"]["bias"].shape == (tokenizer.vocab,)
    shutil.rmtree(tmp_path / "cache")
    cca = CCAConfig(reference="tiny", negative_weight=2.0)
    task = dataclasses.replace(task, tokenizer_weights="random", cca=cca)
    train.fetch_weights(dataclasses.replace(run, task=task, init_from=""))
    assert len(hub.asked) == 4 and (tmp_path / "cache/tiny").is_dir()


def test_a_resumed_run_fetches_nothing(hub, tmp_path):
    tokenizer, var = golden.configs("base")
    task = VARTask(var, tokenizer, tokenizer_weights="tiny")
    run = Experiment(task, Digits(), str(tmp_path / "run"), batch_size=1, steps=1, init_from="tiny")
    (tmp_path / "run/checkpoints/1").mkdir(parents=True)
    (tmp_path / "run/frozen.safetensors").touch()
    train.fetch_weights(run)
    assert not hub.asked


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def damage(path):
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1  # one bit of a weight, which no reader can detect
    path.write_bytes(content)


def test_a_file_with_another_hash_than_the_published_is_not_converted(hub, tmp_path, monkeypatch):
    hub.folder = shutil.copytree(hub.folder, tmp_path / "hub")
    known = {name: sha256(hub.folder / name) for name in FILES.values()}
    pinned = {f: PublishedFile(name, REPO, COMMIT, known[name]) for f, name in FILES.items()}
    release = dataclasses.replace(RELEASE, files=pinned)
    monkeypatch.setitem(pretrained.RELEASES, "tiny", release)
    damage(hub.folder / "tiny.pth")
    with pytest.raises(InputError) as error:
        varjax.load("tiny")
    text = str(error.value)
    assert known["tiny.pth"] in text and sha256(hub.folder / "tiny.pth") in text
    assert f"tiny.pth of https://huggingface.co/someone/models at {COMMIT}" in text
    assert f"Delete {hub.folder / 'tiny.pth'} and try again" in text
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]
    with pytest.raises(InputError, match="instead of\n  " + known["tiny.pth"]):
        pretrained.download("someone/models", "tiny.pth")
    damage(hub.folder / "tiny.pth")  # flips the bit back
    read_model("tiny")
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"tiny", ".lock"}


def test_without_a_published_hash_later_downloads_must_match_the_first(hub, tmp_path):
    hub.folder = shutil.copytree(hub.folder, tmp_path / "hub")
    first = sha256(hub.folder / "vae.pth")
    for _ in range(2):
        assert pretrained.download("someone/models", "vae.pth") == hub.folder / "vae.pth"
    assert pretrained.download("other/models", "vae.pth") == hub.folder / "vae.pth"
    assert hub.asked[-1] == ("other/models", "vae.pth", "main")  # a branch, which may change
    record = tmp_path / "cache/downloads/someone/models" / COMMIT / "vae.pth.json"
    assert files.read_json(record) == {"sha256": first}
    damage(hub.folder / "vae.pth")
    pretrained.download("other/models", "vae.pth")
    with pytest.raises(InputError, match=f"instead of\n  {first}\nrecorded in {record}"):
        pretrained.download("someone/models", "vae.pth")
    with pytest.raises(InputError, match=f"instead of\n  {first}"):
        varjax.load("tiny")
    assert not (tmp_path / "cache/tiny").exists()
    with pytest.raises(InputError, match="names must be relative"):
        pretrained.download("..", "vae.pth", COMMIT)
    assert [path.name for path in (tmp_path / "cache/downloads").iterdir()] == ["someone"]


def test_a_failed_conversion_leaves_nothing_and_can_be_repeated(hub, tmp_path, monkeypatch):
    def fill_up(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("varjax.storage.safetensors_io.write_safetensors", fill_up)
        with pytest.raises(InputError, match="cache/tiny could not be written: No space left"):
            varjax.load("tiny")
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {".lock", "downloads"}
    read_model("tiny")


def test_without_network_or_library_the_error_gives_files_and_command(hub, tmp_path, monkeypatch):
    command = f"varjax convert --tokenizer=vae.pth --var=tiny.pth --out={tmp_path / 'cache/tiny'}"
    hub.broken = True
    with pytest.raises(InputError) as error:
        varjax.load("tiny")
    text = str(error.value)
    assert "ConnectionError: no route" in text and "to host" not in text
    assert "download vae.pth and tiny.pth from https://huggingface.co/someone/models and" in text
    assert text.endswith(command)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError) as error:
        varjax.load_tokenizer("tiny")
    text = str(error.value)
    assert "pip install huggingface_hub" in text and text.endswith(command)
    assert 'pip install ".[hub]"' in text


def test_a_step_of_a_published_model_is_refused_before_the_download(hub):
    with pytest.raises(InputError, match="tiny@500: only a training run has checkpoints; leave @5"):
        open_model("tiny@500")
    assert not hub.asked
    resolve_weights("tiny@500")  # may be a local run; its reader reports what is wrong
    assert not hub.asked


def test_missing_paths_and_unknown_names_are_explained(hub):
    with pytest.raises(InputError, match="does not exist; give a run's directory .*var_d16"):
        varjax.load("runs/tiny")
    pathlib.Path("var_d16.pth").write_text("")
    with pytest.raises(InputError, match="var_d16.pth is a file; convert it first"):
        varjax.load("var_d16.pth")
    unknown = "does not exist, and no published model has this name; did you mean 'var_d16'"
    with pytest.raises(InputError, match=f"var_d17 {unknown}"):
        varjax.load("var_d17")
    assert not hub.asked


def test_all_released_models_have_a_name():
    of_var = {"vae_ch160v4096z32", *(f"var_d{depth}" for depth in (16, 20, 24, 30, 36))}
    of_mar = {"kl16", "mar_b", "mar_l", "mar_h"}
    fine_tuned = {name for name in RELEASES if name.startswith("var_d")} - of_var
    assert RELEASES.keys() == of_var | of_mar | fine_tuned
    for name in of_var:
        files = {(file.repo, file.name) for file in RELEASES[name].files.values()}
        assert ("FoundationVision/var", f"{name}.pth") in files
    for name, release in RELEASES.items():
        assert release.license == ("CC BY-NC-SA 4.0 (non-commercial)" if "ddo" in name else "MIT")
        if name.startswith("var"):
            assert release.files["tokenizer"] == RELEASES["vae_ch160v4096z32"].files["tokenizer"]
        if name not in fine_tuned:
            assert all(file.commit for file in release.files.values() if file.repo)
        unknown = {file.name for file in release.files.values() if file.sha256 is None}
        assert name in fine_tuned or unknown == (
            {"var_d36.pth"} if name == "var_d36" else
            {"checkpoint-last.pth"} if name in ("mar_l", "mar_h") else set())  # fmt: skip
    files = {file for release in RELEASES.values() for file in release.files.values()}
    assert all(pretrained.COMMIT.fullmatch(file.commit) for file in files if file.commit)
    digests = [file.sha256 for file in files if file.sha256]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
    assert len(set(digests)) == len(digests) == 7


def test_third_party_fine_tuned_models_have_names_and_their_own_options():
    names = [f"var_d{depth}_cca" for depth in (16, 20, 24, 30)] + ["var_d16_ddo", "var_d30_ddo"]
    names += [f"var_d30_code_drafter_{n}" for n in range(6, 10)]
    names += [f"var_d16_code_refiner_{n}" for n in range(6, 10)]
    official = {"vae_ch160v4096z32", *(f"var_d{depth}" for depth in (16, 20, 24, 30, 36))}
    assert {name for name in RELEASES if name.startswith("va")} == official | set(names)
    for name in names:
        release = RELEASES[name]
        assert released_sizes(release.config) == name[: len("var_d16")]
        assert release.sampling == release.sampling.check()
        assert all(result.options == result.options.check() for result in release.results)
    cca, ddo = RELEASES["var_d24_cca"], RELEASES["var_d30_ddo"]
    assert cca.sampling == VAROptions(guidance=1.0, top_k=900, top_p=0.96)
    assert ddo.sampling == VAROptions(guidance=1.0, top_k=0, top_p=0.0)
    assert [result.metrics["fid"] for result in ddo.results] == [1.79, 1.73]
    assert cca.files["var"].name == "CCA_VAR_Guidance_Free/VAR_d24_CCA.pth"
    assert ddo.files["var"].name == "var_d30-ddo.pth"


def test_published_options_and_license_are_stored_and_exported(hub, tmp_path, monkeypatch, capsys):
    # The file is in a subfolder of a repository without a known commit.
    hub.folder = shutil.copytree(hub.folder, tmp_path / "hub")
    (hub.folder / "CCA").mkdir()
    shutil.copy(hub.folder / "tiny.pth", hub.folder / "CCA/tiny_cca.pth")
    file, options = PublishedFile("CCA/tiny_cca.pth", "others/cca"), VAROptions(1.0, 900, 0.96)
    files_of = RELEASE.files | {"var": file}
    release = Release(files_of, "CC BY-NC 4.0", sampling=options)
    monkeypatch.setitem(RELEASES, "tiny_cca", release)
    model = varjax.load("tiny_cca")
    assert hub.asked[-1] == ("others/cca", "CCA/tiny_cca.pth", "main")
    assert model.sampling == options
    config = files.read_json(tmp_path / "cache/tiny_cca/config.json")
    assert (config["license"], config["release"]) == ("CC BY-NC 4.0", "tiny_cca")
    assert capsys.readouterr().err.count("tiny_cca: license CC BY-NC 4.0") == 1
    assert read_model("tiny_cca")[3] == options and "license" not in capsys.readouterr().err
    # A manual conversion recognizes the file by its name, because its SHA-256 is not known.
    convert("by_hand", tokenizer=hub.folder / "vae.pth", var=hub.folder / file.name)
    assert files.read_json("by_hand/config.json") == config
    convert_to_torch("tiny_cca", "for_pytorch")
    assert read_safetensors("for_pytorch/var.safetensors")[1]["license"] == "CC BY-NC 4.0"
    files.write_json("run/config.json", {"task": {"_type": "VARTask"}, "init_from": "tiny_cca"})
    files.write_json("run2/config.json", {"task": {"_type": "VARTask"}, "init_from": "run"})
    files.write_json("run3/config.json", {"task": {"_type": "VARTask"}, "init_from": "run2@5"})
    files.write_json("run4/config.json", {"task": {"_type": "VARTask"}, "fork_from": "run3@best"})
    told = {"task": {"_type": "VARTask"}, "init_from": "gone", "license": "CC BY-NC 4.0"}
    files.write_json("run5/config.json", told)
    for run in ("run", "run2", "run3", "run4", "run5"):  # directly, through runs, or as recorded
        assert license_of(open_weights(run)) == {"license": "CC BY-NC 4.0"}
    # The branch may move, so later downloads must match the first one.
    damage(hub.folder / file.name)
    with pytest.raises(InputError, match="recorded in .*downloads/others/cca/main/CCA"):
        pretrained.download("others/cca", file.name)


def test_a_published_file_is_recognized_next_to_another_of_its_name(tmp_path, monkeypatch):
    paths = {"tokenizer": tmp_path / "vae/model.pth", "var": tmp_path / "d16/model.pth"}
    for flag, path in paths.items():
        path.parent.mkdir()
        path.write_text(flag)
    digests = sha256_of(paths.values())
    file = PublishedFile("model.pth", REPO, COMMIT, sha256=digests[str(paths["var"])])
    monkeypatch.setitem(RELEASES, "tiny", Release({"var": file}, "MIT"))
    sources = {flag: Source(path, kinds()[flag], {}) for flag, path in paths.items()}
    assert published_name(sources, {"var": None}, digests) == "tiny"
    assert published_name(sources, {"var": None}, digests | {str(paths["var"]): "0"}) is None


def test_mar_is_fetched_at_a_pinned_commit(hub, tmp_path):
    hub.broken = True
    for name, first, flags in (
        ("mar_b", "checkpoint-last.pth", "--mar=checkpoint-last.pth --kl=kl16.ckpt"),
        ("kl16", "kl16.ckpt", "--kl=kl16.ckpt"),
    ):
        with pytest.raises(InputError) as error:
            varjax.load(name)
        assert hub.asked[-1][:2] == ("jadechoghari/mar", first) and len(hub.asked[-1][2]) == 40
        text = str(error.value)
        assert f"{first} " in text and " from https://github.com/LTH14/mar" in text
        assert text.endswith(f"varjax convert {flags} --out={tmp_path / 'cache' / name}")


@pytest.mark.parametrize("name, model", [("mar_l", "MAR-L"), ("mar_h", "MAR-H")])
def test_models_that_no_hub_hosts_are_refused_with_their_download_page(hub, tmp_path, name, model):
    with pytest.raises(InputError) as error:
        varjax.load(name)
    assert not hub.asked and not (tmp_path / "cache" / name).exists()
    text = str(error.value)
    assert f"{name} is neither a path nor in" in text and "no hub hosts its files" in text
    assert f"https://github.com/LTH14/mar (the links of {model} and KL-16) and run" in text
    assert text.endswith(
        f"varjax convert --mar=checkpoint-last.pth --kl=kl16.ckpt --out={tmp_path / 'cache' / name}"
    )


def test_concurrent_requests_download_and_convert_only_once(hub, monkeypatch):
    inside = threading.Semaphore(0)
    download = hub.hf_hub_download

    def slow_download(*arguments, **flags):
        inside.release()
        time.sleep(0.3)  # long enough for the others to arrive
        return download(*arguments, **flags)

    monkeypatch.setattr(sys.modules["huggingface_hub"], "hf_hub_download", slow_download)
    # Threads stand in for processes; the lock belongs to an open file, so it excludes both alike.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(pretrained.resolve_weights, "tiny")
        assert inside.acquire(timeout=60)
        others = [pool.submit(pretrained.resolve_weights, "tiny") for _ in range(2)]
        directories = {future.result() for future in (first, *others)}
    assert len(directories) == 1 and len(hub.asked) == 2
