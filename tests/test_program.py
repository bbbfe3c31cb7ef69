"""What the programs share: options, and one sentence about what is wrong."""

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

PROGRAMS = Path(__file__).parents[1] / "projects" / "dino"
sys.path.insert(0, str(PROGRAMS))
import demo  # noqa: E402
import program  # noqa: E402
import train_net  # noqa: E402


@pytest.fixture
def parser():
    parser = program.make_parser("It does it.", "Examples:\n    $ as written")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--output")
    return parser


@pytest.mark.parametrize(
    ("option", "near"),
    [
        ("--batchsize", "the nearest: --batch-size"),
        ("--outptu=x", "the nearest: --output"),
        ("--xyz", "the nearest: -h, --help, --batch-size, --output"),
    ],
)
def test_an_unknown_option_is_answered_with_the_nearest(option, near, parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["--output", "a", option, "1"])
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"unrecognized arguments: {option.split('=')[0]}; {near}" in message


def test_known_options_are_taken_also_cut_short_or_with_an_equals_sign(parser):
    args = parser.parse_args(["--batch", "3", "--output=--x"])
    assert (args.batch_size, args.output) == (3, "--x")


def test_what_follows_two_dashes_is_no_option(parser):
    parser.add_argument("words", nargs="*")
    assert parser.parse_args(["--", "--xyz"]).words == ["--xyz"]


def test_the_command_line_is_what_is_read_by_default(parser, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["it.py", "--outpt", "x"])
    with pytest.raises(SystemExit):
        parser.parse_args()
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("made", "word", "near"),
    [
        (demo.argument_parser, "--confg-file", "--config-file"),  # required, and misspelt
        (train_net.argument_parser, "--nmu-gpus", "--num-gpus"),
        (train_net.argument_parser, "--eval-olny", "--eval-only"),
    ],
)
def test_the_programs_name_the_nearest_option(made, word, near, capsys):
    with pytest.raises(SystemExit):
        made().parse_args([word, "x"])
    assert f"unrecognized arguments: {word}; the nearest: {near}" in capsys.readouterr().err


def test_help_ends_with_the_examples_as_they_are_written(parser):
    assert parser.format_help().endswith("Examples:\n    $ as written\n")


def test_a_model_is_asked_for_as_load_takes_it(parser):
    program.add_model_arguments(parser)
    args = parser.parse_args(["--config-file", "a", "--opts", "A.B", "1"])
    assert (args.config_file, args.weights, args.device) == ("a", "", None)
    assert args.opts == ["A.B", "1"]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("two\n  lines"), "it.py: two lines"),
        (KeyError("a key"), "it.py: a key"),
        (FileNotFoundError(2, "No such file", "a.txt"), "it.py: [Errno 2] No such file: 'a.txt'"),
    ],
)
def test_what_is_wrong_with_the_input_is_one_sentence(error, sentence):
    with pytest.raises(SystemExit) as end, program.one_sentence("it.py"):
        raise error
    assert end.value.code == sentence


def test_what_omegaconf_says_of_its_objects_is_left_out():
    with pytest.raises(SystemExit) as end, program.one_sentence("it.py"):
        OmegaConf.create({"a": {"b": "${nowhere}"}}).a.b  # noqa: B018
    message = end.value.code
    assert message.startswith("it.py: the config cannot be used") and "'a.b'" in message
    assert "object_type" not in message and "\n" not in message


def test_a_mistake_of_the_program_keeps_its_traceback():
    with pytest.raises(TypeError), program.one_sentence("it.py"):
        raise TypeError("a bug")
