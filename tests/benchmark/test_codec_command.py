"""``kvlink bench codec`` and ``kvlink bench codec-page``, end to end on little, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Kvlink
from pydantic import ValidationError
from tiny import save_tiny, tiny_configs

from kvlink_core.benchmark import codec_page
from kvlink_core.benchmark.codec_page import BEGIN, END, page_with, read_codec_report, render
from kvlink_core.benchmark.codec_results import CodecReport, ExactMatch, Shape, Speed, SpeedRow
from kvlink_core.benchmark.codec_speed import drawn_cache, measure_speed
from kvlink_core.benchmark.codec_tables import rate, speed_grid
from kvlink_core.benchmark.results import Hardware
from kvlink_core.compress import get_codec
from kvlink_core.errors import ConfigError

SMALL = ("--layers", "2", "--kv-heads", "2", "--head-dim", "8", "--tokens", "16")


@pytest.fixture(scope="module")
def shape() -> Shape:
    return Shape(layers=2, kv_heads=2, head_dim=8, tokens=16)


def test_everything_is_measured_and_written(kvlink: Kvlink, tmp_path: Path, tiny_model_dir: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Codecs\n\nProse.\n\n{BEGIN}\nold\n{END}\n\nMore prose.\n")
    done = kvlink(
        "bench", "codec", "--quick", "--questions", "3", *SMALL, "--text-model", str(tiny_model_dir),
        "--codec", "raw", "--codec", "int4:zstd=1", "--document-tokens", "200",
        "--json", str(tmp_path / "out.json"), "--markdown", str(page),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "QUICK RUN" in done.stdout
    report = read_codec_report(tmp_path / "out.json")
    assert report.quick
    assert [q.name for q in report.quality] == ["passages", "long documents", "own text"]
    for quality in report.quality:
        raw, small = quality.rows
        assert (raw.codec, raw.share, raw.divergence, raw.top1) == ("raw", 1.0, 0.0, 1.0)
        assert (small.codec, small.spec) == ("int4:zstd=1", "int4:group=64,keys=channel,zstd=1")
        assert small.share < 0.7
        assert small.keys_error > 0.01
        assert (raw.exact is None) == (quality.name == "own text")
    assert report.quality[0].rows[0].exact is not None
    assert report.quality[0].rows[0].exact.questions == 3
    assert report.speed is not None
    assert {row.codec for row in report.speed.rows} == {"raw", "int4:zstd=1"}
    assert all(len(row.decode_s) == 2 for row in report.speed.rows)
    for said in ("own text", "GB of bfloat16 cache a second", "at most 0.25 of bfloat16"):
        assert said in " ".join(done.stdout.split())
    written = page.read_text()
    assert written.startswith("# Codecs\n\nProse.\n\n<!-- figures")
    assert written.endswith(f"{END}\n\nMore prose.\n")
    assert "old" not in written
    assert "not to be quoted" in written
    assert f"Written by `{report.command}`" in written

    # Of two machines, and again: the page stays as long as it is.
    assert kvlink("bench", "codec-page", str(page), *[str(tmp_path / "out.json")] * 2).returncode == 0
    twice = page.read_text()
    assert twice.count("Written by") == 2
    assert kvlink("bench", "codec-page", str(page), str(tmp_path / "out.json")).returncode == 0
    assert page.read_text() == written


def test_parts_can_be_left_out_and_the_output_says_so(kvlink: Kvlink, tmp_path: Path) -> None:
    done = kvlink(
        "bench", "codec", "--questions", "0", "--repeats", "7", *SMALL, "--codec", "fp8", "--json", str(tmp_path / "x")
    )
    assert done.returncode == 0, done.stderr
    report = read_codec_report(tmp_path / "x")
    assert not report.quick
    assert report.quality == []
    assert not any("--text-model" in note for note in report.notes)
    done = kvlink("bench", "codec", "--questions", "1", "--repeats", "0", "--quick", "--codec", "int8")
    assert done.returncode == 0, done.stderr
    assert "GB of bfloat16" not in done.stdout
    assert "--text-model names none" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--codec", "squeeze"], "no codec 'squeeze'"),
        (["--codec", "int4:grup=3"], "has no parameter 'grup'"),
        (["--questions", "10"], "needs 7 runs and 2000 questions; with --quick"),
        (["--repeats", "6"], "needs 7 runs and 2000 questions"),
        (["--quick", "--device", "cuda:77"], "cuda:77"),
        (["--quick", "--model", "/nowhere"], "/nowhere"),
        (["--quick", "--text-model", "/nowhere"], "/nowhere"),
        (["--json", "/nowhere/x"], "cannot write to '/nowhere/x'"),
        (["--markdown", "/nowhere/x.md"], "cannot write to '/nowhere/x.md'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(kvlink: Kvlink, arguments: list[str], said: str) -> None:
    done = kvlink("bench", "codec", *arguments)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("content", [None, "{}", '{"format": "kvlink-bench-codec/2"}', b"\xff\xfe"])
def test_what_is_no_report_is_refused(kvlink: Kvlink, tmp_path: Path, content: str | bytes | None) -> None:
    path, page = tmp_path / "in.json", tmp_path / "page.md"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = kvlink("bench", "codec-page", str(page), str(path))
    assert done.returncode == 2
    assert str(path) in done.stderr
    assert done.stderr.count("\n") == 1
    assert not page.exists()


@pytest.fixture
def report(shape: Shape) -> CodecReport:
    rows = [
        SpeedRow(
            codec="int4", spec="int4:group=64,keys=channel,zstd=0", threads=threads, stored_bytes=shape.nbytes // 4,
            encode_s=[1.0], decode_s=[0.5 / threads], encode_gb_s=shape.nbytes / 1e9,
            decode_gb_s=2 * threads * shape.nbytes / 1e9,
        )
        for threads in (1, 2)
    ]  # fmt: skip
    hardware = Hardware(cpu="A processor", cores=2, threads=2, memory_gib=None)
    return CodecReport(
        format="kvlink-bench-codec/1", command="kvlink bench codec", started="2026-01-02T03:04:05+00:00", quick=False,
        versions={"kvlink": "0.1.0", "python": "3.11.0"}, notes=["a note"], quality=[],
        speed=Speed(shape=shape, device="cpu", hardware=hardware, rows=rows),
    )  # fmt: skip


def test_figures_that_do_not_follow_and_unknown_keys_are_refused(report: CodecReport) -> None:
    good = report.model_dump()
    assert CodecReport.model_validate(good) == report
    bad: list[Any] = [{**good, "extra": 1}]
    for change in ({"decode_gb_s": 9.0}, {"encode_gb_s": 9.0}, {"seconds": []}, {"decode_s": []}):
        other = json.loads(report.model_dump_json())
        other["speed"]["rows"][1].update(change)
        bad.append(other)
    for content in bad:
        with pytest.raises(ValidationError):
            CodecReport.model_validate(content)
    exact = ExactMatch.of(100, 90, 2, 7)
    assert (exact.reference_right, exact.points) == (95, -5.0)
    for name, value in (("points", 5.0), ("low", 0.0), ("reference_right", 90)):
        with pytest.raises(ValidationError):
            ExactMatch.model_validate({**exact.model_dump(), name: value})


def test_speed_is_shown_by_number_of_threads(report: CodecReport) -> None:
    assert report.speed is not None
    grid = speed_grid(report.speed)
    assert list(grid.header) == [
        "codec", "of bf16", "encode, 1 thread", "decode, 1 thread", "encode, 2 threads", "decode, 2 threads",
    ]  # fmt: skip
    assert grid.rows[0][:2] == ["int4", "0.250"]
    assert [rate(x) for x in (1e6, 123.4, 12.34, 1.234, 0.01)] == ["a view", "123", "12.3", "1.23", "0.01"]


@pytest.mark.parametrize(
    "old", [f"a\n{BEGIN}\n", f"a\n{END}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n{BEGIN}\n{END}"]
)
def test_a_page_whose_marks_are_broken_is_left_alone(old: str, report: CodecReport) -> None:
    with pytest.raises(ConfigError, match="once each"):
        page_with(old, [report])


def test_a_new_page_holds_the_figures_alone(report: CodecReport) -> None:
    text = page_with("", [report])
    assert text == f"{BEGIN}\n{render([report])}{END}\n"
    assert page_with(text, [report]) == text
    assert page_with("# Prose\n", [report]) == f"# Prose\n\n{text}"
    assert "\n\n- Decoded at 2 GB/s or more" in text
    assert "\n- Note: a note\n" in text
    assert codec_page.read_page(Path("/nowhere/at/all.md")) == ""


def test_what_speed_is_measured_with(shape: Shape) -> None:
    cache = drawn_cache(shape, torch.device("cpu"))
    assert cache.nbytes == shape.nbytes
    assert cache.keys.dtype == torch.bfloat16
    assert torch.equal(cache.keys, drawn_cache(shape, torch.device("cpu")).keys)
    before = torch.get_num_threads()
    rows = measure_speed({"raw": get_codec("raw"), "int8": get_codec("int8")}, shape, torch.device("cpu"), [1, 2], 3)
    assert torch.get_num_threads() == before
    assert [(row.codec, row.threads, len(row.encode_s)) for row in rows] == [
        ("raw", 1, 3), ("int8", 1, 3), ("raw", 2, 3), ("int8", 2, 3),
    ]  # fmt: skip
    assert rows[0].stored_bytes == shape.nbytes


@pytest.mark.parametrize("spec", ["raw:keep=0.5,scorer=knorm", "raw:keep=0.5,scorer=repeat"])
def test_texts_fit_a_short_context_also_where_a_scorer_reads_them_twice(
    kvlink: Kvlink, tmp_path: Path, spec: str
) -> None:
    model = save_tiny(tmp_path / "model", tiny_configs(context=96)["llama"])
    done = kvlink(
        "bench", "codec", "--questions", "0", "--repeats", "0", "--text-model", str(model), "--codec", spec,
        "--json", str(tmp_path / "out.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (quality,) = read_codec_report(tmp_path / "out.json").quality
    assert quality.rows[0].share < 0.7
