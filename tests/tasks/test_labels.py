"""Labels of class folders: orders, class lists, class maps, and notes about them."""

import json
import random
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from saqcli.data.datasets import Split, check_fingerprint, check_same_classes, fingerprint, open_split
from saqcli.errors import ConfigError, DataError
from saqcli.tasks.class_names import sort_classes
from saqcli.tasks.labels import Classes
from tests.support.command_line import last_error, saq

TENCH, GOLDFISH, GOLF_BALL, PARACHUTE = "n01440764", "n01443537", "n03445777", "n03888257"
TORCHVISION = Classes(12, "torchvision")
KNOWN = Classes(3, names=("dog", "cat", "ant"))
RUN = Classes(3, names=("dog", "cat", "ant"), folders={"dog": 0, "cat": 1, "ant": 2}, trained="runs/x")


def opened(
    root: Path,
    folders: list[str],
    classes: Classes | int,
    files: Mapping[str, object] | None = None,
    **options: str,
) -> Split:
    """A split of class folders with one image each; ``options`` name files in the folder's parent."""
    for name in folders:
        (root / "val" / name).mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2)).save(root / "val" / name / "0.png")
    for name, content in (files or {}).items():
        text = content if isinstance(content, str) else json.dumps(content)
        (root / name).write_text(text, encoding="utf-8")
    paths = {
        key: value if value in ("timm", "torchvision") else str(root / value)
        for key, value in options.items()
    }
    return open_split(str(root), "val", num_classes=classes, **paths)  # type: ignore[arg-type]


class TestClassOrder:
    def test_timm_order_matches_timm(self) -> None:
        from timm.utils.misc import natural_key

        names = [
            "class_1",
            "class_10",
            "Class_2",
            "b",
            "A",
            "a10b2",
            "a9b11",
            "10",
            "9",
            "007",
            "x-1.5",
            "x 1",
        ]
        random.Random(0).shuffle(names)
        assert sort_classes(names, "timm") == sorted(names, key=natural_key)

    def test_labels_match_timm_and_torchvision(self, tmp_path: Path) -> None:
        from timm.data.readers.reader_image_folder import find_images_and_targets
        from torchvision.datasets import ImageFolder

        names = ["10", "9", "Truck", "airplane", "b2", "b10", "Bird", "cat", "Dog", "deer", "1", "z"]
        natural, text = (opened(tmp_path, names, each) for each in (12, TORCHVISION))
        assert natural.folders == find_images_and_targets(str(tmp_path / "val"))[1]
        assert text.folders == ImageFolder(str(tmp_path / "val")).class_to_idx
        assert (natural.class_order, text.class_order) == ("timm", "torchvision")

    @pytest.mark.parametrize("classes", [12, TORCHVISION])
    def test_class_order_option_selects_the_order(self, classes: Classes | int, tmp_path: Path) -> None:
        names = [f"class_{number}" for number in range(1, 13)]
        for order in ("timm", "torchvision"):
            split = opened(tmp_path, names, classes, class_order=order)
            assert split.class_order == order
            assert split.class_names == tuple(names if order == "timm" else sorted(names))

    @pytest.mark.parametrize(
        ("names", "text"),
        [
            (
                ["c1", "c2", "c10"],
                r"in timm's order \(c1, c2, c10\), torchvision's order is c1, c10, c2: .*`data.class_order=torchv",
            ),
            (["ant", "Bee", "cat"], r"\(ant, Bee, cat\), torchvision's order is Bee, ant, cat"),
            (["A", "a", "b"], r"timm does not distinguish A and a .* here A comes first"),
        ],
    )
    def test_differing_orders_are_noted(self, names: list[str], text: str, tmp_path: Path) -> None:
        (note,) = opened(tmp_path, names, 3).notes
        assert re.search(text, note)

    def test_agreeing_orders_are_not_noted(self, tmp_path: Path) -> None:
        assert opened(tmp_path, ["ant", "bee", "cat"], 3).notes == ()

    def test_other_order_changes_the_fingerprint(self, tmp_path: Path) -> None:
        names = ["c1", "c2", "c10"]
        kept = fingerprint(opened(tmp_path, names, 3))
        check_fingerprint(kept, opened(tmp_path, names, 3, class_order="timm"), "training")
        with pytest.raises(DataError, match="with other names or labels"):
            check_fingerprint(kept, opened(tmp_path, names, 3, class_order="torchvision"), "training")

    def test_unknown_order_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(
            ConfigError, match=r"`data.class_order=.*alphabet` is neither an order nor a file"
        ):
            opened(tmp_path, ["ant"], 1, class_order="alphabet")


LISTS: dict[str, tuple[str, object]] = {
    "lines": ("l.txt", "dog\ncat\nant\n"),
    "lines of another system": ("l.txt", "\ufeffdog\r\ncat\r\nant"),
    "a JSON list": ("l.json", ["dog", "cat", "ant"]),
    "names to indices": ("l.json", {"ant": 2, "dog": 0, "cat": 1}),
    "indices to names": ("l.json", {"0": "dog", "1": "cat", "2": "ant"}),
    "lines with indices": ("l.txt", "ant 2\ndog 0\ncat 1\n"),
    "lines that count from 1": ("l.txt", "1 dog\n2 cat\n3 ant\n"),
    "a table": ("l.csv", "class,index\nant,2\ndog,0\ncat,1\n"),
}


class TestClassLists:
    @pytest.mark.parametrize("kind", LISTS)
    def test_file_sets_the_order(self, kind: str, tmp_path: Path) -> None:
        name, content = LISTS[kind]
        split = opened(tmp_path, ["ant", "cat", "dog"], 3, {name: content}, class_order=name)
        assert split.class_names == ("dog", "cat", "ant")
        assert split.folders == {"ant": 2, "cat": 1, "dog": 0}
        assert (split.class_order, split.notes) == (name, ())

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("dog\ncat\n", "lists 2 classes, the model has 3"),
            ("dog\ncat\nbee\n", r"does not name 1 class folder \(ant\): it has dog, cat, bee"),
            ("dog\ncat\ndog\n", "the name dog appears twice"),
            ("dog\n\nant\n", "line 2 is blank"),
            ("", "lists no classes"),
            ({"dog": 0, "cat": 1, "ant": 3}, "the index of ant is 3, the model has 3 classes"),
            ({"dog": 0, "cat": 1, "ant": 1}, "the index 1 appears twice"),
            ({"dog": 0, "cat": 1, "ant": -1}, "the index of ant is below 0"),
            ({"dog": 0, "cat": True, "ant": 2}, "give a JSON list of names"),
            ([1, 2, 3], "give a JSON list of names"),
            ('{"dog": 0, "dog": 1}', "'dog' occurs twice"),
            ("[", "it is not JSON"),
        ],
    )
    def test_mismatched_file_is_refused(self, content: object, message: str, tmp_path: Path) -> None:
        plain = isinstance(content, str) and content[:1] not in ("[", "{")
        name = "order.txt" if plain else "order.json"
        with pytest.raises((ConfigError, DataError), match=message) as caught:
            opened(tmp_path, ["ant", "cat", "dog"], 3, {name: content}, class_order=name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_pickled_list_is_not_loaded(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="may hold code"):
            opened(tmp_path, ["ant"], 1, {"map.pkl": "x"}, class_order="map.pkl")

    @pytest.mark.parametrize("place", ["", "val/"])
    @pytest.mark.parametrize(
        "name",
        ["class_to_idx.json", "class_to_idx.txt", "classes.txt", "class_indices.json", "class_map.txt"],
    )
    def test_list_beside_folders_is_used(self, name: str, place: str, tmp_path: Path) -> None:
        content = ["dog", "cat", "ant"] if name.endswith("json") else "dog\ncat\nant\n"
        split = opened(tmp_path, ["ant", "cat", "dog"], 3)
        assert split.class_names == ("ant", "cat", "dog")
        split = opened(tmp_path, [], 3, {place + name: content})
        assert (split.class_names, split.class_order) == (("dog", "cat", "ant"), name)
        assert any(f"as in {tmp_path / place / name} (dog, cat, ant)" in note for note in split.notes)
        assert open_split(str(tmp_path / "val"), "val", num_classes=3).class_names == ("dog", "cat", "ant")
        split = opened(tmp_path, [], 3, class_order="timm")
        assert split.class_names == ("ant", "cat", "dog")
        assert any("numbers these classes differently: ant is 2 there, and 0" in note for note in split.notes)

    def test_unrelated_list_is_noted(self, tmp_path: Path) -> None:
        split = opened(tmp_path, ["ant", "cat", "dog"], 3, {"classes.txt": "a\nb\nc\n"})
        assert split.class_names == ("ant", "cat", "dog")
        assert "lists other classes (a, b, c) than these folders: not used" in split.notes[0]

    def test_partial_list_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(
            DataError, match=r"classes.txt does not name 1 class folder .* \(ant\).*`data.class_order=timm`"
        ):
            opened(tmp_path, ["ant", "cat", "dog"], 3, {"classes.txt": "dog\ncat\nbee\n"})

    def test_missing_folders_are_noted(self, tmp_path: Path) -> None:
        split = opened(tmp_path, ["cat"], KNOWN)
        assert split.folders == {"cat": 1}
        assert split.notes == ("2 classes of the model's 3 have no folder: dog, ant",)


class TestCheckpointAndRun:
    def test_checkpoint_list_sets_the_order(self, tmp_path: Path) -> None:
        split = opened(tmp_path, ["ant", "cat", "dog"], KNOWN, {"classes.txt": "ant\ncat\ndog\n"})
        assert (split.class_names, split.class_order) == (("dog", "cat", "ant"), "checkpoint")
        assert "as in the checkpoint (dog, cat, ant)" in split.notes[0]
        assert "classes.txt numbers these classes differently" in split.notes[1]

    def test_case_and_underscores_are_ignored(self, tmp_path: Path) -> None:
        classes = Classes(2, names=("golf ball", "English springer"))
        split = opened(tmp_path, ["Golf_Ball", "english-springer"], classes)
        assert split.folders == {"Golf_Ball": 0, "english-springer": 1}

    def test_unrelated_checkpoint_classes_are_noted(self, tmp_path: Path) -> None:
        split = opened(tmp_path, ["x", "y", "z"], KNOWN)
        assert (split.class_names, split.class_order) == (("x", "y", "z"), "timm")
        assert "the checkpoint lists other classes (dog, cat, ant)" in split.notes[0]

    def test_checkpoint_words_map_to_synsets(self, tmp_path: Path) -> None:
        classes = Classes(3, names=("golf ball", "goldfish, Carassius auratus", "tench, Tinca tinca"))
        assert opened(tmp_path, [TENCH, GOLDFISH, GOLF_BALL], classes).folders == {
            TENCH: 2,
            GOLDFISH: 1,
            GOLF_BALL: 0,
        }

    def test_run_keeps_its_labels(self, tmp_path: Path) -> None:
        split = opened(tmp_path, ["ant", "cat", "dog"], RUN, {"class_to_idx.json": ["ant", "cat", "dog"]})
        assert split.folders == RUN.folders
        assert "numbered as in runs/x (dog, cat, ant)" in split.notes[0]
        assert (
            "class_to_idx.json numbers these classes differently: ant is 0 there, and 2 by runs/x"
            in split.notes[1]
        )

    def test_option_unlike_the_run_is_noted(self, tmp_path: Path) -> None:
        split = opened(tmp_path, ["ant", "cat", "dog"], RUN, class_order="torchvision")
        assert split.class_names == ("ant", "cat", "dog")
        assert split.notes == (
            "runs/x numbers these classes differently: ant is 2 there, and 0 by torchvision's order, which decides",
        )

    def test_unknown_folders_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(
            DataError,
            match=r"has the classes z, runs/x was trained on dog, cat, ant: .*`data.class_map=FILE`",
        ):
            opened(tmp_path, ["cat", "dog", "z"], RUN)


class TestImageNet:
    def test_class_names_follow_the_logits(self, tmp_path: Path) -> None:
        split = opened(tmp_path, [TENCH, PARACHUTE], 1000)
        assert (len(split.class_names), split.class_names[701], split.class_order) == (
            1000,
            PARACHUTE,
            "imagenet",
        )
        assert split.folders == {TENCH: 0, PARACHUTE: 701}

    def test_order_option_keeps_synset_indices(self, tmp_path: Path) -> None:
        assert opened(tmp_path, [TENCH, PARACHUTE], 1000, class_order="timm").folders == {
            TENCH: 0,
            PARACHUTE: 701,
        }

    def test_words_are_mapped_with_a_note(self, tmp_path: Path) -> None:
        split = opened(tmp_path, ["tench", "golf ball", "English_springer"], 1000)
        assert split.folders == {"tench": 0, "golf ball": 574, "English_springer": 217}
        assert "golf ball is n03445777" in split.notes[0]
        assert "`data.class_map=FILE`" in split.notes[0]

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["tench", "crane"], "crane can be n02012849 or n03126707 of ImageNet"),
            (["tench", "golfball"], r"nor its name \(golfball\)"),
            (["tench", TENCH], "two folders of one class: n01440764 and tench are both class 0"),
            (
                ["truck", "deer"],
                r"none of these is an ImageNet synset.*`data.class_map=FILE`.*`model.num_classes=2` `model.new_head",
            ),
            (
                [TENCH, "n00480211"],
                r"nor its name \(n00480211\)",
            ),  # volleyball the game, not the ball
        ],
    )
    def test_ambiguous_names_are_refused(self, names: list[str], message: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=message):
            opened(tmp_path, names, 1000)

    def test_partial_list_is_ignored_for_imagenet(self, tmp_path: Path) -> None:
        split = opened(tmp_path, [TENCH, PARACHUTE], 1000, {"class_to_idx.json": {TENCH: 0, PARACHUTE: 1}})
        assert split.folders[PARACHUTE] == 701
        assert "class_to_idx.json is not used: it lists 2 classes, the model has 1000" in split.notes[0]

    def test_synsets_beside_ambiguous_words(self, tmp_path: Path) -> None:
        """Two ImageNet classes are called crane: the bird is 134, the machine 517."""
        from timm.data import ImageNetInfo

        info = ImageNetInfo("imagenet-1k")
        words = [info.label_name_to_description(name).split(",")[0] for name in info.label_names()]
        split = opened(tmp_path, ["n02012849", TENCH], Classes(1000, names=tuple(words)))
        assert split.folders == {TENCH: 0, "n02012849": 134}
        assert split.class_order == "imagenet"

    def test_duplicate_names_are_not_used(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="does not name 1 class folder"):
            opened(tmp_path, ["a", "b"], Classes(3, names=("a", "a", "b")))

    def test_partial_list_error_gives_advice(self, tmp_path: Path) -> None:
        classes = Classes(3, names=("dog", "cat", "ant"))
        with pytest.raises(DataError) as error:
            opened(tmp_path, ["dog", "foo"], classes)
        assert "class_order" not in str(error.value)


MAPS: dict[str, tuple[str, object]] = {
    "lines": ("m.txt", f"fish {TENCH}\nmy ball 574\n"),
    "tabs": ("m.txt", "fish\ttench\nmy ball\tgolf ball\n"),
    "names with blanks": ("m.txt", "fish tench\nmy ball golf ball\n"),
    "commas": ("m.txt", "fish, tench\nmy ball, golf ball\n"),
    "quotes": ("m.txt", 'fish tench\n"my ball" "golf ball"\n'),
    "a table": ("m.csv", f"folder,class\nfish,{TENCH}\nmy ball,golf ball\n"),
    "JSON": ("m.json", {"fish": "tench", "my ball": 574, "not there": 3}),
}


class TestClassMap:
    @pytest.mark.parametrize("kind", MAPS)
    def test_map_assigns_folders(self, kind: str, tmp_path: Path) -> None:
        name, content = MAPS[kind]
        split = opened(tmp_path, ["fish", "my ball"], 1000, {name: content}, class_map=name)
        assert split.folders == {"fish": 0, "my ball": 574}
        assert (len(split.class_names), split.notes) == (1000, ())

    def test_map_may_merge_and_rename_folders(self, tmp_path: Path) -> None:
        files = {"m.txt": "a zebra\nb ant\nc zebra\n"}
        split = opened(tmp_path, ["a", "b", "c"], 2, files, class_map="m.txt")
        assert (split.class_names, split.folders) == (("ant", "zebra"), {"a": 1, "b": 0, "c": 1})

    def test_run_recognizes_merged_folders(self, tmp_path: Path) -> None:
        run = Classes(
            2, names=("ant", "zebra"), folders={"a": 1, "b": 0, "c": 1}, order="timm", trained="runs/x"
        )
        assert opened(tmp_path, ["a", "b", "c"], run).folders == run.folders

    def test_indices_need_no_names(self, tmp_path: Path) -> None:
        split = opened(tmp_path, ["cat", "dog"], 10, {"m.txt": "cat 3\ndog 5\n"}, class_map="m.txt")
        assert (split.folders, split.class_names, split.class_order) == (
            {"cat": 3, "dog": 5},
            (),
            "class map",
        )

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("cat 3\ndog 1\n", "cat is class 3, the model has classes 0 to 2"),
            (
                "catt zebra\ndog yak\nant emu\n",
                r"no line for 1 class folder .* \(cat\), but names catt, which is not a folder there",
            ),
            ("cat a\ncat b\n", "the folder cat appears twice"),
            ("cat\n", "line 1 is not a folder and a class"),
            ("cat 0\ndog yak\nant emu\n", r"by index \(0, 0\) and others by name"),
            ("", "maps no folder"),
        ],
    )
    def test_mismatched_map_is_refused(self, content: str, message: str, tmp_path: Path) -> None:
        with pytest.raises((ConfigError, DataError), match=message):
            opened(tmp_path, ["ant", "cat", "dog"], 3, {"m.txt": content}, class_map="m.txt")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["eval"], "--class-map"),
        (["quantize", "--bits", "4"], "--class-order"),
        (["search", "--budget", "w4a4"], "--class-map"),
    ],
)
def test_missing_file_is_reported_early(command: list[str], option: str, tmp_path: Path) -> None:
    more = ["saq/resnet20", "--weights", "nowhere.pth", "--data", tmp_path, option, "nowhere.txt", "--quiet"]
    result = saq(command[0], *more, *command[1:])
    assert result.exit_code == 1
    assert f"{option} nowhere.txt is " in last_error(result)


def test_splits_with_other_labels_are_refused(tmp_path: Path) -> None:
    opened(tmp_path, ["ant", "cat"], 2)
    (tmp_path / "val").rename(tmp_path / "train")
    opened(tmp_path, ["ant", "cat"], 2, {"val/classes.txt": "cat\nant\n"})
    train, val = (open_split(str(tmp_path), name, num_classes=2) for name in ("train", "val"))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"numbered differently \(timm, classes.txt\)"):
        check_same_classes(train, val)
