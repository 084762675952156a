"""Comparisons with other programs: agreement, speed and memory on the same tokens in one run."""

from collections.abc import Sequence

from hobbit_jax.record import Record
from hobbit_jax.report.table import MIB, Column, table

STUDY = "baselines"
_WHICH = (
    Column("model", lambda r: r.setting.get("model")),
    Column(
        "baseline", lambda r: f"{r.notes['baseline_program']} {r.notes.get('baseline_mode', '')}"
    ),
    Column("cores", lambda r: r.setting.get("threads")),
    Column("our products", lambda r: r.setting.get("implementation") or "float32, before ggml's"),
    Column("pool, MiB", lambda r: r.setting.get("budget_bytes"), ".0f", unit=MIB),
)
_AGREEMENT = (
    Column("tokens", "evaluation_tokens", ","),
    Column("logits differ by at most", "logit_max_difference", ".2g"),
    Column("root mean square", "logit_rms_difference", ".2g"),
    Column("of their σ", "logit_std", ".2g"),
    Column("perplexity, ours", "perplexity", ".4f"),
    Column("the baseline's", "perplexity_baseline", ".4f"),
    Column("difference", "perplexity_difference", "+.2g", interval=True),
    Column("KL mean", "kl_mean_nats", ".2g", interval=True),
    Column("KL p99", "kl_p99_nats", ".2g", interval=True),
    Column("top-1", "top1_agreement", ".4f", interval=True),
)


def _rates(title: str, metric: str, form: str) -> list[Column]:
    return [
        Column(f"{title}, ours", f"{metric}_ours", form, interval=True),
        Column("the baseline's", f"{metric}_baseline", form, interval=True),
        Column("ratio", f"{metric}_ratio", ".2f", interval=True),
    ]


_SPEED = (
    *_rates("decode tokens/s", "decode_tokens_per_s", ".1f"),
    *_rates("prefill tokens/s", "prefill_tokens_per_s", ".0f"),
    Column("first token, s, ours", "first_token_s_ours", ".3f"),
    Column("first token, s, baseline", "first_token_s_baseline", ".3f"),
    Column("load average before", "load_average_before", ".1f"),
    Column("after", "load_average_after", ".1f"),
)
_PARTS = {"in no file": "anonymous", "pages of files": "file", "both": "total"}
_MEMORY = tuple(
    Column(f"{title}, {whose}", f"{side}_memory_peak_{part}", ".0f", unit=MIB)
    for title, part in _PARTS.items()
    for whose, side in (("ours", "ours"), ("the baseline's", "baseline"))
)


def section(records: Sequence[Record]) -> str:
    """The tables; empty without a record."""
    rows = sorted(records, key=lambda r: r.name)
    tables = (table([*_WHICH, *columns], rows) for columns in (_AGREEMENT, _SPEED, _MEMORY))
    return "\n\n".join(filter(None, tables))
