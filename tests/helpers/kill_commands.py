"""Kills long commands at random moments, and compares their output with an undisturbed run's.

python -m tests.helpers.kill_commands --folder=DIR [--kills=20] [--seed=0] [COMMAND …]

The commands are "cache-latents", "prepare", "sample" (a folder of images), "sample_npz" and
"evaluate" (of drawn samples), with a run of the digits that is trained first. Each is killed by
SIGKILL, with all its worker processes, at a random moment after the start of the interpreter, and
started again. If it finishes before all kills, its output is removed and it starts over. Prints a
line of JSON for each command. The exit code is 1 if a file is not bit-identical, or a temporary
file remains.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

from tests.helpers.paths import ROOT

DATASET = f"--config={ROOT}/configs/digits.py"
TOKENIZER = "--config.task.tokenizer_weights=tokenizer"
VOLATILE = {"versions", "device"}  # keys of a report that may differ


def command(name: str, out: str) -> list[str]:
    """Returns the command line that makes `out`."""
    sample = [f"{ROOT}/sample.py", "--weights=run", "--labels=all", "--batch_size=50"]
    module = "-m", "varjax", name
    drawn = ["--weights=run", "--count=100", "--batch_size=50", "--features=pixels"]
    return {
        "cache-latents": [*module, DATASET, TOKENIZER, "--augmentations=6", "--shards=20"],
        "prepare": [*module, "--folder=photos", "--workers=2", "--shards=60"],
        "sample": [*sample, "--count=100"],
        "sample_npz": [*sample, "--count=150"],
        "evaluate": ["-m", "varjax.evaluation", *drawn, "--reference=digits"],
    }[name] + [f"--out={out}"]


OUTPUTS = {"sample_npz": "{}.npz", "evaluate": "{}.json"}  # the others make folders
COMMANDS = "cache-latents", "prepare", "sample", "sample_npz", "evaluate"


def start(folder: pathlib.Path, arguments: list[str]) -> subprocess.Popen:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": "1",
        "VARJAX_CACHE": str(folder / "cache"),
    }
    log = open(folder / "log.txt", "w")
    with log:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,  # so that worker processes are killed with it
        )


def finish(folder: pathlib.Path, arguments: list[str]) -> float:
    """Runs a command to its end; returns its time in seconds."""
    begin = time.monotonic()
    if code := start(folder, arguments).wait():
        raise SystemExit(f"{arguments}: exit code {code}\n{(folder / 'log.txt').read_text()}")
    return time.monotonic() - begin


def digests(path: pathlib.Path) -> dict[str, str]:
    """Returns digests of the files at `path`, and of hidden files next to it, by name."""
    hidden = path.parent.glob(f".{path.name}*")
    files = [x for p in (path, *hidden) for x in ([p] if p.is_file() else p.rglob("*"))]
    digest_by_name = {}
    for file in files:
        if not file.is_file() or file.name == ".lock":
            continue
        data = file.read_bytes()
        if file.name == f"{path.stem}.json" and path.suffix == ".json":
            report = {k: v for k, v in json.loads(data).items() if k not in VOLATILE}
            data = json.dumps(report, sort_keys=True).encode()
        name = str(file.relative_to(path.parent)).replace(path.stem, "OUT", 1)
        digest_by_name[name] = hashlib.sha256(data).hexdigest()
    return digest_by_name


def soak(folder: pathlib.Path, name: str, kills: int, rng: random.Random) -> dict:
    """Kills one command several times; returns its report."""
    wanted, killed = (OUTPUTS.get(name, "{}").format(f"{name}_{x}") for x in ("whole", "killed"))
    seconds = finish(folder, command(name, wanted))
    whole, done, ends, failures = digests(folder / wanted), 0, 0, []
    assert whole, f"{name} has made no files"
    last = False
    while done < kills or not last:
        process = start(folder, command(name, killed))
        last = False
        if done < kills:
            try:
                process.wait(rng.uniform(0, 1.1 * seconds))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                done += 1
                continue
        if process.wait():
            failures.append((folder / "log.txt").read_text()[-2000:])
            break
        last, ends = True, ends + 1
        if (actual := digests(folder / killed)) != whole:
            names = sorted(n for n in actual.keys() | whole.keys() if actual.get(n) != whole.get(n))
            failures.append(f"these files differ: {names[:10]}")
        path = folder / killed
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {
        "command": name,
        "kills": done,
        "ends": ends,
        "files": len(whole),
        "seconds_alone": round(seconds, 1),
        "failures": failures,
    }


def main() -> int:
    parser = argparse.ArgumentParser("tests.helpers.kill_commands", description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="a new one")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("commands", nargs="*", metavar="COMMAND", default=COMMANDS)
    flags = parser.parse_args()
    folder = flags.folder.absolute()
    folder.mkdir(parents=True)
    train, steps = f"{ROOT}/train.py", ["--config.steps=20", "--config.preview_every=0"]
    tokenizer = f"--config={ROOT}/configs/digits_tokenizer.py"
    finish(folder, [train, tokenizer, "--config.run_dir=tokenizer", *steps])
    finish(folder, [train, DATASET, TOKENIZER, "--config.run_dir=run", *steps])
    photos = (
        "from varjax.data import photos; photos.write_photos('photos', size=64, train=300, val=20)"
    )
    finish(folder, ["-c", photos])
    failed = False
    for name in flags.commands:
        report = soak(folder, name, flags.kills, random.Random(f"{flags.seed} {name}"))
        print(json.dumps(report))
        failed |= bool(report["failures"])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(main())
