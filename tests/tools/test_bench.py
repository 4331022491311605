from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gdbstub import cli
from tools import bench, bench_server
from tools.bench import BenchmarkError, Notice, Progress, Result, Step
from tools.rsp_client import RspClient, decode


def test_every_benchmark_says_what_it_measures() -> None:
    assert {"interp", "compute", "nano", "translate", "start", "server"} <= set(bench.BENCHMARKS)
    assert all(benchmark.__doc__ for benchmark in bench.BENCHMARKS.values())


def test_rate_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_WARM_UP_INSNS", 1000)
    monkeypatch.setattr(bench, "_MEASURED_INSNS", 20_000)
    assert bench.measure_rate("bench", "sieve=1000000") > 1000
    with pytest.raises(BenchmarkError, match="EXIT"):
        bench.measure_rate("tiny-exit", "exit 1")


def test_server_is_measured_beside_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_server, "_STEPS", 20)
    monkeypatch.setattr(bench_server, "_HITS", 20)
    monkeypatch.setattr(bench_server, "_MEMORY_BYTES", 10_000)
    results = [step for step in bench_server.server_speed() if isinstance(step, Result)]
    assert [result.name.split()[0] for result in results] == ["trapgate"] * 3 + ["QEMU"] * 3
    assert all(result.value > 0 for result in results)


def test_results_are_shown_and_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def good() -> Iterator[Step]:
        """Measures nothing."""
        yield Progress(0.5, "half")
        yield Notice("no wind")
        yield Result("speed", 12345.678, "1/s")
        yield Result("best", 1.5, "s", median=2.5, note="goal: 1")

    def bad() -> Iterator[Step]:
        """Fails."""
        yield Result("half", 1.0, "1/s")
        raise BenchmarkError("no luck")

    monkeypatch.setattr(bench, "BENCHMARKS", {"good": good, "bad": bad})
    monkeypatch.setattr("gdbstub.cli_bench.BENCHMARKS", {"good": good, "bad": bad})
    out = tmp_path / "out.json"
    assert cli.main(["bench", "good", "--json", str(out)]) == 0
    assert json.loads(out.read_text()) == [
        {"name": "speed", "value": 12345.678, "unit": "1/s"},
        {"name": "best", "value": 1.5, "unit": "s", "median": 2.5, "note": "goal: 1"},
    ]
    shown = capsys.readouterr()
    assert "12,345.7 1/s\n" in shown.out
    assert "1.5 s  (median 2.5)  (goal: 1)\n" in shown.out
    assert shown.err == "trapgate: good: no wind\n"
    assert cli.main(["bench"]) == 1
    assert "bad: no luck" in capsys.readouterr().err


def test_client_speaks_with_and_without_acknowledgements() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        seen = bytearray()

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                replies = [b'+$PacketSize=10*"#00', b"+$l#00", b"+$ab#c3"]
                while data := connection.recv(1000):
                    seen.extend(data)
                    if seen.count(b"#") > 3 - len(replies):
                        connection.sendall(replies.pop(0))

        thread = threading.Thread(target=answer)
        thread.start()
        with RspClient(server.getsockname()[1]) as client:
            assert client.packet_bytes == 0x100_0000
            assert client.ask(b"g") == b"ab"
        thread.join(10)
    assert seen.endswith(b"+$g#67+")


def test_decode() -> None:
    assert decode(b"0* x}\x03") == b"0000x#"
