"""The models that are loaded, shared by all who use the page; one step of one of them at a time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from abliterate.apply.hooks import attached
from abliterate.common.errors import AbliterateError
from abliterate.edit.edit import Edit
from abliterate.models.handle import Handle
from abliterate.models.writers import find_writers

MOST_MODELS = 2


@dataclass(eq=False)
class Loaded:
    """A model and what the studio knows of it.

    Attributes:
        name: as the page shows it.
        source: what it was loaded from.
        handle: the model.
        sides: writer -> "embedding", "attention", "mlp" or "projector".
        lock: held for each step: hooks belong to the model, so two threads that step at once would mix their edits.
    """

    name: str
    source: str
    handle: Handle
    sides: dict[str, str]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def stepping(self, pieces: Iterator[str]) -> Iterator[str]:
        """The same pieces, the model held for as long as each takes and free in between."""
        while True:
            with self.lock:
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def check_fits(self, edit: Edit) -> None:
        """Raise AbliterateError when the edit can't be attached."""
        try:
            with self.lock, attached(self.handle, edit):
                pass
        except ValueError as error:
            raise AbliterateError(f"the recipe doesn't fit {self.name}: {error}") from error


class Models:
    """The models that somebody uses; one nobody uses any more is let go of."""

    def __init__(self, open_model: Callable[[str], Handle], most: int = MOST_MODELS) -> None:
        self._open, self._most = open_model, most
        self._loaded: weakref.WeakValueDictionary[str, Loaded] = weakref.WeakValueDictionary()
        self._loading = threading.Lock()

    def get(self, name: str, source: str) -> Loaded:
        """A model, loaded unless it is.

        Raises:
            AbliterateError: when as many others are in use as are kept, or it can't be loaded.
        """
        with self._loading:
            found = self._loaded.get(source)
            if found is not None:
                return found
            if len(self._loaded) >= self._most:
                names = ", ".join(sorted(loaded.name for loaded in self._loaded.values()))
                raise AbliterateError(
                    f"{len(self._loaded)} models are in use on this page ({names}); "
                    "take one of them, or come back when its users have left"
                )
            handle = self._open(source)
            loaded = Loaded(name, source, handle, {w.name: w.side for w in find_writers(handle)})
            self._loaded[source] = loaded
            return loaded
