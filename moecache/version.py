"""The version of this library, for rooms that must not import what `moecache` itself imports."""

__version__ = "0.1.0"
