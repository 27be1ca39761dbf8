"""The cache: every vector computed once, torn files survived, two processes at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.core.errors import BadImage, InputError
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.encoders.embed import default_cache, embed_faces
from pkd.toolkit.images.codec import write_rgb

DIM = 6


class Grid:
    """A real encoder without a network: the means of six cells, of unit length. Counts what it is asked."""

    info = describe("grid", "teacher", "0" * 64, Preprocess(size=8), DIM)

    def __init__(self) -> None:
        self.seen = 0

    def embed(self, crops: np.ndarray) -> np.ndarray:
        self.seen += len(crops)
        cells = crops.reshape(len(crops), 2, 4, 8, 3).mean(axis=(2, 3)).reshape(len(crops), DIM) + 1
        cells[:, 0] += crops[:, :, :4].mean(axis=(1, 2, 3))  # so that the mirror image differs
        return (cells / np.linalg.norm(cells, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def faces(tmp_path: Path) -> FaceSet:
    noise = np.random.default_rng(0)
    for i in range(70):
        (tmp_path / f"faces/p{i % 7}").mkdir(parents=True, exist_ok=True)
        write_rgb(tmp_path / f"faces/p{i % 7}/{i}.png", noise.integers(0, 256, (8, 8, 3), np.uint8))
    return FaceSet.read(tmp_path / "faces")


def direct(faces: FaceSet, flip: bool = False) -> np.ndarray:
    crops = faces.load(np.arange(len(faces)), 8)
    return Grid().embed(crops[:, :, ::-1] if flip else crops)


@pytest.mark.parametrize("jobs", [1, 3])
def test_rows_are_in_order_and_counted(faces: FaceSet, jobs: int) -> None:
    steps: list[int] = []
    np.testing.assert_array_equal(embed_faces(Grid(), faces, jobs=jobs, advance=steps.append), direct(faces))
    assert sum(steps) == len(faces)


def test_each_vector_is_computed_once(faces: FaceSet, tmp_path: Path) -> None:
    cache = tmp_path / "deep/cache"
    embed_faces(Grid(), faces.select(np.arange(10)), cache=cache)
    encoder = Grid()
    steps: list[int] = []
    np.testing.assert_array_equal(embed_faces(encoder, faces, cache=cache, advance=steps.append), direct(faces))
    assert (encoder.seen, sum(steps)) == (60, 70)
    again = Grid()
    np.testing.assert_array_equal(embed_faces(again, faces, cache=cache), direct(faces))
    assert again.seen == 0


def test_mirror_images_are_kept_apart(faces: FaceSet, tmp_path: Path) -> None:
    for _ in range(2):
        plain = embed_faces(Grid(), faces, cache=tmp_path / "cache")
        mirrored = embed_faces(Grid(), faces, flip=True, cache=tmp_path / "cache")
        np.testing.assert_array_equal(plain, direct(faces))
        np.testing.assert_array_equal(mirrored, direct(faces, flip=True))
    assert (plain != mirrored).any()


def test_a_changed_image_is_computed_again(faces: FaceSet, tmp_path: Path) -> None:
    embed_faces(Grid(), faces, cache=tmp_path / "cache")
    write_rgb(faces.path(3), np.full((8, 8, 3), 9, np.uint8))
    fresh = FaceSet.read(tmp_path / "faces")
    encoder = Grid()
    np.testing.assert_array_equal(embed_faces(encoder, fresh, cache=tmp_path / "cache"), direct(fresh))
    assert encoder.seen == 1


@pytest.mark.parametrize("suffix", ["keys", "f32"])
@pytest.mark.parametrize("cut", [1, 7, 8, 9, 23, 24, 25, 100, 10_000])
def test_a_torn_tail_costs_only_what_was_torn(faces: FaceSet, tmp_path: Path, suffix: str, cut: int) -> None:
    """Killed while writing: either file may end anywhere."""
    cache = tmp_path / "cache"
    embed_faces(Grid(), faces, cache=cache)
    (file,) = cache.glob(f"*.{suffix}")
    file.write_bytes(file.read_bytes()[: max(0, file.stat().st_size - cut)])
    for _ in range(2):
        np.testing.assert_array_equal(embed_faces(Grid(), faces, cache=cache), direct(faces))
    last = Grid()
    embed_faces(last, faces, cache=cache)
    assert last.seen == 0


def test_two_processes_share_a_cache(faces: FaceSet, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[1])\n"
        "from test_embed import Grid, embed_faces, FaceSet\nimport numpy as np\n"
        "faces = FaceSet.read(sys.argv[2])\norder = np.random.default_rng(int(sys.argv[4])).permutation(len(faces))\n"
        "for part in np.array_split(order, 20):\n"
        "    embed_faces(Grid(), faces.select(part), cache=Path(sys.argv[3]), jobs=2)\n"
    )
    here, data, cache = Path(__file__).parent, tmp_path / "faces", tmp_path / "cache"
    running = [subprocess.Popen([sys.executable, "-c", program, here, data, cache, str(seed)]) for seed in (1, 2)]
    assert [process.wait(120) for process in running] == [0, 0]
    encoder = Grid()
    np.testing.assert_array_equal(embed_faces(encoder, faces, cache=cache), direct(faces))
    assert encoder.seen == 0


def test_a_corrupt_image_stops_the_run_with_its_name(faces: FaceSet, tmp_path: Path) -> None:
    faces.path(50).write_bytes(b"x")
    with pytest.raises(BadImage, match=faces.names[50]):
        embed_faces(Grid(), faces, cache=tmp_path / "cache")


def test_a_cache_that_cannot_be_made(faces: FaceSet, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="Pass --cache DIR or set PKD_CACHE"):
        embed_faces(Grid(), faces, cache=tmp_path / "file")


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PKD_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("PKD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "pkd"
