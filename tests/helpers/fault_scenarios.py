"""Describes commands on tiny inputs for fault_sweep.py: their arguments and expected output.

Each command runs in a process that is forked after all imports but before any array is made.
"""

import dataclasses
import hashlib
import importlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Set

import jax
import numpy as np
from PIL import Image

from tests.helpers import runs, tiny
from tests.helpers.kill_commands import digests
from tests.helpers.soak import read_arrays
from varjax.cli import main
from varjax.data import latents
from varjax.data.sources.folder import Folder
from varjax.storage import folders, read_errors
from varjax.training.experiment import Experiment
from varjax.var.task import VARTask

# Shorter waits, as in conftest.py, but with the usual number of pauses.
folders.LISTING_SECONDS, read_errors.READ_PAUSES = 0.0, (0.05, 0.05, 0.05)
for _module, _ in main.COMMANDS.values():  # imported before processes are forked
    importlib.import_module(_module)
CLASSES, PER_CLASS = 10, {"train": 6, "val": 2}
CONFIG = """from tests.helpers import fault_scenarios

def get_config(name):
    return fault_scenarios.experiment(name)
"""
VERSIONS = {
    "numpy",
    "jax",
    "starts",
    "versions",
    "device",
}  # keys of data.json and of reports that may differ


def experiment(name: str) -> Experiment:
    """Returns the config of a scenario; its paths are relative to the command's folder."""
    data = Folder("images", size=8, channels=1)
    short = dict(batch_size=16, log_every=1, eval_every=2, save_every=2, preview_every=2)
    if name == "tiny":
        task = tiny.Tiny(offset_file="offset.txt")
        return Experiment(task, data, "run", steps=4, keep_best="eval/loss", **short)
    assert name in ("images", "latents"), name
    if name == "latents":
        data = latents.CachedLatents("latents")
    task = VARTask(runs.VAR, runs.TOKENIZER, "tokenizer", ema_decay=0.5)
    return Experiment(task, data, "run", steps=2, **short)


def _make_images(folder: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in PER_CLASS.items():
        for label in range(CLASSES):
            (folder / split / f"class_{label}").mkdir(parents=True)
            for i in range(count):
                pixels_HW = rng.integers(256, size=(8, 8), dtype=np.uint8)
                Image.fromarray(pixels_HW).save(folder / split / f"class_{label}" / f"{i}.png")


def make_inputs(folder: pathlib.Path, names: Set[str]) -> None:
    """Writes the named inputs of the scenarios, and what they depend on."""
    _make_images(folder / "images")
    (folder / "offset.txt").write_text("0.5")
    (folder / "config.py").write_text(CONFIG)
    if not names.isdisjoint(("var", "tokenizer", "latents", "torch")):
        os.environ["VARJAX_TEST_RUNS"] = str(folder / "made")
        shutil.copytree(runs.var(), folder / "var")
        shutil.copytree(runs.tokenizer(), folder / "tokenizer")
        shutil.rmtree(folder / "made")
    os.chdir(folder)
    for name, arguments in {
        "run": ["train", "--config=config.py:tiny"],
        "latents": ["cache-latents", *IMAGES, "--out=latents"],
        "torch": ["convert", "--to_torch", "--weights=var", "--out=torch"],
    }.items():
        if name in names and (code := main.main(arguments)):
            raise SystemExit(code)
    if "run" in names:  # as if it had been killed after two of four steps
        shutil.rmtree(folder / "run" / "checkpoints" / "4")
        shutil.rmtree(folder / "run" / "best")


def _digest(tree) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def run_digests(run: pathlib.Path) -> dict[str, str]:
    """Returns digests of everything that a finished run must contain, except logs."""
    digests = {"metrics": json.dumps(tiny.lines(run))}
    for name in ("config.json", "data.json"):
        content = json.loads((run / name).read_text())
        digests[name] = json.dumps({k: v for k, v in content.items() if k not in VERSIONS})
    for kind in ("checkpoints", "best"):
        steps = [path for path in run.glob(f"{kind}/*") if path.name.isdigit()]
        for step in sorted(steps, key=lambda path: int(path.name))[-1:]:
            for item in ("params", "ema", "opt_state"):
                if (step / item).is_dir():
                    digests[f"{kind}/{step.name}/{item}"] = _digest(read_arrays(step / item))
    if (frozen := run / "frozen.safetensors").exists():
        digests["frozen"] = hashlib.sha256(frozen.read_bytes()).hexdigest()
    return digests


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Describes a command.

    Attributes:
        arguments: arguments of `varjax`.
        inputs: names of the inputs that it reads or continues, from `make_inputs`.
        out: name of its output.
        digest: function that returns the digests of the output.
    """

    arguments: tuple[str, ...]
    inputs: tuple[str, ...]
    out: str
    digest: Callable[[pathlib.Path], dict[str, str]] = digests


IMAGES = ("--config=config.py:images", "--augmentations=2", "--shards=2", "--batch_size=16")
TINY = ("images", "offset.txt", "config.py")
SAMPLE = ("sample", "--weights=var", "--labels=0,1,2", "--count=4", "--batch_size=4")
SCENARIOS = {
    "train": Scenario(("train", "--config=config.py:tiny"), TINY, "run", run_digests),
    "resume": Scenario(("train", "--config=config.py:tiny"), (*TINY, "run"), "run", run_digests),
    "train_latents": Scenario(
        ("train", "--config=config.py:latents"),
        ("latents", "tokenizer", "config.py"),
        "run",
        run_digests,
    ),
    "sample_folder": Scenario((*SAMPLE, "--out=samples"), ("var",), "samples"),
    "sample_npz": Scenario((*SAMPLE, "--out=samples.npz"), ("var",), "samples.npz"),
    "cache_latents": Scenario(
        ("cache-latents", *IMAGES, "--out=latents"),
        ("images", "tokenizer", "config.py"),
        "latents",
    ),
    "prepare": Scenario(
        ("prepare", "--folder=images", "--workers=1", "--shards=3", "--out=prepared"),
        ("images",),
        "prepared",
    ),
    "convert": Scenario(
        ("convert", "--tokenizer=torch/tokenizer.pth", "--var=torch/var.pth", "--out=weights")
        + ("--scales=1,2,4", "--heads=2", "--groups=4"),
        ("torch",),
        "weights",
    ),
}
