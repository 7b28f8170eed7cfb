"""The run's own copy of pretrained weights, <run>/frozen.safetensors, and its digest.

<run>/frozen.json keeps the digest apart, so that a copy that is damaged or missing is replaced by
the same weights or not at all.
"""

import pathlib

import jax

from varjax import trees
from varjax.errors import InputError, StorageError
from varjax.runtime.distributed import check_shared_file, on_first_process
from varjax.storage import files
from varjax.training.progress import say
from varjax.training.task import Task
from varjax.trees import PyTree


def frozen_weights(task: Task, run_dir: pathlib.Path) -> PyTree:
    """Reads the run's own copy of the task's pretrained weights, which the first process makes.

    A copy that is damaged is made again if the weights it comes from are still the same.

    Raises:
        InputError: it is damaged and cannot be made again.
        StorageError: it cannot be read or written now.
    """
    path = run_dir / "frozen.safetensors"
    if not on_first_process(lambda: _copy(task, path)):
        return {}
    check_shared_file(path)
    return files.read_tensors(path)[0]


def _copy(task: Task, path: pathlib.Path) -> bool:
    """Makes the copy where it is missing or damaged; returns whether there is one."""
    problem = ""
    if files.exists(path):
        try:
            files.read_tensors(path)
            return True
        except StorageError:
            raise
        except InputError as error:
            problem = str(error)
            say(f"{problem}\ncopying these weights again")
    before = _digest_before(path)
    advice = (
        "restore the file from a copy, or the weights it came from (--config.task.tokenizer_weights"
        " says where they are now)"
    )
    try:
        tree = task.frozen()
    except InputError as error:
        if problem or before:
            raise InputError(f"{problem or f'{path} is missing'}; {error}; {advice}") from error
        raise
    if not jax.tree.leaves(tree):
        return False
    digest = trees.digest(tree)
    if digest != (before or digest) or (problem and not before):
        raise InputError(
            f"{problem or f'{path} is missing'}; the weights to copy are "
            f"{'other ones by now' if before else 'not known to be the same'}: {advice}"
        )
    files.write_tensors(path, tree, {})
    files.write_json(path.with_suffix(".json"), {"digest": digest})
    return True


def _digest_before(path: pathlib.Path) -> str:
    """Returns the digest of the weights that the copy was made of, "" where it is not known."""
    try:
        return str(files.read_json(path.with_suffix(".json"))["digest"])
    except StorageError:
        raise
    except (InputError, KeyError, TypeError):
        return ""
