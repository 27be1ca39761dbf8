"""Everything that runs on a GPU, once: training with views on the device, the frozen head, heads, export, server.

Run as: python benchmarks/gpu.py                     (under nine minutes on a GPU; a thousandth of the size without one)
        python benchmarks/gpu.py --input FOLDER      (faces.tar, teacher.onnx and student.onnx of --pack)
        python benchmarks/gpu.py --pack FOLDER --faces LIST --teacher T.onnx --student S.onnx   (at most 60 MB)

Without --input the faces are procedural and the teacher is a network with random weights: figures are then of speed and
agreement only, not of accuracy. A stage that cannot run here (no GPU, no package) is recorded with the reason, one that
fails with its error and exit code 1; the others go on. Writes the JSON of --out, on a GPU benchmarks/results/gpu.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from pkd.toolkit.cli.distill import main as pkd_distill
from pkd.toolkit.core.gpu import find_gpu
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.distill.heads.audit import nearest_other
from pkd.toolkit.distill.heads.duplicates import neighbours
from pkd.toolkit.distill.heads.ema import EmaHead
from pkd.toolkit.distill.heads.fit import fit_head
from pkd.toolkit.distill.heads.frozen_softmax import FrozenHead, frozen_cross_entropy
from pkd.toolkit.distill.heads.head import class_means
from pkd.toolkit.distill.heads.margin import Margin
from pkd.toolkit.distill.losses.feature import adapters
from pkd.toolkit.distill.losses.inputs import Bank, LossInputs, StagePair
from pkd.toolkit.distill.losses.registry import METHODS
from pkd.toolkit.encoders.base import PROVIDERS
from pkd.toolkit.synthetic.faces import write_faces

RESULT = Path(__file__).resolve().parent / "results" / "gpu.json"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RECIPE = ["--method", "l2kd+infonce:0.1", "--ema", "0.999", "--augment", "0.3", "--clip-norm", "5"]
"""Options of the training; --set replaces and adds."""
PACK_BYTES = 60_000_000
MARGIN = Margin.parse("arcface:0.5")
Report = dict[str, Any]


class CannotRun(Exception):
    """A stage has nothing to run on here."""


@dataclass
class Bench:
    """Hold what the stages share. ``scale``: 1 for a GPU's full size."""

    scale: float
    minutes: float
    folder: Path
    options: Sequence[str] = ()
    faces: list[str] = field(default_factory=list)
    teacher: list[str] = field(default_factory=list)
    student: list[str] = field(default_factory=list)

    def count(self, full: int, least: int) -> int:
        """Scale a number of rows, images or steps."""
        return max(least, round(full * self.scale))

    @property
    def run(self) -> Path:
        """The run that export and server go on with."""
        return self.folder / "run"


def main(argv: Sequence[str] | None = None) -> int:
    """Run all stages and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0 if DEVICE.type == "cuda" else 0.001)
    parser.add_argument("--minutes", type=float, help="of training; by default 3 times the scale")
    parser.add_argument("--input", type=Path, help="folder made by --pack")
    parser.add_argument("--out", type=Path, default=RESULT if DEVICE.type == "cuda" else None)
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--set", nargs=argparse.REMAINDER, default=[], help="further options of pkd-distill, last")
    parser.add_argument("--pack", type=Path, help="make this input folder instead")
    parser.add_argument("--faces", nargs="+", help="for --pack: as of pkd-distill")
    parser.add_argument("--teacher", type=Path, help="for --pack: ONNX file, its .preprocess.json beside it")
    parser.add_argument("--student", type=Path, help="for --pack: ONNX file to adopt, its .preprocess.json beside it")
    args = parser.parse_args(argv)
    if args.pack:
        print(pack(args.pack, args.faces, args.teacher, args.student))
        return 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pkd-gpu-") as name:
        minutes = args.minutes if args.minutes is not None else 3 * args.scale
        bench = Bench(args.scale, minutes, Path(name), [*RECIPE, *args.set])
        gather_input(bench, args.input)
        stages = {stage: attempt(STAGES[stage], bench) for stage in STAGES if stage in args.only}
    report = {"scale": args.scale, "input": bool(args.input), "seconds": time.monotonic() - began, "stages": stages}
    text = json.dumps(report, indent=2) + "\n"
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
    print(text, end="")
    return int(any("error" in stage for stage in stages.values()))


def attempt(stage: Callable[[Bench], Report], bench: Bench) -> Report:
    """Run one stage: its figures and seconds, or why there are none."""
    began = time.monotonic()
    try:
        found = stage(bench)
    except CannotRun as reason:
        found = {"skipped": str(reason)}
    except Exception as error:  # the others still tell something
        traceback.print_exc(file=sys.stderr)
        found = {"error": f"{type(error).__name__}: {error}"}
    return found | {"seconds": round(time.monotonic() - began, 2)}


def pack(folder: Path, faces: Sequence[str], teacher: Path, student: Path) -> str:
    """Make an input folder: both models, and as many crops as fit into PACK_BYTES, of every identity alike."""
    folder.mkdir(parents=True, exist_ok=True)
    left = PACK_BYTES - 1_000_000
    for model, name in ((teacher, "teacher"), (student, "student")):
        for suffix in (".onnx", ".preprocess.json"):
            source = model.with_suffix(suffix)
            left -= shutil.copyfile(source, folder / f"{name}{suffix}").stat().st_size
    found = FaceSet.read(*faces)
    size, turn = found.crop_size(), np.zeros(len(found), np.int64)
    for label in range(len(found.identities)):  # first images of all, then second ones
        mine = np.flatnonzero(found.labels == label)
        turn[mine] = np.arange(len(mine))
    count = 0
    with tarfile.open(folder / "faces.tar", "w") as tar:
        for index in np.argsort(turn, kind="stable"):
            crop = found.load([int(index)], size)[0]
            data = cv2.imencode(".jpg", crop[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
            left -= 1024 + len(data)
            if left < 0:
                break
            entry = tarfile.TarInfo(f"{found.identities[found.labels[index]]}/{index}.jpg")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
            count += 1
    return f"{folder}: {count:,} of {len(found):,} crops, {PACK_BYTES - left:,} bytes at most"


def gather_input(bench: Bench, given: Path | None) -> None:
    """Set faces, teacher and student: the given ones, or procedural faces and a teacher of random weights."""
    if given:
        bench.faces = [str(given / "faces.tar")]
        bench.teacher, bench.student = [str(given / "teacher.onnx")], [str(given / "student.onnx")]
        return
    write_faces(bench.folder / "faces", 0, bench.count(1000, 4), 6)
    write_teacher(bench.folder / "teacher.onnx", FaceSet.read(bench.folder / "faces"))
    bench.faces, bench.teacher = [str(bench.folder / "faces")], [str(bench.folder / "teacher.onnx")]
    bench.student = ["mobilefacenet-relu:0.5" if bench.scale >= 0.1 else "mobilefacenet-relu:0.125"]


def write_teacher(path: Path, faces: FaceSet) -> None:
    """Write a teacher of random weights: small pictures without their mean, projected to 128 values."""
    import onnx
    from onnx import TensorProto, helper

    crops = faces.load(np.linspace(0, len(faces) - 1, min(len(faces), 512)).astype(np.int64), 112)
    small = Preprocess()(crops).reshape(-1, 3, 8, 14, 8, 14).mean(axis=(3, 5)).reshape(len(crops), -1)
    weights = np.random.default_rng(0).normal(size=(192, 128)).astype(np.float32)
    shift = -small.mean(axis=0) @ weights
    nodes = [
        helper.make_node("AveragePool", ["x"], ["pooled"], kernel_shape=[14, 14], strides=[14, 14]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weights", "shift"], ["y"]),
    ]
    pixels = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 112, 112])
    embeddings = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 128])
    tensors = [onnx.numpy_helper.from_array(values, name) for name, values in (("weights", weights), ("shift", shift))]
    graph = helper.make_graph(nodes, "teacher", [pixels], [embeddings], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    path.with_suffix(".preprocess.json").write_text(Preprocess().model_dump_json(), encoding="utf-8")


def machine(bench: Bench) -> Report:
    """Name the device and what can be used of it."""
    gpu = find_gpu()
    found: Report = {"torch": torch.__version__, "device": DEVICE.type, "cores": os.cpu_count()}
    if gpu is not None:
        found |= {"gpu": gpu.name, "capability": gpu.capability, "cuda": torch.version.cuda}
    import onnxruntime

    return found | {"onnxruntime": onnxruntime.__version__, "providers": onnxruntime.get_available_providers()}


def losses(bench: Bench) -> Report:
    """Compare every method's loss and gradient on the device, float32, with the CPU's in float64."""
    found: Report = {}
    for name, method in METHODS.items():
        if name == "map":  # fits and has no loss
            continue
        exact, exact_gradient = loss_and_gradient(method.loss, batch_of(torch.device("cpu"), torch.float64))
        loss, gradient = loss_and_gradient(method.loss, batch_of(DEVICE, torch.float32))
        error = float((gradient - exact_gradient).norm() / exact_gradient.norm().clamp_min(1e-12))
        found[name] = {"loss": abs(loss / exact - 1), "gradient": error}
        if not error < 1e-2:
            raise AssertionError(f"{name}: the gradient on {DEVICE} is {error:.1e} from that of the CPU")
    return {"relative_deviation": found}


def loss_and_gradient(loss: Callable[[LossInputs], Tensor], inputs: LossInputs) -> tuple[float, Tensor]:
    """Return a loss and its gradient for the embeddings, or for the features where it reads these alone."""
    value = loss(inputs)
    leaves = [inputs.embeddings, *(pair.student for pair in inputs.stages)]
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    kept = [grad.detach().double().cpu().flatten() for grad in gradients if grad is not None]
    return float(value.detach()), torch.cat(kept)


def batch_of(device: torch.device, dtype: torch.dtype) -> LossInputs:
    """Make the same batch with everything in it on any device."""
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(device, dtype)

    count, classes, dim = 32, 50, 64
    labels = torch.randint(0, classes, (count,), generator=random).to(device)
    centres = normalize(noise(classes, dim))
    channels, sides = [(8, 12), (12, 8)], [8, 4]
    torch.manual_seed(0)
    layers = nn.ModuleDict({name: adapters(name, channels) for name in ("fitnets", "fsp")}).to(device, dtype)
    pairs = [
        StagePair(noise(count, c, side, side).requires_grad_(), noise(count, d, side, side))
        for (c, d), side in zip(channels, sides, strict=True)
    ]
    numbers = torch.arange(count, device=device)
    return LossInputs(
        embeddings=noise(count, dim).requires_grad_(), labels=labels, margin=MARGIN, scale=16.0,
        teacher=normalize(noise(count, dim)), head=FrozenHead(centres), ema_head=EmaHead(centres),
        trained=normalize(noise(classes, dim)), images=numbers, people=labels,
        bank=Bank(normalize(noise(300, dim)), torch.arange(1000, 1300, device=device),
                  torch.randint(0, classes, (300,), generator=random).to(device)),
        stages=tuple(pairs), adapters=layers,
    )  # fmt: skip


def frozen_head(bench: Bench) -> Report:
    """Measure the streaming head against code that holds all logits, and its error against float64 on the CPU."""
    found: Report = {}
    batch, dim = (128, 512) if bench.scale >= 0.1 else (16, 64)
    random = torch.Generator().manual_seed(0)
    for full in (100_000, 1_000_000):
        classes = bench.count(full, 100)
        centres = normalize(torch.randn(classes, dim, generator=random))
        labels = torch.randint(0, classes, (batch,), generator=random)
        start = torch.randn(batch, dim, generator=random)
        rows: Report = {}
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            head, mine = centres.to(DEVICE, dtype), labels.to(DEVICE)

            def streaming(x: Tensor, head: Tensor = head, mine: Tensor = mine) -> Tensor:
                return frozen_cross_entropy(x, head, mine, MARGIN, 64.0)

            def plain(x: Tensor, head: Tensor = head, mine: Tensor = mine) -> Tensor:
                cosines = (normalize(x).to(head.dtype) @ head.T).float()
                at = torch.arange(len(mine), device=mine.device)
                return cross_entropy(64 * cosines.index_put((at, mine), MARGIN(cosines[at, mine])), mine)

            for kind, loss in (("streaming", streaming), ("plain", plain)):
                rows[f"{kind}_{name}"] = timed(loss, start.to(DEVICE))
            if full == 100_000:
                exact = head_gradient(start[:8].double(), centres.to(dtype).double(), labels[:8])
                error = float((head_gradient(start[:8].to(DEVICE), head, mine[:8]).double().cpu() - exact).norm())
                error /= float(exact.norm())
                rows[f"error_{name}"] = error
                if not error < (1e-4 if name == "fp32" else 3e-2):
                    raise AssertionError(f"{name}: the gradient is {error:.1e} from the exact one")
        found[f"{classes} classes"] = rows
    return found


def head_gradient(start: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of the streaming loss."""
    return gradient_of(lambda x: frozen_cross_entropy(x, head, labels, MARGIN, 64.0), start)


def gradient_of(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Return the gradient of a loss at ``start``."""
    x = start.clone().requires_grad_()
    return torch.autograd.grad(loss(x), x)[0]


def timed(loss: Callable[[Tensor], Tensor], start: Tensor, turns: int = 5) -> Report:
    """Measure forward and backward: median milliseconds, and MiB on the device beside what was there before."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
    seconds = []
    for _ in range(turns + 1):
        began = time.perf_counter()
        gradient_of(loss, start)
        synchronise()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() - before if DEVICE.type == "cuda" else None
    return {"ms": statistics.median(seconds[1:]) * 1e3, "mib": None if peak is None else peak / 2**20}


def synchronise() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def heads(bench: Bench) -> Report:
    """Fit, audit and search duplicates on the device, and hold the results against numpy."""
    random = np.random.default_rng(0)
    classes, each, dim = bench.count(20_000, 60), 5, 128
    centres = random.normal(size=(classes, dim)).astype(np.float32)
    centres[1] = centres[0] + 0.1 * random.normal(size=dim).astype(np.float32)  # one person under two names
    labels = np.repeat(np.arange(classes), each)
    plain, mirrored = (unit(centres[labels] + 0.7 * random.normal(size=(len(labels), dim))) for _ in range(2))
    means = class_means(plain, mirrored, labels, tuple(map(str, range(classes))))
    sample = random.choice(len(labels), 50, replace=False)
    best, _ = nearest_other(means, plain, sample, labels[sample])
    cosines = plain[sample] @ means.centres.numpy().T
    cosines[np.arange(50), labels[sample]] = -2
    error = float(np.abs(best - cosines.max(axis=1)).max())
    near = neighbours(means.centres)
    fitted = fit_head(means, plain, mirrored, labels, 0)
    gain = [float((plain[sample] @ head.centres.numpy().T).argmax(axis=1).__eq__(labels[sample]).mean())
            for head in (means, fitted)]  # fmt: skip
    if error > 1e-3 or (int(near.first[0]), int(near.second[0])) != (0, 1):
        raise AssertionError(f"cosines differ by {error:.1e}; nearest classes {near.first[0]}, {near.second[0]}")
    return {"classes": classes, "cosine_error": error, "own_is_nearest": {"means": gain[0], "fit": gain[1]}}


def unit(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Normalise rows to float32."""
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def training(bench: Bench) -> Report:
    """Train by the command: views from the CPU's threads, views on the device, and the run that is kept."""
    views = bench.count(8, 2)
    found: Report = {"views": views}
    batch = ["--batch", str(bench.count(256, 8))]
    steps = bench.count(200, 3)
    for name, more in {
        "new views": [],
        "stored views": ["--views", str(views)],
        "views on the device": ["--views", str(views), "--views-in-memory"],
        "float32": ["--views", str(views), "--views-in-memory", "--precision", "fp32"],
        "live teacher": ["--teacher-live"],
        "frozen head": ["--method", "proxylesskd+l2kd", "--views", str(views)],
        "EMA head": ["--method", "adadistill"],
        "own classifier": ["--method", "none"],
    }.items():
        few = max(3, steps // 10) if name == "live teacher" else steps
        out = bench.folder / name.replace(" ", "-")
        distil(bench, out, [*batch, "--steps", str(few), *more])
        found[name] = {"images_per_second": rate(out, int(batch[1]))}
    kept = [*batch, "--views", str(views), "--views-in-memory"]
    kept += ["--max-minutes", str(bench.minutes)] if bench.scale >= 0.1 else ["--steps", "6"]
    result = distil(bench, bench.run, kept)
    report = bench.run / "report.json"
    checked = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    checked.pop("map", None)
    return found | {"kept": {key: result[key] for key in ("method", "parameters", "steps", "cosine")} | checked}


def distil(bench: Bench, out: Path, options: Sequence[str]) -> Report:
    """Run pkd-distill --json in this process. Raises AssertionError with what it said where it fails."""
    given = [
        "--faces", *bench.faces, "--teacher", *bench.teacher, "--student", *bench.student, "--out", str(out),
        "--cache", str(bench.folder / "cache"), *bench.options, *options, "--json",
    ]  # fmt: skip
    result = called(pkd_distill, given)
    return dict(json.loads(result))


def called(command: Callable[[Sequence[str]], int], options: Sequence[str], *, allowed: Sequence[int] = (0,)) -> str:
    """Run a command in this process and return its output. Raises AssertionError where its exit code is another."""
    said, failed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(failed):
        code = command(options)
    if code not in allowed:
        raise AssertionError(f"{' '.join(options)}: exit code {code}: {failed.getvalue()[-1000:]}")
    return said.getvalue()


def rate(run: Path, batch: int) -> float:
    """Read the images a second of a run: its median step after the first tenth."""
    lines = (run / "log.csv").read_text(encoding="utf-8").splitlines()
    column = lines[0].split(",").index("images_per_second")
    rates = [float(line.split(",")[column]) for line in lines[1:]]
    return statistics.median(rates[len(rates) // 10 :])


def export(bench: Bench) -> Report:
    """Export the run: onnx in float32 and float16, then TensorRT where it is installed."""
    if not (bench.run / "student.pt").is_file():
        raise CannotRun("the training left no run")
    if importlib.util.find_spec("onnx") is None:
        raise CannotRun("onnx is not installed: pip install pkd[export]")
    from pkd.export.cli import main as pkd_export

    options = [str(bench.run), "-o", str(bench.folder / "bundle"), "--precision", "fp32", "fp16", "--json"]
    made = json.loads(called(pkd_export, options))
    found: Report = {"targets": [target["name"] for target in made["targets"]]}
    if find_gpu() is None or not any(importlib.util.find_spec(name) for name in ("tensorrt", "tensorrt_rtx")):
        return found | {"tensorrt": "no GPU, or neither tensorrt nor tensorrt_rtx is installed"}
    trt = ["--from-bundle", str(bench.folder / "bundle"), "--trt", "--precision", "fp16", "--bench", "--json"]
    return found | {"tensorrt": json.loads(called(pkd_export, trt, allowed=(0, 3)))}


def memory(bench: Bench) -> Report:
    """Copy bytes to the device and back through the server's own buffers."""
    if find_gpu() is None:
        raise CannotRun("no GPU")
    if importlib.util.find_spec("cuda") is None:
        raise CannotRun("cuda-bindings is not installed: pip install pkd[trt]")
    from pkd.toolkit.encoders.cuda_buffers import CudaMemory, call, enter_device

    sent = np.random.default_rng(0).integers(0, 256, 4096 * 4).astype(np.uint8)
    buffers = CudaMemory(len(sent), 4096)
    buffers.upload(sent)
    call(enter_device(), "cuMemcpyDtoDAsync", buffers.device_out, buffers.device_in, len(sent), buffers.stream)
    if not np.array_equal(buffers.download(64, 64).view(np.uint8).reshape(-1), sent):
        raise AssertionError("what came back is not what was sent")
    return {"bytes": len(sent)}


def server(bench: Bench) -> Report:
    """Serve the bundle and ask for embeddings, on the GPU where a runtime for it is installed."""
    if not (bench.folder / "bundle").is_dir():
        raise CannotRun("there is no bundle")
    for name in ("fastapi", "uvicorn", "httpx"):
        if importlib.util.find_spec(name) is None:
            raise CannotRun(f"{name} is not installed: pip install pkd[serve,client]")
    import onnxruntime

    on_gpu = find_gpu() is not None and PROVIDERS["cuda"] in onnxruntime.get_available_providers()
    crop = FaceSet.read(*bench.faces).load([0], 112)[0]
    body = cv2.imencode(".png", crop[:, :, ::-1])[1].tobytes()
    with serving(bench.folder / "bundle", "cuda" if on_gpu else "cpu") as url:
        import httpx

        seconds = []
        for _ in range(bench.count(500, 5)):
            began = time.perf_counter()
            answer = httpx.post(f"{url}/v1/embed?aligned=true", content=body, headers={"Content-Type": "image/png"})
            answer.raise_for_status()
            seconds.append(time.perf_counter() - began)
    return {"device": "cuda" if on_gpu else "cpu", "ms": statistics.median(seconds) * 1e3}


@contextlib.contextmanager
def serving(bundle: Path, device: str) -> Iterator[str]:
    """Start pkd-serve on a free port; yields its address, and ends it."""
    command = [sys.executable, "-m", "pkd.serving.cli.serve", str(bundle), "--port", "0", "--device", device]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            said = []
            for line in process.stderr or ():
                said.append(line)
                if line.startswith("listening on "):
                    yield line.split()[2].replace("0.0.0.0", "127.0.0.1")
                    return
            raise AssertionError("pkd-serve did not start: " + "".join(said)[-1000:])
        finally:
            process.terminate()


STAGES: dict[str, Callable[[Bench], Report]] = {
    "machine": machine,
    "losses": losses,
    "frozen_head": frozen_head,
    "heads": heads,
    "training": training,
    "export": export,
    "memory": memory,
    "server": server,
}

if __name__ == "__main__":
    raise SystemExit(main())
