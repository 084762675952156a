"""How byte-level BPE splits a text before it merges, by the `tokenizer.ggml.pre` of a file.

Owns the expressions and the names that files give them, and which of these tokenizers take a word
that is a token whole and begin a text with BOS.

Source: llama.cpp, src/llama-vocab.cpp; the expressions are those of the models' own tokenizers.
"""

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


def _modern(digits: str, letters: str = r"\p{L}", symbol_end: str = r"[\r\n]*") -> str:
    """Words with their contractions apart; `letters` may stand in a character class."""
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|{digits}"
        rf"| ?[^\s{letters}\p{{N}}]+{symbol_end}|{_SPACES}"
    )


def _cased(contractions: str, digits: str) -> str:
    """Words end where a capital follows a small letter."""
    capital, small = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
    before = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{before}{capital}*{small}+{contractions}|{before}{capital}+{small}*{contractions}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


QWEN2 = _modern(r"\p{N}")
_LLAMA3 = _modern(r"\p{N}{1,3}")
_BAILING = (
    r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
# Letters of scripts that have capitals, as DeepSeek-LLM's tokenizer lists them.
_CASED_LETTERS = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-"
    "\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-"
    "\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20"
    "-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc"
    "\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6"
    "-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-"
    "\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-"
    "\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-"
    "\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-"
    "\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-"
    "\U000118df\U0001e900-\U0001e943"
)
# llama.cpp takes the spaces among these, such as U+3000, for spaces alone.
_CJK = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff&&[^\s]]+"
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES
)

# A word that is a token is that token, whatever the merges say; and text begins with BOS.
_LIKE_LLAMA3 = (
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
    "jina-v5-nano",
)  # fmt: skip
WHOLE_WORDS_AND_BOS = (*_LIKE_LLAMA3, "tekken")
WHOLE_WORDS = ("glm4",)  # a whole word is a token there too, but no text begins with BOS
# Expressions, each splitting the pieces that the one before has left, and the values of
# tokenizer.ggml.pre that llama.cpp maps to them.
_EXPRESSIONS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    ((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"), ("default",)),
    ((_GPT2,), (
        "gpt-2", "phi-2", "olmo", "mpt", "jais", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de",
        "gigachat", "a.x-4.0", "mellum", "modern-bert", "exaone4", "trillion", "granite-docling",
    )),
    ((r"\p{N}", _GPT2), (
        "starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b",
        "mellum2",
    )),
    ((QWEN2,), (
        "qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "kormo", "f2llmv2", "hunyuan",
        "solar-open", "grok-2",
    )),
    ((_modern(r"\p{N}", r"\p{L}\p{M}"),), ("qwen35",)),
    ((_LLAMA3,), (*_LIKE_LLAMA3, "dbrx", "smaug-bpe", "glm4", "chatglm-bpe")),
    ((_cased(_CONTRACTIONS + "?", r"\p{N}{1,3}"),), ("gpt-4o", "llama4", "kanana2", "minimax-m2")),
    ((_cased("", r"\p{N}"),), ("tekken",)),
    ((_BAILING,), ("bailingmoe", "bailingmoe2", "llada-moe")),
    ((
        "[\r\n]", rf"\s?[{_CASED_LETTERS}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001\u3002]+", r"\s+$",
        _CJK, r"\p{N}+",
    ), ("deepseek-llm",)),
    (("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"), ("deepseek-coder",)),
    ((r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK_V3),
     ("deepseek-v3", "hunyuan-dense", "joyai-llm")),
)  # fmt: skip
EXPRESSIONS = {name: expressions for expressions, names in _EXPRESSIONS for name in names}
