"""`make test-compat`: our hooks with the oldest and the newest releases that `enable()` takes.

Each environment in .compat has its own transformers, PEFT and TRL, and everything else from the environment that runs
this, torch too. In both run the tests of the hooks and of what trainers save. TRL has tests of the function that we
replace, but not in its packages: `--trl-tests` names the tests of a checkout, and `--trl` the release that they fit.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from posttrain.integrations.versions import TESTED

ROOT = Path(__file__).parents[2]
OURS = ("tests/integrations", "tests/compat")
THEIRS = "ChunkedLogProbFunction or PatchChunkedLMHead or chunked_logprob"
DESELECTED = {
    "test_backward_bfloat16": "its truth are bfloat16 logits; ours is 4 times nearer to float32 (0.015 against 0.06)",
}


def environment(name: str, requirements: list[str]) -> Path:
    """The Python of an environment that has `requirements` and for the rest what this Python has."""
    folder = ROOT / ".compat" / name
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys._base_executable, "-m", "venv", folder], check=True)  # type: ignore[attr-defined]
    found = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    here = sysconfig.get_path("purelib")
    (Path(found.strip()) / "zz_shared.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
    return python


def run(title: str, python: Path, *arguments: str, **options) -> bool:
    """Whether pytest passes."""
    print(f"== {title}", flush=True)
    settings = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", **options.pop("env", {})}
    command = [python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, env=settings, **options).returncode == 0


def their_tests(tests: Path, release: str) -> bool:
    """TRL's own tests of the function that we replace, with the hooks on."""
    oldest = [f"{library}=={first}.0" for library, (first, _) in TESTED.items() if library != "trl"]
    python = environment(f"trl-{release}", [*oldest, f"trl=={release}"])
    chosen = " and ".join([f"({THEIRS})", *(f"not {name}" for name in DESELECTED)])
    for name, reason in DESELECTED.items():
        print(f"   without {name}: {reason}")
    path = {"PYTHONPATH": str(Path(__file__).parent)}
    arguments = ("-p", "trl_hooks", f"{tests.name}/test_utils.py", "-k", chosen)
    return run(f"tests of trl {release}, with the hooks", python, *arguments, cwd=tests.parent, env=path)


def main() -> int:
    """0 if everything passes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-tests", type=Path, help="the folder tests of a checkout of TRL")
    parser.add_argument("--trl", default="1.10.0", help="the release of TRL that these tests fit")
    options = parser.parse_args()
    passed = []
    for at, name in ((0, "oldest"), (1, "newest")):
        wanted = [f"{library}=={tested[at]}.{'*' if at else '0'}" for library, tested in TESTED.items()]
        passed.append(run(f"{name}: {', '.join(wanted)}", environment(name, wanted), *OURS, cwd=ROOT))
    if options.trl_tests is None:
        print("== TRL's own tests were left out; name a checkout's: make test-compat TRL_TESTS=path/to/trl/tests")
    else:
        passed.append(their_tests(options.trl_tests.resolve(), options.trl))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
