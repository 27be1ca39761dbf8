"""Keep a device's student up to date, and its requests until there is a network; beside pkd_device.py, without pkd.

Run as: python pkd_update.py URL CLASS FOLDER [--gallery NAME] [--key-file FILE]      install what the class is to run
        python pkd_update.py URL CLASS FOLDER --roll-back                             go back to the one before
        python pkd_update.py URL CLASS FOLDER --send [--key-file FILE]                send what waits

FOLDER holds one folder for each version, ``state.json``, which names the one that is used, and ``queue.jsonl``.
docs/edge.md says why each check is there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

from pkd_device import Device


class Refused(Exception):
    """Say why a version is not installed. The one before stays in use."""


class Broken(Refused):
    """Say that a version cannot be used on this device, however often it is downloaded."""


class Offline(Exception):
    """Say that the server cannot be reached, or is busy. What is installed goes on."""


class Server:
    """Ask one pkd server."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self._url, self._key = url.rstrip("/"), key

    def ask(
        self, path: str, etag: str | None = None, body: dict[str, Any] | None = None
    ) -> tuple[int, str | None, bytes]:
        """Send a request → status, ETag and body. Raises Offline where asking again later makes sense."""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        headers |= {"If-None-Match": etag} if etag else {}
        headers |= {"Content-Type": "application/json"} if body is not None else {}
        data = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(Request(self._url + path, data, headers), timeout=30) as answer:
                return answer.status, answer.headers["ETag"], answer.read()
        except HTTPError as error:
            if error.code in (429, 503):
                raise Offline(f"the server is busy ({error.code})") from None
            return error.code, None, error.read()
        except (URLError, OSError) as error:
            raise Offline(str(error)) from None


class Students:
    """Install, use and roll back the versions of one device class."""

    def __init__(self, folder: Path, server: Server, device_class: str, gallery: str | None = None) -> None:
        self._folder, self._server, self._class, self._gallery = folder, server, device_class, gallery
        folder.mkdir(parents=True, exist_ok=True)
        self._state: dict[str, Any] = {"current": None, "previous": None, "seen": None, "refused": None}
        if (folder / "state.json").exists():
            self._state |= json.loads((folder / "state.json").read_text(encoding="utf-8"))

    @property
    def current(self) -> Path | None:
        """Return the folder of the student in use, laid out like a bundle; None before the first."""
        name = self._state["current"]
        return self._folder / name if name else None

    def update(self) -> bool:
        """Install what the class is to run now, if that is news; returns whether it was installed.

        Raises Refused or Offline; both leave everything as it was. What is Broken is not downloaded again.
        """
        path = f"/v1/devices/{quote(self._class)}/latest"
        status, etag, body = self._server.ask(path, self._state["seen"])
        if status == 304:
            return False
        if status != 200 or etag is None:
            raise Refused(f"{path} answers {status}: {body[:300].decode(errors='replace')}")
        latest = json.loads(body)
        name = etag.strip('"')[:16]
        try:
            if not (self._folder / name).is_dir():
                self._install(latest, name)
            self._require_covered(latest)
        except Refused as refused:
            self._save(seen=etag if isinstance(refused, Broken) else None, refused=str(refused))
            raise
        changed = {"current": name, "previous": self._state["current"]} if name != self._state["current"] else {}
        self._save(seen=etag, refused=None, **changed)
        for path_of_old in self._folder.iterdir():
            if path_of_old.is_dir() and path_of_old.name not in (self._state["current"], self._state["previous"]):
                shutil.rmtree(path_of_old)
        return bool(changed)

    def roll_back(self) -> None:
        """Use the version before, until the server names another than it does now. Raises Refused without one."""
        previous = self._state["previous"]
        if not previous or not (self._folder / previous).is_dir():
            raise Refused("there is no version before this one on the device.")
        self._save(current=previous, previous=self._state["current"])

    def _install(self, latest: dict[str, Any], name: str) -> None:
        """Download every file beside the others, check them, and only then give the folder its name."""
        if latest["runtime"] != "onnxruntime":
            raise Broken(f"this client runs ONNX files, the class {self._class} is for {latest['runtime']}.")
        part = self._folder / f".{name}"
        shutil.rmtree(part, ignore_errors=True)
        for file in latest["files"]:
            parts = PurePosixPath(file["name"]).parts
            if not parts or any(one.startswith((".", "/")) or "\\" in one or ":" in one for one in parts):
                raise Refused(f"the server names a file {file['name']!r} that is no plain path.")
            route = (
                f"/v1/encoders/{quote(latest['bundle_encoder'], safe='')}/artifact?file={quote(file['name'], safe='')}"
            )
            status, _, data = self._server.ask(route)
            if status != 200 or hashlib.sha256(data).hexdigest() != file["sha256"]:
                raise Refused(f"{file['name']}: does not arrive as the server states it (status {status}).")
            (part / file["name"]).parent.mkdir(parents=True, exist_ok=True)
            (part / file["name"]).write_bytes(data)
        manifest = json.loads((part / "manifest.json").read_text(encoding="utf-8"))
        for file in latest["files"]:
            listed = manifest["files"].get(file["name"], file["sha256"])
            if listed != file["sha256"]:
                raise Refused(f"{file['name']}: is another file than the manifest lists.")
        try:
            Device(part, None, model=latest["files"][0]["name"], encoder=latest["encoder"])  # tests itself
        except SystemExit as error:
            raise Broken(str(error)) from None
        (part / "latest.json").write_text(json.dumps(latest), encoding="utf-8")
        part.replace(self._folder / name)

    def _require_covered(self, latest: dict[str, Any]) -> None:
        """Refuse a student that no certificate joins with every encoder whose templates the gallery holds."""
        if self._gallery is None:
            return
        status, _, body = self._server.ask(f"/v1/galleries/{quote(self._gallery)}")
        if status != 200:
            raise Refused(f"the gallery {self._gallery} cannot be asked for its encoders (status {status}).")
        missing = sorted(set(json.loads(body)["templates"]) - set(latest["certified_against"]))
        if missing:
            raise Refused(
                f"no certificate covers {latest['encoder']} against {', '.join(missing)}, which are enrolled."
            )

    def _save(self, **changes: Any) -> None:
        self._state |= changes
        part = self._folder / ".state.json"
        part.write_text(json.dumps(self._state, indent=1), encoding="utf-8")
        part.replace(self._folder / "state.json")


class Queue:
    """Keep requests until they can be sent. Each is a line: when it was made, and the body of POST /v1/verify."""

    def __init__(self, path: Path, longest: float = 7 * 86400, most: int = 1000) -> None:
        """``longest``: seconds after which nobody waits for an answer any more. ``most``: lines that are kept."""
        self._path, self._longest, self._most = path, longest, most

    def put(self, body: dict[str, Any], now: float | None = None) -> None:
        """Add a request. The oldest give way."""
        lines = [*self._lines(), {"made": time.time() if now is None else now, "body": body}]
        self._write(lines[-self._most :])

    def send(self, server: Server, now: float | None = None) -> list[dict[str, Any]]:
        """Send what waits, oldest first → body and answer, or why there is none. Stops where the network does."""
        now, lines, done = time.time() if now is None else now, self._lines(), []
        while lines:
            line = lines[0]
            if now - line["made"] > self._longest:
                done.append({"body": line["body"], "dropped": "too old"})
            else:
                try:
                    status, _, answer = server.ask("/v1/verify", body=line["body"])
                except Offline:
                    break
                found = json.loads(answer)
                kind = "answer" if status == 200 else "dropped"
                done.append({"body": line["body"], kind: found if status == 200 else found.get("type", str(status))})
            lines = lines[1:]
            self._write(lines)  # at once: what was answered is not sent twice
        return done

    def _lines(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        return [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines() if line]

    def _write(self, lines: list[dict[str, Any]]) -> None:
        part = self._path.with_name(f".{self._path.name}")
        part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        part.chmod(0o600)  # embeddings are biometric data
        part.replace(self._path)


def main() -> None:
    """Read the command line and do what it asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("device_class", metavar="CLASS")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gallery", help="refuse a student that is not certified against what is enrolled there")
    parser.add_argument("--key-file", type=Path, help="file that holds the API key")
    parser.add_argument("--roll-back", action="store_true")
    parser.add_argument("--send", action="store_true")
    args = parser.parse_args()
    server = Server(args.url, args.key_file.read_text().strip() if args.key_file else None)
    students = Students(args.folder, server, args.device_class, args.gallery)
    try:
        if args.send:
            for one in Queue(args.folder / "queue.jsonl").send(server):
                print(json.dumps({key: value for key, value in one.items() if key != "body"}))
        elif args.roll_back:
            students.roll_back()
        else:
            students.update()
    except Offline as error:
        print(f"offline: {error}. What is installed goes on.", file=sys.stderr)
    except Refused as error:
        sys.exit(f"refused: {error}")
    print(students.current or "nothing is installed")


if __name__ == "__main__":
    main()
