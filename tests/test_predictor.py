"""Images in, detections out: `dino_d2.load`; and that no entrance runs code of a file."""

import builtins
import pickle
import sys
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import transforms as T
from omegaconf import DictConfig
from PIL import Image

import dino_d2
from dino_d2.config.styles import read_config
from dino_d2.data import DatasetError, generate
from dino_d2.layouts.renaming import CheckpointError
from dino_d2.predictor import Predictor
from dino_d2.weights import files
from dino_d2.weights.checkpointer import Checkpointer
from dino_d2.weights.files import write
from dino_d2.weights.fitting import open_weights
from dino_d2.weights.model_zoo import get_config, get_config_file
from dino_d2.weights.trained import classes_of, of_training

sys.path.insert(0, str(Path(__file__).parents[1] / "projects" / "dino"))
import convert_checkpoint  # noqa: E402
import demo  # noqa: E402
import train_net  # noqa: E402

CLASSES = ["circle", "square", "triangle"]


@pytest.fixture
def make_predictor(make_dino):
    models = {colours: make_dino(colours=colours).eval() for colours in (1, 3)}

    def make(image_format="RGB", size=64):
        model = models[1 if image_format == "L" else 3]
        resize = [T.ResizeShortestEdge(size, 1333)]
        return Predictor(model, classes=CLASSES, augmentations=resize, image_format=image_format)

    return make


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The quickstart's model with a checkpoint of its own, untrained."""
    folder = tmp_path_factory.mktemp("trained")
    cfg = get_config("quickstart")
    cfg.MODEL.DEVICE, cfg.MODEL.DINO.NUM_CLASSES = "cpu", len(CLASSES)
    model = dino_d2.DINO(cfg)
    Checkpointer(model, str(folder), classes=CLASSES).save("model")
    return folder / "model.pth"


def test_a_narrow_dtype_computes_by_autocast_and_finds_the_same(make_predictor, image):
    predictor = make_predictor()
    exact = predictor(image)
    seen = []
    predictor.model.encoder.register_forward_hook(lambda *x: seen.append(x[-1].tokens.dtype))
    predictor.dtype = torch.bfloat16
    narrow = predictor(image)
    predictor.model.encoder.layers[0].ffn.register_forward_hook(lambda *x: seen.append(x[-1].dtype))
    predictor(image)
    assert torch.bfloat16 in seen
    torch.testing.assert_close(narrow.scores[:5], exact.scores[:5], rtol=0.1, atol=0.02)


def test_detections_below_the_threshold_of_their_class_are_left_out(make_predictor, image):
    predictor = make_predictor()
    everything = predictor(image)
    middle = everything.scores.median().item()
    predictor.thresholds = {"circle": middle, "square": 1.0}
    found = predictor(image)
    circle, square, _ = (everything.pred_classes == i for i in range(3))
    kept = ~square & ~(circle & (everything.scores < middle))
    assert torch.equal(found.scores, everything.scores[kept]) and 0 < len(found) < len(everything)
    assert torch.equal(
        predictor(image, threshold=middle).scores, everything.scores[everything.scores >= middle]
    )
    assert len(predictor([image], threshold=1.0)[0]) == 0
    assert predictor.highest == everything.scores.max().item()
    with pytest.raises(ValueError, match="threshold is 1.5"):
        predictor(image, threshold=1.5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, [0.3, 0.4, 0.3]),
        (0.0, [0.0, 0.0, 0.0]),
        ({"circle": 0.7}, [0.7, 0.4, 0.3]),
        ({"": 0.1, "square": 0.2}, [0.1, 0.2, 0.1]),
    ],
)
def test_thresholds_of_the_best_f1_are_saved_with_weights(trained, tmp_path, given, expected):
    checkpoint = torch.load(trained)
    checkpoint["dino_d2"]["thresholds"] = {"": 0.3, "square": 0.4}
    checkpoint["dino_d2"]["ema_thresholds"] = {"": 0.9}
    checkpoint["ema"] = {"weights": checkpoint["model"], "updates": 1}
    file, average = tmp_path / "model.pth", tmp_path / "average.pth"
    write(checkpoint, str(file))
    predictor = dino_d2.load("quickstart", file, "cpu", thresholds=given)
    assert [predictor.thresholds[x] for x in CLASSES] == expected
    if given is None:
        write(convert_checkpoint.convert(str(file), "dino_d2", ema=True), str(average))
        assert set(dino_d2.load("quickstart", average, "cpu").thresholds.values()) == {0.9}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"squares": 0.5}, "threshold for 'squares'; did you mean: square"),
        ({"square": 50}, "the threshold of square is 50; it has to be a number from 0 to 1"),
        (-1, "the threshold of circle is -1"),
    ],
)
def test_a_threshold_that_is_wrong_is_one_sentence(trained, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        dino_d2.load("quickstart", trained, "cpu", thresholds=given)


def test_detections_are_in_pixels_of_the_image(make_predictor, image):
    instances = make_predictor(size=32)(image)
    assert instances.image_size == (60, 90)
    x0, y0, x1, y1 = instances.pred_boxes.tensor.unbind(1)
    assert x0.min() >= 0 and y0.min() >= 0 and x1.max() <= 90 and y1.max() <= 60
    assert x1.max() > 48  # not left at the size that the model sees
    assert instances.scores.diff().max() <= 0


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_paths_pictures_and_arrays_are_the_same_image(
    make_predictor, image, image_format, tmp_path
):
    Image.fromarray(image).save(tmp_path / "image.png")
    predictor = make_predictor(image_format)
    inputs = tmp_path / "image.png", str(tmp_path / "image.png"), Image.fromarray(image), image
    first, *others = [predictor.prepare(x)["image"] for x in inputs]
    red, blue = (0, 2) if image_format == "RGB" else (2, 0)
    assert first[red, 0, 0] == first[blue, 0, -1] == 200
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_pictures_of_every_kind_are_seen_in_colours(make_predictor, image, mode, tmp_path):
    picture = Image.fromarray(image).convert(mode)
    if mode == "P":
        picture.info["transparency"] = 0
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    picture.save(path)
    predictor = make_predictor(size=60)
    expected = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    for x in (picture, path):
        assert torch.equal(predictor.prepare(x)["image"], expected)


def test_a_model_of_one_channel_sees_every_picture_in_grey(make_predictor, image, tmp_path):
    picture = Image.fromarray(image)
    picture.save(tmp_path / "image.png")
    grey = np.asarray(picture.convert("L"))
    predictor = make_predictor("L", size=60)
    for x in (picture, tmp_path / "image.png", image, grey, grey[:, :, None]):
        assert torch.equal(predictor.prepare(x)["image"], torch.tensor(grey)[None])
    assert len(predictor(grey)) > 0


def test_an_array_of_grey_values_is_seen_in_colours(make_predictor, image):
    seen = make_predictor(size=60).prepare(image[:, :, 0])["image"]
    assert torch.equal(seen, torch.tensor(image[:, :, 0]).expand(3, -1, -1))


def test_a_format_of_detectron2_with_fractions_is_seen(make_predictor, image):
    predictor = make_predictor("YUV-BT.601", size=60)
    seen = predictor.prepare(image)["image"]
    # Y of (200, 0, 0) is 0.299 * 200 / 255
    assert seen.shape == (3, 60, 90) and abs(seen[0, 0, 0] - 0.2345) < 1e-3
    assert len(predictor(image)) > 0


@pytest.mark.parametrize(
    ("image_format", "sentence"),
    [
        ("L", "images have 1 channel, but the model has means and deviations for 3"),
        ("CMYK", "images have 4 channels, but the model has means and deviations for 3"),
        ("rgb", "image format is 'rgb', not one of 8 bits per channel: .*did you mean: RGB"),
        ("F", "image format is 'F', not one of 8 bits per channel"),
    ],
)
def test_a_format_that_the_model_cannot_take_is_one_sentence(make_dino, image_format, sentence):
    options = {"classes": CLASSES, "augmentations": [], "image_format": image_format}
    with pytest.raises(ValueError, match=sentence) as error:
        Predictor(make_dino(), **options)
    assert "INPUT.FORMAT" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits_are_refused_and_not_cut_off(make_predictor, kind, tmp_path):
    picture = Image.fromarray(np.full((60, 90), 500, kind))
    picture.save(tmp_path / "a.tiff")
    with pytest.raises(DatasetError, match="a PIL image has more than 8 bits"):
        make_predictor()(picture)
    with pytest.raises(DatasetError, match="a.tiff' has more than 8 bits"):
        make_predictor()([tmp_path / "a.tiff"])


def test_a_file_that_cannot_be_read_is_one_sentence(make_predictor, tmp_path):
    (tmp_path / "a.jpg").write_text("no image")
    for name in ("a.jpg", "b.jpg"):
        with pytest.raises(DatasetError, match=f"{name}' cannot be read") as error:
            make_predictor()(str(tmp_path / name))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", ["quickstart", "quickstart.py"])
@pytest.mark.parametrize("shape", [(1, 10_000), (10_000, 1), (1, 1)])
def test_strips_and_single_pixels_are_detected_in(config, shape, trained):
    height, width = shape
    found = dino_d2.load(config, str(trained), "cpu")(np.zeros((height, width, 3), np.uint8))
    boxes = found.pred_boxes.tensor
    assert len(found) > 0 and boxes.isfinite().all() and found.scores.isfinite().all()
    assert found.image_size == shape
    assert boxes.min() >= 0 and boxes[:, 2].max() <= width and boxes[:, 3].max() <= height


def test_a_list_gives_a_list_and_no_image_sees_another(make_predictor, image):
    predictor = make_predictor()
    images = [image, image[:, :50], Image.fromarray(image[:30]), image, image[:, ::-1].copy()]
    for together, alone in zip(predictor(images), map(predictor, images), strict=True):
        # images of one size share products of matrices, which are rounded in another order
        torch.testing.assert_close(together.scores, alone.scores, rtol=1e-5, atol=1e-6)
        boxes = together.pred_boxes.tensor, alone.pred_boxes.tensor
        torch.testing.assert_close(*boxes, rtol=1e-5, atol=1e-3)  # pixels
        assert torch.equal(together.pred_classes, alone.pred_classes)
        assert together.image_size == alone.image_size


def test_the_same_images_give_the_same_bits(make_predictor, image):
    predictor, images = make_predictor(), [image, image[:, :50], image]
    first, second = predictor(images), predictor(images)
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x.scores, y.scores) and torch.equal(x.pred_classes, y.pred_classes)
        assert torch.equal(x.pred_boxes.tensor, y.pred_boxes.tensor)


@pytest.mark.parametrize("config", ["quickstart", "quickstart.py", get_config_file("quickstart")])
def test_load_takes_names_and_files_and_knows_the_classes(config, trained, image):
    predictor = dino_d2.load(config, str(trained), device="cpu")
    assert predictor.classes == CLASSES and not predictor.model.training
    assert len(predictor(image)) > 0


def test_a_lazy_config_file_loads_too(trained):
    file = get_config_file("quickstart.py")
    assert dino_d2.load(file, str(trained), device="cpu").image_format == "RGB"


def test_both_styles_detect_the_same(trained, image):
    first, second = (
        dino_d2.load(f"quickstart{style}", str(trained), device="cpu")(image)
        for style in (".yaml", ".py")
    )
    assert torch.equal(first.pred_boxes.tensor, second.pred_boxes.tensor)


def test_classes_without_names_are_numbered(trained, tmp_path):
    checkpoint = torch.load(trained)
    write({"model": checkpoint["model"]}, str(tmp_path / "bare.pth"))
    predictor = dino_d2.load("quickstart", str(tmp_path / "bare.pth"), device="cpu")
    assert predictor.classes == ["class 0", "class 1", "class 2"]


@pytest.mark.parametrize(
    ("number", "expected"), [(80, 80), (91, 80), (133, 133), (365, 365), (366, 365)]
)
def test_classes_of_coco_and_objects365_are_named(number, expected, tmp_path):
    state = {"encoder.level_embed.weight": torch.zeros(1)}
    state["decoder.class_heads.0.bias"] = torch.zeros(number)
    write({"model": state}, str(tmp_path / "coco.pth"))
    names = classes_of(open_weights(str(tmp_path / "coco.pth")))
    assert len(names) == expected and names[0].casefold() == "person"


def test_a_backbone_detects_nothing(tmp_path):
    write({"stem.conv1.weight": torch.zeros(1)}, str(tmp_path / "backbone.pth"))
    with pytest.raises(CheckpointError, match="no weights of a trained DINO"):
        dino_d2.load("quickstart", str(tmp_path / "backbone.pth"))


def test_without_weights_there_is_nothing_to_load():
    with pytest.raises(CheckpointError, match="there are no weights"):
        dino_d2.load(get_config_file("quickstart"))
    with pytest.raises(FileNotFoundError, match="no published checkpoint 'quickstart'"):
        dino_d2.load("quickstart")


def test_the_name_of_a_config_brings_the_weights_of_its_authors(monkeypatch, tmp_path):
    def without_network(folder, name):
        raise OSError("no network")

    monkeypatch.setattr(files, "in_drive", without_network)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        dino_d2.load("dino_R_50_4scale_36ep", device="cpu")
    message = str(caught.value)
    assert f"put the file at {tmp_path}/dino_d2/checkpoint0033_4scale.pth" in message
    assert "dino_d2://detrex/dino_R_50_4scale_24ep" in message and "\n" not in message
    assert "5scale" not in message


def test_a_name_without_weights_of_its_authors_names_those_that_others_have():
    with pytest.raises(FileNotFoundError, match="detrex/dino_R_101_4scale_12ep"):
        dino_d2.load("dino_R_101_4scale_12ep", device="cpu")


def test_a_misspelt_file_of_weights_is_answered_with_the_nearest(trained):
    wrong = trained.parent / "modl.pth"
    with pytest.raises(CheckpointError, match=f"'{wrong}' is not a file; .*: {trained}$"):
        dino_d2.load("quickstart", str(wrong), device="cpu")


# ---- the config of a training


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "quickstart.py",
        "dino_R_50_5scale_12ep.py",
        "detrex/dino_R_50_4scale_12ep.py",
        "dino_Swin_T_224_4scale_12ep.py",
        "Predecessors/deformable_detr_R_50_two_stage_50ep.py",
        "Predecessors/dn_deformable_detr_R_50_50ep.py",
    ],
)
@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_what_a_lazy_training_saves_as_its_config_is_read_as_one(name, tmp_path, monkeypatch):
    # Swin reads its rates from a tensor while it is built
    monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))
    original = get_config(name)
    LazyConfig.save(original, str(tmp_path / "config.yaml"))
    read = read_config(str(tmp_path / "config.yaml"))
    assert isinstance(read, DictConfig)
    read.model.num_classes = original.model.num_classes = 3
    with torch.device("meta"):
        models = [instantiate(cfg.model) for cfg in (read, original)]
    shapes = [{key: x.shape for key, x in x.state_dict().items()} for x in models]
    assert shapes[0] == shapes[1] and type(models[0].criterion) is type(models[1].criterion)
    augmentations = instantiate(read.dataloader.test.mapper.augmentations)
    assert isinstance(augmentations[0], T.ResizeShortestEdge)


def test_the_config_that_a_lazy_training_saved_detects(trained, image, tmp_path):
    file = str(tmp_path / "config.yaml")
    LazyConfig.save(get_config("quickstart.py"), file)
    first, second = (
        dino_d2.load(config, str(trained), device="cpu")(image)
        for config in (file, "quickstart.py")
    )
    assert torch.equal(first.pred_boxes.tensor, second.pred_boxes.tensor)


def test_the_config_that_a_yaml_training_saved_detects(trained, image, tmp_path):
    cfg = get_config("quickstart")
    cfg.MODEL.WEIGHTS = str(trained)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    predictor = dino_d2.load(str(tmp_path / "config.yaml"), device="cpu")
    assert predictor.classes == CLASSES and len(predictor(image)) > 0


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ("quickstart", ["TEST.DETECTIONS_PER_IMAGE", "7", "INPUT.MIN_SIZE_TEST", "40"]),
        (
            "quickstart.py",
            [
                "model.max_detections=7",
                "dataloader.test.mapper.augmentations.0.short_edge_length=40",
            ],
        ),
    ],
)
def test_overrides_change_the_config(config, overrides, trained, image):
    predictor = dino_d2.load(config, str(trained), "cpu", overrides)
    assert len(predictor(image)) == 7
    assert predictor.prepare(image)["image"].shape == (3, 40, 60)


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ("quickstart", ["TEST.ONE_CLASS_PER_QUERY", "True"]),
        ("quickstart.py", ["model.one_class_per_query=True"]),
    ],
)
def test_a_query_can_be_detected_as_its_best_class_alone(config, overrides, trained, image):
    everything = dino_d2.load(config, str(trained), "cpu")(image)
    boxes = everything.pred_boxes.tensor.tolist()
    best = [i for i, box in enumerate(boxes) if box not in boxes[:i]]
    assert len(everything) == 3 * len(best)  # as each of the classes
    found = dino_d2.load(config, str(trained), "cpu", overrides)(image)
    assert found.pred_boxes.tensor.tolist() == [boxes[i] for i in best]
    assert torch.equal(found.scores, everything.scores[best])
    assert torch.equal(found.pred_classes, everything.pred_classes[best])


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((60, 90, 3), np.float32),
        ((60, 90, 3), np.uint16),
        ((60, 90, 3), bool),
        ((60, 90, 2), np.uint8),
        ((60, 90, 4), np.uint8),
        ((3, 60, 90), np.uint8),
        ((1, 60, 90, 3), np.uint8),
        ((0, 90, 3), np.uint8),
        ((60, 0, 3), np.uint8),
        ((0,), np.uint8),
    ],
)
def test_an_array_that_is_no_image_is_one_sentence(make_predictor, shape, kind):
    with pytest.raises(
        ValueError, match=r"image of uint8, RGB \(H, W, 3\) or grey \(H, W\)"
    ) as caught:
        make_predictor()([np.zeros(shape, kind)])
    message = str(caught.value)
    assert message.endswith(f"{shape} of {np.dtype(kind)}") and "\n" not in message


@pytest.mark.parametrize("wrong", [None, 3, b"\xff\xd8", torch.zeros(3, 4, 4), {"a": 1}, iter([])])
def test_what_is_no_image_is_one_sentence_that_says_what_is(wrong, make_predictor):
    for given in (wrong, [wrong]):
        with pytest.raises(ValueError, match=r"a path, a PIL image or an RGB array") as caught:
            make_predictor()(given)
        message = str(caught.value)
        assert message.endswith(f"of type {type(wrong).__name__}") and "\n" not in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), "config is of type int: give a name or a path"),
        (("quickstart", 3), "weights is of type int: give a name or a path"),
        ((None, "a.pth"), "config is of type NoneType: give a name or a path"),
    ],
)
def test_a_name_that_is_no_string_is_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        dino_d2.load(*arguments)


def test_paths_load_as_their_strings_do(trained):
    predictor = dino_d2.load(Path(get_config_file("quickstart")), trained, device="cpu")
    assert predictor.classes == CLASSES


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, torch.float64])
def test_a_dtype_that_cannot_be_is_refused_at_once(dtype, make_dino):
    with pytest.raises(ValueError, match="give torch.float32, torch.bfloat16, torch.float16"):
        Predictor(make_dino(), classes=CLASSES, augmentations=[], image_format="RGB", dtype=dtype)


# ---- files of weights that bring code along


class Code:
    """Pickled, it opens a file for writing where it is read by one who trusts it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return builtins.open, (str(self.path), "w")


def train_net_words(style, weights, folder):
    generate(folder / "shapes", num_train=1, num_val=1)
    key, device, output = {
        "quickstart.yaml": ("MODEL.WEIGHTS", ["MODEL.DEVICE", "cpu"], "OUTPUT_DIR"),
        "quickstart.py": ("train.init_checkpoint", ["train.device=cpu"], "train.output_dir"),
    }[style]
    pairs = ((key, weights), (output, folder / "output"))
    is_lazy = style.endswith(".py")
    files = [
        word
        for split in ("train", "val")
        for word in (
            *(f"--{split}-json", folder / f"shapes/{split}.json"),
            *(f"--{split}-images", folder / "shapes/images"),
        )
    ]
    opts = [f"{k}={v}" for k, v in pairs] if is_lazy else [word for pair in pairs for word in pair]
    return files, [*device, *opts]


def load_them(weights, folder, run):
    dino_d2.load("quickstart", str(weights), device="cpu")


def demonstrate(weights, folder, run):
    Image.new("RGB", (60, 90)).save(folder / "a.png")
    words = ("--config-file", "quickstart", "--weights", weights, "--device", "cpu")
    words = (*words, "--input", folder / "a.png", "--json", folder / "out.json")
    run(demo.main, *words)


def convert(weights, folder, run):
    run(convert_checkpoint.main, weights, folder / "ours.pth")


def train(style, *more):
    def train(weights, folder, run):
        files, opts = train_net_words(style, weights, folder)
        (folder / "output").mkdir()
        if "--resume" in more:
            (folder / "output" / weights.name).write_bytes(weights.read_bytes())
            (folder / "output" / "last_checkpoint").write_text(weights.name)
        config = ("--config-file", get_config_file(style))
        run(train_net.invoke_main, *config, *files, *more, *opts)

    return train


ENTRANCES = {
    "load": load_them,
    "demo": demonstrate,
    "convert_checkpoint": convert,
    **{
        " ".join(["train_net", *words]): train(*words)
        for words in (
            ["quickstart.yaml"],
            ["quickstart.py"],
            ["quickstart.yaml", "--eval-only"],
            ["quickstart.py", "--eval-only"],
            ["quickstart.yaml", "--resume"],
            ["quickstart.py", "--resume"],
        )
    },
}
FILES = {
    "a.pth": lambda data, path: torch.save(data, path),
    "before_1.6.pth": lambda data, path: torch.save(
        data, path, _use_new_zipfile_serialization=False
    ),
    "pickled.pth": lambda data, path: path.write_bytes(pickle.dumps(data, protocol=2)),
    "a.pkl": lambda data, path: path.write_bytes(pickle.dumps(data)),
}


# The simplest entrance reads all formats, and every entrance reads one.
@pytest.mark.parametrize(
    ("entrance", "file"),
    [*(("load", x) for x in FILES), *zip([*ENTRANCES][1:], cycle(FILES), strict=False)],
)
def test_no_entrance_runs_code_of_a_file(entrance, file, tmp_path, monkeypatch):
    def run(program, *words):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])
        program()

    monkeypatch.setattr(train_net, "default_setup", lambda cfg, args: None)
    monkeypatch.setattr(train_net, "setup_logger", lambda *args, **options: None)
    weights, trace = tmp_path / file, tmp_path / "it ran"
    FILES[file]({"model": {}, "more": Code(trace)}, weights)
    with pytest.raises((CheckpointError, SystemExit)) as error:
        ENTRANCES[entrance](weights, tmp_path, run)
    assert file in str(error.value) and "\n" not in str(error.value)
    assert not trace.exists()


@pytest.mark.parametrize("file", FILES)
def test_the_code_of_these_files_runs_where_they_are_trusted(file, tmp_path):
    # or the test above could not fail
    FILES[file]({"model": {}, "more": Code(tmp_path / "it ran")}, tmp_path / file)
    if file in ("a.pth", "before_1.6.pth"):
        torch.load(tmp_path / file, weights_only=False)
    else:
        pickle.loads((tmp_path / file).read_bytes())
    assert (tmp_path / "it ran").exists()


# ---- a training brings its config along


@pytest.fixture
def training(tmp_path, monkeypatch):
    """A folder as a training leaves it; what would be loaded is returned."""

    def make(*checkpoints, last="", config=True):
        if config:
            (tmp_path / "config.yaml").touch()
        for name in checkpoints:
            (tmp_path / name).touch()
        if last:
            (tmp_path / "last_checkpoint").write_text(last)
        return tmp_path

    return make


@pytest.mark.parametrize("best", [True, False])
def test_a_folder_of_a_training_has_config_and_weights(training, best):
    names = ["model_final.pth", *(["model_best.pth"] if best else [])]
    folder = training(*names, last="model_final.pth")
    expected = str(folder / "config.yaml"), str(folder / ("model_best.pth" if best else names[0]))
    assert of_training(str(folder), "") == of_training("", str(folder)) == expected
    assert of_training(str(folder), "other.pth") == (expected[0], "other.pth")


def test_a_checkpoint_of_a_training_has_a_config(training):
    folder = training("model_0000499.pth")
    file = str(folder / "model_0000499.pth")
    for given in ((file, ""), ("", file)):
        assert of_training(*given) == (str(folder / "config.yaml"), file)


def test_what_is_named_is_taken_as_it_is(training):
    file = str(training("a.pth") / "a.pth")
    assert of_training("quickstart", file) == ("quickstart", file)
    assert of_training("quickstart", "") == ("quickstart", "")
    assert of_training("", "dino_d2://detrex/x") == ("detrex/x", "")


def test_folders_that_are_of_no_training_are_sentences(training):
    with pytest.raises(ValueError, match="name a published checkpoint"):
        dino_d2.load()
    folder = training("a.pth", config=False)
    with pytest.raises(FileNotFoundError, match=r"has no config\.yaml"):
        dino_d2.load(weights=folder / "a.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        dino_d2.load(training())
