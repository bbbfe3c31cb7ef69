"""Import paths of earlier versions: scripts, notebooks and saved configs name them."""

import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

import dino_d2

# What each module that has moved, or a part of it, offered before.
PLACES = {
    "backbone_weights": """
        State resnet_names from_model_zoo from_torchvision from_convnext convnext_of_timm
        from_timm resize_windows rename move
    """,
    "checkpoint": """
        ClassNames COCO_80 COCO_91 CheckpointError LABELS CLASS_BIAS detect_format from_official
        from_detrex from_mmdet to_official count_heads repeat_heads select_classes
    """,
    "checkpoint_io": """
        WRAPPERS MAX_DEPTH USUAL_PLACES ReleaseHandler fetch DamagedCheckpoint read Weights
        weights replacing write
    """,
    "checkpointer": """
        BEST TORCHVISION MSRA EXPECTED USUAL_ENCODING REMEDIES Checkpointer
        pixels_of encoding_of coco_classes
    """,
    "config": """
        add_dino_config read_config evaluation_augmentations build_parts build_criterion named
    """,
    "data.coco_faults": """
        KEYS MANY DatasetError dataset_name parse read_json faults missing_images place_of
        is_finite clip
    """,
    "distributed": """
        WORKER_VARIABLES launch work world_size is_worker check_gpus join distribute replicate
        shard unwrap suspend_sync share_buffers gather scatter load_optimizer mean_over_workers
    """,
    "engine.schedule": """
        Keys LONGEST_WARM_UP scale_schedule check_numbers scaled count_images share_of
        get put
    """,
    "evaluation.errors": """
        THRESHOLD SIZES IOU_50 IOU_75 ClassScores SizeScores ErrorCounts Analysis analyse
        class_scores best_threshold size_scores error_counts confusion_matrix worst_first
    """,
    "evaluation.evaluator": "BACKGROUND ErrorAnalysisEvaluator write_analysis",
    "model_zoo": "NUM_CLASSES get_config_file get_config get build weights_of fetch_weights",
    "modeling.decoder": "DecoderLayer AnchorPosition Decoder",
    "modeling.encoder": "EncoderLayer Encoder flatten valid_ratio token_centers",
    "modeling.inference": "fold_norms",
    "modeling.predecessors": """
        LearnedPosition ScaledAnchorPosition PointQueries ProposalQueries AllProposals
        IndicatorQueries IndicatorDenoising BoxesOnly
    """,
    "overrides": "apply_overrides keys_of unknown_key",
    "releases": "Release RELEASES find alternatives table",
    "visualize.errors": "CROWD STYLES LEGEND draw_image_errors",
}


@pytest.mark.parametrize("module", PLACES)
def test_what_has_moved_is_found_where_it_was(module):
    old = import_module(f"dino_d2.{module}")
    assert not [name for name in PLACES[module].split() if not hasattr(old, name)]


def test_it_is_the_same_thing():
    from dino_d2.checkpointer import Checkpointer as old

    from dino_d2.weights.checkpointer import Checkpointer

    assert old is Checkpointer


@pytest.mark.parametrize("name", ["model_zoo", "checkpointer"])
def test_modules_are_attributes_of_the_package_as_before(name, monkeypatch):
    monkeypatch.delattr(dino_d2, name, raising=False)  # as if nothing had imported it
    monkeypatch.delitem(sys.modules, f"dino_d2.{name}", raising=False)
    assert getattr(dino_d2, name).__name__ == f"dino_d2.{name}"


def test_other_names_are_still_unknown():
    with pytest.raises(AttributeError, match="no attribute 'checkpoints'"):
        dino_d2.checkpoints  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        import_module("dino_d2.checkpoints")


def test_names_of_other_packages_are_theirs():
    assert not [name for name in PLACES if "." not in name and find_spec(name)]
