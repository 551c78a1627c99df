"""The ways of tuning that are compared: one table for the demo and the accuracy of sharings, one for that of tuners."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    r: int = RANK
    columns: str = "random"
    """How the tuned columns are chosen (tuner paca)."""
    dropbp: float = 0.0
    dropbp_rates: str = "sensitivity"
    frozen: str = ""
    """Module in the base's place, where it is another."""

    @property
    def label(self) -> str:
        """The name, with the rank where there is one."""
        return f"{self.name}, r {self.r}" if self.tuner != "full" else self.name


METHODS = (
    Method("full fine-tune", "independent", "full", (1e-3, 2e-3, 5e-3), 2e-3, "full fine-tune"),
    Method("SUN", "sun", "full", (2e-3, 5e-3, 1e-2), 5e-3, "full fine-tune"),
    Method("PrefillShare", "prefillshare", "full", (1e-3, 2e-3, 5e-3), 5e-3, "full fine-tune"),
    Method("LoRA", "independent", "lora", (3e-3, 6e-3, 1.2e-2), 6e-3, "LoRA"),
    Method("ICaRus", "icarus", "lora", (3e-3, 6e-3, 1.2e-2), 6e-3, "LoRA"),
)

LORA_RATES = (3e-3, 6e-3, 1.2e-2)
PACA_RATES = (5e-3, 1e-2, 2e-2)
WIDE = 2 * RANK
"""Tuned columns have one matrix where low-rank adapters have two: so many hold about as many parameters."""

_LORA = Method("LoRA", "independent", "lora", LORA_RATES, 6e-3, "LoRA")
_PACA = Method("PaCA", "independent", "paca", PACA_RATES, 5e-3, "LoRA", r=WIDE)
TUNED = (
    _LORA,
    replace(_PACA, name="PaCA, equal rank", r=RANK),
    _PACA,
    replace(_PACA, name="PaCA, longest columns", columns="norm", against="PaCA"),
    replace(_PACA, name="PaCA, columns by gradient", columns="gradient", against="PaCA"),
    Method("SUN, LoRA", "sun", "lora", LORA_RATES, 6e-3, "SUN, LoRA"),
    Method("SUN, PaCA", "sun", "paca", PACA_RATES, 5e-3, "SUN, LoRA", r=WIDE),
    Method("PrefillShare, LoRA", "prefillshare", "lora", LORA_RATES, 6e-3, "PrefillShare, LoRA"),
    Method("PrefillShare, PaCA", "prefillshare", "paca", PACA_RATES, 5e-3, "PrefillShare, LoRA", r=WIDE),
    replace(_LORA, name="LoRA, DropBP 0.5", dropbp=0.5),
    replace(
        _LORA, name="LoRA, DropBP 0.5 uniform", dropbp=0.5, dropbp_rates="uniform", against="LoRA, DropBP 0.5"
    ),
    replace(_LORA, name="LoRA, DropBP 0.875", dropbp=0.875),
    replace(
        _LORA,
        name="LoRA, DropBP 0.875 uniform",
        dropbp=0.875,
        dropbp_rates="uniform",
        against="LoRA, DropBP 0.875",
    ),
)
"""Tuners, sharings with adapters, and dropped branches; each against what it would replace."""

FORMATS = {"base-4bit": "m2v4g128", "base-2bit": "m1v4g128"}
"""Modules that the base is made into, by name."""


def on_quantized(method: Method) -> tuple[Method, ...]:
    """A method, and then it with each of those modules in the base's place, compared with the first."""
    named = ((name, name.removeprefix("base-").replace("bit", " bit")) for name in FORMATS)
    return (method, *(replace(method, name=f"{method.name}, {bits}", frozen=name) for name, bits in named))


_SUN, _PREFILL = (replace(METHODS[n], against=METHODS[n].name) for n in (1, 2))
LOW_BIT = {"sun": on_quantized(_SUN), "prefillshare": on_quantized(_PREFILL), "independent": (METHODS[0],)}
"""Frozen halves in codebooks; groups that can be run apart."""
