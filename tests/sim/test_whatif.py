"""From a trace to the number of workers that it needs."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest

from roost.__main__ import main
from roost.commands import whatif as command
from shared.errors import InvalidRequest
from shared.models import Case
from shared.traces import Counts, write_trace
from sim import whatif, workloads
from sim.policies import POLICIES

MODELS = workloads.fleet_of_models(12)
WORKERS = workloads.fleet_of_workers(2, 12)
LOAD = workloads.stationary(MODELS, 900, cv=1.0, duration_s=12, warmup_s=0)


@pytest.fixture
def trace():
    return whatif.traced(LOAD, WORKERS)


def test_a_workload_survives_being_traced(trace):
    """As many requests of each model in each second as there were, and the same models."""
    models, assumed = whatif.models_of(trace)
    again = whatif.workload_of(trace, models)
    assert not assumed.times
    assert [model.id for model in models] == [model.id for model in MODELS]
    assert models == MODELS
    for made in (LOAD, again):
        assert (np.diff(made.times) >= 0).all()
    seconds = np.arange(13)
    for number in range(len(MODELS)):
        ours = np.histogram(LOAD.times[LOAD.which == number], seconds)[0]
        theirs = np.histogram(again.times[again.which == number], seconds)[0]
        assert ours.tolist() == theirs.tolist()


def test_the_busiest_stretch_is_found(trace):
    """The window in which most was asked, and only its requests."""
    peak = Counts(at=7.0, requests={MODELS[0].id: 100_000})
    loud = msgspec.structs.replace(trace, counts=(*trace.counts[:7], peak, *trace.counts[8:]))
    window = whatif.busiest(loud, 2.0)
    assert window.begin_s <= 7.0 < window.end_s
    assert window.end_s - window.begin_s == 2.0
    made = whatif.workload_of(loud, MODELS, window)
    assert made.duration_s == 2.0
    assert 100_000 <= len(made.times) < 103_000


def test_what_was_not_measured_is_assumed_and_said(trace):
    """A model without times takes the median of the others; with none at all it is refused."""
    first, *rest = trace.models.values()
    bare = msgspec.structs.replace(first, cases=(), load_seconds=0.0)
    partly = msgspec.structs.replace(trace, models={m.id: m for m in (bare, *rest)})
    models, assumed = whatif.models_of(partly)
    assert assumed.times == assumed.loads == (first.id,)
    assert models[0].cases == (Case(1, 0, 0.005),)
    none = {m.id: msgspec.structs.replace(m, cases=()) for m in trace.models.values()}
    with pytest.raises(InvalidRequest, match="no measured batch"):
        whatif.models_of(msgspec.structs.replace(trace, models=none))


def test_a_padded_model_counts_at_its_greatest_size(trace):
    """Traces do not tell lengths of requests, so the slowest measured size of each batch holds."""
    first = next(iter(trace.models.values()))
    cases = (Case(1, 32, 0.1), Case(1, 128, 0.4), Case(8, 32, 0.2))
    padded = msgspec.structs.replace(first, cases=cases)
    made = msgspec.structs.replace(trace, models=trace.models | {first.id: padded})
    assert whatif.models_of(made)[0][0].cases == (Case(1, 0, 0.4), Case(8, 0, 0.2))


def test_more_workers_reach_the_target(trace, tmp_path, capsys):
    """One worker cannot do 900 a second; the command says how many can, and draws them."""
    path, picture = tmp_path / "trace", tmp_path / "p.png"
    write_trace(path, trace)
    status = main([
        "whatif", "--trace", str(path), "--workers", "1..4", "--warmup", "3",
        "--policy", "static-replicated", "--picture", str(picture), "--json",
    ])  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert status == 0
    assert told["workers"] == 2
    tried = {each["workers"]: each["attainment"] for each in told["tried"]}
    assert tried[1] < 0.9
    assert tried[2] >= 0.99
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_the_placer_itself_is_asked(trace, tmp_path, capsys):
    """By default the answer is that of Roost's own placer; the table has a line per size."""
    path = tmp_path / "trace"
    write_trace(path, trace)
    assert main(["whatif", "--trace", str(path), "--workers", "3", "--warmup", "4"]) == 0
    out = capsys.readouterr().out
    assert "enough: 3 workers" in out
    assert "roost" in out


def test_too_few_workers_is_an_answer_too(trace, tmp_path, capsys):
    """Exit status 3 says that none of the sizes is enough."""
    path = tmp_path / "trace"
    write_trace(path, trace)
    line = ["whatif", "--trace", str(path), "--workers", "1", "--policy", "static"]
    assert main(line) == 3
    assert "not enough: 1 workers" in capsys.readouterr().out


def test_another_budget_is_another_machine(trace):
    """--budget replaces what the trace has seen, its host memory too unless that is said."""
    roomy = msgspec.structs.replace(
        trace, workers=(msgspec.structs.replace(trace.workers[0], host_bytes=7),)
    )
    (same,) = whatif.fleet_of(roomy, 1)
    assert (same.budget_bytes, same.host_bytes) == (WORKERS[0].budget_bytes, 7)
    (other,) = whatif.fleet_of(roomy, 1, budget_bytes=5)
    assert (other.budget_bytes, other.host_bytes) == (5, 0)
    (told,) = whatif.fleet_of(roomy, 1, budget_bytes=5, host_bytes=9)
    assert told.host_bytes == 9
    with pytest.raises(InvalidRequest, match="--budget"):
        whatif.fleet_of(msgspec.structs.replace(trace, workers=()), 1)


@pytest.mark.parametrize(
    "wrong",
    [["--workers", "0"], ["--workers", "5..2"], ["--target", "2"], ["--budget", "much"]],
)
def test_wrong_arguments_are_usage_errors(wrong, capsys):
    """They are told by the parser, before any file is read."""
    with pytest.raises(SystemExit) as end:
        main(["whatif", "--trace", "none", *wrong])
    assert end.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_a_file_that_is_no_trace_is_one_line(tmp_path, capsys):
    """As every command: exit status 1, and why."""
    (tmp_path / "t").write_text("hello")
    assert main(["whatif", "--trace", str(tmp_path / "t")]) == 1
    assert "is not a trace" in capsys.readouterr().err


def test_the_command_knows_every_policy():
    """Its list stands in it so that the parser need not import the simulator."""
    assert set(command.POLICIES) == set(POLICIES)


def test_more_than_can_be_simulated_is_refused():
    """With the way out, and before any memory is taken for it."""
    trace = whatif.traced(LOAD, WORKERS)
    crowd = Counts(at=0.0, requests={MODELS[0].id: 10**9})
    trace = msgspec.structs.replace(trace, counts=(crowd, *trace.counts[1:]))
    with pytest.raises(InvalidRequest, match="busiest"):
        whatif.workload_of(trace, MODELS)


@pytest.mark.parametrize(
    "given", [["--busiest", "nan"], ["--busiest", "0"], ["--warmup", "-1"], ["--seed", "-3"]]
)
def test_impossible_options_are_refused(given, capsys):
    """By the parser, with the option's name."""
    with pytest.raises(SystemExit) as ended:
        main(["whatif", "--trace", "nowhere", *given])
    assert ended.value.code == 2
    assert given[0] in capsys.readouterr().err
