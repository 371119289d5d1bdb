"""The gate's logic: what is a regression, what a win that was not taken, and what it says to do."""

import check
import pytest
from check import Line, compare, read, updated, write

LINES = [
    Line("work a", "flops", 1.1, 0.01),
    Line("work a", "launches", 6, 0.0),
    Line("resources k", "blocks_per_sm", 4, 0.0),
    Line("resources k", "spilled_bytes", 0, 0.0),
]
SAME = {line.key: line.value for line in LINES}


def problem_of(name, metric, measured):
    findings = {finding.line.key: finding for finding in compare(LINES, SAME | {(name, metric): measured})}
    others = [finding for key, finding in findings.items() if key != (name, metric)]
    assert not any(finding.problem for finding in others)
    return findings[name, metric].problem


def test_what_is_as_expected_has_no_problem():
    assert [finding.problem for finding in compare(LINES, SAME)] == [""] * 4


@pytest.mark.parametrize("measured", [1.1, 1.1 * 1.0099, 1.1 * 0.9901])
def test_the_margin_is_relative(measured):
    assert problem_of("work a", "flops", measured) == ""


@pytest.mark.parametrize(
    ("name", "metric", "measured", "line"),
    [
        ("work a", "flops", 1.2, "work a,flops,1.2,0.01"),
        ("work a", "launches", 7, "work a,launches,7,0"),
        ("resources k", "blocks_per_sm", 3, "resources k,blocks_per_sm,3,0"),
        # No margin is relative to zero.
        ("resources k", "spilled_bytes", 8, "resources k,spilled_bytes,8,0"),
    ],
)
def test_a_regression_says_so_and_which_line_it_would_be(name, metric, measured, line):
    problem = problem_of(name, metric, measured)
    assert "a regression" in problem
    assert problem.endswith(f"update the line to: {line}")


@pytest.mark.parametrize(
    ("name", "metric", "measured", "line"),
    [
        ("work a", "flops", 1.0, "work a,flops,1,0.01"),
        ("work a", "launches", 2, "work a,launches,2,0"),
        ("resources k", "blocks_per_sm", 5, "resources k,blocks_per_sm,5,0"),
    ],
)
def test_a_win_that_was_not_taken_is_a_problem_too(name, metric, measured, line):
    problem = problem_of(name, metric, measured)
    assert "better" in problem and "regression" not in problem
    assert problem.endswith(f"Keep it: update the line to: {line}")


def test_nan_is_a_problem():
    assert problem_of("work a", "flops", float("nan"))


def test_a_change_is_shown_in_percent():
    assert "(+10.0 %, margin 1 %)" in problem_of("work a", "flops", 1.21)


def test_a_number_without_a_line_and_a_line_without_a_number_are_problems():
    measured = {key: value for key, value in SAME.items() if key != ("work a", "flops")}
    measured["resources k", "registers"] = 90.0
    problems = [finding.problem for finding in compare(LINES, measured) if finding.problem]
    assert problems == [
        "was not measured any more. Remove the line: work a,flops,1.1,0.01",
        "has no line. Add: resources k,registers,90,0.03",
    ]


def test_lines_survive_the_file(tmp_path):
    path = tmp_path / "expected.csv"
    write(path, LINES)
    assert path.read_text().splitlines()[:2] == ["name,metric,value,margin", "work a,flops,1.1,0.01"]
    assert read(path) == LINES


def test_updating_moves_only_what_differs():
    measured = SAME | {("work a", "flops"): 1.1001, ("work a", "launches"): 2, ("new", "nodes"): 5.0}
    lines = updated(LINES, measured)
    assert lines[0] == LINES[0]
    assert lines[1] == LINES[1]._replace(value=2)
    assert lines[-1] == Line("new", "nodes", 5.0, 0.03)
    assert not any(finding.problem for finding in compare(lines, measured))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the program on numbers that are given; exit code and what it printed."""
    monkeypatch.setattr(check, "EXPECTED", tmp_path / "expected.csv")

    def run(measured, *arguments):
        monkeypatch.setattr(check, "measure", lambda groups: measured)
        monkeypatch.setattr("sys.argv", ["check.py", *arguments])
        try:
            check.main()
        except SystemExit as end:
            return end.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    return run


def test_the_program_fails_until_the_lines_are_updated(run):
    code, printed = run(SAME)
    assert code == 1
    assert "4 of 4 numbers differ" in printed and "--update" in printed
    code, printed = run(SAME, "--update")
    assert code == 0 and "4 lines changed" in printed
    assert run(SAME)[0] == 0
    code, printed = run(SAME | {("work a", "launches"): 2})
    assert code == 1
    assert "update the line to: work a,launches,2,0" in printed


def test_a_broken_promise_cannot_be_accepted(run):
    kept = {
        ("work m 4096 tokens 88 % skipped", "flops"): 1.15,
        ("work m 1 tokens 0 % skipped", "bytes"): 1.05,
    }
    assert run(kept, "--update")[0] == 0
    assert run(kept)[0] == 0
    for key in kept:
        code, printed = run(kept | {key: 1.2}, "--update")
        assert code == 1
        assert "is 1.2, at most 1.1" in printed
        assert run(kept | {key: 1.2})[0] == 1
    # Elsewhere the same numbers are no promise.
    assert run({("work m 4096 tokens 0 % skipped", "flops"): 1.2}, "--update")[0] == 0
    assert run({("resources sm_90 k", "spilled_bytes"): 4}, "--update")[0] == 1


def test_a_group_alone_leaves_the_other_lines(run):
    run(SAME, "--update")
    work = {key: value for key, value in SAME.items() if key[0] == "work a"}
    assert run(work, "--groups", "work")[0] == 0
    run(work | {("work a", "launches"): 2}, "--groups", "work", "--update")
    assert run(SAME | {("work a", "launches"): 2})[0] == 0


def test_every_line_belongs_to_a_group_and_stands_once():
    lines = read(check.EXPECTED)
    assert {line.name.split()[0] for line in lines} == set(check.GROUPS)
    assert len({line.key for line in lines}) == len(lines)
