"""Sending a model, adapter, recipe or GGUF file to the Hugging Face Hub, through huggingface_hub."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from abliterate.common.errors import AbliterateError, shorten
from abliterate.common.reporting import SILENT, Reporter
from abliterate.publish.parcel import Parcel, pack

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile

SCHEMA = 1
ATTEMPTS = 5
FIRST_WAIT = 1.0  # seconds, doubled each time
# What may be otherwise a moment later: the server's troubles, and its asking for patience.
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})

Pushed = tuple[str, str, "str | None"]  # the repository's name and address, and the commit that holds all


class HubError(AbliterateError):
    """The Hub refused or couldn't be reached; the text says why and what to do."""


def push(
    path: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Send what is at a path to a model repository of the Hub, in one commit.

    What is there already with the same hash is not sent again, so a push that broke off is resumed by the same
    call. The token comes from HF_TOKEN or `hf auth login`; it is neither printed nor kept.

    Args:
        path: what `abliterate run` wrote, a model or adapter folder, a recipe or a GGUF file.
        repo: "name" or "user-or-organisation/name"; made if it isn't there.
        private: make the repository private; one that is there and public is left alone, and nothing is sent.
        revision: branch to commit to, made if it isn't there; None is the main one.
        dry_run: say what would go, and send nothing; needs neither token nor network.
        reporter: told how it goes.

    Returns:
        Summary for JSON: `repo`, `url`, `revision`, `kind`, `files` (path, bytes, sent), `left_out`, `notes`,
        `bytes`, `bytes_sent`, `commit`, `dry_run`.

    Raises:
        OutputError: when what is at the path is missing, incomplete, or not for publishing.
        HubError: when there is no token, or the Hub refuses or can't be reached.
    """
    parcel = pack(Path(path))
    _check_name(repo)
    summary: dict[str, Any] = {
        "schema": SCHEMA,
        "repo": repo,
        "url": None,
        "revision": revision,
        "kind": parcel.kind,
        "files": [{"path": i.path, "bytes": i.size, "sent": False} for i in parcel.items],
        "left_out": [{"path": name, "why": why} for name, why in parcel.left_out],
        "notes": parcel.notes,
        "bytes": parcel.size,
        "bytes_sent": 0,
        "commit": None,
        "dry_run": dry_run,
    }
    if dry_run:
        return summary
    token = _token()
    sent: set[str] = set()
    with _hub_warnings_to(lambda text: reporter.say(text.replace(token, "***"))), _explained(repo, revision, token):
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi(token=token)
        # made once: they know the hashes of large files, which take long to compute
        operations = {item.path: CommitOperationAdd(item.path, item.content) for item in parcel.items}

        def attempt() -> Pushed:
            name, url = _opened(api, repo, private, revision)
            return name, url, _committed(api, name, revision, parcel, operations, sent, reporter)

        summary["repo"], summary["url"], summary["commit"] = _tried(attempt, sent, reporter.say)
    for entry in summary["files"]:
        entry["sent"] = entry["path"] in sent
    summary["bytes_sent"] = sum(item.size for item in parcel.items if item.path in sent)
    return summary


def _opened(api: HfApi, repo: str, private: bool, revision: str | None) -> tuple[str, str]:
    """Name and address of a repository that is there, with its branch, and private if it has to be."""
    made = api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.repo_info(made.repo_id).private:
        raise HubError(
            f"repository {made.repo_id} exists and is public; make it private in its settings, or push to another. "
            "Nothing was sent"
        )
    if revision:
        api.create_branch(made.repo_id, branch=revision, exist_ok=True)
    return made.repo_id, str(made)


def _committed(
    api: HfApi, name: str, revision: str | None, parcel: Parcel, operations: dict[str, CommitOperationAdd],
    sent: set[str], reporter: Reporter,
) -> str | None:  # fmt: skip
    """Send what isn't there yet, whose paths are added to `sent`; returns the commit that holds all."""
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(name, recursive=True, revision=revision)
    there = {file.path: file for file in tree if isinstance(file, RepoFile)}
    if parcel.made_card and "README.md" in there and "README.md" not in sent:
        operations.pop("README.md", None)  # the card there was written, or made, for all that is there
    missing = {path: added for path, added in operations.items() if not _is_there(added, there.get(path))}
    if not missing:
        return api.repo_info(name, revision=revision).sha
    tick = reporter.progress("uploading files", len(missing))
    for path, added in missing.items():
        if added.upload_info.size > 50_000_000:
            reporter.say(f"uploading {path} ({decimal(added.upload_info.size)})")
        # nothing happens for a small one, which goes with the commit
        api.preupload_lfs_files(name, [added], revision=revision, free_memory=False)
        tick(1)
    sent.update(missing)
    message = f"Push {parcel.kind} with abliterate"
    return api.create_commit(name, list(missing.values()), commit_message=message, revision=revision).oid


def _is_there(added: CommitOperationAdd, there: RepoFile | None) -> bool:
    """Whether a file of the repository has the same content."""
    from huggingface_hub.utils.sha import git_hash

    if there is None or there.size != added.upload_info.size:
        return False
    if there.lfs:
        return there.lfs.sha256 == added.upload_info.sha256.hex()
    with added.as_file() as file:
        return there.blob_id == git_hash(file.read())


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise HubError(
            f"'{repo}' can't name a repository: {shorten(str(error), 200)}; give NAME or USER/NAME"
        ) from error


def _token() -> str:
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise HubError(
            "pushing needs a token of the Hub, and there is none: make one that may write at "
            "https://huggingface.co/settings/tokens, then run `hf auth login`, or set HF_TOKEN"
        )
    return token


def _tried(push_once: Callable[[], Pushed], sent: set[str], say: Callable[[str], None]) -> Pushed:
    """Push, and again after 1, 2, 4 ... seconds where the failure may pass.

    huggingface_hub tries most requests again by itself, but neither the making of a repository nor a commit. Whether
    a commit whose answer was lost was made is seen by looking again, not by sending it again.
    """
    wait = FIRST_WAIT
    for _ in range(ATTEMPTS - 1):
        try:
            return push_once()
        except Exception as error:
            status, broken = _trouble(error)
            if not (status in TRANSIENT or broken):
                raise
            what = f"the Hub {f'answered {status}' if status else 'broke the connection'}; trying"
            if sent:
                what = "the commit broke off; looking at what is there and trying"
            say(f"{what} again in {wait:g} s")
            time.sleep(wait)
            wait *= 2
    return push_once()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those it came from: huggingface_hub wraps the ones of large files."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_offline(error: BaseException) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return any(isinstance(cause, OfflineModeIsEnabled) for cause in _causes(error))


def _trouble(error: BaseException) -> tuple[int | None, bool]:
    """The HTTP status behind an error, if an answer came at all; if none came, whether the connection broke."""
    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status, False
    # each HTTP library has an exception of its own for that
    names = {kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__}
    broken = {"TransportError", "ConnectionError", "TimeoutError", "RequestException"}
    return None, bool(names & broken) and not _is_offline(error)


@contextlib.contextmanager
def _explained(repo: str, revision: str | None, token: str) -> Iterator[None]:
    """One line for what the Hub or huggingface_hub says in a page; without the token, whoever repeats it."""
    try:
        yield
    except (AbliterateError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise HubError(_explanation(error, repo, revision).replace(token, "***")) from error


def _explanation(error: Exception, repo: str, revision: str | None) -> str:
    if _is_offline(error):
        return "HF_HUB_OFFLINE is set, so nothing can be pushed; unset it"
    again = "run the same command again, what is there is not sent again"
    # a missing repository is also answered with 401, so that nobody learns what is private
    known = {
        400: f"the Hub can't use what was sent to {repo}",
        401: f"the Hub doesn't accept the token, or there is no {repo} that it may see (401); run `hf auth login` or "
        "set HF_TOKEN to a token that may write",
        403: f"the token may not write to {repo} (403); use one with write access to it, or push to your own name",
        404: f"the Hub has no repository {repo}" + (f" or no branch {revision}" if revision else "") + " that the "
        "token may see (404); check the name",
        409: f"{repo} was changed by somebody else meanwhile, or its name is taken (409); {again}",
        413: f"a file is larger than {repo} may hold (413); save the model in smaller shards",
    }
    status, broken = _trouble(error)
    said = shorten(str(error), 200)
    if status in known:
        return known[status] + ("" if status in (401, 404) else f" [{said}]")
    if status is not None:
        return f"the Hub answered {status} for {repo}, {ATTEMPTS} times if it may pass; {again} [{said}]"
    if broken:
        return f"the connection to the Hub broke {ATTEMPTS} times; {again} [{said}]"
    return f"pushing to {repo} failed: {said}"


@contextlib.contextmanager
def _hub_warnings_to(say: Callable[[str], None]) -> Iterator[None]:
    """Let huggingface_hub's warnings go where everything else is told, not to standard error."""

    class Teller(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(shorten(record.getMessage(), 200))

    logger = logging.getLogger("huggingface_hub")
    handlers, propagate = logger.handlers[:], logger.propagate
    logger.handlers, logger.propagate = [Teller(logging.WARNING)], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
