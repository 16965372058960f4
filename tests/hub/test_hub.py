"""A model to the hub and back, against a hub of this process: no network is used."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import genemodel as gm
from genemodel.bundle import hub
from genemodel.command.cli import main
from genemodel.errors import ConfigError, DataError
from genemodel.hub.card import CARD


class FakeHub(ThreadingHTTPServer):
    """Repositories as lists of commits, each a dictionary of files; what the client asks of it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        commits = self.repositories.setdefault(name, [])
        sha = hashlib.sha1(f"{name}{len(commits)}".encode()).hexdigest()
        commits.append((sha, {**(commits[-1][1] if commits else {}), **files}))
        return sha


class _Answers(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _say(self, status: int, body: object = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _found(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Give a commit, or answer why not."""
        if name.startswith("gated/"):
            self._say(403, X_Error_Code="GatedRepo")
            return None
        commits = self.server.repositories.get(name)
        if commits is None:
            self._say(401, X_Error_Code="RepoNotFound")
            return None
        if revision == "main":
            return commits[-1]
        for sha, files in commits:
            if sha == revision:
                return sha, files
        self._say(404, X_Error_Code="RevisionNotFound")
        return None

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        words = unquote(urlsplit(self.path).path).strip("/").split("/")
        if words[:2] == ["api", "models"]:
            name = "/".join(words[2:4])
            found = self._found(name, words[5] if len(words) > 5 else "main")
            if found is None:
                return
            sha, files = found
            listed = [
                {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for p, c in files.items()
            ]
            siblings = [{"rfilename": path} for path in files]
            self._say(200, listed if "tree" in words else
                      {"id": name, "sha": sha, "siblings": siblings})  # fmt: skip
            return
        if len(words) < 5:
            self._say(404)
            return
        name, revision, path = "/".join(words[:2]), words[3], "/".join(words[4:])
        found = self._found(name, revision)
        if found is None:
            return
        sha, files = found
        if path not in files:
            self._say(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            return
        etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
        self._say(200, files[path], ETag=etag, X_Repo_Commit=sha)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.server.asked.append(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        words = urlsplit(self.path).path.strip("/").split("/")
        if "Authorization" not in self.headers:
            self._say(401, {"error": "Invalid username or password."})
        elif words == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.repositories.setdefault(name, [])
            self._say(200, {"url": f"{self.server.address}/{name}", "name": name})
        elif words == ["api", "validate-yaml"]:
            known = b"license: none-of-them" not in body
            self._say(200 if known else 400, {"errors": [] if known else [{"message": "license"}]})
        elif words[4] == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self._say(200, {"files": files})
        elif words[4] == "commit":
            files = {}
            for line in body.splitlines():
                said = json.loads(line)
                if said["key"] == "file":
                    files[said["value"]["path"]] = base64.b64decode(said["value"]["content"])
            sha = self.server.commit("/".join(words[2:4]), files)
            url = f"{self.server.address}/{'/'.join(words[2:4])}/commit/{sha}"
            self._say(200, {"commitUrl": url, "commitOid": sha, "success": True})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    server = FakeHub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE",
        server.address + "/{repo_id}/resolve/{revision}/{filename}",
    )  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_model_goes_to_the_hub_and_back(
    fake: FakeHub, offline, small_start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_start / "run" / "bundle"
    assert main(["push", str(folder), "hf://lab/small", "licence=cc-by-4.0"]) == 0
    sha, files = fake.repositories["lab/small"][-1]
    assert f'genemodel.load("hf://lab/small@{sha}")' in capsys.readouterr().out
    assert set(files) == {CARD, *(p.name for p in folder.iterdir())}

    mine, model = gm.load(folder, device="cpu"), gm.load("hf://lab/small", device="cpu")
    assert model.fingerprint == mine.fingerprint
    assert model.provenance == mine.provenance
    # The address is taken where a path is, by any verb, and a revision pins a version.
    assert main(["describe", f"hf://lab/small@{sha}"]) == 0
    assert f"{len(mine.vocabulary):,} tokens" in capsys.readouterr().out
    fake.commit("lab/small", {"model.json": b"{}"})
    assert gm.load(f"hf://lab/small@{sha}", device="cpu").fingerprint == mine.fingerprint
    with pytest.raises(DataError, match="its model.json is not ours"):
        gm.load("hf://lab/small", device="cpu")
    fake.repositories["lab/small"].pop()
    gm.load("hf://lab/small", device="cpu")

    offline()
    before = len(fake.asked)
    assert gm.load("hf://lab/small", device="cpu").fingerprint == mine.fingerprint
    assert gm.load(f"hf://lab/small@{sha}", device="cpu").fingerprint == mine.fingerprint
    assert len(fake.asked) == before
    with pytest.raises(DataError, match="is not in the cache, and the hub cannot be reached"):
        gm.load("hf://lab/other")


def test_the_page_says_what_the_model_knows_of_itself(fake: FakeHub, small_start: Path) -> None:
    gm.push(small_start / "run" / "bundle", "hf://lab/small", licence="apache-2.0")
    page = fake.repositories["lab/small"][-1][1][CARD].decode()
    model = gm.load(small_start / "run" / "bundle", device="cpu")
    assert page.startswith("---\nlibrary_name: genemodel\n") and "license: apache-2.0\n" in page
    for source in model.training.sources:
        assert f"| {source.name} | human | {source.n_trained:,} |" in page
    assert "licences of the data: not known" in page
    validation = model.provenance["validation"]
    loss, trivial = validation["val/masked_gene"], validation["val_trivial/masked_gene"]
    assert f"| masked_gene | {loss:.4f} | {trivial:.4f} | {loss / trivial:.3f} |" in page
    assert 'gm.contamination(adata, "hf://lab/small")' in page
    assert f'"torch": "{model.provenance["torch"]}"' in page
    assert f'"context": {model.tokens.context}' in page or f"context {model.tokens.context}" in page


def test_only_what_models_are_made_of_is_sent_or_fetched(
    fake: FakeHub, small_start: Path, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(small_start / "run" / "bundle", folder)
    (folder / "modeling.py").write_text("raise SystemExit")
    with pytest.raises(DataError, match=r"holds modeling\.py, and a model is made of"):
        gm.push(folder, "hf://lab/code")
    assert "lab/code" not in fake.repositories
    with pytest.raises(DataError, match="the hub refuses what was sent"):
        gm.push(small_start / "run" / "bundle", "hf://lab/code", licence="none-of-them")
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    fake.commit("lab/code", files)
    gm.load("hf://lab/code", device="cpu")
    assert not [path for path in fake.asked if "modeling.py" in path]
    assert not list((tmp_path / "cache").rglob("modeling.py"))

    about = json.loads(files["model.json"])
    for number, name in enumerate(("modeling.py", "../x.json", "*.json")):
        about["sha256"] = {name: ""}
        fake.commit(f"lab/evil{number}", {"model.json": json.dumps(about).encode(), **files | {
            "model.json": json.dumps(about).encode()}})  # fmt: skip
        with pytest.raises(DataError, match="nothing of it is read"):
            gm.load(f"hf://lab/evil{number}")
    # Of a repository of anybody else's, nothing is fetched.
    fake.commit("meta/big", {"config.json": b"{}", "model.safetensors": b"0" * 1000})
    with pytest.raises(DataError, match=r"no model of genemodel: it has no model\.json"):
        gm.load("hf://meta/big")
    assert not [path for path in fake.asked if "meta/big/resolve" in path and "tensors" in path]
    # A damaged file is found as anywhere.
    fake.commit("lab/small", {**files, "weights.safetensors": b"0"})
    with pytest.raises(DataError, match="is damaged"):
        gm.load("hf://lab/small")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("hf://lab/none", "is not there, or is private: look at its name, or log in with"),
        ("hf://gated/x", "is gated: ask for access"),
        ("hf://lab/there@v9", "there is no such revision"),
    ],
)
def test_refusals_of_the_hub_are_one_sentence(
    fake: FakeHub, address: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.commit("lab/there", {"model.json": b"{}"})
    assert main(["describe", address]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and "Traceback" not in error


def test_no_hub_and_no_token(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, small_start: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(DataError, match="log in with `hf auth login`, or set HF_TOKEN"):
        gm.push(small_start / "run" / "bundle", "hf://lab/small")
    fake.shutdown()
    fake.server_close()
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
    )  # fmt: skip
    with pytest.raises(DataError, match="the hub cannot be reached"):
        gm.load("hf://lab/small")


@pytest.mark.parametrize("address", ["hf://lab", "hf://lab/a/b", "hf://lab/a@", "hf://l b/a"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(ConfigError, match="no address of a model on the hub"):
        gm.load(address)
    with pytest.raises(ConfigError, match="no address"):
        hub.parts_of(address)
    with pytest.raises(ConfigError, match="write hf://ORG/NAME"):
        hub.parts_of("models/a")


def test_where_a_model_is_no_model_an_address_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["embed", "model=a", "input=hf://lab/cells", "output=b.h5ad"]) == 2
    assert "is an address, not a path" in capsys.readouterr().err


def test_the_library_brings_no_hub_with_it() -> None:
    code = (
        "import sys, genemodel; genemodel.load; genemodel.push\n"
        "assert 'huggingface_hub' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
