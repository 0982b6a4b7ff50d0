"""What the documentation says survives a loss of power is flushed to the disk: calls of fsync are counted.

A library that is loaded before the C library's (LD_PRELOAD) notes which file each call is about, so that those of
SQLite are counted too, which Python does not see.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest

from opensan.checkpoints import save_folder

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include <fcntl.h>
#include <string.h>
static void note(int descriptor) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 2);
    int log = open(getenv("FLUSHED"), O_WRONLY | O_APPEND | O_CREAT, 0600);
    if (length < 0 || log < 0) return;
    path[length] = '\n';
    if (write(log, path, length + 1) < 0) abort();
    close(log);
}
int fsync(int descriptor) {
    note(descriptor);
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(descriptor);
}
int fdatasync(int descriptor) {
    note(descriptor);
    return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(descriptor);
}
"""

WORK = """
import sys
from pathlib import Path
import numpy as np
import opensan
from opensan.files import write_text
from opensan.images import list_images
from opensan.jobs.folder import FolderRun, plan
from opensan.jobs.strips import StripFile
from opensan.journal import Journal
from opensan.train.checkpoint import CheckpointFolder
from opensan.vocabulary import Vocabulary

model, top = map(Path, sys.argv[1:])
words = Vocabulary.parse("road, sky")
with FolderRun(opensan.load(model), words, plan(list_images([top / "in"]), [top / "in"]), top / "out", ["png"]) as run:
    assert len(list(run.results())) == 3
with StripFile(top / "strips", {"words": 2}, [(0, 1), (1, 2)], 4) as strips:
    strips.append(np.zeros((1, 4), int))
    strips.append(np.zeros((1, 4), int))
with Journal(top / "journal") as journal:
    for number in range(5):
        journal.put(str(number), {})
CheckpointFolder(top / "checkpoints", 2).save({"step": 1}, 1)
(top / "texts").mkdir()
write_text(top / "texts" / "a.txt", "a")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="LD_PRELOAD is Linux's")
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_what_is_promised_to_survive_is_flushed(small_model, tmp_path):
    from PIL import Image

    (tmp_path / "shim.c").write_text(SHIM)
    build = ["cc", "-shared", "-fPIC", "-o", tmp_path / "shim.so", tmp_path / "shim.c", "-ldl"]
    subprocess.run(build, check=True, capture_output=True)
    (tmp_path / "in").mkdir()
    for number in range(3):
        Image.new("RGB", (64, 48), (40 * number, 90, 0)).save(tmp_path / "in" / f"{number}.png")
    model = save_folder(small_model, tmp_path / "model")
    environment = os.environ | {"LD_PRELOAD": str(tmp_path / "shim.so"), "FLUSHED": str(tmp_path / "flushed")}
    subprocess.run([sys.executable, "-c", WORK, model, tmp_path], env=environment, check=True)
    flushed = [line.removeprefix(f"{tmp_path}/") for line in (tmp_path / "flushed").read_text().splitlines()]

    def count(pattern: str) -> int:
        return sum(re.fullmatch(pattern, path) is not None for path in flushed)

    temporary = r"\.[0-9a-f]{8}\.part"
    assert [count(rf"out/\.{number}\.labels{temporary}\.png") for number in range(3)] == [1, 1, 1]
    assert count("out") >= 3  # their names, and the ledger's journal
    assert count(r"out/manifest\.sqlite") >= 4  # the settings, and each image's row
    assert count("strips") >= 3 and count("journal") >= 6  # a table, and each row
    assert count(r"journal-journal") >= 5  # what a commit is rolled back by, before it begins
    assert count(rf"checkpoints/\.step-00000001-[0-9a-f]{{16}}{temporary}\.pt") == 1 and count("checkpoints") == 1
    assert count(rf"texts/\.a{temporary}\.txt") == 1 and count("texts") == 1
