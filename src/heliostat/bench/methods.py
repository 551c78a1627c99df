"""The ways of tuning that are compared: one table for the demo and for the accuracy table."""

from __future__ import annotations

from dataclasses import dataclass

RANK = 16


@dataclass(frozen=True, slots=True)
class Method:
    """One way of tuning."""

    name: str
    sharing: str
    tuner: str
    rates: tuple[float, ...]
    """Learning rates that `make results` tries: as many for each method."""
    demo_rate: float
    """The one learning rate of the demo: the best of them on `tools`."""
    against: str
    """The method its accuracy is compared with, on the same items and seeds."""

    @property
    def label(self) -> str:
        """The name, with the rank where there is one."""
        return f"{self.name}, r {RANK}" if self.tuner == "lora" else self.name


METHODS = (
    Method("full fine-tune", "independent", "full", (1e-3, 2e-3, 5e-3), 2e-3, "full fine-tune"),
    Method("SUN", "sun", "full", (2e-3, 5e-3, 1e-2), 5e-3, "full fine-tune"),
    Method("PrefillShare", "prefillshare", "full", (1e-3, 2e-3, 5e-3), 5e-3, "full fine-tune"),
    Method("LoRA", "independent", "lora", (3e-3, 6e-3, 1.2e-2), 6e-3, "LoRA"),
    Method("ICaRus", "icarus", "lora", (3e-3, 6e-3, 1.2e-2), 6e-3, "LoRA"),
)
