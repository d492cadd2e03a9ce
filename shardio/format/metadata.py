"""Metadata and attributes as stored, in either Zarr format."""

from __future__ import annotations

from typing import Any

from shardio.errors import DatasetError
from shardio.format.store import Store, read_json

Json = dict[str, Any]


def array_metadata(store: Store, name: str) -> Json | None:
    """Metadata of an array in either Zarr format; None where there is none."""
    return read_json(store, f"{name}/zarr.json") or read_json(store, f"{name}/.zarray")


def group_attributes(store: Store, name: str = "") -> Json:
    """Attributes of a group or array in either Zarr format.

    Raises: DatasetError where they are no JSON object.
    """
    prefix = f"{name}/" if name else ""
    v3 = read_json(store, f"{prefix}zarr.json")
    found = v3.get("attributes", {}) if v3 is not None else read_json(store, f"{prefix}.zattrs") or {}
    if not isinstance(found, dict):
        raise DatasetError(f"the attributes of {store.url}/{name} are not a JSON object. Restore them from a copy.")
    return found
