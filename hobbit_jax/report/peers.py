"""What the rows of `peers/comparison.py` say, as text: agreement, speed, memory.

Owns the reading of those rows and the section on peers of the decision document.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hobbit_jax import markdown
from hobbit_jax.statistics import Interval

FOLDER = "peers"  # of a workdir
_ABOUT = (
    "The same file in another program, on the same token ids, in one run. The peer is the "
    "reference: KL is KL(peer ‖ ours) in nats a token, perplexity differences are ours less the "
    "peer's within each window, brackets are 95 % intervals over windows."
)
_ABOUT_SPEED = (
    "Both are loaded at once, bound to the same cores, and take turns; a step ends when the host "
    "knows the next token. Medians of the turns with minimum and maximum; a ratio is ours over the "
    "peer's within a turn, above 1 where we are faster. The time to the first token is that of a "
    "warm program. A load average above the cores used means that others ran beside: read the "
    "ranges. Barriers of OpenMP wait passively, so that a busy core does not stop both programs; "
    "between products as short as a small model's that can cost more than a second core gains."
)
_ABOUT_MEMORY = (
    "Peak of a whole run in MiB, each program in a process of its own: what is in no file (heap, "
    "buffers, copies of weights), pages of mapped files (the model and the libraries), both "
    "together at the highest. `before` is what the process held with its libraries and without a "
    "model."
)


@dataclass(frozen=True)
class PeerRow:
    """One row of a comparison."""

    row: Mapping[str, Any]

    @property
    def labels(self) -> tuple[str, str]:
        """Model, with our budget where there was one; peer, with its setting and cores of each."""
        model, budget = self.row["model"]["name"], self.row["budget_bytes"]
        if budget is not None:
            model += f", {markdown.mib(budget, 0)} MiB of experts"
        peer = self.row["peer"]
        setting = peer.get("mode") or ""
        if peer.get("layers_with_experts_on_cpu"):
            setting = f"experts of {peer['layers_with_experts_on_cpu']} layers on the CPU"
        name, threads = f"{peer['program']} {setting}".strip(), self.row["threads"]
        return model, f"{name}, {threads} core{'s' if threads > 1 else ''}"


def load_peers(folder: Path) -> tuple[PeerRow, ...]:
    """The rows in `folder`, by file name; none where there is no such folder.

    Raises:
        ValueError: a file there that is no such row.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        row = PeerRow(json.loads(path.read_text(encoding="utf-8")))
        try:
            render_peers([row])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no row of scripts/compare.py: {error!r}") from error
        found.append(row)
    return tuple(found)


def render_peers(peers: Sequence[PeerRow]) -> list[str]:
    """Lines of the section below its heading; none without rows."""
    if not peers:
        return []
    return [
        *(_ABOUT, "", *_agreement(peers), "", _ABOUT_SPEED, "", *_speed(peers), ""),
        *(_ABOUT_MEMORY, "", *_memory(peers), "", *_programs(peers)),
    ]


def _interval(found: Mapping[str, float]) -> Interval:
    return Interval(found["value"], found["low"], found["high"])


def _agreement(peers: Sequence[PeerRow]) -> list[str]:
    rows = []
    for peer in peers:
        found = peer.row["agreement"]
        rows.append(
            (
                *peer.labels,
                f"{found['tokens']:,}",
                f"{found['logit_max_difference']:.2g}",
                f"{found['logit_rms_difference']:.2g} of {found['logit_std']:.2g}",
                f"{found['perplexity_ours']['value']:.4f}",
                f"{found['perplexity_peer']['value']:.4f}",
                markdown.interval(_interval(found["perplexity_difference"]), "{:+.2g}"),
                markdown.interval(_interval(found["kl_mean"]), "{:.2g}"),
                markdown.interval(_interval(found["kl_p99"]), "{:.2g}"),
                markdown.interval(_interval(found["top1_agreement"]), "{:.4f}"),
            )
        )
    head = (
        *("model", "peer", "tokens", "logits differ by at most", "root mean square, of their σ"),
        *("perplexity, ours", "the peer's", "difference", "KL mean", "KL p99", "top-1"),
    )
    return markdown.table(head, rows)


def _range(found: Mapping[str, float], form: str) -> str:
    return f"{form} ({form} to {form})".format(found["median"], found["low"], found["high"])


def _speed(peers: Sequence[PeerRow]) -> list[str]:
    rows = []
    for peer in peers:
        found = peer.row["speed"]
        decode, prefill = found["decode_tokens_per_second"], found["prefill_tokens_per_second"]
        first = found["first_token_s"]
        rows.append(
            (
                *peer.labels,
                *(_range(decode[side], "{:.1f}") for side in ("ours", "peer")),
                _range(decode["ratio"], "×{:.2f}"),
                *(_range(prefill[side], "{:.0f}") for side in ("ours", "peer")),
                _range(prefill["ratio"], "×{:.2f}"),
                " / ".join(f"{first[side]['median']:.3f}" for side in ("ours", "peer")),
                f"{found['turns']} × ({found['prompt_tokens']} + {found['decode_tokens']})",
                " / ".join(f"{peer.row['load_average'][when]:.1f}" for when in ("before", "after")),
            )
        )
    head = (
        *("model", "peer", "decode tokens/s, ours", "the peer's", "ratio"),
        *("prefill tokens/s, ours", "the peer's", "ratio", "first token s, ours / peer"),
        *("turns × (prompt + decoded)", "load average before / after"),
    )
    return markdown.table(head, rows)


def _memory(peers: Sequence[PeerRow]) -> list[str]:
    rows = []
    for peer in peers:
        for side in ("ours", "peer"):
            program = peer.row[side]
            peak, before = program["memory"]["peak"], program["memory"]["before_model"]
            rows.append(
                (
                    *peer.labels,
                    program["program"],
                    *(
                        markdown.mib(peak and peak[part], 0)
                        for part in ("anonymous", "file", "total")
                    ),
                    *(markdown.mib(before and before[part], 0) for part in ("anonymous", "file")),
                    markdown.mib(program["device_peak_bytes"], 0),
                )
            )
    head = (
        *("model", "peer", "program", "in no file", "pages of files", "together"),
        *("before, in no file", "before, pages of files", "on the GPU"),
    )
    return markdown.table(head, rows)


def _programs(peers: Sequence[PeerRow]) -> list[str]:
    """What ran, once for each row: precision, versions, device."""
    lines = []
    for peer in peers:
        ours, theirs = peer.row["ours"], peer.row["peer"]
        versions = ", ".join(f"{name} {version}" for name, version in theirs["versions"].items())
        slots = theirs.get("slots")
        rates = [program.get("decode_hit_rate") for program in (ours, theirs)]
        text = (
            f"- {' against '.join(peer.labels)}: {ours['machine']['device']}; ours with "
            f"{ours['precision']}; {theirs['program']} ({versions}) with {theirs['precision']}"
        )
        if slots:
            text += f", experts streamed through {slots} slots of {theirs['slot_bytes']:,} bytes"
        if peer.row["budget_bytes"] is not None:
            shown = [markdown.number(rate, "{:.3f}") for rate in rates]
            text += f"; decode hit rate {shown[0]} in {ours['slots']} slots, the peer's {shown[1]}"
        lines.append(text + ".")
    return lines
