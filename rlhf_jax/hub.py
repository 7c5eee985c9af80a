"""Files of the Hugging Face hub: from a local folder, from an earlier download, or over the network.

A name is a local path, or REPO or REPO@REVISION on the hub, where a revision is a branch, a tag or a commit. The
package huggingface_hub transfers and caches the files; it reads HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
It is imported where it is called, so that a run without the hub does not wait for it.
"""

import contextlib
import fnmatch
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

from rlhf_jax.errors import InputError, listed

PATIENCE = 4  # seconds to wait for the hub's answer; the client's downloads would retry for 25

Choice = tuple[str, ...]  # names or patterns of files: ("config.json", "model-*.safetensors")


def folder(
    name: str | os.PathLike,
    *choices: Choice,
    kind: str = "model",
    revisions: tuple[str, ...] = ("main",),
    also: tuple[str, ...] = (),
) -> Path:
    """The folder with all files of one of the `choices`; the first choice that exists is used.

    A local folder comes first (a local file is returned as it is), then an earlier download, without using the network:
    a branch stays at its commit of that time. Otherwise the first of `revisions` that has a choice is downloaded; a
    revision in the name replaces them. `also` are files that are downloaded with a choice where they exist. `kind` is
    model or dataset. Raises InputError within seconds. It names what is
    missing: the files, the repository, a permission or the network. Without network it lists the files to download.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.exists():
        if not any(_complete(path, choice) for choice in choices):
            raise InputError(f"{name}: expected a folder with {_names(choices)}")
        return path
    if not is_name(name):
        raise InputError(f"{name}: no such file or folder, and not a possible name of a {kind} on the hub")
    repo, _, pinned = str(name).partition("@")
    revisions = (pinned,) if pinned else revisions
    for revision in revisions:
        for choice in choices:
            if cached := _cached(repo, revision, kind, choice, also):
                return cached
    with _in_one_line(name, repo, revisions, kind, choices):
        return _download(name, repo, revisions, kind, choices, also)


def is_name(name: str | os.PathLike) -> bool:
    """Whether the hub could have a repository of this name. A local path that does not exist may pass, too."""
    from huggingface_hub import errors, utils

    repo, at, revision = str(name).partition("@")
    try:
        utils.validate_repo_id(repo)
    except errors.HFValidationError:
        return False
    return not at or bool(revision)


def _cached(repo: str, revision: str, kind: str, choice: Choice, also: tuple[str, ...]) -> Path | None:
    from huggingface_hub import errors, snapshot_download

    try:
        path = snapshot_download(
            repo, repo_type=kind, revision=revision, allow_patterns=[*choice, *also], local_files_only=True
        )
    except errors.LocalEntryNotFoundError:
        return None
    return Path(path) if _complete(Path(path), choice) else None


def _download(
    name, repo: str, revisions: tuple[str, ...], kind: str, choices: tuple[Choice, ...], also: tuple[str, ...]
) -> Path:
    from huggingface_hub import errors, snapshot_download

    files = None
    for revision in revisions:
        try:
            info = _info(repo, revision, kind)
        except errors.RevisionNotFoundError:
            continue
        files = [file.rfilename for file in info.siblings]
        for choice in choices:
            matches = {pattern: [file for file in files if _matches(file, pattern)] for pattern in choice}
            if all(matches.values()):
                names = sum(matches.values(), [file for file in files if file in also])
                return Path(snapshot_download(repo, repo_type=kind, revision=revision, allow_patterns=names))
    if files is None:
        raise InputError(f"{name}: no revision {' or '.join(revisions)} on the hub")
    raise InputError(f"{name}: expected {_names(choices)} on the hub, there is {listed(files) or 'nothing'}")


def _info(repo: str, revision: str, kind: str):
    """The hub's record of a revision. It is the first request, so it also shows whether there is a network.

    The client does not retry this call. But its timeout counts for each address anew and not for name look-ups, so a
    thread makes the call and the wait for it has a limit.
    """
    from huggingface_hub import HfApi

    answer: Future = Future()

    def request():
        try:
            answer.set_result(HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=PATIENCE))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=request, daemon=True).start()
    try:
        return answer.result(PATIENCE)
    except TimeoutError:
        raise TimeoutError(f"no answer in {PATIENCE} seconds") from None


@contextlib.contextmanager
def _in_one_line(name, repo: str, revisions: tuple[str, ...], kind: str, choices: tuple[Choice, ...]) -> Iterator[None]:
    """Turns the client's errors into InputError."""
    from huggingface_hub import constants, errors

    address = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    try:
        yield
    except InputError:
        raise
    except errors.GatedRepoError:
        raise InputError(f"{name}: request access at {address}, then `hf auth login` or set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        why = f"no such {kind} on the hub, or a private one (`hf auth login` or HF_TOKEN)"
        raise InputError(f"{name}: no such file or folder, and {why}") from None
    except Exception as error:  # network errors: the client and its libraries share no base class
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(
            f"{name}: no such file or folder, not downloaded before, and the hub cannot be read ({why}); download "
            f"{_names(choices)} of {address} ({' or '.join(revisions)}) into a folder and give its path"
        ) from error


def _matches(file: str, pattern: str) -> bool:
    """Matches as `Path.glob` does: a star matches no slash."""
    names, patterns = file.split("/"), pattern.split("/")
    return len(names) == len(patterns) and all(map(fnmatch.fnmatchcase, names, patterns))


def _complete(path: Path, choice: Choice) -> bool:
    return all(any(path.glob(pattern)) for pattern in choice)


def _names(choices: tuple[Choice, ...]) -> str:
    return ", or ".join(" and ".join(choice) for choice in choices[:3]) + (", ..." if len(choices) > 3 else "")
