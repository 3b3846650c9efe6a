"""Report each kernel's registers, spills, occupancy and instructions, from the compiler's output. Needs no GPU.

    python -m benchmarks.kernel_resources [--archs 80 90] [--json benchmarks/results/kernel_resources.json]

Registers and spills are reported by ptxas. The number of blocks per multiprocessor follows from the registers,
__launch_bounds__ and shared memory. Instructions are counted in the disassembled machine code: "loop" is one iteration
of the innermost loop with the most tensor-core instructions, counting both sides of its branches.

Needs nvcc, c++filt, cuobjdump and nvdisasm, from PATH, CUDA_HOME or Triton, which includes them.
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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fastsimclr.environment import commit

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("csrc/normalize.cu", "csrc/forward.cu", "csrc/backward.cu")
FLAGS = ("-Xptxas", "-v", "--std=c++17", "-O3")
# Warps, blocks and KiB of shared memory per multiprocessor; all have 64 K registers. Source: CUDA C++ Programming
# Guide, "Compute capabilities".
LIMITS = {
    "80": (64, 32, 164),
    "86": (48, 16, 100),
    "89": (48, 24, 100),
    "90": (64, 32, 228),
    "100": (64, 32, 228),
    "120": (48, 24, 100),
}
RESERVED_SHARED = 1024  # bytes of shared memory per block reserved by the system


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel for one architecture.

    loop: instructions of the hot loop; 0 if no loop has tensor-core instructions.
    """

    name: str
    arch: str
    registers: int
    spilled_bytes: int
    blocks: int
    limited_by: str
    instructions: int
    loop: int


@dataclass
class Block:
    """A basic block: its instructions, and the labels of the blocks it can branch to."""

    opcodes: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    falls_through: bool = True

    @property
    def tensor(self) -> int:
        return self.opcodes.count("HMMA") + self.opcodes.count("HGMMA")


def find_tool(name: str) -> str:
    """Return the path of the program `name`. Raises SystemExit if it is not found."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    path = shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))
    if path is None:
        raise SystemExit(
            f"{name} not found in PATH, {', '.join(map(str, folders))}: install it, or add its folder to PATH"
        )
    return path


def run(tool: str, *arguments: str) -> str:
    """Return what a tool prints to stdout and stderr. Raises SystemExit with that output if the tool fails."""
    done = subprocess.run([find_tool(tool), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{tool} {' '.join(arguments)}\n{done.stdout}")
    return done.stdout


def dynamic_shared(name: str) -> int:
    """Return the bytes per block of TileStream in tile.cuh.

    It holds A once, or twice if wide, and B twice, at two bytes per number, and 16 bytes per column.
    """
    shape = re.search(r"Shape<(\d+), (\d+), (\w+), (\w+)>", name)
    if not shape:
        return 0
    width, planes, wide, tall = int(shape[1]), int(shape[2]), shape[3] == "true", shape[4] == "true"
    rows, columns = (128, 64) if tall else (64, 32)
    return 2 * planes * width * (rows * (1 + wide) + 2 * columns) + 16 * columns


def blocks_that_fit(arch: str, threads: int, registers: int, shared: int) -> tuple[int, str]:
    """Return the blocks per multiprocessor, as CUDA's occupancy calculator does, and the limiting resource."""
    most_warps, most_blocks, shared_kib = LIMITS[arch.rstrip("af")]
    warps = -(-threads // 32)
    registers_of_warp = -(-32 * registers // 256) * 256
    fit = {
        "warps": most_warps // warps,
        "blocks": most_blocks,
        "registers": 65536 // registers_of_warp // 4 * 4 // warps,  # equal warps per partition
        "shared memory": shared_kib * 1024 // (-(-(shared + RESERVED_SHARED) // 128) * 128),
    }
    limit = min(fit, key=lambda what: fit[what])
    return fit[limit], limit


def parse_blocks(listing: str) -> dict[str, Block]:
    """Return the basic blocks of a kernel, in order, by label; those without a label get a number."""
    current = Block()
    blocks, ended = {"entry": current}, False
    for line in listing.splitlines():
        label = re.match(r"^(\.L_\w+):", line)
        code = re.match(r"^\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*)[\w.]*([^;]*);", line)
        if label or (code and ended):
            current = blocks[label[1] if label else f"#{len(blocks)}"] = Block()
            ended = False
        if code:
            guard, opcode, operands = code.groups()
            current.opcodes.append(opcode)
            if ended := opcode in ("BRA", "EXIT", "RET", "BRX", "JMX"):
                current.targets = re.findall(r"`\((\.L_\w+)\)", operands) if opcode == "BRA" else []
                bare = re.fullmatch(r"\s*(`\(\.L_\w+\))?\s*", operands)  # BRA P0, `(...) is conditional too
                current.falls_through = guard is not None or (opcode == "BRA" and not bare)
    return blocks


def reach(start: str, edges: Mapping[str, Sequence[str]], without: str = "") -> set[str]:
    """Return the blocks that can be reached from `start` on paths that avoid the block `without`."""
    seen, pending = set(), [start]
    while pending:
        name = pending.pop()
        if name not in seen and name != without:
            seen.add(name)
            pending += edges[name]
    return seen


def hot_loop(blocks: Mapping[str, Block]) -> set[str]:
    """Return the innermost natural loop with the most tensor-core instructions; empty if there is none."""
    successors: dict[str, list[str]] = {}
    predecessors: dict[str, list[str]] = {name: [] for name in blocks}
    for name, following in zip(blocks, [*list(blocks)[1:], None], strict=True):
        successors[name] = [each for each in blocks[name].targets if each in blocks]
        successors[name] += [following] if blocks[name].falls_through and following else []
        for each in successors[name]:
            predecessors[each].append(name)
    reachable = reach("entry", successors)
    loops: dict[str, set[str]] = {}  # by header; several back edges to one header form one loop
    for header in filter(reachable.__contains__, blocks):  # in order, so that ties are deterministic
        undominated = reach("entry", successors, without=header)
        for name in predecessors[header]:
            if name in reachable and name not in undominated:
                loops[header] = loops.get(header, {header}) | reach(name, predecessors, without=header)
    tensor = {header: sum(blocks[name].tensor for name in body & reachable) for header, body in loops.items()}
    loops = {header: body & reachable for header, body in loops.items() if tensor[header]}
    innermost = [header for header, body in loops.items() if not any(other < body for other in loops.values())]
    return loops[max(innermost, key=tensor.__getitem__)] if innermost else set()


def compile_and_read(source: Path, arch: str) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder, "kernels.cubin"))
        ptxas = run("nvcc", "-cubin", f"-arch=sm_{arch}", *FLAGS, f"-I{ROOT / 'csrc'}", str(source), "-o", cubin)
        elf = run("cuobjdump", "-elf", cubin)
        listing = run("nvdisasm", "-c", cubin)
    sections = re.split(r"^\s*\.section\s+\.text\.", listing, flags=re.MULTILINE)[1:]
    code = {section.split(",", 1)[0].strip('"'): section for section in sections}
    launch_bounds = {}
    for part in re.split(r"^\.nv\.info\.", elf, flags=re.MULTILINE)[1:]:
        if match := re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+(\w+) (\w+) (\w+)", part):
            x, y, z = (int(each, 16) for each in match.groups())
            launch_bounds[part.split(None, 1)[0]] = x * y * z
    kernels = []
    for part in ptxas.split("Compiling entry function '")[1:]:

        def sum_matches(pattern: str, part: str = part) -> int:
            return sum(map(int, re.findall(pattern, part)))

        mangled = part[: part.index("'")]
        name = re.sub(r"^void |\(anonymous namespace\)::|fastsimclr::", "", run("c++filt", mangled).strip())
        name = name.rsplit("(", 1)[0]
        registers = sum_matches(r"Used (\d+) registers")
        shared = sum_matches(r"(\d+) bytes smem") + dynamic_shared(name)
        blocks = parse_blocks(code[mangled])
        kernels.append(
            Kernel(
                name,
                arch,
                registers,
                sum_matches(r"(\d+) bytes spill (?:stores|loads)"),
                *blocks_that_fit(arch, launch_bounds[mangled], registers, shared),
                sum(len(block.opcodes) for block in blocks.values()),
                sum(len(blocks[each].opcodes) for each in hot_loop(blocks)),
            )
        )
    return sorted(kernels, key=lambda kernel: kernel.name)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=["80", "90"], help="compute capabilities without the dot")
    parser.add_argument("--json", type=Path, help="file to write the same figures to")
    options = parser.parse_args(arguments)
    rows = []
    for source in SOURCES:
        for arch in options.archs:
            for kernel in compile_and_read(ROOT / source, arch):
                rows.append(json.dumps(asdict(kernel)))
                print(rows[-1], flush=True)
    if options.json:
        release = re.search(r"release .*?V([\d.]+)", run("nvcc", "--version"))
        about = {"nvcc": release[1] if release else "unknown", "flags": FLAGS, "commit": commit()}
        lines = ",\n".join(f"    {row}" for row in rows)
        options.json.write_text(json.dumps(about)[:-1] + f', "kernels": [\n{lines}\n]}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
