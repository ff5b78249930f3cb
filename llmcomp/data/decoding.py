"""What decoders of others (Pillow, soundfile, tarfile, pyarrow) run into with a damaged file, as one kind of error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from llmcomp.errors import DatasetError, reason


@contextlib.contextmanager
def decoding(name: object, fault: str) -> Iterator[None]:
    """What a decoder runs into with a damaged file, whatever its kind, as a DatasetError that names the file.

    Failures of the file system pass, to be reported as such.
    """
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DatasetError(f"{name}: {fault} ({reason(error)})") from error
