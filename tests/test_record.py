"""Records: identity, round trips, refusals, and what is left after kills and several writers."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hobbit_jax.record import (
    Benchmark,
    CacheTrial,
    EvalSizes,
    Inputs,
    MissModeTrial,
    Mixed,
    MixedInBytes,
    Native,
    PerSelection,
    QualityTrial,
    Record,
    Study,
    Uniform,
    is_finished,
    read_record,
    read_records,
    read_study,
    record_name,
    write_record,
    write_study,
)
from hobbit_jax.record.files import parse_record
from hobbit_jax.record.typed_json import plain

SIZES = EvalSizes(windows=4, context=8, calibration_windows=2)
WORDS = st.text(min_size=1, max_size=8)
SHARES = st.floats(0, 1)
CACHE_PLANS = st.one_of(
    st.builds(Native),
    st.builds(Uniform, WORDS, WORDS, st.lists(WORDS, max_size=2).map(tuple)),
    st.builds(Mixed, WORDS, SHARES, WORDS, WORDS),
    st.builds(MissModeTrial, WORDS, SHARES, WORDS, WORDS),
)
QUALITY_PLANS = st.one_of(
    st.builds(MixedInBytes, WORDS, SHARES, st.lists(WORDS).map(tuple), WORDS, WORDS),
    st.builds(PerSelection, WORDS, st.lists(SHARES).map(tuple), st.lists(WORDS).map(tuple), WORDS),
)
SCALARS = st.one_of(WORDS, st.integers(-9, 9), st.floats(-9, 9), st.booleans(), st.none())
ASKED = st.one_of(
    st.builds(
        CacheTrial, CACHE_PLANS, st.floats(0, 9), st.builds(Inputs), st.just(SIZES), seed=st.just(1)
    ),
    st.builds(QualityTrial, QUALITY_PLANS, st.builds(Inputs, model=WORDS), st.just(SIZES)),
    st.builds(Benchmark, WORDS, st.dictionaries(WORDS, SCALARS, max_size=3)),
)


def trial(budget_mib=1.0, **changes):
    return CacheTrial(Mixed("random", 0.5, "Q2_K"), budget_mib, Inputs(), SIZES, **changes)


@given(ASKED, st.dictionaries(WORDS, st.one_of(st.none(), st.integers(), st.floats(-1, 1))))
def test_a_record_is_the_same_after_a_round_trip(asked, metrics):
    record = Record("study", asked, metrics, {"repeat_s": [[1, 2.5], []]}, status="failed")
    again = parse_record(json.dumps(plain(record)))
    assert again == record
    assert again.name == record.name


@given(ASKED, ASKED)
def test_only_what_is_the_same_has_the_same_name(left, right):
    same = json.dumps(plain(left), sort_keys=True) == json.dumps(plain(right), sort_keys=True)
    assert (record_name(left) == record_name(right)) == same
    assert record_name(left).replace("-", "").replace("_", "").replace(".", "").isalnum()


def test_a_whole_number_asks_for_the_same_as_a_float():
    assert record_name(trial(budget_mib=2)) == record_name(trial(budget_mib=2.0))
    whole, fraction, by_use = (
        CacheTrial(MissModeTrial("hobbit", share, "Q2_K"), 2.0, Inputs(), SIZES)
        for share in (1, 1.0, "adaptive")
    )
    assert record_name(whole) == record_name(fraction) != record_name(by_use)


def test_a_field_added_with_a_default_changes_no_identity():
    """The same class as one revision knows it and as the next does."""

    def made(fields):
        kind = {"json_kind": "grown"}
        return dataclasses.make_dataclass("Grown", fields, namespace=kind, frozen=True)

    old = made([("share", float)])
    new = made([("share", float), ("policy", str, dataclasses.field(default="slru"))])
    assert plain(new(0.5)) == plain(old(0.5))
    assert plain(new(0.5, "lru")) != plain(old(0.5))


def test_the_names_of_kept_records_never_change():
    """A change here orphans every record that anybody has."""
    assert record_name(trial()) == "mixed-random-0.5-Q2_K-1-a3dd27bee5e9"
    assert record_name(trial(seed=2)) == "mixed-random-0.5-Q2_K-1-2-6c2a666a5c96"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"asked": {"kind": "cash"}}, "asked is of kind 'cash'; want one of cache, quality"),
        ({"asked": 3}, "asked is of kind 3"),
        ({"metrics": {"kl": "low"}}, "metrics.kl is 'low'; want one of float, int, NoneType"),
        ({"metrics": {"kl": True}}, "metrics.kl is True"),
        ({"status": "good"}, "status is 'good'"),
        ({"colour": 1}, "has colour; want only study, asked"),
        ({"study": None}, "study is None; want str"),
    ],
)
def test_what_is_no_record_is_refused_by_field(change, says):
    line = json.dumps(plain(Record("s", trial())) | change)
    with pytest.raises(ValueError, match=says.replace("[", r"\[")):
        parse_record(line)


def test_nan_is_refused_in_and_out(tmp_path):
    with pytest.raises(ValueError, match="kl is nan"):
        write_record(tmp_path, Record("s", trial(), {"kl": float("nan")}))
    with pytest.raises(ValueError, match="NaN, which is not a number"):
        parse_record('{"study": "s", "metrics": {"kl": NaN}}')


def test_the_last_measurement_is_kept_and_no_failure_replaces_it(tmp_path):
    failed = Record("s", trial(), status="failed", error="no memory")
    done = Record("s", trial(), {"kl_nats": 1.0})
    write_record(tmp_path, failed)
    assert not is_finished(tmp_path, record_name(trial()))
    write_record(tmp_path, Record("s", trial(), {"kl_nats": 2.0}))
    write_record(tmp_path, done)
    write_record(tmp_path, failed)
    assert read_record(tmp_path, record_name(trial())) == done
    assert read_records(tmp_path).found == (done,)


def test_merged_records_and_single_ones_are_read_together(tmp_path):
    first, second = (Record("s", trial(budget)) for budget in (1.0, 2.0))
    write_record(tmp_path, Record("s", trial(2.0), status="failed", error="later mended"))
    lines = [json.dumps(plain(r)) for r in (first, second, Record("other", trial(3.0)))]
    (tmp_path / "records" / "kept.jsonl").write_text("\n".join(lines))
    (tmp_path / "records" / "torn.json").write_text('{"study": "s"')
    found = read_records(tmp_path)
    assert found.of("s") == sorted([first, second], key=lambda record: record.name)
    assert list(found.unreadable) == ["torn.json"]


WRITER = """
import sys, pathlib
from hobbit_jax.record import Benchmark, Record, write_record
folder = pathlib.Path(sys.argv[1])
for number in range(10**6):
    asked = Benchmark("kill", {"number": number % 200})
    write_record(folder, Record("kill", asked, {"square": number % 200 * (number % 200)},
                                {"s": [0.5] * 5000}, status=sys.argv[2]))
"""


def test_writers_killed_at_any_moment_leave_whole_records(tmp_path):
    """Four processes write the same 200 records at a time and are killed; nothing is torn."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), status], env=env)
        for status in ("ok", "ok", "failed", "failed")
    ]
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("records/*.json"))) < 50 and time.monotonic() < deadline:
            time.sleep(0.05)
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    found = read_records(tmp_path)
    assert len(found.found) >= 50
    assert not found.unreadable
    for record in found.found:
        assert record.metrics["square"] == record.asked.setting["number"] ** 2


def test_the_rule_is_frozen_with_the_first_record(tmp_path):
    def described(limit):
        study = Study("s", "title", "question?", "command", {"a": [1]}, {"kl_limit": limit}, ("x",))
        return write_study(tmp_path, study).first_rule

    assert described(0.05) == {"kl_limit": 0.05}
    assert described(0.06) == {"kl_limit": 0.06}  # nothing has been measured yet
    write_record(tmp_path, Record("s", trial()))
    assert described(0.5) == {"kl_limit": 0.06}
    assert read_study(tmp_path, "s").rule == {"kl_limit": 0.5}
    assert described(0.06) == {"kl_limit": 0.06}
    (tmp_path / "records" / "s.study.json").unlink()
    assert described(0.06) is None  # what stood before the records is not known
