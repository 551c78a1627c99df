"""The build's one step of our own: compile the CPU kernels where there is a compiler; without one all runs on torch."""

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Kernels(BuildHookInterface):
    """Makes the libraries of ops/native. A failure is told and is no error: every kernel has a twin in torch."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a wheel is made, editable or not."""
        folder = Path(self.root) / "src/heliostat/ops/native"
        build = runpy.run_path(str(folder / "compiling.py"))["build"]
        for library in ("kernels.so", "codebook.so"):
            if why_not := build(folder / library):
                self.app.display_warning(
                    f"heliostat's {library} is not compiled, torch does its work: {why_not}"
                )
                continue
            build_data["artifacts"].append(f"src/heliostat/ops/native/{library}")
            build_data["pure_python"], build_data["infer_tag"] = False, True
