"""Costs of a model by stage, and the program analyze_model.py that makes a table of them."""

import json
import sys
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dino_d2.costs import Detection, Flops, count_flops, kept_activations, watched
from dino_d2.weights import model_zoo

sys.path.insert(0, str(Path(__file__).parents[1] / "projects" / "dino"))
import analyze_model  # noqa: E402

TINY = [
    *("MODEL.DINO.ENCODER_LAYERS", "1", "MODEL.DINO.DECODER_LAYERS", "1"),
    *("MODEL.DINO.EMBED_DIM", "64", "MODEL.DINO.FFN_DIM", "32", "MODEL.DINO.NUM_QUERIES", "10"),
]


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def analyze(monkeypatch, capsys):
    """What the program prints; nothing of it is measured for long."""

    def run(*words, opts=TINY, config="dino_R_50_4scale_12ep"):
        options = "--repeats", "1", "--device", "cpu", "--threads", "1"
        analyze_model.main(["--config-file", config, *options, *words, "--opts", *opts])
        return capsys.readouterr().out

    return run


def cells(text):
    """Rows of the table by their first cell."""
    rows = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [x.strip() for x in row[1:]] for row in rows}


def write_annotations(path, sizes):
    """COCO's, of images (height, width) without boxes."""
    images = [
        {"id": i, "file_name": f"{i}.jpg", "height": height, "width": width}
        for i, (height, width) in enumerate(sizes)
    ]
    categories = [{"id": 1, "name": "cat"}]
    content = {"images": images, "annotations": [], "categories": categories}
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def small():
    """Of quickstart.yaml: 2 + 3 layers, 128 channels, 3 levels, 4 points, 30 queries."""
    return model_zoo.build(model_zoo.get_config("quickstart"), 3, "cpu").eval()


@pytest.fixture(scope="module")
def flops(small):
    """On 64 x 64 pixels, which are 8 x 8 + 4 x 4 + 2 x 2 tokens."""
    return count_flops(small, 64, 64)


def test_matrix_products_and_attention_are_what_pytorch_counts(small, flops):
    """PyTorch's own counter takes a multiply-add as two, and knows nothing of our operator. Not
    every release counts every fused kernel of attention: without them, it is matrix products."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        Detection(small)(torch.zeros(1, 3, 64, 64))
    ours = sum(flops.operators[x] for x in ("linear", "conv", "scaled_dot_product_attention"))
    assert ours == counter.get_total_flops() / 2 > 1e6


def test_deformable_attention_is_five_multiply_adds_of_each_sampled_channel(flops):
    # (84 tokens * 2 layers + 30 queries * 3 layers) * 3 levels * 4 points * 128 channels * 5
    assert flops.operators["ms_deform_attn"] == 1_981_440


def test_attention_among_queries_is_two_products(flops):
    assert flops.operators["scaled_dot_product_attention"] == 3 * 2 * 30 * 30 * 128


def test_stages_are_all_there_is(flops):
    assert flops.stages.total() == flops.operators.total()
    assert flops.stages["denoising"] == 0
    assert all(flops.stages[x] for x in ("backbone", "neck", "encoder", "decoder"))


def test_what_has_no_count_is_listed(flops):
    assert {"aten::add", "aten::sigmoid", "aten::topk"} <= flops.uncounted.keys()
    assert not {"dino_d2::ms_deform_attn", "aten::linear"} & flops.uncounted.keys()


def test_a_training_step_that_is_watched_leaves_the_model_as_it_is(small):
    """Its statistics, too: this model has batch norms."""
    before = {key: x.clone() for key, x in small.state_dict().items()}
    kept_activations(small, 64, 64, 2)
    assert not small.training
    assert all(torch.equal(x, before[key]) for key, x in small.state_dict().items())


def test_kept_is_what_autograd_keeps_once_and_without_parameters(make_dino):
    model = make_dino()
    sizes = []
    x = torch.ones(5, 3, requires_grad=True)
    with watched(model, lambda stage, size: sizes.append((stage, size))):
        y = x.exp()  # keeps y: 60 bytes
        z = y * y  # y, again
        z.matmul(model.decoder.layers[0].norm1.weight[:3])  # z, and a parameter
    assert sizes == [("rest", 60), ("rest", 60)]
    assert not model.encoder._forward_hooks


def test_a_model_of_one_channel_has_costs(make_dino):
    model = make_dino(colours=1).eval()
    assert (
        count_flops(model, 64, 64).stages["backbone"]
        < count_flops(make_dino().eval(), 64, 64).stages["backbone"]
    )
    assert kept_activations(model, 64, 64, 2)["backbone"] > 0


def test_what_is_kept_belongs_to_the_stage_that_runs(make_dino):
    kept = kept_activations(make_dino(), 64, 64, 2)
    assert kept.keys() <= {*analyze_model.stages_of(make_dino()), "rest"}
    assert kept["encoder"] > kept["neck"] > 0 and kept["decoder"] > 0


def test_nothing_stays_in_memory_of_what_was_kept(make_dino):
    model, outputs = make_dino(), []
    model.encoder.register_forward_hook(lambda *x: outputs.append(weakref.ref(x[-1].tokens)))
    kept_activations(model, 64, 64, 2)
    assert [x() for x in outputs] == [None]


@pytest.mark.parametrize("stage", ["encoder", "decoder"])
def test_layers_that_are_computed_again_keep_their_inputs(stage, make_dino):
    model = make_dino()
    kept = kept_activations(model, 64, 64, 2)
    getattr(model, stage).recompute = True
    fewer = kept_activations(model, 64, 64, 2)
    # 2 layers of 85 tokens, or 20 and 2 * 2 * 2 noised queries, with 64 channels and 4 bytes each
    tokens = {"encoder": 2 * 85 * 64 * 4, "decoder": 2 * 24 * 64 * 4}[stage]
    assert tokens <= fewer.pop(stage) < kept.pop(stage)
    assert fewer == kept


def test_a_backbone_that_is_computed_again_keeps_the_image(make_dino):
    """And no more: its feature maps are the neck's inputs."""
    model = make_dino()
    model.recompute_backbone = True
    kept = kept_activations(model, 64, 64, 2)
    assert kept["rest"] == 3 * 64 * 64 * 4 and not kept["backbone"]


def test_denoising_queries_keep_more_in_the_decoder_alone(make_dino):
    noised, plain = (kept_activations(make_dino(**x), 64, 64, 2) for x in ({}, {"denoising": None}))
    assert noised["decoder"] > plain["decoder"] and noised["encoder"] == plain["encoder"]
    assert "denoising" not in plain


def test_a_frozen_backbone_keeps_nothing(make_dino):
    model = make_dino()
    model.backbone.requires_grad_(False)
    assert kept_activations(model, 64, 64, 1)["backbone"] == 0


def test_parameters_of_dino_4scale_are_those_of_the_paper():
    model = model_zoo.build(model_zoo.get_config("dino_R_50_4scale_12ep"), 80, "cpu")
    total, trained = analyze_model.parameters(model)
    stages = [analyze_model.parameters(getattr(model, x)) for x in analyze_model.stages_of(model)]
    assert round(total / 1e6) == round(trained / 1e6) == 47
    assert (total, trained) == tuple(map(sum, zip(*stages, strict=True)))
    assert total - trained == 222_400  # stem and res2


@pytest.mark.nightly
def test_operations_of_dino_4scale_are_about_those_of_the_paper():
    """279 G, for images whose sizes it does not say; with 22,223 tokens as here it would be 290."""
    model = model_zoo.build(model_zoo.get_config("dino_R_50_4scale_12ep"), 80, "cpu").eval()
    assert count_flops(model, 800, 1333).stages.total() / 1e9 == pytest.approx(279, rel=0.05)


@pytest.mark.slow
def test_the_table_has_every_stage_and_its_sum(analyze, tmp_path):
    file = tmp_path / "table.md"
    printed = analyze("--size", "64", "96", "--output", str(file))
    assert file.read_text() == printed
    rows = cells(printed)
    stages = "backbone", "neck", "encoder", "query selection", "denoising", "decoder"
    assert list(rows) == ["stage", *stages, "rest", "total"]
    for column in (0, 2, 6):  # parameters, GFLOPs, kept for backward
        cells_of = [rows[name][column].removesuffix(" M") for name in (*stages, "rest", "total")]
        *parts, total = map(float, cells_of)
        assert sum(parts) == pytest.approx(total, rel=0.01)
    assert float(rows["rest"][4]) > 0  # milliseconds
    assert rows["total"][3] == "100.0%" and rows["denoising"][4] == "–"
    assert "Not counted, calls: " in printed and "ms_deform_attn" in printed


def test_sizes_of_a_data_set_are_those_of_evaluation(tmp_path):
    images = [(100, 200), (100, 200), (300, 100)]  # at short sides of 64, but 100 at most
    write_annotations(tmp_path / "x.json", images)
    size = "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "100"
    words = ["--config-file", "dino_R_50_4scale_12ep", "--opts", *size]
    setting = analyze_model.setting_of(analyze_model.argument_parser().parse_args(words))
    assert setting.classes == 80
    expected = [(50, 100), (50, 100), (100, 33)]
    assert analyze_model.evaluation_sizes(setting, tmp_path / "x.json", 20) == expected
    assert len(analyze_model.evaluation_sizes(setting, tmp_path / "x.json", 2)) == 2
    lazy = setting._replace(config_file="dino_R_50_4scale_12ep.py", opts=())
    assert analyze_model.evaluation_sizes(lazy, tmp_path / "x.json", 1) == [(667, 1333)]


@pytest.mark.slow
def test_the_page_says_what_its_means_are_of(analyze, tmp_path):
    write_annotations(tmp_path / "x.json", [(50, 64)] * 3)
    words = "--size", "64", "64", "--annotations", str(tmp_path / "x.json"), "--num-images", "2"
    page = analyze(*words, opts=[*TINY, "INPUT.MIN_SIZE_TEST", "64"])
    assert "means over the first 2 images" in page and "GFLOPs of these images: mean" in page


def test_means_weigh_every_image(monkeypatch):
    """Every size is counted once."""
    counted = []

    def count(model, height, width):
        counted.append((height, width))
        return Flops(*(Counter(x=height * width) for _ in range(3)))

    monkeypatch.setattr(analyze_model, "count_flops", count)
    flops, counts = analyze_model.average_flops(None, [(1, 2), (3, 4), (1, 2)])
    assert counts == [2, 12, 2] and flops.stages["x"] == pytest.approx(16 / 3)
    assert counted == [(1, 2), (3, 4)]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--config-file", "dino_R_50_4scal"], "did you mean: .*dino_R_50_4scale"),
        (["--annotations", "nowhere.json"], "'nowhere.json' does not exist"),
        (["--annotations", "{folder}/sizeless.json"], "'0.jpg' has height and width .0, 50.: make"),
        (["--annotations", "{folder}/number.json"], "entry 0 of 'images' is 7: make it an object"),
        (["--device", "gpu"], "'gpu', which PyTorch does not know"),
        (["--output", "{folder}/no/table.md"], "No such file or directory"),
        (["--opts", "MODEL.DINO.QUERIES", "3"], "QUERIES"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, words, part):
    write_annotations(tmp_path / "sizeless.json", [(0, 50)])
    number = {"images": [7], "annotations": [], "categories": []}
    (tmp_path / "number.json").write_text(json.dumps(number))
    words = [word.format(folder=tmp_path) for word in words]
    words = [*("--config-file", "quickstart", "--device", "cpu", "--threads", "1"), *words]
    with pytest.raises(SystemExit, match=part) as error:
        analyze_model.main(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--size", "63", "800"], "63 pixels are too few: give at least 64"),
        (["--size", "-1", "800"], "'-1' is not an integer of at least 1"),
        (["--num-images", "3"], "--num-images needs --annotations"),
        (["--images", "3"], "did you mean: --num-images"),
    ],
)
def test_numbers_that_cannot_be_used_are_refused(words, sentence, capsys):
    with pytest.raises(SystemExit):
        analyze_model.main(["--config-file", "quickstart", *words])
    assert sentence in capsys.readouterr().err


def test_the_least_image_is_large_enough_for_batch_norms_of_any_stage():
    opts = "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0"
    cfg = model_zoo.get_config("dino_R_50_4scale_12ep")
    cfg.merge_from_list([*TINY, *opts])
    side = analyze_model.MIN_SIDE
    assert kept_activations(model_zoo.build(cfg, 3, "cpu"), side, side, 2)["backbone"]


def test_an_interruption_is_one_sentence(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(analyze_model, "build", interrupt)
    with pytest.raises(SystemExit, match="interrupted before the table was complete"):
        analyze_model.main(["--config-file", "quickstart", "--device", "cpu", "--threads", "1"])
