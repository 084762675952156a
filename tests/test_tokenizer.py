"""The tokenizer against llama.cpp's own vectors, and as the inverse of itself."""

import time
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hobbit_jax.model_file.gguf_file import FileStamp, GGUFFile, open_gguf
from hobbit_jax.model_file.tokenizer import Tokenizer

VOCABULARIES = ("gpt-2", "llama-spm", "qwen2")


@cache
def load(data_dir: Path, name: str) -> Tokenizer:
    return Tokenizer(open_gguf(data_dir / "vocab" / f"ggml-vocab-{name}.gguf"))


def byte_level_file(**changes) -> GGUFFile:
    """A vocabulary of GPT-2's 256 byte characters, a few merges, and three special tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = [chr(b) for b in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]
    tokens = [*alphabet, "he", "ll", "hell", "Ġhe", "11", "1111", "<|stop|>", "<tool>", "<tool"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 3) + [3, 4, 4],
        "tokenizer.ggml.merges": ["h e", "l l", "he ll", "Ġ he", "1 1", "11 11"],
        "tokenizer.ggml.eos_token_id": len(tokens) - 3,
    }
    kept = {k: v for k, v in (metadata | changes).items() if v is not None}
    return GGUFFile((FileStamp(Path("tiny.gguf"), 0, 0, 0, 0),), kept, {}, {})


@pytest.mark.parametrize("name", VOCABULARIES)
def test_llama_cpp_vectors(data_dir, name):
    """Every line of llama.cpp's vectors: made without BOS and without parsing special tokens."""
    path = data_dir / "vocab" / f"ggml-vocab-{name}.gguf"
    tokenizer = load(data_dir, name)
    texts = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text().split("\n")
    assert len(texts) == len(lines) == 47
    for text, line in zip(texts, lines, strict=True):
        wanted = [int(word) for word in line.split()]
        ids = tokenizer.encode(text, add_bos=False, parse_special=False)
        assert ids == wanted, text
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", VOCABULARIES)
def test_decode_inverts_encode(data_dir, name):
    tokenizer = load(data_dir, name)
    specials = st.sampled_from(["<|im_start|>", "<s>", "</s>", "<|endoftext|>", "  ", "\n", "🦙"])
    # SentencePiece writes a space as U+2581, so that one character cannot come back.
    plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.one_of(plain, specials)).map("".join), st.booleans())
    def check(text, parse_special):
        ids = tokenizer.encode(text, add_bos=False, parse_special=parse_special)
        assert tokenizer.decode(ids) == text
        with_bos = tokenizer.encode(text, add_bos=True, parse_special=False)
        assert with_bos[0] == tokenizer.bos_id
        if not parse_special:
            assert with_bos[1:] == ids
            assert tokenizer.decode(with_bos, skip_special=True) == text

    check()


def test_special_tokens():
    tokenizer = Tokenizer(byte_level_file())
    stop, tool = tokenizer.eos_id, tokenizer.eos_id + 1
    assert (tokenizer.bos_id, tokenizer.add_bos, len(tokenizer.byte_lengths())) == (
        None,
        False,
        265,
    )
    ids = tokenizer.encode("hell<|stop|> he<tool>")
    assert ids == [258, stop, 259, tool]
    assert tokenizer.decode(ids) == "hell<|stop|> he<tool>"
    assert tokenizer.decode(ids, skip_special=True) == "hell he<tool>"
    unparsed = tokenizer.encode("<|stop|><tool>", parse_special=False)
    assert stop not in unparsed and unparsed[-1] == tool  # user-defined tokens always count
    assert tokenizer.decode(unparsed) == "<|stop|><tool>"
    with pytest.raises(ValueError, match="bos_token_id"):
        tokenizer.encode("he", add_bos=True)
    with pytest.raises(ValueError, match="265, expected 0 to 264"):
        tokenizer.decode([265])
    with pytest.raises(ValueError, match="surrogates"):
        tokenizer.encode("a\ud800")


def with_specials(*names: str, types: list[int] | None = None, **changes) -> GGUFFile:
    """The byte-level vocabulary with other special tokens behind the 262 ordinary ones."""
    tokens = byte_level_file().metadata["tokenizer.ggml.tokens"][:-3]
    return byte_level_file(**{
        "tokenizer.ggml.tokens": [*tokens, *names],
        "tokenizer.ggml.token_type": [1] * len(tokens) + (types or [3] * len(names)),
        "tokenizer.ggml.eos_token_id": len(tokens),
        **changes,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("names", "changes", "ends"),
    [
        (("<|im_end|>", "<|endoftext|>", "<|im_start|>"), {}, (0, 1)),  # Qwen3
        (("<|endoftext|>", "<x>", "<y>"), {"eot": 1, "eom": 2}, (0, 1, 2)),
        (
            ("<x>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|fim_prefix|>"),
            {},
            (0, 1, 2, 3),
        ),
        (("<x>", "<y>", "<|fim_pad|>"), {"fim_pad": 1}, (0, 1)),
        (("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|start_header_id|>"), {}, (0, 1, 2)),
        (("<|return|>", "<|call|>", "<|end|>", "<|start|>"), {}, (0, 1)),  # gpt-oss
        (("<|return|>", "<|end|>"), {}, (0, 1)),
        (("<eos>", "<turn|>", "<|tool_response>", "</s>"), {}, (0, 1, 2)),  # Gemma 4
        (("<｜end▁of▁sentence｜>", "</s>", "[e~[", "<|End|>"), {}, (0, 1, 2)),
    ],
)
def test_a_generation_ends_where_llama_cpp_ends_it(names, changes, ends):
    """By keys and by names; these are its answers (`test_tokenizer_oracles.py` asks it)."""
    first = 262
    keys = {f"tokenizer.ggml.{role}_token_id": first + i for role, i in changes.items()}
    tokenizer = Tokenizer(with_specials(*names, **keys))
    assert tokenizer.eog_ids == tuple(first + i for i in ends)
    assert tokenizer.encode(names[0]) == [first]


def test_control_tokens_that_are_typed_as_text_count_and_are_warned_of(caplog):
    names = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
    file = with_specials(*names, types=[1, 4, 1])
    for _ in range(2):
        tokenizer = Tokenizer(file)
    assert tokenizer.encode("he<|im_end|>")[-1] == 263 and tokenizer.eog_ids == (262, 263)
    assert tokenizer.decode([262, 263, 256], skip_special=True) == "he"
    assert len(tokenizer.encode("<|im_start|>")) > 1  # nobody knows that one by its name
    (warning,) = caplog.messages
    assert "'<|endoftext|>', '<|im_end|>'" in warning and "im_start" not in warning


def test_what_makes_the_ids_others_than_in_training_is_warned_of(caplog):
    missing = byte_level_file(**{"tokenizer.ggml.pre": None, "general.name": "missing"})
    pieces = Tokenizer(missing)
    default = Tokenizer(byte_level_file(**{"tokenizer.ggml.pre": "default"}))
    assert pieces.encode("it's 11111") == default.encode("it's 11111")
    (warning,) = caplog.messages
    assert "tokenizer.ggml.pre is missing" in warning and "token ids" in warning
    caplog.clear()
    words = ["aab", "ab", "aa", "a", "b"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    equal = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 5],
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    tokenizer = Tokenizer(byte_level_file(**equal))
    texts = [tokenizer.decode([i]) for i in tokenizer.encode("baaab", add_bos=False)]
    assert texts == ["b", "aa", "ab"]  # the leftmost pair first, as in llama.cpp
    (warning,) = caplog.messages
    assert "scores are equal" in warning and "left to right" in warning


def test_a_text_that_begins_with_bos_gets_no_second_one(data_dir):
    tokenizer = load(data_dir, "llama-spm")
    assert tokenizer.encode("<s>[INST] hi [/INST]") == tokenizer.encode("[INST] hi [/INST]")
    assert tokenizer.encode("<s>a", add_bos=True)[:2] == [1, 263]
    assert tokenizer.encode("<s><s>a") == [1, 1, 263]  # as written
    assert tokenizer.encode("<s>a", parse_special=False)[:2] == [1, 529]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("qwen2", ["1"] * 5),
        ("starcoder", ["1"] * 5),
        ("gpt-2", ["1111", "1"]),
        ("olmo", ["1111", "1"]),
        ("default", ["11", "1", "11"]),
        ("llama-bpe", ["11", "1", "11"]),
        ("dbrx", ["11", "1", "11"]),
    ],
)
def test_digits_tell_the_pre_tokenisers_apart(pre, pieces):
    changes = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.bos_token_id": 0}
    tokenizer = Tokenizer(byte_level_file(**changes))
    assert tokenizer.add_bos is (pre == "llama-bpe")
    assert [tokenizer.decode([i]) for i in tokenizer.encode("11111", add_bos=False)] == pieces


def test_aliases_split_as_the_pre_tokeniser_that_they_name():
    """Pairs as llama.cpp maps them (llama-vocab.cpp)."""
    text = "I'LL pay 12345, naïve\n\n  日本語 x=1!"
    for alias, name in {
        "falcon3": "llama3", "lfm2": "llama-bpe", "pixtral": "llama-v3", "glm4": "dbrx",
        "kormo": "qwen2", "hunyuan": "qwen2", "megrez": "qwen2", "exaone4": "gpt-2",
        "jina-v2-de": "gpt-2", "trillion": "olmo", "exaone": "starcoder", "minerva-7b": "smollm",
    }.items():  # fmt: skip
        ids = {"tokenizer.ggml.bos_token_id": 0}
        one, other = (
            Tokenizer(byte_level_file(**{"tokenizer.ggml.pre": pre}, **ids))
            for pre in (alias, name)
        )
        assert one.encode(text) == other.encode(text) and one.add_bos == other.add_bos


def test_of_equal_merges_the_first_rank_counts():
    tokens = byte_level_file().metadata["tokenizer.ggml.tokens"]
    tokens = [*tokens[:-3], "el", *tokens[-3:]]
    types = [1] * (len(tokens) - 3) + [3, 4, 4]
    for merges, pieces in (
        (["h e", "e l", "h e"], ["he", "l"]),
        (["e l", "h e", "e l"], ["h", "el"]),
    ):
        changes = {"tokens": tokens, "token_type": types, "merges": merges}
        file = byte_level_file(**{f"tokenizer.ggml.{key}": v for key, v in changes.items()})
        tokenizer = Tokenizer(file)
        assert [tokenizer.decode([i]) for i in tokenizer.encode("hel")] == pieces


def test_empty_tokens_are_told_apart_by_llama_cpps_names():
    tokens = byte_level_file().metadata["tokenizer.ggml.tokens"]
    tokens = [*tokens, "", ""]
    changes = {"tokens": tokens, "token_type": [1] * len(tokens)}
    file = byte_level_file(**{f"tokenizer.ggml.{key}": value for key, value in changes.items()})
    tokenizer = Tokenizer(file)
    assert tokenizer.decode([265, 266]) == "[EMPTY_265][EMPTY_266]"
    assert tokenizer.encode("he") == [256]


WRONG = (1, -1, 1.5, float("inf"), True, "x", ["x"], [1], [[1]], [], [None], "\udcff", 2**32, None)
KEYS = ("model", "pre", "tokens", "token_type", "merges", "scores", "add_bos_token")
KEYS += ("add_space_prefix", "bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_any_value_of_any_key_is_taken_or_refused_in_one_line(model, key):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a"]
    of_llama = {"tokens": tokens, "scores": [0.0] * 260, "token_type": [1] * 260, "model": "llama"}
    base = of_llama if model == "llama" else {}
    refused = 0
    for value in WRONG:
        changes = {f"tokenizer.ggml.{k}": v for k, v in base.items()}
        file = byte_level_file(**changes)
        file.metadata[f"tokenizer.ggml.{key}"] = value
        try:
            Tokenizer(file).encode("a")
        except (ValueError, NotImplementedError) as error:
            assert type(error) in (ValueError, NotImplementedError)
            assert "tiny.gguf: " in str(error) and "\n" not in str(error)
            refused += 1
    assert refused >= 8 or key in ("merges", "pre", "scores")  # which one of the two ignores


def test_stream_never_breaks_a_character():
    tokenizer = Tokenizer(byte_level_file())
    ids = tokenizer.encode("a 🦙 é")
    pieces = list(tokenizer.decode_stream(ids))
    assert "".join(pieces) == "a 🦙 é"
    assert len(pieces) == len(ids) and "\ufffd" not in "".join(pieces)
    assert "".join(tokenizer.decode_stream(ids[:-1])) == "a 🦙 \ufffd"


def test_sentencepiece_spaces(data_dir):
    """BOS from the file's own setting; the space prefix comes and goes, in a stream it stays."""
    tokenizer = load(data_dir, "llama-spm")
    ids = tokenizer.encode("Hello world")
    assert ids[0] == tokenizer.bos_id == 1
    assert tokenizer.decode(ids) == "<s>Hello world"
    assert "".join(tokenizer.decode_stream(ids[2:])) == " world"
    # llama.cpp's answer (llama-cpp-python 0.3): text after a special token is prefixed again.
    assert tokenizer.encode("a</s> b", add_bos=False) == [263, 2, 29871, 289]
    unparsed = tokenizer.encode("a</s> b", add_bos=False, parse_special=False)
    assert unparsed == [263, 829, 29879, 29958, 289]


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"tokenizer.ggml.model": "t5"}, NotImplementedError, "'t5'.*'gpt2'.*'llama'"),
        ({"tokenizer.ggml.pre": "viking"}, NotImplementedError, "'viking'.*qwen2"),
        ({"tokenizer.ggml.merges": None}, ValueError, "tokenizer.ggml.merges is missing"),
        ({"tokenizer.ggml.merges": ["h z", "hz e"]}, ValueError, "'h z'"),
        ({"tokenizer.ggml.token_type": [1]}, ValueError, "1 entries.*265"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, ValueError, "'a' appears twice"),
        (
            {"tokenizer.ggml.eos_token_id": 999},
            ValueError,
            "999, expected an integer from 0 to 264",
        ),
        ({"tokenizer.ggml.add_bos_token": True}, ValueError, "bos_token_id"),
        (
            {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0] * 265},
            ValueError,
            "<0x00>",
        ),
    ],
)
def test_refusals(changes, error, match):
    with pytest.raises(error, match=match) as caught:
        Tokenizer(byte_level_file(**changes))
    assert "\n" not in str(caught.value)


def test_a_large_vocabulary_builds_quickly(data_dir):
    file = open_gguf(data_dir / "vocab" / "ggml-vocab-qwen2.gguf")
    start = time.process_time()
    Tokenizer(file)
    assert time.process_time() - start < 3.0  # measured: 1.6 s on a busy core
