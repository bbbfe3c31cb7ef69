"""An output folder belongs to one training: what an earlier one left is neither lost nor mixed."""

import pytest

from dino_d2.engine.folder import check_folder, claim_folder

OF_A_TRAINING = [
    *("model_0000499.pth", "model_final.pth", "model_best.pth", "last_checkpoint"),
    *("metrics.json", "events.out.tfevents.1.host.2.0", "log.txt", "log.txt.rank1"),
    *("config.yaml", "wandb_id", "non_finite/0000003_worker_0.pth"),
    *("inference/coco_instances_results.json", "inference/ema/per_class.csv"),
    "inference/2_val/errors.png",
]
OF_A_USER = [
    *("model_mine.pth", "notes.txt", "data/train.json", "inference/mine.txt", "wandb/run/a"),
    *("log.txt.bak", "curves.png", "non_finite/mine.txt"),
]


def fill(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def files(folder):
    return {str(x.relative_to(folder)) for x in folder.rglob("*") if x.is_file()}


@pytest.mark.parametrize("name", OF_A_TRAINING[:6])
def test_a_folder_with_an_earlier_training_is_refused(name, tmp_path):
    fill(tmp_path, [name])
    with pytest.raises(ValueError, match="earlier training.*--resume.*another.*--overwrite"):
        claim_folder(str(tmp_path))
    assert files(tmp_path) == {name}


@pytest.mark.parametrize("names", [[], OF_A_USER, OF_A_TRAINING[6:]])
def test_what_is_no_result_of_a_training_blocks_none(names, tmp_path):
    fill(tmp_path, names)
    claim_folder(str(tmp_path))
    assert files(tmp_path) == set(names)


def test_numbers_of_a_training_that_never_wrote_any_block_none(tmp_path):
    (tmp_path / "metrics.json").touch()
    check_folder(str(tmp_path))


def test_to_go_on_leaves_everything(tmp_path):
    fill(tmp_path, OF_A_TRAINING)
    claim_folder(str(tmp_path), resume=True)
    assert files(tmp_path) == set(OF_A_TRAINING)


@pytest.mark.parametrize("name", OF_A_TRAINING[1:3])
def test_a_checkpoint_that_nothing_goes_on_from_is_not_written_over(name, tmp_path):
    fill(tmp_path, [name, "metrics.json"])
    with pytest.raises(ValueError, match=f"'{name}', but no file 'last_checkpoint'.*--resume"):
        claim_folder(str(tmp_path), resume=True)
    (tmp_path / name).unlink()  # it ended before its first: a job that is restarted can begin
    claim_folder(str(tmp_path), resume=True)
    assert files(tmp_path) == {"metrics.json"}


def test_a_training_that_was_killed_before_its_first_last_checkpoint_goes_on(tmp_path):
    fill(tmp_path, ["model_0000001.pth", "metrics.json"])
    claim_folder(str(tmp_path), resume=True)
    assert files(tmp_path) == {"model_0000001.pth", "metrics.json"}


def test_to_overwrite_removes_what_a_training_wrote_and_nothing_else(tmp_path):
    fill(tmp_path, OF_A_TRAINING + OF_A_USER)
    claim_folder(str(tmp_path), overwrite=True)
    assert files(tmp_path) == set(OF_A_USER)
    check_folder(str(tmp_path))


def test_folders_that_are_left_empty_go_too(tmp_path):
    fill(tmp_path, OF_A_TRAINING)
    claim_folder(str(tmp_path), overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_made(tmp_path):
    claim_folder(str(tmp_path / "a" / "b"), overwrite=True)
    assert (tmp_path / "a" / "b").is_dir()


def test_other_workers_hear_what_the_main_one_found(tmp_path, monkeypatch):
    fill(tmp_path, OF_A_TRAINING)
    monkeypatch.setattr("dino_d2.engine.folder.comm.is_main_process", lambda: False)
    monkeypatch.setattr("dino_d2.engine.folder.comm.all_gather", lambda x: [ValueError("no"), x])
    with pytest.raises(ValueError, match="no"):
        claim_folder(str(tmp_path), overwrite=True)
    assert files(tmp_path) == set(OF_A_TRAINING)
