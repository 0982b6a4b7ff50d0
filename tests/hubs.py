"""A small hub on 127.0.0.1, which can fail in every way: the part of the Hugging Face hub's protocol that we use."""

import base64
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""The commit of files that a test puts there."""
OWNER, TOKEN = "lab", "hf_TheSecretOfTheLab"
"""Who may write, and by which token."""


class Hub:
    """Answers downloads and uploads.

    `files` maps (repository, file) to content or to a function that fails; `requests` lists the questions for files;
    `uploads` the files that came outside a commit, by checksum; `commits` what was committed.
    """

    def __init__(self, port=0):
        self.files, self.requests, self.uploads, self.commits, self.private = {}, [], {}, [], {}
        self.failures = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def do_HEAD(self):
                hub.answer(self)

            def do_GET(self):
                hub.answer(self)

            def do_POST(self):
                hub.take(self)

            def do_PUT(self):
                hub.take(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def put(self, repository, file, content):
        self.files[repository, file] = content

    def holds(self, repository):
        return {file: content for (name, file), content in self.files.items() if name == repository}

    def answer(self, request):
        if about := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/\w+)?", request.path.partition("?")[0]):
            return self._describe(request, about[1])
        repository, asks, rest = request.path.strip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        if asks:  # some releases of huggingface_hub ask for other things too
            self.requests.append((request.command, request.path))
        commits = [number for number, files in self.commits if files[0] == repository]
        then = dict(self.commits).get(revision)
        content = self.files.get((repository, file)) if then is None else then[1].get(file)
        if callable(content):
            return content(request)
        known = any(name == repository for name, _ in self.files)
        if known and then is None and revision not in ("main", COMMIT):
            return fail(404, "RevisionNotFound")(request)
        if content is None:
            return fail(404, "EntryNotFound" if known else "RepoNotFound")(request)
        start_answer(request, content, revision if then else (commits or [COMMIT])[-1])
        if request.command == "GET":
            request.wfile.write(content)

    def take(self, request):
        """Answer a request that writes."""
        path = request.path.partition("?")[0]
        if failure := next((fails for part, fails in self.failures.items() if part in path), None):
            return failure(request)
        body = _body(request)
        if path.startswith("/upload/"):  # as in storage elsewhere: its address is the permission
            assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2]
            self.uploads[path.rpartition("/")[2]] = body
            return _say(request, {})
        if request.headers["Authorization"] != f"Bearer {TOKEN}":
            return fail(401, message="Invalid credentials in Authorization header")(request)
        if path == "/api/validate-yaml":
            return _say(request, {"errors": [], "warnings": []})
        asked = json.loads(body) if path != "" and not path.endswith("/commit/main") else {}
        if path == "/api/repos/create":
            repository = f"{asked['organization']}/{asked['name']}"
        else:
            repository = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+?)(\.git)?/.*", path)[1]
        if not repository.startswith(f"{OWNER}/"):
            return fail(403)(request)
        if path == "/api/repos/create":
            if repository in self.private:
                return fail(409)(request)
            self.private[repository] = asked.get("private", asked.get("visibility") == "private")
            return _say(request, {"url": f"{self.url}/{repository}"})
        if path.endswith("/preupload/main"):
            return _say(request, {"files": [self._mode(repository, file["path"]) for file in asked["files"]]})
        if path.endswith("/info/lfs/objects/batch"):
            return _say(request, {"transfer": "basic", "objects": [self._action(each) for each in asked["objects"]]})
        if path.endswith("/commit/main"):
            return self._commit(request, repository, body)
        raise AssertionError(path)

    def _describe(self, request, repository):
        files = self.holds(repository)
        if not files and repository not in self.private:
            return fail(404, "RepoNotFound")(request)
        if request.headers["Authorization"] not in (None, f"Bearer {TOKEN}"):
            return fail(401, message="Invalid credentials in Authorization header")(request)
        siblings = [{"rfilename": name} for name in files]
        private = self.private.get(repository, False)
        _say(
            request, {"id": repository, "modelId": repository, "sha": COMMIT, "private": private, "siblings": siblings}
        )

    def _mode(self, repository, path):
        content = self.files.get((repository, path))
        oid = None
        if isinstance(content, bytes):
            oid = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            if path.endswith(".safetensors"):
                oid = hashlib.sha256(content).hexdigest()
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _action(self, asked):
        upload = {"actions": {"upload": {"href": f"{self.url}/upload/{asked['oid']}", "header": {}}}}
        return asked | ({} if asked["oid"] in self.uploads else upload)

    def _commit(self, request, repository, body):
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                assert value["encoding"] == "base64"
                self.put(repository, value["path"], base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                self.put(repository, value["path"], self.uploads[value["oid"]])
        commit = self._committed(repository)
        _say(request, {"commitUrl": f"{self.url}/{repository}/commit/{commit}", "commitOid": commit})

    def _committed(self, repository):
        commit = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits.append((commit, (repository, self.holds(repository))))
        return commit

    def edit(self, repository, file, content):
        """Somebody changes a file on the hub's page."""
        self.put(repository, file, content)
        self._committed(repository)

    def stop(self):
        """Nobody listens at the port from now on; stopping twice is fine."""
        self.server.shutdown()
        self.server.server_close()


def hub_of_this_process(cache, monkeypatch, token=TOKEN):
    """Start a hub that huggingface_hub in this process takes for its own; it reads its environment once, at import."""
    from huggingface_hub import constants

    hub = Hub()
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    settings = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(cache)}
    settings |= {"HF_TOKEN_PATH": str(cache / "token"), "HF_STORED_TOKENS_PATH": str(cache / "tokens")}
    for name, value in (settings | {"HF_HUB_DISABLE_XET": True}).items():
        monkeypatch.setattr(constants, name, value, raising=False)  # early releases have no xet
    for name, value in (("HF_TOKEN", token), ("NO_PROXY", "127.0.0.1"), ("no_proxy", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    return hub


def _body(request):
    if "chunked" not in request.headers.get("Transfer-Encoding", ""):
        return request.rfile.read(int(request.headers.get("Content-Length", 0)))
    parts = []
    while size := int(request.rfile.readline(), 16):
        parts.append(request.rfile.read(size))
        request.rfile.readline()
    return b"".join(parts)


def _say(request, content):
    body = json.dumps(content).encode()
    request.send_response(200)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def start_answer(request, content, commit=COMMIT):
    request.send_response(200)
    request.send_header("Content-Length", str(len(content)))
    request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
    request.send_header("X-Repo-Commit", commit)
    request.end_headers()


def fail(status, code=None, message=None):
    """A file that answers with an error, as the hub words it."""

    def answer(request):
        request.send_response(status)
        if code:
            request.send_header("X-Error-Code", code)
        if message:
            request.send_header("X-Error-Message", message)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


def hang_up(request):
    """A file whose server closes the connection without a word."""
    request.connection.shutdown(socket.SHUT_RDWR)


def stay_silent(request):
    """A file whose server takes the question and does not answer until the client is gone."""
    request.connection.settimeout(30)
    request.connection.recv(1)


def cut(content):
    """A file of which the first half arrives, whenever it is asked for."""

    def answer(request):
        start_answer(request, content)
        if request.command == "GET":
            request.wfile.write(content[: len(content) // 2])
            request.wfile.flush()
            request.connection.shutdown(socket.SHUT_RDWR)

    return answer
