"""TRL's trainers with and without `posttrain.enable()`: time of an optimizer step, losses and peak memory.

The same script twice, on the models and rows of bench_sft, bench_dpo and bench_grpo, with TRL's faster settings there.
The first steps, in which the hooks check themselves, are left out. An entry must be 1.3 times as fast with the hooks
or take 0.6 times the memory beyond that of the trainer when it is made.
"""

import sys

import bench_dpo
import bench_grpo
import bench_sft
import pytest
from trl_trainer import in_turns, largest_difference, skip_without_trl

import posttrain
from posttrain.bench.memory import peaks, report_peaks
from posttrain.integrations import counters

skip_without_trl()
FASTER, SMALLER = 1.3, 0.6
STEPS, SKIPPED = 7, 3
SCRIPTS = {
    "sft": (bench_sft, (False,)),
    "sft-packing": (bench_sft, (True,)),
    "dpo": (bench_dpo, ()),
    "grpo-short-prompts": (bench_grpo, ("short prompts",)),
    "grpo-long-prompts": (bench_grpo, ("long prompts",)),
}


class Script:
    """TRL's trainer of a script, made and trained with the hooks on or off."""

    def __init__(self, name, folder, enabled, **settings):
        self.enabled = enabled
        module, arguments = SCRIPTS[name]
        self.trainer = self._hooked(lambda: module.their_trainer(folder, *arguments, **settings))

    def __getattr__(self, name):
        return getattr(self.trainer, name)

    def train(self):
        """As the trainer's; afterwards the hooks have fired."""
        result = self._hooked(lambda: self.trainer.train())  # bound after `enable`
        if self.enabled:
            fired = counters()
            assert fired.get("model prepared") and fired.get("language head by linear_logprob"), fired
            assert fired.get("batch with shared prefixes") or fired.get("batch without padding"), fired
            assert fired.get("completions by the engine") or type(self.trainer).__name__ != "GRPOTrainer", fired
        return result

    def _hooked(self, work):
        if not self.enabled:
            return work()
        posttrain.enable()
        try:
            return work()
        finally:
            posttrain.disable()


def model_folder(name):
    """The model of a script."""
    return str((bench_sft if name.startswith("sft") else bench_grpo).model_folder())


@pytest.fixture(scope="module")
def smaller():
    """By script: with the hooks, the share of the memory without them."""
    return {}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", SCRIPTS)
def test_memory(name, report, smaller):
    folder, found = model_folder(name), {}
    for system, enabled in (("trl", False), ("enabled", True)):
        given = f"{name!r}, {folder!r}, {enabled}"
        setup = f"import bench_drop_in as b\nb.Script({given}, steps=1).train()\nscript = b.Script({given}, steps=2)"
        found[system] = peaks(setup, "script.train()")
    beyond = report_peaks(report, f"drop-in-{name}-memory", f"TRL with and without posttrain.enable(), {name}", found)
    smaller[name] = beyond["enabled"] / beyond["trl"]
    assert smaller[name] <= 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_speed(name, publish, smaller):
    folder = model_folder(name)
    systems = {
        system: lambda enabled=enabled: Script(name, folder, enabled, steps=STEPS)
        for system, enabled in (("trl", False), ("enabled", True))
    }
    comparison, trained = in_turns(systems, SKIPPED)
    publish(f"drop-in-{name}", f"TRL with and without posttrain.enable(), {name}", comparison)
    if not name.startswith("grpo"):  # the drawn completions may differ by rounding
        assert largest_difference(trained, "enabled") <= 1e-4
    assert comparison.speedup["enabled"].median >= FASTER or smaller.get(name, 1.0) <= SMALLER
