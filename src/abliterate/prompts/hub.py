"""Reading a data set of the Hub, or of its cache where the Hub doesn't answer.

datasets and huggingface_hub are imported only by the functions that need them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from abliterate.common.errors import PromptError, shorten
from abliterate.prompts.tables import Tables, tables_of_datasets

HUB_TIMEOUT_SECONDS = 4.0
HOW_TO_NAME = "id[/subset][:split[:column]]"


class HubUnreachableError(PromptError):
    """The Hub didn't answer and the data set isn't in the local cache."""


def read_hub(dataset: str, split: str | None, subset: str | None = None, revision: str | None = None) -> Tables:
    """Download a data set, or take it from the cache if the Hub doesn't answer within seconds.

    Raises:
        HubUnreachableError: the Hub didn't answer, and it isn't in the cache.
        PromptError: there is no such data set, subset or split.
    """
    import datasets

    more = {key: value for key, value in (("name", subset), ("revision", revision)) if value}
    try:
        with nullcontext() if hub_answers() else _offline():
            loaded = datasets.load_dataset(dataset, split=split, **more)
    except Exception as error:
        if _is_connection_failure(error):
            raise HubUnreachableError(
                f"the Hugging Face Hub can't be reached and data set {dataset} is not in the local cache; "
                "check the network and HF_HUB_OFFLINE, or give a local file or 'bundled'"
            ) from error
        if not isinstance(error, (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)):
            raise
        raise PromptError(
            f"Hub data set {dataset}{f', split {split!r},' if split else ''} can't be loaded: "
            f"{shorten(str(error), 300)}; check its name ({HOW_TO_NAME}), or download it and give the file"
        ) from error
    return tables_of_datasets(loaded)


def hub_answers() -> bool:
    """Whether the Hub answers anything at all within HUB_TIMEOUT_SECONDS.

    huggingface_hub retries for half a minute before it gives up, and resolving a name has no timeout of
    its own, so one request is made in a thread that may be left behind.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"} or constants.HF_HUB_OFFLINE:
        return False
    answers: list[object] = []

    def ask() -> None:
        # Whatever fails here fails again, with its reason, when the data set is asked for.
        try:
            answers.append(get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_SECONDS))
        except Exception:
            return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_SECONDS)
    return bool(answers)


@contextmanager
def _offline() -> Iterator[None]:
    """Hold datasets and huggingface_hub in offline mode, in which they read the cache and don't wait."""
    import datasets.config
    import huggingface_hub.constants

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _is_connection_failure(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is a connection, a timeout or the Hub's own failure."""
    while error is not None:
        # By name: huggingface_hub has used requests, httpx and httpx2, each with classes of its own.
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & {"ConnectionError", "Timeout", "TimeoutError", "TransportError"}:
            return True
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status == 429 or status >= 500:
            return True
        error = error.__cause__ or error.__context__
    return False
