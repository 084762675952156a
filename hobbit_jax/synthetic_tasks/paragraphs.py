"""The tables of both tasks, which are text files of this folder."""

from pathlib import Path


def paragraphs(file_name: str) -> list[list[str]]:
    """The lines of each paragraph; empty lines stand between them."""
    text = Path(__file__).with_name(file_name).read_text(encoding="utf-8")
    return [paragraph.splitlines() for paragraph in text.split("\n\n")]
