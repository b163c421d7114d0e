"""Errors of the disk as one user-facing error."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ssa.errors import DiskError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise what the file system (or safetensors, which wraps it) says inside as :class:`DiskError` about ``path``."""
    try:
        yield
    except DiskError:
        raise
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in _FULL or "No space left" in str(error)
        hint = "freeing space, then --resume" if full else "another --out"
        raise DiskError(str(path), str(error), "a writable place with free space", hint) from error
