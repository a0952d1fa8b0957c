"""What lies on the disk after a run: no pickle, no secret; and who listens while it is made."""

import pickletools
import zipfile
from pathlib import Path

import pytest
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, PREFECT_SERVER_API_HOST

from configs.load import load_recipe
from flows.distill import distill
from storage.store import Run

SECRETS = {"HF_TOKEN": "hf_s3cr3tOfTheHub", "VLLM_API_KEY": "s3cr3tOfTheServer", "AWS_SECRET_ACCESS_KEY": "s3cr3tOfTheBucket"}


def is_pickle(path: Path) -> bool:
    """Bare, or inside of what torch.save writes."""
    if zipfile.is_zipfile(path):
        return any(name.endswith(".pkl") for name in zipfile.ZipFile(path).namelist())
    data = path.read_bytes()
    try:
        return data[:1] == b"\x80" and any(op.name == "STOP" for op, _, _ in pickletools.genops(data))
    except ValueError:
        return False


def test_no_pickle(tiny, tmp_path):
    """In the runs, and among the results that Prefect keeps."""
    import pickle

    (tmp_path / "one").write_bytes(pickle.dumps({"a": [1]}))
    assert is_pickle(tmp_path / "one")  # the premise
    kept = PREFECT_LOCAL_STORAGE_PATH.value()
    started = min(path.stat().st_mtime for path in tiny.parent.rglob("run.toml"))
    results = [path for path in kept.rglob("*") if path.is_file() and path.stat().st_mtime >= started] if kept.exists() else []
    runs = [path for path in tiny.parent.rglob("*") if path.is_file()]
    assert len(runs) > 50
    assert [path for path in runs + results if is_pickle(path)] == []


@pytest.mark.usefixtures("server")
def test_no_secret_of_the_environment(recipe, tmp_path, monkeypatch, caplog):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    path = recipe(rounds=1)
    distill(str(path), rounds=1)
    run = Path(Run(load_recipe(path).root, load_recipe(path).name).path)
    texts = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert len(texts) > 20
    for value in SECRETS.values():
        assert [file for file, data in texts.items() if value.encode() in data] == []
        assert value not in caplog.text


def test_prefects_server_is_on_the_loopback_alone(server):
    assert PREFECT_SERVER_API_HOST.value() == "127.0.0.1"
    assert server.startswith("http://127.0.0.1:")
