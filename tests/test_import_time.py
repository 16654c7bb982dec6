"""`import posttrain` costs little beyond `import torch`, and the command line imports nothing heavy to say `--help`."""

import json
import subprocess
import sys


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_posttrain_adds_less_than_half_a_second_to_import_torch():
    code = "import time, torch; t = time.perf_counter(); import posttrain; print(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(2)) < 0.5


def test_import_posttrain_ops_needs_no_transformers():
    code = "import sys, json, posttrain.ops; print(json.dumps([m for m in sys.modules if '.' not in m]))"
    assert not {"transformers", "datasets", "peft", "matplotlib", "rich"} & set(json.loads(run(code)))


def test_command_line_starts_without_torch():
    code = "import sys, json, posttrain.cli; print(json.dumps([m for m in sys.modules if '.' not in m]))"
    assert not {"torch", "transformers", "datasets", "numpy"} & set(json.loads(run(code)))
