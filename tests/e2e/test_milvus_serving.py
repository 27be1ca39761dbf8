"""pkd-serve and pkd-gallery on a real Milvus, reached by TLS: two workers, one log, and copies to and from SQLite."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pkd.serving.client import Client
from pkd.serving.galleries.crypto import MasterKey
from tests.support import serving_bundles as made
from tests.support.milvus_server import MilvusServer, copy
from tests.support.milvus_stores import Backdoor, backdoor
from tests.support.server_process import serving, until

__all__ = ["backdoor"]
COMMAND = str(Path(sys.executable).with_name("pkd-gallery"))
ROOTS = "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"
PEOPLE = 6


@contextmanager
def tls(uri: str, folder: Path) -> Iterator[str]:
    """HOST:PORT that speaks TLS and passes on to ``uri``; its certificate is ``folder``/cert.pem."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.datetime.now(datetime.timezone.utc)
    hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    built = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(hosts), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "cert.pem").write_bytes(built.public_bytes(pem))
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, none))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    context.set_alpn_protocols(["h2"])
    port = int(uri.rpartition(":")[2])

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(connected, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"localhost:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.1))
        loop.close()


class Operator:
    """Runs pkd-gallery on one Milvus."""

    def __init__(self, where: str, folder: Path) -> None:
        self.where, self.folder = where, folder

    def answered(self, *argv: object, code: int = 0, store: object = None, key: str = "master") -> Any:
        options = ["--master-key", self.folder / key]
        if store is None:
            options += ["--audit", self.folder / "audit.db", "--milvus-token", self.folder / "token"]
        command, *rest = argv
        done = subprocess.run(
            [COMMAND, "--json", *map(str, (command, store or self.where, *rest, *options))],
            capture_output=True,
            text=True,
            env={**os.environ, ROOTS: str(self.folder / "cert.pem")},
        )
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout) if code == 0 else done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_an_operator_s_day_with_milvus(milvus_server: MilvusServer, backdoor: Backdoor, tmp_path: Path) -> None:
    family = made.family(tmp_path)
    student = family.student
    MasterKey.create(tmp_path / "master")
    MasterKey.create(tmp_path / "next")
    (tmp_path / "token").write_text("root:Milvus\n")
    with tls(milvus_server.uri, tmp_path) as address:
        operator = Operator(f"milvus+tls://{address}", tmp_path)
        settings: dict[str, object] = {
            "PKD_BUNDLES": os.pathsep.join(map(str, family.folders[:2])),
            "PKD_GALLERY": operator.where,
            "PKD_AUDIT_FILE": tmp_path / "audit.db",
            "PKD_MILVUS_TOKEN_FILE": tmp_path / "token",
            "PKD_MASTER_KEY_FILE": tmp_path / "master",
            "PKD_MILVUS_SHARDS": 2,
            "PKD_ENROL_SHARPNESS": 0,
            "PKD_SWEEP_SECONDS": 0.5,
            ROOTS: tmp_path / "cert.pem",
        }
        with serving("--workers", 2, **settings) as server, Client(server.url) as client:
            client.create_gallery("staff")
            people = made.crops(PEOPLE, seed=3)
            for number, crop in enumerate(people):
                client.enrol("staff", f"p{number}", made.png(crop), aligned=True)
            looking = student.embed(people[:1])[0]
            ask = {"query": {"embedding": looking.tolist(), "encoder": student.info.id}}

            def first() -> str:
                answer = server.ask("POST", "/v1/galleries/staff/identify", json=ask)
                assert answer.status_code == 200, answer.text
                return str(answer.json()["candidates"][0]["subject"])

            until(lambda: first() == "p0")
            seen = operator.answered("verify")  # beside a server that runs
            assert (seen["galleries"], seen["subjects"], seen["templates"]) == (1, PEOPLE, PEOPLE)
            receipt = client.delete_subject("staff", "p0")
            assert list(receipt.covers) == ["rows", "index"]
            until(lambda: first() != "p0")
            assert all(first() != "p0" for _ in range(8))  # whichever worker
            operator.answered("verify", "--noted", f"{receipt.sequence}:{receipt.hash}")
            server.stop()
        file = tmp_path / "staff.jsonl"
        assert operator.answered("export", "staff", file)["subjects"] == PEOPLE - 1
        assert operator.answered("import", file, store=tmp_path / "sqlite")["templates"] == PEOPLE - 1
        assert operator.answered("import", file)["there_already"] == PEOPLE - 1
        assert operator.answered("import", file, "--gallery", "again")["templates"] == PEOPLE - 1
        assert operator.answered("rekey", "--new-key", tmp_path / "next")["galleries"] == 2
        assert "does not decrypt" in operator.answered("verify", code=4)
        assert operator.answered("verify", key="next")["templates"] == 2 * (PEOPLE - 1)
        (tmp_path / "cert.pem").write_bytes((tmp_path / "key.pem").read_bytes())  # no certificate
        assert "Milvus cannot be reached" in operator.answered("verify", key="next", code=1)
