"""Measuring runs and their reports: benchmarks, figures, memory. Imported as `tinytorch.profiling`.

Python 3.15 has a package `profiling` of its own. A script that runs from the root of a checkout and asks for that one
finds this folder first; then `__name__` is plain `profiling`, and the standard library's is put in its place.
"""

if __name__ == "profiling":
    import importlib.machinery
    import importlib.util
    import sys
    from pathlib import Path

    def _hand_over(name: str) -> None:
        """Load the next package of this name on the path and put it in this one's place."""
        root = Path(__file__).resolve().parent.parent
        elsewhere = [folder for folder in sys.path if Path(folder).resolve() != root]
        spec = importlib.machinery.PathFinder.find_spec(name, elsewhere)
        if spec is None or spec.loader is None:
            raise ModuleNotFoundError(f"No module named {name!r} (TinyTorch's is tinytorch.{name})", name=name)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # the import system returns what stands here when this file is done
        spec.loader.exec_module(module)

    _hand_over(__name__)
