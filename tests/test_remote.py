"""Headers behind a URL: a server on this machine, and the file itself as the oracle."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from families import FAMILIES
from tiny_models import MODELS, write_model

from hobbit_jax.model_file import remote
from hobbit_jax.model_file.gguf_file import open_gguf
from hobbit_jax.model_file.remote import open_remote
from hobbit_jax.planner.shapes import open_model

SENT: Counter[str] = Counter()  # bytes of each file


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; a file that is called `whole` without ranges."""

    def log_message(self, format: str, *args) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        """Bytes of a range, as RFC 9110 has them."""
        path = Path(self.translate_path(self.path))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not wanted or "whole" in path.name or not path.exists():
            with suppress(BrokenPipeError):  # the client leaves when there are no ranges
                super().do_GET()
            return
        data, (first, last) = path.read_bytes(), map(int, wanted.groups())
        part = data[first : last + 1]
        SENT[path.name] += len(part)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    SENT.clear()
    Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", tmp_path
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("first_bytes", [64, 5000, 8 << 20])
def test_a_header_behind_a_url_is_the_files(server, monkeypatch: pytest.MonkeyPatch, first_bytes):
    url, folder = server
    monkeypatch.setattr(remote, "_FIRST_BYTES", first_bytes)
    for name in ("qwen3moe", "mixtral", "gemma4"):
        path = folder / f"{name}.gguf"
        if name in FAMILIES:
            FAMILIES[name].write(path)  # a family that reads numbers of a tensor
        else:
            write_model(MODELS[name], path)
        here, there = open_gguf(path), open_remote(f"{url}/{path.name}?download=true")
        assert here.metadata == there.metadata
        shapes = [
            {n: (t.format, t.shape, t.nbytes) for n, t in f.tensors.items()} for f in (here, there)
        ]
        assert shapes[0] == shapes[1]
        size = path.stat().st_size
        assert SENT[path.name] <= size and (first_bytes > 5000 or SENT[path.name] < size / 2)
        planned = [open_model(path), open_model(f"{url}/{path.name}")]
        assert planned[0] == planned[1] and planned[0].native_bytes > 0


def test_what_no_header_comes_from_is_refused_by_name(server):
    url, folder = server
    path = folder / "whole.gguf"
    write_model(MODELS["qwen3moe"], path)
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:\d+ \(SimpleHTTP.* sends whole files only"):
        open_remote(f"{url}/whole.gguf")
    with pytest.raises(ValueError, match=r"/absent\.gguf: cannot be read \(.*not found.*\)"):
        open_remote(f"{url}/absent.gguf")
    for name, count in (("m-00003-of-00002.gguf", 2), ("m-00001-of-00000.gguf", 0)):
        with pytest.raises(ValueError, match=rf"/{name}: none of {count} parts"):
            open_remote(f"{url}/{name}")
    (folder / "page.gguf").write_text("<!DOCTYPE html><html>Sign in</html>")
    with pytest.raises(ValueError, match=r"http://127.0.0.1:\d+/page\.gguf: is a page of HTML"):
        open_remote(f"{url}/page.gguf")
    path.rename(folder / "cut.gguf")
    whole = (folder / "cut.gguf").read_bytes()
    (folder / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"http://127.0.0.1:\d+/cut\.gguf: .*truncated"):
        open_remote(f"{url}/cut.gguf")
    hostile = bytearray(whole)
    hostile[16:24] = (2**40).to_bytes(8, "little")  # so many keys
    (folder / "hostile.gguf").write_bytes(hostile)
    with pytest.raises(ValueError, match="promises 1099511627776 keys"):
        open_remote(f"{url}/hostile.gguf")


def test_all_parts_of_a_split_are_asked(server):
    url, folder = server
    names = [f"m-{part:05d}-of-00002.gguf" for part in (1, 2)]
    for name in names:
        write_model(MODELS["qwen3moe"], folder / name)  # which do not belong together
    with pytest.raises(ValueError, match=r"http://127.0.0.1:\d+/m-00002-of-00002\.gguf"):
        open_remote(f"{url}/{names[1]}")
    assert SENT.keys() == set(names)
