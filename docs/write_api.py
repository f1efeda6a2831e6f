"""Write the API pages from the docstrings: one page a module, ``site/index.html`` lists them."""

import sys
from pathlib import Path

import pdoc
import pdoc.render

import kvguard


def main(target: Path) -> None:
    """Write the pages of all modules into a folder."""
    for name in kvguard.__all__:  # pdoc sees only names that are already imported
        setattr(kvguard, name, getattr(kvguard, name))
    package = Path(kvguard.__file__).parent
    modules = sorted(path.stem for path in package.glob("[a-z]*.py"))
    pdoc.render.configure(docformat="google", search=True)
    pdoc.pdoc("kvguard", *(f"kvguard.{name}" for name in modules), output_directory=target)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "site"))
