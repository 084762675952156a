"""Comparisons with other programs: the figures by hand, the child processes, the section.

The other programs here are scripted (`scripted_side.py`); the real ones are in
`test_peers_oracles.py`.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

from hobbit_jax.peers.agreement import AgreementMeter
from hobbit_jax.peers.comparison import PEERS, Request, compare, compare_model, peer_factory
from hobbit_jax.peers.memory import read_resident
from hobbit_jax.peers.side import SideSpec
from hobbit_jax.report.peers import PeerRow, load_peers, render_peers

MIB = 2**20


def logits(*probabilities):
    """[T, V] with these probabilities; an offset per row must not matter."""
    rows_TV = np.log(np.asarray(probabilities))
    return (rows_TV + np.arange(len(rows_TV))[:, None]).astype(np.float32)


def test_agreement_by_hand():
    meter = AgreementMeter()
    peer_TV = logits((0.5, 0.25, 0.25), (0.5, 0.25, 0.25))
    # KL of the first token: .5 ln 2 + .25 ln ½ = ¼ ln 2; the second is the same distribution.
    ours_TV = logits((0.25, 0.5, 0.25), (0.5, 0.25, 0.25))
    for _ in range(3):
        meter.add(ours_TV, peer_TV, np.array([1, 0]))
    found = meter.result()
    assert (found.tokens, found.windows) == (6, 3)
    assert found.kl_mean.value == pytest.approx(math.log(2) / 8, rel=1e-6)
    # The quantile between the two values that there are: 99 % of six lies beyond the fifth.
    assert found.kl_p99.value == pytest.approx(math.log(2) / 4, rel=1e-6)
    assert found.top1_agreement.value == 0.5
    # Probabilities of the targets: ours ½ and ½, the peer's ¼ and ½.
    assert found.perplexity_ours.value == pytest.approx(2.0, rel=1e-6)
    assert found.perplexity_peer.value == pytest.approx(math.sqrt(8), rel=1e-6)
    assert found.perplexity_difference.value == pytest.approx(2 - math.sqrt(8), rel=1e-6)
    # Two of six logits differ, by ln 2.
    assert found.logit_max_difference == pytest.approx(math.log(2), rel=1e-6)
    assert found.logit_rms_difference == pytest.approx(math.log(2) / math.sqrt(3), rel=1e-6)
    assert found.logit_std == pytest.approx(float(peer_TV.std()), rel=1e-5)
    # Equal windows leave nothing to resample.
    assert found.kl_mean.low == pytest.approx(found.kl_mean.high)


def test_kl_is_from_the_peer():
    """Of (0.9, 0.1) against (0.5, 0.5): .9 ln 1.8 + .1 ln .2, and not the reverse."""
    meter = AgreementMeter()
    meter.add(logits((0.5, 0.5)), logits((0.9, 0.1)), np.array([0]))
    wanted = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert meter.result().kl_mean.value == pytest.approx(wanted, rel=1e-6)


def test_a_difference_is_taken_in_pairs():
    """Windows differ a hundred times more than the two programs do."""
    rng, meter = np.random.default_rng(0), AgreementMeter()
    for p in rng.uniform(0.05, 0.95, 24):
        peer_TV = logits((p, 1 - p), (p, 1 - p))
        meter.add(peer_TV + np.array([[0.01, 0.0]], np.float32), peer_TV, np.array([0, 0]))
    found = meter.result()
    alone = found.perplexity_ours.high - found.perplexity_ours.low
    paired = found.perplexity_difference.high - found.perplexity_difference.low
    assert paired < alone / 20
    assert found.perplexity_difference.high < 0  # we give every target more


@pytest.mark.parametrize(
    ("ours_TV", "targets", "message"),
    [
        (np.zeros((2, 4)), 2, r"got logits \(2, 4\) and \(2, 3\) for 2 tokens"),
        (np.zeros((2, 3)), 3, "for 3 tokens"),
        (np.full((2, 3), np.nan), 2, "our logits are not all finite"),
    ],
)
def test_refused_logits(ours_TV, targets, message):
    with pytest.raises(ValueError, match=message):
        AgreementMeter().add(ours_TV, np.zeros((2, 3)), np.zeros(targets, int))


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """Returns a function that makes the spec of a scripted side; windows of 3 tokens, V = 5."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    rng = np.random.default_rng(0)

    def make(name="side", noise=0.0, **options):
        path = tmp_path / f"{name}.npy"
        base_WTV = np.random.default_rng(1).standard_normal((4, 3, 5))
        np.save(path, (base_WTV + noise * rng.standard_normal((4, 3, 5))).astype(np.float32))
        return SideSpec("scripted_side:Scripted", {"logits": str(path), **options}, 1)

    return make


WINDOWS_WS = np.array([[w, 1, 2, 3] for w in range(4)], np.int32)
ROWS_RS = np.full((4, 12), 1, np.int32)


def run(ours, peer):
    return compare(ours, peer, WINDOWS_WS, ROWS_RS, prompt_tokens=2)


def test_both_in_turns(scripted, tmp_path):
    """Everything that a row says of two programs whose logits, times and memory are known."""
    mapped = tmp_path / "weights"
    mapped.write_bytes(bytes(64 * MIB))
    ours = scripted("ours", noise=0.1, step_s=0.04, mapped=str(mapped), warm_up_s=1.5)
    peer = scripted("peer", step_s=0.002, hold_bytes=96 * MIB)
    row = run(ours, peer)

    assert row["ours"]["program"] == "scripted" and row["ours"]["policy"] == "active"
    assert row["ours"]["threads"] == row["peer"]["threads"] == 1
    meter = AgreementMeter()
    for w, targets_T in enumerate(WINDOWS_WS[:, 1:]):
        pair = (np.load(spec.options["logits"])[w] for spec in (ours, peer))
        meter.add(*pair, targets_T)
    wanted = meter.result()
    assert row["agreement"]["kl_mean"]["value"] == wanted.kl_mean.value > 0
    assert row["agreement"]["tokens"] == 12

    speed = row["speed"]
    assert (speed["turns"], speed["prompt_tokens"], speed["decode_tokens"]) == (3, 2, 10)
    # 40 against 2 ms a step. On a busy machine a sleep is late, never early.
    assert speed["decode_tokens_per_second"]["ours"]["high"] <= 25
    # The first turn is slow, says another token, and does not count.
    assert speed["first_token_s"]["ours"]["low"] >= 0.08
    assert speed["first_token_s"]["ours"]["high"] < 1.5
    assert 0.01 < speed["decode_tokens_per_second"]["ratio"]["median"] < 0.8
    assert speed["prefill_tokens_per_second"]["peer"]["high"] <= 500
    assert speed["same_greedy_token"] == 1.0

    before = {side: row[side]["memory"]["before_model"] for side in ("ours", "peer")}
    peak = {side: row[side]["memory"]["peak"] for side in ("ours", "peer")}
    for part, heavy, light, size in (
        ("anonymous", "peer", "ours", 96 * MIB),
        ("file", "ours", "peer", 64 * MIB),
    ):
        assert size * 0.98 < peak[heavy][part] - before[heavy][part] < size * 1.2
        assert peak[light][part] - before[light][part] < size * 0.2
    assert peak["peer"]["total"] >= peak["peer"]["anonymous"]


def test_memory_is_told_apart(tmp_path):
    before = read_resident(os.getpid())
    held = np.ones(64 * MIB, np.uint8)
    after = read_resident(os.getpid())
    assert before and after and held[0]
    assert 60 * MIB < after.anonymous - before.anonymous < 80 * MIB
    assert abs(after.file - before.file) < 8 * MIB
    assert after.total >= after.anonymous + after.file
    assert read_resident(2**22 + 1) is None  # beyond the largest process id


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def started(monkeypatch):
    """Process ids of the children, as they start."""
    pids, popen = [], subprocess.Popen

    def record(*arguments, **options):
        process = popen(*arguments, **options)
        pids.append(process.pid)
        return process

    monkeypatch.setattr("hobbit_jax.peers.child.subprocess.Popen", record)
    return pids


def test_a_program_that_refuses(scripted, started):
    """The child's own error, after its name; the other child is gone too."""
    with pytest.raises(ValueError, match=r"^peer: no such model$"):
        run(scripted(), scripted(fails="load"))
    assert len(started) == 2 and not any(alive(pid) for pid in started)
    with pytest.raises(ValueError, match=r"^ours: threads is 99; want 1 to the"):
        run(SideSpec("scripted_side:Scripted", scripted().options, 99), scripted())


def test_a_program_that_is_killed(scripted, started):
    with pytest.raises(ChildProcessError, match=r"^peer ended by signal 9: a library that talks"):
        run(scripted(), scripted(fails="decode"))
    assert len(started) == 2 and not any(alive(pid) for pid in started)
    with pytest.raises(ChildProcessError, match=r"^peer: 3 \(KeyError; .*self\.logits_WTV\[3\]"):
        run(scripted(), scripted(fails="score"))


@pytest.mark.parametrize("peer", PEERS)
def test_a_missing_library_says_how_to_install_it(monkeypatch, peer):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match=rf"pip install -c .* -e '\.\[{peer}\]'$"):
        peer_factory(peer)


def test_the_extras_are_there():
    """Every peer's extra is one of pyproject.toml's."""
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert set(PEERS) <= set(project["optional-dependencies"])


def test_rows_longer_than_the_context(monkeypatch, two_banks_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    request = Request(two_banks_path, "torch", None, None, None, None, 2, 32, 2, 40, 30, 1)
    with pytest.raises(ValueError, match="rows of 70 tokens; want at most the model's context"):
        compare_model(request)


def test_our_side(monkeypatch, tmp_path, two_banks_path):
    """The engine in its child, under a budget, beside a peer that knows nothing."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setitem(PEERS, "torch", ("scripted_side:Uniform", ()))
    text = tmp_path / "letters.txt"
    text.write_text("the quick brown fox " * 20)
    budget_bytes = 2**20
    row = compare_model(
        Request(two_banks_path, "torch", text, budget_bytes, None, "float32", 2, 20, 2, 12, 4, 1)
    )
    assert row["agreement"]["perplexity_peer"]["value"] == pytest.approx(258, rel=1e-6)
    assert row["agreement"]["logit_std"] == 0 < row["agreement"]["logit_rms_difference"]
    ours, peer = row["ours"], row["peer"]
    assert (peer["context"], peer["mode"]) == (20, "float32")
    assert 0 < ours["pool_bytes"] <= ours["budget_bytes"] == budget_bytes
    assert 0 < ours["decode_hit_rate"] < 1 and ours["threads"] == 1
    assert (row["model"]["name"], row["text"]["name"]) == ("tiny.gguf", "letters.txt")
    del row["peer"]["model"]  # the peer's own doing
    assert str(tmp_path) not in json.dumps(row)
    assert any("| uniform float32, 1 core |" in line for line in render_peers([PeerRow(row)]))


def peer_row(scripted, budget_bytes=None):
    row = run(scripted("ours", noise=0.1), scripted("peer"))
    common = {"device_peak_bytes": None, "precision": "float32", "slots": 7}
    row["ours"] |= {**common, "machine": {"device": "cpu: Some Processor"}, "decode_hit_rate": 0.5}
    row["peer"] |= {**common, "versions": {"torch": "2.13.0"}, "mode": "offload", "slot_bytes": 9}
    return {"model": {"name": "M.gguf"}, "threads": 2, "budget_bytes": budget_bytes, **row}


def test_the_section(scripted, tmp_path):
    row = peer_row(scripted, 2 * MIB)
    text = "\n".join(render_peers([PeerRow(row)]))
    tables = [line for line in text.splitlines() if line.startswith("| M.gguf, 2 MiB of experts |")]
    assert len(tables) == 4 and all("| scripted offload, 2 cores |" in line for line in tables)
    kl = row["agreement"]["kl_mean"]
    assert f"{kl['value']:.2g} [{kl['low']:.2g}, {kl['high']:.2g}]" in tables[0]
    ratio = row["speed"]["decode_tokens_per_second"]["ratio"]
    assert f"×{ratio['median']:.2f} (×{ratio['low']:.2f} to ×{ratio['high']:.2f})" in tables[1]
    assert f"| {row['peer']['memory']['peak']['anonymous'] / MIB:.0f} |" in tables[3]
    assert "7 slots of 9 bytes; decode hit rate 0.500 in 7 slots, the peer's –" in text
    assert render_peers([]) == []

    folder = tmp_path / "peers"
    assert load_peers(folder) == ()
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(row))
    assert load_peers(folder) == (PeerRow(row),)
    del row["peer"]["memory"]
    (folder / "b.json").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"b\.json is no row of scripts/compare\.py: .*memory"):
        load_peers(folder)


def test_recorded_rows():
    """Those that ship can be read, and name no path of the machine they were made on."""
    rows = load_peers(REPOSITORY / "docs" / "peers")
    assert {row.row["peer"]["program"] for row in rows} == {"PyTorch", "llama.cpp"}
    for path in (REPOSITORY / "docs" / "peers").glob("*.json"):
        assert sys.prefix not in path.read_text() and '"/' not in path.read_text()
