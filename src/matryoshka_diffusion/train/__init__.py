"""How a model is learnt. The package can be called: `matryoshka_diffusion.train(...)`.

A function of that name beside the package would be hidden as soon as a module in it is imported.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A package that stands for the function `runs.training.train`."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        """Train a model on images of yours: `help(matryoshka_diffusion.runs.training.train)`."""
        # By its name only, because `runs` lies above this package.
        function = importlib.import_module("matryoshka_diffusion.runs.training").train
        return function(*arguments, **settings)


sys.modules[__name__].__class__ = _Callable
