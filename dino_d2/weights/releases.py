"""The published checkpoints of DINO and its predecessors, and the table in MODEL_ZOO.md.

AP is on COCO val2017, PQ there too and mIoU on ADE20K and Cityscapes, as stated by their authors.
Links and numbers are from the READMEs of IDEA-Research/DINO, IDEA-Research/detrex,
IDEA-Research/MaskDINO, open-mmlab/mmdetection and facebookresearch/detr, and from the pages of the
Hugging Face hub; beginnings of hashes from mmdetection's file names and, for the official files
that the hub mirrors with their weights as they are, from LibreYOLO's tests.
"""

import os
from functools import partial
from typing import NamedTuple

from ..names import hint, nearest

# Temperature and offset of the encoding of pixels. No file says which it needs.
Encoding = tuple[float, float]
DINO_ENCODING, DETR_ENCODING = (20.0, 0.0), (10000.0, -0.5)


class Release(NamedTuple):
    """A published checkpoint."""

    name: str
    config: str  # relative to configs/, without a suffix the YAML twin
    epochs: int
    ap: float
    encoding: Encoding | None  # None: it follows from the names in the file
    url: str  # of the file, of a mirror, or of the folder that has it
    file: str  # its name where it was published
    sha256: str  # how it begins; "": not known
    licence: str
    metric: str = "AP"  # what `ap` is, or PQ or mIoU
    num_classes: int = 80

    @property
    def in_folder(self) -> bool:
        """Whether its URL is that of a folder, which does not always give it to a program."""
        return "/folders/" in self.url


def _release(
    name: str,
    path: str,
    *,
    source: str,
    url: str,
    epochs: int,
    ap: float,
    encoding: Encoding | None = None,
    config: str = "",
    sha256: str = "",
    metric: str = "AP",
    num_classes: int = 80,
) -> Release:
    """One of a source, whose `url` the `path` completes; the config is by default the like-named."""
    address = url.format(path)
    return Release(
        name=f"{source}/{name}",
        config=config or (name if source == "official" else f"{source}/{name}"),
        epochs=epochs,
        ap=ap,
        encoding=encoding,
        url=address,
        file=os.path.basename(address) if "{}" in url else path,
        sha256=sha256,
        licence="Apache-2.0",  # of all sources
        metric=metric,
        num_classes=num_classes,
    )


_official = partial(
    _release,
    source="official",
    url="https://drive.google.com/drive/folders/1qD5m1NmK0kjE5hh-G17XUX751WsEG-h_",
    encoding=DINO_ENCODING,
)
_MIRROR = "https://huggingface.co/LibreYOLO/LibreDINODETR{0}/resolve/{1}/LibreDINODETR{0}.pt"
_detrex = partial(
    _release,
    source="detrex",
    url="https://github.com/IDEA-Research/detrex-storage/releases/download/{}",
    encoding=DETR_ENCODING,
)
_mmdet = partial(
    _release,
    source="mmdet",
    url="https://download.openmmlab.com/mmdetection/v3.0/dino/{}",
    encoding=DINO_ENCODING,
)
_maskdino = partial(
    _release,
    source="maskdino",
    url="https://github.com/IDEA-Research/detrex-storage/releases/download/maskdino-v0.1.0/{}",
)
_detr = partial(_release, source="detr", url="https://dl.fbaipublicfiles.com/detr/{}")
_huggingface = partial(
    _release,
    source="huggingface",
    url="https://huggingface.co/{}/resolve/main/model.safetensors",
)

# fmt: off
_ROWS = (
    _official("dino_R_50_4scale_12ep", "checkpoint0011_4scale.pth", epochs=12, ap=49.0, sha256="8b224307", url=_MIRROR.format("r50", "462f5afabb53146d933827814199564a9bd6ed93")),
    _official("dino_R_50_4scale_24ep", "checkpoint0023_4scale.pth", epochs=24, ap=50.4),
    _official("dino_R_50_4scale_36ep", "checkpoint0033_4scale.pth", epochs=36, ap=50.9),
    _official("dino_R_50_5scale_12ep", "checkpoint0011_5scale.pth", epochs=12, ap=49.4, sha256="8dd59b36", url=_MIRROR.format("r50s5", "7d04c21564296ed31385c2f93db749a568940ab1")),
    _official("dino_R_50_5scale_24ep", "checkpoint0022_5scale.pth", epochs=24, ap=51.3),
    _official("dino_R_50_5scale_36ep", "checkpoint0031_5scale.pth", epochs=36, ap=51.2),
    _official("dino_Swin_L_384_4scale_12ep", "checkpoint0011_4scale_swin.pth", epochs=12, ap=56.8),
    _official("dino_Swin_L_384_4scale_36ep", "checkpoint0029_4scale_swin.pth", epochs=36, ap=58.0),
    _official("dino_Swin_L_384_5scale_12ep", "checkpoint0011_5scale_swin.pth", epochs=12, ap=57.3),
    _official("dino_Swin_L_384_5scale_36ep", "checkpoint0027_5scale_swin.pth", epochs=36, ap=58.5, sha256="15321350", url=_MIRROR.format("swinl", "3bc6420403413741e224529ff58dd6220e902220")),
    _detrex("dino_R_50_4scale_12ep", "v0.2.0/dino_r50_4scale_12ep_49_2AP.pth", epochs=12, ap=49.2),
    _detrex("dino_R_50_4scale_12ep_300dn", "v0.2.0/dino_r50_4scale_12ep_300dn.pth", epochs=12, ap=49.5, config="detrex/dino_R_50_4scale_12ep"),
    _detrex("dino_R_50_4scale_12ep_hacked", "v0.4.0/dino_r50_4scale_12ep_hacked_trainer.pth", epochs=12, ap=49.4, config="detrex/dino_R_50_4scale_12ep"),
    _detrex("dino_R_50_4scale_24ep", "v0.1.1/dino_r50_4scale_24ep.pth", epochs=24, ap=50.6, encoding=DINO_ENCODING),
    _detrex("dino_R_50_5scale_12ep", "v0.2.1/dino_r50_5scale_12ep.pth", epochs=12, ap=49.6),
    _detrex("dino_R_101_4scale_12ep", "v0.1.1/dino_r101_4scale_12ep.pth", epochs=12, ap=50.0),
    _detrex("dino_Swin_T_224_4scale_12ep", "v0.1.1/dino_swin_tiny_224_4scale_12ep.pth", epochs=12, ap=51.3, config="detrex/dino_Swin_T_224_4scale_12ep.py"),
    _detrex("dino_Swin_T_224_4scale_12ep_22k", "v0.1.1/dino_swin_tiny_224_22kto1k_finetune_4scale_12ep.pth", epochs=12, ap=52.5, config="detrex/dino_Swin_T_224_4scale_12ep.py"),
    _detrex("dino_Swin_S_224_4scale_12ep", "v0.1.1/dino_swin_small_224_4scale_12ep.pth", epochs=12, ap=53.0, config="detrex/dino_Swin_S_224_4scale_12ep.py"),
    _detrex("dino_Swin_B_384_4scale_12ep", "v0.1.1/dino_swin_base_384_4scale_12ep.pth", epochs=12, ap=55.8, config="detrex/dino_Swin_B_384_4scale_12ep.py"),
    _detrex("dino_Swin_L_224_4scale_12ep", "v0.1.1/dino_swin_large_224_4scale_12ep.pth", epochs=12, ap=56.9, config="detrex/dino_Swin_L_224_4scale_12ep.py"),
    _detrex("dino_Swin_L_384_4scale_12ep", "v0.1.1/dino_swin_large_4scale_12ep.pth", epochs=12, ap=56.9, config="detrex/dino_Swin_L_384_4scale_12ep.py"),
    _detrex("dino_Swin_L_384_4scale_36ep", "v0.2.0/dino_swin_large_384_4scale_36ep.pth", epochs=36, ap=58.1, config="detrex/dino_Swin_L_384_4scale_36ep.py"),
    _detrex("dino_Swin_L_384_5scale_12ep", "v0.2.1/dino_swin_large_384_5scale_12ep.pth", epochs=12, ap=57.5, config="detrex/dino_Swin_L_384_5scale_12ep.py"),
    _detrex("dino_Swin_L_384_5scale_36ep", "v0.2.1/dino_swin_large_384_5scale_36ep.pth", epochs=36, ap=58.5, config="detrex/dino_Swin_L_384_5scale_36ep.py"),
    _detrex("dino_ConvNeXt_T_384_4scale_12ep", "v0.4.0/dino_convnext_tiny_384_4scale_12ep.pth", epochs=12, ap=52.4, config="detrex/dino_ConvNeXt_T_384_4scale_12ep.py"),
    _detrex("dino_ConvNeXt_S_384_4scale_12ep", "v0.4.0/dino_convnext_small_384_4scale_12ep.pth", epochs=12, ap=54.2, config="detrex/dino_ConvNeXt_S_384_4scale_12ep.py"),
    _detrex("dino_ConvNeXt_B_384_4scale_12ep", "v0.4.0/dino_convnext_base_384_4scale_12ep.pth", epochs=12, ap=55.1, config="detrex/dino_ConvNeXt_B_384_4scale_12ep.py"),
    _detrex("dino_ConvNeXt_L_384_4scale_12ep", "v0.4.0/dino_convnext_large_384_4scale_12ep.pth", epochs=12, ap=55.5, config="detrex/dino_ConvNeXt_L_384_4scale_12ep.py"),
    _detrex("dino_R_50_4scale_12ep_ema", "v0.3.0/dino_r50_4scale_12ep_with_ema.pth", epochs=12, ap=49.4, config="detrex/dino_R_50_4scale_12ep"),
    _detrex("dino_R_50_4scale_12ep_class_weight_2", "v0.4.0/dino_r50_4scale_12ep_backbone_2e-5_class_weight_2.0.pth", epochs=12, ap=49.8, config="detrex/dino_R_50_4scale_12ep"),
    _detrex("dino_R_50_4scale_12ep_class_weight_2_300dn", "v0.4.0/dino_r50_4scale_12ep_backbone_2e-5_class_weight_2.0_300dn.pth", epochs=12, ap=50.0, config="detrex/dino_R_50_4scale_12ep"),
    _detrex("dino_Swin_S_224_4scale_12ep_22k", "v0.4.0/dino_swin_small_22k_4scale_12ep.pth", epochs=12, ap=54.5, config="detrex/dino_Swin_S_224_4scale_12ep.py"),
    _detrex("dino_ViTDet_B_4scale_12ep", "v0.2.1/dino_vitdet_4scale_12ep.pth", epochs=12, ap=50.2, config="detrex/dino_ViTDet_B_4scale_12ep.py"),
    _detrex("dino_ViTDet_B_4scale_50ep", "v0.2.1/dino_vitdet_base_4scale_50ep.pth", epochs=50, ap=55.0, config="detrex/dino_ViTDet_B_4scale_12ep.py"),
    _detrex("dino_ViTDet_L_4scale_12ep", "v0.2.1/dino_vitdet_large_4scale_12ep.pth", epochs=12, ap=52.9, config="detrex/dino_ViTDet_L_4scale_12ep.py"),
    _detrex("dino_ViTDet_L_4scale_50ep", "v0.2.1/dino_vitdet_large_4scale_50ep.pth", epochs=50, ap=57.5, config="detrex/dino_ViTDet_L_4scale_12ep.py"),
    _detrex("dino_ConvNeXt_T_384_4scale_12ep_1k", "v0.4.0/dino_convnext_tiny_1k_4scale_12ep.pth", epochs=12, ap=51.4, config="detrex/dino_ConvNeXt_T_384_4scale_12ep.py"),
    _detrex("dino_ConvNeXt_S_384_4scale_12ep_1k", "v0.4.0/dino_convnext_small_1k_4scale_12ep.pth", epochs=12, ap=52.0, config="detrex/dino_ConvNeXt_S_384_4scale_12ep.py"),
    _detrex("dino_ConvNeXt_B_384_4scale_12ep_1k", "v0.4.0/dino_convnext_base_1k_4scale_12ep.pth", epochs=12, ap=52.6, config="detrex/dino_ConvNeXt_B_384_4scale_12ep.py"),
    _detrex("dino_ConvNeXt_L_384_4scale_12ep_1k", "v0.4.0/dino_convnext_large_1k_4scale_12ep.pth", epochs=12, ap=53.4, config="detrex/dino_ConvNeXt_L_384_4scale_12ep.py"),
    _detrex("dino_FocalNet_L_384_4scale_12ep", "v0.2.1/dino_focal_large_lrf_384_4scale_12ep.pth", epochs=12, ap=57.5, config="detrex/dino_FocalNet_L_384_4scale_12ep.py"),
    _detrex("dino_FocalNet_L_384_4scale_36ep", "v0.4.0/dino_focal_large_3level_4scale_36ep.pth", epochs=36, ap=58.3, config="detrex/dino_FocalNet_L_384_4scale_12ep.py"),
    _detrex("dino_FocalNet_L_384_fl4_4scale_12ep", "v0.2.1/dino_focal_large_lrf_384_fl4_4scale_12ep.pth", epochs=12, ap=58.0, config="detrex/dino_FocalNet_L_384_fl4_4scale_12ep.py"),
    _detrex("dino_FocalNet_L_384_fl4_5scale_12ep", "v0.2.1/dino_focalnet_large_lrf_384_fl4_5scale_12ep.pth", epochs=12, ap=58.5, config="detrex/dino_FocalNet_L_384_fl4_5scale_12ep.py"),
    _mmdet("dino_R_50_4scale_12ep", "dino-4scale_r50_8xb2-12e_coco/dino-4scale_r50_8xb2-12e_coco_20221202_182705-55b2bba2.pth", epochs=12, ap=49.0, config="detrex/dino_R_50_4scale_24ep", sha256="55b2bba2"),
    _mmdet("dino_R_50_4scale_12ep_improved", "dino-4scale_r50_improved_8xb2-12e_coco/dino-4scale_r50_improved_8xb2-12e_coco_20230818_162607-6f47a913.pth", epochs=12, ap=50.1, config="detrex/dino_R_50_4scale_12ep", encoding=DETR_ENCODING, sha256="6f47a913"),
    _mmdet("dino_Swin_L_384_5scale_12ep", "dino-5scale_swin-l_8xb2-12e_coco/dino-5scale_swin-l_8xb2-12e_coco_20230228_072924-a654145f.pth", epochs=12, ap=57.2, config="mmdet/dino_Swin_L_384_5scale_12ep.py", sha256="a654145f"),
    _mmdet("dino_Swin_L_384_5scale_36ep", "dino-swinl/dino-5scale_swin-l_8xb2-36e_coco-5486e051.pth", epochs=36, ap=58.4, config="mmdet/dino_Swin_L_384_5scale_36ep.py", sha256="5486e051", url="https://github.com/RistoranteRist/mmlab-weights/releases/download/{}"),
    _maskdino("maskdino_R_50_50ep", "maskdino_r50_50ep_300q_hid1024_3sd1_instance_maskenhanced_mask46.1ap_box51.5ap.pth", epochs=50, ap=51.5, config="MaskDINO/maskdino_R_50_50ep"),
    _maskdino("maskdino_R_50_4scale_50ep", "maskdino_r50_50ep_300q_hid2048_3sd1_instance_maskenhanced_mask46.3ap_box51.7ap.pth", epochs=50, ap=51.7, config="MaskDINO/maskdino_R_50_4scale_50ep"),
    _maskdino("maskdino_Swin_L_384_5scale_50ep", "maskdino_swinl_50ep_300q_hid2048_3sd1_instance_maskenhanced_mask52.3ap_box59.0ap.pth", epochs=50, ap=59.0, config="MaskDINO/maskdino_Swin_L_384_5scale_50ep"),
    _maskdino("maskdino_Swin_L_384_5scale_50ep_no_mask_enhance", "maskdino_swinl_50ep_300q_hid2048_3sd1_instance_mask52.1ap_box58.3ap.pth", epochs=50, ap=58.3, config="MaskDINO/maskdino_Swin_L_384_5scale_50ep_no_mask_enhance"),
    _maskdino("maskdino_R_50_4scale_50ep_panoptic", "maskdino_r50_50ep_300q_hid2048_3sd1_panoptic_pq53.0.pth", epochs=50, ap=53.0, config="MaskDINO/maskdino_R_50_4scale_50ep_panoptic", metric="PQ", num_classes=133),
    _maskdino("maskdino_Swin_L_384_5scale_50ep_panoptic", "maskdino_swinl_50ep_300q_hid2048_3sd1_panoptic_58.3pq.pth", epochs=50, ap=58.3, config="MaskDINO/maskdino_Swin_L_384_5scale_50ep_panoptic", metric="PQ", num_classes=133),
    _maskdino("maskdino_R_50_160k_ade20k", "maskdino_r50_50ep_100q_celoss_hid1024_3s_semantic_ade20k_48.7miou.pth", epochs=127, ap=48.7, config="MaskDINO/maskdino_R_50_160k_ade20k", metric="mIoU", num_classes=150),
    _maskdino("maskdino_R_50_90k_cityscapes", "maskdino_r50_50ep_100q_celoss_hid1024_3s_semantic_cityscapes_79.8miou.pth", epochs=484, ap=79.8, config="MaskDINO/maskdino_R_50_90k_cityscapes", metric="mIoU", num_classes=19),
    _detr("detr_R_50_500ep", "detr-r50-e632da11.pth", epochs=500, ap=42.0, config="Predecessors/detr_R_50_500ep", sha256="e632da11"),
    _detr("detr_R_50_dc5_500ep", "detr-r50-dc5-f0fb7ef5.pth", epochs=500, ap=43.3, config="Predecessors/detr_R_50_dc5_500ep", sha256="f0fb7ef5"),
    _detr("detr_R_101_500ep", "detr-r101-2c7b67e5.pth", epochs=500, ap=43.5, config="Predecessors/detr_R_101_500ep", sha256="2c7b67e5"),
    _detr("detr_R_101_dc5_500ep", "detr-r101-dc5-a2e86def.pth", epochs=500, ap=44.9, config="Predecessors/detr_R_101_dc5_500ep", sha256="a2e86def"),
    _huggingface("detr_R_50_500ep", "facebook/detr-resnet-50", epochs=500, ap=42.0, config="Predecessors/detr_R_50_500ep"),
    _huggingface("deformable_detr_R_50_50ep", "SenseTime/deformable-detr", epochs=50, ap=44.5, config="Predecessors/deformable_detr_R_50_50ep"),
    _huggingface("deformable_detr_R_50_refine_50ep", "SenseTime/deformable-detr-with-box-refine", epochs=50, ap=46.2, config="Predecessors/deformable_detr_R_50_refine_50ep"),
    _huggingface("deformable_detr_R_50_two_stage_50ep", "SenseTime/deformable-detr-with-box-refine-two-stage", epochs=50, ap=46.9, config="Predecessors/deformable_detr_R_50_two_stage_50ep"),
    _huggingface("dab_detr_R_50_50ep", "IDEA-Research/dab-detr-resnet-50", epochs=50, ap=42.2, config="Predecessors/dab_detr_R_50_50ep"),
    _detrex("deformable_detr_R_50_50ep", "v0.1.0/converted_deformable_detr_r50.pth", epochs=50, ap=44.5, config="Predecessors/deformable_detr_R_50_50ep", encoding=None),
    _detrex("deformable_detr_R_50_refine_50ep", "v0.1.0/converted_deformable_detr_r50_with_box_refine_50ep.pth", epochs=50, ap=46.2, config="Predecessors/deformable_detr_R_50_refine_50ep", encoding=None),
    _detrex("deformable_detr_R_50_two_stage_50ep", "v0.1.0/converted_deformable_detr_r50_two_stage_50ep.pth", epochs=50, ap=46.9, config="Predecessors/deformable_detr_R_50_two_stage_50ep", encoding=None),
    _detrex("deformable_detr_R_50_refine_50ep_new", "v0.1.1/deformable_detr_with_box_refinement_50ep_new.pth", epochs=50, ap=47.0, config="Predecessors/deformable_detr_R_50_refine_50ep", encoding=None),
    _detrex("deformable_detr_R_50_two_stage_50ep_new", "v0.1.1/deformable_detr_r50_two_stage_50ep_new.pth", epochs=50, ap=48.2, config="Predecessors/deformable_detr_R_50_two_stage_50ep", encoding=None),
    _detrex("dab_deformable_detr_R_50_50ep", "v0.2.0/dab_deformable_detr_r50_50ep_49AP.pth", epochs=50, ap=49.0, config="Predecessors/dab_deformable_detr_R_50_50ep", encoding=None),
    _detrex("dab_deformable_detr_R_50_two_stage_50ep", "v0.2.0/dab_deformable_detr_r50_two_stage_49_7AP.pth", epochs=50, ap=49.7, config="Predecessors/dab_deformable_detr_R_50_two_stage_50ep", encoding=None),
    _detrex("dn_deformable_detr_R_50_50ep", "v0.1.0/converted_dn_deformable_detr_r50_50ep.pth", epochs=50, ap=49.5, config="Predecessors/dn_deformable_detr_R_50_50ep", encoding=None),
)
# fmt: on
RELEASES = {x.name: x for x in _ROWS}


def find(name: str) -> Release:
    """A published checkpoint by name; without a prefix, of the paper's authors.

    >>> find("detrex/dino_R_50_4scale_12ep").config
    'detrex/dino_R_50_4scale_12ep'

    Raises:
        FileNotFoundError: no such name; suggests the nearest
    """
    release = _lookup(name)
    if release is None:
        raise FileNotFoundError(
            f"there is no published checkpoint '{name}'; {hint(name, RELEASES)}"
        )
    return release


def alternatives(name: str) -> list[str]:
    """At most three checkpoints in place of one that lies in a folder, the most similar first.

    They have the same backbone and levels, and a URL each; there are none for one that has.
    """
    release = _lookup(name)
    if release is None or not release.in_folder:
        return []
    family = release.name.split("/")[1].partition("scale")[0]
    downloads = [x.name for x in RELEASES.values() if not x.in_folder]
    return nearest(release.name, [x for x in downloads if x.split("/")[1].startswith(family)])


def _lookup(name: str) -> Release | None:
    return RELEASES.get(name) or RELEASES.get(f"official/{name}")


def table() -> str:
    """A Markdown table of all checkpoints, for projects/dino/MODEL_ZOO.md."""
    rows = [
        "| name | config | epochs | AP | file | SHA-256 | licence |",
        "|---|---|---|---|---|---|---|",
    ]
    for x in RELEASES.values():
        config = x.config if x.config.endswith(".py") else f"{x.config}.yaml"
        rows.append(
            f"| `{x.name}` | [{config}](../../configs/{config}) | {x.epochs} "
            f"| {x.ap}{'' if x.metric == 'AP' else f' {x.metric}'} "
            f"| [{x.file}]({x.url}) | {x.sha256} | {x.licence} |"
        )
    return "\n".join(rows)
