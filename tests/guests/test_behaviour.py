"""The shipped images under Debian's QEMU: each does what guests/README.md says."""

import re
import subprocess
import zlib
from pathlib import Path

import pytest

from guests import build, images
from tests.guests import qemu
from tests.guests.behaviours import BEHAVIOURS, FORK_COMPUTE_SUMS, Behaviour, fork_results
from tests.system.tools import qemu as find_qemu


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda row: f"{row.name} {row.append}".strip())
def test_a_shipped_image_behaves_as_documented(behaviour: Behaviour, tmp_path: Path) -> None:
    image = images.path(behaviour.name)
    if behaviour.append == "floppy":
        image = tmp_path / "floppy.img"
        image.write_bytes(images.floppy(behaviour.name))
    behaviour.check(image)


def test_every_image_has_a_behaviour() -> None:
    assert {row.name for row in BEHAVIOURS} == set(images.NAMES)


def test_a_kernel_panic_is_not_taken_for_good_behaviour() -> None:
    """The rows can fail: the same image with another command line does."""
    good = next(row for row in BEHAVIOURS if row.name == "demo")
    bad = Behaviour("demo", "run=echo hullo;pgfault;poweroff", good.serial, 0)
    with pytest.raises(AssertionError):
        bad.check(images.path("demo"))


# The benchmark kernels, against the host and against what is known about them.


@pytest.fixture(scope="module")
def native_bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.build_native_bench(tmp_path_factory.mktemp("native"))


def native_lines(program: Path, *words: str) -> list[str]:
    done = subprocess.run([program, *words], capture_output=True, text=True, check=True, timeout=60)
    assert len(done.stderr.splitlines()) == len(done.stdout.splitlines())
    return done.stdout.splitlines()


def guest_lines(append: str) -> list[str]:
    outcome = qemu.run(qemu.kernel(images.path("bench"), append))
    assert outcome.status == 0
    *lines, last = outcome.serial.splitlines()
    assert last == "done"
    return [line for line in lines if not line.startswith("start ")]


def test_guest_and_host_compute_the_same(native_bench: Path) -> None:
    assert guest_lines("") == native_lines(native_bench)


def test_repeats_count_and_paging_changes_nothing(native_bench: Path) -> None:
    words = ("lz=3", "fib=2", "memory", "sort=2", "crc32=0")
    lines = guest_lines("paging " + " ".join(words))
    assert lines == native_lines(native_bench, *words)
    assert lines[-1] == "crc32 0 00000000"
    assert lines != guest_lines("lz=2 fib=2 memory sort=2 crc32=0")


def test_checksums_are_right_where_they_are_known() -> None:
    sums = dict(line.split(" 1 ") for line in guest_lines("sieve crc32 fib sort"))
    text = bytes((i * 7 + (i >> 8)) & 0xFF for i in range(32768))
    assert int(sums["crc32"], 16) == zlib.crc32(text)
    assert int(sums["fib"], 16) == 6765
    primes = [n for n in range(2, 32768) if all(n % d for d in range(2, int(n**0.5) + 1))]
    assert int(sums["sieve"], 16) == (len(primes) << 20 ^ sum(primes)) & 0xFFFFFFFF
    state, numbers, checksum = 3, [], 0
    for _ in range(2048):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        numbers.append(state >> 8)
    for number in sorted(numbers):
        checksum = (checksum * 31 + number) & 0xFFFFFFFF
    assert int(sums["sort"], 16) == checksum


# The kernel with fork.


def test_the_computation_of_fork_is_the_hosts(tmp_path: Path) -> None:
    program = build.build_native_compute(tmp_path)
    done = subprocess.run([program, "1", "10"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == [f"compute {count} {value:x}" for count, value in FORK_COMPUTE_SUMS.items()]
    assert len(done.stderr.splitlines()) == 2


def test_counts_of_fork_scale_and_ticks_do_no_harm() -> None:
    """Processes that are interrupted every 50,000 instructions; pages that are taken again and again."""
    outcome = qemu.run(qemu.kernel(images.path("fork"), "hz=20000 forkwait=300 syscalls=70 ptchurn=300 io=300 mix=9"))
    assert outcome.status == 0
    lines = [line.split() for line in outcome.serial.splitlines()]
    for name, count, result in (line for line in lines if len(line) == 3):
        assert int(result, 16) == fork_results(int(count))[name] & 0xFFFFFFFF


def test_triple_has_the_chain_that_is_documented(tmp_path: Path) -> None:
    """QEMU's log of interrupts: #UD, then #NP for its gate, then #DF. QEMU does not set EXT in the error code."""
    log = tmp_path / "log"
    arguments = [*qemu.COMMON, *qemu.kernel(images.path("tiny-triple")), "-d", "int,cpu_reset", "-D", str(log)]
    subprocess.run([find_qemu(), *arguments], stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=30)
    text = log.read_text()
    _, found, rest = text.partition("v=06 ")
    assert found
    assert re.findall(r"check_exception old: (\S+) new (\S+)", rest) == [
        ("0xffffffff", "0xb"),
        ("0xb", "0xb"),
        ("0x8", "0xb"),
    ]
    assert re.findall(r"v=(\S+) e=(\S+)", rest) == [("0b", "0032"), ("08", "0000")]
    assert "Triple fault" in rest
