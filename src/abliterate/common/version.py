"""The version of this package: pyproject.toml takes it from here too."""

__version__ = "0.1.0"
