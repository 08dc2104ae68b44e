"""A Hugging Face hub on 127.0.0.1 that serves directories and takes uploads, and caches of it laid out by hand."""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
import urllib.parse

ROOT = pathlib.Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "76543210fedcba9876543210fedcba9876543210"


def cache(home, repository, directory, names, commit=COMMIT, ref="main"):
    """Put files of a directory into the cache under `home`, as `huggingface_hub` lays them out: refs, snapshots, blobs."""
    top = home / "hub" / f"models--{repository.replace('/', '--')}"
    (top / "refs").mkdir(parents=True, exist_ok=True)
    (top / "refs" / ref).write_text(commit)
    for name in names:
        content = (directory / name).read_bytes()
        blob, link = top / "blobs" / hashlib.sha256(content).hexdigest(), top / "snapshots" / commit / name
        for file in (blob, link):
            file.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return top / "snapshots" / commit


class _Handler(http.server.BaseHTTPRequestHandler):
    """The routes of the API that fetching and pushing a model need."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def do_POST(self):
        self.take()

    def do_PUT(self):
        self.take()

    def take(self):
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send(*self.server.take(self.path.strip("/").split("/"), self.headers.get("Authorization"), sent))

    def answer(self, body):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.send(*self.server.answer(path, self.headers.get("Authorization")), body=body)

    def send(self, status, headers, content, body=True):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


class Hub(http.server.ThreadingHTTPServer):
    """The hub.

    Attributes:
      revisions: the directory of each revision of a repository: `{repository: {revision: (commit, directory)}}`.
      gated: repositories that only who has the token may read.
      fetched: the names of the files whose content was asked for.
      uploads: where repositories that are made have their files.
      private: repositories that are private.
      commits: the message of each commit.
      role: what the token says of itself: `read`, `write` or `fineGrained`.
      refuses: whether nothing may be made.
    """

    token = "hf_of_the_test"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.revisions, self.gated, self.fetched = {}, set(), []
        self.uploads, self.private, self.commits, self.blobs = None, set(), [], {}
        self.role, self.refuses = "write", False

    def add(self, repository, directory, commit=COMMIT, revision="main"):
        known = self.revisions.setdefault(repository, {})
        known[revision] = known[commit] = (commit, directory)

    def answer(self, path, authorization):
        words = path.strip("/").split("/")
        if words == ["api", "whoami-v2"]:
            known = authorization == f"Bearer {self.token}"
            user = {"name": "tester", "orgs": [{"name": "a-club"}], "auth": {"accessToken": {"role": self.role}}}
            return self.json(user) if known else self.error(401, "", "Invalid username or password.")
        api = words[:2] == ["api", "models"]
        if len(words) < 3:
            return self.error(404, "EntryNotFound", "no such route")
        repository, kind, *rest = ["/".join(words[2:4]), *words[4:], ""] if api else ["/".join(words[:2]), *words[2:]]
        if repository not in self.revisions:
            return self.error(401, "RepoNotFound", "Repository not found")
        revision = "".join(rest[:1]) or "main"
        if revision not in self.revisions[repository]:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit, directory = self.revisions[repository][revision]
        if api:
            return self.describe(kind, repository, commit, directory)
        if repository in self.gated and authorization != f"Bearer {self.token}":
            return self.error(403, "GatedRepo", "Access to this model is restricted")
        file = directory.joinpath(*rest[1:])
        if not file.is_file():
            return self.error(404, "EntryNotFound", "Entry not found")
        self.fetched.append("/".join(rest[1:]))
        content = file.read_bytes()
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, content

    def describe(self, kind, repository, commit, directory):
        files = sorted(file for file in directory.rglob("*") if file.is_file())
        names = [file.relative_to(directory).as_posix() for file in files]
        if kind == "tree":
            blobs = ({"size": file.stat().st_size, "oid": hashlib.sha1(file.read_bytes()).hexdigest()} for file in files)
            found = [{"type": "file", "path": name, **blob} for name, blob in zip(names, blobs)]
        else:
            siblings = [{"rfilename": name} for name in names]
            found = {"id": repository, "modelId": repository, "sha": commit, "siblings": siblings, "tags": []}
            found["private"] = repository in self.private
        return self.json(found)

    def take(self, words, authorization, sent):
        """What is sent to the hub."""
        if words[0] == "blobs":
            self.blobs[words[1]] = sent
            return self.json({})
        if authorization != f"Bearer {self.token}":
            return self.error(401, "", "Invalid username or password.")
        place = f"http://127.0.0.1:{self.server_port}"
        if words[:2] == ["api", "validate-yaml"]:
            return self.json({"errors": [], "warnings": []})
        if words[-1] == "batch":
            objects = json.loads(sent)["objects"]
            upload = lambda one: {"actions": {"upload": {"href": f"{place}/blobs/{one['oid']}"}}}
            return self.json({"transfer": "basic", "objects": [{**one, **upload(one)} for one in objects]})
        if self.refuses:
            return self.error(403, "", "You may not write to this namespace.")
        if words[:3] == ["api", "repos", "create"]:
            fields = json.loads(sent)
            repository = f"{fields['organization']}/{fields['name']}"
            if repository in self.revisions:
                return 409, *self.json({"url": f"{place}/{repository}", "error": "You already created this model repo"})[1:]
            directory = self.uploads / repository
            directory.mkdir(parents=True)
            self.add(repository, directory)
            self.private |= {repository} if fields["private"] else set()
            return self.json({"url": f"{place}/{repository}"})
        repository, kind = "/".join(words[2:4]), words[4]
        if kind == "preupload":
            large = lambda name: "lfs" if name.endswith((".safetensors", ".gguf")) else "regular"
            listed = [one["path"] for one in json.loads(sent)["files"]]
            return self.json({"files": [{"path": x, "uploadMode": large(x), "shouldIgnore": False} for x in listed]})
        return self.commit(repository, [json.loads(line) for line in sent.splitlines()], place)

    def commit(self, repository, lines, place):
        _, directory = self.revisions[repository]["main"]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            else:
                whole = line["key"] == "file"
                content = base64.b64decode(value["content"]) if whole else self.blobs[value["oid"]]
                (directory / value["path"]).write_bytes(content)
        return self.json({"commitUrl": f"{place}/{repository}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})

    @staticmethod
    def json(found):
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()

    @staticmethod
    def error(status, code, message):
        headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
        return status, headers, json.dumps({"error": message}).encode()


@contextlib.contextmanager
def serving():
    """A hub that answers within the block."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def environment(home, hub=None, token=None):
    """The variables of a process whose hub is this one, or that is offline."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    place = {"HF_HUB_OFFLINE": "1"} if hub is None else {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
    own = {"HF_HOME": str(home), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | place
    return kept | own | ({"HF_TOKEN": token} if token else {})


def python(code, *arguments, cwd=None, **where):
    """Run Python there, which reads the variables once, on import: its output, or the last line of its error."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    made = subprocess.run(command, env=environment(**where), cwd=cwd, check=False, capture_output=True, text=True)
    return made.stdout.strip() if made.returncode == 0 else made.stderr.strip().splitlines()[-1]
