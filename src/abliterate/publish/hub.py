"""Sending a model, adapter, recipe or GGUF file to the Hugging Face Hub, through huggingface_hub."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from abliterate.common.errors import AbliterateError, shorten
from abliterate.common.reporting import Reporter, untold
from abliterate.publish.parcel import Item, Parcel, pack

SCHEMA = 1
ATTEMPTS = 5
FIRST_WAIT = 1.0  # seconds, doubled each time
# What may be otherwise a moment later: the server's troubles, and its asking for patience.
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})

T = TypeVar("T")


class HubError(AbliterateError):
    """The Hub refused or couldn't be reached; the text says why and what to do."""


def push(
    path: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    reporter: Reporter | None = None,
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
    say = reporter.say if reporter is not None else lambda _text: None
    with _hub_warnings_to(lambda text: say(_redacted(text, token))), _explained(repo, revision, token):
        sent, commit = _send(parcel, _Repository(repo, private, revision, token, say), reporter)
        summary["repo"], summary["url"], summary["commit"] = commit.repo, commit.url, commit.oid
    for entry in summary["files"]:
        entry["sent"] = entry["path"] in sent
    summary["bytes_sent"] = sum(item.size for item in parcel.items if item.path in sent)
    return summary


class _Commit:
    def __init__(self, repo: str, url: str, oid: str | None) -> None:
        self.repo, self.url, self.oid = repo, url, oid


class _Repository:
    """A model repository of the Hub, opened for writing; each call is tried again where that may help."""

    def __init__(self, repo: str, private: bool, revision: str | None, token: str, say: Callable[[str], None]) -> None:
        from huggingface_hub import HfApi

        self.api = HfApi(token=token)
        self.revision, self.say = revision, say
        url = self._tried(lambda: self.api.create_repo(repo, private=private or None, exist_ok=True))
        self.name, self.url = url.repo_id, str(url)
        if private and not self._tried(lambda: self.api.repo_info(self.name)).private:
            raise HubError(
                f"repository {self.name} exists and is public; make it private in its settings, or push to another. "
                "Nothing was sent"
            )
        if revision:
            self._tried(lambda: self.api.create_branch(self.name, branch=revision, exist_ok=True))

    def hashes(self) -> dict[str, str]:
        """What is there: path -> sha256 of a large file, git's sha1 of a small one."""
        from huggingface_hub.hf_api import RepoFile

        def tree() -> dict[str, str]:
            found = self.api.list_repo_tree(self.name, recursive=True, revision=self.revision)
            return {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in found if isinstance(f, RepoFile)}

        return self._tried(tree)

    def upload(self, operation: Any) -> None:
        """Send a large file's content; nothing happens for a small one, which goes with the commit."""
        self._tried(lambda: self.api.preupload_lfs_files(self.name, [operation], revision=self.revision,
                                                         free_memory=False))  # fmt: skip

    def commit(self, operations: list[Any], message: str) -> str | None:
        return self.api.create_commit(self.name, operations, commit_message=message, revision=self.revision).oid

    def head(self) -> str | None:
        return self._tried(lambda: self.api.repo_info(self.name, revision=self.revision)).sha

    def _tried(self, call: Callable[[], T]) -> T:
        return _tried(call, self.say)


def _send(parcel: Parcel, there: _Repository, reporter: Reporter | None) -> tuple[set[str], _Commit]:
    """Send what isn't there yet; returns the paths sent, and the commit."""
    from huggingface_hub import CommitOperationAdd

    # made once: they know the hashes of large files, which take long to compute
    content = {item.path: _Sendable(item, CommitOperationAdd) for item in parcel.items}
    sent: set[str] = set()
    wait = FIRST_WAIT
    for attempt in range(1, ATTEMPTS + 1):
        remote = there.hashes()
        if parcel.made_card and "README.md" in remote and "README.md" not in sent:
            content.pop("README.md", None)  # the card there was written, or made, for all that is there
        missing = [entry for entry in content.values() if not entry.is_there(remote)]
        if not missing:
            return sent, _Commit(there.name, there.url, there.head())
        tick = reporter.progress("uploading files", len(missing)) if reporter is not None else untold
        for entry in missing:
            if entry.item.size > 50_000_000:
                there.say(f"uploading {entry.item.path} ({size_of(entry.item.size)})")
            there.upload(entry.operation)
            tick(1)
        sent |= {entry.item.path for entry in missing}
        try:
            message = f"Push {parcel.kind} with abliterate"
            return sent, _Commit(there.name, there.url, there.commit([e.operation for e in missing], message))
        except Exception as error:
            # whether a commit whose answer was lost was made is seen by looking again, not by sending it again
            if attempt == ATTEMPTS or not _is_transient(error):
                raise
            there.say(f"the commit broke off; looking at what is there and trying again in {wait:g} s")
            time.sleep(wait)
            wait *= 2
            for entry in missing:
                entry.renew()
    raise AssertionError("unreachable")


class _Sendable:
    """An item, its hashes, and the operation that adds it."""

    def __init__(self, item: Item, operation: Callable[..., Any]) -> None:
        self.item, self._make = item, operation
        self.operation = operation(path_in_repo=item.path, path_or_fileobj=item.content)

    def renew(self) -> None:
        """A fresh operation, as huggingface_hub asks after a commit was tried, that remembers the hash."""
        known = self.operation.upload_info
        self.operation = self._make(path_in_repo=self.item.path, path_or_fileobj=self.item.content)
        self.operation.upload_info = known

    def is_there(self, remote: dict[str, str]) -> bool:
        there = remote.get(self.item.path)
        if there is None:
            return False
        if len(there) == 64:
            return there == self.operation.upload_info.sha256.hex()
        return self.item.size < 100_000_000 and there == self._git_hash()

    def _git_hash(self) -> str:
        content = self.item.content if isinstance(self.item.content, bytes) else self.item.content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def size_of(count: int) -> str:
    """Bytes as people read them."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


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


def _redacted(text: str, token: str) -> str:
    return text.replace(token, "***")


def _tried(call: Callable[[], T], say: Callable[[str], None]) -> T:
    """Call, and again after 1, 2, 4 ... seconds where the failure may pass."""
    wait = FIRST_WAIT
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            if attempt == ATTEMPTS or not _is_transient(error):
                raise
            say(f"the Hub {_trouble(error)}; trying again in {wait:g} s")
            time.sleep(wait)
            wait *= 2
    raise AssertionError("unreachable")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those it came from: huggingface_hub wraps the ones of large files."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error, if an answer came at all."""
    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _is_connection(error: BaseException) -> bool:
    """Whether the connection broke: each HTTP library has an exception of its own for that."""
    broken = {"TransportError", "ConnectionError", "TimeoutError", "RequestException"}
    return any(kind.__name__ in broken for cause in _causes(error) for kind in type(cause).__mro__)


def _is_transient(error: BaseException) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if any(isinstance(cause, OfflineModeIsEnabled) for cause in _causes(error)):
        return False
    status = _status(error)
    return status in TRANSIENT if status is not None else _is_connection(error)


def _trouble(error: BaseException) -> str:
    status = _status(error)
    return f"answered {status}" if status else "broke the connection"


@contextlib.contextmanager
def _explained(repo: str, revision: str | None, token: str) -> Iterator[None]:
    """One line for what the Hub or huggingface_hub says in a page; without the token, whoever repeats it."""
    try:
        yield
    except (AbliterateError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise HubError(_redacted(_explanation(error, repo, revision), token)) from error


def _explanation(error: Exception, repo: str, revision: str | None) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if any(isinstance(cause, OfflineModeIsEnabled) for cause in _causes(error)):
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
    status = _status(error)
    said = shorten(str(error).replace("\n", " "), 200)
    if status in known:
        return known[status] + ("" if status in (401, 404) else f" [{said}]")
    if status is not None:
        return f"the Hub answered {status} for {repo}, {ATTEMPTS} times if it may pass; {again} [{said}]"
    if _is_connection(error):
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
