"""The tokenizer against llama.cpp itself, on vocabularies that nobody converted carefully."""

import random

import pytest
from conftest import NEEDS_LLAMA_CPP
from llama_cpp_vocab import LlamaCppVocab
from test_tokenizer import byte_level_file

from hobbit_jax.model_file.gguf_file import open_gguf, write_gguf
from hobbit_jax.model_file.pre_tokenizers import EXPRESSIONS
from hobbit_jax.model_file.sentencepiece import SPACE
from hobbit_jax.model_file.special_tokens import _EOG_NAMES, _FIM_NAMES, _SHOWN_NAMES
from hobbit_jax.model_file.tokenizer import BYTE_CHARACTERS, Tokenizer
from hobbit_jax.models.registry import FAMILIES

pytestmark = [pytest.mark.oracle, NEEDS_LLAMA_CPP]
KEY = "tokenizer.ggml.{}_token_id"
# Of every class that an expression knows: cased and caseless letters, marks, digits, symbols,
# punctuation, spaces.
CHARACTERS = (
    "aAbZsStTdrevl'’éÉжЖßǅʰªあ漢한ไ\u0301\u0e34\u0951127٣Ⅷ½ \t\n\r\u3000\u00a0.,!?-/（。‘$+^|`€😀_"
)


def written(path, metadata):
    write_gguf(path, {"general.architecture": "llama", **metadata}, [])
    return path


def special_names(draw: random.Random) -> list[str]:
    """Some of llama.cpp's names and some of nobody's; of a fill-in role one at most."""
    names = draw.sample([*_EOG_NAMES, *_SHOWN_NAMES], draw.randrange(8))
    roles = draw.sample([*_FIM_NAMES], draw.randrange(4))
    names += [draw.choice(_FIM_NAMES[role]) for role in roles]
    if draw.random() < 0.3:
        names += ["<|end|>", "<|return|>", draw.choice(["<|call|>", "<|calls|>"]), "<|flush|>"]
    if draw.random() < 0.3:
        names += ["</s>", "<|tool_response>"]
    names += draw.sample(["<s>", "<|pad|>", "<x>", "x>y", "<|a", "|>"], 3)
    return list(dict.fromkeys(names))


def byte_level(draw: random.Random) -> dict:
    metadata = dict(byte_level_file().metadata)
    kept = metadata["tokenizer.ggml.tokens"][:-3]
    tokens = kept + special_names(draw)
    added = range(len(kept), len(tokens))
    types = [1] * len(kept) + [draw.choice([1, 1, 2, 3, 3, 3, 4, 5]) for _ in added]
    metadata["tokenizer.ggml.pre"] = draw.choice(["", *EXPRESSIONS])
    for role in ("eot", "eom", "fim_pad", "fim_sep", "fim_rep", "fim_pre", "prefix", "middle"):
        if draw.random() < 0.15:
            metadata[KEY.format(role)] = draw.choice(added)
    ids = {KEY.format("bos"): draw.choice(added), KEY.format("eos"): draw.choice(added)}
    if draw.random() < 0.7:
        metadata["tokenizer.ggml.add_bos_token"] = draw.random() < 0.5
    return metadata | ids | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
    }  # fmt: skip


def merging_characters(draw: random.Random) -> dict:
    """Every two neighbours merge, unless the text was split between them."""
    names = ["".join(BYTE_CHARACTERS[b] for b in c.encode()) for c in CHARACTERS]
    merges = [f"{name[:n]} {name[n]}" for name in names for n in range(1, len(name))]
    merges += [f"{left} {right}" for left in names for right in draw.sample(names, 20)]
    draw.shuffle(merges[sum(len(name) - 1 for name in names) :])
    tokens = [*BYTE_CHARACTERS, *(m.replace(" ", "", 1) for m in merges), "<s>", "</s>"]
    tokens, merges = list(dict.fromkeys(tokens)), list(dict.fromkeys(merges))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 3],
        "tokenizer.ggml.merges": merges,
        KEY.format("bos"): len(tokens) - 2,
        KEY.format("eos"): len(tokens) - 1,
    }


def gemma(draw: random.Random) -> dict:
    """Gemma 4's: characters and not bytes are merged, and some characters have no token."""
    known = ["\n", "\n\n", SPACE, *draw.sample([c for c in CHARACTERS if c.strip()], 25)]
    pairs = [(a, b) for a in known for b in draw.sample(known, 8) if "\n" not in a + b]
    draw.shuffle(pairs)
    words = list(dict.fromkeys([*known, *(a + b for a, b in pairs), f"a{SPACE}漢"]))
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [*words, "<|turn>", "<turn|>", "<|tool_response>"]
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, 2, *[6] * 256, *[1] * len(words), 3, 3, 4],
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in pairs],
        "tokenizer.ggml.add_bos_token": draw.random() < 0.5,
        "tokenizer.ggml.add_space_prefix": False,
        KEY.format("bos"): 2, KEY.format("eos"): 1, KEY.format("unknown"): 3,
    }  # fmt: skip


def sentencepiece(draw: random.Random) -> dict:
    """Few letters and few scores, so that ties and overlapping pieces are everywhere."""
    letters = "ab" + SPACE
    pieces = {"".join(draw.choices(letters, k=draw.randrange(2, 6))) for _ in range(40)}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    first = len(tokens)
    tokens += sorted(pieces) + [n for n in special_names(draw) if n not in ("<s>", "</s>")]
    end = first + len(pieces)
    types = [2, 3, 3, *[6] * 256, *[1] * (end - 259)]
    types += [draw.choice([1, 3, 3, 4]) for _ in tokens[end:]]
    scores = [0.0] * first + [float(-draw.randrange(1, 4)) for _ in tokens[first:]]
    if draw.random() < 0.3:
        scores = [0.0] * len(tokens)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": draw.random() < 0.7,
        "tokenizer.ggml.add_bos_token": draw.random() < 0.7,
    }


def texts(draw: random.Random, tokens: list[str]) -> list[str]:
    plain = ["he", "hell", " ", "  ", "a", "b", "aa", "ab", "abab ", "é", "1111", "\n", "x"]
    parts = plain * 3 + [t for t in tokens[256:] if not t.startswith("<0x")]
    return ["".join(draw.choices(parts, k=draw.randrange(1, 30))) for _ in range(20)]


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("seed", range(60))
def test_ids_and_ends_are_llama_cpps(tmp_path, make, seed):
    draw = random.Random(seed)
    metadata = make(draw)
    path = written(tmp_path / "vocab.gguf", metadata)
    tokenizer = Tokenizer(open_gguf(path))
    with LlamaCppVocab(path) as theirs:
        assert tokenizer.eog_ids == theirs.eog_ids
        assert tokenizer.add_bos == theirs.add_bos
        for text in texts(draw, metadata["tokenizer.ggml.tokens"]):
            for special in (True, False):
                ids = tokenizer.encode(text, add_bos=False, parse_special=special)
                assert ids == theirs.encode(text, False, special), (text, special)
                # Theirs says so, and leaves two in place.
                doubled = theirs.encode(text, True, special)
                begins = theirs.add_bos and ids[:1] == [tokenizer.bos_id]
                assert tokenizer.encode(text, None, special) == doubled[begins:]


def same_ids(path, drawn: list[str]) -> None:
    tokenizer = Tokenizer(open_gguf(path))
    with LlamaCppVocab(path) as theirs:
        assert (tokenizer.eog_ids, tokenizer.add_bos) == (theirs.eog_ids, theirs.add_bos)
        for text in drawn:
            ids = tokenizer.encode(text, add_bos=False)
            assert ids == theirs.encode(text, False, True), text
            assert tokenizer.decode(ids) == text


# What llama.cpp's convert_hf_to_gguf.py writes for the models of each family; None: SentencePiece.
PUBLISHED = {
    "qwen2": "qwen2", "qwen2moe": "qwen2", "qwen3": "qwen2", "qwen3moe": "qwen2",
    "qwen3vlmoe": "qwen2", "qwen3next": "qwen2", "qwen35moe": "qwen35", "olmoe": "olmo",
    "gpt-oss": "gpt-4o", "deepseek2": "deepseek-llm deepseek-v3 glm4 kanana2", "glm4moe": "glm4",
    "bailingmoe2": "bailingmoe2", "granitemoe": "refact dbrx", "lfm2moe": "lfm2",
    "llama": "llama-bpe tekken", "ernie4_5-moe": None, "gemma4": None,
}  # fmt: skip


def test_the_published_files_of_every_family_can_be_tokenised():
    assert PUBLISHED.keys() == FAMILIES.keys()
    wanted = {name for names in PUBLISHED.values() if names for name in names.split()}
    assert not wanted - EXPRESSIONS.keys()


@pytest.mark.parametrize("pre", EXPRESSIONS)
def test_every_pre_tokenizer_splits_as_llama_cpp_does(tmp_path, pre):
    draw = random.Random(pre)
    metadata = {**merging_characters(draw), "tokenizer.ggml.pre": pre}
    drawn = ["".join(draw.choices(CHARACTERS, k=draw.randrange(1, 60))) for _ in range(150)]
    same_ids(written(tmp_path / "vocab.gguf", metadata), drawn)


@pytest.mark.parametrize("seed", range(20))
def test_gemma_4s_ids_are_llama_cpps(tmp_path, seed):
    draw = random.Random(seed)
    parts = [
        *CHARACTERS,
        "\n",
        "\n\n",
        "\n\n\n",
        " ",
        "  ",
        "<|turn>",
        "<turn|>",
        "<|tool_response>",
    ]
    drawn = ["".join(draw.choices(parts, k=draw.randrange(1, 40))) for _ in range(60)]
    same_ids(written(tmp_path / "vocab.gguf", gemma(draw)), drawn)
