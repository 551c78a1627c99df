"""heliostat: fine-tune many specialists from one base so that they share half of themselves, and run them as one."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heliostat.llm import LLM

__all__ = ["LLM", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Lazy, so that `import heliostat` and the command line start without torch.
    if name == "LLM":
        from heliostat.llm import LLM

        return LLM
    raise AttributeError(f"module 'heliostat' has no attribute {name!r}")
