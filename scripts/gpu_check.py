"""Build, test and measure fastsimclr on a machine with an NVIDIA GPU and nvcc, without a network.

    scripts/gpu_check.sh OUT_DIR               # all default stages, within GPU_CHECK_SECONDS (570) in total
    scripts/gpu_check.sh OUT_DIR STAGE...      # these stages, each with its own time limit
    scripts/gpu_check.sh --dry-run [STAGE...]  # no GPU needed: list the commands and check that they can start

The machine needs Python with torch, torchvision, triton, pytest, pytest-benchmark and pybind11, and the programs cmake,
ninja and nvcc. A stage with other missing requirements is reported as "not done here", which is not a failure.
Stages run in the order of gpu_stages.py. Results are written immediately, so an interrupted run keeps them: log.txt,
summary.json (updated after every stage), gpu_tests.xml (JUnit), and one JSON file per measurement. The files of
pytest-benchmark are input for `python -m benchmarks.report`.

Exit code 0: no stage failed; 1: a stage failed (later stages still ran, except after `build`); 2: no GPU, or invalid
arguments.

NAME_SECONDS       time limit of stage NAME, such as RIVALS_SECONDS=300
GPU_CHECK_COMMIT   commit to record if there is no git checkout
CIFAR10            for `speedrun`: a folder with train-*.tar and test.tar
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_stages import BUILD, PYTEST, STAGES, Stage, missing

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_SECONDS = 570


class Runner:
    """Runs stages in sequence and records the results in OUT_DIR."""

    def __init__(self, out: Path, machine: dict[str, str], budget: float) -> None:
        """machine: commit, device, driver and arch. budget: seconds for all stages in total."""
        self.out, self.machine = out, machine
        self.deadline = time.monotonic() + budget
        self.stages: list[dict[str, Any]] = []
        self.verdicts: list[str] = []
        (out / "log.txt").write_text("")
        self.say("fastsimclr {commit} on {device}, driver {driver}".format_map(machine))

    @property
    def ok(self) -> bool:
        return not any(stage["failed"] for stage in self.stages)

    def run(self, stages: Sequence[Stage]) -> bool:
        """Run the stages and return whether no stage failed."""
        for stage in stages:
            self.stages.append(self.run_stage(stage))
            self.write_summary()
            if self.stages[-1]["failed"] and stage.fatal:
                self.say(f"\n{stage.name} failed: the remaining stages need it")
                break
        self.say("\n=== summary: fastsimclr {commit} on {device}".format_map(self.machine))
        for done in self.stages:
            self.say(f"{done['name']:12} {done['seconds']:6.1f} s  {done['outcome']}")
        for verdict in self.verdicts:
            self.say(verdict)
        self.say("no stage failed" if self.ok else "FAILED")
        return self.ok

    def run_stage(self, stage: Stage) -> dict[str, Any]:
        whole = int(os.environ.get(f"{stage.name.upper()}_SECONDS", stage.seconds))
        limit = int(min(whole, self.deadline - time.monotonic()))
        self.say(f"\n=== {stage.name} (at most {max(limit, 0)} s)")
        if reason := stage.lacking():
            return self.record(stage, f"not done here: {reason}", failed=stage.fatal)
        if limit < min(10, whole):
            return self.record(stage, "not started: no time left")
        command = [part.format_map(self.values(limit)) for part in (*stage.command, *self.files(stage))]
        started = time.monotonic()
        code, unproven, refused = self.execute(command, limit, stage)
        outcome, failed = "ok", False
        if code in (124, 137):  # exit codes of `timeout`
            outcome, failed = f"cut off after {limit} s", limit == whole
        elif refused and (code != 0 or unproven):
            outcome = "not done here: the machine does not allow it"
        elif code != 0:
            outcome, failed = f"failed ({code})", True
        elif unproven:
            outcome, failed = f"failed: nothing in its output matches {', '.join(unproven)}", True
        return self.record(stage, outcome, failed, code, time.monotonic() - started, command)

    def values(self, limit: int) -> dict[str, str]:
        """Return the values of {names} in commands and environments. begin: seconds after which no new size starts."""
        return {
            **self.machine,
            "python": sys.executable,
            "nvcc": shutil.which("nvcc") or "nvcc",
            "out": str(self.out),
            "cifar10": os.environ.get("CIFAR10", ""),
            "seconds": str(limit - 10),
            "begin": str(limit * 3 // 4),
        }

    def files(self, stage: Stage) -> list[str]:
        files = list(stage.files)
        for file, modules in stage.optional_files.items():
            if lacking := missing(modules):
                self.say(f"left out: {file} needs {', '.join(lacking)}, not installed")
            else:
                files.append(file)
        return files

    def execute(self, command: list[str], limit: int, stage: Stage) -> tuple[int, list[str], bool]:
        """Return the exit code, the stage's proofs that no line matched, and whether a line matched its refusal."""
        unproven, refused = list(stage.proofs), False
        environment = {name: value.format_map(self.values(limit)) for name, value in stage.environment.items()}
        # SIGINT first, so that pytest writes the results it has.
        with subprocess.Popen(
            ["timeout", "--signal=INT", "--kill-after=5", str(limit), *command],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    self.say(line.removesuffix("\n"))
                    unproven = [proof for proof in unproven if not re.search(proof, line)]
                    refused = refused or bool(stage.refusal and re.search(stage.refusal, line))
                    if re.search(r": (met|MISSED)\b", line):
                        self.verdicts.append(f"{stage.name}: {line.strip()}")
            except KeyboardInterrupt:
                process.terminate()  # `timeout` forwards it to its child processes
                raise
        return process.returncode, unproven, refused

    def record(
        self,
        stage: Stage,
        outcome: str,
        failed: bool = False,
        code: int | None = None,
        seconds: float = 0.0,
        command: Sequence[str] = (),
    ) -> dict[str, Any]:
        self.say(f"--- {stage.name}: {outcome}")
        known = {"name": stage.name, "outcome": outcome, "failed": failed, "exit_code": code}
        return known | {"seconds": round(seconds, 1), "command": shlex.join(command)}

    def write_summary(self) -> None:
        summary = {**self.machine, "ok": self.ok, "stages": self.stages, "verdicts": self.verdicts}
        (self.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    def say(self, line: str) -> None:
        print(line, flush=True)
        with open(self.out / "log.txt", "a") as log:  # reopened: complete if this process is killed
            print(line, file=log)


# The dry run


def dry_run(stages: Sequence[Stage]) -> bool:
    """List the commands, check that they can start on a bare machine, and return whether all checks passed.

    The checks: scripts parse, modules can be imported, and at least one test is collected from each test file.
    """
    for stage in stages:
        needs = (*stage.programs, *stage.modules, *stage.folders)
        print(f"{stage.name} (at most {stage.seconds} s{'; needs ' + ', '.join(needs) if needs else ''}):")
        print("  " + shlex.join((*stage.command, *stage.files)))
        for file, needs in stage.optional_files.items():
            print(f"  and {file}, which needs {', '.join(needs)}")
    checks = [
        Check("gpu_check.sh parses", ["bash", "-n", str(ROOT / "scripts" / "gpu_check.sh")]),
        Check("the build's commands parse", ["bash", "-n", "-c", BUILD]),
    ]
    lines = "\n".join(shlex.join(stage.command) for stage in stages)
    if names := {a or b for a, b in re.findall(r"-m ((?:benchmarks|fastsimclr)\.\w+)|scripts/(\w+)\.py", lines)}:
        modules = ", ".join(sorted(names))
        checks.append(Check(f"{modules} can be imported", [sys.executable, "-c", f"import bare_machine, {modules}"]))
    files = list(dict.fromkeys(file for stage in stages for file in stage.files))
    checks += [
        collection([file for file in files if file.startswith("tests/")], "-m", "gpu"),
        collection([file for file in files if file.startswith("benchmarks/")]),
    ]
    for stage in stages:
        checks += [collection([file], "-m", "gpu", has=needs) for file, needs in stage.optional_files.items()]
    passed = [check.passes() for check in checks if check.command]
    return all(passed)


class Check:
    """A command that should succeed. It starts immediately, so that several run concurrently."""

    def __init__(self, what: str, command: list[str], files: Sequence[str] = (), has: Sequence[str] = ()) -> None:
        """files: the command must print a test of each. has: packages to leave visible, see bare_machine.py."""
        self.what, self.command, self.files = what, command, files
        path = os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT / "scripts")])
        environment = {**os.environ, "PYTHONPATH": path, "BARE_MACHINE_HAS": ",".join(has)}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        if command:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    def passes(self) -> bool:
        output = self.process.communicate()[0]
        # A marker that selects no test must not go unnoticed.
        untested = [file for file in self.files if not re.search(f"^{re.escape(file)}", output, re.MULTILINE)]
        passed = self.process.returncode == 0 and not untested
        print(f"{'ok' if passed else 'FAILED'}: {self.what}")
        if not passed:
            print(output + "".join(f"no test of {file} was collected\n" for file in untested))
        return passed


def collection(files: list[str], *marker: str, has: Sequence[str] = ()) -> Check:
    collect = [sys.executable, *PYTEST[1:], "-p", "bare_machine", "--collect-only", "-q", *marker, *files]
    what = f"{' '.join(files)} can be collected{' with ' + ', '.join(has) if has else ''}"
    return Check(what, collect if files else [], files, has)


# The machine


def examine() -> dict[str, str]:
    """Return commit, device, driver and arch (compute capability, as for nvcc). SystemExit(2) without a GPU."""
    code = (
        "import torch; assert torch.cuda.is_available(), 'torch sees no GPU'; "
        "print(torch.cuda.get_device_name(), *torch.cuda.get_device_capability(), sep='\\n')"
    )
    queried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if queried.returncode:
        reason = (queried.stderr.strip().splitlines() or ["no reason was given"])[-1]
        print(f"gpu_check: no GPU is available: {reason}", file=sys.stderr)
        raise SystemExit(2)
    device, major, minor = queried.stdout.strip().splitlines()[-3:]
    describe = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True
    )
    driver = ""
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0]
    commit = os.environ.get("GPU_CHECK_COMMIT") or describe.stdout.strip() or "unknown"
    return {"commit": commit, "device": device, "driver": driver or "unknown", "arch": major + minor}


def prepare_environment() -> None:
    """Set the environment variables of all stages."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ.update(PYTHONUNBUFFERED="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    cuda = [os.path.join(home, "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    # Prefer the cmake and ninja of this Python environment to older system versions.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"], *cuda])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="run no stage, only check that the stages can start")
    parser.add_argument("words", nargs="*", metavar="OUT_DIR [STAGE...]")
    options = parser.parse_args(arguments)
    if not options.dry_run and not options.words:
        parser.error("expected a folder for the results")
    names = options.words if options.dry_run else options.words[1:]
    known = {stage.name: stage for stage in STAGES}
    if unknown := [name for name in names if name not in known]:
        parser.error(f"got the stages {', '.join(unknown)}, expected some of {', '.join(known)}")
    prepare_environment()
    stages = [stage for stage in STAGES if stage.name in names or (not names and (stage.default or options.dry_run))]
    if options.dry_run:
        return int(not dry_run(stages))
    machine = examine()
    out = Path(options.words[0]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    budget = float("inf") if names else float(os.environ.get("GPU_CHECK_SECONDS", DEFAULT_SECONDS))
    return int(not Runner(out, machine, budget).run(stages))


if __name__ == "__main__":
    sys.exit(main())
