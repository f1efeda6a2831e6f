"""Everything declarative is in pyproject.toml; this adds the workflow's files to the wheel.

They stand at the top of the repository, where Snakemake and readers expect them, and are installed
as data in ``kvguard/checkout``, so that `kvguard sweep` works from a wheel as well.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

WORKFLOW = (
    "Snakefile",
    "config.yaml",
    "envs",
    "experiments",
    "profiles",
    "reports/captions",
    "rules",
    "workflow_scripts",
)


class BuildWithWorkflow(build_py):
    """Copies the workflow's files beside the modules, unless the install is an editable one."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        root = Path(__file__).parent
        for part in WORKFLOW:
            target = Path(self.build_lib) / "kvguard" / "checkout" / part
            target.parent.mkdir(parents=True, exist_ok=True)
            if (root / part).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(root / part, target, ignore=ignored, dirs_exist_ok=True)
            else:
                shutil.copy2(root / part, target)


setup(cmdclass={"build_py": BuildWithWorkflow})
