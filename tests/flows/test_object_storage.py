"""A run whose root is object storage: a real S3 server (moto) on this machine, over HTTP."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import polars as pl
import pytest

from configs.errors import BadInput
from configs.load import load_recipe
from configs.models import Model
from flows.distill import distill
from flows.refuse import check_recipe
from storage.lineage import digest_folder
from storage.read import scan
from storage.store import Run
from tasks.models.reference import refer_as_used
from tasks.models.weights import load_weights
from tasks.views import inspect as show


@pytest.fixture(scope="module")
def bucket(tmp_path_factory) -> Iterator[str]:
    """An empty bucket; the environment says where it is, as it would for s3fs, polars and any other client."""
    with socket.socket() as any_free:
        any_free.bind(("127.0.0.1", 0))
        port = any_free.getsockname()[1]
    log = (tmp_path_factory.mktemp("s3") / "log").open("w")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    environment = pytest.MonkeyPatch()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        environment.setenv(name, value)
    try:
        end = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        fsspec.filesystem("s3", use_listings_cache=False).mkdir("bucket")
        yield "s3://bucket"
    finally:
        environment.undo()
        server.terminate()
        server.wait()
        log.close()


def objects(root: str) -> dict[str, tuple]:
    """Every object under a root with its etag and its time of change."""
    fs, path = fsspec.url_to_fs(root, use_listings_cache=False)
    return {name: (info["ETag"], info["LastModified"]) for name, info in fs.find(path, detail=True).items()}


def digests(root: str) -> dict[str, str]:
    return {slot: manifest["digest"] for slot, manifest in Run(root, "tiny").manifests() if "/steps/" not in slot}


def test_a_run_in_a_bucket(bucket, recipe, tmp_path, monkeypatch):
    """The same digests as on a disk; queries and views work on its URI; a second call makes nothing, another objective
    takes over rollouts and scores."""
    root, config = f"{bucket}/runs", str(recipe())
    result = distill(config, overrides=(f"root={root}",))
    assert result["run"] == f"{root}/tiny"
    assert result["student"] == f"{root}/tiny/round=0002/student"
    assert result["rounds"] == 2
    distill(config, overrides=(f"root={tmp_path / 'disk'}",))
    assert digests(root) == digests(str(tmp_path / "disk"))

    made = Run(root, "tiny").find("round=0002/student")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "another-machine"))
    (tmp_path / "another-machine").mkdir()
    ref = refer_as_used(Model(model="x"), made.path, made.digest, committed=True)
    assert load_weights(ref).num_parameters() > 0
    assert digest_folder(ref.local) == made.digest
    assert (tmp_path / "another-machine") in Path(ref.local).parents

    here = pl.scan_parquet(f"{tmp_path}/disk/tiny/round=*/evals/*.parquet").collect()
    assert pl.scan_parquet(f"{root}/tiny/round=*/evals/*.parquet").collect().equals(here)
    assert set(scan(f"{root}/*", "evals").collect()["run"]) == {"tiny"}
    show.check_run(f"{root}/tiny")
    assert {row["artifact"]: row["rows"] for row in show.list_tables(f"{root}/tiny")}["prompts/eval"] == 16
    assert len(show.show_round(f"{root}/tiny", 2)["Units"]) > 1

    before = objects(root)
    assert distill(config, overrides=(f"root={root}",))["rounds"] == 2
    assert objects(root) == before

    distill(config, rounds=1, overrides=(f"root={root}", "name=other", "objective.name=gold"))
    taken = {slot for slot, manifest in Run(root, "other").manifests() if manifest.get("taken_from") == "tiny"}
    assert {f"round=0001/{name}/part-0000{part}" for name in ("rollouts", "scores") for part in (0, 1)} <= taken
    assert {name: what for name, what in objects(root).items() if name in before} == before


def test_a_bucket_that_is_not_there(bucket, recipe):
    with pytest.raises(
        BadInput, match=r"^s3://no-such-bucket/runs: cannot be written \(.*bucket does not exist.*check its name"
    ):
        check_recipe(load_recipe(str(recipe()), ["root=s3://no-such-bucket/runs"]))


def test_no_server(bucket, recipe, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    fsspec.filesystem("s3", use_listings_cache=False).clear_instance_cache()
    with pytest.raises(BadInput, match=r"^s3://bucket/runs: cannot be written \(.*127\.0\.0\.1:1.*the endpoint$"):
        check_recipe(load_recipe(str(recipe()), ["root=s3://bucket/runs"]))


def test_a_check_leaves_nothing(bucket, recipe):
    fsspec.filesystem("s3", use_listings_cache=False).clear_instance_cache()
    check_recipe(load_recipe(str(recipe()), [f"root={bucket}/checked"]))
    assert not objects(f"{bucket}/checked")
