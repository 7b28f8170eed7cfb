"""Tests weights from runs, which are made without training, and from converted directories."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import varjax
from tests.golden import weights
from tests.helpers import golden_cases as golden
from tests.helpers.tiny import experiment
from varjax.checkpoints.weights import open_weights, read_expected_tokenizer
from varjax.convert import convert
from varjax.convert.pth.read import read_checkpoint
from varjax.convert.pth.write import write_pth
from varjax.data.sources import Digits
from varjax.models import read_model, read_tokenizer
from varjax.storage import files
from varjax.tokenizers.vq.task import VQTask
from varjax.training.checkpoint import Checkpoints
from varjax.training.experiment import Experiment
from varjax.training.run_dir import write_config
from varjax.training.task import TrainState
from varjax.var.sample import VAROptions
from varjax.var.task import VARTask
from varjax.weight_files import convert_run, convert_to_torch

pytestmark = pytest.mark.slow

TOKENIZER, VAR = golden.configs("shared_aln")
SAMPLING = VAROptions(guidance=1.5, top_k=7)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def run_of(task, directory, params, ema=None, frozen=None):
    """Writes a run's directory as training would, and returns it."""
    write_config(Experiment(task, Digits(), str(directory), batch_size=1, steps=1))
    with Checkpoints(directory / "checkpoints") as checkpoints:
        state = TrainState(np.int32(1), params, ema, {"count": np.int32(1)})
        checkpoints.save(1, jax.device_put(state))
        checkpoints.wait()
    if frozen is not None:
        files.write_tensors(directory / "frozen.safetensors", frozen, {})
    return directory


@pytest.fixture
def var_run(tmp_path):
    """Makes a VAR run whose EMA weights are the golden case's and whose parameters differ."""
    task = VARTask(VAR, TOKENIZER, "nowhere", ema_decay=0.9, sampling=SAMPLING)
    ema = golden.var_params("shared_aln")
    params = jax.tree.map(lambda x: x + 1, ema)
    return run_of(task, tmp_path / "run", params, ema, golden.tokenizer_params("shared_aln"))


@pytest.fixture
def tokenizer_dir(tmp_path):
    """Converts a given checkpoint to a directory that contains only a tokenizer."""
    params = golden.tokenizer_params("shared_aln")
    run = run_of(VQTask(TOKENIZER), tmp_path / "tokenizer_run", params)
    convert_run(f"{run}@1", tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_a_converted_run_is_the_same_model(var_run, tmp_path):
    convert_run(var_run, tmp_path / "out")
    for location in (var_run, tmp_path / "out"):
        model = varjax.load(location)
        assert (model.tokenizer, model.var, model.sampling) == (TOKENIZER, VAR, SAMPLING)
        equal(model.params["var"], golden.var_params("shared_aln"))
        equal(model.params["tokenizer"], golden.tokenizer_params("shared_aln"))
    convert_run(var_run, tmp_path / "plain", ema=False)
    for location, ema in ((tmp_path / "plain", None), (var_run, False)):
        _, _, params, _ = read_model(location, ema)
        equal(params, jax.tree.map(lambda x: x + 1, golden.var_params("shared_aln")))
    with pytest.raises(ValueError, match="out is a converted directory already"):
        convert_run(tmp_path / "out", tmp_path / "again")


def test_a_run_converts_to_pytorch_directly(var_run, tmp_path):
    convert_to_torch(var_run, tmp_path / "torch")
    for name, part in (("tokenizer", "vae"), ("var", "var")):
        read = read_checkpoint(tmp_path / f"torch/{name}.pth")
        for key, x in weights.state_dict("shared_aln", part).items():
            assert np.array_equal(read[key], x), key
    with pytest.raises(ValueError, match="torch exists and contains tokenizer.pth"):
        convert_to_torch(var_run, tmp_path / "torch")


def test_a_tokenizer_alone_serves_training_but_not_sampling(tokenizer_dir, tmp_path):
    assert [*open_weights(tokenizer_dir).config["sources"]] == ["tokenizer_run/config.json"]
    task = VARTask(VAR, TOKENIZER, str(tokenizer_dir))
    equal(task.frozen(), golden.tokenizer_params("shared_aln"))
    with pytest.raises(ValueError, match="has only tokenizer; convert it again with --var"):
        varjax.load(tokenizer_dir)
    other = dataclasses.replace(TOKENIZER, phi_ratio=0.25)
    with pytest.raises(ValueError, match="a different tokenizer:\n  phi_ratio: 0.5 there, 0.25"):
        read_expected_tokenizer(open_weights(tokenizer_dir), other)
    convert_to_torch(tokenizer_dir, tmp_path / "torch")
    names = sorted(path.name for path in (tmp_path / "torch").iterdir())
    assert names == ["tokenizer.pth", "tokenizer.safetensors", "tokenizer.varjax.json"]
    with pytest.raises(ValueError, match="VQTask, not of a transformer"):
        varjax.load(tmp_path / "tokenizer_run")
    with pytest.raises(ValueError, match="has no EMA weights; leave ema out, or set it to false"):
        read_tokenizer(tmp_path / "tokenizer_run", ema=True)


def test_a_transformer_alone_asks_for_its_tokenizer(tmp_path):
    write_pth(tmp_path / "var.pth", weights.state_dict("ten_scales", "var"))
    convert(tmp_path / "out", var=tmp_path / "var.pth")
    assert read_model(tmp_path / "out")[1].scales == varjax.SCALES_256
    with pytest.raises(ValueError, match="has only var; convert it again with --tokenizer"):
        varjax.load(tmp_path / "out")


def test_weights_are_memory_mapped(tokenizer_dir):
    _, params = read_tokenizer(tokenizer_dir)
    for leaf in jax.tree.leaves(params):
        base = leaf
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap) and not leaf.flags.writeable


def test_invalid_model_directories_are_refused(var_run, tokenizer_dir, tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist; give a run's directory"):
        varjax.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no config.json"):
        varjax.load(tmp_path)
    for text, message in {
        "[]": r"contains \[\], not a JSON object",
        "{}": "neither to a training run nor to a converted",
    }.items():
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            varjax.load(tmp_path)
    write_config(experiment(tmp_path / "tiny"))
    for read in (varjax.load, read_tokenizer):
        with pytest.raises(ValueError, match="run of Tiny"):
            read(tmp_path / "tiny")
    (var_run / "frozen.safetensors").unlink()
    with pytest.raises(ValueError, match="frozen.safetensors does not exist"):
        varjax.load(var_run)
    path = tokenizer_dir / "config.json"
    intact = path.read_text()
    config = json.loads(intact)
    config["tokenizer"]["vocab"] = 128
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="(?s)does not fit config.json.*quantizer/codebook"):
        read_tokenizer(tokenizer_dir)
    for number, message in {
        2**63: r"tokenizer in .*code_channels is about 10\^19; numbers up to",
        10**30: "not valid JSON .an integer of 31 digits",
    }.items():
        config["tokenizer"]["code_channels"] = number
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            read_tokenizer(tokenizer_dir)
    path.write_text(intact)
    (tokenizer_dir / "tokenizer.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="tokenizer.safetensors: truncated"):
        read_tokenizer(tokenizer_dir)
