"""What the programs share: options, and one sentence about what is wrong."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dino_d2.images import SUFFIXES

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
        ("--batchsize", "did you mean: --batch-size"),
        ("--outptu=x", "did you mean: --output"),
        ("--xyz", "available: -h, --help, --batch-size, --output"),
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


def test_classes_are_changed_by_names_with_any_characters(parser):
    program.add_data_arguments(parser)
    words = ["--data", "x", "--drop", 'a b, "c, d"', "--drop", "e", "--merge", "f = g=h,i"]
    args = parser.parse_args([*words, "--merge", "j=k", "--ignore", "DontCare"])
    assert args.drop == ["a b", "c, d", "e"] and args.ignore == ["DontCare"]
    assert args.merge == [("f", ["g=h", "i"]), ("j", ["k"])]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--drop", ""], "'' has an empty name: write CLASS,CLASS"),
        (["--ignore", "a,,b"], "'a,,b' has an empty name"),
        (["--merge", "a"], "'a' is not NEW=CLASS,CLASS"),
        (["--merge", "=a"], "'=a' is not NEW=CLASS,CLASS"),
        (["--merge", "a="], "'a=' is not NEW=CLASS,CLASS"),
        (["--merge", "a=b,"], "'b,' has an empty name"),
        (["--drop", "a"], "--drop changes the classes of --data or --train-json: give that"),
    ],
)
def test_changes_of_classes_that_name_none_are_one_sentence(words, sentence, parser, capsys):
    program.add_data_arguments(parser, files=["train_json"])
    parser.add_argument("--train-json")
    with pytest.raises(SystemExit):
        parser.parse_args(words)
    assert sentence in capsys.readouterr().err.splitlines()[-1]


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
    assert f"unrecognized arguments: {word}; did you mean: {near}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "1", "0.5", "1e-3"])
def test_a_score_is_a_number_between_0_and_1(text, parser):
    parser.add_argument("--threshold", type=program.score)
    assert parser.parse_args(["--threshold", text]).threshold == float(text)


@pytest.mark.parametrize("text", ["50", "-0.1", "nan", "high"])
def test_what_is_no_score_is_refused_with_its_option(text, parser, capsys):
    parser.add_argument("--threshold", type=program.score)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--threshold={text}"])
    message = f"argument --threshold: '{text}' is not a score: give a number between 0 and 1"
    assert message in capsys.readouterr().err


@pytest.fixture
def files(tmp_path):
    """A folder of three images, a point cloud and a folder that is named as an image."""
    for name in ("b.png", "a.JPG", "a1.png", "scan.pcd"):
        (tmp_path / name).touch()
    (tmp_path / "c.png").mkdir()
    return tmp_path


def find(*inputs):
    found = program.find_files([str(x) for x in inputs], SUFFIXES, "--images")
    return [path.name for path in found]


def test_a_folder_and_a_pattern_stand_for_the_files_of_these_suffixes(files):
    assert find(files) == find(files / "*") == ["a.JPG", "a1.png", "b.png"]
    assert find(files / "?1.*", files) == ["a1.png", "a.JPG", "b.png"]  # each once


def test_a_file_that_is_named_is_taken_whatever_its_suffix(files):
    assert find(files / "scan.pcd") == ["scan.pcd"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(files):
    assert find(files / "a[1].png") == ["a1.png"]
    (files / "a[1].png").touch()
    assert find(files / "a[1].png") == ["a[1].png"]


@pytest.mark.parametrize(
    ("name", "end"),
    [("c.png", ".tiff, .webp"), ("*.xyz", ".tiff, .webp"), ("d.png", "did you mean: '{}/c.png'")],
)
def test_what_means_no_file_is_one_sentence(name, end, files):
    with pytest.raises(FileNotFoundError) as caught:
        find(files / name)
    message = str(caught.value)
    assert message.startswith(f"--images '{files / name}' is not a file")
    assert message.endswith(end.format(files))


def test_a_folder_is_made_with_those_around_it(tmp_path):
    for _ in range(2):  # the second time it is there
        program.make_folder(tmp_path / "a" / "b", "--output")
        assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [("file", "it is a file"), ("file/more", "Not a directory"), ("a" * 300, "File name too long")],
)
def test_what_can_be_no_folder_is_one_sentence(name, reason, tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / name
    with pytest.raises(ValueError) as caught:
        program.make_folder(path, "--output")
    assert str(caught.value) == (
        f"--output '{path}' is not writable ({reason}): choose another folder"
    )


def test_a_folder_that_takes_no_files_is_one_sentence(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", f"{dir}/tmpqlbnmfl8")

    monkeypatch.setattr(program.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"\(Permission denied\)") as caught:
        program.make_folder(tmp_path, "--output")
    assert "tmpqlbnmfl8" not in str(caught.value)


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


ALL = sorted(x.name for x in PROGRAMS.glob("*.py") if "__main__" in x.read_text())
ASK = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    for option in ("--help", "--no-such-option"):
        sys.argv = [name, option]
        try:
            runpy.run_path(f"{sys.path[0]}/{name}", run_name="__main__")
        except SystemExit as end:
            assert end.code == (0 if option == "--help" else 2), name
        slow = {"torch", "detectron2", "matplotlib", "scipy"} & sys.modules.keys()
        assert not slow, f"{name} {option} imports {slow}"
"""


def test_help_and_wrong_options_do_not_wait_for_what_takes_seconds_to_import():
    assert len(ALL) == 16
    asked = subprocess.run(
        [sys.executable, "-c", ASK, PROGRAMS, *ALL], capture_output=True, text=True
    )
    assert asked.returncode == 0, asked.stderr


IMPORT = """
import dino_d2, numpy, sys, torch
print([x for x in sys.modules if x.startswith("scipy.opt")])
grey = numpy.zeros(1)
grey.flags.writeable = False
exec("torch.as_tensor(grey)", {"torch": torch, "grey": grey, "__name__": "detectron2.data"})
from dino_d2.modeling.swin import SwinTransformer
SwinTransformer(embed_dim=32, depths=(1,), num_heads=(1,), out_indices=(0,))
"""


@pytest.mark.slow
def test_the_package_imports_in_silence_and_nothing_that_only_some_calls_need():
    """And what Detectron2 does with grey values and with Swin is no warning to its users."""
    ran = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("[]\n", "")


WITHOUT = """
import sys
sys.modules["detectron2"] = None
import dino_d2
for use in ("dino_d2.DINO", "dino_d2.checkpointer", "dino_d2.load('quickstart')", "dino_d2.other"):
    try:
        eval(use)
    except (ModuleNotFoundError, AttributeError) as error:
        print(error)
"""


def test_without_detectron2_the_package_says_what_is_missing():
    ran = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    *missing, unknown = ran.stdout.splitlines()
    names = "dino_d2.DINO", "dino_d2.checkpointer", "a model that is not exported"
    for line, name in zip(missing, names, strict=True):
        assert line.startswith(f"{name} needs Detectron2: the README of dino_d2 says")
    assert "has no attribute 'other'" in unknown and not ran.stderr


def test_control_c_is_a_line_wherever_it_comes():
    code = "import program; raise KeyboardInterrupt"
    ran = subprocess.run([sys.executable, "-c", code], cwd=PROGRAMS, capture_output=True, text=True)
    assert ran.stderr.strip().endswith(": interrupted") and len(ran.stderr.splitlines()) == 2
    assert ran.returncode in (130, -signal.SIGINT)


FORK = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
import program
child = os.fork()
if child == 0:
    os.kill(os.getpid(), signal.SIGINT)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os.kill(os.getpid(), signal.SIGINT)
"""


def test_control_c_is_for_the_main_process_and_not_for_those_that_load_data():
    ran = subprocess.run([sys.executable, "-c", FORK], cwd=PROGRAMS, capture_output=True, text=True)
    assert ran.stdout == "7\n" and len(ran.stderr.strip().splitlines()) == 1
