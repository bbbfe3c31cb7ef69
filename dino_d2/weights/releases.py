"""The published checkpoints of DINO: what the model zoo offers, and MODEL_ZOO.md's table of it.

AP is that of COCO val2017 as their authors state it. Links and figures are those of the READMEs of
IDEA-Research/DINO, IDEA-Research/detrex and open-mmlab/mmdetection.
"""

from typing import NamedTuple

from ..names import hint, nearest

# Name, config (relative to configs/), epochs, AP, encoding of pixels, file. No file says which
# encoding it needs: "dino" is a temperature of 20 and no offset, "detr" 10000 and -0.5.
_OFFICIAL = """
dino_R_50_4scale_12ep        dino_R_50_4scale_12ep           12 49.0 dino checkpoint0011_4scale.pth
dino_R_50_4scale_24ep        dino_R_50_4scale_24ep           24 50.4 dino checkpoint0023_4scale.pth
dino_R_50_4scale_36ep        dino_R_50_4scale_36ep           36 50.9 dino checkpoint0033_4scale.pth
dino_R_50_5scale_12ep        dino_R_50_5scale_12ep           12 49.4 dino checkpoint0011_5scale.pth
dino_R_50_5scale_24ep        dino_R_50_5scale_24ep           24 51.3 dino checkpoint0022_5scale.pth
dino_R_50_5scale_36ep        dino_R_50_5scale_36ep           36 51.2 dino checkpoint0031_5scale.pth
dino_Swin_L_384_4scale_12ep  dino_Swin_L_384_4scale_12ep.py  12 56.8 dino checkpoint0011_4scale_swin.pth
dino_Swin_L_384_4scale_36ep  dino_Swin_L_384_4scale_36ep.py  36 58.0 dino checkpoint0029_4scale_swin.pth
dino_Swin_L_384_5scale_12ep  dino_Swin_L_384_5scale_12ep.py  12 57.3 dino checkpoint0011_5scale_swin.pth
dino_Swin_L_384_5scale_36ep  dino_Swin_L_384_5scale_36ep.py  36 58.5 dino checkpoint0027_5scale_swin.pth
"""
_DETREX = """
dino_R_50_4scale_12ep        detrex/dino_R_50_4scale_12ep           12 49.2 detr v0.2.0/dino_r50_4scale_12ep_49_2AP.pth
dino_R_50_4scale_12ep_300dn  detrex/dino_R_50_4scale_12ep           12 49.5 detr v0.2.0/dino_r50_4scale_12ep_300dn.pth
dino_R_50_4scale_12ep_hacked detrex/dino_R_50_4scale_12ep           12 49.4 detr v0.4.0/dino_r50_4scale_12ep_hacked_trainer.pth
dino_R_50_4scale_24ep        detrex/dino_R_50_4scale_24ep           24 50.6 dino v0.1.1/dino_r50_4scale_24ep.pth
dino_R_50_5scale_12ep        detrex/dino_R_50_5scale_12ep           12 49.6 detr v0.2.1/dino_r50_5scale_12ep.pth
dino_R_101_4scale_12ep       detrex/dino_R_101_4scale_12ep          12 50.0 detr v0.1.1/dino_r101_4scale_12ep.pth
dino_Swin_T_224_4scale_12ep  detrex/dino_Swin_T_224_4scale_12ep.py  12 51.3 detr v0.1.1/dino_swin_tiny_224_4scale_12ep.pth
dino_Swin_T_224_4scale_12ep_22k detrex/dino_Swin_T_224_4scale_12ep.py 12 52.5 detr v0.1.1/dino_swin_tiny_224_22kto1k_finetune_4scale_12ep.pth
dino_Swin_S_224_4scale_12ep  detrex/dino_Swin_S_224_4scale_12ep.py  12 53.0 detr v0.1.1/dino_swin_small_224_4scale_12ep.pth
dino_Swin_B_384_4scale_12ep  detrex/dino_Swin_B_384_4scale_12ep.py  12 55.8 detr v0.1.1/dino_swin_base_384_4scale_12ep.pth
dino_Swin_L_224_4scale_12ep  detrex/dino_Swin_L_224_4scale_12ep.py  12 56.9 detr v0.1.1/dino_swin_large_224_4scale_12ep.pth
dino_Swin_L_384_4scale_12ep  detrex/dino_Swin_L_384_4scale_12ep.py  12 56.9 detr v0.1.1/dino_swin_large_4scale_12ep.pth
dino_Swin_L_384_4scale_36ep  detrex/dino_Swin_L_384_4scale_36ep.py  36 58.1 detr v0.2.0/dino_swin_large_384_4scale_36ep.pth
dino_Swin_L_384_5scale_12ep  detrex/dino_Swin_L_384_5scale_12ep.py  12 57.5 detr v0.2.1/dino_swin_large_384_5scale_12ep.pth
dino_Swin_L_384_5scale_36ep  detrex/dino_Swin_L_384_5scale_36ep.py  36 58.5 detr v0.2.1/dino_swin_large_384_5scale_36ep.pth
dino_ConvNeXt_T_384_4scale_12ep detrex/dino_ConvNeXt_T_384_4scale_12ep.py 12 52.4 detr v0.4.0/dino_convnext_tiny_384_4scale_12ep.pth
dino_ConvNeXt_S_384_4scale_12ep detrex/dino_ConvNeXt_S_384_4scale_12ep.py 12 54.2 detr v0.4.0/dino_convnext_small_384_4scale_12ep.pth
dino_ConvNeXt_B_384_4scale_12ep detrex/dino_ConvNeXt_B_384_4scale_12ep.py 12 55.1 detr v0.4.0/dino_convnext_base_384_4scale_12ep.pth
dino_ConvNeXt_L_384_4scale_12ep detrex/dino_ConvNeXt_L_384_4scale_12ep.py 12 55.5 detr v0.4.0/dino_convnext_large_384_4scale_12ep.pth
"""
_MMDET = """
dino_R_50_4scale_12ep          detrex/dino_R_50_4scale_24ep 12 49.0 dino dino-4scale_r50_8xb2-12e_coco/dino-4scale_r50_8xb2-12e_coco_20221202_182705-55b2bba2.pth
dino_R_50_4scale_12ep_improved detrex/dino_R_50_4scale_12ep 12 50.1 detr dino-4scale_r50_improved_8xb2-12e_coco/dino-4scale_r50_improved_8xb2-12e_coco_20230818_162607-6f47a913.pth
"""


class Release(NamedTuple):
    """A published checkpoint."""

    name: str
    config: str  # relative to configs/, without a suffix the YAML twin
    epochs: int
    ap: float
    encoding: tuple[float, float]  # temperature and offset of the encoding of pixels
    url: str  # of the file, or of the folder where a person finds it
    file: str

    @property
    def by_hand(self) -> bool:
        """Whether programs cannot download it."""
        return not self.url.endswith(self.file)


def _releases(source: str, url: str, lines: str) -> dict[str, Release]:
    encodings = {"dino": (20.0, 0.0), "detr": (10000.0, -0.5)}
    releases = {}
    for line in lines.strip().splitlines():
        name, config, epochs, ap, encoding, path = line.split()
        releases[f"{source}/{name}"] = Release(
            name=f"{source}/{name}",
            config=config,
            epochs=int(epochs),
            ap=float(ap),
            encoding=encodings[encoding],
            url=url.format(path),
            file=path.split("/")[-1],
        )
    return releases


RELEASES = {
    **_releases(
        "official",
        "https://drive.google.com/drive/folders/1qD5m1NmK0kjE5hh-G17XUX751WsEG-h_",
        _OFFICIAL,
    ),
    **_releases(
        "detrex", "https://github.com/IDEA-Research/detrex-storage/releases/download/{}", _DETREX
    ),
    **_releases("mmdet", "https://download.openmmlab.com/mmdetection/v3.0/dino/{}", _MMDET),
}


def find(name: str) -> Release:
    """
    Args:
        name: of a published checkpoint; without a prefix, it is that of the paper's authors

    Raises:
        FileNotFoundError: no such name; names the nearest
    """
    release = _lookup(name)
    if release is None:
        raise FileNotFoundError(
            f"there is no published checkpoint '{name}'; {hint(name, RELEASES)}"
        )
    return release


def alternatives(name: str) -> list[str]:
    """What programs can download in place of a checkpoint that they cannot: names of others of the
    same backbone and levels, the most similar first, at most three; none in place of another."""
    release = _lookup(name)
    if release is None or not release.by_hand:
        return []
    family = release.name.split("/")[1].partition("scale")[0]
    downloads = [x.name for x in RELEASES.values() if not x.by_hand]
    return nearest(release.name, [x for x in downloads if x.split("/")[1].startswith(family)])


def _lookup(name: str) -> Release | None:
    return RELEASES.get(name) or RELEASES.get(f"official/{name}")


def table() -> str:
    """All of them as a table in Markdown, for projects/dino/MODEL_ZOO.md."""
    rows = ["| name | config | epochs | AP | file |", "|---|---|---|---|---|"]
    for x in RELEASES.values():
        config = x.config if x.config.endswith(".py") else f"{x.config}.yaml"
        rows.append(
            f"| `{x.name}` | [{config}](../../configs/{config}) | {x.epochs} | {x.ap} "
            f"| [{x.file}]({x.url}) |"
        )
    return "\n".join(rows)
