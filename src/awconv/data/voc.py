"""Images with boxes in the format of PASCAL VOC (The PASCAL Visual Object Classes Challenge, IJCV 2010)."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from awconv.data.boxes import Annotated, is_number, size
from awconv.data.detection import DetectionDataModule
from awconv.data.files import Files, composed
from awconv.data.images import ENDINGS
from awconv.data.loading import Split

CATEGORIES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_LISTS = "ImageSets/Main"
_IMAGE_FOLDERS, _XML_FOLDERS = ("jpegimages", "images", "data"), ("annotations", "labels")  # last: FiftyOne's
_LARGEST_LIST, _LARGEST_XML = 2**26, 2**24  # bytes
_DEEPEST = 100  # elements; VOC has 5
_DIFFICULT = {"0": False, "false": False, "": False, "1": True, "true": True}


class Voc(DetectionDataModule):
    """Images with boxes in VOC's format: ``root/VOC2007/`` with ``JPEGImages``, ``Annotations`` and
    ``ImageSets/Main``, and other years beside it. A folder without lists works, too: all its XML files count.

    VOC counts pixels from 1, and a box includes its last pixels. Boxes are converted to the usual coordinates, from 0.
    Objects marked as difficult are treated as crowd regions: training ignores them, and the evaluation does not count
    them. Image files may have any supported ending.

    In a list such as ``car_train`` a name may be followed by 1, 0 or -1, which say whether the image shows a car. All
    of these images belong to the split. Names may stand in quotes. An image listed twice counts once.

    Args:
        root: the folder that holds the years (``VOCdevkit``), or a zip archive of it.
        train: the training split: one entry, or several. An entry is a year and a list, such as ``VOC2007/trainval``; a
            list alone, if ``ImageSets`` lies in ``root``; or a folder of images and XML files (``.`` for ``root``
            itself). These lie side by side, or in folders called ``JPEGImages``, ``images`` or ``data``, and
            ``Annotations``, ``annotations`` or ``labels``.
        val: the validation split, likewise. None holds out ``val_fraction`` of the training split.
        test: the test split, likewise. None tests on the validation split.
        categories: names of the wanted categories, which need not be VOC's; None for VOC's 20.
        **kwargs: further arguments of :class:`DetectionDataModule`.

    Raises:
        FileNotFoundError: a file is missing. The message names it.
        ValueError: an annotation is not in VOC's format, or no object of the training split has a wanted category.
    """

    def __init__(
        self,
        root: Path,
        train: Sequence[str] | str = ("VOC2007/trainval", "VOC2012/trainval"),
        val: Sequence[str] | str | None = None,
        test: Sequence[str] | str | None = ("VOC2007/test",),
        categories: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, CATEGORIES if categories is None else categories, **kwargs)
        self.splits: dict[Split, list[str] | None] = {}
        given: dict[Split, Sequence[str] | str | None] = {"train": train, "val": val, "test": test}
        for split, lists in given.items():
            self.splits[split] = [lists] if isinstance(lists, str) else None if lists is None else list(lists)

    @property
    def classes(self) -> list[str]:
        return list(self.categories or ())

    @property
    def category_ids(self) -> list[int]:
        return list(range(1, len(self.classes) + 1))

    def open(self, split: Split) -> list[Annotated] | None:
        lists = self.splits[split]
        if lists is None:
            return None
        images: list[Annotated] = []
        seen: set[str] = set()
        taken: dict[str, str] = {}  # image of each annotation file
        repeated = 0
        for entry in lists:
            folder = _Folder(self.files, entry, split)
            self._looked_in |= folder.folders
            self._annotation_files |= folder.lists
            for line in folder.listed:
                stem = folder.stem(line)
                path = folder.annotations[stem]
                if path in taken:
                    repeated += 1
                    continue
                images.append(self._annotated(folder, stem, len(images), seen))
                taken[path] = images[-1].path
        self._annotation_files |= set(taken)
        image, count = (Counter(taken.values()).most_common(1) or [("", 0)])[0]
        if count > 1:
            both = sorted(path for path, of in taken.items() if of == image)
            raise ValueError(f"{' and '.join(both[:5])} annotate the same image, {self.files.name(image)}; keep one")
        if repeated:
            rank_zero_info(f"{split} images: {repeated:,} listed twice, counted once")
        if split == "train":
            self._check_categories(seen, ", ".join(lists))
        return images

    def _check_categories(self, seen: set[str], lists: str) -> None:
        """Raises a ValueError if no object has a wanted category."""
        own = self.classes != list(CATEGORIES)
        unknown = [name for name in self.classes if name not in seen and name not in CATEGORIES]
        if unknown or (seen and not own and not seen & set(CATEGORIES)):
            asked = f"the category {', '.join(unknown)}" if own else "one of VOC's 20 categories"
            raise ValueError(
                f"no object of {lists} has {asked}; its categories are {', '.join(sorted(seen)) or 'none'}; give the "
                "wanted ones with --data.categories"
            )

    def _annotated(self, folder: _Folder, stem: str, image_id: int, seen: set[str]) -> Annotated:
        path = folder.annotations[stem]
        boxes, labels, difficult, others = [], [], [], 0
        content = self.files.read(path, _LARGEST_XML)
        try:
            root = _parse(content)
            if root.tag != "annotation":
                raise ValueError(f"its root must be 'annotation', got {root.tag!r:.80}")
            width, height = size(*(_side(root, f"size/{side}") for side in ("width", "height")))
            image = folder.image(stem, root.findtext("filename", ""))
            for marked in root.iter("object"):
                name = composed(_text(marked, "name"))
                if not name:
                    raise ValueError("the name of an object is empty")
                left, top, right, bottom = (
                    _coordinate(marked, f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax")
                )
                hard = marked.findtext("difficult", "0").strip().lower()
                if hard not in _DIFFICULT:
                    raise ValueError(f"difficult must be 0 or 1, got {hard!r:.80}")
                seen.add(name)
                if name not in self.classes:
                    others += 1
                    continue
                boxes.append((left - 1, top - 1, right, bottom))
                labels.append(self.classes.index(name) + 1)
                difficult.append(_DIFFICULT[hard])
        except (expat.ExpatError, LookupError, ValueError) as error:
            raise ValueError(f"{self.files.name(path)} is not in VOC's format: {error}") from error
        corners = np.array(boxes, float).reshape(-1, 4)
        return Annotated(
            path=image,
            image_id=image_id,
            width=width,
            height=height,
            boxes=corners,
            labels=np.array(labels, int),
            areas=(corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1]),
            crowd=np.array(difficult, bool),
            others=others,
        )


class _Folder:
    """The images and annotations of one entry of a split.

    Args:
        files: of the data set.
        entry: of the split.
        split: name of the split in errors.

    Attributes:
        folders: folders of the images and the annotations.
        lists: the file of the list, if there is one.
        annotations: paths of the XML files, by their names in lists.
        listed: names of images, perhaps with an ending, in quotes, or followed by 1, 0 or -1.

    Raises:
        FileNotFoundError: the list does not exist.
        ValueError: the folder does not exist, or the list is empty or no text.
    """

    def __init__(self, files: Files, entry: str, split: Split) -> None:
        place, _, name = posixpath.normpath(entry).rpartition("/")
        lists = posixpath.normpath(f"./{place}/{_LISTS}")
        self._files, self._list = files, f"{lists}/{name}.txt"
        has_list = files.holds(self._list)
        if has_list:
            self._images, self._xml = (posixpath.normpath(f"./{place}/{one}") for one in ("JPEGImages", "Annotations"))
        else:
            self._images, self._xml = _without_list(files, entry)
        self.folders, self.lists = {self._images, self._xml}, {self._list} if has_list else set()
        self.annotations = {stem: path for stem, ending, path in _below(files, self._xml) if ending == ".xml"}
        self._stems = {composed(stem): stem for stem in self.annotations}
        self._by_stem: dict[str, list[tuple[str, str]]] = {}
        for stem, ending, path in _below(files, self._images):
            if ending in ENDINGS:
                self._by_stem.setdefault(composed(stem), []).append((stem, path))
        self._paths = {composed(path): path for images in self._by_stem.values() for _, path in images}
        if has_list:
            self.listed = _lines(files, self._list)
        else:
            self.listed = [stem for stem in self.annotations if "/" not in stem]
        if not has_list and not self.listed:
            raise _no_such(files, entry, split)
        if not self.listed:
            raise ValueError(f"{files.name(self._list)} lists no image; give another list with --data.{split}")

    def stem(self, line: str) -> str:
        """The name in :attr:`annotations` of an image, from its line in the list.

        Raises:
            FileNotFoundError: the image has no annotations.
        """
        quoted = re.sub(r"\s+(?:-1|0|1)$", "", line)
        name = re.sub(r'^"(.+)"$', r"\1", quoted)  # CVAT and datumaro quote names with a space
        stem, ending = posixpath.splitext(name)
        names = (line, quoted, name, *([stem] if ending.lower() in ENDINGS else []))
        for one in (*names, *(self._stems.get(composed(one), "") for one in names)):
            if one in self.annotations:
                return one
        missing = self._files.name(f"{self._xml}/{name:.200}.xml")
        raise FileNotFoundError(f"{self._files.name(self._list)} lists {name!r:.200}, and {missing} is not a file")

    def image(self, stem: str, filename: str) -> str:
        """The path of an image.

        Args:
            stem: name of the image in a list.
            filename: name of its file in the annotations. It counts if no file is called like the annotations, or if
                several are, with different endings.

        Raises:
            ValueError: the name fits several files.
        """
        alike = self._by_stem.get(composed(stem), [])
        found = [path for own, path in alike if own == stem] or [path for _, path in alike]
        if len(found) == 1:
            return found[0]
        name = posixpath.basename(filename.strip().replace("\\", "/"))
        named = [path for path in found if composed(posixpath.basename(path)) == composed(name)]
        if found and not named:
            raise ValueError(
                f"its image could be {found[0]} or {found[1]}; filename must be one, got {filename!r:.200}"
            )
        if named:
            return named[0]
        folder = posixpath.dirname(f"{self._images}/{stem}")
        other = posixpath.normpath(f"{folder}/{name}")
        if name and self._files.holds(other):
            return other
        return self._paths.get(composed(other), posixpath.normpath(f"{self._images}/{stem}.jpg"))


def _below(files: Files, folder: str) -> Iterator[tuple[str, str, str]]:
    """For each file below a folder: its path within the folder without the ending, the lower-case ending, its path."""
    for path in files.below(folder):
        stem, ending = posixpath.splitext(path)
        yield stem if folder == "." else stem[len(folder) + 1 :], ending.lower(), path


def _without_list(files: Files, entry: str) -> tuple[str, str]:
    """The folders of images and of XML files, in a folder without lists."""
    folder = posixpath.normpath(entry)
    images = _inner(files, folder, _IMAGE_FOLDERS, ENDINGS)
    xml = _inner(files, folder, _XML_FOLDERS, {".xml"})
    if _is_xml_folder(folder) and not any(ending in ENDINGS for _, ending, _ in _below(files, folder)):
        images = _inner(files, posixpath.dirname(folder) or ".", _IMAGE_FOLDERS, ENDINGS)
    return images, xml


def _inner(files: Files, folder: str, names: Sequence[str], endings: Collection[str]) -> str:
    """The first inner folder with one of these names and a file with one of these endings; else the folder itself."""
    inner = {stem.partition("/")[0] for stem, ending, _ in _below(files, folder) if "/" in stem and ending in endings}
    within = [one for name in names for one in sorted(inner) if one.lower() == name]
    return posixpath.normpath(f"{folder}/{within[0]}") if within else folder


def _is_xml_folder(folder: str) -> bool:
    return posixpath.basename(folder).lower() in _XML_FOLDERS


def _no_such(files: Files, entry: str, split: Split) -> Exception:
    """The error for an entry that names neither a list nor a folder of XML files."""
    lists, folders = set(), set()
    for path in files.below("."):
        folder, name = posixpath.split(path)
        if folder.endswith(_LISTS) and name.endswith(".txt"):
            lists.add(posixpath.normpath(f"./{folder.removesuffix(_LISTS)}/{name.removesuffix('.txt')}"))
        elif name.lower().endswith(".xml"):
            folders.add((posixpath.dirname(folder) if _is_xml_folder(folder) else folder) or ".")
    there = ", ".join(sorted(lists or folders)[:10]) or "none"
    hint = "" if split == "train" else f", or none with --data.{split}=null"
    place, slash, name = posixpath.normpath(entry).rpartition("/")
    if not slash:
        return ValueError(
            f"--data.{split} must name YEAR/LIST, such as VOC2007/trainval, or a folder of {files.root} with XML "
            f"files, got {entry!r:.200}; there are: {there}{hint}"
        )
    return FileNotFoundError(
        f"{files.name(f'{place}/{_LISTS}/{name}.txt')} is not a file; give lists that exist, such as "
        f"--data.{split}='[VOC2007/trainval]'{hint}; there are: {there}"
    )


def _lines(files: Files, path: str) -> list[str]:
    try:
        lines = files.read(path, _LARGEST_LIST).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{files.name(path)} is not a text file: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def _parse(content: bytes) -> ElementTree.Element:
    """The root of an XML file.

    Refuses a DTD, and so all entities, which could grow without end or read other files.

    Raises:
        expat.ExpatError: the content is not XML.
        ValueError: the content has a DTD, or nests too deeply.
    """
    depth = 0

    def refuse(*_: Any) -> None:
        raise ValueError("it has a DTD (<!DOCTYPE>); remove it, since annotations need none")

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > _DEEPEST:
            raise ValueError(f"it nests more than {_DEEPEST} elements")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    parser.Parse(content, True)
    root: ElementTree.Element = builder.close()
    return root


def _text(element: ElementTree.Element, path: str) -> str:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"there is no {path}")
    return text.strip()


def _number(text: str, path: str) -> float:
    try:
        if "_" in text:  # Python would skip it
            raise ValueError
        return float(text)
    except ValueError as error:
        raise ValueError(f"{path} must be a number of pixels, got {text!r:.80}") from error


def _coordinate(marked: ElementTree.Element, path: str) -> float:
    value = _number(text := _text(marked, path), path)
    if not is_number(value):
        raise ValueError(f"{path} must be a number of pixels, got {text!r:.80}")
    return value


def _side(root: ElementTree.Element, path: str) -> float | None:
    text = root.findtext(path, "").strip()
    return _number(text, path) if text else None
