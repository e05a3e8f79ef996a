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
_IMAGE_FOLDERS, _XML_FOLDERS = ("jpegimages", "images", "data"), ("annotations", "labels")  # the last ones FiftyOne's
_LARGEST_LIST, _LARGEST_XML = 2**26, 2**24  # bytes
_DEEPEST = 100  # elements; VOC has 5
_DIFFICULT = {"0": False, "false": False, "": False, "1": True, "true": True}


class Voc(DetectionDataModule):
    """Images with boxes in VOC's format: ``root/VOC2007/`` with ``JPEGImages``, ``Annotations`` and
    ``ImageSets/Main``, and other years beside it; or folders without lists, whose XML files all count.

    Pixels are counted from 1 there, and a box includes its last ones: boxes are moved accordingly. Objects marked as
    difficult are handled as crowd regions: they are not trained on, and not counted in the evaluation. Images may have
    any ending that is read. In a list such as ``car_train`` a name may be followed by 1, 0 or -1, which say whether
    there is a car in the image: all of them are of the split. Names may stand in quotes. An image that is listed twice
    counts once.

    Args:
        root: the folder that holds the years (``VOCdevkit``), or a zip archive of it.
        train: the years and lists of the training split, such as ``VOC2007/trainval``, or one of them; a list without a
            year where ``ImageSets`` lies in ``root``; a folder that holds images and XML files, side by side or in
            folders called ``JPEGImages``, ``images`` or ``data`` and ``Annotations``, ``annotations`` or ``labels``;
            ``.`` for ``root`` itself.
        val: the same; None holds out ``val_fraction`` of the training split.
        test: the same; None tests on the validation split.
        categories: names of those that are wanted, which may be other ones than VOC's; None for VOC's 20.
        **kwargs: as for :class:`DetectionDataModule`.

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        ValueError: an annotation is not in VOC's format, or no object of the training split is of a category that is
            asked for.
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
        taken: dict[str, str] = {}  # images by their annotations
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
            raise ValueError(f"{' and '.join(both[:5])} are all of the image {self.files.name(image)}; keep one")
        if repeated:
            rank_zero_info(f"{split} images: {repeated:,} are listed twice, and count once")
        if split == "train":
            self._check_categories(seen, ", ".join(lists))
        return images

    def _check_categories(self, seen: set[str], lists: str) -> None:
        """Raises a ValueError where no object is of a category that was asked for."""
        own = self.classes != list(CATEGORIES)
        unknown = [name for name in self.classes if name not in seen and name not in CATEGORIES]
        if unknown or (seen and not own and not seen & set(CATEGORIES)):
            asked = f"the category {', '.join(unknown)}" if own else "VOC's 20 categories"
            raise ValueError(
                f"no object of {lists} is of {asked}; there are {', '.join(sorted(seen)) or 'none'}; name those that "
                "are wanted with --data.categories"
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
    """Where the images and annotations lie that an entry of a split names.

    Args:
        files: of the data set.
        entry: of the split.
        split: for an error.

    Attributes:
        folders: that were looked in.
        lists: the file of the list, if there is one.
        annotations: the paths of the XML files, by the names that lists have for them.
        listed: names of images, perhaps with an ending, in quotes, or with a 1, 0 or -1 behind them.

    Raises:
        FileNotFoundError: there is no such list.
        ValueError: there is no such folder, or the list is empty or no text.
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
        """The name of a listed image, among :attr:`annotations`.

        Raises:
            FileNotFoundError: it has none.
        """
        quoted = re.sub(r"\s+(?:-1|0|1)$", "", line)
        name = re.sub(r'^"(.+)"$', r"\1", quoted)  # as CVAT and datumaro write one with a space
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
            stem: its name in a list.
            filename: its file's name in its annotations, which counts where files have another name than their
                annotations, or where two differ in their endings alone.

        Raises:
            ValueError: it may be one of several.
        """
        alike = self._by_stem.get(composed(stem), [])
        found = [path for own, path in alike if own == stem] or [path for _, path in alike]
        if len(found) == 1:
            return found[0]
        name = posixpath.basename(filename.strip().replace("\\", "/"))
        named = [path for path in found if composed(posixpath.basename(path)) == composed(name)]
        if found and not named:
            raise ValueError(f"its image may be {found[0]} or {found[1]}, and its filename is {filename!r:.200}")
        if named:
            return named[0]
        folder = posixpath.dirname(f"{self._images}/{stem}")
        other = posixpath.normpath(f"{folder}/{name}")
        if name and self._files.holds(other):
            return other
        return self._paths.get(composed(other), posixpath.normpath(f"{self._images}/{stem}.jpg"))


def _below(files: Files, folder: str) -> Iterator[tuple[str, str, str]]:
    """Of each file below a folder: its path from there without the ending, its ending in small letters, its path."""
    for path in files.below(folder):
        stem, ending = posixpath.splitext(path)
        yield stem if folder == "." else stem[len(folder) + 1 :], ending.lower(), path


def _without_list(files: Files, entry: str) -> tuple[str, str]:
    """The folders of the images and of the XML files, in a folder without lists."""
    folder = posixpath.normpath(entry)
    images = _inner(files, folder, _IMAGE_FOLDERS, ENDINGS)
    xml = _inner(files, folder, _XML_FOLDERS, {".xml"})
    if _is_xml_folder(folder) and not any(ending in ENDINGS for _, ending, _ in _below(files, folder)):
        images = _inner(files, posixpath.dirname(folder) or ".", _IMAGE_FOLDERS, ENDINGS)
    return images, xml


def _inner(files: Files, folder: str, names: Sequence[str], endings: Collection[str]) -> str:
    """The first folder of these names in a folder that holds files of these endings; the folder itself without one."""
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
            f"a split of VOC is YEAR/LIST, such as VOC2007/trainval, got {entry!r:.200}, which is no folder with XML "
            f"files in {files.root}, either; there are: {there}{hint}"
        )
    return FileNotFoundError(
        f"{files.name(f'{place}/{_LISTS}/{name}.txt')} is not a file; name the lists that are there, such as "
        f"--data.{split}='[VOC2007/trainval]'{hint}; there are: {there}"
    )


def _lines(files: Files, path: str) -> list[str]:
    try:
        lines = files.read(path, _LARGEST_LIST).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{files.name(path)} is no list: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def _parse(content: bytes) -> ElementTree.Element:
    """The root of an XML file. Entities, which can grow without end or name other files, need a DTD, which none has.

    Raises:
        expat.ExpatError: it is no XML.
        ValueError: it has a DTD, or nests too deeply.
    """
    depth = 0

    def refuse(*_: Any) -> None:
        raise ValueError("it has a DTD (<!DOCTYPE>), which annotations do not need, and which is not read")

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
        if "_" in text:  # which Python would skip
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
