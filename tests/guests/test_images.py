"""The shipped images as files: that they are there, small, loadable, and hold only what a Pentium can run."""

import hashlib
import struct
import subprocess
from pathlib import Path

import iced_x86
import pytest

from guests import build, images

ELF = [image for image in images.IMAGES if image.kind == "multiboot"]


def functions(elf: Path) -> list[tuple[str, int, bytes]]:
    """Name, linear address and code of each function that the symbol table gives a size."""
    listing = subprocess.run(["readelf", "-SWs", elf], capture_output=True, text=True, check=True).stdout
    content = elf.read_bytes()
    sections = {}
    found = []
    for line in listing.splitlines():
        words = line.replace("[ ", "[").split()
        if words and words[0].startswith("[") and words[0][1:-1].isdigit() and words[2] == "PROGBITS":
            sections[words[0][1:-1]] = int(words[3], 16), int(words[4], 16)
        if len(words) == 8 and words[3] == "FUNC" and words[6] in sections and words[2] != "0":
            linear, section = int(words[1], 16), sections[words[6]]
            offset = linear - section[0] + section[1]
            found.append((words[7], linear, content[offset : offset + int(words[2], 0)]))
    return found


def test_names_are_those_that_users_were_told() -> None:
    names = "demo boot bench nano fork tiny-triple tiny-hlt tiny-loop tiny-exit tiny-selfmod tiny-stepper"
    assert " ".join(images.NAMES) == names


@pytest.mark.parametrize("name", images.NAMES)
def test_each_image_ships_with_its_symbols(name: str) -> None:
    assert images.path(name).is_file()
    assert images.symbols_path(name).read_bytes()[:4] == b"\x7fELF"


def test_every_shipped_file_is_in_the_manifest_with_its_digest() -> None:
    shipped = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in images.built_directory().iterdir()
        if file.name != build.MANIFEST
    }
    assert shipped == build.read_manifest().sha256


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(KeyError, match=r"'domo'.*demo, boot, bench"):
        images.path("domo")


@pytest.mark.parametrize(("name", "limit_bytes"), [("demo", 200_000), ("bench", 60_000), ("boot", 9 * 1024)])
def test_images_stay_small(name: str, limit_bytes: int) -> None:
    assert images.path(name).stat().st_size < limit_bytes


@pytest.mark.parametrize("image", ELF, ids=lambda image: image.name)
def test_the_multiboot_header_is_where_loaders_look(image: images.Image) -> None:
    head = images.path(image.name).read_bytes()[:8192]
    offset = head.find(struct.pack("<I", 0x1BADB002))
    assert offset % 4 == 0
    magic, flags, checksum = struct.unpack_from("<3I", head, offset)
    assert (magic + flags + checksum) % 2**32 == 0


def test_the_boot_image_is_whole_sectors_and_begins_with_a_boot_sector() -> None:
    content = images.path("boot").read_bytes()
    assert len(content) % 512 == 0
    assert content[510:512] == b"\x55\xaa"


def test_a_floppy_is_the_image_and_zeros() -> None:
    content = images.path("boot").read_bytes()
    floppy = images.floppy("boot")
    assert len(floppy) == 2 * 80 * 18 * 512
    assert floppy[: len(content)] == content
    assert not any(floppy[len(content) :])


def test_a_kernel_is_no_floppy() -> None:
    with pytest.raises(ValueError, match="demo is not a disk image"):
        images.floppy("demo")


# What a Pentium has, and the system calls of the Pentium II, which the demo kernel uses only if CPUID shows them.
PENTIUM = {
    iced_x86.CpuidFeature.INTEL8086,
    iced_x86.CpuidFeature.INTEL8086_ONLY,
    iced_x86.CpuidFeature.INTEL186,
    iced_x86.CpuidFeature.INTEL286,
    iced_x86.CpuidFeature.INTEL386,
    iced_x86.CpuidFeature.INTEL486,
    iced_x86.CpuidFeature.CPUID,
    iced_x86.CpuidFeature.MSR,
    iced_x86.CpuidFeature.TSC,
    iced_x86.CpuidFeature.SEP,
}
# What the compute kernels in floating point need; the guest asks CPUID first.
FLOATING = {
    "nbody": {iced_x86.CpuidFeature.FPU},
    "mandelbrot": {iced_x86.CpuidFeature.SSE, iced_x86.CpuidFeature.SSE2},
    "start_fpu": {iced_x86.CpuidFeature.FPU},
    "run": {iced_x86.CpuidFeature.FPU},
}


@pytest.mark.parametrize("image", ELF, ids=lambda image: image.name)
def test_the_code_needs_no_more_than_a_pentium(image: images.Image) -> None:
    code = functions(images.path(image.name))
    assert code
    for name, linear, content in code:
        for instruction in iced_x86.Decoder(32, content, ip=linear):
            assert instruction.code != iced_x86.Code.INVALID, f"{name}+{instruction.ip32 - linear:x}"
            allowed = PENTIUM | (FLOATING.get(name, set()) if image.name == "bench" else set())
            assert set(instruction.cpuid_features()) <= allowed, f"{name}: {instruction}"


@pytest.mark.parametrize(
    "symbol",
    [
        *(
            "start",
            "kernel_main",
            "trap",
            "syscall_dispatch",
            "schedule",
            "switch_context",
            "page_fault",
            "triple_fault",
        ),
        *("ticks", "current", "tasks", "system_call", "fast_system_call", "user_start", "primes_found"),
    ],
)
def test_the_demo_kernel_has_the_symbols_that_its_readme_names(symbol: str) -> None:
    listing = subprocess.run(["readelf", "-sW", images.path("demo")], capture_output=True, text=True, check=True).stdout
    assert f" {symbol}\n" in listing
