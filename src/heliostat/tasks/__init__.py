"""The embedded tasks: what the embedded base is specialised on in the demo, the results and the tests."""

from heliostat.tasks import edit, math, tools
from heliostat.tasks.grade import METRICS, final_answer, grade
from heliostat.tasks.task import Item, Task

__all__ = ["METRICS", "TASKS", "Item", "Task", "final_answer", "grade"]

TASKS: dict[str, Task] = {
    "tools": Task("tools", "command", "a spoken request becomes one JSON tool call", tools.generate),
    "math": Task(
        "math", "contains", "arithmetic in words becomes a worked answer and its number", math.generate
    ),
    "edit": Task("edit", "exact", "an instruction and a text become the edited text", edit.generate),
}
