"""The paper's comparison: what is metered, the model's arithmetic, the report, and one small run from end to end."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import fromstring

import pytest

from gdbstub import cli
from gdbstub.cli_engine import make_factories
from guests import images
from machine.engine import Engine, EngineError
from machine.pc import Machine
from tests.guests.behaviours import FORK_NAMES, NANO_NAMES
from tools import bench, bench_paper, bench_paper_data
from tools.bench import BenchmarkError, Notice, ReportOptions, Result
from tools.bench_paper import Study
from tools.bench_paper_data import NANO, WORKLOADS
from tools.bench_paper_report import grouped, markdown, table, write_report
from tools.bench_paper_run import Clocks, Meter, Metered, Statistics, compare, run, why_not


class TestData:
    """Figures and model."""

    def test_the_winners_are_the_papers(self) -> None:
        bt_wins = {name for name, row in (NANO | WORKLOADS).items() if row.bt_over_vt < 1}
        assert bt_wins == {"in", "mov_cr3", "page_fault", "forkwait", "compute", "mix"}
        assert WORKLOADS["forkwait"].bt_over_vt == pytest.approx(36.95 / 106.4)

    def test_the_papers_overhead_in_exits(self) -> None:
        overhead = bench_paper_data.paper_overhead_cycles("forkwait")
        assert overhead is not None
        assert overhead == pytest.approx((106.4 - 6.02) * 3.8e9 / 40_000)
        assert bench_paper_data.exits_for(overhead) == pytest.approx(1558, abs=1)
        assert bench_paper_data.paper_overhead_cycles("in") == 15826 - 3209
        assert bench_paper_data.paper_overhead_cycles("compute") is None

    def test_the_guests_know_the_names(self) -> None:
        assert set(bench_paper.NANO_NAMES) <= set(NANO_NAMES)
        assert tuple(FORK_NAMES) == bench_paper.WORKLOAD_NAMES
        assert set(NANO) <= set(bench_paper.NANO_NAMES)
        assert set(WORKLOADS) <= set(bench_paper.WORKLOAD_NAMES)


class TestMetering:
    """From statistics at both ends of a workload to its figures."""

    def test_differences_and_clocks_of_a_trap_engine(self) -> None:
        before: Statistics = {
            "seconds in guest": 1.0,
            "seconds in emulation of hardware": 2.0,
            "exits": 100,
            "exits CR3_WRITE": 60,
            "exits HLT": 40,
            "VMCB reads an exit": 3.0,
            "VMCB writes an exit": 1.0,
            "engine": "trap",
        }
        after: Statistics = {
            "seconds in guest": 1.5,
            "seconds in emulation of hardware": 2.25,
            "exits": 300,
            "exits CR3_WRITE": 250,
            "exits HLT": 40,
            "exits IN from 0x0040": 10,
            "VMCB reads an exit": 4.0,
            "VMCB writes an exit": 2.0,
            "engine": "trap",
        }
        metered = compare("io", 10, "2d", 1e9, before, after)
        assert metered.clocks == Clocks(5e8, 2.5e8, 2.5e8)
        assert metered.exits == {"CR3_WRITE": 190, "IN from 0x0040": 10}
        assert metered.counters["exits"] == 200
        assert (metered.reads, metered.writes) == (4 * 300 - 3 * 100, 2 * 300 - 100)
        assert (metered.ns, metered.facts) == (1e8, {"engine": "trap"})

    def test_bt_has_two_clocks_and_interp_none(self) -> None:
        bt = compare("io", 1, "0", 1000, {"seconds in TC": 0.0}, {"seconds in TC": 3e-7})
        assert bt.clocks is not None
        assert (bt.clocks.guest, bt.clocks.vmm, bt.clocks.hardware) == pytest.approx((300, 700, 0))
        assert bt.exits == {}
        assert compare("io", 1, "0", 1000, {"blocks decoded": 1}, {"blocks decoded": 3}).clocks is None

    def test_clocks_of_the_wall_become_cpu_time(self) -> None:
        after: Statistics = {"seconds in guest": 4e-7, "seconds in emulation of hardware": 2e-7}
        half = compare("io", 1, "0", 500, {}, after, wall_ns=1000)
        assert half.clocks is not None
        assert (half.clocks.guest, half.clocks.vmm, half.clocks.hardware) == pytest.approx((200, 200, 100))

    def test_statistics_are_read_at_both_ends(self) -> None:
        asked: list[int] = []

        def read() -> Mapping[str, int]:
            asked.append(1)
            return {"callouts": len(asked) * 5}

        meter = Meter(read)
        meter.take(b"hello\nstart io\nio 1")
        assert len(asked) == 2
        meter.take(b"0 2d\ndone\n")
        [metered] = meter.metered
        assert (metered.name, metered.count, metered.result) == ("io", 10, "2d")
        assert metered.counters == {"callouts": 5}
        assert metered.elapsed_ns > 0
        assert meter.last_line == "done"

    @pytest.mark.parametrize("line", [b"failed: out of memory 0", b"mix 10 0", b"io ten 0", b"io 10"])
    def test_a_wrong_answer_is_no_measurement(self, line: bytes) -> None:
        with pytest.raises(BenchmarkError, match="the guest says"):
            Meter(dict).take(b"start io\n" + line + b"\n")

    def test_a_run_of_a_real_guest(self) -> None:
        runs = run(make_factories(verify=True), "bt", images.path("fork"), "forkwait=2 io=3")
        assert [(metered.name, metered.count, metered.result) for metered in runs] == [
            ("forkwait", 2, "4"),
            ("io", 3, "3"),
        ]
        assert runs[1].counters["port accesses"] >= 33
        assert runs[0].clocks is not None
        assert runs[0].clocks.guest > 0

    def test_a_guest_that_fails_is_no_measurement(self) -> None:
        with pytest.raises(BenchmarkError, match="ended with EXIT: exit"):
            run(make_factories(verify=False), "interp", images.path("tiny-exit"), "exit 1")

    def test_engines_are_found_by_trying(self) -> None:
        def refuse(_machine: Machine) -> Engine:
            raise EngineError("no luck here")

        factories = {**make_factories(verify=False), "refusing": refuse}
        assert why_not(factories, "interp") is None
        assert why_not(factories, "refusing") == "no luck here"
        assert why_not(factories, "missing") == "there is no engine 'missing'"


def metered(name: str, ns: float, **more: object) -> Metered:
    return Metered(name, 10, "0", 10 * ns, **more)  # type: ignore[arg-type]


def small_study() -> Study:
    """bt and trap, a few rows."""
    study = Study(rounds=2, run_ns=1e6)
    for name, bt_ns, trap_ns in (
        ("empty", 1, 2),
        ("in", 201, 4002),
        ("page_fault", 3001, 1002),
        ("forkwait", 4e6, 1e6),
    ):
        study.add("bt", metered(name, bt_ns, counters={"callouts": 20}))
        clocks = Clocks(1000, 2000, 3000)
        exits = {"IN from 0x0021": 10, "OUT to 0x0020": 20, "CR3_WRITE": 5}
        counters = {"exits": 35}
        study.add("trap", metered(name, trap_ns, clocks=clocks, exits=exits, counters=counters, reads=70, writes=35))
    study.drop("hybrid", "there is no engine 'hybrid'")
    return study


class TestReport:
    """From a study to files."""

    def test_the_shortest_round_counts_and_the_loop_does_not(self) -> None:
        study = small_study()
        study.add("bt", metered("in", 401))
        study.add("trap", metered("in", 2002))
        assert (study.ns("bt", "in"), study.ns("trap", "in"), study.ns("bt", "forkwait")) == (200, 2000, 4e6)
        assert study.ratio("in") == 0.1
        assert (study.ns("interp", "in"), study.ratio("mix")) == (None, None)
        study.add("bt", metered("call_ret", 0.5))
        assert study.ns("bt", "call_ret") == bench_paper._FLOOR_NS

    def test_ratios_stand_beside_the_papers(self) -> None:
        lines = markdown(small_study(), ()).splitlines()
        row = next(line for line in lines if line.startswith("| in |"))
        assert row == "| in | 200 | 4,000 | 0.05 | 0.0136 (in) | yes |"
        assert "| pgfault | 3,000 | 1,000 | 3 | 0.349 (pgfault) | no |" in lines
        assert "| forkwait | 4,000 | 1,000 | 4 | 0.347 (forkwait, 40,000 times) | no |" in lines
        assert "- hybrid: not available: there is no engine 'hybrid'" in lines

    def test_clocks_exits_and_the_model(self) -> None:
        lines = markdown(small_study(), ()).splitlines()
        assert "| forkwait, trap, shadow | 0.1 | 0.2 | 0.3 |" in lines
        assert "| forkwait, bt | not kept | not kept | not kept |" in lines
        assert "| forkwait, trap, shadow | 3.5 | port I/O 3, CR3_WRITE 0.5 |" in lines
        model = next(line for line in lines if line.startswith("| forkwait, trap, shadow | 3.5 | 17,034 |"))
        p4 = 3.5 * (2409 + 1931) + 7 * 178 + 3.5 * 171
        assert round(p4) == 17034
        assert model.endswith("| 2,744 | 9.54M (= 1,558 exits) |")
        assert "**A model, not a measurement**" in "\n".join(lines)

    def test_what_hybrid_chooses_by(self) -> None:
        study = small_study()
        assert "## Hybrid" not in markdown(study, ())
        estimates = {"estimated cycles in bt": 100, "estimated cycles in trap": 50, "estimated cycles of switches": 30}
        study.add("hybrid", metered("in", 300, counters={**estimates, "switches": 5}))
        for place in ("bt", "trap", "hybrid"):
            known = study.metered[place]["in"]
            study.in_turns[place] = [known, known]
        lines = markdown(study, ()).splitlines()
        hybrid = lines[next(number for number, line in enumerate(lines) if line.startswith("## Hybrid")) :]
        # Of 10 operations: 20 callouts; 35 exits, each of 4340 cycles and 10 reads of 178.
        assert "| in | 2,508 | 21,420 | 18 |" in hybrid
        assert "| phases in turns | 2,508 | 21,420 | 18 |" in hybrid
        assert "| forkwait | 2,508 | 21,420 |  |" in hybrid
        assert "the start: 2 parts, in which hybrid changed engines 10 times." in hybrid

    def test_a_tie_has_no_winner(self) -> None:
        study = Study()
        study.add("bt", metered("compute", 2000))
        study.add("trap", metered("compute", 1000))
        row = next(line for line in markdown(study, ()).splitlines() if line.startswith("| compute |"))
        assert row == "| compute | 2 | 1 | 2 | 0.99 (SPECint2000, mean) | a tie in one |"

    def test_what_belongs_to_the_ends_of_a_run_is_left_out(self) -> None:
        study = Study()
        study.add("trap", Metered("compute", 100, "0", 1e5, counters={"exits": 4}, exits={"HLT": 4}))
        study.add("trap", Metered("io", 100, "0", 1e5, counters={"exits": 104}, exits={"HLT": 4, "IN from 0x1": 100}))
        lines = markdown(study, ()).splitlines()
        assert "| compute, trap, shadow | < 0.05 |  |" in lines
        assert "| io, trap, shadow | 1.04 | port I/O 1 |" in lines
        model = lines[next(number for number, line in enumerate(lines) if line.startswith("## Model")) :]
        assert any(line.startswith("| io, trap, shadow |") for line in model)
        assert not any(line.startswith("| compute, trap, shadow |") for line in model)

    def test_files(self, tmp_path: Path) -> None:
        files = write_report(small_study(), tmp_path / "new" / "paper")
        assert [file.name for file in files] == [
            "nano.svg",
            "nano-paper.svg",
            "workloads.svg",
            "clocks.svg",
            "README.md",
        ]
        for file in files[:-1]:
            assert fromstring(file.read_text()).tag.endswith("svg")
            assert f"]({file.name})" in files[-1].read_text()

    def test_findings_are_kept_and_linked(self, tmp_path: Path) -> None:
        (tmp_path / "findings.md").write_text("ours")
        files = write_report(small_study(), tmp_path)
        assert "(findings.md)" in files[-1].read_text()
        assert (tmp_path / "findings.md").read_text() == "ours"

    def test_a_report_without_any_engine(self, tmp_path: Path) -> None:
        study = Study()
        study.drop("bt", "no BMI2")
        [file] = write_report(study, tmp_path)
        assert "- bt: not available: no BMI2" in file.read_text()

    def test_ports_are_taken_together(self) -> None:
        assert grouped({"IN from 0x1": 1, "OUT to 0x2": 2, "INVLPG": 4, "INTR": 8}) == {
            "port I/O": 3,
            "INVLPG": 4,
            "INTR": 8,
        }

    def test_tables_align_numbers(self) -> None:
        assert table(["", "a"], [["x", "1"]]) == "|  | a |\n|---|---:|\n| x | 1 |\n"


class TestCalibration:
    """How often each is done."""

    def study_with(self, monkeypatch: pytest.MonkeyPatch, ns: float, asked: list[str], result: str = "0") -> Study:
        def fake(_factories: object, _place: str, _image: Path, words: str) -> Sequence[Metered]:
            asked.append(words)
            counts = [word.split("=") for word in words.split()]
            return [Metered(name, int(count), result, int(count) * ns + 1000) for name, count in counts]

        monkeypatch.setattr(bench_paper, "run", fake)
        monkeypatch.setattr(bench_paper, "_FIRST_COUNTS", {"nano": {"in": 10}, "fork": {"io": 50}})
        return Study(run_ns=1e6)

    def test_counts_grow_until_they_last(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[str] = []
        study = self.study_with(monkeypatch, 10.0, asked)
        results: dict[tuple[str, int], str] = {}
        counts = bench_paper._calibrate({}, study, "bt", "nano", results)
        assert asked == ["in=10 in=10", "in=10 in=400", "in=10 in=16000", f"in=10 in={asked[-1].rpartition('=')[2]}"]
        assert counts["in"] == pytest.approx(100_000, rel=0.05)
        assert results == {("in", 10): "0"}
        bench_paper._measure({}, study, "bt", "fork", {"io": 70})
        assert asked[-1] == "io=50 io=70"
        assert study.metered["bt"]["io"].count == 70

    def test_engines_have_to_agree(self, monkeypatch: pytest.MonkeyPatch) -> None:
        study = self.study_with(monkeypatch, 10.0, [], result="1")
        with pytest.raises(BenchmarkError, match="in 10 gives 1, elsewhere 0"):
            bench_paper._calibrate({}, study, "bt", "nano", {("in", 10): "0"})

    def test_an_engine_that_fails_has_no_figures(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_arguments: object) -> Sequence[Metered]:
            raise BenchmarkError("a fault of its own")

        monkeypatch.setattr(bench_paper, "run", fail)
        study = Study(rounds=1)
        study.drop("hybrid", "none")
        steps = list(bench_paper._measure_engines({}, study))
        assert "no figures of bt: a fault of its own" in [step.text for step in steps if isinstance(step, Notice)]
        assert study.places == []


def test_from_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All engines but KVM, whose time is the host's; a few operations of a few workloads."""
    counts = {"nano": {"empty": 5, "in": 5, "mov_cr3": 5}, "fork": {"forkwait": 2, "compute": 1, "io": 2}}
    monkeypatch.setattr(bench_paper, "_FIRST_COUNTS", counts)
    monkeypatch.setattr(bench_paper, "_PASSES", 1)
    monkeypatch.setattr(bench_paper, "_IN_TURNS", {"patched_code": 100, "in": 100})
    monkeypatch.setattr(bench_paper, "_RUN_NS", 1000)
    monkeypatch.setattr(bench_paper, "Study", partial(Study, rounds=1))
    factories = make_factories(verify=False)
    factories.pop("trap kvm")
    monkeypatch.setattr(bench_paper, "make_factories", lambda **_options: factories)
    figures = tmp_path / "figures.json"
    assert cli.main(["bench", "paper", "--out", str(tmp_path / "out"), "--scale", "0.5", "--json", str(figures)]) == 0
    shown = capsys.readouterr()
    assert "trap, KVM is not available: there is no engine 'trap kvm'" in shown.err
    rows = {row["name"]: row for row in json.loads(figures.read_text())}
    for engine in ("bt", "trap, shadow", "trap, nested", "hybrid", "interp"):
        assert rows[f"forkwait, {engine}"]["value"] > 0, shown.err
    assert rows["compute, native"]["value"] < rows["compute, interp"]["value"]
    assert rows["forkwait, bt / trap with shadow paging"]["note"] == "paper: 0.347"
    text = (tmp_path / "out" / "README.md").read_text()
    assert "EXCP_PF trace" in text
    assert re.search(r"^\| phases in turns \| \d[^|]* \| \d[^|]* \| \d[^|]* \|$", text, re.MULTILINE)
    assert "CR3_WRITE" in next(line for line in text.splitlines() if line.startswith("| mov cr3, trap, shadow |"))


def test_reports_run_only_when_they_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[ReportOptions] = []

    def report(options: ReportOptions) -> list[Result]:
        """Writes."""
        asked.append(options)
        return [Result("r", 1.0, "x")]

    monkeypatch.setattr("gdbstub.cli_bench.BENCHMARKS", {})
    monkeypatch.setattr("gdbstub.cli_bench.REPORTS", {"paper": report})
    assert cli.main(["bench"]) == 0
    assert asked == []
    assert cli.main(["bench", "paper", "--out", str(tmp_path), "--scale", "2"]) == 0
    assert asked == [ReportOptions(tmp_path, 2.0)]
    assert cli.main(["bench", "--list"]) == 0
    assert "paper            Writes." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["bench", "paper", "--scale", "0"])
    assert "'0' is not a number above 0" in capsys.readouterr().err
    assert bench.REPORTS["paper"].__doc__
