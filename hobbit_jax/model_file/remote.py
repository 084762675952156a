"""The header of a GGUF file behind a URL, without the file.

This module owns the requests: HTTP ranges from the front, until the header is whole. What came is
laid into a file of the true size that is empty behind the header, so that `open_gguf` checks and
joins it like any other.
"""

import re
import urllib.error
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import numpy as np

from hobbit_jax.model_file import gguf_header
from hobbit_jax.model_file.gguf_file import GGUFFile, open_gguf, part_names

# The vocabulary of most models fits the first request.
_FIRST_BYTES = 8 << 20
_MOST_BYTES = 512 << 20
_TIMEOUT_S = 30
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


def is_url(text: str) -> bool:
    """Whether a model's place is one that this module reads."""
    return urlsplit(text).scheme in ("http", "https")


def open_remote(url: str) -> GGUFFile:
    """The header of a file, or of all parts of a split. Tensors have shapes, and zeros for data.

    Raises:
        ValueError: what `open_gguf` refuses, or a server that cannot be reached or gives no ranges;
            names the URL.
        NotImplementedError: see `open_gguf`.
    """
    base, name = url.rsplit("/", 1)
    name, _, query = name.partition("?")
    parts = part_names(name)
    if name not in parts:
        raise ValueError(f"{url}: none of {len(parts)} parts by its name; check the address")
    with TemporaryDirectory() as folder:
        for part in parts:
            _fetch_header(f"{base}/{part}{query and '?' + query}", Path(folder) / part)
        try:
            return open_gguf(Path(folder) / name)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(str(error).replace(folder, base)) from None


def _fetch_header(url: str, path: Path) -> None:
    """Writes a file's header to `path`, followed by a hole of the file's size."""
    data, file_bytes = _request(url, 0, _FIRST_BYTES)
    while data.startswith(b"GGUF") and len(data) < file_bytes:
        try:
            gguf_header.parse(np.frombuffer(data, np.uint8), file_bytes)
        except gguf_header.CutShortError as error:
            wanted = min(max(error.needed, 2 * len(data)), file_bytes)
            if error.needed > _MOST_BYTES:
                raise ValueError(
                    f"{url}: a header of more than {error.needed} bytes; want at most {_MOST_BYTES}"
                ) from None
            data += _request(url, len(data), wanted - len(data))[0]
            continue
        except (ValueError, NotImplementedError):
            pass  # which `open_gguf` says with the name of the file
        break
    with path.open("wb") as file:
        file.write(data)
        file.truncate(file_bytes)


def _request(url: str, start: int, count: int) -> tuple[bytes, int]:
    """Up to `count` bytes from `start`, and the size of the whole."""
    asked = urllib.request.Request(url, headers={"Range": f"bytes={start}-{start + count - 1}"})
    try:
        with urllib.request.urlopen(asked, timeout=_TIMEOUT_S) as answer:
            sent = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            server = answer.headers.get("Server", "unnamed")
            if answer.status != 206 or sent is None:
                raise ValueError(
                    f"{url}: the server {urlsplit(url).netloc} ({server}) sends whole files only "
                    f"(status {answer.status}), want HTTP ranges; download the file and give its "
                    "path"
                )
            data = answer.read(count)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise ValueError(f"{url}: cannot be read ({reason}); check the address") from None
    first, last, file_bytes = map(int, sent.groups())
    if first != start or len(data) != min(count, last - first + 1) or not data:
        raise ValueError(
            f"{url}: asked for {count} bytes from {start}, got {len(data)} from {first}; try again"
        )
    return data, file_bytes
