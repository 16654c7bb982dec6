"""What gets installed: posttrain with its kernels inside, nothing else; and sources that compile without x86."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_wheel_has_the_right_files_and_works_from_elsewhere(tmp_path) -> None:
    pip = [sys.executable, "-m", "pip"]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    build = ["-Cbuild-dir=" + str(tmp_path / "build"), "-Ccmake.define.POSTTRAIN_CUDA=OFF"]
    build += ["-Ccmake.build-type=Debug", "-Ccmake.define.CMAKE_CXX_FLAGS_DEBUG="]  # optimising takes two thirds of it
    subprocess.run([*pip, "wheel", str(_ROOT), *quiet, "--no-build-isolation", "-w", tmp_path, *build], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"posttrain"}
    assert not [name for name in names if "emulated" in name]  # which is for our tests
    for source in (_ROOT / "kernels").glob("*.py"):
        assert f"posttrain/kernels/{source.name}" in names
    for source in (_ROOT / "posttrain").rglob("*.py"):
        assert str(source.relative_to(_ROOT)) in names

    target = tmp_path / "site"
    subprocess.run([*pip, "install", str(wheel), *quiet, "--target", target], check=True)
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in type(f).__module__]; "
        "import posttrain.kernels.rms_norm, torch; from posttrain import ops; "
        "y = ops.rms_norm(torch.ones(2, 8), torch.ones(8)); assert ops.backend_for('rms_norm', y) == 'cpu'; "
        "assert torch.allclose(y, torch.ones(2, 8)); print(posttrain.__file__)"
    )
    environment = {"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().startswith(str(target))


def test_sources_use_no_unguarded_x86_header() -> None:
    """A line that includes an intrinsics header lies inside an #if that names an x86 macro."""
    for source in (_ROOT / "csrc").rglob("*.*"):
        guards: list[str] = []
        for number, line in enumerate(source.read_text().splitlines(), start=1):
            if re.match(r"\s*#\s*if", line):
                guards.append(line)
            elif re.match(r"\s*#\s*endif", line):
                guards.pop()
            if re.search(r"#\s*include\s*<(\w*intrin|cpuid)\.h>", line):
                assert any(re.search(r"x86|_M_X64|AVX|SSE", guard) for guard in guards), f"{source}:{number}"


@pytest.mark.parametrize("compiler", ["aarch64-linux-gnu-g++"])
def test_cpu_kernels_compile_for_arm(compiler) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    options = ["-std=gnu++17", "-O1", "-fsyntax-only", "-fopenmp", "-DPOSTTRAIN_ISA=baseline", f"-I{_ROOT / 'csrc'}"]
    sources = {*(_ROOT / "csrc").glob("*.cpp")} - {_ROOT / "csrc" / "bindings.cpp"}  # which needs the headers of Python
    for source in sorted(sources | {*(_ROOT / "csrc" / "cpu").glob("*.cpp")}):
        subprocess.run([compiler, *options, str(source)], check=True)


def test_editable_install_leaves_the_path_alone(tmp_path) -> None:
    """Sources of the working tree are found, Triton's among them, but no folder of it is on sys.path."""
    code = "import sys, posttrain.kernels.rms_norm as k; print(k.__file__); print(*sys.path, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    source, *path = done.stdout.splitlines()
    if not source.startswith(str(_ROOT)) or "site-packages" in source:
        pytest.skip(f"posttrain is not an editable install here: {source}")
    assert source == str(_ROOT / "kernels" / "rms_norm.py")
    assert not {str(_ROOT), str(_ROOT.parent)} & set(path)


def test_kernels_folder_hides_no_package_of_that_name(tmp_path) -> None:
    """Python started in the repository has it first on sys.path; transformers imports a package `kernels` if it can."""
    package = tmp_path / "kernels" / "__init__.py"
    package.parent.mkdir()
    package.touch()
    code = "import kernels; print(kernels.__file__)"
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(package), done.stderr
