"""Changes of a config on the command line: what they do, and what is said where they cannot be."""

import copy

import pytest
from detectron2.config import LazyConfig, get_cfg, instantiate

from dino_d2 import add_dino_config
from dino_d2.config.overrides import apply_overrides
from dino_d2.config.styles import get, read_config
from dino_d2.modeling import VarifocalLoss
from dino_d2.weights.model_zoo import get_config


@pytest.fixture(scope="module")
def configs():
    return {style: get_config(f"quickstart.{style}") for style in ("yaml", "py")}


@pytest.fixture
def yaml(configs):
    return configs["yaml"].clone()


@pytest.fixture
def lazy(configs):
    return copy.deepcopy(configs["py"])


def complaint(cfg, *words):
    with pytest.raises(ValueError) as caught:
        apply_overrides(cfg, words)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_keys_and_values_in_turn_change_a_yaml_config(yaml):
    words = ["SOLVER.BASE_LR", "0.5", "INPUT.MIN_SIZE_TRAIN", "(64, 96)", "MODEL.WEIGHTS", "a=b"]
    assert apply_overrides(yaml, words) == words[::2]
    assert yaml.SOLVER.BASE_LR == 0.5 and yaml.INPUT.MIN_SIZE_TRAIN == (64, 96)
    assert yaml.MODEL.WEIGHTS == "a=b"


def test_hydras_grammar_changes_a_lazy_config(lazy):
    words = [
        "optimizer.lr=0.5",
        "dataloader.test.mapper.augmentations.0.short_edge_length=64",
        "train={max_iter: 7, checkpointer: {period: 3}}",
        "model.denoising=null",
        "dataloader.train.dataset.names=[a,b]",
    ]
    keys = apply_overrides(lazy, words)
    assert keys == [
        "optimizer.lr",
        "dataloader.test.mapper.augmentations.0.short_edge_length",
        "train.max_iter",
        "train.checkpointer.period",
        "model.denoising",
        "dataloader.train.dataset.names",
    ]
    assert lazy.optimizer.lr == 0.5 and lazy.model.denoising is None
    assert lazy.dataloader.test.mapper.augmentations[0].short_edge_length == 64
    assert (lazy.train.max_iter, lazy.train.checkpointer.period) == (7, 3)
    assert lazy.train.checkpointer.max_to_keep == 100  # what a dict does not name stays
    assert lazy.dataloader.train.dataset.names == ["a", "b"]


@pytest.mark.parametrize(
    "key",
    [
        "model.decoder.final_norm",  # an argument of a class
        "dataloader.train.sampler",  # of a function that Detectron2 configures
        "dataloader.train.mapper.use_instance_mask",  # of a class that it configures
        "model.backbone.stages.stride_in_1x1",  # that takes any
        "optimizer.betas",
    ],
)
def test_an_argument_that_a_target_takes_need_not_be_in_the_config(key, lazy):
    assert apply_overrides(lazy, [f"{key}=1"]) == [key]


def test_the_arguments_are_those_of_the_target_that_was_changed_to(lazy):
    target = "lr_multiplier._target_=fvcore.common.param_scheduler.ConstantParamScheduler"
    assert "'lr_multiplier.value'" in complaint(lazy, "lr_multiplier.value=1")
    apply_overrides(lazy, [target, "lr_multiplier.value=1"])
    assert lazy.lr_multiplier.value == 1


def test_nothing_can_become_a_target(lazy):
    key = "model.criterion.denoising_class_loss"
    apply_overrides(lazy, [f"{key}._target_=dino_d2.modeling.VarifocalLoss", f"{key}.alpha=0.5"])
    assert isinstance(instantiate(lazy.model.criterion).denoising_class_loss, VarifocalLoss)
    apply_overrides(lazy, ["dataloader.train.sampler._target_=builtins.dict"])
    assert lazy.dataloader.train.sampler._target_ == "builtins.dict"


def test_what_a_target_written_in_c_takes_is_not_known_and_so_anything(lazy):
    apply_overrides(lazy, ["model.denoising._target_=builtins.dict", "model.denoising.any=1"])
    assert lazy.model.denoising.any == 1


@pytest.mark.parametrize("plus", ["+", "++"])
def test_a_plus_adds_what_is_not_there(plus, lazy):
    assert apply_overrides(lazy, [f"{plus}train.mine.more=1"]) == ["train.mine.more"]
    assert lazy.train.mine.more == 1


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("MODEL.DINO.NUM_QUERY", "MODEL.DINO.NUM_QUERIES"),
        ("solver.base_lr", "SOLVER.BASE_LR"),
        ("NUM_QUERIES", "MODEL.DINO.NUM_QUERIES"),
        ("STAGES.NUM_QUERIES", "MODEL.DINO.NUM_QUERIES"),
        ("QWX", "MODEL, "),
        ("0.1", "MODEL, "),
    ],
)
def test_an_unknown_key_of_a_yaml_config_is_answered_with_the_nearest(key, near, yaml):
    message = complaint(yaml, key, "1")
    assert message.startswith(f"there is no key '{key}' in the config") and near in message


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("model.decoder.num_layer", "model.decoder.num_layers"),
        ("model.decoder.final_nrm", "model.decoder.final_norm"),  # not in the config
        ("optimiser.lr", "optimizer.lr"),
        ("lr", "optimizer.lr"),
        ("train.epoch", "train.epochs"),
        ("train.checkpointer._target_", "train.checkpointer"),
        ("model.criterion.denoising_class_loss.alpha", "criterion.denoising_class_loss"),  # null
        ("train.amp.enable", "train.amp.enabled"),
        ("model.denoising.budgt", "model.denoising.budget"),
        ("model.max_detections.more", "model.max_detections"),
        ("train={ema: {enable: true}}", "train.ema.enabled"),
    ],
)
def test_an_unknown_key_of_a_lazy_config_is_answered_with_the_nearest(key, near, lazy):
    before = str(lazy)
    message = complaint(lazy, key if "=" in key else f"{key}=1")
    assert message.startswith("there is no key '") and near in message
    assert "=VALUE' adds one" in message and str(lazy) == before


@pytest.mark.parametrize("index", ["1", "first", "5.max_size"])
@pytest.mark.parametrize("plus", ["", "+"])
def test_a_list_does_not_grow_by_an_index(index, plus, lazy):
    before = str(lazy)
    message = complaint(lazy, f"{plus}dataloader.test.mapper.augmentations.{index}=1")
    assert "augmentations' is a list of 1, numbered from 0, and has no" in message
    assert str(lazy) == before


def test_a_value_has_no_keys_inside_even_to_be_added(lazy):
    message = complaint(lazy, "+model.max_detections.more=1")
    assert message == "'model.max_detections' is 100, and has no 'more' inside"


def test_a_section_that_takes_any_key_takes_a_new_one(yaml):
    key = "MODEL.TIMM.OPTIONS.strict_img_size"
    assert apply_overrides(yaml, [key, "False"]) == [key]
    assert yaml.MODEL.TIMM.OPTIONS == {"drop_path_rate": None, "strict_img_size": False}
    apply_overrides(yaml, [key, "True"])
    assert yaml.MODEL.TIMM.OPTIONS.strict_img_size is True
    assert "there is no key" in complaint(yaml, "MODEL.TIMM.OPTIONS.more.less", "1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SOLVER.BASE_LR=0.1"], "write 'SOLVER.BASE_LR 0.1', not 'SOLVER.BASE_LR=0.1'"),
        (["SEED", "1", "SOLVER.BASE_LR"], "the key 'SOLVER.BASE_LR' has no value after it"),
        (["SEED", "a"], "'SEED' takes values such as 1 (int), not 'a'"),
        (["INPUT.MIN_SIZE_TEST", "(1, 2)"], "'INPUT.MIN_SIZE_TEST' takes values such as 104"),
        (["MODEL", "3"], "'MODEL' is a section: name one of its keys, as MODEL."),
        (["MODEL.TIMM.OPTIONS", "{'a': 1}"], "as MODEL.TIMM.OPTIONS.drop_path_rate"),
    ],
)
def test_what_a_yaml_config_does_not_take_is_one_sentence(words, message, yaml):
    assert message in complaint(yaml, *words)


@pytest.mark.parametrize("option", ["--resume", "--num-gpus=2"])
def test_an_option_after_the_overrides_is_said_to_be_one(option, yaml, lazy):
    before = str(yaml), str(lazy)
    message = f"'{option}' is an option, not a key of the config: write it before the config"
    assert complaint(yaml, "OUTPUT_DIR", "x", option).startswith(message)
    assert complaint(lazy, "train.seed=1", option).startswith(message)
    assert (str(yaml), str(lazy)) == before


def test_a_value_may_begin_as_an_option_does(yaml):
    apply_overrides(yaml, ["OUTPUT_DIR", "--x"])
    assert yaml.OUTPUT_DIR == "--x"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optimizer.lr", "are KEY=VALUE"),
        ("~optimizer.lr", "is a deletion"),
        ("optimizer.lr=[1", "cannot be read (no viable alternative at input '[1')"),
        ("train.output_dir=don't", "put its value, or each value of a list, into quotes"),
        ("train.output_dir=a,b", "has several values"),
        ("model.denoising._target_=dino_d2.modeling.Denoisin", "dino_d2.modeling.Denoising"),
        ("model.denoising._target_=nowhere.Denoising", "which cannot be imported"),
        ("model.denoising._target_=null", "is None: give the path of a class"),
        ("model.denoising={_target_: 3}", "is 3: give the path of a class"),
        ("model.denoising._target_=''", "is '': give the path of a class"),
        ("model.denoising._target_=dino_d2.modeling", "is no class or function but a module"),
    ],
)
def test_what_a_lazy_config_does_not_take_is_one_sentence(word, message, lazy):
    assert message in complaint(lazy, word)


def test_a_target_whose_module_fails_is_one_sentence(lazy, tmp_path, monkeypatch):
    (tmp_path / "imports_what_is_not_there.py").write_text("import nowhere_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    message = complaint(lazy, "model.denoising._target_=imports_what_is_not_there.X")
    assert "fails while it is imported" in message and "nowhere_at_all" in message


def test_what_a_config_was_saved_as_takes_the_same_keys(lazy, tmp_path):
    LazyConfig.save(lazy, str(tmp_path / "config.yaml"))
    read = read_config(str(tmp_path / "config.yaml"))
    apply_overrides(read, ["model.decoder.final_norm=false"])
    assert "num_layers" in complaint(read, "model.decoder.num_layer=1")


def test_an_unknown_key_of_a_file_is_answered_with_the_nearest(tmp_path):
    (tmp_path / "a.yaml").write_text("MODEL: {DINO: {NUM_QUERYS: 3}}")
    with pytest.raises(ValueError, match=r"a.yaml': there is no key .*: MODEL.DINO.NUM_QUERIES"):
        read_config(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(("style", "word"), [("yaml", "SOLVER.MAX_ITER"), ("py", "train.max_iter")])
def test_a_whole_number_may_be_written_as_a_float(style, word, configs):
    cfg = copy.deepcopy(configs[style])
    apply_overrides(cfg, [word, "1e1"] if style == "yaml" else [f"{word}=1e1"])
    value = cfg.SOLVER.MAX_ITER if style == "yaml" else cfg.train.max_iter
    assert value == 10 and type(value) is int


def test_a_float_may_be_written_as_a_whole_number(yaml):
    apply_overrides(yaml, ["SOLVER.WEIGHT_DECAY", "0"])
    assert yaml.SOLVER.WEIGHT_DECAY == 0.0 and type(yaml.SOLVER.WEIGHT_DECAY) is float


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("train.max_iter=10.5", "'train.max_iter' takes values such as 2400 (int), not 10.5"),
        ("train.max_iter=abc", "(int), not 'abc' (str)"),
        ("train.amp.enabled=maybe", "(bool), not 'maybe' (str)"),
        ("train.amp.enabled=1", "(bool), not 1 (int)"),
        ("train.output_dir=3", "(str), not 3 (int)"),
        ("train.ema.decay=high", "(float), not 'high' (str)"),
        ("model.encoder.num_layers=two", "(int), not 'two' (str)"),
        ("model=3", "'model' is a section"),
        ("train.amp=True", "'train.amp' is a section: name one of its keys, as train.amp.enabled"),
    ],
)
def test_a_value_of_another_kind_is_refused(word, part, lazy):
    assert part in complaint(lazy, word)


@pytest.mark.parametrize(
    "word",
    [
        "train.ema.decay=1",
        "train.checkpointer.max_to_keep=null",
        "train.max_iter='${train.eval_period}'",
        "lr_multiplier.warmup_length=0.5",
        "dataloader.test.mapper.augmentations.0.short_edge_length=[64,96]",
        "model.num_classes=3",
    ],
)
def test_what_a_key_may_be_besides_is_taken(word, lazy):
    apply_overrides(lazy, [word])


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("MODEL: {DINO: {CHECKPOINT: [encoder]}}", "MODEL.DINO.ACTIVATION_CHECKPOINTING"),
        ("model: {_target_: x.DINO, checkpoint: [encoder]}", "model.activation_checkpointing"),
    ],
    ids=["yaml", "lazy"],
)
def test_keys_of_earlier_versions_are_read_with_a_warning(content, place, tmp_path, caplog):
    file = tmp_path / "config.yaml"
    file.write_text(content)
    cfg = read_config(str(file))
    assert get(cfg, place) == ["encoder"] and "checkpoint" not in str(cfg).lower().split()
    assert f"is now called {place}" in caplog.text
    file.write_text(content.replace("encoder", ""))  # as a saved config has the default
    caplog.clear()
    assert get(read_config(str(file)), place, []) == [] and "is now called" not in caplog.text


def test_a_change_of_a_key_of_earlier_versions_names_the_new_one(lazy):
    message = complaint(lazy, "model.checkpoint=[]")
    assert "now called 'model.activation_checkpointing'" in message and "adds one" not in message


def test_an_argument_of_another_model_that_has_this_name_stays(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {_target_: mine.Model, checkpoint: a.pth}")
    assert read_config(str(tmp_path / "config.yaml")).model.checkpoint == "a.pth"


def test_detectron2s_way_to_read_a_file_names_the_new_key(tmp_path):
    (tmp_path / "config.yaml").write_text("MODEL: {DINO: {CHECKPOINT: [encoder]}}")
    cfg = get_cfg()
    add_dino_config(cfg)
    with pytest.raises(KeyError, match="renamed to MODEL.DINO.ACTIVATION_CHECKPOINTING"):
        cfg.merge_from_file(str(tmp_path / "config.yaml"))
