"""Damages the files of runs in many ways, and checks that damaged data are never used.

python -m tests.helpers.damage_sweep --folder=DIR [--every=97] [--processes=0] [--limit=0]

`make damage` runs this. It flips every n-th bit in the files of the newest checkpoint, in the copy
of frozen weights, in cached latents, and in parts of samples and features. It also removes, halves,
zeroes and empties each file of the newest checkpoint, and replaces it by that of the previous step.
Either the content that is read equals what was saved (the damage is harmless), or the damage is
detected: the previous step is read, or an error names the file. With --processes=1 or 2, that many
processes instead continue a run after each damage, and its final state must be bit-identical.

Prints a line of JSON for each part, and exits with 1 if any check failed.
"""

import argparse
import contextlib
import io
import itertools
import json
import logging
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from tests.data import test_latent_damage
from tests.helpers import tiny
from tests.helpers.several_processes import together
from varjax.checkpoints.saved_steps import SavedSteps
from varjax.errors import InputError
from varjax.metrics.features import FeatureStore
from varjax.sampling.outputs import NpzOutput
from varjax.storage import files, read_errors
from varjax.training.checkpoint import Checkpoints
from varjax.training.initial_weights import frozen_weights

KINDS = ("removed", "halved", "zeroed", "emptied", "swapped")
TASK = tiny.Tiny(width=4)
ABSTRACT = jax.eval_shape(TASK.init, jax.random.key(0))
SAVED, STEPS = (10, 20), 30
RUNS_TOGETHER = 20  # runs continued by the same processes, which take seconds to start


def damage(file: pathlib.Path, kind: str, other: pathlib.Path | None) -> bool:
    """Damages a file; returns whether its content has changed."""
    content = file.read_bytes()
    if kind == "removed":
        file.unlink()
        return True
    changed = {
        "halved": content[: len(content) // 2],
        "zeroed": bytes(len(content)),
        "emptied": b"",
        "swapped": other.read_bytes() if other is not None and other.is_file() else content,
    }[kind]
    file.write_bytes(changed)
    return changed != content


def flips(content: bytes, every: int, start: int) -> Iterator[bytes]:
    """Yields copies of a file's content, each with one flipped bit: every n-th bit from `start`."""
    for bit in range(start, 8 * len(content), every):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


class Report:
    """Counts cases by their outcome."""

    def __init__(self, part: str):
        self.part, self.counts, self.failures = part, {"harmless": 0, "detected": 0}, []
        self.reasons: dict[str, int] = {}
        self._begin = time.monotonic()

    def case(self, name: str, read: Callable[[], str]) -> None:
        """Counts whether `read` returns "harmless" or "detected"; anything else is a failure."""
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                outcome = read()
        except Exception as error:
            outcome = f"{type(error).__name__}: {str(error)[:300]}"
        if outcome in self.counts:
            self.counts[outcome] += 1
            for kind in re.findall(r"is damaged: (\w+):", said.getvalue())[:1]:
                self.reasons[kind] = self.reasons.get(kind, 0) + 1
        else:
            self.failures.append(f"{name}: {outcome}")

    def finish(self) -> bool:
        seconds = round(time.monotonic() - self._begin)
        report = {"part": self.part, **self.counts, "exceptions": self.reasons}
        report |= {"seconds": seconds, "failures": self.failures}
        print(json.dumps(report), flush=True)
        return not self.failures


def state_of(step: int):
    """Returns a state of random numbers that differ between steps."""
    rng = np.random.default_rng(step)
    fill = lambda x: jnp.asarray((9 * rng.standard_normal(x.shape)).astype(x.dtype))  # noqa: E731
    return jax.tree.map(fill, ABSTRACT)


def same(a, b) -> bool:
    bits = lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes()  # noqa: E731
    return jax.tree.all(jax.tree.map(bits, a, b))


def spread(cases: list, limit: int) -> list:
    """Returns `limit` cases spread evenly over files and kinds of damage; all cases for 0."""
    if not 0 < limit < len(cases):
        return cases
    kinds = len(KINDS)
    # The index of each chosen file's first case.
    firsts = [i * len(cases) // limit // kinds * kinds for i in range(limit)]
    return [cases[(first + i % kinds) % len(cases)] for i, first in enumerate(firsts)]


def sweep_checkpoint(folder: pathlib.Path, every: int, limit: int) -> bool:
    """Flips bits and damages whole files in the newest of two checkpoints."""
    good, run = folder / "good", folder / "run"
    expected = {step: state_of(step) for step in SAVED}
    with Checkpoints(good / "checkpoints") as checkpoints:
        for step, state in expected.items():
            checkpoints.save(step, state, {"best": step / 3})
    placement = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), ABSTRACT)
    older, newest = SAVED

    def read() -> str:
        with Checkpoints(run / "checkpoints") as checkpoints:
            restored = checkpoints.restore(ABSTRACT, placement)
            left = checkpoints.steps()
        assert restored is not None
        step = int(restored[0].step)
        params = SavedSteps(run / "checkpoints").newest(SavedSteps(run / "checkpoints").params)
        if restored[1] != {"best": step / 3} or not same(restored[0].params, expected[step].params):
            return f"step {step} is read as another state"
        if not same(
            (restored[0].ema, restored[0].opt_state), (expected[step].ema, expected[step].opt_state)
        ):
            return f"step {step} is read with another average or optimizer state"
        if not (same(params, expected[step].ema) or same(params, expected[newest].ema)):
            return "its weights alone are read differently"
        if step == newest:
            return "harmless"
        aside = [path.name for path in (run / "unreadable").iterdir()]
        return "detected" if (left, aside) == ([older], [str(newest)]) else f"{left}, {aside}"

    def fresh() -> pathlib.Path:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(good, run)
        return run / "checkpoints" / str(newest)

    names = [p.relative_to(good) for p in sorted((good / "checkpoints" / str(newest)).rglob("*"))]
    names = [name for name in names if (good / name).is_file()]
    whole = Report("checkpoint, files")
    pairs = paired_files(fresh(), run / "checkpoints" / str(older))
    for name, kind in spread(list(itertools.product(names, KINDS)), limit):
        fresh()
        if damage(run / name, kind, pairs.get(run / name)):
            whole.case(f"{name} {kind}", read)
    good_files, bits, start = whole.finish(), Report("checkpoint, bits"), 0
    for name in names:
        for flipped in flips((good / name).read_bytes(), every, start):
            fresh()
            (run / name).write_bytes(flipped)
            bits.case(f"{name} at {start}", read)
        start = (start + 31) % every
    return all([good_files, bits.finish()])


def paired_files(newest: pathlib.Path, older: pathlib.Path) -> dict[pathlib.Path, pathlib.Path]:
    """Maps each file of the newest step to its counterpart in the older one. Names may differ."""
    pairs = {}
    for folder in {path.parent for path in newest.rglob("*") if path.is_file()}:
        other = older / folder.relative_to(newest)
        mine, theirs = (
            sorted(
                (p for p in x.iterdir() if p.is_file()), key=lambda p: (p.stat().st_size, p.name)
            )
            for x in (folder, other)
        )
        named = {p.name: p for p in theirs}
        for a, b in zip(mine, theirs, strict=False):
            pairs[a] = named.get(a.name, b)
    return pairs


def sweep_tensors(folder: pathlib.Path, every: int) -> bool:
    """Flips bits in frozen weights, and in parts of features and samples."""
    folder.mkdir()
    report, task = Report("frozen weights and parts, bits"), FrozenTask()
    expected = frozen_weights(task.frozen, folder)["kernel"].copy()
    path = folder / "frozen.safetensors"
    store = FeatureStore(folder / "features", {})
    store.add(range(5), {"pool_ND": expected})
    output = NpzOutput(folder / "x.npz", np.arange(5), 0, {})
    output.begin(write=True)
    output.add(range(5), expected.view(np.uint8).reshape(5, 4, 4, -1)[..., :3])
    (features,) = (folder / "features").glob("*.safetensors")
    (images,) = (folder / ".x.npz.parts").glob("*.safetensors")

    def read_frozen() -> str:
        np.testing.assert_array_equal(frozen_weights(task.frozen, folder)["kernel"], expected)
        return "detected" if path.read_bytes() == content else "harmless"

    def read_features() -> str:
        if not store.has(range(5)):
            return "detected"
        np.testing.assert_array_equal(store.read(range(5))["pool_ND"], expected)
        return "harmless"

    def read_images() -> str:
        if not output.has(range(5)):
            return "detected"
        assert files.read_tensors(images)[0]["image_NHWC"].tobytes() == images_bytes
        return "harmless"

    images_bytes = files.read_tensors(images)[0]["image_NHWC"].tobytes()
    for file, read in ((path, read_frozen), (features, read_features), (images, read_images)):
        content = file.read_bytes()
        for number, flipped in enumerate(flips(content, every, 0)):
            file.write_bytes(flipped)
            report.case(f"{file.name}, flip {number}", read)
        file.write_bytes(content)
    return report.finish()


class FrozenTask(tiny.Tiny):
    """A task with pretrained weights."""

    def frozen(self):
        return {"kernel": np.random.default_rng(0).standard_normal((5, 48)).astype(np.float32)}


def sweep_latents(folder: pathlib.Path, every: int) -> bool:
    """Flips bits in a file of cached latents."""
    report = Report("latents, bits")
    path, _ = test_latent_damage.write(folder)
    expected, content = test_latent_damage.read(folder), path.read_bytes()

    def read() -> str:
        try:
            latents = test_latent_damage.read(folder)
        except InputError as error:
            return "detected" if path.name in str(error) else str(error)
        equal = all(map(test_latent_damage.same, latents, expected))
        return "harmless" if equal else "other latents"

    for number, flipped in enumerate(flips(content, every, 0)):
        path.write_bytes(flipped)
        report.case(f"flip {number}", read)
    return report.finish()


def sweep_runs(folder: pathlib.Path, processes: int, limit: int) -> bool:
    """Continues a run after each kind of damage to each file of its newest checkpoint."""
    good, settings = folder / "good", {"keep_best": "eval/loss", "mesh": [2, 4, 1], "keep": 3}
    report = Report(f"runs, processes: {processes}")
    train_together(processes, [{"run": str(good), "settings": settings}])
    expected = end_of(good)
    shutil.rmtree(good / "checkpoints" / str(STEPS))
    older, newest = (good / "checkpoints" / str(step) for step in SAVED)
    pairs, cases = paired_files(newest, older), []
    for file, kind in itertools.product(pairs, KINDS):
        run = folder / f"run{len(cases)}"
        shutil.copytree(good, run)
        if damage(run / file.relative_to(good), kind, pairs[file]):
            cases.append((run, f"{file.relative_to(newest)} {kind}"))
        else:
            shutil.rmtree(run)
    cases = spread(cases, limit)
    for first in range(0, len(cases), RUNS_TOGETHER):
        group = cases[first : first + RUNS_TOGETHER]
        said = train_together(
            processes, [{"run": str(run), "settings": settings} for run, _ in group]
        )
        for run, name in group:

            def outcome(run: pathlib.Path = run, said: str = said) -> str:
                if end_of(run) != expected:
                    return f"ends differently, or not at all: {said[-2000:]}"
                return "detected" if (run / "unreadable").exists() else "harmless"

            report.case(name, outcome)
            shutil.rmtree(run)
    return report.finish()


def train_together(processes: int, jobs: list[dict]) -> str:
    """Runs jobs of one_of_several.py in several processes; returns the first one's output."""
    codes, said = together(processes, *jobs, deadline=180 + 30 * len(jobs))
    assert codes == [0] * processes, "\n".join(said)
    return said[0]


def end_of(run: pathlib.Path) -> tuple | None:
    """Returns a run's final state in a comparable form; None if the run did not finish."""
    saved = SavedSteps(run / "checkpoints")
    if not saved.steps() or saved.steps()[-1] != STEPS:
        return None
    state = jax.eval_shape(tiny.Tiny().init, jax.random.key(0))
    abstract = {name: getattr(state, name) for name in ("params", "ema", "opt_state")}
    here = SingleDeviceSharding(jax.devices()[0])
    read, meta = saved.arrays(STEPS, abstract, jax.tree.map(lambda _: here, abstract))
    best = SavedSteps(run / "best")
    read["best"] = best.params(best.steps()[-1])
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(read)]
    return leaves, meta, json.dumps(tiny.lines(run))


def main() -> int:
    parser = argparse.ArgumentParser(
        "tests.helpers.damage_sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="a new one")
    parser.add_argument("--every", type=int, default=97, help="which bits are flipped (97)")
    parser.add_argument(
        "--processes", type=int, default=0, help="processes that continue runs; 0 for none"
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="largest number of damaged files; 0 for all"
    )
    flags = parser.parse_args()
    flags.folder.mkdir(parents=True)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # warns of reads that nothing awaits
    read_errors.READ_PAUSES = ()
    folder = flags.folder.absolute()
    if flags.processes:
        return 0 if sweep_runs(folder, flags.processes, flags.limit) else 1
    good = [
        sweep_tensors(folder / "tensors", flags.every),
        sweep_latents(folder / "latents", flags.every),
        sweep_checkpoint(folder / "checkpoint", flags.every, flags.limit),
    ]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
