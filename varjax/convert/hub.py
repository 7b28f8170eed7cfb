"""Files from the Hugging Face Hub."""

import pathlib

from varjax.core.errors import InputError


def download(repo: str, name: str, revision: str = "main") -> pathlib.Path:
    """The local copy of a file in a repository, downloaded if it is not there yet.

    revision: a branch, a tag, or, to get the same file forever, a commit. Raises InputError that
    says what to do without the library, the network, the repository or the file.
    """
    page = f"https://huggingface.co/{repo}"
    try:
        # Only those who download need it.
        from huggingface_hub import hf_hub_download  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            f"--repo needs huggingface_hub: pip install huggingface_hub, or download {name} "
            f"from {page} and leave --repo out"
        ) from error
    try:
        return pathlib.Path(hf_hub_download(repo, name, revision=revision))
    except Exception as error:  # also those of whichever HTTP library it is built on
        raise InputError(
            f"{name} could not be downloaded from {page} at revision {revision} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); "
            "check the names and the network, or download it by hand and leave --repo out"
        ) from error
