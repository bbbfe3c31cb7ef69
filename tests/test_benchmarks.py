"""The programs benchmark_ops.py and benchmark_model.py, on problems of a blink."""

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "projects" / "dino"))
import benchmark_masks  # noqa: E402
import benchmark_model  # noqa: E402
import benchmark_ops  # noqa: E402
import benchmark_runtimes  # noqa: E402
import benchmarking  # noqa: E402

from dino_d2.data.masks import decode_mask  # noqa: E402
from dino_d2.layers import deformable_attention  # noqa: E402
from dino_d2.ops import dispatch, reference  # noqa: E402

TINY = {
    "yaml": [
        *("MODEL.DINO.ENCODER_LAYERS", "1", "MODEL.DINO.DECODER_LAYERS", "1"),
        *("MODEL.DINO.EMBED_DIM", "64", "MODEL.DINO.FFN_DIM", "32", "MODEL.DINO.NUM_QUERIES", "10"),
    ],
    "py": [
        *("model.encoder.num_layers=1", "model.decoder.num_layers=1", "model.encoder.embed_dim=64"),
        *("model.encoder.ffn_dim=32", "model.query_selection.num_queries=10"),
    ],
}
SHAPES = (6, 8), (3, 4), (2, 1)


def run_ops(output, *words):
    size = "--size", "48", "80", "--queries", "7", "--repeats", "2", "--device", "cpu"
    benchmark_ops.main([*size, "--output", str(output), *words])
    return json.loads((output / "results.json").read_text())


def run_model(output, *words, style="yaml"):
    config = "--config-file", f"dino_R_50_4scale_12ep.{style}", "--device", "cpu"
    size = "--size", "64", "96", "--repeats", "1", "--device", "cpu", "--threads", "1"
    words = *config, *size, "--output", str(output), *words, "--opts", *TINY[style]
    benchmark_model.main(list(words))


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    output = tmp_path_factory.mktemp("model")
    run_model(output, "--precision", "bf16")
    return output


@pytest.mark.parametrize("boxes", [0, 5])
def test_the_published_form_is_our_reference(boxes):
    problem = benchmark_ops.make_problem(SHAPES, 2, boxes, torch.device("cpu"))
    value, shapes, where, offsets, logits = problem
    sides = [side for shape in shapes for side in shape]
    expected = reference.forward(value, sides, offsets, logits, where)
    found = benchmarking.published_form_from_offsets(value, shapes, where, offsets, logits)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_every_pixel_of_an_encoder_looks_around_itself():
    problem = benchmark_ops.make_problem(SHAPES, 1, 0, torch.device("cpu"))
    # the second pixel of the first row of 6 x 8; the last token is the lower of 2 x 1
    torch.testing.assert_close(problem.reference[0, 1, 0], torch.tensor([1.5 / 8, 0.5 / 6]))
    torch.testing.assert_close(problem.reference[0, -1, 0], torch.tensor([0.5, 0.75]))
    assert problem.reference.shape == (1, 62, 3, 2)


def test_all_sides_are_measured_on_all_problems(tmp_path):
    results = run_ops(tmp_path)["results"]
    problems = [row["problem"] for row in results]
    sides = {row["side"] for row in results}
    assert len(results) == len(sides) * 3 and len(set(problems)) == 3
    assert {
        "published form",
        "dino_d2, from locations",
        "dino_d2, from offsets",
        "dino_d2, from offsets, bf16",
        "dino_d2, from offsets, without a compiler",
    } <= sides


def test_problems_are_encoders_of_one_and_two_images_and_a_decoder(tmp_path, monkeypatch):
    made = []
    make = benchmark_ops.make_problem
    monkeypatch.setattr(benchmark_ops, "make_problem", lambda *x: made.append(make(*x)) or made[-1])
    run_ops(tmp_path)
    levels = (6, 10), (3, 5), (2, 3), (1, 2)  # of 48 x 80 pixels at strides 8, 16, 32 and 64
    assert {problem.shapes for problem in made} == {levels}
    assert [tuple(problem.reference.shape) for problem in made] == [
        (1, 60 + 15 + 6 + 2, 4, 2),
        (2, 60 + 15 + 6 + 2, 4, 2),
        (1, 7, 4, 4),
    ]


def test_ratios_of_operators_are_of_medians_of_their_problem(tmp_path):
    for row in run_ops(tmp_path)["results"]:
        if row["side"] == "published form":
            baseline = row
        for step in ("forward", "forward_backward"):
            samples = sorted(row[f"{step}_samples_ms"])
            assert row[f"{step}_ms"] == (samples[0] + samples[1]) / 2
            ratio = baseline[f"{step}_ms"] / row[f"{step}_ms"]
            assert row[f"{step}_ratio"] == pytest.approx(ratio)


def test_the_page_about_operators_names_the_machine_and_has_all_rows(tmp_path, capsys):
    results = run_ops(tmp_path)
    page = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out == page
    for fact in results["machines"]["cpu"].values():
        assert fact in page
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(results["results"])


def test_a_side_that_computes_something_else_ends_the_program(tmp_path, monkeypatch):
    twisted = lambda value, *places: reference.forward(value, *places).flip(-1)  # noqa: E731
    monkeypatch.setattr(dispatch.compiled, "forward", twisted)
    monkeypatch.setattr(dispatch.embedding_bag, "forward", twisted)
    with pytest.raises(SystemExit, match="dino_d2, from locations differs from published form"):
        run_ops(tmp_path)


def test_without_a_compiler_is_without_a_compiler(monkeypatch):
    problem = benchmark_ops.make_problem(SHAPES, 1, 0, torch.device("cpu"))
    *_, side = benchmark_ops.make_sides(problem)[1]
    calls = []
    forward = dispatch.embedding_bag.forward
    monkeypatch.setattr(
        dispatch.embedding_bag, "forward", lambda *x: calls.append(1) or forward(*x)
    )
    side.forward()
    assert "without a compiler" in side.name and calls


@pytest.mark.parametrize("program", [benchmark_ops, benchmark_model])
@pytest.mark.parametrize("device", ["fpga", "meta"])
def test_an_unknown_device_is_one_sentence(program, device, tmp_path):
    with pytest.raises(SystemExit) as error:
        program.main(["--device", device, "--output", str(tmp_path)])
    assert f"the device is '{device}'" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_sentence():
    with pytest.raises(ValueError, match="PyTorch finds no GPU here"):
        benchmarking.find_device("cuda")


def test_a_device_that_cannot_be_measured_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match="'mps', but only cpu and cuda can be measured"):
        benchmarking.find_device("mps")


@pytest.mark.parametrize("words", [[], ["--growth", "area"]])
def test_an_unknown_config_is_one_sentence(words, tmp_path):
    with pytest.raises(SystemExit) as error:
        benchmark_model.main(["--config-file", "dimo", "--output", str(tmp_path), *words])
    assert "there is no config 'dimo'" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("words", [["--batch", "0"], ["--size", "64", "-1"], ["--repeats", "x"]])
def test_a_number_below_one_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        benchmark_model.main(words)
    assert "is not an integer of at least 1" in capsys.readouterr().err


@pytest.mark.nightly
def test_every_setting_of_a_model_is_measured_beside_its_published_form(compared):
    rows = json.loads((compared / "results.json").read_text())["results"]
    assert [(row["mode"], row["precision"], row["variant"]) for row in rows] == [
        ("inference", "bf16", "published form"),
        ("inference", "bf16", "plain"),
        ("training", "bf16", "published form"),
        ("training", "bf16", "plain"),
    ]
    assert all(row["memory_mib"] > 0 for row in rows if sys.platform == "linux")
    page = (compared / "table.md").read_text()
    assert page.count("| published form |") == 2 and page.count("| plain |") == 4


def test_what_the_command_line_lists_is_measured_in_all_combinations(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(benchmark_model, "measure", lambda settings, _: seen.extend(settings) or [])
    monkeypatch.setattr(benchmark_model, "page", lambda *_: "")
    run_model(tmp_path, "--batch", "1", "2", "--size", "32", "32", "--precision", "fp32", "bf16")
    assert {(x.batch, x.size, x.precision) for x in seen} == {
        (batch, size, precision)
        for batch in (1, 2)
        for size in ((64, 96), (32, 32))
        for precision in ("fp32", "bf16")
    }
    assert len(seen) == 2**5  # modes, and the published form beside each


@pytest.mark.nightly
def test_the_stages_of_a_step_add_up_to_it(compared):
    shared = {"backbone", "neck", "encoder", "query_selection", "decoder", "rest"}
    training = {"denoising", "criterion", "backward", "optimizer"}
    for row in json.loads((compared / "results.json").read_text())["results"]:
        stages = row["stages_ms"]
        assert set(stages) == shared | (training if row["mode"] == "training" else set())
        assert sum(stages.values()) == pytest.approx(row["total_ms"])


def test_what_lies_before_a_stage_is_not_counted_as_part_of_it():
    stopwatch, stage = benchmarking.Stopwatch(torch.device("cpu")), torch.nn.Identity()
    benchmark_model.time_stage("stage", stage, stopwatch)
    stopwatch.lap("start")
    stage(0)
    assert [name for name, _ in stopwatch.laps] == ["start", "rest", "stage"]


def test_an_operator_is_of_the_kind_of_what_it_is_part_of():
    attention = SimpleNamespace(name="dino_d2::ms_deform_attn", cpu_parent=None)
    part = SimpleNamespace(name="aten::mul", cpu_parent=attention)
    alone = SimpleNamespace(name="aten::mul", cpu_parent=None)
    assert benchmark_model.kind_of(part) == "deformable attention"
    assert benchmark_model.kind_of(alone) == "rest"


@pytest.mark.nightly
def test_shares_of_operators_are_all_there_and_add_up(compared):
    rows = json.loads((compared / "results.json").read_text())["results"]
    for row in rows[1::2]:
        assert len(row["shares"]) == 4 and all(share > 0 for share in row["shares"].values())
        assert sum(row["shares"].values()) == pytest.approx(1)


@pytest.fixture
def make_workload():
    def make(variant, mode="inference", style="yaml", precision="fp32"):
        setting = benchmark_model.Setting(
            config_file=f"dino_R_50_4scale_12ep.{style}",
            opts=tuple(TINY[style]),
            device="cpu",
            threads=1,
            mode=mode,
            batch=1,
            size=(64, 64),
            precision=precision,
            variant=variant,
        )
        return benchmark_model.Workload(setting)

    return make


@pytest.mark.parametrize(
    ("variant", "calls"), [("published form", 2), ("original kernel", 2), ("plain", 0)]
)
def test_only_the_other_sides_run_on_another_operator(variant, calls, make_workload, monkeypatch):
    counted = []
    function = benchmark_model.published_form_from_offsets
    operator = {variant: lambda *x: counted.append(1) or function(*x)} if calls else {}
    monkeypatch.setattr(benchmark_model, "OPERATORS", operator)
    before = deformable_attention.ms_deform_attn_from_offsets
    workload = make_workload(variant)
    workload.step(workload.batch)
    assert len(counted) == calls  # one layer each in encoder and decoder
    assert deformable_attention.ms_deform_attn_from_offsets is before


def test_a_step_of_training_changes_the_model(make_workload):
    workload = make_workload("plain", "training", style="py")
    before = workload.model.decoder.norm.weight.clone()
    workload.step(workload.batch)
    assert not workload.model.decoder.norm.weight.equal(before)


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_the_model(precision, dtype, make_workload):
    workload = make_workload("plain", precision=precision)
    seen = []
    layer = workload.model.encoder.layers[0].ffn
    layer.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    workload.step(workload.batch)
    assert seen == [dtype]


def test_a_variant_is_what_is_measured(make_workload, monkeypatch):
    made = lambda model: model.requires_grad_(False)  # noqa: E731
    monkeypatch.setitem(benchmark_model.PREPARE, "frozen", made)
    assert not any(p.requires_grad for p in make_workload("frozen").model.parameters())


@pytest.mark.nightly
def test_growth_has_a_point_for_each_value_and_a_plot_for_each_quantity(tmp_path, monkeypatch):
    values = {"area": (64,), "boxes": (1, 4)}
    for quantity, few in values.items():
        monkeypatch.setitem(benchmark_model.GROWTH, quantity, few)
    run_model(tmp_path, "--growth", *values)
    points = json.loads((tmp_path / "growth.json").read_text())["points"]
    assert [(point["quantity"], point["mode"], point["value"]) for point in points] == [
        ("area", "inference", 64**2),
        ("area", "training", 64**2),
        ("boxes", "training", 1),
        ("boxes", "training", 4),
    ]
    for quantity in values:
        picture = np.asarray(Image.open(tmp_path / f"growth_{quantity}.png").convert("RGB"))
        assert picture.std() > 5


@pytest.mark.parametrize("style", ["yaml", "py"])
def test_every_quantity_changes_what_is_measured(style, tmp_path):
    config = "--config-file", f"dino_R_50_4scale_12ep.{style}", "--device", "cpu"
    args = benchmark_model.argument_parser().parse_args(config)
    base = benchmark_model.first_setting(args, 64)
    for quantity, (first, *_, last) in benchmark_model.GROWTH.items():
        settings = [benchmark_model.with_value(base, quantity, x) for x in (first, last)]
        assert settings[0] != settings[1]
    few = benchmark_model.with_value(base, "queries", 5)
    model = benchmark_model.Workload(few._replace(mode="inference")).model
    assert model.query_selection.num_queries == 5


def peak_of_three_arrays():
    memory = benchmarking.PeakMemory(torch.device("cpu"))
    for _ in range(3):  # each freed before the next
        torch.ones(64 * 2**20 // 4)
    return memory.read()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux")
@pytest.mark.slow
def test_peak_memory_is_what_was_there_at_once():
    # in a process of its own, as in the programs: what other tests left behind would count
    assert 60 < benchmarking.in_new_process(peak_of_three_arrays) < 100


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_process_that_dies_is_one_sentence():
    with pytest.raises(SystemExit, match="the process of die\\(\\) died"):
        benchmarking.in_new_process(die)


def test_sides_take_turns_and_a_first_round_is_not_counted():
    calls = []
    sides = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert benchmarking.interleave(sides, 2) == {"a": [3, 5], "b": [4, 6]}
    assert calls == list("ababab")


def test_proportional_growth_has_power_one():
    assert benchmarking.power([(0.1, 9.0), (1, 5.0), (10, 50.0), (100, 500.0)]) == pytest.approx(1)


def test_laps_of_one_name_are_summed_and_the_first_only_starts(monkeypatch):
    ticks = iter([1.0, 3.0, 4.0, 8.0])
    monkeypatch.setattr(benchmarking.time, "perf_counter", lambda: next(ticks))
    stopwatch = benchmarking.Stopwatch(torch.device("cpu"))
    for name in ("start", "a", "b", "a"):
        stopwatch.lap(name)
    assert stopwatch.read() == {"a": 6000.0, "b": 1000.0}


def test_a_table_marks_what_was_not_measured():
    table = benchmarking.markdown(["a", "b"], [(1234.5, None)])
    assert table.splitlines() == ["| a | b |", "| --- | --- |", "| 1,234 | – |"]


@pytest.mark.nightly
def test_a_compiled_model_is_measured_beside_the_plain_one(tmp_path, monkeypatch):
    memory = {"memory_mib": None}  # would compile once more, in a process of its own
    monkeypatch.setattr(benchmark_model, "alone", lambda *_: memory)
    run_model(tmp_path, "--mode", "inference", "--compile")
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [row["variant"] for row in rows] == ["published form", "plain", "compiled"]
    assert set(rows[1]["stages_ms"]) == set(rows[2]["stages_ms"])


# ---- masks


def test_both_sides_of_the_masks_compute_the_same(monkeypatch):
    monkeypatch.setattr(benchmark_masks, "BUDGET", 7)
    problem = benchmark_masks.make_problem(128, 3, torch.float32)
    assert problem.noised.shape[1] == 2 * 3  # groups of all objects
    found = [side(problem, (120, 125)) for side in benchmark_masks.SIDES["inference"].values()]
    assert torch.equal(*found) and found[0].shape == (100, 120, 125)
    losses = [side(problem) for side in benchmark_masks.SIDES["training"].values()]
    # Their points are random.
    torch.testing.assert_close(*losses, rtol=0.05, atol=0)
    for loss in losses:
        loss.backward()
        assert all(x.grad.any() for x in problem[:3])


def test_the_loader_gives_the_same_masks_of_polygons_and_rle(tmp_path):
    records = [
        benchmark_masks.make_record(str(tmp_path), 3, 64, form) for form in ("polygons", "RLE")
    ]
    found = [
        [decode_mask(x["segmentation"], (64, 64)) for x in record["annotations"]]
        for record in records
    ]
    np.testing.assert_array_equal(*found)
    for mask, x in zip(found[0], records[0]["annotations"], strict=True):
        left, top, right, bottom = x["bbox"]
        assert 0.3 < mask.sum() / ((right - left) * (bottom - top)) < 1
    took = benchmark_masks.measure_loader("RLE", 3, 64, 1)
    assert took["seconds"] > 0


# ---- runtimes of exported files


@pytest.mark.slow
def test_runtimes_are_measured_on_the_same_model(tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(benchmark_runtimes, "SIDE", 64)  # the limit of a CPU takes large matrices
    config = "--config-file", "quickstart.yaml"
    run_model(tmp_path, "--runtime", "eager", "onnxruntime-int8", *config)
    told = json.loads((tmp_path / "results.json").read_text())
    eager, small = told["results"]
    assert [x["runtime"] for x in (eager, small)] == ["eager", "onnxruntime-int8"]
    assert eager["ratio"] == 1 and small["ratio"] == eager["total_ms"] / small["total_ms"]
    assert eager["file_mib"] is None and small["limit_ms"] is None and eager["limit_ms"] > 0
    whole, part = (
        benchmark_runtimes.file_size(tmp_path / "files" / x) for x in ("float.onnx", "int8.onnx")
    )
    assert small["file_mib"] == part < whole / 2
    assert "one image of 64 x 96" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"),
    [("onxruntime", "did you mean: onnxruntime"), ("openvino", "pip install openvino")],
)
def test_a_runtime_that_cannot_be_measured_is_one_sentence(name, said, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_runtimes, "is_installed", lambda package: False)
    with pytest.raises(SystemExit, match=said):
        run_model(tmp_path, "--runtime", name)
    assert benchmark_runtimes.installed() == ["eager", "eager-bf16", "compiled", "compiled-bf16"]


def test_without_names_all_installed_runtimes_are_measured(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(benchmark_runtimes, "compare", lambda *x: asked.append(x) or ("table", []))
    run_model(tmp_path, "--runtime")
    ((names, make, size, folder, repeats),) = asked
    assert names == benchmark_runtimes.installed() and size == (64, 96) and repeats == 1
    assert folder == tmp_path / "files" and make().query_selection.num_queries == 10


def test_the_limit_is_by_multiply_adds(monkeypatch):
    monkeypatch.setattr(benchmark_runtimes, "SIDE", 8)
    monkeypatch.setattr(benchmark_runtimes, "timer", lambda call, device: lambda: 1000.0)
    assert benchmark_runtimes.seconds_by_products(2 * 8**3, torch.float32) == 2


def test_detectors_in_pytorch_are_in_the_numbers_of_their_name(monkeypatch, tmp_path):
    changed, seen = [], []

    class Model(torch.nn.Module):
        def forward(self, batch):
            seen.append((torch.is_autocast_enabled("cpu"), batch[0]["image"].shape))

    monkeypatch.setattr(benchmark_runtimes, "compiled", changed.append)
    for name in ("eager", "compiled-bf16"):
        benchmark_runtimes.detector(name, Model, (4, 6), tmp_path)()
    assert seen == [(False, (3, 4, 6)), (True, (3, 4, 6))] and len(changed) == 1
