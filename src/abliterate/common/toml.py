"""TOML, on every Python that this package runs on."""

from __future__ import annotations

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

TOMLDecodeError, loads = tomllib.TOMLDecodeError, tomllib.loads
