"""Trains the model that a config file describes, or continues the run in its run_dir.

python train.py --config=configs/FILE.py[:ARGUMENT] [--config.FIELD.FIELD=VALUE ...]

To change some fields of the file:

python train.py --config=configs/digits.py --config.task.optimizer.base_lr=3e-4 --config.steps=200

--dry_run checks a run in advance: it reports mesh, memory and data, and takes two steps.
"""

import dataclasses
import sys
from typing import Any

from varjax.config import config_tree
from varjax.config.config_flags import add_config_flags, config_from_flags, split_changes
from varjax.errors import InputError
from varjax.runtime.commands import command_parser
from varjax.storage import files
from varjax.storage.buckets import as_path


def fetch_weights(experiment: Any) -> None:
    """Downloads the published models that a new run starts from; see `varjax.convert.pretrained`.

    A run that has a checkpoint needs no download: its directory has the frozen weights and its own.

    Raises InputError for settings that `Experiment.check` refuses, before anything is downloaded.
    """
    from varjax.convert.pretrained import resolve_weights
    from varjax.runtime.distributed import on_first_process
    from varjax.training.run_dir import is_bound

    experiment.check()
    run_dir = as_path(experiment.run_dir)
    bound = is_bound(run_dir)
    if experiment.init_from and not bound:
        resolve_weights(experiment.init_from)
        experiment = experiment.with_init_tokenizer()
    task = config_tree.to_dict(experiment.task)
    locations = task.get("tokenizer_weights"), (task.get("cca") or {}).get("reference")
    if not (bound and files.exists(run_dir / "frozen.safetensors")):
        # Only the first process reads them.
        on_first_process(lambda: [str(resolve_weights(x)) for x in locations if x])


def with_named_tokenizer(experiment: Any, arguments: list[str]) -> Any:
    """Returns settings that keep a tokenizer from the command line, whatever `init_from` has."""
    changed = {text.partition("=")[0] for text in split_changes(arguments)[1]}
    if "task.tokenizer_weights" not in changed or "init_tokenizer" in changed:
        return experiment
    return dataclasses.replace(experiment, init_tokenizer=False)


def train_experiment(experiment: Any, profile: str = "") -> dict[str, float]:
    """Trains a model from a config, or continues the run in its `run_dir`.

        experiment = varjax.load_config("digits_tokenizer")
        metrics = varjax.train(dataclasses.replace(experiment, steps=100))

    Like `varjax train`, it downloads published models and caches compiled programs on disk.

    Args:
        experiment: settings of the run; see `varjax.training.experiment.Experiment`.
        profile: steps to trace, START:STOP; "" for none.

    Returns:
        The metrics of the last evaluation.

    Raises:
        InputError: settings that are invalid, or differ from those of the run in `run_dir`.
    """
    # Imported here, because a worker process that reads data imports this module and needs no JAX.
    from varjax.runtime.compilation_cache import use_compilation_cache
    from varjax.training import loop

    use_compilation_cache()
    fetch_weights(experiment)
    return loop.train(experiment, profile)


def main(arguments: list[str]) -> int:
    """Runs the command; returns 0, 1 after an error, or 2 for a wrong command line."""
    # Imported here, because a worker process that reads data imports this module and needs no JAX.
    from varjax.runtime.compilation_cache import use_compilation_cache
    from varjax.runtime.distributed import add_process_flags, connect_by_flags, run_on_processes
    from varjax.training.dry_run import dry_run

    parser = command_parser("varjax train", __doc__)
    add_config_flags(parser)
    parser.add_argument(
        "--debug", action="store_true", help="print tracebacks of input errors, too"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="check everything, take two steps, write nothing"
    )
    parser.add_argument(
        "--profile",
        default="",
        metavar="START:STOP",
        help="write a trace of these steps, counted from the start of the command, to RUN/profile",
    )
    add_process_flags(parser)
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    try:
        flags, experiment = config_from_flags(parser, arguments)
        experiment = with_named_tokenizer(experiment, arguments)
        connect_by_flags(flags)
    except InputError as error:
        if "--debug" in arguments:
            raise
        print(f"varjax train: {error}", file=sys.stderr)
        return 2

    def action() -> None:
        if not flags.dry_run:
            train_experiment(experiment, flags.profile)
            return
        use_compilation_cache()
        fetch_weights(experiment)
        dry_run(experiment)

    return run_on_processes("varjax train", action, flags.debug)
