"""Which tokens stand for no text, and which of them end a generation.

A file says it by token types and by keys; both are often wrong or incomplete in files that people
share, so llama.cpp corrects them by the tokens' names, and the same is done here.

Source: llama.cpp, src/llama-vocab.cpp (build 11549). Two differences: a byte-level file without
an end-of-text key has none (llama.cpp takes id 11, whatever that is), and where several names of
one fill-in-the-middle role are in a vocabulary the first token counts (in llama.cpp any may).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gguf import TokenType

_EOG_NAMES = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip
# Of fill-in-the-middle, by the role that has a key `tokenizer.ggml.<role>_token_id`.
_FIM_NAMES = {
    "fim_pre": (
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
        "<|code_prefix|>", "<|prefix|>",
    ),
    "fim_suf": (
        "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
        "<|code_suffix|>", "<|suffix|>",
    ),
    "fim_mid": (
        "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
        "<|code_middle|>", "<|middle|>",
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}  # fmt: skip
# Keys of older files for the same roles.
_OLD_FIM_ROLES = {"prefix": "fim_pre", "suffix": "fim_suf", "middle": "fim_mid"}
_ENDING_ROLES = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
# Parts of a message of gpt-oss, which its readers want to see.
_SHOWN_NAMES = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")

ROLES = ("bos", "eos", "eot", "eom", *_FIM_NAMES, *_OLD_FIM_ROLES)


@dataclass(frozen=True)
class SpecialTokens:
    """A vocabulary's special tokens."""

    types: list[int]  # `TokenType` of each id, after the corrections
    eog_ids: tuple[int, ...]  # ids that end a generation, ascending
    overridden: list[int]  # ids that the file does not type as CONTROL and that are taken for it


def find_special_tokens(
    vocabulary: Mapping[str, int], types: Sequence[int], ids: Mapping[str, int | None]
) -> SpecialTokens:
    """The special tokens of a vocabulary.

    Args:
        vocabulary: id of each token, in the order of ids.
        types: what the file says of each id.
        ids: the file's `tokenizer.ggml.<role>_token_id` for `ROLES`; absent or None without one.
    """
    texts, corrected = list(vocabulary), list(types)
    roles = {role: token for role, token in ids.items() if token is not None}
    # The old keys are read after the others.
    roles |= {new: roles[old] for old, new in _OLD_FIM_ROLES.items() if old in roles}
    named = {vocabulary[name] for name in _EOG_NAMES if name in vocabulary}
    control = set(named)
    for role, names in _FIM_NAMES.items():
        found = [vocabulary[name] for name in names if name in vocabulary]
        if role not in roles and found:
            roles[role] = min(found)
            control.add(roles[role])
    for token in control:
        corrected[token] = TokenType.CONTROL
    overridden = sorted(token for token in control if types[token] != TokenType.CONTROL)
    for name in _SHOWN_NAMES:
        if name in vocabulary:
            corrected[vocabulary[name]] = TokenType.USER_DEFINED
    ends = named | {roles[role] for role in _ENDING_ROLES if role in roles}
    # Two names of ends are none beside the names of others.
    names = {texts[token] for token in ends}
    called, returned = names & {"<|call|>", "<|calls|>"}, names & {"<|return|>", "<|flush|>"}
    if "<|end|>" in names and called and returned:  # gpt-oss, Solar: it ends a message of several
        ends.remove(vocabulary["<|end|>"])
        corrected[vocabulary["<|end|>"]] = TokenType.USER_DEFINED
    if "</s>" in names and "<|tool_response>" in names:  # Gemma 4: strikes text through
        ends.remove(vocabulary["</s>"])
        corrected[vocabulary["</s>"]] = TokenType.NORMAL
    return SpecialTokens(corrected, tuple(sorted(ends)), overridden)
