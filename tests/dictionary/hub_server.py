"""A stand-in of the Hub on this machine: repositories over the HTTP interface that the real client speaks."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a_token"


class Repository:
    """Branches of commits, each a table of files."""

    def __init__(self, *, private):
        self.private, self.commits = private, {}
        self.branches = {"main": self.commit({})}
        self.messages = []

    def commit(self, files):
        name = hashlib.sha1(repr(sorted(files.items())).encode() + str(len(self.commits)).encode()).hexdigest()
        self.commits[name] = files
        return name

    def resolve(self, revision):
        return self.branches.get(revision, revision if revision in self.commits else None)

    def files(self, revision="main"):
        return self.commits[self.resolve(revision)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code):
        self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    @property
    def may_write(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def handle_any(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append((self.command, path))
        if path == "/api/repos/create":
            return self.create(hub, json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path.startswith("/lfs/"):
            hub.large[path.removeprefix("/lfs/")] = body
            return self.answer(200)
        at = re.match(r"(?:/api/models)?/([\w.-]+/[\w-][\w.-]*?)(?:\.git)?(?:/(.*))?$", path)
        repository = hub.repositories.get(at[1]) if at else None
        if repository is None or (repository.private and not self.may_write):
            return self.refuse(401 if not self.may_write else 404, "RepoNotFound")
        rest = at[2] or ""
        if rest.startswith("resolve/"):
            return self.resolve(repository, *rest.removeprefix("resolve/").split("/", 1))
        if self.command == "POST":
            if not self.may_write:
                return self.refuse(403, "Forbidden")
            return self.write(hub, at[1], repository, rest, body)
        return self.describe(at[1], repository, rest)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def create(self, hub, asked):
        if not self.may_write:
            return self.refuse(401, "Unauthorized")
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if name in hub.repositories:
            return self.answer(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        hub.repositories[name] = Repository(private=private)
        return self.answer(200, {"url": f"{hub.url}/{name}", "name": name, "id": name})

    def describe(self, name, repository, rest):
        kind, _, revision = rest.partition("/")
        revision = (revision if kind in ("revision", "tree") else "").split("/")[0] or "main"
        commit = repository.resolve(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        files = repository.files(commit)
        if kind == "tree":
            blobs = [{"type": "file", "path": p, "size": len(c), "oid": etag(c)} for p, c in files.items()]
            return self.answer(200, blobs)
        siblings = [{"rfilename": path} for path in files]
        known = {"id": name, "modelId": name, "sha": commit, "private": repository.private, "siblings": siblings}
        return self.answer(200, {**known, "tags": [], "downloads": 0, "likes": 0})

    def resolve(self, repository, revision, path):
        commit = repository.resolve(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        if path not in repository.files(commit):
            return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content = repository.files(commit)[path]
        return self.answer(200, content, X_Repo_Commit=commit, ETag=f'"{etag(content)}"')

    def write(self, hub, name, repository, rest, body):
        kind, _, revision = rest.partition("/")
        if kind == "branch":
            if revision in repository.branches:
                return self.refuse(409, "Conflict")
            repository.branches[revision] = repository.branches["main"]
            return self.answer(200, {})
        if kind == "preupload":
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if rest == "info/lfs/objects/batch":
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if kind == "commit":
            return self.commit(hub, name, repository, revision, body)
        return self.refuse(404, "NotFound")

    def commit(self, hub, name, repository, revision, body):
        files = dict(repository.files(revision))
        for line in body.decode().splitlines():
            one = json.loads(line)
            value = one["value"]
            if one["key"] == "header":
                repository.messages.append(value["summary"])
            elif one["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif one["key"] == "lfsFile":
                files[value["path"]] = hub.large[value["oid"]]
        commit = repository.branches[revision] = repository.commit(files)
        return self.answer(200, {"commitUrl": f"{hub.url}/{name}/commit/{commit}", "commitOid": commit})


def etag(content):
    return hashlib.sha256(content).hexdigest()


class Hub:
    def __init__(self):
        self.repositories, self.large, self.asked, self.url = {}, {}, [], ""


@contextlib.contextmanager
def running():
    """A Hub with no repositories, at `url`, that takes `TOKEN`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub, server.daemon_threads = hub, True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
