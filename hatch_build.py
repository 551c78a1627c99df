"""The build's one step of our own: compile the CPU kernels where there is a compiler; without one all runs on torch."""

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Kernels(BuildHookInterface):
    """Makes ops/native/kernels.so. A failure is told and is no error: every kernel has a twin in torch."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a wheel is made, editable or not."""
        folder = Path(self.root) / "src/heliostat/ops/native"
        why_not = runpy.run_path(str(folder / "compiling.py"))["build"]()
        if why_not:
            self.app.display_warning(
                f"heliostat's CPU kernels are not compiled, torch does their work: {why_not}"
            )
            return
        build_data["artifacts"].append("src/heliostat/ops/native/kernels.so")
        build_data["pure_python"], build_data["infer_tag"] = False, True
