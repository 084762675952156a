"""Comparisons with other programs: agreement, speed and memory on the same tokens in one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hobbit_jax.record import Benchmark, Record
from hobbit_jax.report.table import MIB, Column, table

STUDY = "baselines"
_ABOUT = (
    "The same file in another program, on the same token ids, in one run. The baseline is the "
    "reference: KL is KL(baseline ‖ ours) in nats a token, perplexity differences are ours less "
    "the baseline's within each window."
)
_ABOUT_SPEED = (
    "Both are loaded at once, bound to the same cores, and take turns. Medians of the turns; a "
    "ratio is ours over the baseline's within a turn, above 1 where we are faster. A load average "
    "above the cores used means that others ran beside. Memory is the peak of a whole run, MiB."
)


def _setting(name: str) -> Any:
    def get(record: Record) -> Any:
        assert isinstance(record.asked, Benchmark)
        return record.asked.setting.get(name)

    return get


def _pair(title: str, metric: str, form: str, unit: float = 1) -> list[Column]:
    return [
        Column(f"{title}, {side}", f"{metric}_{side}", form, unit=unit)
        for side in ("ours", "baseline")
    ]


def _range(title: str, metric: str, form: str) -> list[Column]:
    sides = [f"{metric}_{side}" for side in ("ours", "baseline", "ratio")]
    heads = (f"{title}, ours", "the baseline's", "ratio")
    return [Column(h, s, form if i < 2 else ".2f", interval=True)
            for i, (h, s) in enumerate(zip(heads, sides, strict=True))]  # fmt: skip


def section(records: Sequence[Record]) -> str:
    """Text and tables; empty without a record."""
    which = [
        Column("model", _setting("model")),
        Column(
            "baseline",
            lambda r: f"{r.notes['baseline_program']} {r.notes.get('baseline_mode', '')}",
        ),
        Column("cores", _setting("threads")),
        Column("pool, MiB", _setting("budget_bytes"), ".0f", unit=MIB),
    ]
    agreement = [
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
    ]
    speed = [
        *_range("decode tokens/s", "decode_tokens_per_s", ".1f"),
        *_range("prefill tokens/s", "prefill_tokens_per_s", ".0f"),
        *_pair("first token, s", "first_token_s", ".3f"),
        Column("load average before", "load_average_before", ".1f"),
        Column("after", "load_average_after", ".1f"),
    ]
    memory = [
        column
        for title, part in (
            ("in no file", "anonymous"),
            ("pages of files", "file"),
            ("both", "total"),
        )
        for column in (
            Column(f"{title}, ours", f"ours_memory_peak_{part}", ".0f", unit=MIB),
            Column(f"{title}, the baseline's", f"baseline_memory_peak_{part}", ".0f", unit=MIB),
        )
    ]
    rows = sorted(records, key=lambda r: r.name)
    if not rows:
        return ""
    tables = [table([*which, *columns], rows) for columns in (agreement, speed, memory)]
    return "\n\n".join([_ABOUT, tables[0], _ABOUT_SPEED, *tables[1:]])
