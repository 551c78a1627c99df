"""A double of a vLLM server (tests/promises/doubles.py) in a process of its own: family, module, role, name, address."""

import asyncio
import sys
from pathlib import Path

import torch

from heliostat.build import load_modules, load_tokenizer, read_family
from heliostat.serve.protocol import Role
from heliostat.serve.roster import module_name
from tests.promises.doubles import Double


async def main(folder: Path, module: str, role: Role, name: str, host: str) -> None:
    torch.set_num_threads(1)
    family = read_family(folder)
    loaded = load_modules(folder, family, [module], dtype=torch.float32)[module]
    hosted = {module_name(module, loaded.digest): loaded}
    double = Double(name, hosted, load_tokenizer(folder, family), (role,), host=host)
    double.faults.pause = 0.02
    await double.start()
    print(f"UP {double.url}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await double.stop()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:6]))  # type: ignore[arg-type]
