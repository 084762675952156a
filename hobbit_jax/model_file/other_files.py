"""What a file is that is no model, and how to get the right one.

Owns the advice.

Source: the formats' own specifications (Git LFS pointer v1; safetensors; magic numbers in
file(1)); ggml before GGUF: llama.cpp, src/llama-util.h of 2023; gguf.constants.GGUFType.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from hobbit_jax.model_file.metadata import shown

if TYPE_CHECKING:
    from hobbit_jax.model_file.gguf_file import GGUFFile

START_BYTES = 512  # that `describe_start` looks at

_CONVERT = "convert the model's folder with llama.cpp's convert_hf_to_gguf.py"
_UNPACK = "unpack it, and give the .gguf file inside"
_OLD = (
    "written before GGUF (August 2023), which no current program reads; download a GGUF file of "
    "the model, or convert the original model with llama.cpp's convert_hf_to_gguf.py"
)
# First bytes, what they say, what to do.
_MAGICS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs.github.com/spec/",
     "a Git LFS pointer, which stands for the file in a repository",
     "run git lfs pull in the repository, or download the file itself"),
    (b"lmgg", "a GGML file", _OLD),
    (b"fmgg", "a GGMF file", _OLD),
    (b"tjgg", "a GGJT file", _OLD),
    (b"algg", "a GGLA file (a LoRA adapter)", _OLD),
    (b"PK\x03\x04", "a ZIP archive (PyTorch's checkpoints are some)", f"{_UNPACK}, or {_CONVERT}"),
    (b"\x80", "a pickle, as PyTorch's checkpoints are", _CONVERT),
    (b"\x1f\x8b", "compressed by gzip", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", _UNPACK),
)  # fmt: skip

# Patterns that texts begin with, in any case; what they say, what to do.
_TEXTS: tuple[tuple[str, str, str], ...] = (
    ("<!doctype html|<html|<head|<!--", "a page of HTML",
     "download the file itself (on Hugging Face …/resolve/… instead of …/blob/…, and log in "
     "where a model asks for it)"),
    (r"<\?xml", "a page of XML", "a server answered with it: download it again"),
    (r".*vnd\.(docker\.distribution\.manifest|ollama\.image)", "a manifest of Ollama",
     "give the blob that it names under application/vnd.ollama.image.model"),
    (r"[{\[]", "JSON", "give the .gguf file of the model, or download it again"),
)  # fmt: skip

# Names of the pieces of a file, which have to be joined before a program can read them.
_PIECE = re.compile(
    r"(?P<whole>.+?\.gguf)[-.]((part|split)[-_.]?(\d+(of\d+)?|[a-z]{1,2})|\d{2,3}|a[a-z])"
    r"|(?P<stem>.+?)[-.]part[-_.]?\d+of\d+(\.gguf)?",
    re.IGNORECASE,
)
_UNFINISHED = (".part", ".partial", ".incomplete", ".crdownload", ".download", ".aria2", ".tmp")


def refuse_path(path: Path) -> None:
    """Refuses a path that names no file by a FileNotFoundError or a ValueError."""
    text = str(path)
    if not path.exists():
        if re.match(r"(https?|hf):", text):
            raise ValueError(f"{text}: is an address; download the file and give its path")
        if path.is_symlink():
            raise FileNotFoundError(
                f"{path}: is a link to {path.readlink()}, which does not exist; download the file "
                "again"
            )
        raise FileNotFoundError(f"{path}: no such file; give the path of a .gguf file")
    if path.is_dir():
        raise ValueError(f"{path}: is a directory, {_inside(path)}")
    if not path.is_file():
        raise ValueError(f"{path}: is no regular file; give the path of a .gguf file")


def describe_piece(path: Path) -> str | None:
    """What to do about a file that is one of several pieces by its name; None if it is none."""
    piece = _PIECE.fullmatch(path.name)
    if piece is None:
        return None
    start = piece["whole"] or piece["stem"]
    whole = piece["whole"] or f"{start}.gguf"
    return (
        "is one of the pieces that a file was cut into, expected the whole; join them in their "
        f"order (cat {start}[-.]* > {whole}) and give {whole}"
    )


def _inside(folder: Path) -> str:
    """What to do about a folder, by what it holds."""
    models = sorted(entry.name for entry in folder.glob("*.gguf") if entry.is_file())
    if models:
        return f"expected a .gguf file; give one inside it, such as {models[0]}"
    if any(folder.glob("*.safetensors")) or (folder / "config.json").exists():
        return f"a Hugging Face model in other files than GGUF; {_CONVERT}"
    return "expected a .gguf file; it has none inside"


def describe_start(path: Path, head: bytes) -> str:
    """What a file is that does not begin with "GGUF", and how to get the right one."""
    if not head:
        return "the file is empty, expected a GGUF file; download or copy it again"
    if piece := describe_piece(path):
        return piece
    for magic, what, advice in _MAGICS:
        if head.startswith(magic):
            return _instead(what, advice)
    if path.name.endswith(_UNFINISHED):
        return _instead("a download that has not ended", "let it end, or start it again")
    if not any(head):
        return (
            "begins with zeros where a GGUF file has b'GGUF': a download or copy that has not "
            "ended; download it again"
        )
    # Eight bytes of length, then JSON.
    if head[8:10] in (b'{"', b"{ ") and int.from_bytes(head[:8], "little") < 1 << 32:
        return _instead("a safetensors file", _CONVERT)
    return _describe_text(head) or (
        f"starts with {head[:4]!r}, expected b'GGUF': not a GGUF file; download a GGUF file of the "
        f"model, or {_CONVERT}"
    )


def _describe_text(head: bytes) -> str | None:
    """What a text instead of a model says; None of bytes that are no text."""
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text = head.decode(encoding, errors="replace").strip()
    if any(not (c.isprintable() or c.isspace()) or c == "\ufffd" for c in text[:-4]):
        return None
    for pattern, what, advice in _TEXTS:
        if re.match(pattern, text, re.IGNORECASE | re.DOTALL):
            return _instead(what, advice)
    advice = "give the model's .gguf file, or download it again"
    return _instead(f"a text that begins {shown(text[:40])}", advice)


def _instead(what: str, advice: str) -> str:
    return f"is {what}, expected a GGUF file; {advice}"


def refuse_other_kinds(file: "GGUFFile") -> None:
    """Refuses a GGUF file that holds something else than a model by a ValueError that says what."""
    # Compared only: a value of another type is none of these kinds.
    kind, arch = (file.metadata.get(f"general.{key}") for key in ("type", "architecture"))
    if kind == "adapter" or any(name.endswith((".lora_a", ".lora_b")) for name in file.tensors):
        what = (
            "a LoRA adapter, which changes a model; merge it into its base model with llama.cpp's "
            "llama-export-lora and give the result"
        )
    elif kind == "mmproj" or arch == "clip":
        what = (
            "the part of a model that reads images or sound; give the .gguf file of its language "
            "model"
        )
    elif kind == "imatrix" or arch == "imatrix" or "imatrix.chunk_count" in file.metadata:
        what = "an importance matrix of llama.cpp; give the .gguf file of its model"
    elif arch == "controlvector":
        what = "a control vector, which steers a model; give the .gguf file of the model"
    elif kind == "vocab" or not file.tensors:
        what = "a GGUF file without tensors, such as a vocabulary; give the .gguf file of a model"
    else:
        return
    raise ValueError(f"{file.paths[0]}: is {what}")
