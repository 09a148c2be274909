"""The repository's files as a port (`port`): in a directory (`local`), or behind any URL that
fsspec can open (`remote`)."""

from __future__ import annotations

import fsspec.core

from shared.errors import InvalidRequest
from shared.storage.local import LocalStorage
from shared.storage.port import Entry, Stage, Storage, translated
from shared.storage.remote import RemoteStorage

__all__ = ["Entry", "LocalStorage", "Stage", "Storage", "open_storage", "translated"]


def open_storage(url: str, *, durable: bool = True) -> Storage:
    """The storage behind a path or URL. A directory is made if need be.

    `durable=False` leaves out the waiting for the disk: for caches.
    """
    try:
        # Other writers must be seen, so fsspec may not remember listings.
        options = {} if "://" not in url else {"use_listings_cache": False}
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError, TypeError) as error:
        # The URL itself is not shown: people put keys into it.
        scheme = url.partition("://")[0] if "://" in url else "path"
        raise InvalidRequest(f"the repository's {scheme} URL cannot be opened: {error}") from error
    protocols = filesystem.protocol
    if "file" in ((protocols,) if isinstance(protocols, str) else protocols):
        return LocalStorage(path, durable=durable)
    return RemoteStorage(filesystem, path)
