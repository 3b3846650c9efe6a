"""What each kernel takes of a multiprocessor, and what its hot loop is made of, by the compiler's word: no GPU needed.

    python -m benchmarks.kernel_resources [--archs 80 90] [--json benchmarks/results/kernel_resources.json]

Registers, spills, stack and static shared memory are ptxas's; occupancy follows from them, from __launch_bounds__ and
from the dynamic shared memory, which only the launcher knows: DYNAMIC_SHARED, or --shared REGEX=BYTES. Instructions are
those of the disassembled machine code, each counted once where it stands: "loop" is one round of the hot loop, the
innermost one that holds the most tensor-core instructions; both sides of a branch in it count. A warp executes them.

Needs nvcc, c++filt, and cuobjdump and nvdisasm: of PATH, of CUDA_HOME, or Triton's, which brings them.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("csrc/normalize.cu", "csrc/forward.cu", "csrc/backward.cu")
FLAGS = ("-Xptxas", "-v", "--std=c++17", "-O3")
# Bytes a block, by a regular expression that is searched for in the kernel's short name; the first that fits counts.
# Of tile.cuh's TileStream: A once, in a wide shape twice, and B twice, two bytes a number; then 16 bytes a column.
DYNAMIC_SHARED = {
    rf"<Shape<{k}, {planes}, {wide}, {tall}>": 2 * planes * k * (rows * (1 + (wide == "true")) + 2 * columns)
    + 16 * columns
    for k, planes, wide, tall, rows, columns in (
        (64, 1, "false", "true", 128, 64),
        (128, 1, "false", "true", 128, 64),
        (64, 1, "false", "false", 64, 32),
        (128, 1, "false", "false", 64, 32),
        (256, 1, "false", "false", 64, 32),
        (256, 1, "true", "false", 64, 32),
        (64, 2, "false", "false", 64, 32),
        (128, 2, "false", "false", 64, 32),
        (128, 2, "true", "false", 64, 32),
    )
}

TENSOR = ("HMMA", "HGMMA")
SHOWN = ("HMMA", "MUFU.EX2", "LDSM", "LDGSTS", "SHFL", "BAR", "FMUL", "FFMA", "FADD", "FMNMX", "FSEL", "LDL", "STL")
# Warps, blocks and KiB of shared memory of a multiprocessor; registers are 64 K on each. CUDA C++ Programming Guide,
# "Compute capabilities".
LIMITS = {
    "80": (64, 32, 164),
    "86": (48, 16, 100),
    "89": (48, 24, 100),
    "90": (64, 32, 228),
    "100": (64, 32, 228),
    "120": (48, 24, 100),
}
RESERVED_SHARED = 1024  # bytes of each block's that the system takes


@dataclass
class Kernel:
    """One instance of a kernel for one architecture. loop: {} where no loop holds tensor-core instructions."""

    name: str
    source: str
    arch: str
    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    stack: int = 0
    static_shared: int = 0
    dynamic_shared: int = 0
    threads: int | None = None  # of __launch_bounds__
    blocks: int | None = None  # that fit a multiprocessor
    occupancy: float | None = None
    limited_by: str = ""
    total: dict[str, int] = field(default_factory=dict)
    loop: dict[str, int] = field(default_factory=dict)


@dataclass
class Block:
    """Instructions without a branch between them, and the blocks that may come next."""

    opcodes: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)  # labels
    falls_through: bool = True


def find_tool(name: str) -> str:
    """The program `name`. Raises SystemExit where there is none."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))
    if found is None:
        raise SystemExit(f"{name} was not found; looked in PATH, {', '.join(map(str, folders))}")
    return found


def run(*command: str) -> str:
    """What a command prints, on both streams. Raises SystemExit with it where it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


def short_name(mangled: str) -> str:
    """forward_kernel<Shape<128, 1>> of the mangled name of void fastsimclr::(anonymous namespace)::forward_..."""
    name = run(find_tool("c++filt"), mangled).strip().removeprefix("void ")
    name = re.sub(r"\(anonymous namespace\)::|fastsimclr::", "", name)
    return name.rsplit("(", 1)[0]


def parse_ptxas(output: str) -> dict[str, dict[str, Any]]:
    """Of `ptxas -v`, by mangled name; functions that kernels call are of no interest."""
    patterns = {
        "registers": r"Used (\d+) registers",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
        "stack": r"(\d+) bytes stack frame",
        "static_shared": r"(\d+) bytes smem",
    }
    found = {}
    for part in output.split("Compiling entry function '")[1:]:
        matches = {key: re.search(pattern, part) for key, pattern in patterns.items()}
        found[part[: part.index("'")]] = {key: int(match[1]) if match else 0 for key, match in matches.items()}
    return found


def parse_threads(elf: str) -> dict[str, int]:
    """Threads a block by __launch_bounds__, of `cuobjdump -elf`, by mangled name."""
    found = {}
    for part in re.split(r"^\.nv\.info\.", elf, flags=re.MULTILINE)[1:]:
        if match := re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+(\w+) (\w+) (\w+)", part):
            x, y, z = (int(each, 16) for each in match.groups())
            found[part.split(None, 1)[0]] = x * y * z
    return found


def opcode_of(instruction: str) -> str:
    """HMMA of HMMA.16816.F32.BF16; of the special functions also which."""
    parts = instruction.split(".")
    return ".".join(parts[:2]) if parts[0] == "MUFU" else parts[0]


def parse_blocks(lines: Sequence[str]) -> dict[str, Block]:
    """One kernel's basic blocks, in order, by label; those without one get a number."""
    blocks = {"entry": Block()}
    current, fresh = blocks["entry"], False
    for line in lines:
        if label := re.match(r"^(\.L_\w+):", line):
            current = blocks[label[1]] = Block()
            fresh = False
            continue
        code = re.match(r"^\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", line)
        if not code:
            continue
        if fresh:
            current = blocks[f"#{len(blocks)}"] = Block()
            fresh = False
        guard, instruction, operands = code.groups()
        opcode = opcode_of(instruction)
        current.opcodes.append(opcode)
        if opcode in ("BRA", "EXIT", "RET", "BRX", "JMX"):
            current.targets = re.findall(r"`\((\.L_\w+)\)", operands) if opcode == "BRA" else []
            bare = re.fullmatch(r"\s*(`\(\.L_\w+\))?\s*", operands)  # BRA P0, `(...) is conditional too
            current.falls_through = guard is not None or (opcode == "BRA" and not bare)
            fresh = True
    return blocks


def hot_loop(blocks: dict[str, Block]) -> Counter[str]:
    """Instructions of the innermost loop with the most tensor-core instructions; empty if there is none.

    A loop is a natural one: a branch back to a block that every way to the branch leads through. By addresses alone,
    a rare case that was moved behind the end and jumps back would look like one.
    """
    names = list(blocks)
    follow: dict[str, list[str]] = {}
    for name, following in zip(names, [*names[1:], None], strict=True):
        block = blocks[name]
        follow[name] = [target for target in block.targets if target in blocks]
        if block.falls_through and following is not None:
            follow[name].append(following)
    before: dict[str, list[str]] = {name: [] for name in names}
    reachable, stack = {"entry"}, ["entry"]
    while stack:
        name = stack.pop()
        for target in follow[name]:
            before[target].append(name)
            if target not in reachable:
                reachable.add(target)
                stack.append(target)

    dominators = {name: set(reachable) for name in reachable}
    dominators["entry"] = {"entry"}
    changed = True
    while changed:
        changed = False
        for name in names:
            if name in reachable and name != "entry":
                new = set.intersection(*(dominators[each] for each in before[name])) | {name}
                changed |= new != dominators[name]
                dominators[name] = new

    loops: dict[str, set[str]] = {}  # by head; several branches back are one loop
    for name in reachable:
        for head in follow[name]:
            if head in dominators[name]:
                body = loops.setdefault(head, {head})
                stack = [name]
                while stack:
                    each = stack.pop()
                    if each not in body:
                        body.add(each)
                        stack.extend(before[each])
    counts = {head: Counter(code for name in body for code in blocks[name].opcodes) for head, body in loops.items()}

    def tensor(head: str) -> int:
        return sum(counts[head][opcode] for opcode in TENSOR)

    innermost = [
        head
        for head, body in loops.items()
        if tensor(head) and not any(tensor(other) for other in loops if other != head and loops[other] < body)
    ]
    return counts[max(innermost, key=tensor)] if innermost else Counter()


def set_occupancy(kernel: Kernel) -> None:
    """Blocks that fit a multiprocessor, as CUDA's occupancy calculator has it, and what is used up first."""
    if kernel.arch.rstrip("af") not in LIMITS or kernel.threads is None:
        return
    most_warps, most_blocks, shared_kib = LIMITS[kernel.arch.rstrip("af")]
    warps = -(-kernel.threads // 32)
    registers_of_warp = -(-32 * kernel.registers // 256) * 256
    warps_by_registers = 65536 // registers_of_warp // 4 * 4  # the same number in each of the four parts
    shared = kernel.static_shared + kernel.dynamic_shared + RESERVED_SHARED
    fit = {
        "warps": most_warps // warps,
        "blocks": most_blocks,
        "registers": warps_by_registers // warps,
        "shared memory": shared_kib * 1024 // (-(-shared // 128) * 128),
    }
    kernel.limited_by = min(fit, key=lambda what: fit[what])
    kernel.blocks = fit[kernel.limited_by]
    kernel.occupancy = kernel.blocks * warps / most_warps


def compile_and_read(source: Path, arch: str, shared: dict[str, int]) -> list[Kernel]:
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder, "kernels.cubin"))
        command = [find_tool("nvcc"), "-cubin", f"-arch=sm_{arch}", *FLAGS, f"-I{ROOT / 'csrc'}", str(source)]
        resources = parse_ptxas(run(*command, "-o", cubin))
        threads = parse_threads(run(find_tool("cuobjdump"), "-elf", cubin))
        listing = run(find_tool("nvdisasm"), "-c", cubin)
    sections = re.split(r"^\s*\.section\s+\.text\.", listing, flags=re.MULTILINE)[1:]
    code = {section.split(",", 1)[0].strip('"'): section.splitlines() for section in sections}
    for mangled, numbers in sorted(resources.items()):
        kernel = Kernel(short_name(mangled), source.name, arch, **numbers)
        kernel.threads = threads.get(mangled)
        kernel.dynamic_shared = next((size for key, size in shared.items() if re.search(key, kernel.name)), 0)
        blocks = parse_blocks(code[mangled])
        kernel.total = dict(Counter(opcode for block in blocks.values() for opcode in block.opcodes).most_common())
        kernel.loop = dict(hot_loop(blocks).most_common())
        set_occupancy(kernel)
        kernels.append(kernel)
    return sorted(kernels, key=lambda kernel: kernel.name)


def table(kernels: Sequence[Kernel]) -> str:
    columns = [
        "kernel",
        "sm",
        "regs",
        "spills",
        "stack",
        "shared",
        "threads",
        "blocks",
        "limited by",
        "",
        *SHOWN,
        "all",
    ]
    rows = [columns]
    for kernel in kernels:
        shared = f"{kernel.static_shared}+{kernel.dynamic_shared}"
        blocks = "?" if kernel.blocks is None else f"{kernel.blocks} ({100 * (kernel.occupancy or 0):.0f} %)"
        head = [kernel.name, kernel.arch, kernel.registers, f"{kernel.spill_stores}/{kernel.spill_loads}", kernel.stack]
        head += [shared, kernel.threads or "?", blocks, kernel.limited_by]
        for what, counts in (("total", kernel.total), ("loop", kernel.loop)):
            if counts:
                cells = [what, *(counts.get(opcode, 0) for opcode in SHOWN), sum(counts.values())]
                rows.append([str(cell) for cell in (head if what == "total" else [""] * len(head)) + cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) if i in (0, 8, 9) else cell.rjust(width) for i, (cell, width) in enumerate(line))
        for line in (list(zip(row, widths, strict=True)) for row in rows)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=["80", "90"], help="compute capabilities without the point")
    parser.add_argument("--json", type=Path, help="where to write the same figures, with every opcode")
    parser.add_argument("--shared", action="append", default=[], metavar="REGEX=BYTES", help="goes before the file's")
    parser.add_argument("--sources", nargs="+", type=Path, default=[ROOT / name for name in SOURCES])
    options = parser.parse_args(arguments)
    shared = {key: int(size) for key, size in (each.rsplit("=", 1) for each in options.shared)}
    shared |= {key: size for key, size in DYNAMIC_SHARED.items() if key not in shared}
    kernels = [
        kernel
        for source in options.sources
        for arch in options.archs
        for kernel in compile_and_read(source, arch, shared)
    ]

    release = re.search(r"release .*?V([\d.]+)", run(find_tool("nvcc"), "--version"))
    toolkit = release[1] if release else "unknown"
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True
    )
    commit = git.stdout.strip() or "unknown"
    print(table(kernels))
    spilling = [f"{kernel.name} (sm_{kernel.arch})" for kernel in kernels if kernel.spill_stores or kernel.spill_loads]
    print(f"nvcc {toolkit}, commit {commit}; spills: {', '.join(spilling) or 'none'}")
    if options.json:
        record = {"nvcc": toolkit, "flags": FLAGS, "commit": commit, "kernels": [asdict(kernel) for kernel in kernels]}
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
