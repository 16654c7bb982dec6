"""Triton's interpreter, quicker: it exchanges the functions of triton.language for its own once per launch and module.

Triton does so at a launch and again in every call of a device function, which takes a third of the time of our tests.
"""

from functools import wraps

from triton.runtime.interpreter import InterpretedFunction


def patch_once_per_launch() -> None:
    run, call = InterpretedFunction.run, InterpretedFunction.__call__
    modules = set()  # whose view of triton.language this launch has exchanged

    @wraps(run)
    def launch(self, *args, **kwargs):
        modules.clear()
        return run(self, *args, **kwargs)

    @wraps(call)
    def call_device_function(self, *args, **kwargs):
        module = self.fn.__module__
        if module in modules:
            return self.rewrite()(*args, **kwargs)
        modules.add(module)
        return call(self, *args, **kwargs)

    InterpretedFunction.run, InterpretedFunction.__call__ = launch, call_device_function
