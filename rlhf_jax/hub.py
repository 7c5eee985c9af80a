"""Files of the Hugging Face hub: from a local folder, from what was downloaded before, or over the network.

A name is a local path, or REPO or REPO@REVISION on the hub, where a revision is a branch, a tag or a commit. The
package huggingface_hub does the transfers and keeps the files; it reads HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
It is imported where it is called, so that a run without the hub does not wait for it.
"""

import contextlib
import fnmatch
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

from rlhf_jax.errors import InputError

PATIENCE = 4  # seconds for the hub to answer; the client's downloads would try again for 25

Choice = tuple[str, ...]  # names or patterns of files: ("config.json", "model-*.safetensors")


def folder(
    name: str | os.PathLike, *choices: Choice, kind: str = "model", revisions: tuple[str, ...] = ("main",)
) -> Path:
    """The folder with all files of one of the `choices`; the first choice that is there is the one.

    A local folder comes first (and a local file is returned as it is), then what was downloaded before, without a look
    at the network: a branch stays what it was then. Else the first of `revisions` that has a choice is downloaded, or
    the revision in the name. `kind` is model or dataset. InputError says, within seconds, what is missing: the files,
    the repository, a permission, or the network, and then which files to download by hand.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.exists():
        if not any(_complete(path, choice) for choice in choices):
            raise InputError(f"{name}: expected a folder with {_told(choices)}")
        return path
    if not is_name(name):
        raise InputError(f"{name}: no such file or folder, and no name that a {kind} on the hub could have")
    repo, _, pinned = str(name).partition("@")
    revisions = (pinned,) if pinned else revisions
    for revision in revisions:
        for choice in choices:
            if path := _cached(repo, revision, kind, choice):
                return path
    with _in_one_line(name, repo, revisions, kind, choices):
        return _download(name, repo, revisions, kind, choices)


def is_name(name: str | os.PathLike) -> bool:
    """Whether the hub could have something of this name. So could a local path that is not there."""
    from huggingface_hub import errors, utils

    repo, at, revision = str(name).partition("@")
    try:
        utils.validate_repo_id(repo)
    except errors.HFValidationError:
        return False
    return not at or bool(revision)


def _cached(repo: str, revision: str, kind: str, choice: Choice) -> Path | None:
    from huggingface_hub import errors, snapshot_download

    try:
        path = snapshot_download(
            repo, repo_type=kind, revision=revision, allow_patterns=list(choice), local_files_only=True
        )
    except errors.LocalEntryNotFoundError:
        return None
    return Path(path) if _complete(Path(path), choice) else None


def _download(name, repo: str, revisions: tuple[str, ...], kind: str, choices: tuple[Choice, ...]) -> Path:
    from huggingface_hub import errors, snapshot_download

    files = None
    for revision in revisions:
        try:
            info = _info(repo, revision, kind)
        except errors.RevisionNotFoundError:
            continue
        files = [file.rfilename for file in info.siblings]
        for choice in choices:
            wanted = {pattern: [file for file in files if _matches(file, pattern)] for pattern in choice}
            if all(wanted.values()):
                names = sum(wanted.values(), [])
                return Path(snapshot_download(repo, repo_type=kind, revision=revision, allow_patterns=names))
    if files is None:
        raise InputError(f"{name}: no revision {' or '.join(revisions)} on the hub")
    there = ", ".join(files[:8]) + (", ..." if len(files) > 8 else "")
    raise InputError(f"{name}: expected {_told(choices)} on the hub, there is {there or 'nothing'}")


def _info(repo: str, revision: str, kind: str):
    """What the hub says of a revision: the first question, so it also tells whether there is a network.

    The client does not try this call again, but its limit of time is one for each address, and none for names.
    """
    from huggingface_hub import HfApi

    answer = Future()

    def ask():
        try:
            answer.set_result(HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=PATIENCE))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(PATIENCE)
    except TimeoutError:
        raise TimeoutError(f"no answer in {PATIENCE} seconds") from None


@contextlib.contextmanager
def _in_one_line(name, repo: str, revisions: tuple[str, ...], kind: str, choices: tuple[Choice, ...]) -> Iterator[None]:
    """The client's errors as InputError."""
    from huggingface_hub import constants, errors

    address = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    try:
        yield
    except InputError:
        raise
    except errors.GatedRepoError:
        raise InputError(f"{name}: ask for access at {address}, then `hf auth login` or set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        why = f"no such {kind} on the hub, or a private one (`hf auth login` or HF_TOKEN)"
        raise InputError(f"{name}: no such file or folder, and {why}") from None
    except Exception as error:  # those of the network: the client and what it is built on share no base
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(
            f"{name}: no such file or folder, not downloaded before, and the hub cannot be read ({why}); download "
            f"{_told(choices)} of {address} ({' or '.join(revisions)}) into a folder and give its path"
        ) from error


def _matches(file: str, pattern: str) -> bool:
    """As `Path.glob` has it: a star stands for no slash."""
    names, patterns = file.split("/"), pattern.split("/")
    return len(names) == len(patterns) and all(map(fnmatch.fnmatchcase, names, patterns))


def _complete(path: Path, choice: Choice) -> bool:
    return all(any(path.glob(pattern)) for pattern in choice)


def _told(choices: tuple[Choice, ...]) -> str:
    return ", or ".join(" and ".join(choice) for choice in choices[:3]) + (", ..." if len(choices) > 3 else "")
