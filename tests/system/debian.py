"""Fetches guests that none of us wrote, from Debian's i386 packages, when a test first asks for one.

It leaves the machine's own apt as it is and knows nothing of how a guest is run. What is said below of each guest was
observed under QEMU 7.2 (`qemu-system-i386 -nodefaults -vga std -m 64`, TCG); "instructions" are QEMU's count under
`-icount`, which counts each iteration of a REP, from the guest's first instruction on.
"""

from __future__ import annotations

import fcntl
import gzip
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FLOPPY_BYTES = 1_474_560
LINUX_PACKAGE = "linux-image-686"

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_APT_TIMEOUT_S = 200.0
# How sources name Debian 12; updates and security are other releases, and hold nothing that is asked for here.
_RELEASES = {("bookworm", "main"), ("oldstable", "main"), ("stable", "main")}

# `-c` is read after the machine's own configuration, so what that says of proxies holds; its hooks are not for us.
_APT_CONFIGURATION = """\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Architectures;
APT::Architecture "i386";
APT::Architectures {{ "i386"; }};
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
Dir::State "{directory}/state";
Dir::State::status "{directory}/state/status";
Dir::Cache "{directory}/cache";
Dir::Etc::sourcelist "{directory}/sources.list";
Dir::Etc::sourceparts "{directory}/none";
"""


class FetchError(AssertionError):
    """A package could not be had; the message says what was tried and how it failed."""


def gnumach() -> Path:
    """Return GNU Mach 1.8 for the 486 as an ELF file, 1.2 MB: a multiboot kernel, stripped, with .eh_frame.

    Boot it with `-kernel gnumach-1.8-486 -append console=com0` and 24 MiB of RAM or more: it is loaded at 16 MiB. With
    64 MiB QEMU prints the banner after 0.3 s and ends after 2.5 s in the expected panic. On COM1, each line ends in
    CR LF and the next may begin with CR:

        GNU Mach 1.8+git20221224-486
        biosmem: physical memory map:
        ... (the map, and the page allocator's segments)
        vm_page: DIRECTMAP: min:612 low:735 high:1225
        pcibios_init : ... (what the BIOS32 directory leads to)
        probing scsi 0/16: ... (driver after driver, on one line)
        panic ../kern/bootstrap.c:181: bootstrap_create: No bootstrap code loaded with the kernel!

    Loading: the multiboot header is 4 bytes into .text, with flags 3 (page-aligned modules, memory information) and no
    addresses of its own, so the ELF headers hold. p_paddr is 01000000h where p_vaddr is C1000000h, and the entry point
    is virtual: the loader has to enter C1000000h at 01000000h. The kernel first runs on segments with base 40000000h
    (linear = virtual + 40000000h, modulo 2**32), then turns paging on and loads flat ones: one address is 01xxxxxxh
    linear before that and C1xxxxxxh after it. There are no symbols; gdb finds the callers by .eh_frame.

    It needs CMOV: without it #UD at C1017E96h, before the first output and before there is an IDT, so a triple fault.
    It needs an FPU: FNINIT at C1006150h, then FNSTSW AX; if AL is not zero (as when both do nothing) it prints, after
    the lines of vm_page, `panic ../i386/i386/fpu.c:244: init_fpu: No FPU!`. Else FLD1, FDIVRP, FUCOMIP follow, and
    FXSAVE where CPUID has FXSR. It uses PGE where CPUID has it, never PAE. It gets to FNINIT in about 5.1 million
    instructions with 64 MiB, 3.0 with 32 and 2.3 with 24; to the last panic in 2,200 million, most of them in delays
    of the drivers that probe for disks.

    Ports: 8259 pair (ICW1 to 4, masks, specific EOI 60h and 66h), 8254 channel 0 (43h = 36h), RTC (reads the time and
    D, writes 26h to A, 02h to B), 80h as a delay; COM1 polled by 3FDh, and its scratch register 3FFh made to hold all
    256 values; COM2 by its IER; PCI mechanism 1 with dwords, bytes at CFAh and CFBh to tell it from mechanism 2; FDC
    3F2h to 3F5h; IDE 1F6h, 176h, 1EEh, 16Eh; printers 278h, 378h, 3BCh; and a hundred ports of ISA and EISA SCSI cards
    that read all ones.
    """
    return _built("gnumach-1.8-486", "gnumach-image-1.8-486", "boot/gnumach-1.8-486.gz", gzip.decompress)


def memtest() -> Path:
    """Return Memtest86+ 6.10 as a Linux boot image, 139 kB, boot protocol 2.12; it is not a multiboot kernel.

    Boot it with `-kernel memtest86+ia32.bin -append "console=ttyS0,115200 nopause"`: after 0.2 s it draws its screen on
    COM1 with ANSI sequences, `Memtest86+ v6.10` first, and then tests memory until it is stopped. The file also
    begins with a boot sector: see `memtest_floppy`.

    It runs on a 486 as well, without CPUID's TSC, PAE or CMOV. Where CPUID has PAE it turns PAE paging on (CR4 = 20h).
    It executes FNINIT when it starts, and divides 64-bit integers with x87 (FILD, FDIVRP, FCOM, FISTP at 1B93Eh), with
    CR0.EM and CR0.TS clear. Where those do nothing the tests run all the same; the time that it shows is wrong.
    """
    return _package("memtest86+") / "boot/memtest86+ia32.bin"


def memtest_floppy() -> Path:
    """Return the same Memtest86+ as a 1.44 MB floppy, which its own boot sector loads.

    It prints nothing on COM1. Within 2 s of reset the text screen at B8000h shows `Memtest86+ v6.10` and
    `Press <F1> to configure`; within 5 s of reset the tests run.

    BIOS calls: INT 13h AH=00h and 02h (it finds a track's length by trying to read sector 18, then 15), INT 10h
    AH=01h, 03h, 0Eh, 13h, INT 15h AX=E820h, and 5300h, 5304h, 5301h, 5308h to turn APM off. Then 92h for A20 and 70h to
    mask NMI, and no BIOS in protected mode. Its ports there: 64h (the keyboard is polled), 3D4h and 3D5h, PCI mechanism
    1 (if it answers: the host bridge, and the SMBus controller of a chip set that it knows).

    Time: where ACPI tables name no timer it measures the TSC against 8254 channel 2 in mode 0, 59,659 ticks, polling
    bit 5 of port 61h. That is 50 ms of guest time, so 50 million instructions at one per nanosecond.
    """
    return _built("memtest86+-floppy.img", "memtest86+", "boot/memtest86+ia32.bin", _as_floppy)


def grub_floppy() -> Path:
    """Return GRUB 2.06's rescue image as a 1.44 MB floppy (an ISO 9660 file system behind a boot sector).

    Boot it with `-drive if=floppy,format=raw,file=...`: within 2 s of reset the text screen shows
    `GNU GRUB  version 2.06` over a menu of nine entries, `GNU/Linux` highlighted, which boots by itself after 30 s.
    Nothing goes to COM1. The image boots from a hard disk as well.

    It lives on the BIOS: INT 13h AH=41h (28 times, and failing for a floppy), 08h, 02h (92 reads), 00h, 4B01h; INT 15h
    AX=E820h; INT 10h AH=01h, 02h, 03h, 09h, 0Eh (5,000 calls for the menu, each a trip from protected mode to real mode
    and back); INT 16h AH=01h, polled while it counts down. There is one INT instruction, at 9102h, and its vector is
    written into it before each call. No FPU, CMOV or paging.

    Time: with a TSC in CPUID it measures it against 8254 channel 2 in mode 0 (43h = B0h), 65,535 ticks, polling bit 5
    of port 61h. That is 55 ms of guest time, so 55 million instructions at one per nanosecond. With those the menu is
    there 180 million instructions after the boot sector; `Welcome to GRUB!` comes after 12 to 20 million.
    """
    return _built("grub-floppy.img", "grub-rescue-pc", "usr/lib/grub-rescue/grub-rescue-floppy.img", _as_floppy)


def linux() -> Path:
    """Return the kernel of Debian's linux-image-686, 5.7 MB: Linux 6.1 for processors without PAE, a bzImage.

    Which version it is changes with Debian's point releases. With `console=ttyS0` it prints on COM1; without a root
    file system it panics, with an initramfs it runs `/init` there. It decompresses itself in 2,300 million
    instructions, moves itself to an address that it takes from the TSC, patches its own code, and measures the TSC
    against 8254 channel 2 by polling port 61h for up to 150 ms of guest time.
    """
    return _built("linux-686", LINUX_PACKAGE, "vmlinuz", lambda kernel: kernel)


def busybox() -> Path:
    """Return Busybox for i386, 2 MB, linked statically."""
    return _package("busybox-static") / "bin/busybox"


def _as_floppy(image: bytes) -> bytes:
    return image.ljust(FLOPPY_BYTES, b"\0")


def cache_directory() -> Path:
    """Return where packages are kept between runs: `trapgate-tests` in XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "trapgate-tests")


@contextmanager
def _locked() -> Iterator[Path]:
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    with Path(cache, "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield cache


def _built(name: str, package: str, member: str, build: Callable[[bytes], bytes]) -> Path:
    """Return the cached file `name`, made by `build` from `member` of `package` if it is not there yet."""
    target = cache_directory() / name
    if not target.is_file():
        source = _package(package) / member
        with _locked():
            partial = target.with_suffix(".partial")
            partial.write_bytes(build(source.read_bytes()))
            partial.rename(target)
    return target


def _package(name: str) -> Path:
    """Return the directory that the files of the package are unpacked in, fetching it if need be."""
    unpacked = cache_directory() / name
    if not unpacked.is_dir():
        with _locked() as cache:
            if not unpacked.is_dir():
                _fetch(name, cache, unpacked)
    return unpacked


def _fetch(name: str, cache: Path, unpacked: Path) -> None:
    """Download a package with apt, which checks the signature of the index and the hash of the file, and unpack it."""
    apt = _apt_directory(cache)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        archive = _download(name, apt, Path(scratch))
        contents = Path(scratch, "contents")
        if name == LINUX_PACKAGE:
            _unpack_linux(archive, apt, contents)
        else:
            subprocess.run(["dpkg-deb", "-x", archive, contents], check=True, timeout=60)
        contents.rename(unpacked)


def _unpack_linux(archive: Path, apt: Path, contents: Path) -> None:
    """Of what an empty package depends on, which is named after the version, unpack the kernel without its modules."""
    depends = _field(archive, "Depends")
    name = depends.split()[0]
    archive.unlink()
    archive = _download(name, apt, archive.parent)
    contents.mkdir()
    files = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], check=True, timeout=120, stdout=subprocess.PIPE)
    with tarfile.open(fileobj=io.BytesIO(files.stdout)) as members:
        for member in members:
            if Path(member.name).name.startswith("vmlinuz-"):
                kernel = members.extractfile(member)
                assert kernel is not None
                (contents / "vmlinuz").write_bytes(kernel.read())


def _field(archive: Path, field: str) -> str:
    command = ["dpkg-deb", "-f", str(archive), field]
    return subprocess.run(command, check=True, timeout=60, stdout=subprocess.PIPE, text=True).stdout


def _apt_directory(cache: Path) -> Path:
    """Set up apt's state of our own, whose configuration names i386 and the release proper, and return where it is."""
    apt = cache / "apt"
    for directory in ("state/lists/partial", "cache/archives/partial", "none"):
        (apt / directory).mkdir(parents=True, exist_ok=True)
    (apt / "state/status").touch()
    (apt / "sources.list").write_text(_sources())
    (apt / "apt.conf").write_text(_APT_CONFIGURATION.format(directory=apt))
    return apt


def _download(name: str, apt: Path, target: Path) -> Path:
    """Download the package into the empty directory `target`: with the lists there are, else with new ones."""
    options = ["-c", str(apt / "apt.conf"), "-qq"]
    said = ""
    for update in (False, True):
        if update:
            # One that fails for one of several mirrors may still have brought what is needed.
            said = _apt([*options, "update"], apt).stdout
        loaded = _apt([*options, "download", name], target)
        archives = list(target.glob("*.deb"))
        if loaded.returncode == 0 and len(archives) == 1:
            return archives[0]
    raise FetchError(f"apt could not download {name} for i386:\n{said}{loaded.stdout}")


def _apt(arguments: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("apt-get") is None:
        raise FetchError("apt-get is not installed: the guests of Debian's packages can be fetched on Debian only")
    try:
        return subprocess.run(
            ["apt-get", *arguments],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_APT_TIMEOUT_S,
            env=os.environ | {"LC_ALL": "C.UTF-8"},
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        raise FetchError(f"apt-get {arguments[-1]} did not end in {_APT_TIMEOUT_S} s: {expired.stdout!r}") from expired


def _sources() -> str:
    """Return one-line sources for the release proper, from whichever mirrors the machine itself uses."""
    listing = _apt(
        ["indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"], Path("/")
    )
    targets = {tuple(line.split()) for line in listing.stdout.splitlines()}
    option = f"[signed-by={_KEYRING}] " if _KEYRING.is_file() else ""
    lines = [f"deb {option}{' '.join(target)}\n" for target in sorted(targets) if target[1:] in _RELEASES]
    if not lines:
        raise FetchError(f"apt has no source for Debian 12, main: {sorted(targets)}")
    return "".join(lines)
