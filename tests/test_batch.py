"""Files and folders: what is paired with what, where results go, and that nothing is lost or piled up."""

import errno
import itertools
import os
import struct
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from ddrf_fast import batch
from ddrf_fast.data import count_pixels, read_image, write_image


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(root / name, np.zeros((4, 5), np.uint8))


def planned(root, sources, output="out", **options):
    """{output: inputs} of a plan, relative to the root, and what is unpaired."""
    found = batch.plan([f"{root}/{source}" for source in sources], f"{root}/{output}", **options)
    jobs = {
        job.output.relative_to(root).as_posix(): [path.relative_to(root).as_posix() for path in job.inputs]
        for job in found.jobs
    }
    return jobs, [line.replace(f"{root}/", "") for line in found.unpaired]


# --- plans -------------------------------------------------------------------------------------------------


def test_folders_inside_of_folders_are_searched_when_asked(tmp_path):
    touch(
        tmp_path, "vis/a.jpg", "vis/day/a.png", "vis/day/b.png", "ir/a.png", "ir/day/a.tif", "ir/night/b.png"
    )
    touch(tmp_path, "vis/.hidden/a.png", "ir/.hidden/a.png")
    (tmp_path / "vis/day/notes.txt").write_text("no image")
    assert planned(tmp_path, ("vis", "ir")) == ({"out/a.png": ["vis/a.jpg", "ir/a.png"]}, [])
    jobs, unpaired = planned(tmp_path, ("vis", "ir"), recursive=True)
    assert jobs == {
        "out/a.png": ["vis/a.jpg", "ir/a.png"],
        "out/day/a.png": ["vis/day/a.png", "ir/day/a.tif"],
    }
    assert unpaired == ["vis/day/b.png: no day/b.* in ir", "ir/night/b.png: no night/b.* in vis"]


def test_results_among_the_inputs_are_no_inputs_the_next_time(tmp_path):
    touch(tmp_path, "vis/day/a.png", "ir/day/a.png", "vis/out/day/a.png")
    jobs, unpaired = planned(tmp_path, ("vis", "ir"), "vis/out", recursive=True)
    assert jobs == {"vis/out/day/a.png": ["vis/day/a.png", "ir/day/a.png"]}
    assert unpaired == []


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (("*_vis.png", "*_ir.tif"), {"out/a_vis.png": ["a_vis.png", "a_ir.tif"]}),
        (("*/vis.png", "*/ir.*"), {"out/s1/vis.png": ["s1/vis.png", "s1/ir.png"]}),
        (("**/*_v.png", "**/*_t.png"), {"out/x/y/a_v.png": ["x/y/a_v.png", "x/y/a_t.png"]}),
        (("n[0-3]v*", "n[!9]t*"), {"out/n1v7.png": ["n1v7.png", "n1t7.png"]}),
        (("day?.v1.png", "day?.v2.png"), {"out/day1.v1.png": ["day1.v1.png", "day1.v2.png"]}),
        (("vis", "ir/*.png"), {"out/b.png": ["vis/b.png", "ir/b.png"]}),
    ],
)
def test_patterns_pair_what_their_wildcards_stand_for(tmp_path, patterns, expected):
    touch(tmp_path, "a_vis.png", "a_ir.tif", "s1/vis.png", "s1/ir.png", "x/y/a_v.png", "x/y/a_t.png")
    touch(tmp_path, "n1v7.png", "n1t7.png", "day1.v1.png", "day1.v2.png", "vis/b.png", "ir/b.png")
    assert planned(tmp_path, patterns) == (expected, [])


def test_a_file_may_be_called_like_a_pattern(tmp_path):
    touch(tmp_path, "a[1].png", "b[1].png")
    assert planned(tmp_path, ("a[1].png", "b[1].png"))[0] == {"out/a[1].png": ["a[1].png", "b[1].png"]}


def test_names_and_formats_of_results(tmp_path):
    touch(tmp_path, "vis/a.jpg", "vis/b.tiff", "ir/a.png", "ir/b.png")
    assert list(planned(tmp_path, ("vis", "ir"), suffix="_f", extension="auto")[0]) == [
        "out/a_f.jpg",
        "out/b_f.tiff",
    ]
    assert list(planned(tmp_path, ("vis", "ir"), extension=".webp")[0]) == ["out/a.webp", "out/b.webp"]
    assert list(planned(tmp_path, ("vis",), "out/")[0]) == ["out/a.png", "out/b.png"]


@pytest.mark.parametrize(
    ("sources", "output", "message"),
    [
        (("vis", "missing"), "out", "missing does not exist"),
        (("vis", "none*.png"), "out", "no image in .*vis and .*none"),
        (("empty",), "out", "no image in .*empty"),
        (("vis", "ir/a.png"), "out", "two files or two folders"),
        (("vis/*", "ir/a.png"), "out", "two files or two folders"),
        (("double",), "out", "a.jpg and .*a.png have one name"),
        (("vis", "ir"), "ir/a.png", "must be a folder, but .*a.png is a file"),
        (("vis",), "vis", "is an input and would be replaced"),
        (("alone", "ir"), "alone", "alone/a_f.png is an input and would be replaced"),
        (("vis/a.png",), "a.xyz", "a.xyz has no known image format"),
        (("v*/a.png", "i*/a.png"), "out", "no image in"),
    ],
)
def test_plans_that_make_no_sense_are_named(tmp_path, sources, output, message):
    touch(tmp_path, "vis/a.png", "ir/a.png", "double/a.png", "double/a.jpg", "alone/a.png", "alone/a_f.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        planned(tmp_path, sources, output, suffix="_f" if output == "alone" else "")


def test_results_beside_the_inputs_are_left_where_they_are_skipped(tmp_path):
    touch(
        tmp_path, "vis/a.png", "vis/b.png", "vis/a_f.png", "vis/c_f.png", "ir/a.png", "ir/b.png", "ir/c_f.png"
    )
    with pytest.raises(ValueError, match=r"a_f\.png is an input and would be replaced"):
        planned(tmp_path, ("vis", "ir"), "vis", suffix="_f")
    jobs, unpaired = planned(tmp_path, ("vis", "ir"), "vis", suffix="_f", skip_existing=True)
    assert list(jobs) == ["vis/a_f.png", "vis/b_f.png", "vis/c_f_f.png"]
    assert unpaired == []


def test_links_that_lead_back_are_not_followed(tmp_path):
    touch(tmp_path, "vis/a.png", "vis/more/b.png", "elsewhere/c.png")
    for link, target in (("vis/loop", "."), ("vis/more/up", ".."), ("vis/other", "../elsewhere")):
        (tmp_path / link).symlink_to(target)
    assert list(planned(tmp_path, ("vis",), recursive=True)[0]) == [
        "out/a.png", "out/more/b.png", "out/other/c.png"
    ]  # fmt: skip


def test_shares_are_disjoint_and_complete(monkeypatch):
    shares = [batch.Share(rank, 3).of(range(10)) for rank in range(3)]
    assert sorted(itertools.chain(*shares)) == list(range(10))
    assert batch.Share.of_environment() == batch.Share()
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert batch.Share.of_environment() == batch.Share(1, 4, 1)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(ValueError, match="RANK must be below WORLD_SIZE, got 4 of 4"):
        batch.Share.of_environment()
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(ValueError, match="must be numbers"):
        batch.Share.of_environment()


# --- runs --------------------------------------------------------------------------------------------------


class Held:
    """How many requests there are at a time."""

    def __init__(self):
        self.now = self.most = 0
        self.lock = threading.Lock()

    def request(self, job):
        request = Request(job)
        self.add(1)
        weakref.finalize(request, self.add, -1)
        return request

    def add(self, number):
        with self.lock:
            self.now += number
            self.most = max(self.most, self.now)


class Request:
    """The name of a job as an image of a size by its first letter."""

    def __init__(self, job):
        self.name, self.key = job.name, job.name[0]


class Lengths:
    """Makes of each name an image as wide as it is long; of those of a group that hold an x, none."""

    def __init__(self):
        self.groups = []

    def compute(self, requests):
        self.groups.append([request.name for request in requests])
        if any("x" in request.name for request in requests):
            raise RuntimeError("an x")
        return [len(request.name) for request in requests]

    def finish(self, request, output):
        return np.full((2, output), ord(request.name[0]), np.uint8)


def jobs(root, names):
    return [batch.Job(name, (Path(name),), root / f"{name}.png") for name in names]


def test_one_that_fails_in_a_group_costs_the_others_nothing(tmp_path):
    work = Lengths()
    names = ["a1", "a2x", "a33", "b1", "b2", "c"]
    report = batch.run(jobs(tmp_path / "out", names), work, Request, verb="try", batch_size=3)
    assert work.groups == [["a1", "a2x", "a33"], ["a1"], ["a2x"], ["a33"], ["b1", "b2"], ["c"]]
    assert sorted(job.name for job in report.written) == ["a1", "a33", "b1", "b2", "c"]
    assert [(job.name, str(error)) for job, error in report.failures] == [("a2x", "an x")]
    assert read_image(tmp_path / "out" / "a33.png").shape == (2, 3)
    with pytest.raises(RuntimeError, match="an x"):
        batch.run(jobs(tmp_path / "out", names), work, Request, verb="try", stop_at_failure=True)


def test_few_images_are_held_however_many_there_are(tmp_path):
    def slow(job, request, image):
        time.sleep(0.001)
        batch.write_output(job, request, image)

    held = Held()
    names = [f"{index:03}" for index in range(150)]
    report = batch.run(
        jobs(tmp_path, names), Lengths(), held.request, verb="try", write=slow, workers=2, batch_size=4
    )
    assert len(report.written) == 150
    # Read ahead (2 + 4), one more that is being drawn, a group, and being written (2 * 2 and a group).
    assert held.most <= 6 + 1 + 4 + 4 + 4


def test_of_large_images_fewer_are_held(tmp_path):
    large = b"BM" + bytes(12) + struct.pack("<IiiHHIIiiII", 40, 12000, 9000, 1, 8, 0, 0, 0, 0, 256, 0)
    (tmp_path / "large.bmp").write_bytes(large)  # all that is asked of it is its header
    assert count_pixels(tmp_path / "large.bmp") == 12000 * 9000

    def slow(job, request, image):
        time.sleep(0.01)
        batch.write_output(job, request, image)

    held = Held()
    todo = [batch.Job(f"{i:02}", (tmp_path / "large.bmp",), tmp_path / f"{i:02}.png") for i in range(20)]
    report = batch.run(todo, Lengths(), held.request, verb="try", write=slow, workers=4)
    assert len(report.written) == 20
    assert held.most <= 4  # one read ahead, one computed, one written; and one that a thread lets go of


def test_existing_results_are_skipped_before_anything_is_read(tmp_path):
    touch(tmp_path, "b.png")
    read = []

    def prepare(job):
        read.append(job.name)
        return Request(job)

    report = batch.run(jobs(tmp_path, "abc"), Lengths(), prepare, verb="try", skip_existing=True)
    assert sorted(read) == ["a", "c"]
    assert [job.name for job in report.skipped] == ["b"]
    assert sorted(job.name for job in report.written) == ["a", "c"]


def test_alpha_goes_where_the_format_has_none(tmp_path):
    image = np.full((4, 4, 4), 99, np.uint8)
    for suffix, channels in ((".png", 4), (".tif", 4), (".webp", 4), (".jpg", 3), (".bmp", 3)):
        job = batch.Job("a", (tmp_path / "a",), tmp_path / "new" / f"a{suffix}")
        batch.write_output(job, None, image)
        assert read_image(job.output, alpha=True).shape == (4, 4, channels)


def test_a_full_disk_ends_it(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=64k tmpfs {disk} 2> /dev/null"):
        pytest.skip("no small file system can be mounted here")
    try:
        noise = np.random.default_rng(0).integers(0, 256, (100, 100), np.uint8)

        class Noise(Lengths):
            def finish(self, request, output):
                return noise

        names = [f"{index:03}" for index in range(200)]
        report = batch.run(jobs(disk, names), Noise(), Request, verb="try")
        assert report.stopped == os.strerror(errno.ENOSPC)
        assert 0 < len(report.written) < 8
        assert 0 < len(report.failures) < 12
        assert all("cannot be written" in str(error) for _, error in report.failures)
        assert sorted(disk.iterdir()) == sorted(job.output for job in report.written)
        for job in report.written:
            np.testing.assert_array_equal(read_image(job.output), noise)
    finally:
        os.system(f"umount {disk}")
