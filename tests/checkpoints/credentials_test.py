# SPDX-License-Identifier: Apache-2.0
"""Wrong credentials of gcsfs: one line that names the variable and the file, for every command."""

import json
import os
import subprocess
import sys
import traceback

import fsspec.config
import gcsfs.credentials
import google.auth.exceptions
import pytest
import requests
from etils.epath import backend

from localglobal_jax.checkpoints import credentials, gcs_file_system, objects, store
from localglobal_jax.cli.main import main
from localglobal_jax.data.tfds import gcs

KEY = {
    "type": "service_account",
    "client_email": "a@b",
    "token_uri": "https://x",
    "project_id": "p",
}
FILES = {
    "cut": '{"type": "service_account"',
    "no_key": '{"type": "service_account"}',
    "bad_key": json.dumps({**KEY, "private_key": "-----BEGIN PRIVATE KEY-----\nx\n"}),
    "user": '{"type": "authorized_user", "client_id": "x"}',
    "elsewhere": '{"type": "external_account"}',
    "list": "[]",
    "number": "1",
    "empty": "",
    "binary": b"\xff\xfe\x00",
}


@pytest.fixture(autouse=True)
def no_other_credentials(monkeypatch):
    """No stand-in server, and no variable of this machine."""
    for names in store.SERVERS.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "FSSPEC_GCS_TOKEN", "FSSPEC_GS_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    for protocol in ("gs", "gcs"):
        monkeypatch.setitem(fsspec.config.conf, protocol, {})


def fault(monkeypatch, variable, token):
    """The error of a file system that is opened with the variable."""
    monkeypatch.setenv(variable, token)
    if variable.startswith("FSSPEC"):
        fsspec.config.set_conf_env(fsspec.config.conf)
    with pytest.raises((store.WrongCredentials, store.StoreFailed)) as found:
        gcs_file_system.FileSystem(skip_instance_cache=True)
    text = str(found.value)
    assert variable in text and "\n" not in text and "refresh_token'" not in text
    return found.value


@pytest.mark.parametrize(
    "variable", ["FSSPEC_GS_TOKEN", "FSSPEC_GCS_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS"]
)
@pytest.mark.parametrize("kind", [*FILES, "missing", "folder", "locked"])
def test_a_wrong_file_is_named(monkeypatch, tmp_path, variable, kind):
    file = tmp_path / f"{kind}.json"
    if kind == "folder":
        file.mkdir()
    elif kind != "missing":
        text = FILES.get(kind, "{}")
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    if kind == "locked":
        file.chmod(0)
        if os.access(file, os.R_OK):
            pytest.skip("this user may read every file")
    error = fault(monkeypatch, variable, str(file))
    assert isinstance(error, store.WrongCredentials) and str(file) in str(error)
    with pytest.raises(store.WrongCredentials) as same, gcs.named_in_errors("gs://bucket/data"):
        raise error
    assert same.value is error


def test_credentials_without_a_type_are_those_of_a_user():
    user = dict.fromkeys(credentials.OF_USERS, "x")
    for tree in (user, {**user, "type": "authorized_user"}):
        assert credentials._fault_of(tree) == ""
        for name in user:
            assert name in credentials._fault_of({**tree, name: ""})


@pytest.mark.parametrize(
    "token",
    ["", "cache", "no/such/key.json", "/no/such/key", "~/key", '{"type": "service_account"}'],
)
def test_a_wrong_word_is_named(monkeypatch, token):
    monkeypatch.setattr(gcsfs.credentials.GoogleCredentials, "tokens", {})
    error = fault(monkeypatch, "FSSPEC_GS_TOKEN", token)
    assert isinstance(error, store.WrongCredentials)
    assert token.startswith("{") or token in str(error)


def test_the_variable_of_the_default_credentials_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    error = fault(monkeypatch, "FSSPEC_GS_TOKEN", "google_default")
    assert isinstance(error, store.WrongCredentials) and "google_default" in str(error)


@pytest.mark.parametrize("answer", ["none", "rejected"])
def test_an_access_token_is_not_shown(monkeypatch, answer):
    """Its URL is in the error of requests."""

    def get(url, params, timeout):
        if answer == "none":
            raise requests.ConnectionError(f"Max retries exceeded with url: {url}?{params}")
        response = requests.Response()
        response.status_code = 400
        return response

    monkeypatch.setattr(gcsfs.credentials.requests, "get", get)
    error = fault(monkeypatch, "FSSPEC_GS_TOKEN", "ya29.secret")
    assert isinstance(error, store.StoreFailed if answer == "none" else store.WrongCredentials)
    assert "secret" not in "".join(traceback.format_exception(error))


def test_without_a_metadata_server_it_is_the_network(monkeypatch):
    def refresh(self, request):
        raise google.auth.exceptions.RefreshError("no answer")

    monkeypatch.setattr("google.auth.compute_engine.Credentials.refresh", refresh)
    error = fault(monkeypatch, "FSSPEC_GS_TOKEN", "cloud")
    assert isinstance(error, store.StoreFailed)
    assert "Invalid gcloud credentials" in str(error)  # the reason that gcsfs gives


def test_another_wrong_option_is_not_taken_for_credentials():
    with pytest.raises(ValueError, match="access") as error:
        gcs_file_system.FileSystem(access="all", token="anon", skip_instance_cache=True)
    assert not isinstance(error.value, store.WrongCredentials)


def test_a_stand_in_needs_no_credentials(monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://localhost:1")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/no/such/key.json")
    assert gcs_file_system.FileSystem(skip_instance_cache=True).credentials.credentials is None


THERE = "gs://bucket/runs/digits"
SWEEP = ["sweep", "--config=experiments/coatnet_layouts/sweep.py:size=tiny", f"--workdir={THERE}"]
COMMANDS = [
    ["train", "--config=configs/coatnet_digits.py:size=tiny", f"--workdir={THERE}"],
    ["evaluate", f"--workdir={THERE}"],
    ["translate", f"--workdir={THERE}", "README.md"],
    ["report", THERE],
    [*SWEEP, "--status"],
    [*SWEEP, "--prune"],
    SWEEP,
    ["classify", f"--workdir={THERE}", "gs://bucket/one.png"],
    ["export", THERE, "--format=safetensors", "--out=x"],
    ["prepare", "digits", f"--dir={THERE}"],
    ["prepare", "--index=gs://bucket/data/x/1.0.0"],
    ["inspect", THERE],
]


@pytest.fixture
def unopened():
    """The file systems of this process are opened again, before and after the test."""
    opened = (objects._store, backend.fsspec_backend._get_filesystem)
    for function in opened:
        function.cache_clear()
    yield
    for function in opened:
        function.cache_clear()


@pytest.mark.usefixtures("unopened")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[::2])[:60])
def test_every_command_prints_the_line(monkeypatch, capsys, tmp_path, command):
    file = tmp_path / "broken.json"
    file.write_text(FILES["cut"])
    monkeypatch.setenv("FSSPEC_GS_TOKEN", str(file))
    fsspec.config.set_conf_env(fsspec.config.conf)
    assert main(command) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"FSSPEC_GS_TOKEN={file}" in last


@pytest.mark.parametrize(
    "command", [["inspect", THERE], ["classify", "--workdir=x", "gs://bucket/one.png"]]
)
def test_a_real_process_prints_the_line(tmp_path, command):
    file = tmp_path / "missing.json"
    environment = {**os.environ, "FSSPEC_GS_TOKEN": "google_default"}
    environment["GOOGLE_APPLICATION_CREDENTIALS"] = str(file)
    command = [sys.executable, "-m", "localglobal_jax", *command]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1, ended.stderr
    assert f"GOOGLE_APPLICATION_CREDENTIALS={file}" in ended.stderr
