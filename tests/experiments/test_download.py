import contextlib
import hashlib
import io
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from experiments.data import download as module
from experiments.data.demo import make_demo
from experiments.data.download import download
from experiments.data.voc import read_objects, read_split
from scripts import download_voc

TRAINVAL, TEST = module.ARCHIVES
CUT = 30_000  # bytes after which the mirror "cut" hangs up


def known(archives):
    return {
        name: module.Archive(len(data), hashlib.md5(data).hexdigest(), hashlib.sha256(data).hexdigest())
        for name, data in archives.items()
    }


def make_archive(devkit, splits):
    """A tar with the images, annotations and lists of some splits, the last of which has all their images."""
    buffer = io.BytesIO()
    ids = read_split(devkit, splits[-1]).ids
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        paths = [devkit / f"JPEGImages/{image_id}.jpg" for image_id in ids]
        paths += [devkit / f"Annotations/{image_id}.xml" for image_id in ids]
        for split in splits:
            main = devkit / "ImageSets" / "Main"
            paths += [main / f"{split}.txt", *main.glob(f"*_{split}.txt")]
        for path in paths:
            tar.add(path, Path("VOCdevkit", "VOC2007", path.relative_to(devkit)))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    devkit = make_demo(tmp_path_factory.mktemp("devkit"), num_train=24, num_test=12)
    return {
        TRAINVAL: make_archive(devkit, ["train", "val", "trainval"]),
        TEST: make_archive(devkit, ["test"]),
    }


def endless(handler, data, start):
    handler.answer(200)
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(b"!" + data)  # not an archive and then more, which is one where no more has come yet


def page(handler, data, start):
    handler.answer(200, **{"Content-Type": "text/html; charset=utf-8"})
    handler.wfile.write(b"<html>sign in</html>" * 5000)


def unlabelled_page(handler, data, start):
    handler.answer(200)
    handler.wfile.write(b"<html>sign in</html>" * 5000)


def wrong_range(handler, data, start):
    if not start:
        return handler.answer(404)
    handler.answer(206, **{"Content-Range": f"bytes 0-{len(data) - 1}/{len(data)}", "Content-Length": len(data)})
    handler.wfile.write(data)


def reset(handler, data, start):
    handler.answer(200, **{"Content-Length": len(data)})
    handler.wfile.write(data[:100])
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def slow_headers(handler, data, start):
    handler.trickle(b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 10_000)


def slow(handler, data, start):
    handler.answer(200, **{"Content-Length": len(data)})
    handler.trickle(data)


def continues(handler, data, start):
    with contextlib.suppress(OSError):
        while not handler.server.ended.is_set():
            handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")


HOSTILE = {
    "length-abc": lambda handler, data, start: handler.answer(200, **{"Content-Length": "abc"}),
    "length-negative": lambda handler, data, start: handler.answer(200, **{"Content-Length": "-5"}),
    "length-short": lambda handler, data, start: handler.answer(200, **{"Content-Length": 5}),
    "length-huge": lambda handler, data, start: handler.answer(200, **{"Content-Length": 10**30}),
    "endless": endless,
    "page": page,
    "page-unlabelled": unlabelled_page,
    "loop": lambda handler, data, start: handler.answer(302, Location=handler.path),
    "nowhere": lambda handler, data, start: handler.answer(302, Location="http://[::1"),
    "other-scheme": lambda handler, data, start: handler.answer(302, Location="file:///etc/hostname"),
    "reset": reset,
    "slow": slow,
    "slow-headers": slow_headers,
    "continues": continues,
    "no-content": lambda handler, data, start: handler.answer(204),
    "not-http": lambda handler, data, start: handler.wfile.write(b"\x00\xff" * 40),
    "many-headers": lambda handler, data, start: handler.answer(200, **{f"X-{n}": n for n in range(200)}),
    "bad-chunks": lambda handler, data, start: handler.wfile.write(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n"
    ),
    "range-wrong": wrong_range,
    "range-absent": lambda handler, data, start: handler.answer(206),
    "range-other": lambda handler, data, start: handler.answer(206, **{"Content-Range": "bytes 9-1/*"}),
    "range-refused": lambda handler, data, start: handler.answer(416),
}


class Handler(BaseHTTPRequestHandler):
    """Serves `/<mirror>/<archive>`, where the name of the mirror is its behaviour."""

    def do_GET(self):
        mirror, name = self.path.strip("/").split("/")
        start = self.headers["Range"] and int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.server.requests.append((mirror, name, start))
        data = self.server.archives[name]
        if mirror in HOSTILE:
            return HOSTILE[mirror](self, data, start or 0)
        if mirror == "missing":
            return self.send_error(404)
        if mirror == "stalled":
            time.sleep(1)
            return None
        if mirror in ("damaged", "damaged-cut"):
            data = b"not the archive" + data[15:]
        if mirror == "ignores-range":
            start = None
        rest = data[start or 0 :]
        self.answer(
            200 if start is None else 206,
            **{"Content-Length": len(rest)},
            **({} if start is None else {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}),
        )
        self.wfile.write(rest[:CUT] if mirror.endswith("cut") else rest)

    def answer(self, status, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def trickle(self, data, pause=0.02):
        """A byte at a time, until the client hangs up or the test ends."""
        with contextlib.suppress(OSError):
            for byte in data:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                if self.server.ended.wait(pause):
                    return

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(archives, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.archives, server.requests = archives, []
        server.ended = threading.Event()  # a client that was given up reads on until its mirror ends
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def use(*mirrors):
            address = f"http://127.0.0.1:{server.server_port}"
            monkeypatch.setattr(module, "MIRRORS", tuple(f"{address}/{mirror}/" for mirror in mirrors))
            return server

        server.use = use
        monkeypatch.setattr(module, "ARCHIVES", known(archives))
        monkeypatch.setattr(module, "LEAST", 20_000)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield server
        server.ended.set()
        server.shutdown()
        thread.join()


def assert_complete(root):
    """The devkit is there, whole, and no part of the work is left."""
    for split, count in (("trainval", 24), ("test", 12)):
        data = read_split(root, split)
        assert len(data.ids) == count
        for image_id in data.ids:
            read_objects(root, image_id)
    assert {path.name for path in root.iterdir()} <= {"VOC2007", TRAINVAL, TEST, ".download.lock"}


def test_downloads_both_archives_and_unpacks_them(server, tmp_path):
    server.use("good")
    assert download(tmp_path / "data", progress=False) == tmp_path / "data" / "VOC2007"
    assert_complete(tmp_path / "data")
    assert server.requests == [("good", TRAINVAL, None), ("good", TEST, None)]


def test_a_complete_devkit_is_left_as_it_is(server, tmp_path):
    server.use("good")
    devkit = download(tmp_path, progress=False)
    server.requests.clear()
    image = devkit / "JPEGImages" / "000001.jpg"
    before = image.stat().st_mtime_ns
    assert download(tmp_path, progress=False) == devkit
    assert download(devkit, progress=False) == devkit
    assert server.requests == []
    assert image.stat().st_mtime_ns == before


def test_a_cut_connection_is_resumed_where_it_ended(server, archives, tmp_path):
    server.use("cut")
    download(tmp_path, progress=False)
    assert_complete(tmp_path)
    starts = [start for _, name, start in server.requests if name == TRAINVAL]
    assert len(starts) > 2
    assert starts == [None, *range(CUT, len(archives[TRAINVAL]), CUT)]


def test_a_later_run_resumes_too(server, archives, tmp_path):
    server.use("good")
    (tmp_path / f"{TRAINVAL}.part").write_bytes(archives[TRAINVAL][:1000])
    download(tmp_path, progress=False)
    assert_complete(tmp_path)
    assert server.requests[0] == ("good", TRAINVAL, 1000)


def test_a_part_that_is_complete_is_only_checked(server, archives, tmp_path):
    """As left by a process that was killed between the last byte and the check."""
    server.use("good")
    (tmp_path / f"{TRAINVAL}.part").write_bytes(archives[TRAINVAL])
    download(tmp_path, progress=False)
    assert_complete(tmp_path)
    assert server.requests == [("good", TEST, None)]


def test_a_server_that_ignores_range(server, archives, tmp_path):
    server.use("ignores-range")
    (tmp_path / f"{TRAINVAL}.part").write_bytes(archives[TRAINVAL][:100_001])
    download(tmp_path, progress=False)
    assert_complete(tmp_path)
    assert server.requests == [("ignores-range", TRAINVAL, 100_001), ("ignores-range", TEST, None)]


def test_a_wrong_checksum_leads_to_the_next_mirror(server, tmp_path):
    server.use("damaged", "good")
    download(tmp_path, progress=False)
    assert_complete(tmp_path)
    assert [mirror for mirror, *_ in server.requests] == ["damaged", "good"] * 2
    assert server.requests[1] == ("good", TRAINVAL, None)  # nothing of the damaged file is kept


RESUMED = [(mirror, 1000) for mirror in ("endless", "page-unlabelled", "reset", *(m for m in HOSTILE if "range" in m))]


@pytest.mark.parametrize(("mirror", "begun"), [*((mirror, 0) for mirror in HOSTILE), *RESUMED])
def test_a_hostile_mirror_leads_to_the_next(server, archives, tmp_path, monkeypatch, mirror, begun):
    monkeypatch.setattr(module, "WINDOW", 1)
    server.use(mirror, "good")
    if begun:
        (tmp_path / f"{TRAINVAL}.part").write_bytes(archives[TRAINVAL][:begun])
    download(tmp_path, progress=False)
    assert_complete(tmp_path)
    assert {mirror for mirror, *_ in server.requests} == {mirror, "good"}
    assert (tmp_path / TRAINVAL).read_bytes() == archives[TRAINVAL]


@pytest.mark.parametrize(
    ("mirror", "reason"),
    [
        ("length-abc", "sends 'abc' bytes, not"),
        ("endless", "sends more than the"),
        ("page", "sends a page, no archive"),
        ("loop", "infinite loop"),
        ("range-other", "sends the range 'bytes 9-1/*', not 'bytes 10-"),
        ("slow", "fewer than 20000 bytes in 0.3 seconds"),
        ("slow-headers", "fewer than 20000 bytes in 0.3 seconds"),
        ("reset", "reset by peer"),
    ],
)
def test_why_a_mirror_was_given_up_is_told(server, archives, tmp_path, monkeypatch, mirror, reason):
    monkeypatch.setattr(module, "WINDOW", 0.3)
    server.use(mirror)
    part = tmp_path / f"{TRAINVAL}.part"
    part.write_bytes(archives[TRAINVAL][:10])
    with pytest.raises(ConnectionError) as error:
        download(tmp_path, progress=False)
    assert f"/{mirror}/{TRAINVAL}: " in str(error.value)
    assert reason in str(error.value)
    if part.exists():
        assert part.stat().st_size <= len(archives[TRAINVAL])


def test_a_mirror_that_is_slow_but_not_too_slow(server, archives, tmp_path, monkeypatch):
    """Every window brings enough, though all of them together take longer than one."""
    monkeypatch.setattr(module, "WINDOW", 0.3)
    monkeypatch.setattr(module, "LEAST", 1000)

    def steady(handler, data, start):
        handler.answer(200, **{"Content-Length": len(data)})
        for first in range(0, len(data), -(-len(data) // 20)):
            handler.wfile.write(data[first : first + -(-len(data) // 20)])
            time.sleep(0.05)

    monkeypatch.setitem(HOSTILE, "steady", steady)
    server.use("steady")
    download(tmp_path, progress=False)
    assert_complete(tmp_path)
    assert len(server.requests) == 2


def test_a_part_that_is_too_long_is_begun_anew(server, archives, tmp_path):
    server.use("good")
    (tmp_path / f"{TRAINVAL}.part").write_bytes(archives[TRAINVAL] + b"more")
    download(tmp_path, progress=False)
    assert_complete(tmp_path)
    assert server.requests[0] == ("good", TRAINVAL, None)


@pytest.mark.parametrize("field", ["size", "md5", "sha256"])
def test_size_md5_and_sha256_are_all_checked(server, archives, tmp_path, monkeypatch, field):
    server.use()
    for name, data in archives.items():
        (tmp_path / name).write_bytes(data)
    wrong = known(archives)
    wrong[TRAINVAL] = wrong[TRAINVAL]._replace(**{field: {"size": 5}.get(field, "0" * 64)})
    monkeypatch.setattr(module, "ARCHIVES", wrong)
    with pytest.raises(ValueError, match=rf"{TRAINVAL} is damaged \(its sha256 is not .*\): delete it"):
        download(tmp_path, progress=False)


def test_a_damaged_beginning_is_not_held_against_the_mirror(server, archives, tmp_path):
    server.use("good")
    (tmp_path / f"{TRAINVAL}.part").write_bytes(b"of another mirror")
    download(tmp_path, progress=False)
    assert_complete(tmp_path)
    assert server.requests[:2] == [("good", TRAINVAL, 17), ("good", TRAINVAL, None)]


def test_a_damaged_mirror_that_also_hangs_up_does_not_loop(server, tmp_path):
    server.use("damaged-cut", "good")
    (tmp_path / f"{TRAINVAL}.part").write_bytes(b"of another mirror")
    download(tmp_path, progress=False)
    assert_complete(tmp_path)


def test_all_mirrors_failing_is_one_error_with_the_remedy(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    server.use("missing", "stalled", "damaged")
    with pytest.raises(ConnectionError) as error:
        download(tmp_path, progress=False)
    message = str(error.value)
    for part in (
        f"no mirror could deliver {TRAINVAL}",
        f"bring {TRAINVAL} and {TEST} to {tmp_path}",
        "data.root (or VOC_ROOT)",
        "preset=demo",
        f"/missing/{TRAINVAL}: HTTP Error 404: Not Found",
        f"/stalled/{TRAINVAL}: timed out",
        f"/damaged/{TRAINVAL}: wrong checksum",
    ):
        assert part in message
    assert [path.name for path in tmp_path.iterdir()] == [".download.lock"]


def test_no_network_keeps_what_was_downloaded(server, archives, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MIRRORS", ("http://127.0.0.1:9/",))  # no server there
    part = tmp_path / f"{TRAINVAL}.part"
    part.write_bytes(archives[TRAINVAL][:1000])
    with pytest.raises(ConnectionError, match="no mirror could deliver") as error:
        download(tmp_path, progress=False)
    assert "Connection refused" in str(error.value)
    assert part.read_bytes() == archives[TRAINVAL][:1000]


def test_archives_brought_by_hand_need_no_network(server, archives, tmp_path):
    server.use()
    for name, data in archives.items():
        (tmp_path / name).write_bytes(data)
    download(tmp_path, progress=False)
    assert_complete(tmp_path)
    assert server.requests == []


def test_a_truncated_archive_brought_by_hand(server, archives, tmp_path):
    server.use("good")
    (tmp_path / TRAINVAL).write_bytes(archives[TRAINVAL][:-5000])
    with pytest.raises(ValueError, match=rf"{TRAINVAL} is damaged .* delete it and run this again"):
        download(tmp_path, progress=False)
    assert (tmp_path / TRAINVAL).read_bytes() == archives[TRAINVAL][:-5000]
    assert not (tmp_path / "VOC2007").exists()


def evil_archive():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("../evil.txt"), io.BytesIO())
    return buffer.getvalue()


@pytest.mark.parametrize(
    "make",
    [lambda data: data[:-60_000], lambda data: evil_archive(), lambda data: b""],
    ids=["ends early", "reaches out of its folder", "empty"],
)
def test_what_cannot_be_unpacked_leaves_nothing_behind(server, archives, tmp_path, monkeypatch, make):
    """Although the md5 is as expected: nothing of the first archive, which is good, may stay unpacked."""
    server.use("good")
    root = tmp_path / "data"
    bad = archives | {TEST: make(archives[TEST])}
    server.archives = bad
    monkeypatch.setattr(module, "ARCHIVES", known(bad))
    with pytest.raises(OSError, match="cannot unpack VOC 2007 to"):
        download(root, progress=False)
    assert {path.name for path in root.iterdir()} == {TRAINVAL, TEST, ".download.lock"}
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_leftovers_of_a_killed_process_are_cleared(server, tmp_path):
    server.use("good")
    (tmp_path / ".unpacking" / "VOCdevkit" / "VOC2007" / "JPEGImages").mkdir(parents=True)
    (tmp_path / ".unpacking" / "VOCdevkit" / "VOC2007" / "JPEGImages" / "999999.jpg").touch()
    devkit = download(tmp_path, progress=False)
    assert_complete(tmp_path)
    assert not (devkit / "JPEGImages" / "999999.jpg").exists()


@pytest.mark.parametrize("lost", ["JPEGImages/000003.jpg", "ImageSets/Main/dog_test.txt"])
def test_an_incomplete_devkit_is_named_and_left_alone(server, tmp_path, lost):
    server.use("good")
    devkit = download(tmp_path, progress=False)
    server.requests.clear()
    (devkit / lost).unlink()
    with pytest.raises(FileExistsError, match=rf"move the VOC 2007 in .* away first.*{Path(lost).stem}"):
        download(tmp_path, progress=False)
    assert server.requests == []
    assert (devkit / "JPEGImages" / "000001.jpg").exists()


def run_with_file_size_limit(root, limit, archives, mirrors):
    """Download in a process whose files cannot grow beyond `limit` bytes, as on a full disk."""
    code = f"""
import resource
from pathlib import Path
from experiments.data import download as module
from experiments.data.download import Archive
module.ARCHIVES = {known(archives)}
module.MIRRORS = {mirrors}
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    module.download(Path({str(root)!r}), progress=False)
except OSError as error:
    print(error)
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_a_disk_full_while_unpacking_leaves_nothing_half_unpacked(server, archives, tmp_path):
    for name, data in archives.items():
        (tmp_path / name).write_bytes(data)
    output = run_with_file_size_limit(tmp_path, 2000, archives, mirrors=())
    assert "cannot unpack VOC 2007 to" in output
    assert "File too large" in output
    assert {path.name for path in tmp_path.iterdir()} == {TRAINVAL, TEST, ".download.lock"}


def test_a_disk_full_while_downloading_keeps_the_part(server, archives, tmp_path):
    server.use("good")
    output = run_with_file_size_limit(tmp_path, 20_000, archives, module.MIRRORS)
    part = tmp_path / f"{TRAINVAL}.part"
    assert f"cannot write {part}" in output
    assert "File too large" in output
    assert part.read_bytes() == archives[TRAINVAL][:20_000]
    server.requests.clear()
    download(tmp_path, progress=False)
    assert_complete(tmp_path)
    assert server.requests[0] == ("good", TRAINVAL, 20_000)


def test_two_at_once_download_once(server, tmp_path):
    server.use("good")
    results = []
    threads = [threading.Thread(target=lambda: results.append(download(tmp_path, progress=False))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [tmp_path / "VOC2007"] * 2
    assert_complete(tmp_path)
    assert len(server.requests) == 2


def test_progress_bar(server, tmp_path, capfd):
    server.use("good")
    download(tmp_path / "quiet", progress=False)
    assert capfd.readouterr() == ("", "")
    download(tmp_path / "shown", progress=True)
    shown = capfd.readouterr().err
    assert TRAINVAL in shown
    assert f"unpacking {TEST}" in shown


def test_the_command(server, tmp_path, monkeypatch, capsys):
    server.use("good")
    monkeypatch.setenv("VOC_ROOT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["download_voc.py", "--quiet"])
    download_voc.main()
    assert capsys.readouterr().out.startswith(f"VOC 2007 is in {tmp_path / 'VOC2007'}")
    assert_complete(tmp_path)


def test_the_command_fails_without_a_traceback(server, tmp_path, monkeypatch):
    server.use("missing")
    monkeypatch.setattr(sys, "argv", ["download_voc.py", "--quiet", "--root", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"error: no mirror could deliver {TRAINVAL}"):
        download_voc.main()


def test_the_official_archives():
    """md5 as torchvision states it; https before http; a name is appended to every mirror."""
    voc = pytest.importorskip("torchvision.datasets.voc").DATASET_YEAR_DICT
    official = {voc[year]["filename"]: voc[year]["md5"] for year in ("2007", "2007-test")}
    assert official == {name: archive.md5 for name, archive in module.ARCHIVES.items()}
    assert all(len(archive.sha256) == 64 and archive.size > 4e8 for archive in module.ARCHIVES.values())
    assert all(mirror.startswith("http") and mirror.endswith("/") for mirror in module.MIRRORS)
    schemes = [mirror.partition(":")[0] for mirror in module.MIRRORS]
    assert schemes == sorted(schemes, reverse=True)


def test_only_a_missing_or_begun_folder_is_for_the_download(tmp_path):
    assert module.to_download(tmp_path / "missing")
    assert not module.to_download(tmp_path)  # an empty folder: a mistake in its name


def test_a_download_that_failed_is_tried_again(server, tmp_path):
    server.use("missing")
    with pytest.raises(ConnectionError):
        download(tmp_path, progress=False)
    assert module.to_download(tmp_path)
