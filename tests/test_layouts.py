"""Data sets as people have them on disk: every layout is found, and what is wrong with one is told."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from ddrf_fast import cli
from ddrf_fast.data import LAYOUTS, PairedFolder, check_pairs, find_pairs, write_image

# Files of each data set under the names that they really have: {pair: (visible, infrared)}, and what else is
# there.
DATA_SETS = {
    "tno": (
        {"1": ("VIS1.png", "IR1.png"), "21": ("VIS21.png", "IR21.png")},
        [],
    ),
    "tno, whole": (
        {
            "2_men_in_front_of_house/meting003": (
                "Athena_images/2_men_in_front_of_house/VIS_meting003_r.bmp",
                "Athena_images/2_men_in_front_of_house/IR_meting003_g.bmp",
            ),
            "APC_1/view_1/fk_06_005": (
                "Athena_images/APC_1/view_1/VIS_fk_06_005.bmp",
                "Athena_images/APC_1/view_1/IR_fk_06_005.bmp",
            ),
            "APC_2/view_1/fk_ge_03_005": (
                "Athena_images/APC_2/view_1/1_fk_ge_03_005.bmp",
                "Athena_images/APC_2/view_1/2_fk_ge_03_005.bmp",
            ),
            "airplane_in_trees": (
                "Athena_images/airplane_in_trees/vis.bmp",
                "Athena_images/airplane_in_trees/ir.bmp",
            ),
            "bunker/bunker": ("Athena_images/bunker/bunker_r.bmp", "Athena_images/bunker/IR_bunker_g.bmp"),
            "wall/163": ("DHV_images/wall/VIS_163dhvR.BMP", "DHV_images/wall/IR_163rad.bmp"),
            "Fire_sequence/part_1/2": (
                "DHV_images/Fire_sequence/part_1/dhv/DHV2.bmp",
                "DHV_images/Fire_sequence/part_1/thermal/RAD2.bmp",
            ),
            "Fire_sequence/part_2/heli0": (
                "DHV_images/Fire_sequence/part_2/dhv/DHVheli0.bmp",
                "DHV_images/Fire_sequence/part_2/rad/RADheli0.bmp",
            ),
            "Nato_camp_sequence/1800": (
                "FEL_images/Nato_camp_sequence/visual/1800v.bmp",
                "FEL_images/Nato_camp_sequence/thermal/1800i.bmp",
            ),
            "Farm/Farm": ("Triclobs_images/Farm/Farm_Vis.bmp", "Triclobs_images/Farm/Farm_IR.bmp"),
            "Kaptein_01/01": (
                "Triclobs_images/Kaptein_01/Vis01.bmp",
                "Triclobs_images/Kaptein_01/IR01.bmp",
            ),
            "houses_with_3_men": (
                "Triclobs_images/houses_with_3_men/VIS.bmp",
                "Triclobs_images/houses_with_3_men/LWIR.bmp",
            ),
            "Bosnia": ("Triclobs_images/Bosnia/VIS_R.bmp", "Triclobs_images/Bosnia/LWIR_B.bmp"),
            "barbed_wire_1": (
                "Triclobs_images/barbed_wire_1/R_Vis.tif",
                "Triclobs_images/barbed_wire_1/B_LWIR.tif",
            ),
            "barbed_wire_2/MarnehNew_24RGB_1110": (
                "Triclobs_images/barbed_wire_2/a_VIS-MarnehNew_24RGB_1110.tif",
                "Triclobs_images/barbed_wire_2/c_LWIR-MarnehNew_24RGB_1110.tif",
            ),
            "soldier_behind_smoke/MarnehNew_15RGB_603": (
                "Triclobs_images/soldier_behind_smoke/VIS-MarnehNew_15RGB_603.tif",
                "Triclobs_images/soldier_behind_smoke/LWIR-MarnehNew_15RGB_603.tif",
            ),
            "tank": ("tank/Vis.tif", "tank/LWIR.tif"),
        },
        ["DHV_images/wall/NIR_163dhvG.BMP", "Triclobs_images/Farm/Farm_II.bmp"],
    ),
    "gun": ({"Gun": ("Gun_Vis.png", "Gun_IR.png"), "Camp": ("Camp_Vis.png", "Camp_IR.png")}, []),
    "roadscene": (
        {"FLIR_00006": ("crop_LR_visible/FLIR_00006.jpg", "cropinfrared/FLIR_00006.jpg")},
        ["crop_HR_visible/FLIR_00006.jpg"],
    ),
    "msrs": (
        {
            "train/00004N": ("train/vi/00004N.png", "train/ir/00004N.png"),
            "test/00055D": ("test/vi/00055D.png", "test/ir/00055D.png"),
        },
        ["train/Segmentation_labels/00004N.png"],
    ),
    "llvip": (
        {
            "train/010001": ("visible/train/010001.jpg", "infrared/train/010001.jpg"),
            "test/190001": ("visible/test/190001.jpg", "infrared/test/190001.jpg"),
        },
        [],
    ),
    "m3fd": ({"00000": ("Vis/00000.png", "Ir/00000.png")}, []),
    "m3fd, both parts": (
        {
            "M3FD_Fusion/00000": ("M3FD_Fusion/Vis/00000.png", "M3FD_Fusion/Ir/00000.png"),
            "M3FD_Detection/00000": ("M3FD_Detection/Vis/00000.png", "M3FD_Detection/Ir/00000.png"),
        },
        [],
    ),
    "flir": (
        {
            "train/FLIR_00001": ("train/RGB/FLIR_00001.jpg", "train/thermal_8_bit/FLIR_00001.jpeg"),
            "val/FLIR_08863": ("val/RGB/FLIR_08863.jpg", "val/thermal_8_bit/FLIR_08863.jpeg"),
        },
        ["train/thermal_16_bit/FLIR_00001.tiff"],
    ),
    "flir, aligned": (
        {"FLIR_00002": ("JPEGImages/FLIR_00002_RGB.jpg", "JPEGImages/FLIR_00002_PreviewData.jpeg")},
        ["Annotations/FLIR_00002_mask.jpg"],
    ),
    "rgbt234": (
        {"afterrain/00001": ("afterrain/visible/00001v.jpg", "afterrain/infrared/00001i.jpg")},
        [],
    ),
    "vt821": ({"1": ("RGB/1.jpg", "T/1.jpg")}, ["GT/1.jpg"]),
    "vt821, VT5000": ({"Train/1": ("Train/RGB/1.jpg", "Train/T/1.jpg")}, ["Train/GT/1.png"]),
    "folders": ({"a": ("vis/a.png", "ir/a.jpg"), "b": ("vis/b.tif", "ir/b.bmp")}, []),
    "folders, split": ({"train/a": ("train/VIS/a.png", "train/thermal/a.png")}, []),
}


def write(root, path, shape=(12, 16)):
    path = root / path
    path.parent.mkdir(parents=True, exist_ok=True)
    value = int.from_bytes(str(path.relative_to(root)).encode(), "big") % 251
    assert cv2.imwrite(str(path), np.full(shape, value, np.uint8))


@pytest.fixture
def msrs(tmp_path):
    pairs, others = DATA_SETS["msrs"]
    for path in (*sum(pairs.values(), ()), *others):
        write(tmp_path, path, (12, 16, 3) if "vi" in path.split("/") else (12, 16))
    return tmp_path


@pytest.mark.parametrize("data_set", DATA_SETS)
def test_a_data_set_is_recognised_and_paired(tmp_path, data_set):
    pairs, others = DATA_SETS[data_set]
    layout = data_set.partition(",")[0]
    for path in (*sum(pairs.values(), ()), *others):
        write(tmp_path, path)
    (tmp_path / "README.md").write_text("not an image")
    for given in ("auto", layout):
        found = find_pairs(tmp_path, given)
        assert found.layout == layout
        paths = {p.name: tuple(str(path.relative_to(tmp_path)) for path in p[1:]) for p in found.pairs}
        assert paths == pairs
        assert found.unpaired == []
    assert [pair.name for pair in PairedFolder(tmp_path)] == sorted(pairs)
    assert check_pairs(tmp_path).problems == []


def test_every_layout_is_tested_and_named_in_the_help(capsys):
    assert {name.partition(",")[0] for name in DATA_SETS} == LAYOUTS.keys()
    with pytest.raises(SystemExit):
        cli.main(["data", "check", "--help"])
    assert ", ".join(LAYOUTS) in " ".join(capsys.readouterr().out.split())


def test_the_real_sets_are_recognised(data_dir):
    found = find_pairs(data_dir / "roadscene")
    assert (len(found.pairs), found.unpaired) == (199, [])
    assert len(find_pairs(data_dir / "roadscene", split="test").pairs) == 22
    assert check_pairs(data_dir / "gun").problems == []


def test_a_split_is_a_folder_or_a_list_of_names(msrs):
    assert [p.name for p in find_pairs(msrs, split="train").pairs] == ["train/00004N"]
    for split in ("train", Path("train")):
        write_image(msrs / "train/vi/alone.png", np.zeros((4, 4), np.uint8))
        assert len(find_pairs(msrs, split=split).unpaired) == 1
    (msrs / "train/vi/alone.png").unlink()
    (msrs / "test.txt").write_text("# a comment\n00055D.png\n\ntrain/00004N\n")
    for split in ("test.txt", msrs / "test.txt"):
        assert [p.name for p in find_pairs(msrs, split=split).pairs] == ["test/00055D", "train/00004N"]
    (msrs / "test.txt").write_text("\ufeff00055D\n00055D.png\n", encoding="utf-8")
    assert [p.name for p in find_pairs(msrs, split="test.txt").pairs] == ["test/00055D"]
    (msrs / "test.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"test\.txt is no text"):
        find_pairs(msrs, split="test.txt")
    (msrs / "test.txt").write_text("# nothing yet\n")
    with pytest.raises(ValueError, match=r"test\.txt: expected the name of a pair in each line, got none"):
        find_pairs(msrs, split="test.txt")
    (msrs / "test.txt").write_text("00055D\nmissing\n")
    with pytest.raises(ValueError, match=r"test\.txt: names of no pair in .*: missing"):
        find_pairs(msrs, split="test.txt")
    with pytest.raises(ValueError, match="val is neither a file of names nor a split of layout msrs"):
        find_pairs(msrs, split="val")


def test_a_layout_of_ones_own(tmp_path):
    for path in ("day/eo/x_eo.png", "day/flir/x_flir.png", "day/eo/y_eo.png"):
        write(tmp_path, path)
    found = find_pairs(tmp_path, "{split}/eo/{name}_eo|{split}/flir/{name}_flir")
    assert [pair.name for pair in found.pairs] == ["day/x"]
    assert found.unpaired == [tmp_path / "day/eo/y_eo.png"]
    with pytest.raises(ValueError, match="no pair of images by any known layout"):
        find_pairs(tmp_path)
    with pytest.raises(ValueError, match="no pair of images by this layout, got msrs"):
        find_pairs(tmp_path, "msrs")
    with pytest.raises(ValueError, match=r"layout must be auto, tno, .* got 'nowhere'"):
        find_pairs(tmp_path, "nowhere")
    with pytest.raises(ValueError, match="a layout of your own is"):
        find_pairs(tmp_path, "eo/{name}")
    with pytest.raises(ValueError, match=r"placeholders are name, .*got camera"):
        find_pairs(tmp_path, "{camera}/{name}|ir/{name}")


def test_placeholders_may_come_twice_and_in_another_order(tmp_path):
    for path in ("a/7/7_vis.png", "a/7/7_ir.png", "a/8/7_vis.png", "b/7/train.png", "b/train/7i.png"):
        write(tmp_path, path)
    found = find_pairs(tmp_path / "a", "{name}/{name}_vis|{name}/{name}_ir")
    assert [pair.name for pair in found.pairs] == ["7"]
    found = find_pairs(tmp_path / "b", "{name}/{split}|{split}/{name}i")
    assert [(pair.name, pair.visible.name) for pair in found.pairs] == [("train/7", "train.png")]


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        find_pairs(tmp_path / "nowhere")


def test_two_images_for_one_name_are_ambiguous(msrs):
    write(msrs, "train/vi/00004N.jpg")
    with pytest.raises(ValueError, match=r"00004N\.jpg and .*00004N\.png are both the pair train/00004N"):
        find_pairs(msrs, "msrs")


def test_links_to_folders_are_followed_and_cycles_end(msrs, tmp_path_factory):
    root = tmp_path_factory.mktemp("links")
    (root / "train").symlink_to(msrs / "train")
    assert [pair.name for pair in find_pairs(root).pairs] == ["train/00004N"]
    (root / "loop").symlink_to(root)
    assert [pair.name for pair in find_pairs(root, "msrs").pairs] == ["train/00004N"]


def test_check_lists_what_is_wrong(msrs, capsys):
    assert cli.main(["data", "check", str(msrs)]) == 0
    assert "layout msrs, 2 pairs; 0 unreadable, 0 unpaired, 0 differently sized" in capsys.readouterr().out
    write(msrs, "train/vi/small.png")
    write(msrs, "train/ir/small.png", (10, 16))
    write(msrs, "train/ir/alone.png")
    write(msrs, "train/vi/broken.png")
    whole = (msrs / "train/vi/broken.png").read_bytes()
    write(msrs, "train/ir/broken.png")
    (msrs / "train/vi/broken.png").write_bytes(whole[: len(whole) // 2])
    assert cli.main(["data", "check", str(msrs)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "train/vi/broken.png: not an image, damaged" in lines[0]
    assert "train/vi/small.png is 16x12" in lines[1] and "train/ir/small.png is 16x10" in lines[1]
    assert lines[2].endswith("train/ir/alone.png: no partner")
    assert lines[3].endswith("4 pairs; 1 unreadable, 1 unpaired, 1 differently sized")
    assert cli.main(["data", "check", str(msrs), "--split", "test"]) == 0
    assert cli.main(["data", "check", str(msrs / "nowhere")]) == 2
    assert cli.main(["data", "check", str(msrs), "--layout", "llvip"]) == 2


def test_check_tells_of_raw_thermal_values(tmp_path, capsys):
    for kind, image in (("vis", np.zeros((4, 5), np.uint8)), ("ir", np.arange(7000, 7020, dtype=np.uint16))):
        (tmp_path / kind).mkdir()
        write_image(tmp_path / kind / "a.png", image.reshape(4, 5))
    assert cli.main(["data", "check", str(tmp_path)]) == 0
    note = capsys.readouterr().out.splitlines()[-1]
    assert note.startswith("note: 1 infrared images hold raw thermal values (")
    assert "ir/a.png has values from 7000 to 7019): train with data=[{path: ..., thermal_range: " in note
